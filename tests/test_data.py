"""Data. Run: python -m pytest tests/test_data.py"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import gc
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torchvision
from cifar import CIFAR10, DIGITS, FOLDER, accept, make_cifar, make_cifar_digits
from conftest import TINY, as_loaded
from hypothesis import given
from hypothesis import strategies as st
from patching import set_everywhere
from PIL import Image
from scipy.special import betainc
from torch.utils.data import Dataset
from torchvision.transforms import v2

from split_affinity import ALLOWED_CPUS, process_cpus
from split_affinity.data import named
from split_affinity.data.classes import (
    confused_classes,
    match_classes,
    with_known_classes,
    wordnet_ids,
)
from split_affinity.data.dataset import (
    choose_images,
    describe_data,
    describe_images,
    open_data,
    with_validation,
)
from split_affinity.data.image_folder import folder_data
from split_affinity.data.loader import (
    BadImages,
    Batches,
    Feed,
    LoaderDied,
    check_open_files,
    training_feed,
    validation_feed,
)
from split_affinity.data.named import SYNTHETIC_PATTERNS
from split_affinity.data.pictures import ImageData, load_image, to_rgb
from split_affinity.data.samples import EpochOrder, Samples, shared
from split_affinity.data.transforms import (
    image_size_in,
    mixing_transform,
    training_transform,
    validation_transform,
)
from split_affinity.errors import RunError, UserError
from split_affinity.machine.topology import read_topology
from split_affinity.models.pretrained import Preprocessing, imagenet_classes
from split_affinity.options.command_line import parse_arguments
from split_affinity.options.settings import Settings
from split_affinity.options.values import MIXING
from split_affinity.reports.confusion import confused_json
from split_affinity.runs.setup import settings_in_force
from split_affinity.training.network import Confusion
from train_split_affinity import main

ALL_CPUS = tuple(sorted(ALLOWED_CPUS))
ALL_WORKERS = pytest.mark.parametrize("workers", [0, 1, 2])


def small(**settings):
    chosen = {"image_size": 32, "batch_size": 4, "workers": 0, "num_classes": 2} | settings
    return Settings(**chosen)


def load(data, settings, epoch=1, start=0, stop=None):
    """Training batches, as a run gets them."""
    with contextlib.closing(training_feed(data, settings, ALL_CPUS)) as feed:
        bad = BadImages(settings.max_bad_images)
        return list(feed.batches(bad, epoch, start, stop))


def assert_same_batches(batches, others):
    assert len(batches) == len(others)
    for (images, targets), (other_images, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


@pytest.fixture
def with_val(photos, tmp_path):
    """The photographs, all of them to train and to validate."""
    shutil.copytree(photos / "train", tmp_path / "both/train")
    shutil.copytree(photos / "train", tmp_path / "both/val")
    return tmp_path / "both"


def test_synthetic_images():
    data = open_data(small(num_classes=5))
    assert (data.kind, data.val, len(data.train)) == ("synthetic", None, 1280)
    assert data.classes == ("0", "1", "2", "3", "4")
    images, targets = load(data, small(num_classes=5), stop=1)[0]
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert targets.shape == (4,)
    assert set(targets.tolist()) <= set(range(5))


def test_synthetic_images_fill_at_least_one_step():
    assert len(open_data(small(batch_size=700, accumulate=3)).train) == 2100


def test_synthetic_images_depend_on_the_seed():
    first, again, other = (
        load(open_data(small(seed=seed)), small(seed=seed), stop=1)[0][0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def squares(data, index):
    """The mean colours of a synthetic picture's 4 x 4 squares."""
    pixels = v2.functional.pil_to_tensor(data.train[index][0]).float()
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 4)


def test_synthetic_pictures_of_a_class_share_a_pattern_and_no_noise():
    data = open_data(small(num_classes=1000, image_size=224))
    for index in range(SYNTHETIC_PATTERNS):
        assert (squares(data, index) - squares(data, index + 10)).abs().max() < 3
        assert (squares(data, index) - squares(data, index + 11)).abs().max() > 30
        first, other = (np.asarray(data.train[each][0], int) for each in (index, index + 10))
        assert 10 < np.abs(first - other).mean() < 11.5, "two even draws of 32 differ by 10.7"


@pytest.mark.parametrize(
    ("classes", "targets"),
    [(1000, [*range(10), *range(3)]), (3, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0])],
)
def test_synthetic_pictures_are_of_the_first_ten_classes(classes, targets):
    data = open_data(small(num_classes=classes))
    assert len(data.classes) == classes
    assert [data.train[index][1] for index in range(13)] == targets


def test_a_synthetic_picture_depends_on_seed_and_index_alone():
    pictures = []
    for settings in (small(), small(batch_size=2000)):
        torch.manual_seed(settings.batch_size)
        pictures.append(open_data(settings).train[1234][0])
    assert pictures[0].size == (32, 32) and pictures[0].mode == "RGB"
    assert pictures[0] == pictures[1]
    assert pictures[0] != open_data(small(seed=1)).train[1234][0]


@ALL_WORKERS
def test_synthetic_images_are_the_same_with_any_loaders(workers):
    settings = small(num_classes=1000, workers=workers)
    expected = load(open_data(settings), small(num_classes=1000), stop=3)
    with contextlib.closing(training_feed(open_data(settings), settings, ALL_CPUS)) as feed:
        assert_same_batches(list(feed.batches(BadImages(), stop=3)), expected)


@pytest.mark.parametrize(
    ("classes", "said"),
    [(None, "10 of 1000 classes"), (10, "10 classes"), (4, "4 classes")],
)
def test_what_is_said_of_synthetic_images(classes, said):
    (line,) = describe_data(open_data(small(num_classes=classes)))
    assert line == f"data      synthetic: 1280 images of {said}, a noisy pattern for each"
    assert len(line) <= 80


@pytest.mark.parametrize("below", ["", "train"])
def test_an_image_folder_with_or_without_train(photos, below):
    data = open_data(small(data_path=photos / below))
    assert (data.kind, data.val, len(data.train)) == ("folder", None, 12)
    assert data.classes == ("flower", "temple")
    images, targets = load(data, small(), stop=1)[0]
    assert images.shape == (4, 3, 32, 32)
    assert set(targets.tolist()) <= {0, 1}


def test_an_image_folder_with_validation_images(with_val):
    (with_val / "val/temple/0005.jpg").unlink()
    data = open_data(small(data_path=with_val))
    assert (len(data.train), len(data.val)) == (12, 11)
    assert data.native == Preprocessing(224, 256)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_that_only_one_part_has(with_val, part):
    shutil.copytree(with_val / "val/temple", with_val / part / "church")
    error = f"--data-path {with_val}: class church is not in both of train and val"
    with pytest.raises(UserError, match=error):
        open_data(small(data_path=with_val))


def test_paths_that_hold_no_images(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images/a").mkdir(parents=True)
    (tmp_path / "no_images/b").mkdir(parents=True)
    (tmp_path / "no_images/a/notes.txt").write_text("hello")
    shutil.copytree(photos / "train/temple", tmp_path / "one/temple")
    shutil.copytree(photos / "train", tmp_path / "no_val/train")
    (tmp_path / "no_val/val").mkdir()
    picture = photos / "train/temple/0000.jpg"
    for path, reason in (
        (tmp_path / "nowhere", "does not exist"),
        (picture, "is a file"),
        (tmp_path / "empty", "no images"),
        (tmp_path / "no_images", "no images"),
        (tmp_path / "no_val", "no images"),
        (tmp_path / "one", r"one class only \(temple\)"),
    ):
        with pytest.raises(UserError, match=f"--data-path {path}.*{reason}") as caught:
            open_data(small(data_path=path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"batch_size": 13}, "--batch-size 13: .* has only 12 images to train on: lower -b$"),
        (
            {"batch_size": 5, "accumulate": 3},
            "--batch-size 5 --accumulate 3: .* only 12 images .*: lower -b or --accumulate$",
        ),
        ({"batch_size": 7, "subset": 0.5}, "--batch-size 7: .* has only 6 images to train on"),
        ({"num_classes": 1}, "--num-classes 1: .* has 2 classes"),
    ],
)
def test_settings_that_do_not_suit_the_data(photos, settings, error):
    with pytest.raises(UserError, match=error):
        open_data(small(data_path=photos, **settings))


