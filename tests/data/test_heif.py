"""HEIC pictures, with pillow-heif and without. Run: python -m pytest tests/data/test_heif.py"""

import sys

import numpy as np
import pytest
from loading import load, small
from PIL import Image

from split_affinity.data.dataset import describe_data, open_data
from split_affinity.data.decoding import open_image
from split_affinity.data.image_folder import folder_data
from split_affinity.data.pictures import (
    PICTURE_FORMATS,
    BrokenImage,
    find_pictures,
    load_image,
    unreadable_heif,
)
from split_affinity.errors import UserError

HEADER = b"\0\0\0\x18ftypheic" + 12 * b"\0"  # as a HEIC picture begins


@pytest.fixture
def without_heif(monkeypatch):
    """pillow-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


def save_heic(picture, path, **options):
    """Write a HEIC picture; EXIF data in bytes turn the picture itself too, as a phone does."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    picture.save(path, "HEIF", quality=90, **options)


def gradient(width=96, height=64):
    """A picture whose four corners differ."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.stack([*np.meshgrid(across, down), np.full((height, width), 80)], 2)
    return Image.fromarray(np.uint8(pixels))


def assert_alike(picture, other):
    assert picture.size == other.size
    assert np.abs(np.asarray(picture, float) - np.asarray(other, float)).mean() < 3


@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 5])
def test_a_heic_picture_is_turned_once(tmp_path, orientation):
    """As every other format is, though its EXIF data and HEIC's own turn say the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient().save(tmp_path / "x.png", exif=exif)
    save_heic(gradient(), tmp_path / "x.heic", exif=exif.tobytes())
    upright = load_image(str(tmp_path / "x.png"))
    assert upright.size == ((64, 96) if orientation > 4 else (96, 64))
    for read in (load_image, open_image):
        picture = read(str(tmp_path / "x.heic"))
        assert_alike(picture, upright)
        assert (picture.mode, picture.filename) == ("RGB", str(tmp_path / "x.heic"))


def test_the_name_does_not_matter_and_broken_ones_are_named(tmp_path):
    save_heic(gradient(), tmp_path / "x.heic")
    whole = (tmp_path / "x.heic").read_bytes()
    (tmp_path / "heic.jpg").write_bytes(whole)
    gradient().save(tmp_path / "jpeg.heic", "JPEG")
    assert_alike(load_image(tmp_path / "heic.jpg"), gradient())
    assert_alike(load_image(tmp_path / "jpeg.heic"), gradient())
    for broken in (whole[: len(whole) // 2], HEADER):
        (tmp_path / "x.heic").write_bytes(broken)
        with pytest.raises(BrokenImage, match="broken image .*x.heic: "):
            load_image(tmp_path / "x.heic")


def test_pillow_heif_is_imported_for_heic_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    gradient().save(tmp_path / "x.png")
    load_image(tmp_path / "x.png")
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(BrokenImage, match="cannot identify"):
        load_image(tmp_path / "x.jpg")
    assert "pillow_heif" not in sys.modules
    assert "HEIF" not in PICTURE_FORMATS


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_heic_is_trained_on(tmp_path, workers):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            save_heic(gradient(), tmp_path / name / f"{number}.HEIC")
    settings = small(data_path=tmp_path, workers=workers)
    data = open_data(settings)
    assert (len(data.train), data.left_out) == (8, [])
    images, _ = load(data, settings, stop=1)[0]
    assert images.std() > 0.1


def test_without_pillow_heif_they_are_left_out_and_the_remedy_is_said(tmp_path, without_heif):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        gradient().save(tmp_path / name / "0.png")
        for number in range(6):
            (tmp_path / name / f"{number}.HeIc").write_bytes(HEADER)
    (tmp_path / "cat/notes.txt").touch()
    data = folder_data(tmp_path)
    assert len(data.train) == 2
    line = f"left out  12 HEIC pictures (pip install pillow-heif), 1 other file ({tmp_path}/cat/"
    assert describe_data(data)[-1] == f"{line}notes.txt)"
    (tmp_path / "dog/0.png").unlink()
    remedy = r"dog of .*; left out: 12 HEIC pictures \(pip install pillow-heif\)"
    with pytest.raises(UserError, match=remedy):
        folder_data(tmp_path)
    with pytest.raises(BrokenImage, match="cat/0.HeIc: a HEIC picture: pip install pillow-heif"):
        load_image(tmp_path / "cat/0.HeIc")
    found, _ = find_pictures(str(tmp_path))
    assert len(unreadable_heif(found)) == 12 == len(found) - 1
