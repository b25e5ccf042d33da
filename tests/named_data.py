"""Small data sets in the formats that torchvision reads, without a download.

Each function writes one, of pictures of one colour, into a folder for `--data-path`, and returns
the class names that it stands for. `accept` makes torchvision take such files for the real ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets as sets
from cifar import make_cifar
from PIL import Image
from scipy.io import savemat

from split_affinity.options.data_sets import NAMED_DATA

Colour = tuple[int, int, int]
Part = Sequence[tuple[int, Colour]]  # class index and colour of each picture
# Three of ImageNet's, in the order of their ids; those of its devkit are others.
WORDNET = {
    "n01440764": "tench, Tinca tinca",
    "n02102040": "English springer, English springer spaniel",
    "n02979186": "cassette player",
}


def picture(colour: Colour, width: int = 40, height: int = 30) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (width, height), colour)


def pixels(part: Part, side: int) -> np.ndarray:
    """A part's pictures (n, side, side, 3)."""
    return np.stack([np.asarray(picture(colour, side, side)) for _, colour in part])


def save(path: Path, colour: Colour, *size: int) -> Path:
    """Save a picture; as a JPEG, it is of that colour but for a shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour, *size).save(path, quality=95)
    return path


def md5(path: Path) -> str:
    """A file's checksum."""
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def in_folders(folder: Path, names: Sequence[str], part: Part, suffix: str, *size: int) -> None:
    """Save a part's pictures in a folder for each class, numbered in their order."""
    for number, (label, colour) in enumerate(part):
        save(folder / names[label] / f"{number:05}{suffix}", colour, *size)


def packed(archive: Path, folder: Path) -> Path:
    """A tar file of what is in a folder, which goes."""
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    return archive


def imagenet(root: Path, train: Part, val: Part) -> Sequence[str]:
    """The three archives of ILSVRC 2012."""
    wnids = list(WORDNET)
    in_folders(root / "made", wnids, train, ".JPEG")
    for wnid in wnids:
        packed(root / f"made/{wnid}.tar", root / "made" / wnid)
    packed(root / "ILSVRC2012_img_train.tar", root / "made")
    for number, (_, colour) in enumerate(val, start=1):
        save(root / f"made/ILSVRC2012_val_{number:08}.JPEG", colour)
    packed(root / "ILSVRC2012_img_val.tar", root / "made")
    ids = {0: 3, 1: 1, 2: 2}  # of the devkit, by class index
    rows = [(ids[label], wnids[label], WORDNET[wnids[label]], "", 0) for label in (1, 2, 0)]
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "children")]
    synsets = np.array([*rows, (1001, "n00001740", "entity", "", 3)], fields)
    data = root / "made/ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets[:, None]})
    truth = "".join(f"{ids[label]}\n" for label, _ in val)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    packed(root / "ILSVRC2012_devkit_t12.tar.gz", root / "made")
    return [words.split(", ")[0] for words in WORDNET.values()]


def imagenette(folder: str) -> Callable[[Path, Part, Part], Sequence[str]]:
    """Imagenette in one of its sizes, unpacked."""

    def write(root: Path, train: Part, val: Part) -> Sequence[str]:
        for name, part in (("train", train), ("val", val)):
            in_folders(root / folder / name, list(WORDNET), part, ".JPEG")
        return [words.split(", ")[0] for words in WORDNET.values()]

    return write


