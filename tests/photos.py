"""A small image folder of real photographs, without a download.

Crops scikit-learn's two sample images (a temple and a flower) into JPEGs of two classes:

    python tests/photos.py data/photos 640
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images


def make_photos(root: Path, count: int, smallest: int = 128, largest: int = 400) -> Path:
    """Write `count` square crops, sides in pixels, as root/train/<class>/*.jpg; returns root."""
    draw = random.Random(0)
    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        picture = Image.fromarray(pixels)
        folder = root / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count // 2):
            side = draw.randint(smallest, largest)
            left = draw.randint(0, picture.width - side)
            top = draw.randint(0, picture.height - side)
            crop = picture.crop((left, top, left + side, top + side))
            crop.save(folder / f"{number:04}.jpg", quality=90)
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    make_photos(asked.folder, asked.count)
