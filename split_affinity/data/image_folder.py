"""Image folders: a folder of pictures for each class."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from torchvision.datasets.folder import IMG_EXTENSIONS

from split_affinity.data.pictures import (
    HEIF,
    HEIF_ENDINGS,
    ImageData,
    heif_installed,
    heif_pictures,
    is_heif,
    load_image,
    picture_endings,
)
from split_affinity.errors import UserError, one_line
from split_affinity.text import readable

VALIDATION_FOLDERS = ("val", "valid", "validation")  # the first that exists is used

# Names of parts in the wild: Train, x_train, train2017, ValidationSet, test_images.
PART_WORDS = {
    "train": re.compile("x?(train|training|trn)(set|data|images)?"),
    "val": re.compile("x?(val|valid|validation|dev)(set|data|images)?"),
    "test": re.compile("x?(test|testing|eval|evaluation)(set|data|images)?"),
}


def part_of(name: str) -> str:
    """The part of a data set that a folder's name stands for: train, val, test, or nothing."""
    words = [word.lower() for word in re.findall("[A-Z]*[a-z]+|[A-Z]+", name)]
    parts = [part for part, known in PART_WORDS.items() if any(map(known.fullmatch, words))]
    return parts[0] if parts else ""


def find_parts(path: Path, folders: Sequence[str]) -> tuple[str, str]:
    """The folders of a data set with the images to train and to validate; nothing for none.

    A folder with another name than train may be a class (trains are vehicles): it is the part only
    if another part, or nothing, stands beside it.
    """
    named = {part: [each for each in folders if part_of(each) == part] for part in PART_WORDS}
    train = "train" if "train" in folders else ""
    if not train and named["train"] and (named["val"] or named["test"] or len(folders) == 1):
        train, *more = named["train"]
        if more:
            several = ", ".join(named["train"])
            raise UserError(f"--data-path {path}: which of {several} is to train on? Keep one")
    exact = [name for name in VALIDATION_FOLDERS if name in folders]
    val = [*exact, *named["val"]] if train else []
    return train, val[0] if val else ""


def folder_data(path: Path, read: Callable[[str], Any] = load_image) -> ImageData:
    """An image folder: `path/train` and perhaps `path/val`, or `path`, with a folder per class."""
    if not path.is_dir():
        reason = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"--data-path {path} {reason}; give an image folder: DIR/<class>/*.jpg")
    _, beside, _ = next(os.walk(path), ("", [], []))
    folders = sorted(name for name in beside if name[0] != ".")
    train_name, val_name = find_parts(path, folders)
    try:
        train = PictureFolder(path / train_name, read)
        val = PictureFolder(path / val_name, read) if val_name else None
    except OSError as error:
        raise UserError(f"--data-path {path}: no images: {one_line(error)}") from None
    check_classes(path, train, val)
    left_out = [*train.left_out, *(val.left_out if val else ())]
    if train_name:
        unused = [name for name in folders if name not in (train_name, val_name)]
        left_out += [("unused folder", str(path / name)) for name in unused]
    classes = tuple(map(readable, train.classes))
    return ImageData("folder", train, val, classes, left_out=left_out)


def check_classes(path: Path, train: PictureFolder, val: PictureFolder | None) -> None:
    """Raise UserError for folders that are no classes, too few, or not the same in both parts."""
    compose = partial(unicodedata.normalize, "NFC")  # file systems and archives keep either form
    kinds = set(map(part_of, train.classes))
    if "" not in kinds and (len(kinds) > 1 or len(train.classes) == 1):
        names = ", ".join(train.classes)
        needed = "DIR/train/<class>/*.jpg, or DIR/<class>/*.jpg"
        raise UserError(f"--data-path {path}: {names}: parts, not classes; needed is {needed}")
    if len(train.classes) < 2:
        only = f"one class only ({train.classes[0]})"
        raise UserError(f"--data-path {path}: {only}; at least two are needed")
    spelt = list(map(compose, train.classes))
    if twice := [name for name, count in Counter(spelt).items() if count > 1]:
        two = "two classes look alike, as accents are encoded in two ways (NFC and NFD)"
        raise UserError(f"--data-path {path}: {twice[0]}: {two}; give all their images one folder")
    if val and (others := list(map(compose, val.classes))) != spelt:
        if odd := sorted(set(others) ^ set(spelt)):
            reason = f"class {odd[0]} is not in both of train and val"
        else:
            reason = "accents in names of classes are encoded in two ways (NFC and NFD); use one"
        raise UserError(f"--data-path {path}: {reason}")


