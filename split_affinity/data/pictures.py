"""Pictures from files, and what a data set is made of. Knows nothing of augmentation."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from split_affinity.errors import RunError, UserError, one_line
from split_affinity.models.pretrained import Preprocessing
from split_affinity.text import plural

# The formats that are opened, whatever a file is called; JPEG includes MPO, and PPM PGM. Pillow
# knows more, but starts a program for some (Ghostscript for EPS), and a data set is a stranger's.
# An old Pillow would stumble over names that it does not know.
Image.init()
PICTURE_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
    if name in Image.OPEN
)

# HEIC, as phones save it, is opened where pillow-heif is installed. By the standard's major brands
# (ISO/IEC 23008-12), as pillow-heif knows them: AVIF has some of these too, and is tried before.
HEIF_BRANDS = b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()
HEIF_ENDINGS = (".heic", ".heif", ".hif")
HEIF, HEIF_REMEDY = "HEIC picture", "pip install pillow-heif"

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF files, and a value of it

NO_ROOM = "there is not enough memory for it"


class BrokenImage(RunError):
    """A file cannot be read as a picture; the message names it."""


def heif_installed() -> bool:
    """Whether HEIC pictures can be opened; imports nothing."""
    return importlib.util.find_spec("pillow_heif") is not None


def is_heif(name: str) -> bool:
    """Whether a file is a HEIC picture by its ending."""
    return name.lower().endswith(HEIF_ENDINGS)


def holds_heif(path: str) -> bool:
    """Whether a file is a HEIC picture by its first bytes. Raises OSError."""
    with Path(path).open("rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS


def unreadable_heif(paths: Iterable[str]) -> list[str]:
    """Those files that are HEIC pictures, if they cannot be opened here."""
    named = [] if heif_installed() else filter(is_heif, paths)
    return [path for path in named if Path(path).is_file() and holds_heif(path)]


def picture_endings() -> tuple[str, ...]:
    """How names of files end that are taken for pictures here."""
    return IMG_EXTENSIONS + (HEIF_ENDINGS if heif_installed() else ())


def heif_pictures(count: int) -> str:
    """So many HEIC pictures that cannot be opened here, and the remedy."""
    return f"{plural(count, HEIF)} ({HEIF_REMEDY})"


def open_file(path: str) -> Image.Image:
    """A file's picture, not decoded yet; raises what Pillow raises, and ValueError without HEIC.

    pillow-heif is imported for the first HEIC picture of a process. It turns that itself, and
    leaves no orientation in its EXIF data.
    """
    try:
        return Image.open(path, formats=PICTURE_FORMATS)
    except UnidentifiedImageError:
        if not holds_heif(path):
            raise
    if not heif_installed():
        raise ValueError(f"a {HEIF}: {HEIF_REMEDY}")
    import pillow_heif

    pillow_heif.register_heif_opener(decode_threads=1)  # loader processes keep the cores busy
    return Image.open(path, formats=PICTURE_FORMATS + ("HEIF",))


def load_image(path: str) -> Image.Image:
    """A file's picture in RGB, turned as its EXIF data say; BrokenImage if it cannot be read.

    Other errors are raised if memory or file descriptors are missing: the file may be fine.
    """
    with picture_errors(path), open_file(path) as picture:
        return finish_picture(picture, path)


def finish_picture(picture: Image.Image, path: str) -> Image.Image:
    """A picture that was just opened, decoded, in RGB, and turned; raises what Pillow raises."""
    picture.load()
    with contextlib.suppress(Exception):  # damaged EXIF data
        ImageOps.exif_transpose(picture, in_place=True)
    finished = to_rgb(picture)
    finished.filename = path  # Pillow would keep it only in pictures just opened
    return finished


@contextlib.contextmanager
def picture_errors(path: str) -> Iterator[None]:
    """Turn errors of a file that is no picture into BrokenImage; others stay as they are."""
    try:
        yield
    except Exception as error:  # Pillow raises many kinds, SyntaxError among them
        missing = errno.EMFILE, errno.ENFILE, errno.ENOMEM
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in missing:
            raise
        raise BrokenImage(f"broken image {path}: {one_line(error)}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, transparency ignored.

    Pillow would clip grey of more than 8 bits. It is scaled: whole numbers up to 65535 by 1/257,
    floats up to 1 by 255, floats up to 255 not at all, others from their lowest to their highest
    value. NaN becomes black. In a TIFF, 0 may be white; Pillow knows that for 8 bits only.
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
    picture.info.pop("transparency", None)  # Pillow would warn of a palette's
    return picture.convert("RGB")


@dataclass(frozen=True)
class ImageData:
    """A data set: pictures (PIL) with class indices, to train and perhaps to validate."""

    kind: str  # folder, synthetic or a name of NAMED_DATA
    train: Dataset
    val: Dataset | None  # a Subset of `train` if some of that is kept apart
    classes: tuple[str, ...]
    native: Preprocessing = Preprocessing()
    chosen: Sequence[int] = ()  # indices of the pictures to train on
    left_out: Sequence[tuple[str, str]] = ()  # kind and path of what is not used
    confused: Sequence[int] | None = None  # classes to augment more strongly, if asked for
    class_weights: Sequence[float] | None = None  # in the loss, of all classes, if asked for
    padded: int = 0  # the side of small pictures, padded and cropped to train; 0: crop and resize


def kept_apart(data: ImageData) -> Sequence[int]:
    """Indices of the training pictures that are kept apart to validate with."""
    return data.val.indices if isinstance(data.val, Subset) else ()


def derived_seed(*parts: object) -> int:
    """A seed of 63 bits that depends on all parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def find_pictures(text: str) -> tuple[list[str], list[str]]:
    """The picture files of a file, folder or pattern, and why folders there cannot be read.

    Only a file that is named itself may have any ending. HEIC pictures are among them, whether they
    can be opened or not. Raises UserError if there is no picture.
    """
    if Path(text).exists() and not Path(text).is_dir():
        return [text], []
    places = [text] if Path(text).is_dir() else glob.glob(text, recursive=True)  # noqa: PTH207
    if not places:
        raise UserError(f"{text}: no such file or folder")
    unread: list[str] = []
    files = {str(file) for place in places for file in picture_files(Path(place), unread, set())}
    if not files:
        kinds = ", ".join(picture_endings())
        raise UserError(unread[0] if unread else f"{text}: no picture there ({kinds})")
    return sorted(files), unread


def picture_files(place: Path, unread: list[str], seen: set[str]) -> Iterator[Path]:
    """The files at or below a place that are pictures by their endings; hidden ones are left out.

    Links are followed, to each folder once: `seen` are real paths. `unread` gets error messages.
    """
    if not place.is_dir():
        if place.name.lower().endswith(IMG_EXTENSIONS + HEIF_ENDINGS) and place.is_file():
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


class UnlabelledPictures(Dataset):
    """Pictures with their own number as class; one too large for the memory counts as broken."""

    def __init__(self, paths: Sequence[str], read: Callable[[str], Any] = load_image):
        self._paths, self._read = paths, read

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return self._read(self._paths[index]), index
        except MemoryError:
            raise BrokenImage(f"broken image {self._paths[index]}: {NO_ROOM}") from None
