"""From a file to what the model takes, the same to the last bit as when the model was trained; and
the heat map on the way back.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

LARGEST_SIDE_PX = 8_192
LONGEST_SHAPE = 100  # as large as the longer side may be in shorter ones
SHOWN_PX = 448
# As the trainer's: none of them starts another program, as Pillow does for EPS. Those that an old
# Pillow lacks are left out, since it would stumble over their names.
Image.init()
PICTURE_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
    if name in Image.OPEN
)
# A JPEG is decoded at one part in so many of its sides, if that leaves TO_VALIDATE pixels for each
# one needed; EXIF orientations that swap the sides, or turn an axis round. All as the trainer's.
SCALES, TO_VALIDATE = (8, 4, 2), 2
SWAPPED, RIGHT_TO_LEFT, BOTTOM_TO_TOP = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
PART_BYTES = 4096  # decoded at once: of some JPEG files, a second's work
# The colours of heat, from none to the most: steps of matplotlib's turbo, as in the report.
SCALE = (
    "#30123b #434eba #4685fa #28bceb #1ae4b6 #55fa76 #a4fc3c #d9e436 #faba39 #fb7e21 #e4450a"
    " #b91e02 #7a0403"
).split()
GLOW = np.array([[*bytes.fromhex(colour[1:])] for colour in SCALE])  # RGB
STRONGEST = 0.65  # how much of the picture the hottest place hides; as in the report

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are looked at below


class Unusable(Exception):
    """A picture that there is no answer for; the message says why, to whoever chose it."""


def is_too_large(width: int, height: int) -> bool:
    """Whether a picture is more than is looked at."""
    longer, shorter = max(width, height), min(width, height)
    return longer > min(LARGEST_SIDE_PX, LONGEST_SHAPE * shorter)


def too_large() -> Unusable:
    """What is said of such a picture."""
    return Unusable(
        f"A picture may be at most {LARGEST_SIDE_PX:,} pixels wide or high, and {LONGEST_SHAPE} "
        "times as long as it is narrow. Please make it smaller first."
    )


@dataclass(frozen=True)
class Opened:
    """A picture in RGB, turned as its EXIF data say, perhaps decoded at a part of its size."""

    picture: Image.Image
    size: tuple[int, int]  # of the whole picture
    box: tuple[float, float, float, float]  # where the whole picture lies in the decoded one


def resized_sides(size: tuple[int, int], ready: dict[str, Any]) -> tuple[int, int]:
    """Width and height that a picture is resized to, rounded as torchvision's Resize rounds."""
    width, height = (int(ready["val_resize"] * side / min(size)) for side in size)
    return width, height


def decoding_scale(picture: Image.Image, ready: dict[str, Any] | None) -> int:
    """At one part in how many of its sides a picture is decoded; 1 for one that is no JPEG, and by
    a model that was trained with --full-decode, or before there was that.
    """
    whole = not ready or ready.get("full_decode", True) or ready["interpolation"] == "nearest"
    if whole or picture.format not in ("JPEG", "MPO"):
        return 1
    pairs = [*zip(picture.size, resized_sides(picture.size, ready), strict=True)]
    enough = (s for s in SCALES if all(side >= TO_VALIDATE * s * few for side, few in pairs))
    return next(enough, 1)


def open_picture(file: str | BinaryIO, ready: dict[str, Any] | None = None) -> Opened:
    """A file's picture, as large as it has to be; of an animated one the first frame. Raises
    Unusable; that it is too large is known from the first bytes of the file.
    """
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as picture:
            if is_too_large(*picture.size):
                raise too_large()
            picture.decodermaxblock = PART_BYTES
            size, orientation, scale = picture.size, 1, decoding_scale(picture, ready)
            if scale > 1:
                picture.draft(None, (size[0] // scale, size[1] // scale))
            picture.load()
            with contextlib.suppress(Exception):  # damaged EXIF data do not spoil a picture
                orientation = picture.getexif().get(274, 1)
                ImageOps.exif_transpose(picture, in_place=True)
            if orientation in SWAPPED:
                size = size[::-1]
            decoded, (width, height) = to_rgb(picture), (side / scale for side in size)
            # The last pixels can be of less than `scale` pixels, in a turned picture the first.
            left = (decoded.width - width) * (orientation in RIGHT_TO_LEFT)
            top = (decoded.height - height) * (orientation in BOTTOM_TO_TOP)
            return Opened(decoded, size, (left, top, left + width, top + height))
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise too_large() from None
    except Exception:  # Pillow raises many kinds, SyntaxError among them
        raise Unusable("The file is damaged, or not a picture that can be read here.") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, transparency ignored. Grey of more than 8 bits is scaled: whole
    numbers from 65535, floats from 1 or 255, values beyond from their own lowest and highest.
    """
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture.convert("F"))
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
        tops = (1, 255) if picture.mode == "F" else (65535,)
        low, high = next(((0, top) for top in tops if low >= 0 and high <= top), (low, high))
        with np.errstate(all="ignore"):
            values = (values - low) * np.float32(255 / (high - low))
        if getattr(picture, "tag_v2", {}).get(262) == 0:  # a TIFF whose lowest value is white
            values = 255 - values
        values = np.nan_to_num(values, nan=0, posinf=255, neginf=0).round().clip(0, 255)
        picture = Image.fromarray(values.astype(np.uint8))
    picture.info.pop("transparency", None)  # which Pillow would warn of, if it is a palette's
    return picture.convert("RGB")


def middle(opened: Opened, ready: dict[str, Any]) -> Image.Image:
    """The square that the model sees, rounded as torchvision's CenterCrop rounds."""
    picture, size, sides = opened.picture, ready["image_size"], resized_sides(opened.size, ready)
    if picture.size != sides:
        filters = Image.Resampling[ready["interpolation"].upper()]
        picture = picture.resize(sides, filters, opened.box)
    left, top = (round((s - size) / 2) if s >= size else -((size - s) // 2) for s in sides)
    return picture.crop((left, top, left + size, top + size))  # black where there is nothing


def to_input(square: Image.Image, ready: dict[str, Any]) -> np.ndarray:
    """A square picture as the model takes it: (1, 3, size, size), float32, normalised."""
    mean, std = (np.array(ready[name], np.float32) for name in ("mean", "std"))
    values = np.asarray(square, np.float32) * np.float32(1 / 255)
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1)[None])


def heat_map(square: Image.Image, evidence: np.ndarray) -> Image.Image:
    """A square picture that is coloured where a class is seen, from the evidence for it, (h, w);
    what is below 0 speaks against the class, and stays as it was.
    """
    size = (max(SHOWN_PX, square.width),) * 2
    heat = np.maximum(evidence, 0) / max(evidence.max(), 1e-9)
    heat = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))
    steps = np.linspace(0, 1, len(GLOW))
    glow = np.stack([np.interp(heat, steps, channel) for channel in GLOW.T], -1)
    shown = np.asarray(square.resize(size, Image.Resampling.BICUBIC), np.float32)
    share = STRONGEST * heat[..., None] ** 0.5
    return Image.fromarray((shown + (glow - shown) * share).round().astype(np.uint8))