def classify_entry(entry: os.DirEntry, above: Sequence[Path]) -> str:
    """`image`, `folder`, or what else an entry is; nothing for litter.

    `above` are the folders that it is in, without links.
    """
    link = Path(entry.path) if entry.is_symlink() else None
    hidden, image = entry.name[0] == ".", entry.name.lower().endswith(IMG_EXTENSIONS + HEIF_ENDINGS)
    if link.is_dir() if link else entry.is_dir():
        loops = link and any(each.is_relative_to(link.resolve()) for each in above)
        return "hidden folder" if hidden else "looping link" if loops else "folder"
    if (hidden and not image) or entry.name in ("Thumbs.db", "desktop.ini"):
        return ""
    # A link into nowhere counts, as a broken image; opening a pipe could wait for ever.
    usable = (link.is_file() or not link.exists()) if link else entry.is_file()
    if not (image and usable) or hidden:
        return "other file"
    return HEIF if is_heif(entry.name) and not heif_installed() else "image"


class PictureFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder, in its order, without hidden files, repeated files and loops.

    A class has each real file once, however many links lead to it. `left_out` lists what else was
    found, by kind and path.
    """

    def __init__(self, root: Path, read: Callable[[str], Any] = load_image):
        self.left_out: list[tuple[str, str]] = []
        super().__init__(root, loader=read)

    def find_classes(self, directory: Path) -> tuple[list[str], dict[str, int]]:
        """The names of the class folders, and their indices."""
        found = self._read(os.fspath(directory), [Path(directory).resolve()])
        self.left_out += [("classless image", entry.path) for entry in found["image"]]
        classes = [entry.name for entry in found["folder"]]
        if not classes:
            raise FileNotFoundError(f"no class folder in {directory}")
        return classes, {name: index for index, name in enumerate(classes)}

    def make_dataset(
        self, directory: Path, class_to_idx: dict[str, int], *args: Any, **kwargs: Any
    ) -> list[tuple[str, int]]:
        """The paths of all images, each with its class index."""
        above = [Path(directory).resolve()]
        images = {
            name: sorted(self._images(f"{directory}/{name}", above, set())) for name in class_to_idx
        }
        empty = [name for name, found in images.items() if not found]
        if empty:
            heif = sum(kind == HEIF for kind, _ in self.left_out)
            unread = f"; left out: {heif_pictures(heif)}" if heif else ""
            where = f"in class {', '.join(empty)} of {directory}{unread}"
            raise FileNotFoundError(f"none of {', '.join(picture_endings())} {where}")
        return [("/".join(image), class_to_idx[name]) for name in images for image in images[name]]

    def _images(
        self, folder: str, above: Sequence[Path], seen: set[str]
    ) -> Iterator[tuple[str, str]]:
        """The images below a folder, each as (folder, name); `seen` are real paths had before."""
        real = Path(folder).resolve()
        for kind, entries in self._read(folder, [*above, real]).items():
            for entry in entries:
                link = entry.is_symlink()
                target = os.path.realpath(entry.path) if link else f"{real}/{entry.name}"
                if target in seen:
                    self.left_out.append((f"repeated {kind}", entry.path))
                elif kind == "image":
                    yield folder, entry.name
                else:
                    yield from self._images(entry.path, [*above, real], seen)
                seen.add(target)

    def _read(self, folder: str, above: Sequence[Path]) -> dict[str, list[os.DirEntry]]:
        """The images and the folders directly in a folder, in the order of their names."""
        found: dict[str, list[os.DirEntry]] = {"image": [], "folder": []}
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                kind = classify_entry(entry, above)
                if kind in found:
                    found[kind].append(entry)
                elif kind:
                    self.left_out.append((kind, entry.path))
        return found
