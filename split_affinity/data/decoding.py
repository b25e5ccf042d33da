"""JPEGs that are decoded once it is known how large they have to be, and no larger.

A JPEG can be decoded at a half, a quarter or an eighth of its size: libjpeg then leaves out the
finer waves of each block of 8 x 8 pixels. That saves most of the time for a photograph of a phone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import ExifTags, Image

from split_affinity.data.pictures import finish_picture, load_image, open_file, picture_errors

SCALES = 8, 4, 2  # a JPEG can be decoded at one part in so many of its sides

# Pixels that are decoded for each one that is needed, along a side. A training crop varies far more
# than a smaller decoder changes it; an answer should not change. The demo page has TO_VALIDATE too.
TO_TRAIN, TO_VALIDATE = 1, 2

# EXIF orientations: those that swap the sides, and those that turn an axis round.
SWAPPED, RIGHT_TO_LEFT, BOTTOM_TO_TOP = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class JpegFile:
    """A JPEG that is not decoded yet; its size is that of the picture turned as EXIF data say."""

    filename: str
    size: tuple[int, int]  # width and height in pixels
    orientation: int  # of EXIF

    def whole(self) -> Image.Image:
        """The picture, as `load_image` gives it."""
        return load_image(self.filename)

    def resized(
        self, box: Box, size: tuple[int, int], filters: Image.Resampling, margin: int
    ) -> Image.Image:
        """What a box of the picture shows, resized to (width, height).

        Along each side at least `margin` pixels are decoded for one of the result, if the box has
        them; all, if there is no interpolation. Raises BrokenImage.
        """
        scale = 1 if filters == Image.Resampling.NEAREST else decoding_scale(box, size, margin)
        picture, box = self._decode(scale, box)
        # Interpolation must not see what lies beyond the box.
        left, top = math.floor(box[0]), math.floor(box[1])
        picture = picture.crop((left, top, math.ceil(box[2]), math.ceil(box[3])))
        inside = box[0] - left, box[1] - top, box[2] - left, box[3] - top
        return picture.resize(size, filters, inside)

    def _decode(self, scale: int, box: Box) -> tuple[Image.Image, Box]:
        """The picture at one part in `scale` of its sides, and where the box lies in it.

        It is whole if it cannot be had so.
        """
        with contextlib.suppress(Exception):  # a broken file is described in the same words
            if scale > 1:
                small = load_small(self.filename, scale)
                # The last pixels of a row or column may be of less than `scale` pixels. In a turned
                # picture they can be the first.
                right = small.width - self.size[0] / scale
                down = small.height - self.size[1] / scale
                right *= self.orientation in RIGHT_TO_LEFT
                down *= self.orientation in BOTTOM_TO_TOP
                edges = zip(box, (right, down, right, down), strict=True)
                return small, tuple(edge / scale + shift for edge, shift in edges)
        return self.whole(), box


def decoding_scale(box: Box, size: tuple[int, int], margin: int) -> int:
    """The largest scale with `margin` pixels or more of the box for each of a size; 1 for none."""
    sides = box[2] - box[0], box[3] - box[1]
    for scale in SCALES:
        if all(side >= margin * scale * few for side, few in zip(sides, size, strict=True)):
            return scale
    return 1


def load_small(path: str, scale: int) -> Image.Image:
    """A JPEG as `load_image` gives it, at one part in `scale` of its sides, rounded up."""
    with open_file(path) as picture:
        picture.draft(None, (picture.width // scale, picture.height // scale))
        return finish_picture(picture, path)


def open_image(path: str) -> JpegFile | Image.Image:
    """A file's picture: of a JPEG only the header is read. Raises what `load_image` raises."""
    with picture_errors(path), open_file(path) as picture:
        orientation = 1
        with contextlib.suppress(Exception):  # damaged EXIF data
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        if picture.format in ("JPEG", "MPO"):
            turned = orientation in SWAPPED
            return JpegFile(path, picture.size[::-1] if turned else picture.size, orientation)
        return finish_picture(picture, path)


def decoded(picture: JpegFile | Image.Image) -> Image.Image:
    """A picture, decoded whole if it is not decoded yet. Raises BrokenImage."""
    return picture.whole() if isinstance(picture, JpegFile) else picture


def picture_reader(full_decode: bool) -> Callable[[str], JpegFile | Image.Image]:
    """What opens the pictures of a data set."""
    return load_image if full_decode else open_image