def folder_of(root, *names):
    """A folder with small pictures, each of another colour, under these names."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return root


def samples_of(data):
    """The class of each image, by the path below the folder given."""
    return [(os.path.relpath(path, data.root), target) for path, target in data.samples]


def test_classes_and_images_in_torchvisions_order(tmp_path):
    names = [
        "b/10.png",
        "b/9.png",
        "b/sub/1.png",
        "b/sub-1/1.png",
        "b/sub.x/1.png",
        "b/sub/a/1.bmp",
    ]
    root = folder_of(tmp_path, *names, "B/1.jpeg", "B/0.TIFF", "a b/ä.webp", "10/1.ppm", "9/1.jpg")
    for same in (root, Path(os.path.relpath(root))):
        ours, theirs = folder_data(same).train, torchvision.datasets.ImageFolder(same)
        assert ours.samples == ours.imgs == theirs.samples
        assert ours.targets == theirs.targets
        assert (ours.classes, ours.class_to_idx) == (theirs.classes, theirs.class_to_idx)
        assert ours.left_out == []


def test_links_lead_to_classes_folders_and_images_elsewhere(tmp_path):
    store = folder_of(tmp_path / "store", "x/1.png", "x/2.png", "y/deep/3.png", "z/4.png")
    root = tmp_path / "subset"
    (root / "c").mkdir(parents=True)
    (root / "a").symlink_to(store / "x")
    (root / "b").symlink_to("../store/y")
    (root / "c/4.png").symlink_to(store / "z/4.png")
    (root / "c/more").symlink_to(store / "x")
    (root / "also_a").symlink_to(store / "x")
    ours, theirs = folder_data(root).train, torchvision.datasets.ImageFolder(root)
    assert ours.samples == theirs.samples
    assert len(ours) == 8
    assert ours.left_out == []
    assert (
        folder_data(Path(shutil.copytree(root, tmp_path / "copied"))).train.targets == ours.targets
    )


@pytest.mark.parametrize(
    "links",  # path and target of each
    [
        {"a/up": ".."},
        {"a/here": "."},
        {"a/x": ".", "a/y": "."},
        {"a/sub/up": "..", "b/top": "../.."},
        {"all": "."},
        {"all": "..", "a/x": "../../data"},
        {"a/b": "../b", "b/a": "../a"},
        {"a/out": "../../out", "b/out": "../../out"},
    ],
)
def test_links_that_lead_back_are_not_followed_but_named(tmp_path, links):
    root = folder_of(tmp_path / "data", "a/1.png", "a/sub/2.png", "b/3.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/back").symlink_to("../data/a")
    for path, target in links.items():
        (root / path).symlink_to(target)
    data = folder_data(root).train
    real = {(os.path.realpath(path), target) for path, target in data.samples}
    assert len(real) == len(data), "each file once in a class"
    assert data.classes == ["a", "b"]
    looping = {path for kind, path in data.left_out if kind == "looping link"}
    if "a/b" in links:  # each class has the other's images, too
        assert samples_of(data) == [("a/1.png", 0), ("a/b/3.png", 0), ("a/sub/2.png", 0)] + [
            ("b/3.png", 1),
            ("b/a/1.png", 1),
            ("b/a/sub/2.png", 1),
        ]
        assert looping == {f"{root}/a/b/a", f"{root}/b/a/b"}
    elif "a/out" in links:
        assert data.targets == [0, 0, 1, 1, 1]
        assert looping == {f"{root}/a/out/back", f"{root}/b/out/back/out"}
    else:
        assert samples_of(data) == [("a/1.png", 0), ("a/sub/2.png", 0), ("b/3.png", 1)]
        assert looping == {f"{root}/{path}" for path in links}


def test_a_class_has_each_file_once_however_many_links_lead_there(tmp_path):
    root = folder_of(tmp_path / "data", "a/1.png", "a/sub/2.png", "b/3.png")
    folder_of(tmp_path / "out", "4.png", "below/5.png")
    for name, target in {
        "a/0.png": "1.png",
        "a/7.png": "../b/3.png",
        "a/8.png": "../../out/4.png",
        "a/copy": "sub",
        "a/out": "../../out",
        "a/part": "../../out/below",
        "b/1.png": "../a/1.png",
    }.items():
        (root / name).symlink_to(target)
    data = folder_data(root).train
    images = ["a/0.png", "a/7.png", "a/8.png", "a/copy/2.png", "a/out/below/5.png"]
    assert samples_of(data) == [(name, 0) for name in images] + [("b/1.png", 1), ("b/3.png", 1)]
    assert data.left_out == [
        ("repeated image", f"{root}/a/1.png"),
        ("repeated image", f"{root}/a/out/4.png"),
        ("repeated folder", f"{root}/a/part"),
        ("repeated folder", f"{root}/a/sub"),
    ]


def test_a_link_into_nowhere_is_a_broken_image(tmp_path):
    root = folder_of(tmp_path, "a/1.png", "b/1.png")
    for name, target in {"a/gone.png": "nowhere", "b/self.png": "self.png"}.items():
        (root / name).symlink_to(target)
        settings = small(data_path=root, batch_size=1)
        with pytest.raises(RunError, match=f"^broken image {root / name}: "):
            load(open_data(settings), settings)
        (root / name).unlink()


def test_a_run_goes_on_without_the_image_of_a_link_into_nowhere(tmp_path, in_tmp, capsys):
    root = folder_of(tmp_path, "data/a/1.png", "data/a/2.png", "data/b/1.png") / "data"
    (root / "a/gone.png").symlink_to("nowhere")
    options = [*TINY, "--data-path", str(root), "--output-dir", "out", "--epochs", "1", "-b", "4"]
    assert main([*options, "--max-bad-images", "1"]) == 0
    assert f"broken image {root}/a/gone.png: " in capsys.readouterr().err


def test_what_is_no_picture_is_left_out_and_named(tmp_path):
    root = folder_of(tmp_path / "data", "a/1.png", "b/1.png", "b/.hidden/9.png", "b/._1.png")
    folder_of(
        root, ".ipynb_checkpoints/1.png", "a/.ipynb_checkpoints/1-checkpoint.png", "loose.png"
    )
    for name in ("a/2.gif", "b/notes.txt", "names.csv", ".DS_Store", "a/.DS_Store", "b/Thumbs.db"):
        (root / name).write_text("no picture")
    os.mkfifo(root / "a/3.png")
    os.mkfifo(tmp_path / "pipe")
    (root / "b/4.jpg").symlink_to(tmp_path / "pipe")
    data = folder_data(root).train
    assert data.classes == ["a", "b"]
    assert samples_of(data) == [("a/1.png", 0), ("b/1.png", 1)]
    assert data.left_out == [
        (kind, f"{root}/{name}")
        for kind, name in (
            ("hidden folder", ".ipynb_checkpoints"),
            ("other file", "names.csv"),
            ("classless image", "loose.png"),
            ("hidden folder", "a/.ipynb_checkpoints"),
            ("other file", "a/2.gif"),
            ("other file", "a/3.png"),
            ("other file", "b/._1.png"),
            ("hidden folder", "b/.hidden"),
            ("other file", "b/4.jpg"),
            ("other file", "b/notes.txt"),
        )
    ]


def test_classes_without_images_are_named_in_a_line(tmp_path):
    root = folder_of(tmp_path, "train/a/1.png", "train/c/1.png")
    for name in ("b", "d"):
        (root / "train" / name).mkdir()
    error = f"--data-path {root}: no images: none of .jpg, .* in class b, d of {root}/train$"
    with pytest.raises(UserError, match=error):
        open_data(small(data_path=root))


@pytest.mark.parametrize(
    ("there", "used", "unused"),
    [
        ([], None, []),
        (["val"], "val", []),
        (["valid"], "valid", []),
        (["validation"], "validation", []),
        (["test", "unlabeled", ".git"], None, ["test", "unlabeled"]),
        (["test", "validation", "valid", "val"], "val", ["test", "valid", "validation"]),
        (["validation", "valid"], "valid", ["validation"]),
    ],
)
def test_which_folder_validates(tmp_path, there, used, unused):
    root = folder_of(
        tmp_path, *(f"{part}/{name}/1.png" for part in ("train", *there) for name in "ab")
    )
    data = open_data(small(data_path=root, batch_size=1))
    assert (data.val and data.val.root) == (used and root / used)
    assert data.left_out == [("unused folder", str(root / name)) for name in unused]


def test_what_was_found_and_left_out_in_two_lines(tmp_path):
    root = folder_of(tmp_path, "train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png")
    found = "data      4 images of 2 classes (a, b) to train on, {} to validate with"
    data = open_data(small(data_path=root, batch_size=1))
    assert describe_data(data) == [found.format("none")]
    folder_of(root, "valid/a/1.png", "valid/b/1.png", "test/a/1.png")
    for name in ("train/a/x.gif", "train/b/notes.txt", "valid/a/y.gif"):
        (root / name).touch()
    (root / "valid/b/up").symlink_to("..")
    assert describe_data(open_data(small(data_path=root, batch_size=1))) == [
        found.format(f"2 in {root}/valid"),
        f"left out  3 other files ({root}/train/a/x.gif, ...), 1 looping link ({root}/valid/b/up), "
        f"1 unused folder ({root}/test)",
    ]
    half = open_data(small(data_path=root, batch_size=1, subset=0.5))
    assert describe_data(half)[0].startswith("data      2 of 4 images of 2 classes (a, b) to ")


def test_many_classes_are_shortened():
    classes = tuple(f"class{number}" for number in range(100))
    data = ImageData("cifar10", Labels([0]), Labels([0, 1]), classes, chosen=[0])
    assert describe_data(data) == [
        "data      1 image of 100 classes (class0, class1, class2, class3, class4, class5, class6, "
        "...) to train on, 2 to validate with"
    ]


@pytest.mark.parametrize("command", ["plan", "train", "find-lr"])
def test_the_head_of_a_run_says_what_was_found(tmp_path, in_tmp, capsys, command):
    root = folder_of(tmp_path, "data/train/a/1.png", "data/train/b/1.png", "data/test/a/1.png")
    options = ["--model", "squeezenet1_1", "--image-size", "32", "-b", "2", "-j", "0"]
    path = ["--data-path", str(root / "data"), "--steps", "1"]
    assert main([command, *options, *path]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("data      2 images of 2 classes (a, b) to train on, none to validate with")
    assert lines[place + 1] == f"left out  1 unused folder ({root}/data/test)"


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


def colour(red, green, blue):
    return np.broadcast_to(np.uint8([red, green, blue]), (32, 32, 3))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Twelve images of noise to train, and to validate one of one colour and one of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
    train = noise[:12], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    test = np.stack([colour(51, 102, 204), noise[12]]), [7, 0]
    return accept(monkeypatch, make_cifar(tmp_path / "cifar", train, test))


def test_cifar10_is_recognised_and_read(cifar):
    data = open_data(Settings(data_path=cifar, batch_size=4))
    assert (data.kind, data.native, data.classes) == ("cifar10", named.CIFAR10, DIGITS)
    assert [target for _, target in data.train] == [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    noise = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
    for (picture, _), pixels in zip(data.train, noise[:12], strict=True):
        assert np.array_equal(np.asarray(picture), pixels)


def test_cifar10_is_normalised_by_its_own_colours(cifar):
    """By hand: a fifth, two fifths and four fifths, less the mean, in standard deviations."""
    settings = small(data_path=cifar, num_classes=10)
    with contextlib.closing(validation_feed(open_data(settings), settings, ALL_CPUS)) as feed:
        ((images, targets),) = feed.batches(BadImages())
    assert targets.tolist() == [7, 0]
    for channel, expected in zip(images[0], (-1.179757, -0.337577, 1.351300), strict=True):
        torch.testing.assert_close(channel, torch.full((32, 32), expected), rtol=0, atol=1e-5)


def test_cifar10_from_end_to_end(tmp_path, monkeypatch):
    root = accept(monkeypatch, make_cifar_digits(tmp_path, 50))
    settings = small(data_path=root, num_classes=10, workers=1)
    data = open_data(settings)
    assert (len(data.train), len(data.val)) == (40, 10)
    batches = load(data, settings)
    assert len(batches) == 10
    assert all(images.shape == (4, 3, 32, 32) for images, _ in batches)
    found = sorted(target for _, targets in batches for target in targets.tolist())
    assert found == sorted(data.train.targets)


def test_more_or_fewer_classes_than_cifar10(cifar):
    with pytest.raises(UserError, match="--num-classes 9: .* has 10 classes"):
        open_data(small(data_path=cifar, num_classes=9))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, Path.unlink])
def test_a_damaged_file_of_cifar10(cifar, name, damage):
    damage(cifar / FOLDER / name)
    with pytest.raises(UserError, match=f"--data-path {cifar}: no CIFAR-10: .*not found or"):
        open_data(small(data_path=cifar, num_classes=10))


def test_a_file_of_cifar10_that_cannot_be_parsed(cifar, monkeypatch):
    cut_in_half(cifar / FOLDER / "test_batch")
    accept(monkeypatch, cifar)
    with pytest.raises(UserError, match=f"--data-path {cifar}: no CIFAR-10: .*") as caught:
        open_data(small(data_path=cifar, num_classes=10))
    assert "\n" not in str(caught.value)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that is served on this machine, where torchvision looks for CIFAR-10."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(
            CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
        )
        yield folder
        server.shutdown()


def test_cifar10_is_downloaded_and_verified(cifar, site, tmp_path, monkeypatch):
    archive = site / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar / FOLDER, FOLDER)
    settings = small(data_path=tmp_path / "new", download=True, num_classes=10)
    with pytest.raises(UserError, match="new: no CIFAR-10: File not found or corrupted"):
        open_data(settings)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(open_data(settings).train) == 12
    archive.unlink()
    assert len(open_data(settings).train) == 12, "what is there is not fetched again"


def test_cifar10_that_cannot_be_fetched(site, tmp_path):
    with pytest.raises(UserError, match="no CIFAR-10: HTTP Error 404: File not found"):
        open_data(small(data_path=tmp_path, download=True))


def plain(kind="folder"):
    """Data whose images keep their values from 0 to 1, to see what transforms do."""
    sides = (32, 32) if kind == "cifar10" else (224, 256)
    native = Preprocessing(*sides, "bilinear", (0, 0, 0), (1, 1, 1))
    padded = 32 if kind == "cifar10" else 0
    return ImageData(kind, None, None, ("a", "b"), native, padded=padded)


def validated(data, size):
    """What validation makes of pictures at another image size."""
    return validation_transform(data.native.overruled(small(image_size=size)))


def transform(size=32, kind="folder", **settings):
    """Without what is random, unless settings say so."""
    chosen = small(**({"min_scale": 1.0, "hflip": 0.0, "image_size": size} | settings))
    return training_transform(plain(kind), chosen, size)


def noise(side=32):
    return np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)


def as_bytes(image):
    """The bytes (height, width, 3) that an image (3, height, width) from 0 to 1 was made of."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def draws(transformation, pixels, count):
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    torch.manual_seed(0)
    return [transformation(picture) for _ in range(count)]


