"""Pictures from files, and what a data set is made of. Knows nothing of augmentation."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torchvision
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from split_affinity.errors import RunError, UserError, one_line
from split_affinity.models.pretrained import Preprocessing

# The formats that are opened, whatever a file is called; JPEG includes MPO, and PPM PGM. Pillow
# knows more, but starts a program for some (Ghostscript for EPS), and a data set is a stranger's.
# Those that an old Pillow lacks are left out, since it would stumble over their names.
Image.init()
PICTURE_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
    if name in Image.OPEN
)


PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF files, and a value of it

NO_ROOM = "there is not enough memory for it"


class BrokenImage(RunError):
    """A file of the data set that cannot be read as an image; the message names it."""


def load_image(path: str) -> Image.Image:
    """A file's picture in RGB, turned as its EXIF data say.

    Raises BrokenImage if it cannot be read, unless that is for want of memory or of descriptors,
    which says nothing of the file.
    """
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            picture.load()
            with contextlib.suppress(Exception):  # damaged EXIF data do not spoil a picture
                ImageOps.exif_transpose(picture, in_place=True)
            whole = to_rgb(picture)
            whole.filename = path  # which Pillow keeps for pictures just opened
            return whole
    except Exception as error:  # Pillow raises many kinds, SyntaxError among them
        wanting = errno.EMFILE, errno.ENFILE, errno.ENOMEM
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in wanting:
            raise
        raise BrokenImage(f"broken image {path}: {one_line(error)}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, transparency ignored.

    Grey of more than 8 bits, which Pillow would clip, is scaled, dark and bright pictures alike:
    whole numbers from 0 to 65535 by 1/257, floats from 0 to 1 by 255, floats from 0 to 255 not at
    all. Only values beyond go from their own lowest to their own highest. NaN becomes black. In a
    TIFF the lowest value may be white, which Pillow heeds in 8 bits alone.
    """
    if picture.mode.startswith(("I", "F")):
        values = v2.functional.pil_to_tensor(picture.convert("F"))
        finite = values[values.isfinite()]
        low, high = finite.aminmax() if len(finite) else (0, 1)
        tops = (1, 255) if picture.mode == "F" else (65535,)
        low, high = next(((0, top) for top in tops if low >= 0 and high <= top), (low, high))
        values = (values - low) * (255 / (high - low))
        if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
            values = 255 - values
        values = values.nan_to_num(0, 255, 0)
        picture = v2.functional.to_pil_image(values.round().clamp(0, 255).byte())
    picture.info.pop("transparency", None)  # which Pillow would warn of, if it is a palette's
    return picture.convert("RGB")


@dataclass(frozen=True)
class ImageData:
    """A data set: pictures (PIL) with class indices, to train and, if there are any, to validate.

    `kind` is folder, synthetic or a name of NAMED_DATA; `chosen` are the indices of the pictures to
    train on; `left_out` tells of files and folders that are not used: what each is, and its path;
    `native` is how its pictures are made ready unless trained weights or settings say otherwise;
    `padded` is the side in pixels of small pictures that are all alike, and are padded and cropped
    to train; 0 for those that training shows parts of; `confused` are the classes, if they were
    asked for, whose pictures are augmented more strongly. Where some of the pictures to train on
    are kept apart to validate with, `val` is a Subset of `train`.
    """

    kind: str
    train: Dataset
    val: Dataset | None
    classes: tuple[str, ...]
    native: Preprocessing = Preprocessing()
    chosen: Sequence[int] = ()
    left_out: Sequence[tuple[str, str]] = ()
    confused: Sequence[int] | None = None
    padded: int = 0


def kept_apart(data: ImageData) -> Sequence[int]:
    """Indices of those of the training pictures that validate."""
    return data.val.indices if isinstance(data.val, Subset) else ()


def derived_seed(*parts: object) -> int:
    """A seed of 63 bits that depends on all parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def pictures_in(text: str) -> tuple[list[str], list[str]]:
    """The picture files that an argument of `predict` names: a file, whatever its name; a folder's,
    with all below it, or a pattern's, by their endings; and why folders there cannot be read.
    Raises UserError if there is no picture.
    """
    if Path(text).exists() and not Path(text).is_dir():
        return [text], []
    places = [text] if Path(text).is_dir() else glob.glob(text, recursive=True)  # noqa: PTH207
    if not places:
        raise UserError(f"{text}: no such file or folder")
    unread: list[str] = []
    files = {str(file) for place in places for file in picture_files(Path(place), unread, set())}
    if not files:
        kinds = ", ".join(torchvision.datasets.folder.IMG_EXTENSIONS)
        raise UserError(unread[0] if unread else f"{text}: no picture there ({kinds})")
    return sorted(files), unread


def picture_files(place: Path, unread: list[str], seen: set[str]) -> Iterator[Path]:
    """A file if it is a picture by its ending, or all such files below a folder; none is hidden.
    Links to folders are followed, to each folder once: `seen` are those without links. `unread`
    takes in why a folder cannot be read.
    """
    if not place.is_dir():
        if torchvision.datasets.folder.is_image_file(place.name) and place.is_file():
            yield place
        return
    real = os.path.realpath(place)
    if real in seen:
        return
    seen.add(real)
    try:
        names = sorted(entry.name for entry in os.scandir(place))
    except OSError as error:
        unread.append(f"{place}: folder cannot be read: {error.strerror}")
        return
    for name in names:
        if name[0] != ".":
            yield from picture_files(place / name, unread, seen)


class NewPictures(Dataset):
    """Pictures without classes: each has its own number in place of that. One that there is no
    memory for counts as broken, as it shall not cost the others their answers.
    """

    def __init__(self, paths: Sequence[str]):
        self._paths = paths

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return load_image(self._paths[index]), index
        except MemoryError:
            raise BrokenImage(f"broken image {self._paths[index]}: {NO_ROOM}") from None
