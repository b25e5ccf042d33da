"""Pictures of all kinds become RGB. Run: python -m pytest tests/data/test_pictures.py"""

import contextlib
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from loading import AUGMENTED, assert_same_batches, load, noise, small, whereabouts
from PIL import Image, features
from places import ROOT

from split_affinity.data.dataset import open_data
from split_affinity.data.pictures import PICTURE_FORMATS, BrokenImage, load_image, to_rgb

FORMATS = ("png", "tiff", "jpeg", "gif", "webp", "bmp", "ppm")
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def files_of(picture, folder, formats=FORMATS):
    """The picture in all formats that can hold it, under the names of JPEGs."""
    for name in formats:
        path = folder / f"{name}.jpg"
        with contextlib.suppress(OSError, ValueError, KeyError):  # a mode that it cannot hold
            picture.save(path, name)
            yield path


def as_pillow_converts(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(path).convert("RGB")


@pytest.mark.parametrize("mode", sorted(mode for mode in Image.MODES if mode[0] not in "IF"))
def test_pictures_of_8_bits_are_what_pillow_makes_of_them(tmp_path, mode):
    count = len(Image.new(mode, (16, 16)).tobytes())
    content = np.random.default_rng(2).integers(0, 256, count, np.uint8).tobytes()
    picture = Image.frombytes(mode, (16, 16), content)
    if picture.palette or mode == "PA":
        picture.putpalette(list(range(255, -1, -1)) * 3)
    if mode == "La":  # no file has it, and Pillow no conversion
        assert not list(files_of(picture, tmp_path))
        return
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(np.asarray(to_rgb(picture)), expected)
    paths = list(files_of(picture, tmp_path))
    assert paths
    for path in paths:
        loaded = load_image(path)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), np.asarray(as_pillow_converts(path))), path


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 2))])
def test_transparent_palettes_load_without_a_warning(tmp_path, transparency):
    picture = Image.fromarray(noise(16)).convert("P")
    picture.save(tmp_path / "x.png", transparency=transparency)
    assert "transparency" in Image.open(tmp_path / "x.png").info
    expected = as_pillow_converts(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(tmp_path / "x.png")
    assert np.array_equal(np.asarray(loaded), np.asarray(expected))


# The same picture of 256 greys in each mode of more bits, and the formats that can hold that.
DEEP = {
    "I;16": (GREY.astype("<u2") * 257, ["png", "tiff", "ppm"]),
    "I;16L": (GREY.astype("<u2") * 257, ["tiff"]),
    "I;16B": ((GREY.astype(">u2") * 257).astype(">u2"), ["png", "tiff"]),
    "I;16N": (GREY.astype("=u2") * 257, []),
    "I": (GREY.astype(np.int32) * 257, ["tiff", "ppm"]),
    "F": (GREY.astype(np.float32) / 255, ["tiff"]),
}


@pytest.mark.parametrize("mode", sorted(mode for mode in Image.MODES if mode[0] in "IF"))
def test_grey_of_more_bits_has_the_pixels_of_its_twin_of_8_bits(tmp_path, mode):
    values, formats = DEEP[mode]
    picture = Image.frombytes(mode, (16, 16), values.tobytes())
    paths = list(files_of(picture, tmp_path, formats))
    assert len(paths) == len(formats)
    for loaded in (to_rgb(picture), *map(load_image, paths)):
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), np.repeat(GREY[..., None], 3, axis=2))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "values", "pixels"),
    [
        (np.uint16, [0, 128, 129, 30000, 65535], [0, 0, 1, 117, 255]),
        (np.uint16, [500, 500], [2, 2]),
        (np.int32, [0, 65535], [0, 255]),
        (np.int32, [0, 65536, 655360], [0, 26, 255]),
        (np.int32, [-100, 0, 100], [0, 128, 255]),
        (np.int32, [70000, 70000], [0, 0]),
        (np.float32, [0, 0.1, 0.5, 1], [0, 26, 128, 255]),
        (np.float32, [0.2, 0.3], [51, 76]),
        (np.float32, [0, 1, 254.6, 255], [0, 1, 255, 255]),
        (np.float32, [100, 150], [100, 150]),
        (np.float32, [-1, 0, 1], [0, 128, 255]),
        (np.float32, [1000, 1500, 2000], [0, 128, 255]),
        (np.float32, [300, 300], [0, 0]),
        (np.float32, [-5, -5], [0, 0]),
        (np.float32, [NAN, 0, 0.5], [0, 0, 128]),
        (np.float32, [-INF, NAN, INF, 0.2], [0, 0, 255, 51]),
        (np.float32, [-INF, 1000, NAN, 3000, INF], [0, 0, 0, 255, 255]),
        (np.float32, [NAN, NAN], [0, 0]),
        (np.float32, [-INF, INF], [0, 255]),
    ],
)
def test_grey_beyond_8_bits_by_hand(tmp_path, kind, values, pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.fromarray(np.array([values], kind)).save(tmp_path / "x.tiff")
        loaded = load_image(tmp_path / "x.tiff")
    assert np.asarray(loaded)[0, :, 0].tolist() == pixels


def test_images_of_16_bits_train_as_those_of_8(tmp_path):
    for bits, factor in ((np.uint8, 1), (np.uint16, 257)):
        for name, low in (("dark", 10), ("bright", 140)):
            folder = tmp_path / f"{bits.__name__}/{name}"
            folder.mkdir(parents=True)
            for number in range(4):
                values = np.random.default_rng(number).integers(low, low + 100, (40, 40))
                Image.fromarray((values * factor).astype(bits)).save(folder / f"{number}.png")
    eight, sixteen = (
        load(open_data(small(data_path=tmp_path / name)), small(**AUGMENTED))
        for name in ("uint8", "uint16")
    )
    assert_same_batches(eight, sixteen)


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_tiffs_whose_lowest_value_is_white(tmp_path, kind, white_is_zero):
    """Written value by value, as Pillow turns over what it writes by itself."""
    values = GREY.astype(kind) * {np.uint16: 257, np.float32: 1 / 255}.get(kind, 1)
    tags = [
        (256, 3, 16),
        (257, 3, 16),
        (258, 3, values.itemsize * 8),
        (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8 + 2 + 10 * 12 + 4),
        (277, 3, 1),
        (278, 3, 16),
        (279, 4, values.nbytes),
        (339, 3, 3 if kind is np.float32 else 1),
    ]
    entries = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    (tmp_path / "x.tiff").write_bytes(head + entries + bytes(4) + values.astype(kind).tobytes())
    loaded = np.asarray(load_image(str(tmp_path / "x.tiff")))[..., 0]
    assert np.array_equal(loaded, 255 - GREY if white_is_zero else GREY)


@pytest.mark.parametrize("name", ["png", "tiff", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_data_say(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(16)[:8]
    Image.fromarray(pixels).save(tmp_path / "x.jpg", name, exif=exif)
    Image.fromarray(pixels).save(tmp_path / "plain.jpg", name)
    lying = np.asarray(load_image(tmp_path / "plain.jpg"))
    turned = {  # the first row of the file is the top, or the right, of what is seen, and so on
        1: lying,
        2: lying[:, ::-1],
        3: lying[::-1, ::-1],
        4: lying[::-1],
        5: lying.swapaxes(0, 1),
        6: np.rot90(lying, -1),
        7: lying[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(lying),
    }
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.jpg")), turned[orientation])


def test_grey_of_16_bits_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY[:8].astype(np.uint16) * 257).save(tmp_path / "x.png", exif=exif)
    turned = np.asarray(load_image(tmp_path / "x.png"))[..., 0]
    assert np.array_equal(turned, np.rot90(GREY[:8], -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\1\x12"])
def test_damaged_exif_data_spoil_no_picture(tmp_path, exif):
    Image.fromarray(noise(16)).save(tmp_path / "x.jpg", exif=exif)
    expected = np.asarray(as_pillow_converts(tmp_path / "x.jpg"))
    with warnings.catch_warnings(record=True) as warned, whereabouts(0):
        loaded = load_image(tmp_path / "x.jpg")
    assert np.array_equal(np.asarray(loaded), expected)
    assert not warned


def test_a_file_called_a_picture_starts_no_program(tmp_path, monkeypatch):
    """PostScript, which Pillow gives to Ghostscript."""
    program, started = tmp_path / "bin/gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $* >> {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    Image.fromarray(noise(16)).save(tmp_path / "photo.jpg", "EPS")
    with pytest.raises(BrokenImage, match=rf"^broken image {tmp_path}/photo.jpg: "):
        load_image(str(tmp_path / "photo.jpg"))
    assert not started.exists()


OPENED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")


@pytest.mark.parametrize("name", OPENED)
def test_formats_that_pictures_have(tmp_path, name):
    if name == "AVIF" and "avif" not in features.get_supported():
        pytest.skip("this Pillow knows no AVIF")
    path = tmp_path / "picture.jpg"
    more = {"append_images": [Image.new("RGB", (16, 16))]} if name == "MPO" else {}
    Image.fromarray(noise(16)).save(path, name, **more)
    assert np.array_equal(np.asarray(load_image(str(path))), np.asarray(as_pillow_converts(path)))


@pytest.mark.parametrize("name", ["EPS", "PDF", "PCX", "TGA", "ICO", "SGI"])
def test_other_formats_are_broken_images(tmp_path, name):
    Image.fromarray(noise(16)).save(tmp_path / "picture.jpg", name)
    with pytest.raises(BrokenImage, match="cannot identify image file"):
        load_image(str(tmp_path / "picture.jpg"))


def test_no_file_is_opened_as_any_format_that_pillow_knows():
    sources = [*(ROOT / "split_affinity").rglob("*.py"), ROOT / "train_split_affinity.py"]
    calls = re.findall(r"Image\.open\(.*", "".join(path.read_text() for path in sources))
    assert calls
    assert all("formats=PICTURE_FORMATS" in call for call in calls)
    assert not {"EPS", "WMF"}.intersection(PICTURE_FORMATS)


@pytest.mark.parametrize("name", ["png", "tiff", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", [0, 9, 10])
def test_orientations_that_exif_does_not_know_turn_nothing(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(noise(16)[:8])
    picture.save(tmp_path / "x.jpg", name, exif=exif)
    picture.save(tmp_path / "plain.jpg", name)
    turned, plain = (np.asarray(load_image(tmp_path / each)) for each in ("x.jpg", "plain.jpg"))
    assert np.array_equal(turned, plain)


def test_known_pixels_of_cmyk(tmp_path):
    values = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    inks = Image.fromarray(np.kron(np.uint8([values]), np.ones((16, 16, 1), np.uint8)), "CMYK")
    colours = [(255,) * 3, (0, 255, 255), (255, 0, 255), (255, 255, 0), (0,) * 3]
    for name, options, off in (("tiff", {}, 0), ("jpeg", {"quality": 100, "subsampling": 0}, 3)):
        inks.save(tmp_path / "x.jpg", name, **options)
        middles = np.asarray(load_image(tmp_path / "x.jpg"))[8, 8::16].astype(int)
        assert np.abs(middles - colours).max() <= off


def test_known_pixels_of_lab(tmp_path):
    """White, black, and a grey in the middle: 53.6 of 100 is the lightness of (128, 128, 128)."""
    values = np.uint8([[(255, 0, 0), (0, 0, 0), (137, 0, 0)]])
    Image.fromarray(values, "LAB").save(tmp_path / "x.tiff")
    seen = np.asarray(load_image(tmp_path / "x.tiff"))[0].astype(int)
    assert np.abs(seen - [[255] * 3, [0] * 3, [128] * 3]).max() <= 2


def test_known_pixels_of_48_bits(tmp_path):
    """Written byte by byte, as Pillow writes none."""
    values = np.array([[(65535, 0, 0), (0, 32768, 257), (256, 512, 65280)]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = {b"IHDR": struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)}
    parts |= {b"IDAT": zlib.compress(rows), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts.items():
        check = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + check
    (tmp_path / "x.png").write_bytes(content)
    seen = np.asarray(load_image(tmp_path / "x.png"))[0].tolist()
    assert seen == [[255, 0, 0], [0, 128, 1], [1, 2, 255]]
