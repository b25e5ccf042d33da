"""Handwritten digits without a download: scikit-learn's, written once as an image folder."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from split_affinity.data.image_folder import PictureFolder
from split_affinity.text import try_print


def read_digits(path: Path, split: str, download: bool = False) -> PictureFolder:
    """The digits of `train` or `val`; they are written into `path` if it does not exist.

    `download` changes nothing; other data sets have it. Raises ImportError without scikit-learn,
    FileNotFoundError for a folder of something else.
    """
    if not path.exists():
        digits = load_digits()
        try_print(f"writing scikit-learn's digits into {path}", sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            write_digits(staged, digits).chmod(0o755)  # mkdtemp's folders are private
            staged.rename(path)
        except OSError:
            if not path.is_dir():  # else another process, such as another rank, was faster
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    if not (path / split).is_dir():
        remedy = "give a path that does not exist, to have them written there"
        raise FileNotFoundError(f"it has no folder {split}; {remedy}")
    return PictureFolder(path / split)


def load_digits() -> list[tuple[np.ndarray, int]]:
    """The 1,797 digits, (8, 8) from 0 to 16, with their labels."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(str(error), name="scikit-learn") from None
    digits = datasets.load_digits()
    return list(zip(digits.images, map(int, digits.target), strict=True))


def write_digits(root: Path, digits: Iterable[tuple[np.ndarray, int]] = ()) -> Path:
    """Write digits (default: all) as root/{train,val}/<digit>/*.png of 32 px; returns root."""
    for number, (pixels, label) in enumerate(digits or load_digits()):
        picture = Image.fromarray(np.uint8(pixels * 255 / 16)).resize((32, 32), Image.BICUBIC)
        folder = root / ("train" if number % 5 else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:04}.png")
    return root
