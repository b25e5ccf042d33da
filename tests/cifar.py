"""A small data set in CIFAR-10's own format for Python, without a download.

Writes scikit-learn's 1,797 digits as colour images of 32 pixels, every fifth into `test_batch`, the
rest into `data_batch_1` to `data_batch_5`; further arguments go to the program, which then trains
on them (torchvision takes no files but CIFAR-10's own, unless told otherwise as here):

    python tests/cifar.py data/cifar
    python tests/cifar.py data/cifar --recipe cifar10 --epochs 2
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

FOLDER = "cifar-10-batches-py"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Part = tuple[np.ndarray, Sequence[int]]  # images (n, 32, 32, 3) of bytes, and their class indices


def make_cifar(root: Path, train: Part, test: Part, classes: Sequence[str] = DIGITS) -> Path:
    """Write root/cifar-10-batches-py, the training images in five parts; returns root."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = train
    for number, places in enumerate(np.array_split(np.arange(len(images)), 5), start=1):
        part = images[places], [labels[place] for place in places]
        write_batch(folder / f"data_batch_{number}", f"training batch {number} of 5", *part)
    write_batch(folder / "test_batch", "testing batch 1 of 1", *test)
    names = {"num_cases_per_batch": len(images) // 5, "label_names": list(classes)}
    (folder / "batches.meta").write_bytes(pickle.dumps(names | {"num_vis": 3072}, protocol=2))
    return root


def write_batch(path: Path, name: str, images: np.ndarray, labels: Sequence[int]) -> None:
    """One file: a row of 3,072 bytes per image, first all of its red, then green, then blue."""
    content = {
        "batch_label": name,
        "labels": [int(label) for label in labels],
        "data": images.transpose(0, 3, 1, 2).reshape(len(images), 3072),
        "filenames": [f"{number:04}.png" for number in range(len(images))],
    }
    path.write_bytes(pickle.dumps(content, protocol=2))


def make_cifar_digits(root: Path, count: int = 1797) -> Path:
    """Write the first `count` digits as such a data set; returns root."""
    digits = load_digits()
    shades = (np.uint8(pixels * 255 / 16) for pixels in digits.images[:count])
    pictures = [Image.fromarray(shade).resize((32, 32), Image.BICUBIC) for shade in shades]
    images = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    labels, held_out = digits.target[:count], np.arange(count) % 5 == 0
    train, test = ((images[part], labels[part].tolist()) for part in (~held_out, held_out))
    return make_cifar(root, train, test)


def checksums(root: Path) -> dict[str, Any]:
    """The attributes of torchvision's CIFAR10 that make it take the files that are there now."""
    sums = {
        path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (root / FOLDER).iterdir()
    }
    return {
        "train_list": [
            [f"data_batch_{number}", sums[f"data_batch_{number}"]] for number in range(1, 6)
        ],
        "test_list": [["test_batch", sums["test_batch"]]],
        "meta": CIFAR10.meta | {"md5": sums["batches.meta"]},
    }


def accept(monkeypatch: Any, root: Path) -> Path:
    """Make torchvision take the files below root for CIFAR-10 during a test; returns root."""
    for name, value in checksums(root).items():
        monkeypatch.setattr(CIFAR10, name, value)
    return root


def main(folder: Path, arguments: Sequence[str]) -> int:
    """Write the digits; train on them if there are arguments."""
    root = make_cifar_digits(folder)
    if not arguments:
        return 0
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from train_split_affinity import main as run

    for name, value in checksums(root).items():
        setattr(CIFAR10, name, value)
    return run([*arguments, "--data-path", str(folder)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of a run to train on the digits")
    asked = parser.parse_args()
    sys.exit(main(asked.folder, asked.options))