def steps(transformation):
    return [type(step).__name__ for step in transformation.transforms]


@pytest.mark.parametrize(
    ("asked", "step"),
    [
        ("none", []),
        ("ra", ["RandAugment"]),
        ("ta", ["TrivialAugmentWide"]),
        ("aa", ["AutoAugment"]),
    ],
)
def test_the_order_of_the_augmentation(asked, step):
    end = ["ToImage", "ToDtype", "Normalize", "RandomErasing"]
    begin = ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert steps(transform(auto_augment=asked)) == [*begin, *step, *end]
    jitter = transform(auto_augment=asked, color_jitter=0.4)
    assert steps(jitter) == [*begin, *step, "ColorJitter", *end]
    begin = ["RandomCrop", "Resize", "RandomHorizontalFlip"]
    assert steps(transform(kind="cifar10", auto_augment=asked)) == [*begin, *step, *end]


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_the_magnitude_of_rand_augment(magnitude):
    chosen = {} if magnitude == 9 else {"ra_magnitude": magnitude}
    ours = draws(transform(auto_augment="ra", **chosen), noise(), 8)
    expected = transform(auto_augment="none").transforms
    expected.insert(2, v2.RandAugment(2, magnitude, 31))
    for image, other in zip(ours, draws(v2.Compose(expected), noise(), 8), strict=True):
        assert torch.equal(image, other)


@pytest.mark.parametrize("asked", ["ra", "ta", "aa"])
def test_automatic_augmentation_changes_pictures(asked):
    images = draws(transform(auto_augment=asked), noise(), 12)
    assert all(image.shape == (3, 32, 32) for image in images)
    assert len({as_bytes(image).tobytes() for image in images}) > 3


@pytest.mark.parametrize(("kind", "policy"), [("folder", "imagenet"), ("cifar10", "cifar10")])
def test_autoaugment_has_the_policy_of_the_data(kind, policy):
    (step,) = (
        step
        for step in transform(kind=kind, auto_augment="aa").transforms
        if isinstance(step, v2.AutoAugment)
    )
    assert step.policy.value == policy


def test_a_flip_never_and_always():
    for image in draws(transform(hflip=0.0), noise(), 5):
        assert np.array_equal(as_bytes(image), noise())
    for image in draws(transform(hflip=1.0), noise(), 5):
        assert np.array_equal(as_bytes(image), noise()[:, ::-1])


def test_a_flip_now_and_then():
    images = draws(transform(hflip=0.5), noise(), 40)
    assert 5 < sum(np.array_equal(as_bytes(image), noise()) for image in images) < 35


@pytest.mark.parametrize(("smallest", "least", "most"), [(0.08, 0.06, 0.5), (0.9, 0.8, 1.0)])
def test_how_much_of_a_picture_a_crop_shows(smallest, least, most):
    """Red grows from left to right, green from top to bottom: their spans tell the part seen."""
    place = np.arange(200, dtype=np.uint8)
    pixels = np.stack([*np.meshgrid(place, place), np.zeros((200, 200), np.uint8)], axis=2)
    areas = []
    for image in draws(transform(min_scale=smallest), pixels, 50):
        red, green, _ = (channel.max() - channel.min() for channel in image * 255 / 200)
        areas.append((red * green).item())
    assert least < min(areas) < most
    assert max(areas) > 0.85


def test_colour_jitter_changes_brightness_up_to_its_strength():
    values = []
    for image in draws(transform(color_jitter=0.4), colour(100, 100, 100), 50):
        assert image.min() == image.max()
        values.append(image.mean().item() * 255)
    assert 59 < min(values) < 75
    assert 125 < max(values) < 141


def test_colour_jitter_changes_saturation_and_no_hue():
    reds = []
    for image in draws(transform(color_jitter=0.4), colour(150, 100, 100), 50):
        red, green, blue = image[:, 0, 0].tolist()
        assert red > green == blue
        reds.append(red / green)
    assert min(reds) < 1.4
    assert max(reds) > 1.6


@pytest.mark.parametrize(("probability", "erased"), [(0.0, 0), (1.0, 20)])
def test_random_erasing(probability, erased):
    images = draws(transform(random_erase=probability), colour(255, 255, 255), 20)
    assert sum(bool((image == 0).any()) for image in images) == erased
    assert all((image == 1).any() for image in images)


def test_cifar10_is_padded_and_cropped():
    padded = np.pad(noise(), ((4, 4), (4, 4), (0, 0)))
    corners = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    seen = {
        corners[as_bytes(image).tobytes()]
        for image in draws(transform(kind="cifar10"), noise(), 200)
    }
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(9))
    assert len(seen) > 40


def test_cifar10_at_another_size():
    (image,) = draws(transform(64, "cifar10"), noise(), 1)
    assert image.shape == (3, 64, 64)


def test_the_middle_of_a_picture_validates():
    image = validated(plain(), 224)(Image.fromarray(noise(256)))
    assert np.array_equal(as_bytes(image), noise(256)[16:240, 16:240])


@pytest.mark.parametrize(
    ("size", "width", "height"), [(32, 64, 128), (64, 300, 100), (224, 40, 40)]
)
def test_pictures_of_any_shape_validate(size, width, height):
    picture = Image.new("RGB", (width, height))
    assert validated(plain(), size)(picture).shape == (3, size, size)


def test_cifar10_validates_whole():
    image = validated(plain("cifar10"), 32)(Image.fromarray(noise()))
    assert np.array_equal(as_bytes(image), noise())


