"""Data sets by name, which torchvision reads, and synthetic images. A new data set is entered here
and, in words, in options/data_sets.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR10_FOLDER = "cifar-10-batches-py"

SYNTHETIC_IMAGES, SYNTHETIC_CLASSES, SYNTHETIC_PATTERNS = 1280, 1000, 10


class SyntheticImages(Dataset):
    """Pictures (side, side), made when asked for: each class has a pattern of 4 x 4 squares in its
    colours, each picture some noise of its own. They depend on seed and index alone.

    Only the first `patterns` classes have pictures, in turn: of a thousand, no net could learn much
    in fifty steps; with more noise, the loss of ResNet-50 first rises before it falls.
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
        """Random whole numbers below `end`, of shape (3, side, side)."""
        generator = torch.Generator().manual_seed(derived_seed(self._seed, *what))
        return torch.empty(3, side, side, dtype=torch.uint8).random_(0, end, generator=generator)


def synthetic_data(settings: Settings) -> ImageData:
    """Images without files, to time training and to see a loss fall; what is learned is of no use.
    Their size and the number of classes are ImageNet's unless others are asked for.
    """
    classes = settings.num_classes or SYNTHETIC_CLASSES
    images = max(SYNTHETIC_IMAGES, images_in_step(settings))
    train = SyntheticImages(images, largest_size(settings, 224), classes, settings.seed)
    return ImageData("synthetic", train, None, tuple(map(str, range(classes))))


def small_pictures(side: int, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """For pictures of one small size, which are shown whole."""
    return Preprocessing(side, side, mean=mean, std=std)


CIFAR10 = small_pictures(32, CIFAR10_MEAN, CIFAR10_STD)
BY_FLAG = {"train": True}, {"train": False}
TRAIN_VAL, TRAIN_TEST = (({"split": "train"}, {"split": part}) for part in ("val", "test"))


@dataclass(frozen=True)
class Reader:
    """How a data set is read: torchvision's class, what that takes for the part to train on and for
    the one to validate with (None if it has none), how its pictures are made ready, and whether
    they are padded and cropped (see ImageData).
    """

    read: Callable[..., Dataset]
    parts: tuple[dict[str, Any], dict[str, Any] | None]
    native: Preprocessing = Preprocessing()
    is_padded: bool = False


# fmt: off
# Means and deviations of the images to train on, as published; ImageNet's where none are known.
sets = torchvision.datasets
READERS = {
    "digits": Reader(read_digits, ({"part": "train"}, {"part": "val"}), Preprocessing(32, 37)),
    "imagenet": Reader(sets.ImageNet, TRAIN_VAL),
    "imagenette": Reader(sets.Imagenette, TRAIN_VAL),
    "imagenette-320": Reader(partial(sets.Imagenette, size="320px"), TRAIN_VAL),
    "imagenette-160": Reader(partial(sets.Imagenette, size="160px"), TRAIN_VAL,
        Preprocessing(128, 146)),
    "cifar10": Reader(sets.CIFAR10, BY_FLAG, CIFAR10, True),
    "cifar100": Reader(sets.CIFAR100, BY_FLAG,
        small_pictures(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), True),
    "fashion-mnist": Reader(sets.FashionMNIST, BY_FLAG,
        small_pictures(28, 3 * (0.2860,), 3 * (0.3530,)), True),
    "flowers102": Reader(sets.Flowers102, TRAIN_VAL),
    "food101": Reader(sets.Food101, TRAIN_TEST),
    "oxford-pets": Reader(sets.OxfordIIITPet, ({"split": "trainval"}, {"split": "test"})),
    "eurosat": Reader(sets.EuroSAT, ({}, None),
        small_pictures(64, (0.3444, 0.3803, 0.4078), (0.2027, 0.1365, 0.1155)), True),
    "dtd": Reader(sets.DTD, TRAIN_VAL),
    "gtsrb": Reader(sets.GTSRB, TRAIN_TEST,
        small_pictures(32, (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669))),
    "svhn": Reader(sets.SVHN, TRAIN_TEST,
        small_pictures(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)), True),
    "stl10": Reader(sets.STL10, TRAIN_TEST,
        small_pictures(96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)), True),
}
# fmt: on


class Pictures(Dataset):
    """Pictures in RGB, and class indices, of a data set that torchvision has read.

    Those in files are opened as those of image folders are; `samples` are then their paths and
    class indices, in torchvision's order.
    """

    def __init__(self, source: Dataset, root: Path):
        self.source, self.root, self.samples = source, root, file_samples(source)
        labels = [target for _, target in self.samples] or getattr(source, "targets", None)
        self.targets = [int(label) for label in (source.labels if labels is None else labels)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        target = self.targets[index]
        if self.samples:
            return load_image(self.samples[index][0]), target
        return to_rgb(self.source[index][0]), target


def file_samples(source: Dataset) -> list[tuple[str, int]]:
    """Path and class index of each picture of one of torchvision's data sets; none if its pictures
    are not in files. It has several names for these.
    """
    for name in ("samples", "_samples"):
        if hasattr(source, name):
            return getattr(source, name)
    for name in ("_image_files", "_images"):
        if hasattr(source, name):
            return list(zip(map(str, getattr(source, name)), source._labels, strict=True))
    return []


def names_of_classes(source: Dataset, count: int) -> tuple[str, ...]:
    """The names of a data set's classes: torchvision's, the first of several, or else numbers.

    ImageNet's are as its weights have them, since two cranes have the same first name.
    """
    names = getattr(source, "classes", None)
    if not names:
        return tuple(f"{number:0{len(str(count - 1))}}" for number in range(count))
    if len(names) == 1000:
        names = imagenet_classes()
    return tuple(name if isinstance(name, str) else name[0] for name in names)


def prepare_imagenet(path: Path) -> None:
    """Say that ImageNet is going to be unpacked, if it is. Raises UserError if it cannot be."""
    archives = {name: archive for name, (archive, _) in sets.imagenet.ARCHIVE_META.items()}
    unpacked = {"devkit": sets.imagenet.META_FILE, "train": "train", "val": "val"}
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


def why_not_read(error: Exception) -> str:
    """Why torchvision could not read a data set, in one line."""
    if isinstance(error, ImportError) and error.name:
        return f"it takes the package {error.name} to read it: pip install {error.name}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace("download=True", "--download")


def named_data(name: str, path: Path, download: bool) -> ImageData:
    """A data set by name, which torchvision fetches if asked to, verifies, unpacks and reads."""
    told, reader = NAMED_DATA[name], READERS[name]
    title = told.what.partition(":")[0]
    if name == "imagenet":
        prepare_imagenet(path)
    options = {"download": True} if download else {}
    try:
        train, val = (
            Pictures(reader.read(path, **part, **options), path) if part is not None else None
            for part in reader.parts
        )
    except Exception as error:  # of the network, of the disk, of pickle, or a checksum's
        by_hand = f"; without a network, put {told.layout.replace('PATH', str(path))} there by hand"
        remedy = by_hand if download else ""
        raise UserError(f"--data-path {path}: no {title}: {why_not_read(error)}{remedy}") from None
    for part, count in ((train, told.train), (val, told.val)):
        # torchvision does not verify files any more once a folder for them is there.
        if part and part.samples and len(part) < count:
            found = f"{title} has {count} images, of which only {len(part)} are there"
            remedy = "if unpacking was broken off, remove what came of it, and begin again"
            raise UserError(f"--data-path {path}: {found}: {remedy}")
    padded = reader.native.image_size if reader.is_padded else 0
    classes = names_of_classes(train.source, told.classes)
    return ImageData(name, train, val, classes, reader.native, padded=padded)
