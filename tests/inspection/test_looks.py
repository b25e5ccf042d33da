"""What is seen of one picture. Run: python -m pytest tests/inspection/test_looks.py"""

import numpy as np
import pytest
from looking import noise, save
from PIL import Image

from split_affinity.data.pictures import BrokenImage
from split_affinity.inspection import looks
from split_affinity.inspection.looks import CROPS, Looks, crop_boxes, look_at, look_at_file


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_a_file_is_seen_as_it_is_shown(tmp_path):
    path = save(noise(0), tmp_path / "a.jpg", exif=turned(6))
    found = look_at_file(str(path))
    assert (found.size, found.mode, found.kind, found.orientation) == ((60, 80), "RGB", "JPEG", 6)
    assert found.shorter_side == 60


def test_a_phone_s_pictures_are_seen(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    path = save(noise(0), tmp_path / "a.heic", quality=90)
    found = look_at_file(str(path))
    assert (found.size, found.kind, found.orientation) == ((80, 60), "HEIF", 1)
    assert found.hash is not None


def test_the_digest_is_of_the_picture_not_of_its_file(tmp_path):
    picture = noise(0)
    paths = [save(picture, tmp_path / name) for name in ("a.png", "b.bmp", "c.tif")]
    paths.append(save(picture, tmp_path / "d.webp", lossless=True))
    digests = {look_at_file(str(path)).digest for path in paths}
    assert len(digests) == 1
    assert look_at(picture.crop((0, 0, 79, 60)), "RGB").digest not in digests
    # The same bytes in another shape are another picture.
    assert (
        look_at(Image.new("RGB", (4, 2)), "RGB").digest
        != look_at(Image.new("RGB", (2, 4)), "RGB").digest
    )


def test_colours_are_those_of_all_pixels():
    picture = noise(3)
    found = look_at(picture, "RGB")
    values = np.asarray(picture).reshape(-1, 3) / 255
    assert np.allclose(np.array(found.sums) / found.pixels, values.mean(0))
    assert np.allclose(np.array(found.squares) / found.pixels, (values**2).mean(0))


def test_colours_of_large_pictures_are_near_those_of_all_pixels():
    picture = noise(3, (1300, 1000))
    found = look_at(picture, "RGB", with_crops=False)
    assert found.pixels < 1300 * 1000 / 4
    mean = np.asarray(picture).reshape(-1, 3).mean(0) / 255
    assert np.allclose(np.array(found.sums) / found.pixels, mean, atol=0.002)


@pytest.mark.parametrize("colour", ["white", "black", (120, 121, 119)])
def test_an_even_picture_has_no_hash(colour):
    found = look_at(Image.new("RGB", (100, 100), colour), "RGB")
    assert (found.hash, found.mirrored, found.crops) == (None, None, b"")


def test_small_pictures_have_no_hashes_of_crops():
    assert look_at(noise(1, (63, 90)), "RGB").crops == b""
    count = sum(places**2 for places in CROPS.values())
    assert len(look_at(noise(1, (64, 90)), "RGB").crops) == 32 * count


def test_crops_lie_within_the_picture():
    boxes = list(crop_boxes((200, 100)))
    assert len(boxes) == sum(places**2 for places in CROPS.values())
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 200 + 1e-9
        assert 0 <= top < bottom <= 100 + 1e-9
        assert min(abs((right - left) / 200 - kept) for kept in CROPS) < 1e-9


def test_without_the_package_pictures_have_no_hashes(monkeypatch):
    monkeypatch.setattr(looks, "can_compare", lambda: False)
    found = look_at(noise(0), "RGB")
    assert found.hash is None
    assert found.digest


def test_broken_files_are_told_by_their_text(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(BrokenImage, match="broken image"):
        look_at_file(str(path))

    class Folder:
        samples = [(str(path), 0)]

        def __len__(self):
            return 1

    ((index, found),) = Looks(Folder())[[(1, 0)]]
    assert index == 0
    assert found.startswith(f"broken image {path}: ")


def test_pictures_without_files_are_seen():
    class Pictures:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return noise(index), 0

    first, second = Looks(Pictures(), with_crops=False)[[(1, 0), (1, 1)]]
    assert (first[0], second[0]) == (0, 1)
    assert first[1].digest == look_at(noise(0), "RGB").digest != second[1].digest
