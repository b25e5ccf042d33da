"""What `--dataset` takes, in words and figures. How each is read stands in data/named.py."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from split_affinity.text import did_you_mean


@dataclass(frozen=True)
class NamedData:
    """What `--dataset` takes, in words and figures: what it is, its title first; what torchvision
    reads in --data-path; images to train and to validate on (0: some of the former are drawn), and
    which part of it the latter are; classes; defaults of its own; and what it needs beside
    torchvision.
    """

    what: str
    layout: str
    train: int
    val: int
    part: str
    classes: int
    defaults: dict[str, Any] = field(default_factory=dict)
    needs: str = ""


# What stands in a picture of these is something else in a mirror.
NOT_MIRRORED = {"hflip": 0.0}
IMAGENET_FILES = (
    "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from "
    "https://image-net.org/download.php"
)
VAL_SHARE = 0.2  # of a data set by name without images to validate with
# fmt: off
NAMED_DATA = {
    "digits": NamedData("Digits: handwritten, of scikit-learn, 32 px",
        "PATH/train/<digit>/*.png and PATH/val, written there if PATH does not exist; data/digits "
        "without --data-path", 1437, 360, "val", 10,
        {**NOT_MIRRORED, "min_scale": 0.6, "data_path": Path("data/digits")},
        needs="scikit-learn, to write it"),
    "imagenet": NamedData("ImageNet: photographs of animals and things (ILSVRC 2012)",
        f"PATH/train and PATH/val, unpacked there from {IMAGENET_FILES}, which you put into PATH",
        1281167, 50000, "val", 1000, needs="scipy, to unpack it"),
    "imagenette": NamedData("Imagenette: ten of ImageNet's classes, easily told apart",
        "PATH/imagenette2", 9469, 3925, "val", 10),
    "imagenette-320": NamedData("Imagenette-320: the same, with shorter sides of 320 px",
        "PATH/imagenette2-320", 9469, 3925, "val", 10),
    "imagenette-160": NamedData("Imagenette-160: the same, with shorter sides of 160 px",
        "PATH/imagenette2-160", 9469, 3925, "val", 10),
    "cifar10": NamedData("CIFAR-10: photographs of animals and vehicles, 32 px",
        "PATH/cifar-10-batches-py", 50000, 10000, "test", 10),
    "cifar100": NamedData("CIFAR-100: photographs of things, plants, animals and people, 32 px",
        "PATH/cifar-100-python", 50000, 10000, "test", 100),
    "fashion-mnist": NamedData("Fashion-MNIST: clothes and shoes in grey, 28 px",
        "PATH/FashionMNIST/raw", 60000, 10000, "test", 10),
    "flowers102": NamedData("Flowers-102: photographs of British flowers",
        "PATH/flowers-102", 1020, 1020, "val", 102, needs="scipy"),
    "food101": NamedData("Food-101: photographs of dishes",
        "PATH/food-101", 75750, 25250, "test", 101),
    "oxford-pets": NamedData("Oxford-IIIT Pet: photographs of breeds of cats and dogs",
        "PATH/oxford-iiit-pet", 3680, 3669, "test", 37),
    "eurosat": NamedData("EuroSAT: use of land as satellites see it, 64 px",
        "PATH/eurosat/2750", 27000, 0, "", 10),
    "dtd": NamedData("DTD: photographs of textures, its first partition",
        "PATH/dtd/dtd", 1880, 1880, "val", 47),
    "gtsrb": NamedData("GTSRB: German traffic signs, 15 to 250 px",
        "PATH/gtsrb", 26640, 12630, "test", 43, {**NOT_MIRRORED, "min_scale": 0.6}),
    "svhn": NamedData("SVHN: digits of house numbers, 32 px",
        "PATH/train_32x32.mat and PATH/test_32x32.mat", 73257, 26032, "test", 10, NOT_MIRRORED,
        needs="scipy"),
    "stl10": NamedData("STL-10: photographs of animals and vehicles, 96 px",
        "PATH/stl10_binary", 5000, 8000, "test", 10),
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
    val = f"{data.val} to validate, its {data.part} part"
    drawn = f"of which {VAL_SHARE:g} of each class validate"
    facts = {
        "what": data.what,
        "layout": data.layout + fetched,
        "images": f"{data.train} to train, {val if data.val else drawn}",
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
