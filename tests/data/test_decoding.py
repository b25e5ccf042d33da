"""JPEGs decoded no larger than needed. Run: python -m pytest tests/data/test_decoding.py"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import assert_same_batches, load, small
from PIL import Image
from torchvision.transforms import v2

from split_affinity.data.dataset import open_data
from split_affinity.data.decoding import (
    TO_TRAIN,
    TO_VALIDATE,
    JpegFile,
    decoded,
    decoding_scale,
    open_image,
    picture_reader,
)
from split_affinity.data.pictures import BrokenImage, load_image
from split_affinity.data.transforms import RandomResizedCrop, resize_picture, validation_transform
from split_affinity.models.pretrained import Preprocessing

BILINEAR = Image.Resampling.BILINEAR
EVERY_WAY = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "mpo": {"format": "MPO", "append_images": [Image.new("RGB", (16, 16))], "save_all": True},
}


def scene(width=613, height=471):
    """A picture of waves in three colours, another at each place."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 37 + y / 90), np.cos(y / 29 - x / 110), np.sin((x + 2 * y) / 61)]
    return Image.fromarray((127 + 100 * np.dstack(waves)).astype(np.uint8))


def written(path, picture=None, mode="RGB", orientation=1, **options):
    """The path of a JPEG with a picture, the scene if there is none."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"format": "JPEG", "quality": 95} | options
    (picture or scene()).convert(mode).save(path, exif=exif, **options)
    return str(path)


def levels_apart(ours, theirs):
    """How many of 255 levels two pictures differ: in the mean, and at the most."""
    apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    return apart.mean(), apart.max()


def in_full(path, box, size, filters=BILINEAR):
    """What a box shows, by the way of `--full-decode`."""
    return load_image(path).crop(box).resize(size, filters)


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("margin", [TO_TRAIN, TO_VALIDATE])
def test_a_part_of_a_smaller_decoding_is_nearly_that_of_the_full_one(tmp_path, way, margin):
    path = written(tmp_path / "x.jpg", **EVERY_WAY[way])
    for box in ((0, 0, 613, 471), (101, 53, 500, 470), (300, 7, 400, 110)):
        ours = open_image(path).resized(box, (40, 30), BILINEAR, margin)
        mean, largest = levels_apart(ours, in_full(path, box, (40, 30)))
        assert (ours.size, ours.mode) == ((40, 30), "RGB")
        assert mean < (2 if margin == 1 else 0.4)
        assert largest <= (10 if margin == 1 else 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sides", [(608, 472), (613, 471), (601, 465)])
def test_a_turned_picture_lies_where_it_lay(tmp_path, orientation, sides):
    path = written(tmp_path / "x.jpg", scene(*sides), orientation=orientation)
    picture, whole = open_image(path), load_image(path)
    assert picture.size == whole.size
    for box in ((0, 0, *whole.size), (whole.width - 350, 0, whole.width, 350), (33, 100, 400, 465)):
        ours = picture.resized(box, (43, 43), BILINEAR, 1)
        assert decoding_scale(box, (43, 43), 1) == 8
        mean, largest = levels_apart(ours, in_full(path, box, (43, 43)))
        assert mean < 1  # without the shift it is 1.7 and more
        assert largest <= 6


@pytest.mark.parametrize("filters", list(Image.Resampling)[:4])
def test_what_needs_all_pixels_gets_the_same_to_the_bit(tmp_path, filters):
    """Also without interpolation, where single pixels are shown."""
    path = written(tmp_path / "x.jpg")
    nearest = filters == Image.Resampling.NEAREST
    for box, size in (((5, 3, 58, 56), (50, 50)), ((0, 0, 613, 471), (30 if nearest else 400, 30))):
        ours = open_image(path).resized(box, size, filters, 1)
        assert np.array_equal(np.asarray(ours), np.asarray(in_full(path, box, size, filters)))


@pytest.mark.parametrize(
    ("box", "size", "margin", "scale"),
    [
        ((0, 0, 80, 80), (10, 10), 1, 8),
        ((0, 0, 79, 80), (10, 10), 1, 4),
        ((0, 0, 80, 80), (10, 10), 2, 4),
        ((10, 10, 29, 90), (10, 10), 1, 1),
        ((10, 10, 30, 90), (10, 10), 1, 2),
        ((0, 0, 8, 8), (1, 1), 1, 8),
        ((0, 0, 1, 1), (1, 1), 1, 1),
        ((0, 0, 4000, 3000), (341, 256), 2, 4),
    ],
)
def test_no_smaller_than_the_margin_asks_for(box, size, margin, scale):
    assert decoding_scale(box, size, margin) == scale


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("sides", [(1, 1), (9, 7), (17, 400)])
def test_tiny_pictures(tmp_path, orientation, sides):
    path = written(
        tmp_path / "x.jpg", Image.new("RGB", sides, (90, 120, 30)), orientation=orientation
    )
    picture = open_image(path)
    ours = picture.resized((0, 0, *picture.size), (1, 1), BILINEAR, 1)
    assert levels_apart(ours, in_full(path, (0, 0, *picture.size), (1, 1)))[1] <= 1


def test_the_same_crops_are_drawn(tmp_path):
    path = written(tmp_path / "x.jpg")
    crop = RandomResizedCrop(32, (0.08, 1))
    for seed in range(20):
        torch.manual_seed(seed)
        ours, after = crop(open_image(path)), torch.get_rng_state()
        torch.manual_seed(seed)
        theirs = v2.RandomResizedCrop(32, (0.08, 1))(load_image(path))
        assert torch.equal(torch.get_rng_state(), after)
        mean, largest = levels_apart(ours, theirs)
        assert mean < 1
        assert largest <= 8


@pytest.mark.parametrize("orientation", [1, 6, 3])
def test_validation_sees_nearly_the_same(tmp_path, orientation):
    path, ready = written(tmp_path / "x.jpg", orientation=orientation), Preprocessing(64, 73)
    ours, theirs = (resize_picture(ready, read(path)) for read in (open_image, load_image))
    assert ours.size == theirs.size
    mean, largest = levels_apart(ours, theirs)
    assert mean < 0.4
    assert largest <= 4
    whole = Preprocessing(224, 256)  # there are too few pixels for less
    pair = [validation_transform(whole)(read(path)) for read in (open_image, load_image)]
    assert torch.equal(*pair)


def test_a_line_of_pixels_is_decoded_whole(tmp_path):
    path = written(tmp_path / "x.jpg", Image.new("RGB", (30_000, 200), (9, 99, 199)))
    ready = Preprocessing(20, 22)
    pair = [validation_transform(ready)(read(path)) for read in (open_image, load_image)]
    assert torch.equal(*pair)


def faults(path):
    """Broken JPEGs, by what is wrong with them."""
    content = Path(written(path)).read_bytes()
    scan = content.index(b"\xff\xda")
    return {
        "truncated": content[: len(content) // 2],
        "without its last bytes": content[:-200],
        "header alone": content[: scan + 14],
        "half a header": content[: scan // 2],
        "nothing": b"",
        "no tables": content.replace(b"\xff\xdb", b"\xff\xec").replace(b"\xff\xc4", b"\xff\xec"),
        "text": b"no picture",
    }


@pytest.mark.parametrize("fault", range(7))
def test_a_broken_file_is_named_in_the_same_words(tmp_path, fault):
    """Whatever the crop: a run counts broken images by their messages."""
    path = tmp_path / "x.jpg"
    name, content = list(faults(path).items())[fault]
    path.write_bytes(content)
    with pytest.raises(BrokenImage) as expected:
        load_image(str(path))
    for box in ((0, 0, 613, 471), (0, 0, 100, 100), (300, 300, 340, 340)):
        with pytest.raises(BrokenImage) as caught:
            open_image(str(path)).resized(box, (20, 20), BILINEAR, 1)
        assert str(caught.value) == str(expected.value), name


def test_a_file_that_goes_is_named_in_the_same_words(tmp_path):
    path = written(tmp_path / "x.jpg")
    picture = open_image(path)
    Path(path).unlink()
    with pytest.raises(BrokenImage) as expected:
        load_image(path)
    with pytest.raises(BrokenImage) as caught:
        picture.resized((0, 0, 613, 471), (20, 20), BILINEAR, 1)
    assert str(caught.value) == str(expected.value)


def test_damaged_exif_data_turn_nothing(tmp_path):
    scene().save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\1\x12")
    assert open_image(str(tmp_path / "x.jpg")).size == (613, 471)


def test_other_formats_are_decoded_at_once(tmp_path):
    for name in ("PNG", "WEBP", "TIFF"):
        scene().save(tmp_path / "x.jpg", name)
        ours = open_image(str(tmp_path / "x.jpg"))
        assert np.array_equal(np.asarray(ours), np.asarray(load_image(str(tmp_path / "x.jpg"))))
        assert decoded(ours) is ours


@pytest.fixture
def scenes(tmp_path):
    """A folder with large pictures of two classes."""
    for number in range(8):
        folder = tmp_path / f"scenes/{'ab'[number % 2]}"
        folder.mkdir(parents=True, exist_ok=True)
        written(folder / f"{number}.jpg", scene(400 + number, 300), orientation=1 + number)
    return tmp_path / "scenes"


def test_a_run_can_decode_in_full(scenes):
    """Then training and validation get the pictures as earlier versions did."""
    settings = small(data_path=scenes, full_decode=True)
    data = open_data(settings)
    assert isinstance(data.train[0][0], Image.Image)
    expected = load(data, settings)
    less = small(data_path=scenes)
    assert isinstance(open_data(less).train[0][0], JpegFile)
    batches = load(open_data(less), less)
    assert_same_batches(batches, load(open_data(less), dataclasses.replace(less, workers=2)))
    for (images, targets), (others, same_targets) in zip(batches, expected, strict=True):
        assert torch.equal(targets, same_targets)
        assert not torch.equal(images, others)
        torch.testing.assert_close(images, others, rtol=0, atol=0.2)


def test_which_way_is_the_default():
    assert picture_reader(full_decode=False) is open_image
    assert picture_reader(full_decode=True) is load_image