def test_photographs_are_normalised_by_imagenets_colours(photos):
    """By hand: a fifth, two fifths and four fifths, less the mean, in standard deviations."""
    data = open_data(small(data_path=photos))
    picture = Image.new("RGB", (32, 32), (51, 102, 204))
    for transformation in (
        training_transform(data, small(), 32),
        validated(data, 32),
    ):
        image = transformation(picture)
        expected = torch.tensor([-1.244541, -0.25, 1.751111]).view(3, 1, 1).expand(3, 32, 32)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("native", "asked", "ready"),  # in the order of Preprocessing
    [
        ((224, 256), {}, (224, 256)),
        ((224, 256), {"image_size": 128}, (128, 146)),
        ((224, 232), {"max_res": 160, "min_res": 96, "end_ramp": 3}, (160, 166)),
        ((224, 256), {"val_resize": 224}, (224, 224)),
        ((224, 256), {"val_resize": 320, "image_size": 288}, (288, 320)),
        ((32, 32), {"image_size": 64}, (64, 64)),
        ((32, 32), {"val_resize": 40}, (32, 40)),
        ((224, 256, "bicubic"), {}, (224, 256, "bicubic")),
        ((224, 256, "bicubic"), {"interpolation": "nearest"}, (224, 256, "nearest")),
        (
            (224, 256, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
            {"mean": (0.0, 0.0, 0.0)},
            (224, 256, "bilinear", (0.0, 0.0, 0.0), (0.4, 0.5, 0.6)),
        ),
        (
            (224, 256, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
            {"std": (1.0, 1.0, 1.0)},
            (224, 256, "bilinear", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)),
        ),
    ],
)
def test_settings_overrule_how_pictures_are_made_ready(native, asked, ready):
    found = Preprocessing(*native).overruled(Settings(**asked))
    assert found == Preprocessing(*ready)
    in_force = dataclasses.replace(Settings(), **vars(found))
    assert Preprocessing(*native).overruled(in_force) == found, "settings in force say it all"


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_a_picture_validates_as_torchvisions_preset_has_it(interpolation):
    picture = Image.fromarray(noise(200))
    ready = Preprocessing(48, 60, interpolation, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    preset = torchvision.transforms._presets.ImageClassification(
        crop_size=48,
        resize_size=60,
        mean=ready.mean,
        std=ready.std,
        interpolation=v2.InterpolationMode(interpolation),
    )
    image = validation_transform(ready)(picture)  # by v2, which scales by 1/255: one rounding
    torch.testing.assert_close(torch.Tensor(image), preset(picture), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["folder", "cifar10"])
def test_the_interpolation_of_training_images(kind, interpolation):
    """Ours and torchvision's, with the same random crop."""
    mode = {"interpolation": v2.InterpolationMode(interpolation), "antialias": True}
    crop = [v2.RandomResizedCrop(48, (0.5, 1), **mode)]
    if kind == "cifar10":
        crop = [v2.RandomCrop(32, padding=4), v2.Resize(48, **mode)]
    unused = v2.RandomHorizontalFlip(0), v2.RandomErasing(0)  # which draw nevertheless
    to_tensor = v2.ToImage(), v2.ToDtype(torch.float32, scale=True)
    expected = v2.Compose([*crop, unused[0], *to_tensor, unused[1]])
    ours = transform(48, kind, interpolation=interpolation, min_scale=0.5)
    pixels = noise(32 if kind == "cifar10" else 100)
    for image, other in zip(draws(ours, pixels, 4), draws(expected, pixels, 4), strict=True):
        assert torch.equal(image, other)


def test_mean_and_deviation_that_are_asked_for(with_val):
    """By hand, to train and to validate: a fifth, two fifths and four fifths."""
    settings = small(data_path=with_val, mean=(0.0, 0.4, 0.5), std=(1.0, 0.5, 0.1))
    data = open_data(settings)
    picture = Image.new("RGB", (32, 32), (51, 102, 204))
    for transformation in (
        training_transform(data, settings, 32),
        validation_transform(data.native.overruled(settings)),
    ):
        expected = torch.tensor([0.2, 0.0, 3.0]).view(3, 1, 1).expand(3, 32, 32)
        torch.testing.assert_close(transformation(picture), expected, rtol=0, atol=1e-6)


def test_the_shorter_side_of_a_picture_to_validate(with_val):
    """With the side that is cut out, nothing is lost but what is longer."""
    settings = small(data_path=with_val, val_resize=32, mean=(0, 0, 0), std=(1, 1, 1))
    ready = open_data(settings).native.overruled(settings)
    image = validation_transform(ready)(Image.fromarray(noise(32)))
    assert np.array_equal(as_bytes(image), noise(32))


def test_a_shorter_side_that_is_too_short_for_the_data(cifar, in_tmp, capsys):
    cheap = ["--model", "squeezenet1_1", "-b", "2", "-j", "0", "--split", "none", "--steps", "1"]
    assert main(["--data-path", str(cifar), "--val-resize", "31", *cheap]) == 2
    message = "--val-resize 31: at least the image size, 32, is allowed\n"
    assert capsys.readouterr().err.endswith(message)
    assert main(["--data-path", str(cifar), "--val-resize", "40", *cheap]) == 0


class Flat(Dataset):
    """Six images of one value each: the number of their class."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.full((3, 16, 16), float(index)), index


def mixed_batches(epochs, **settings):
    chosen = small(num_classes=6, **settings)
    unchanged = v2.Identity()
    samples = Samples(Flat(), 0, lambda epoch: unchanged, mixing_transform(chosen))
    keys = [[(epoch, index) for index in range(6)] for epoch in range(epochs)]
    return [samples[batch].batch for batch in keys]


MIXES = pytest.mark.parametrize(
    "settings",
    [{"mixup_alpha": 0.5}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.5, "cutmix_alpha": 1.0}],
)


@MIXES
def test_targets_of_mixed_images_say_what_is_in_them(settings):
    for images, targets in mixed_batches(10, **settings):
        assert targets.shape == (6, 6)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        shares = targets @ torch.arange(6.0)
        torch.testing.assert_close(images.mean((1, 2, 3)), shares, rtol=0, atol=1e-4)


@MIXES
def test_mixing_is_seeded(settings):
    first, second = mixed_batches(6, **settings), mixed_batches(6, **settings)
    assert_same_batches(first, second)
    assert len({targets.amax().item() for _, targets in first}) > 3, "another in each epoch"


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"mixup_alpha": 0.5}, {"blended"}),
        ({"cutmix_alpha": 1.0}, {"pasted"}),
        ({"mixup_alpha": 0.5, "cutmix_alpha": 1.0}, {"blended", "pasted"}),
    ],
)
def test_both_ways_to_mix_take_turns(settings, kinds):
    seen = set()
    for images, _ in mixed_batches(20, **settings):
        flat = images.amin((1, 2, 3)) == images.amax((1, 2, 3))
        whole = images == images.round()
        if flat.all() and not whole.all():
            seen.add("blended")
        if whole.all() and not flat.all():
            seen.add("pasted")
    assert seen == kinds


@pytest.mark.parametrize("strength", ["0.01", "0.2", "1", "1000"])
def test_shares_are_drawn_from_the_beta_distribution_at_every_strength_allowed(strength):
    """The share of the draws below some points, by SciPy's integral; out of float32's reach torch
    draws the mean.
    """
    alpha = MIXING(strength)
    (mixup,) = mixing_transform(small(mixup_alpha=alpha)).transforms
    torch.manual_seed(0)
    shares = np.array([mixup.make_params([])["lam"] for _ in range(4000)])
    points = np.array([1e-6, 0.001, 0.1, 0.49, 0.4999, 0.5001, 0.51, 0.9, 0.999])
    below = (shares[:, None] < points).mean(0)
    np.testing.assert_allclose(below, betainc(alpha, alpha, points), rtol=0, atol=0.03)


def test_no_mixing_unless_asked_for():
    assert mixing_transform(small()) is None


AUGMENTED = {
    "batch_size": 3,
    "auto_augment": "ra",
    "color_jitter": 0.4,
    "random_erase": 0.5,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
}


@ALL_WORKERS
def test_samples_do_not_depend_on_the_loaders(photos, workers):
    data = open_data(small(data_path=photos))
    expected = load(data, small(**AUGMENTED))
    torch.manual_seed(workers)  # must not matter
    assert_same_batches(load(data, small(workers=workers, **AUGMENTED)), expected)


@ALL_WORKERS
def test_an_epoch_can_begin_in_its_middle(photos, workers):
    data = open_data(small(data_path=photos))
    expected = load(data, small(**AUGMENTED), epoch=3)
    settings = small(workers=workers, **AUGMENTED)
    assert_same_batches(load(data, settings, epoch=3, start=1, stop=3), expected[1:3])
    assert_same_batches(load(data, settings, epoch=3, start=3), expected[3:])


def test_samples_do_not_depend_on_the_size_of_the_batch(photos):
    data = open_data(small(data_path=photos))
    for_each = {"auto_augment": "ra", "color_jitter": 0.4, "random_erase": 0.5}
    images, others = (
        torch.cat([images for images, _ in load(data, small(batch_size=size, **for_each))])
        for size in (2, 6)
    )
    assert torch.equal(images, others)


@pytest.mark.parametrize("changed", [{"epoch": 2}, {"seed": 1}])
def test_samples_differ_by_epoch_and_by_seed(photos, changed):
    """Looked up by index, so that it is not the order that differs."""
    settings = small(data_path=photos, **AUGMENTED)
    data = open_data(settings)
    given = {"epoch": 1, "seed": 0}
    images = []
    for each in (given, given, given | changed):
        transformation = training_transform(data, settings, 32)
        samples = Samples(data.train, each["seed"], lambda epoch, found=transformation: found)
        images.append(samples[[(each["epoch"], 5)]].batch[0])
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_alone(photos, workers):
    data = open_data(small(data_path=photos))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(data, small(workers=workers, **AUGMENTED))
    assert torch.equal(torch.get_rng_state(), before)


# Classes that were confused

NUMBERS = ("one", "two", "three", "four")


def confused_file(folder, *pairs, **more):
    path = folder / "confused.json"
    keys = "true", "taken_for", "images"
    found = [dict(zip(keys, pair, strict=True)) for pair in pairs]
    path.write_text(json.dumps({"pairs": found} | more))
    return path


@pytest.mark.parametrize(
    ("pairs", "confused"),
    [
        ([], []),
        ([("two", "one", 1)], [0, 1]),
        ([("two", "three", 9), ("three", "two", 4), ("one", "two", 4)], [1, 2]),
        ([("two", "three", 9), ("four", "two", 5), ("one", "two", 4)], [1, 2, 3]),
        ([("one", "two", 1), ("three", "four", 8)], [2, 3]),  # in any order
        ([("one", "two", 2), ("two", "three", 2), ("four", "three", 1)], [0, 1, 2, 3]),
        ([("four", "class 5", 3)], [3]),  # the model tells more classes apart than there are
    ],
)
def test_the_classes_that_were_confused_most(tmp_path, pairs, confused):
    settings = Settings(augment_confused=confused_file(tmp_path, *pairs), num_classes=6)
    assert confused_classes(settings, NUMBERS) == confused


def test_what_a_test_has_written_is_read(tmp_path):
    confusion = Confusion({(0, 1): 9, (2, 1): 5, (1, 2): 4, (3, 3): 50, (4, 3): 1})
    path = tmp_path / "confused.json"
    path.write_text(confused_json(confusion, (*NUMBERS, "class 4"), "a.pt"))
    settings = Settings(augment_confused=path, num_classes=5)
    assert confused_classes(settings, NUMBERS) == [0, 1, 2]


def test_without_a_file_or_to_test_nothing_is_read(tmp_path):
    assert confused_classes(Settings(), NUMBERS) is None
    gone = Settings(augment_confused=tmp_path / "gone.json", test_only=True)
    assert confused_classes(gone, NUMBERS) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "no confused.json of a --test-only"),
        (b"\xff", "no confused.json of a --test-only"),
        (b"true class,predicted class,images", "no confused.json of a --test-only"),
        (b"[]", "no confused.json of a --test-only"),
        (b"{}", "no confused.json of a --test-only"),
        (b'{"pairs": 3}', "no confused.json of a --test-only"),
        (b'{"pairs": ["one"]}', "no confused.json of a --test-only"),
        (b'{"pairs": [{"true": "one", "images": 3}]}', "no confused.json of a --test-only"),
        (
            b'{"pairs": [{"true": "one", "taken_for": "two", "images": "3"}]}',
            "no confused.json of a --test-only",
        ),
        (b"[" * 100_000, "no confused.json of a --test-only"),
        (
            b'{"pairs": [{"true": "one", "taken_for": "two", "images": 9},'
            b'{"true": "one", "taken_for": "dog", "images": 1}]}',
            "the data have no class dog",
        ),
    ],
)
def test_a_file_that_is_none_of_confused_classes(tmp_path, content, reason):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        confused_classes(Settings(augment_confused=path), NUMBERS)
    assert str(caught.value) == f"--augment-confused {path}: {reason}"


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ([], "confused  no class with a stronger RandAugment"),
        ([("temple", "flower", 3)], "confused  2 classes (flower, temple) with a stronger "),
    ],
)
def test_what_is_said_of_confused_classes(photos, tmp_path, in_tmp, capsys, pairs, line):
    path = confused_file(tmp_path, *pairs)
    cheap = [word for word in TINY if word not in ("--num-classes", "3")]
    options = ["--data-path", str(photos), "--augment-confused", str(path)]
    assert main(["plan", *cheap, *options]) == 0
    assert line in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.parametrize(
    ("settings", "stronger"),
    [
        ({}, v2.RandAugment(2, 9)),
        ({"ra_magnitude": 12}, v2.RandAugment(2, 12)),
        ({"auto_augment": "ra"}, v2.RandAugment(3, 14)),
        ({"auto_augment": "ra", "ra_magnitude": 30}, v2.RandAugment(3, 30)),
        ({"auto_augment": "ta"}, v2.RandAugment(3, 14)),
        ({"auto_augment": "aa", "ra_magnitude": 1}, v2.RandAugment(3, 6)),
    ],
)
def test_the_stronger_augmentation(settings, stronger):
    asked = small(min_scale=1.0, hflip=0.0, **settings)
    ours = draws(training_transform(plain(), asked, 32, True), noise(), 8)
    expected = transform().transforms
    expected.insert(2, stronger)
    for image, other in zip(ours, draws(v2.Compose(expected), noise(), 8), strict=True):
        assert torch.equal(image, other)


@ALL_WORKERS
def test_only_the_pictures_of_confused_classes_are_augmented_more_strongly(
    photos, monkeypatch, tmp_path, workers
):
    """Picture by picture as in one run where no class is, and one where all are."""
    settings = small(data_path=photos, batch_size=3, workers=workers)
    of_class, of_all = (
        confused_file(tmp_path, ("temple", name, 2)).rename(tmp_path / f"{name}.json")
        for name in ("temple", "flower")
    )
    usual, one, all_of_them = (
        load(open_data(asked), asked, epoch=2)
        for asked in (
            settings,
            dataclasses.replace(settings, augment_confused=of_class),
            dataclasses.replace(settings, augment_confused=of_all),
        )
    )
    seen = set()
    for without, some, stronger in zip(usual, one, all_of_them, strict=True):
        for place, target in enumerate(some[1].tolist()):
            assert torch.equal(some[0][place], (stronger if target else without)[0][place])
            seen.add((target, torch.equal(without[0][place], stronger[0][place])))
    assert {(0, False), (1, False)} <= seen, "there is a difference to be seen"


def test_confused_classes_and_a_run_that_goes_on(photos, tmp_path):
    path = confused_file(tmp_path, ("temple", "temple", 2))
    settings = small(data_path=photos, augment_confused=path, **AUGMENTED)
    data = open_data(settings)
    assert_same_batches(load(data, settings, 3, start=2), load(data, settings, 3)[2:])
    assert describe_images(data)["confused"] == ["temple"]


def keys_of(order):
    return [key for batch in order for key in batch]


def spans(count):
    return st.tuples(st.integers(0, count), st.none() | st.integers(0, count))


@given(st.data(), st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(1, 9))
def test_an_epoch_gives_each_image_once(data, count, batch_size, seed, epoch):
    indices = range(100, 100 + count)
    order = EpochOrder(indices, batch_size, seed)
    order.begin(epoch)
    batches = list(order)
    assert len(batches) == len(order) == count // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    keys = keys_of(batches)
    assert {each for each, _ in keys} <= {epoch}
    assert len({index for _, index in keys} & set(indices)) == len(keys)
    start, stop = data.draw(spans(len(batches)))
    order.begin(epoch, start, stop)
    assert list(order) == batches[start:stop]


@given(st.integers(1, 60), st.integers(1, 20))
def test_in_order_without_a_seed_to_the_last_image(count, batch_size):
    order = EpochOrder(range(count), batch_size, None)
    batches = list(order)
    assert keys_of(batches) == [(1, index) for index in range(count)]
    assert len(batches) == len(order)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_each_epoch_and_seed_has_its_own_order():
    orders = []
    for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1)):
        order = EpochOrder(range(50), 10, seed)
        order.begin(epoch)
        orders.append(tuple(index for _, index in keys_of(order)))
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


def test_incomplete_batches_train_nothing_but_validate(with_val):
    settings = small(data_path=with_val, batch_size=5)
    data = open_data(settings)
    assert [len(targets) for _, targets in load(data, settings)] == [5, 5]
    with contextlib.closing(validation_feed(data, settings, ALL_CPUS)) as feed:
        assert len(feed) == 3
        batches = list(feed.batches(BadImages()))
    assert [len(targets) for _, targets in batches] == [5, 5, 2]
    assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 6 + [1] * 6


def test_without_validation_images_there_is_no_feed_of_them(photos):
    settings = small(data_path=photos)
    assert validation_feed(open_data(settings), settings, ALL_CPUS) is None


class Labels(Dataset):
    """Nothing but labels."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)


def chosen_of(targets, **settings):
    data = ImageData("folder", Labels(targets), None, ("a", "b", "c"))
    return choose_images(data, Settings(**settings))


def test_a_subset_has_its_part_of_each_class():
    targets = [0] * 100 + [1] * 10 + [2]
    chosen = chosen_of(targets, subset=0.2)
    assert [[targets[index] for index in chosen].count(each) for each in range(3)] == [20, 2, 1]
    assert chosen == sorted(set(chosen))
    assert chosen != [*range(20), 100, 101, 110], "not simply the first ones"


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=80),
    st.floats(0.01, 1),
    st.integers(0, 3),
)
def test_subsets_of_any_labels(targets, subset, seed):
    chosen = chosen_of(targets, subset=subset, seed=seed)
    assert set(chosen) <= set(range(len(targets)))
    for each in set(targets):
        count = sum(targets[index] == each for index in chosen)
        assert count >= 1
        assert count == 1 or abs(count - subset * targets.count(each)) <= 0.5


