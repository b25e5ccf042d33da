"""A small image folder of handwritten digits, without a download.

Writes scikit-learn's 1,797 digits as PNGs of 32 pixels, every fifth into `val`, the rest into
`train`:

    python tests/digits.py data/digits
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def make_digits(root: Path) -> Path:
    """Write root/{train,val}/<digit>/*.png; returns root."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        picture = Image.fromarray(np.uint8(pixels * 255 / 16)).resize((32, 32), Image.BICUBIC)
        folder = root / ("train" if number % 5 else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:04}.png")
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    make_digits(parser.parse_args().folder)
