"""A look at one picture: its size, its colours, and what tells whether another shows the same."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from split_affinity.data.decoding import Box, decoded
from split_affinity.data.pictures import (
    NO_ROOM,
    BrokenImage,
    finish_picture,
    open_file,
    picture_errors,
)
from split_affinity.data.samples import SampleKey

SMALL_PX = 256  # shorter side of what hashes and colours are taken of; larger pictures are reduced
HASH_SIDE = 16  # a perceptual hash has so many bits along each of its two sides
HASHED_PX = 4 * HASH_SIDE  # to which a picture is resized for that
# Crops that are hashed too: of each part of the sides, from so many places along each side.
CROPS = {0.95: 3, 0.9: 3, 0.85: 4, 0.8: 5}
SMALL_SIDE_PX = 64  # pictures with a shorter side below that have too few details for that
EVEN_LEVELS = 2  # deviation of grey, of 255 levels, below which a picture is too even to compare


@dataclass(frozen=True)
class Look:
    """What was seen of a picture.

    The `digest` is of its pixels: two files with the same picture have the same. The others are
    perceptual hashes, of the picture, of its mirror image and of parts of it (one after the other);
    None if it cannot be compared.
    """

    size: tuple[int, int]  # width and height in pixels, turned as its EXIF data say
    mode: str  # of Pillow, as stored
    kind: str  # of file; empty if it is in none
    orientation: int  # by its EXIF data; 1 for upright
    digest: bytes
    pixels: int  # that the next two are of
    sums: tuple[float, float, float]  # of each channel, of values from 0 to 1
    squares: tuple[float, float, float]  # the same of their squares
    hash: bytes | None = None
    mirrored: bytes | None = None
    crops: bytes = b""

    @property
    def shorter_side(self) -> int:
        """In pixels."""
        return min(self.size)


def can_compare() -> bool:
    """Whether the package is there that finds pictures which are nearly the same."""
    return importlib.util.find_spec("imagehash") is not None


def look_at_file(path: str, with_crops: bool = True) -> Look:
    """A look at a file's picture. Raises BrokenImage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels, of damaged EXIF data
        with picture_errors(path), open_file(path) as picture:
            mode, kind, orientation = picture.mode, picture.format or "", 1
            with contextlib.suppress(Exception):  # damaged EXIF data
                orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
            finished = finish_picture(picture, path)
            return look_at(finished, mode, kind, orientation, with_crops)


def look_at(
    picture: Image.Image, mode: str, kind: str = "", orientation: int = 1, with_crops: bool = True
) -> Look:
    """A look at a picture in RGB, which was stored in another mode perhaps."""
    digest = hashlib.blake2b(repr(picture.size).encode(), digest_size=16)
    digest.update(picture.tobytes())
    times = min(picture.size) // SMALL_PX
    small = picture.reduce(times) if times > 1 else picture
    values = np.asarray(small, dtype=np.float64).reshape(-1, 3) / 255
    hashes: tuple[Any, ...] = ()
    grey = small.convert("L")
    if can_compare() and np.asarray(grey).std() >= EVEN_LEVELS:
        mirrored = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        hashes = perceptual_hash(grey), perceptual_hash(mirrored)
        if with_crops and min(picture.size) >= SMALL_SIDE_PX:
            hashes += (b"".join(perceptual_hash(grey, box) for box in crop_boxes(grey.size)),)
    return Look(
        picture.size,
        mode,
        kind,
        orientation,
        digest.digest(),
        len(values),
        tuple(values.sum(0).tolist()),
        tuple((values**2).sum(0).tolist()),
        *hashes,
    )


def perceptual_hash(grey: Image.Image, box: Box | None = None) -> bytes:
    """256 bits that change little if a grey picture, or the part in a box, does.

    They tell which of its lowest frequencies are strong (pHash), whatever its brightness and size.
    """
    import imagehash

    resized = grey.resize((HASHED_PX, HASHED_PX), Image.Resampling.LANCZOS, box)
    return np.packbits(imagehash.phash(resized, HASH_SIDE).hash).tobytes()


def crop_boxes(size: tuple[int, int]) -> Iterator[Box]:
    """The parts of a picture of a size that are hashed, too."""
    for kept, places in CROPS.items():
        shifts = np.linspace(0, 1, places) if places > 1 else (0.5,)
        width, height = (kept * side for side in size)
        for across, down in itertools.product(shifts, shifts):
            left, top = across * (size[0] - width), down * (size[1] - height)
            yield left, top, left + width, top + height


class Looks(Dataset):
    """Looks at a data set's pictures, by the keys of a batch: each with its index, or why it is
    broken in place of the look.
    """

    def __init__(self, pictures: Dataset, with_crops: bool = True):
        self._pictures, self._with_crops = pictures, with_crops
        self._samples = getattr(pictures, "samples", ())

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, keys: Sequence[SampleKey]) -> list[tuple[int, Look | str]]:
        return [(index, self._look(index)) for _, index in keys]

    def _look(self, index: int) -> Look | str:
        try:
            if self._samples:
                return look_at_file(os.fspath(self._samples[index][0]), self._with_crops)
            picture = decoded(self._pictures[index][0])
            return look_at(picture, picture.mode, with_crops=self._with_crops)
        except BrokenImage as error:
            return str(error)
        except MemoryError:
            return f"broken image {self._samples[index][0] if self._samples else index}: {NO_ROOM}"