def cifar10(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Pickles, by the writer of the tests of CIFAR-10."""
    names = ["airplane", "automobile", "bird"]
    parts = ((pixels(part, 32), [label for label, _ in part]) for part in (train, val))
    make_cifar(root, *parts, names)
    return names


def cifar100(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Pickles: rows of 3,072 bytes, all of an image's red, then green, then blue."""
    names = ["apple", "aquarium_fish", "baby"]
    folder = root / "cifar-100-python"
    for name, part in (("train", train), ("test", val)):
        data = pixels(part, 32).transpose(0, 3, 1, 2).reshape(len(part), 3072)
        labels = [label for label, _ in part]
        content = {"data": data, "fine_labels": labels, "coarse_labels": [0] * len(part)}
        write_bytes(folder / name, pickle.dumps(content, protocol=2))
    write_bytes(folder / "meta", pickle.dumps({"fine_label_names": names}, protocol=2))
    return names


def fashion_mnist(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Big-endian idx files of grey pictures, of the colours' red."""
    folder = root / "FashionMNIST/raw"
    for name, part in (("train", train), ("t10k", val)):
        grey, labels = pixels(part, 28)[..., 0], np.array([label for label, _ in part], np.uint8)
        head = np.array([0x803, len(part), 28, 28], ">i4").tobytes()
        write_bytes(folder / f"{name}-images-idx3-ubyte", head + grey.tobytes())
        head = np.array([0x801, len(part)], ">i4").tobytes()
        write_bytes(folder / f"{name}-labels-idx1-ubyte", head + labels.tobytes())
    return sets.FashionMNIST.classes


def flowers102(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Numbered pictures, those of the validation first, and two files of MATLAB's."""
    folder, both = root / "flowers-102", [*val, *train]
    for number, (_, colour) in enumerate(both, start=1):
        save(folder / f"jpg/image_{number:05}.jpg", colour)
    savemat(folder / "imagelabels.mat", {"labels": [label + 1 for label, _ in both]})
    numbers = np.arange(1, len(both) + 1)
    parts = {"trnid": numbers[len(val) :], "valid": numbers[: len(val)], "tstid": numbers[:0]}
    savemat(folder / "setid.mat", parts)
    return sets.Flowers102.classes


def food101(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Pictures by class, and lists of the parts."""
    names, folder = ["apple_pie", "baklava", "waffles"], root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for part, name, first in ((train, "train", 100), (val, "test", 200)):
        of_class = {each: [] for each in names}
        for number, (label, colour) in enumerate(part, start=first):
            save(folder / f"images/{names[label]}/{number}.jpg", colour)
            of_class[names[label]].append(f"{names[label]}/{number}")
        (folder / f"meta/{name}.json").write_text(json.dumps(of_class))
    return names


def oxford_pets(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Pictures named by breed, and lists of the parts."""
    names, folder = ["Abyssinian", "american_bulldog", "Bengal"], root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part, name, first in ((train, "trainval", 1), (val, "test", 101)):
        lines = []
        for number, (label, colour) in enumerate(part, start=first):
            save(folder / f"images/{names[label]}_{number}.jpg", colour)
            lines.append(f"{names[label]}_{number} {label + 1} 1 1\n")
        (folder / f"annotations/{name}.txt").write_text("".join(lines))
    return ["Abyssinian", "American Bulldog", "Bengal"]


def eurosat(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Pictures by class, all in one part."""
    assert not val
    names = ["AnnualCrop", "Forest", "River"]
    in_folders(root / "eurosat/2750", names, train, ".jpg", 64, 64)
    return names


def dtd(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Pictures by class, and lists of the parts of the first partition."""
    names, folder = ["banded", "blotchy", "braided"], root / "dtd/dtd"
    (folder / "labels").mkdir(parents=True)
    for part, name, first in ((train, "train1", 100), (val, "val1", 200)):
        lines = []
        for number, (label, colour) in enumerate(part, start=first):
            path = f"{names[label]}/{names[label]}_{number:04}.jpg"
            save(folder / "images" / path, colour)
            lines.append(path)
        (folder / f"labels/{name}.txt").write_text("\n".join(lines))
    return names


def gtsrb(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Pictures by class to train on, a list of those to validate with."""
    folder = root / "gtsrb"
    in_folders(folder / "GTSRB/Training", [f"{n:05}" for n in range(3)], train, ".ppm")
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, (label, colour) in enumerate(val):
        save(folder / f"GTSRB/Final_Test/Images/{number:05}.ppm", colour)
        rows.append(f"{number:05}.ppm;40;30;5;5;35;25;{label}")
    (folder / "GT-final_test.csv").write_text("\n".join(rows))
    return [f"{number:02}" for number in range(43)]


def svhn(root: Path, train: Part, val: Part) -> Sequence[str]:
    """MATLAB's files; class 10 is the digit 0."""
    for name, part in (("train", train), ("test", val)):
        labels = np.array([[label or 10] for label, _ in part], np.uint8)
        data = pixels(part, 32).transpose(1, 2, 3, 0)
        savemat(root / f"{name}_32x32.mat", {"X": data, "y": labels})
    return [str(digit) for digit in range(10)]


def stl10(root: Path, train: Part, val: Part) -> Sequence[str]:
    """Bytes of pictures, column by column, and of classes from 1."""
    names, folder = ["airplane", "bird", "car"], root / "stl10_binary"
    for name, part in (("train", train), ("test", val), ("unlabeled", val[:1])):
        write_bytes(folder / f"{name}_X.bin", pixels(part, 96).transpose(0, 3, 2, 1).tobytes())
        write_bytes(folder / f"{name}_y.bin", bytes(label + 1 for label, _ in part))
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    return names


WRITERS = {
    "imagenet": imagenet,
    "imagenette": imagenette("imagenette2"),
    "imagenette-320": imagenette("imagenette2-320"),
    "imagenette-160": imagenette("imagenette2-160"),
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion-mnist": fashion_mnist,
    "flowers102": flowers102,
    "food101": food101,
    "oxford-pets": oxford_pets,
    "eurosat": eurosat,
    "dtd": dtd,
    "gtsrb": gtsrb,
    "svhn": svhn,
    "stl10": stl10,
}


def accept(monkeypatch: Any, name: str, root: Path, images: tuple[int, int]) -> Path:
    """During a test, take the files below root, as they are now, for a data set of so many images
    to train and to validate on; returns root.
    """
    known = {md5(path) for path in root.rglob("*") if path.is_file()}
    monkeypatch.setattr(sets.utils, "check_md5", lambda path, _: md5(Path(path)) in known)
    told = dataclasses.replace(NAMED_DATA[name], train=images[0], val=images[1])
    monkeypatch.setitem(NAMED_DATA, name, told)
    return root


def make(monkeypatch: Any, name: str, root: Path, train: Part, val: Part) -> Sequence[str]:
    """Write a data set, and take it for the real one during a test; returns its class names."""
    root.mkdir(parents=True, exist_ok=True)
    classes = WRITERS[name](root, train, val)
    accept(monkeypatch, name, root, (len(train), len(val)))
    return classes