def test_a_subset_depends_on_the_seed_and_not_on_the_random_state():
    targets = [0, 1] * 50
    chosen = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(chosen))
        chosen.append(chosen_of(targets, subset=0.3, seed=seed))
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_only_the_subset_is_trained_on(photos):
    settings = small(data_path=photos, subset=0.5, batch_size=2)
    data = open_data(settings)
    indices = choose_images(data, settings)
    expected = sorted(data.train.targets[index] for index in indices)
    seen = [target for _, targets in load(data, settings) for target in targets.tolist()]
    assert sorted(seen) == expected == [0] * 3 + [1] * 3


@pytest.mark.parametrize(
    ("low", "high", "end", "sizes"),  # a size for each epoch from the first
    [
        (None, 224, None, [224, 224, 224]),
        (128, 224, 1, [224, 224]),
        (128, 224, 2, [128, 224, 224]),
        (128, 224, 4, [128, 160, 192, 224, 224]),
        (128, 224, 6, [128, 128, 160, 160, 192, 224, 224]),
        (128, 224, 20, [128] * 7 + [160] * 6 + [192] * 6 + [224] * 3),
        (32, 64, 3, [32, 32, 64, 64]),
        (64, 64, 3, [64, 64, 64]),
    ],
)
def test_the_image_size_of_each_epoch(low, high, end, sizes):
    settings = Settings(min_res=low, image_size=high, end_ramp=end)
    found = [image_size_in(settings, epoch) for epoch in range(1, len(sizes) + 1)]
    assert found == sizes


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 300))
def test_image_sizes_grow_from_the_first_to_the_last(low, more, end):
    low, high = 32 * low, 32 * (low + more)
    settings = Settings(min_res=low, image_size=high, end_ramp=end)
    sizes = [image_size_in(settings, epoch) for epoch in range(1, end + 3)]
    assert sizes == sorted(sizes)
    assert all(size % 32 == 0 for size in sizes)
    assert (sizes[0], sizes[-3]) == (high if end == 1 else low, high)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_grow_while_training_and_not_in_validation(with_val, workers):
    settings = small(
        data_path=with_val, image_size=64, min_res=32, end_ramp=2, batch_size=6, workers=workers
    )
    data = open_data(settings)
    with contextlib.closing(training_feed(data, settings, ALL_CPUS)) as feed:
        for epoch, side in ((1, 32), (2, 64), (3, 64)):
            for images, _ in feed.batches(BadImages(), epoch):
                assert images.shape == (6, 3, side, side)
    with contextlib.closing(validation_feed(data, settings, ALL_CPUS)) as feed:
        for images, _ in feed.batches(BadImages()):
            assert images.shape == (6, 3, 64, 64)


