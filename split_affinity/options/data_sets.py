"""What `--dataset` takes: the one table of data sets. data/named.py reads them."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from split_affinity.text import did_you_mean


@dataclass(frozen=True)
class NamedData:
    """What is known of a data set before it is read, in plain values."""

    what: str  # its title first
    layout: str  # what is read in --data-path, PATH
    train: int  # images
    val: int  # images; 0 if some are kept apart
    classes: int
    reader: str  # the name of a class in torchvision.datasets; "digits" for data/digits.py
    parts: tuple[dict[str, Any], dict[str, Any] | None]  # the reader's arguments to train, validate
    preprocessing: dict[str, Any] = field(default_factory=dict)  # the arguments of Preprocessing
    padded: int = 0  # see ImageData
    defaults: dict[str, Any] = field(default_factory=dict)  # of other options
    needs: str = ""  # packages beside torchvision


BY_FLAG = {"train": True}, {"train": False}
TRAIN_VAL = {"split": "train"}, {"split": "val"}
TRAIN_TEST = {"split": "train"}, {"split": "test"}


def by_size(size: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of one of Imagenette's sizes."""
    return {"split": "train", "size": size}, {"split": "val", "size": size}


def colours(side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """The preprocessing of small pictures: whole, by the colours of those to train on."""
    return {"image_size": side, "val_resize": side, "mean": mean, "std": std}


CIFAR10_COLOURS = colours(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_COLOURS = colours(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
FASHION_COLOURS = colours(28, 3 * (0.2860,), 3 * (0.3530,))
EUROSAT_COLOURS = colours(64, (0.3444, 0.3803, 0.4078), (0.2027, 0.1365, 0.1155))
GTSRB_COLOURS = colours(32, (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669))
SVHN_COLOURS = colours(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
STL10_COLOURS = colours(96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))

NOT_MIRRORED = {"hflip": 0.0}  # mirrored digits and signs are something else
IMAGENET_FILES = (
    "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from "
    "https://image-net.org/download.php"
)
VAL_SHARE = 0.2  # of a data set by name without images to validate with
# fmt: off
NAMED_DATA = {
    "digits": NamedData("Digits: handwritten, of scikit-learn, 32 px",
        "PATH/train/<digit>/*.png and PATH/val, written there if PATH does not exist; data/digits "
        "without --data-path", 1437, 360, 10, "digits", TRAIN_VAL,
        {"image_size": 32, "val_resize": 37}, needs="scikit-learn, to write it",
        defaults={**NOT_MIRRORED, "min_scale": 0.6, "data_path": Path("data/digits")}),
    "imagenet": NamedData("ImageNet: photographs of animals and things (ILSVRC 2012)",
        f"PATH/train and PATH/val, unpacked there from {IMAGENET_FILES}, which you put into PATH",
        1281167, 50000, 1000, "ImageNet", TRAIN_VAL, needs="scipy, to unpack it"),
    "imagenette": NamedData("Imagenette: ten of ImageNet's classes, easily told apart",
        "PATH/imagenette2", 9469, 3925, 10, "Imagenette", TRAIN_VAL),
    "imagenette-320": NamedData("Imagenette-320: the same, with shorter sides of 320 px",
        "PATH/imagenette2-320", 9469, 3925, 10, "Imagenette", by_size("320px")),
    "imagenette-160": NamedData("Imagenette-160: the same, with shorter sides of 160 px",
        "PATH/imagenette2-160", 9469, 3925, 10, "Imagenette", by_size("160px"),
        {"image_size": 128, "val_resize": 146}),
    "cifar10": NamedData("CIFAR-10: photographs of animals and vehicles, 32 px",
        "PATH/cifar-10-batches-py", 50000, 10000, 10, "CIFAR10", BY_FLAG, CIFAR10_COLOURS, 32),
    "cifar100": NamedData("CIFAR-100: photographs of things, plants, animals and people, 32 px",
        "PATH/cifar-100-python", 50000, 10000, 100, "CIFAR100", BY_FLAG, CIFAR100_COLOURS, 32),
    "fashion-mnist": NamedData("Fashion-MNIST: clothes and shoes in grey, 28 px",
        "PATH/FashionMNIST/raw", 60000, 10000, 10, "FashionMNIST", BY_FLAG, FASHION_COLOURS, 28),
    "flowers102": NamedData("Flowers-102: photographs of British flowers",
        "PATH/flowers-102", 1020, 1020, 102, "Flowers102", TRAIN_VAL, needs="scipy"),
    "food101": NamedData("Food-101: photographs of dishes",
        "PATH/food-101", 75750, 25250, 101, "Food101", TRAIN_TEST),
    "oxford-pets": NamedData("Oxford-IIIT Pet: photographs of breeds of cats and dogs",
        "PATH/oxford-iiit-pet", 3680, 3669, 37, "OxfordIIITPet",
        ({"split": "trainval"}, {"split": "test"})),
    "eurosat": NamedData("EuroSAT: use of land as satellites see it, 64 px",
        "PATH/eurosat/2750", 27000, 0, 10, "EuroSAT", ({}, None), EUROSAT_COLOURS, 64),
    "dtd": NamedData("DTD: photographs of textures, its first partition",
        "PATH/dtd/dtd", 1880, 1880, 47, "DTD", TRAIN_VAL),
    "gtsrb": NamedData("GTSRB: German traffic signs, 15 to 250 px",
        "PATH/gtsrb", 26640, 12630, 43, "GTSRB", TRAIN_TEST, GTSRB_COLOURS,
        defaults={**NOT_MIRRORED, "min_scale": 0.6}),
    "svhn": NamedData("SVHN: digits of house numbers, 32 px",
        "PATH/train_32x32.mat and PATH/test_32x32.mat", 73257, 26032, 10, "SVHN", TRAIN_TEST,
        SVHN_COLOURS, 32, NOT_MIRRORED, needs="scipy"),
    "stl10": NamedData("STL-10: photographs of animals and vehicles, 96 px",
        "PATH/stl10_binary", 5000, 8000, 10, "STL10", TRAIN_TEST, STL10_COLOURS, 96),
}
# fmt: on


def parse_data_set(text: str) -> str:
    """The name of a data set."""
    if text in NAMED_DATA:
        return text
    hint = did_you_mean(text.lower(), NAMED_DATA, 0.6)
    known = ", ".join(NAMED_DATA)
    raise argparse.ArgumentTypeError(f"no data set {text!r} (choose from {known}){hint}")


IMAGE_FOLDER = """\
image folder
  what     your own pictures, in a folder for each class
  layout   PATH/train/<class>/*.jpg and, to validate, PATH/val/<class>/*.jpg
           (or valid, or validation); or PATH/<class>/*.jpg, of which
           --val-share keeps some apart to validate with
  images   all that the folders hold: .jpg, .png, .webp, .tif, .bmp and others
  classes  as many as there are folders, two or more"""

SYNTHETIC = """\
synthetic
  what     images that are made, from --seed, to measure and to try things out
  layout   none: what a run without --data-path takes
  images   1280 to train, more if a step has more; none to validate
  classes  1000, or --num-classes"""


def describe_data_set(name: str) -> str:
    """A block of --list-data-sets."""
    data = NAMED_DATA[name]
    by_hand = name in ("digits", "imagenet")
    fetched = "" if by_hand else ", its own format; --download fetches it"
    val = f"of which {VAL_SHARE:g} of each class validate"
    if part := data.parts[1]:
        val = f"{data.val} to validate, its {part.get('split', 'test')} part"
    facts = {
        "what": data.what,
        "layout": data.layout + fetched,
        "images": f"{data.train} to train, {val}",
        "classes": str(data.classes),
        "needs": data.needs,
    }
    indents = {"subsequent_indent": " " * 11, "break_on_hyphens": False}
    lines = (textwrap.fill(f"  {key:8} {facts[key]}", 79, **indents) for key in facts if facts[key])
    return "\n".join([name, *lines])


DATA_SETS = "\n\n".join(
    [IMAGE_FOLDER, "Those below, but for the last, by --dataset NAME --data-path PATH:"]
    + [*map(describe_data_set, NAMED_DATA), SYNTHETIC]
)
