"""Data sets by name, read as options/data_sets.py says, and synthetic images. A new data set is
entered there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from split_affinity.data.digits import read_digits
from split_affinity.data.pictures import ImageData, derived_seed, load_image, to_rgb
from split_affinity.errors import UserError
from split_affinity.models.pretrained import Preprocessing, imagenet_classes, largest_size
from split_affinity.options.data_sets import IMAGENET_FILES, NAMED_DATA
from split_affinity.options.settings import Settings, images_in_step
from split_affinity.text import try_print

CIFAR10 = Preprocessing(**NAMED_DATA["cifar10"].preprocessing)
CIFAR10_FOLDER = "cifar-10-batches-py"

SYNTHETIC_IMAGES, SYNTHETIC_CLASSES, SYNTHETIC_PATTERNS = 1280, 1000, 10


class SyntheticImages(Dataset):
    """Pictures (side, side) of 4 x 4 squares, a pattern for each class, and noise.

    They depend on seed and index alone. Only the first `patterns` classes have pictures: with a
    thousand classes, or with more noise, the loss would not fall within fifty steps.
    """

    def __init__(self, count: int, side: int, classes: int, seed: int):
        self.patterns = min(SYNTHETIC_PATTERNS, classes)
        self._count, self._side, self._seed = count, side, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        target = index % self.patterns
        pattern = self._numbers(224, 4, "pattern", target)
        pattern = nn.functional.interpolate(pattern[None], self._side)[0]
        noise = self._numbers(32, self._side, "noise", index)
        return v2.functional.to_pil_image(pattern + noise), target

    def _numbers(self, end: int, side: int, *what: object) -> torch.Tensor:
        """Random whole numbers below `end`, (3, side, side)."""
        generator = torch.Generator().manual_seed(derived_seed(self._seed, *what))
        return torch.empty(3, side, side, dtype=torch.uint8).random_(0, end, generator=generator)


def synthetic_data(settings: Settings) -> ImageData:
    """Images without files, to time training and to see a loss fall; nothing of use is learned."""
    classes = settings.num_classes or SYNTHETIC_CLASSES
    images = max(SYNTHETIC_IMAGES, images_in_step(settings))
    train = SyntheticImages(images, largest_size(settings, 224), classes, settings.seed)
    return ImageData("synthetic", train, None, tuple(map(str, range(classes))))


class NamedPictures(Dataset):
    """Pictures in RGB, and class indices, of one of torchvision's data sets.

    `samples` are the paths and class indices of pictures in files, which are opened as those of
    image folders are; it is empty if the pictures are not in files.
    """

    def __init__(self, source: Dataset, root: Path, read: Callable[[str], Any] = load_image):
        self._read = read
        self.source, self.root, self.samples = source, root, file_samples(source)
        if self.samples:
            labels = [label for _, label in self.samples]
        else:
            labels = source.targets if hasattr(source, "targets") else source.labels
        self.targets = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        target = self.targets[index]
        if self.samples:
            return self._read(self.samples[index][0]), target
        return to_rgb(self.source[index][0]), target


def file_samples(source: Dataset) -> list[tuple[str, int]]:
    """Path and class index of each picture of a torchvision data set; none if not in files."""
    # torchvision has several names for these.
    for name in ("samples", "_samples"):
        if hasattr(source, name):
            return getattr(source, name)
    for name in ("_image_files", "_images"):
        if hasattr(source, name):
            return list(zip(map(str, getattr(source, name)), source._labels, strict=True))
    return []


def class_names(source: Dataset, count: int) -> tuple[str, ...]:
    """torchvision's names of a data set's classes, the first if a class has several; or numbers."""
    names = getattr(source, "classes", None)
    if not names:
        return tuple(f"{number:0{len(str(count - 1))}}" for number in range(count))
    if len(names) == 1000:  # ImageNet's first names are not unique: there are two cranes
        names = imagenet_classes()
    return tuple(name if isinstance(name, str) else name[0] for name in names)


def check_imagenet(path: Path) -> None:
    """Raise UserError if ImageNet can be neither read nor unpacked; say if it will be unpacked."""
    sets = torchvision.datasets.imagenet
    archives = {name: archive for name, (archive, _) in sets.ARCHIVE_META.items()}
    unpacked = {"devkit": sets.META_FILE, "train": "train", "val": "val"}
    needed = [archives[name] for name, made in unpacked.items() if not (path / made).exists()]
    missing = [name for name in needed if not (path / name).exists()]
    if missing:
        raise UserError(
            f"--data-path {path}: no ImageNet: {', '.join(missing)} not found: put {IMAGENET_FILES}"
            ", there; train and val alone are an image folder, for which you need no --dataset"
        )
    if needed:
        try_print(
            f"verifying and unpacking {', '.join(needed)} in {path}; this takes long", sys.stderr
        )


def explain_error(error: Exception) -> str:
    """Why torchvision could not read a data set, in one line."""
    if isinstance(error, ImportError) and error.name:
        return f"it takes the package {error.name} to read it: pip install {error.name}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace("download=True", "--download")


def named_data(
    name: str, path: Path, download: bool, open_file: Callable[[str], Any] = load_image
) -> ImageData:
    """A data set by name. torchvision fetches it if asked to, verifies, unpacks and reads it."""
    known = NAMED_DATA[name]
    if known.padded:  # nothing of a small picture is left out
        open_file = load_image
    title = known.what.partition(":")[0]
    if name == "imagenet":
        check_imagenet(path)
    read = read_digits if name == "digits" else getattr(torchvision.datasets, known.reader)
    options = {"download": True} if download else {}
    try:
        train, val = (
            NamedPictures(read(path, **part, **options), path, open_file)
            if part is not None
            else None
            for part in known.parts
        )
    except Exception as error:  # of the network, of the disk, of pickle, or a checksum's
        layout = known.layout.replace("PATH", str(path))
        remedy = f"; without a network, put {layout} there by hand" if download else ""
        raise UserError(f"--data-path {path}: no {title}: {explain_error(error)}{remedy}") from None
    for part, count in ((train, known.train), (val, known.val)):
        # torchvision does not verify files any more once a folder for them is there.
        if part and part.samples and len(part) < count:
            found = f"{title} has {count} images, of which only {len(part)} are there"
            remedy = "if unpacking was broken off, remove what came of it, and begin again"
            raise UserError(f"--data-path {path}: {found}: {remedy}")
    classes, ready = class_names(train.source, known.classes), Preprocessing(**known.preprocessing)
    return ImageData(name, train, val, classes, ready, padded=known.padded)