def test_a_ramp_of_any_length_is_ready_at_once(monkeypatch):
    calls, size_in = [], image_size_in
    set_everywhere(monkeypatch, "image_size_in", lambda *args: calls.append(args) or size_in(*args))
    settings = small(min_res=32, image_size=64, end_ramp=100_000)
    data = open_data(settings)
    sides = [load(data, settings, epoch, stop=1)[0][0].shape[-1] for epoch in (1, 99_999, 100_000)]
    assert sides == [32, 32, 64]
    assert len(calls) < 100


def test_synthetic_images_grow_too():
    settings = Settings(
        batch_size=2, workers=0, num_classes=2, epochs=2, min_res=32, max_res=64, end_ramp=2
    )
    data = open_data(settings)
    settings = settings_in_force(settings, read_topology(), data)
    sides = [load(data, settings, epoch, stop=1)[0][0].shape[-1] for epoch in (1, 2)]
    assert sides == [32, 64]


def test_images_of_cifar10_cannot_shrink(cifar, in_tmp, capsys):
    ramp = ["--min-res", "64", "--end-ramp", "3", "--epochs", "3", "--steps", "1"]
    cheap = ["--model", "squeezenet1_1", "-b", "2", "-j", "0", "--split", "none"]
    assert main(["--data-path", str(cifar), *ramp, *cheap]) == 2
    assert "--min-res 64 --max-res 32" in capsys.readouterr().err


@pytest.fixture
def breakable(photos, tmp_path):
    """A copy of the photographs."""
    shutil.copytree(photos, tmp_path / "copy")
    return tmp_path / "copy"


def spoil(folder, *names):
    paths = [folder / "train" / name for name in names]
    for path in paths:
        path.write_bytes(b"no picture")
    return paths


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_broken_image_is_named(breakable, workers, damage):
    path = breakable / "train/temple/0003.jpg"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:600], "garbage": b"x" * 600, "empty": b""}[damage])
    settings = small(data_path=breakable, workers=workers)
    with pytest.raises(RunError, match=f"^broken image {path}: ") as caught:
        load(open_data(settings), settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_left_out_and_counted_once(breakable, workers):
    paths = spoil(breakable, "temple/0003.jpg", "flower/0000.jpg")
    settings = small(data_path=breakable, workers=workers, batch_size=6)
    bad = BadImages(2)
    with contextlib.closing(training_feed(open_data(settings), settings, ALL_CPUS)) as feed:
        for epoch in (1, 2, 3):
            assert sum(len(images) for images, _ in feed.batches(bad, epoch)) == 10
    assert len(bad.messages) == 2
    assert all(any(str(path) in message for message in bad.messages) for path in paths)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "")],
)
def test_a_picture_that_nobody_has_room_for_is_not_broken(photos, monkeypatch, error):
    path = next(photos.glob("train/*/*.jpg"))

    def fail(path):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)) as caught:
        load_image(str(path))
    assert caught.value is error


def test_broken_images_are_left_out_before_mixing(breakable):
    spoil(breakable, "temple/0003.jpg", "flower/0000.jpg")
    settings = small(data_path=breakable, max_bad_images=2, mixup_alpha=0.2, batch_size=6)
    batches = load(open_data(settings), settings)
    assert sum(len(images) for images, _ in batches) == 10
    for images, targets in batches:
        assert targets.shape == (len(images), 2)


def test_the_first_broken_image_too_many_stops_the_run(breakable):
    spoil(breakable, "temple/0003.jpg", "flower/0000.jpg")
    settings = small(data_path=breakable, max_bad_images=1)
    with pytest.raises(RunError, match=r"broken image .* \(more than --max-bad-images 1\)$"):
        load(open_data(settings), settings)


@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.2}])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_any_image_stops_the_run(breakable, workers, mixing):
    paths = spoil(
        breakable, *(f"{name}/{n:04}.jpg" for name in ("temple", "flower") for n in range(6))
    )
    settings = small(data_path=breakable, max_bad_images=99, workers=workers, **mixing)
    with pytest.raises(RunError, match="no image of a batch can be read; broken image ") as caught:
        load(open_data(settings), settings)
    assert any(str(path) in str(caught.value) for path in paths)


def test_batches_go_on_over_epochs():
    batches = Batches(as_loaded([1, 2, 3]), 7)
    assert next(batches) == 1
    assert batches.left == 6
    assert list(batches) == [2, 3, 1, 2, 3, 1]
    assert batches.left == 0


def test_prefetching_fetches_one_batch_and_no_more():
    fetched = []

    def loader():
        for number in range(5):
            fetched.append(number)
            yield as_loaded([number])[0]

    batches = Batches(loader(), 3)
    assert fetched == [0], "at once, to start the loader"
    batches.prefetch()
    assert fetched == [0]
    assert next(batches) == 0
    batches.prefetch()
    batches.prefetch()
    assert fetched == [0, 1]
    assert list(batches) == [1, 2]
    batches.prefetch()
    assert fetched == [0, 1, 2], "never more than asked for"


class Whereabouts(Dataset):
    """Samples that tell by which process, on which CPUs and with which signals ignored they were
    loaded.
    """

    def __len__(self):
        return 8

    def __getitem__(self, index):
        signums = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        ignored = all(signal.getsignal(signum) == signal.SIG_IGN for signum in signums)
        cpus = sorted(process_cpus())
        return torch.tensor([os.getpid(), len(cpus), cpus[0], ignored]), 0


def unchanged(epoch):
    return v2.Identity()


@contextlib.contextmanager
def whereabouts(workers, cpus=ALL_CPUS):
    """A feed of single samples of them."""
    settings = small(workers=workers, batch_size=1)
    order = EpochOrder(range(8), 1, None)
    with contextlib.closing(
        Feed(Samples(Whereabouts(), 0, unchanged), order, settings, cpus)
    ) as feed:
        yield feed


def rows(feed, epoch=1):
    return [images[0].tolist() for images, _ in feed.batches(BadImages(), epoch)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs thread affinity")
def test_loader_processes_stay_on_their_cores_and_ignore_signals():
    last = max(ALLOWED_CPUS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with whereabouts(1, (last,)) as feed:
            for process, *rest in rows(feed):
                assert process != os.getpid()
                assert rest == [1, last, True]


def test_without_loader_processes_the_main_thread_loads():
    with whereabouts(0) as feed:
        assert {process for process, *_ in rows(feed)} == {os.getpid()}


def loaders():
    return {process.pid for process in psutil.Process().children()}


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_begin_at_once_live_on_and_end(workers):
    before = loaders()
    with whereabouts(workers) as feed:
        begun = loaders() - before
        assert len(begun) == workers
        for epoch in (1, 2, 3):
            assert {process for process, *_ in rows(feed, epoch)} == begun
        assert loaders() - before == begun
    assert loaders() == before


def test_a_feed_that_gave_nothing_ends_too():
    before = loaders()
    with whereabouts(2):
        pass
    assert loaders() == before


def test_a_loader_that_was_killed_is_told_where_a_batch_is_asked_for():
    """DataLoader would have it raise anywhere in the main thread, in the middle of a save, say."""
    before, handler = loaders(), signal.getsignal(signal.SIGCHLD)
    with whereabouts(2) as feed:
        assert signal.getsignal(signal.SIGCHLD) == handler
        killed, stopped = loaders() - before
        batches = feed.batches(BadImages())
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(LoaderDied, match=f"process {killed} was ended by SIGKILL"):
            list(batches)
        os.kill(stopped, signal.SIGSTOP)
    assert loaders() == before, "the one that cannot end by itself too"


def test_a_feed_is_closed_without_another_thread(monkeypatch):
    """For which there may be no memory."""
    before = loaders()
    with whereabouts(2):
        error = RuntimeError("can't start new thread")
        monkeypatch.setattr(threading.Thread, "start", functools.partial(raise_, error))
    assert loaders() == before


def raise_(error):
    raise error


def test_a_feed_may_be_closed_twice():
    with whereabouts(1) as feed:
        feed.close()


def augmented_feed(data, workers):
    feed = training_feed(data, small(workers=workers, **AUGMENTED), ALL_CPUS)
    return contextlib.closing(feed)


@ALL_WORKERS
def test_one_feed_serves_many_epochs(photos, workers):
    data = open_data(small(data_path=photos))
    with augmented_feed(data, workers) as feed:
        for epoch in (1, 2, 3):
            expected = load(data, small(**AUGMENTED), epoch)
            assert_same_batches(list(feed.batches(BadImages(), epoch)), expected)


@ALL_WORKERS
def test_an_epoch_left_early_leaves_nothing_behind(photos, workers):
    data = open_data(small(data_path=photos))
    with augmented_feed(data, workers) as feed:
        next(feed.batches(BadImages(), 1))
        batches = list(feed.batches(BadImages(), 2))
    assert_same_batches(batches, load(data, small(**AUGMENTED), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_when_and_where_batches_were_loaded(workers):
    settings = small(num_classes=5, workers=workers)
    data = open_data(settings)
    begin_s = time.perf_counter()
    with contextlib.closing(training_feed(data, settings, ALL_CPUS)) as feed:
        batches = feed.batches(BadImages(), stop=4)
        list(batches)
        records = batches.take_records()
        assert batches.take_records() == ()
    assert [record.loader for record in records] == ([0, 1, 0, 1] if workers else [-1] * 4)
    for record in records:
        assert begin_s < record.start_s < record.end_s < time.perf_counter()


needs_memory_files = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")


@needs_memory_files
@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.2}])
def test_loaders_hand_batches_over_without_dev_shm(mixing):
    """By the kernel's list of what is mapped where."""
    settings = small(workers=1, num_classes=5, **mixing)
    data = open_data(settings)
    with contextlib.closing(training_feed(data, settings, ALL_CPUS)) as feed:
        batch = next(feed.batches(BadImages(), stop=1))
        maps = Path("/proc/self/maps").read_text()
    for tensor in batch:
        (line,) = (each for each in maps.splitlines() if each.startswith(f"{tensor.data_ptr():x}-"))
        assert "/memfd:" in line
        assert "/dev/shm" not in line
    assert_same_batches([batch], load(data, small(num_classes=5, **mixing), stop=1))


@pytest.mark.parametrize("tensor", [torch.arange(5), torch.rand(3, 2).t(), torch.rand(2, 3, 4)])
def test_a_shared_tensor_is_a_copy(tensor):
    copy = shared(tensor)
    assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(copy, tensor)
    copy.zero_()
    assert tensor.any()


class NoMemoryFiles:
    """A C library of a system without them."""


@pytest.mark.parametrize(
    "library", [NoMemoryFiles(), type("", (), {"memfd_create": lambda *_: -1})()]
)
def test_without_memory_files_torch_shares_as_it_does(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    tensor = torch.arange(5)
    assert shared(tensor) is tensor
    settings = small(workers=1, num_classes=5)
    assert load(open_data(settings), settings, stop=1)[0][0].shape == (4, 3, 32, 32)


SHARES_NOTHING = 77


def load_in_small_shm():
    """Three batches of 48 KiB by two loaders where /dev/shm has 64 KiB, in a process with mounts of
    its own; ends with SHARES_NOTHING if there may be none.
    """
    clone_newns = 0x20000  # of sched.h
    if ctypes.CDLL(None).unshare(clone_newns):
        os._exit(SHARES_NOTHING)
    for options in ("--make-rprivate /", "-t tmpfs -o size=64k tmpfs /dev/shm"):
        if subprocess.run(["mount", *options.split()], stderr=subprocess.DEVNULL).returncode:
            os._exit(SHARES_NOTHING)
    settings = small(num_classes=3, workers=2)
    for images, _ in load(open_data(settings), settings, stop=3):
        assert images.shape == (4, 3, 32, 32)


@needs_memory_files
def test_loading_with_64_kilobytes_of_dev_shm():
    process = multiprocessing.get_context("fork").Process(target=load_in_small_shm)
    process.start()
    process.join(60)
    if process.exitcode == SHARES_NOTHING:
        pytest.skip("needs mount namespaces")
    assert process.exitcode == 0


def test_too_few_open_files_are_refused_before_any_loader_starts(monkeypatch):
    before, limits = loaders(), resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (20, 20))
    settings = small(num_classes=3, workers=2)
    error = (
        r"^--workers 2 can need \d+ open files, and 20 are allowed: raise ulimit -n, or .* -j 0$"
    )
    with pytest.raises(UserError, match=error):
        training_feed(open_data(settings), settings, ALL_CPUS)
    assert loaders() == before
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    with contextlib.closing(training_feed(open_data(settings), small(num_classes=3), ALL_CPUS)):
        pass


def test_the_limit_of_open_files_is_raised_as_far_as_it_may(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = psutil.Process().num_fds() + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        check_open_files(2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > lowest + 16
        settings = small(num_classes=3, workers=2)
        with contextlib.closing(training_feed(open_data(settings), settings, ALL_CPUS)) as feed:
            assert sum(len(images) for images, _ in feed.batches(BadImages(), stop=20)) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_loaders_need_no_more_open_files_than_are_asked_for(monkeypatch, workers):
    """While batches are fetched, in the main process and in the loaders, and ten more, which torch
    opens to see whether it can.
    """
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits[0]))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 0))
    me, most = psutil.Process(), 0
    settings = small(num_classes=3, workers=workers, batch_size=2)
    before = loaders()
    with contextlib.closing(training_feed(open_data(settings), settings, ALL_CPUS)) as feed:
        ours = [me, *(psutil.Process(pid) for pid in loaders() - before)]
        for _ in feed.batches(BadImages(), stop=30):
            most = max(most, *(process.num_fds() for process in ours))
    assert most + 10 <= asked[0]


def test_loaders_that_cannot_start_leave_none_behind(monkeypatch):
    """The third has no process left to be."""
    before, unraisable = loaders(), []
    forks = iter([os.fork, os.fork])

    def fork():
        for real in forks:
            return real()
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    error = "^loader processes cannot start: .*Resource temporarily unavailable; try a lower -j$"
    settings = small(num_classes=3, workers=3)
    with pytest.raises(RunError, match=error):
        training_feed(open_data(settings), settings, ALL_CPUS)
    for process in multiprocessing.active_children():
        process.join(10)
    assert loaders() == before
    gc.collect()
    assert not unraisable, "torch's half-made iterator stays"


# Classes that trained weights know

IMAGENET = imagenet_classes()


def test_the_wordnet_ids_of_imagenet():
    ids = wordnet_ids()
    assert len(ids) == 1000
    assert list(ids) == sorted(set(ids))
    for number, name in {
        0: "n01440764",  # tench
        1: "n01443537",  # goldfish
        134: "n02012849",  # the bird crane
        207: "n02099601",  # golden retriever
        281: "n02123045",  # tabby cat
        517: "n03126707",  # the machine crane
        620: "n03642806",  # laptop
        981: "n09835506",  # ballplayer
        999: "n15075141",  # toilet tissue
    }.items():
        assert ids[number] == name
    for wordnet_id, names in torchvision.datasets.Imagenette._WNID_TO_CLASS.items():
        assert IMAGENET[ids.index(wordnet_id)] == names[0]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("n01440764", 0),
        ("tench", 0),
        ("Tench", 0),
        ("golden retriever", 207),
        ("golden_retriever", 207),
        ("Golden-Retriever", 207),
        ("jack-o'-lantern", 607),
        ("JACK_O'_LANTERN", 607),
        ("n15075141", 999),
        ("N15075141", 999),
        ("Cardigan", 264),  # the dog
        ("cardigan", 474),  # the garment
    ],
)
def test_a_class_of_imagenet_by_name(name, number):
    assert match_classes([name], IMAGENET, "the weights") == [number]


def test_classes_are_found_by_name_whatever_their_place():
    assert match_classes(["b", "C", "a"], ["a", "b", "c"], "w") == [1, 2, 0]
    assert match_classes(IMAGENET, IMAGENET, "w") == [*range(1000)]
    assert match_classes(wordnet_ids(), IMAGENET, "w") == [*range(1000)]


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("0", IMAGENET, "class 0 is none of the 1000 of the weights"),
        ("goldfisch", IMAGENET, "class goldfisch is none of .*; did you mean goldfish,"),
        ("n01440764", ["a", "b"], "class n01440764 is none of the 2 of the weights"),
        ("CARDIGAN", IMAGENET, "can be several of the weights: n02113186, n02963159; use such"),
        ("a", ["a", "b", "a"], "class a can be several of the weights: class 0, class 2"),
    ],
)
def test_a_class_that_weights_do_not_know(name, known, message):
    with pytest.raises(UserError, match=message):
        match_classes([name], known, "the weights")


def settings_to_test(**settings):
    """Settings to test weights with."""
    return small(model="resnet18", weights="DEFAULT", test_only=True, num_classes=None, **settings)


def test_data_to_test_weights_with_have_all_classes_that_these_know(imagenet_photos):
    settings = settings_to_test(data_path=imagenet_photos)
    data = open_data(settings)
    assert data.classes == ("n15075141", "tench")
    known = with_known_classes(data, settings)
    assert known.classes == IMAGENET
    for part in (known.train, known.val):
        assert part.targets == [{0: 999, 1: 0}[target] for target in data.val.targets]
        assert part[0][1] == 999
        assert part[11][1] == 0
        assert part[0][0].tobytes() == data.train[0][0].tobytes()
    assert len(pickle.loads(pickle.dumps(known.val))) == 12
    with pytest.raises(UserError, match="^--num-classes 3: --weights DEFAULT know 1000 class"):
        with_known_classes(data, dataclasses.replace(settings, num_classes=3))


def test_data_with_a_class_that_the_weights_to_test_do_not_know(photos_with_val):
    settings = settings_to_test(data_path=photos_with_val)
    message = f"^--data-path {photos_with_val}: class flower is none of the 1000 of --weights DEFA"
    with pytest.raises(UserError, match=message):
        with_known_classes(open_data(settings), settings)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("resnet50", "IMAGENET1K_V2"),
        ("efficientnet_b0", "DEFAULT"),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),
        ("vgg16", "IMAGENET1K_FEATURES"),
    ],
)
def test_pictures_are_made_ready_as_the_weights_say(photos, model, weights):
    data = open_data(small(model=model, weights=weights, data_path=photos, image_size=None))
    picture, _ = data.train[0]
    theirs = torchvision.models.get_model_weights(model)[weights].transforms()(picture)
    ours = validation_transform(data.native)(picture).as_subclass(torch.Tensor)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # a deviation may be 1 / 255


def test_weights_are_asked_before_the_data_how_pictures_are_made_ready(cifar):
    """And options before both."""
    weights = {"model": "resnet18", "weights": "DEFAULT", "image_size": None, "num_classes": 10}
    data = open_data(small(data_path=cifar, **weights))
    assert data.native == Preprocessing(224, 256)
    chosen = small(data_path=cifar, **weights | {"image_size": 112, "std": (0.5, 0.5, 0.5)})
    expected = Preprocessing(112, 128, std=(0.5, 0.5, 0.5))
    assert open_data(chosen).native.overruled(chosen) == expected


# Images kept apart to validate with


def labelled(targets, **settings):
    """Data of these classes, with and without the images kept apart."""
    data = ImageData("folder", Labels(targets), None, tuple("abcdefgh"))
    settings = Settings(data_path=Path("data"), **settings)
    with_val = with_validation(data, settings)
    return dataclasses.replace(with_val, chosen=choose_images(with_val, settings))


SOME_LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=80).filter(
    lambda labels: max(Counter(labels).values()) > 1
)


@given(SOME_LABELS, st.floats(0.001, 0.999), st.integers(0, 3))
def test_images_kept_apart_of_any_labels(targets, share, seed):
    data = labelled(targets, val_share=share, seed=seed)
    kept, chosen = list(data.val.indices), data.chosen
    assert sorted([*kept, *chosen]) == list(range(len(targets)))
    for label, count in Counter(targets).items():
        apart = sum(targets[index] == label for index in kept)
        if count == 1:
            assert apart == 0
        else:
            assert 1 <= apart <= count - 1
            assert apart in (1, count - 1) or abs(apart - share * count) <= 0.5
    assert list(labelled(targets, val_share=share, seed=seed).val.indices) == kept


@given(SOME_LABELS, st.floats(0.01, 0.99), st.floats(0.01, 1), st.integers(0, 3))
def test_a_subset_is_one_of_what_is_left(targets, share, subset, seed):
    whole = labelled(targets, val_share=share, seed=seed)
    data = labelled(targets, val_share=share, subset=subset, seed=seed)
    assert data.val.indices == whole.val.indices, "the same validate"
    assert set(data.chosen) <= set(whole.chosen)
    left = Counter(targets[index] for index in whole.chosen)
    for label, count in left.items():
        found = sum(targets[index] == label for index in data.chosen)
        assert found == max(1, round(subset * count))


def test_which_images_are_kept_apart_depends_on_the_seed_alone():
    targets = [0, 1] * 50
    kept = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(kept))
        kept.append(labelled(targets, val_share=0.2, seed=seed).val.indices)
    assert kept[0] == kept[1] != kept[2]
    assert Counter(targets[index] for index in kept[0]) == {0: 10, 1: 10}
    assert kept[0] != list(range(20)), "not simply the first ones"


def folder_with(root, **counts):
    """A folder with so many small pictures of each class."""
    return folder_of(root, *(f"{name}/{n}.png" for name in counts for n in range(counts[name])))


def test_images_of_a_folder_kept_apart_validate_and_do_not_train(tmp_path):
    root = folder_with(tmp_path, a=10, b=5)
    settings = small(data_path=root, val_share=0.2, batch_size=2, image_size=8)
    data = open_data(settings)
    names = describe_data(data)
    assert names == [
        "data      12 images of 2 classes (a, b) to train on, 3 (0.2 of each class) kept apart to "
        "validate with"
    ]
    with contextlib.closing(validation_feed(data, settings, ALL_CPUS)) as feed:
        shown = [image for images, _ in feed.batches(BadImages()) for image in images]
    transform = validation_transform(data.native.overruled(settings))
    for image, index in zip(shown, data.val.indices, strict=True):
        assert torch.equal(image, transform(data.train[index][0]))
    trained = [targets for _, targets in load(data, settings)]
    assert Counter(torch.cat(trained).tolist()) == {0: 8, 1: 4}
    half = open_data(dataclasses.replace(settings, subset=0.5))
    assert describe_data(half)[0].startswith("data      6 of 12 images of 2 classes (a, b) to ")


def test_a_class_with_one_image_is_trained_on(tmp_path):
    root = folder_with(tmp_path, a=4, b=1, c=1)
    data = open_data(small(data_path=root, val_share=0.3, num_classes=3))
    assert describe_data(data) == [
        "data      5 images of 3 classes (a, b, c) to train on, 1 (0.17 of each class) kept apart "
        "to validate with",
        "note      the only image of 2 classes (b, c) is trained on",
    ]


def test_too_few_images_to_keep_any_apart(tmp_path):
    root = folder_with(tmp_path, a=1, b=1)
    with pytest.raises(UserError, match=f"--val-share 0.2: no class of {root} has two images"):
        open_data(small(data_path=root, val_share=0.2, batch_size=1))


@pytest.fixture
def run(tmp_path, in_tmp, capsys, monkeypatch):
    """Runs with images kept apart; returns the exit code and what was printed."""
    for name in ("draw_timelines", "draw_curves", "draw_gradients"):  # longer than such a run
        set_everywhere(monkeypatch, name, lambda *args: None)
    root = folder_with(tmp_path / "data", a=5, b=5)
    fixed = [*TINY, "--data-path", str(root), "--num-classes", "2", "--split", "none", "-b", "4"]

    def start(*options):
        code = main([*fixed, "--val-share", "0.2", *options])
        return code, capsys.readouterr()

    return start


def test_a_resumed_run_keeps_the_same_images_apart(run, in_tmp):
    code, printed = run("--epochs", "1", "--output-dir", "out")
    assert code == 0
    assert "8 images of 2 classes (a, b) to train on, 2 (0.2 of each" in printed.out
    code, printed = run("--epochs", "2", "--output-dir", "out", "--resume", "auto")
    assert code == 0
    assert "numbers can differ from those of an unbroken run: images" not in printed.out
    more = ["--epochs", "3", "--output-dir", "out", "--resume", "auto"]
    code, printed = run(*more, "--seed", "2")
    assert "images to train on (names or sizes) 8 -> 8" in printed.out
    code, printed = run(*more, "--val-share", "0.4")
    assert (code, "--val-share 0.4: " in printed.err) == (2, True)


def test_images_that_a_checkpoint_may_know_are_told(run, in_tmp):
    assert run("--epochs", "1", "--output-dir", "out")[0] == 0
    test = ["--test-only", "--resume", "out/last.pt"]
    code, printed = run(*test)
    assert (code, printed.err) == (0, "")
    code, printed = run(*test, "--seed", "2")
    assert code == 0
    assert "out/last.pt was trained on other images than --seed, --val-share and" in printed.err


def test_no_share_where_there_are_images_to_validate_with(photos_with_val):
    error = f"--val-share 0.2: {photos_with_val} has 12 images to validate with; leave it out$"
    with pytest.raises(UserError, match=error):
        open_data(small(data_path=photos_with_val, val_share=0.2))
    assert len(open_data(small(data_path=photos_with_val, val_share=0.0)).val) == 12


def test_no_share_without_images_of_ones_own():
    message = "^--val-share 0.2 needs --data-path: synthetic images are made$"
    with pytest.raises(UserError, match=message):
        parse_arguments(["--val-share", "0.2"])
    with pytest.raises(UserError, match="--val-share: '1' is not a number of 0 or more and b"):
        parse_arguments(["--val-share", "1", "--data-path", "data"])


@pytest.mark.parametrize(("share", "kept"), [(None, 0), (0, 0), (0.4, 4), (0.001, 2), (0.999, 8)])
def test_how_many_are_kept_apart(share, kept):
    data = labelled([0] * 5 + [1] * 5, val_share=share)
    assert (len(data.val) if data.val else 0) == kept


def test_the_fingerprint_covers_what_is_kept_apart():
    prints = {}
    for share, seed in ((None, 0), (None, 1), (0.2, 0), (0.2, 0), (0.2, 2), (0.4, 0)):
        data = labelled([0, 1] * 10, val_share=share, seed=seed)
        prints[share, seed] = describe_images(data)["fingerprint"]
    assert prints[None, 0] == prints[None, 1] == hashlib.sha256().hexdigest()
    assert len(set(prints.values())) == 4
