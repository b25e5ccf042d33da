"""Data sets by name. Run: python -m pytest tests/data/test_named_data.py"""

import contextlib
import dataclasses
import functools
import http.server
import re
import shutil
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from loading import load, small
from named_data import WORDNET, WRITERS, accept, make
from PIL import Image
from serving import QuietHandler, cut_in_half, flip_a_bit

from split_affinity import ALLOWED_CPUS
from split_affinity.data.dataset import describe_data, describe_images, open_data
from split_affinity.data.decoding import decoded
from split_affinity.data.loader import BadImages, validation_loader
from split_affinity.data.named import CIFAR10, class_names
from split_affinity.data.pictures import BrokenImage, ImageData
from split_affinity.data.transforms import training_transform
from split_affinity.errors import UserError
from split_affinity.machine.topology import read_topology
from split_affinity.models.pretrained import Preprocessing
from split_affinity.options.commands import parse_arguments
from split_affinity.options.data_sets import DATA_SETS, NAMED_DATA
from split_affinity.options.settings import Settings
from split_affinity.runs.setup import settings_in_force
from train_split_affinity import main

ALL_CPUS = tuple(sorted(ALLOWED_CPUS))
ALL_SETS = pytest.mark.parametrize("name", list(WRITERS))

# Class index and colour of each picture: every class twice or more, in no order.
TRAIN = [(label, (20 * n, 250 - 15 * n, 60)) for n, label in enumerate([2, 0, 1, 1, 0, 2, 0, 2])]
VAL = [(label, (10, 20 * n, 200)) for n, label in enumerate([1, 0, 2, 0])]
# The first pixels of a side that the set's own pictures have, where these are all alike.
SIDES = {"cifar10": 32, "cifar100": 32, "fashion-mnist": 28, "svhn": 32, "stl10": 96}
# Image size and resized side unless options say otherwise.
NATIVE = dict.fromkeys(WRITERS, (224, 256)) | {
    "imagenette-160": (128, 146),
    "cifar10": (32, 32),
    "cifar100": (32, 32),
    "fashion-mnist": (28, 28),
    "eurosat": (64, 64),
    "gtsrb": (32, 32),
    "svhn": (32, 32),
    "stl10": (96, 96),
}


def made(monkeypatch, name, root):
    """A small set, its class names, and the settings that find it."""
    classes = make(monkeypatch, name, root, TRAIN, [] if name == "eurosat" else VAL)
    return classes, Settings(dataset=name, data_path=root, batch_size=2, workers=0)


def in_order_of(data, part):
    """The pictures of a part in torchvision's order: that of the files where it lists folders."""
    by_folder = ("imagenet", "imagenette", "eurosat", "food101")
    sorts = data.kind.startswith(by_folder) or (data.kind == "gtsrb" and part is TRAIN)
    return sorted(part, key=lambda each: each[0]) if sorts else part


def assert_pictures(pictures, expected, grey=False):
    assert len(pictures) == len(expected)
    for (picture, target), (label, colour) in zip(pictures, expected, strict=True):
        picture = decoded(picture)
        assert picture.mode == "RGB"
        found = np.asarray(picture).reshape(-1, 3)
        wanted = (colour[0],) * 3 if grey else colour
        assert np.abs(found - np.array(wanted)).max() <= 3, "a JPEG's shade"
        assert (type(target), target) == (int, label)


@ALL_SETS
def test_a_set_by_name_in_its_own_format(tmp_path, monkeypatch, name):
    classes, settings = made(monkeypatch, name, tmp_path / "data")
    data = open_data(settings)
    assert (data.kind, data.classes) == (name, tuple(classes))
    assert (data.native.image_size, data.native.val_resize) == NATIVE[name]
    grey = name == "fashion-mnist"
    assert_pictures(list(data.train), in_order_of(data, TRAIN), grey)
    assert data.train.targets == [label for label, _ in in_order_of(data, TRAIN)]
    if name == "eurosat":
        assert len(data.chosen) + len(data.val) == len(TRAIN)
    else:
        assert_pictures(list(data.val), in_order_of(data, VAL), grey)
        assert list(data.chosen) == list(range(len(TRAIN)))
    if name in SIDES:
        assert {picture.size for picture, _ in data.train} == {(SIDES[name],) * 2}
        assert not data.train.samples
    else:
        assert all(Path(path).is_file() for path, _ in data.train.samples)


@ALL_SETS
def test_batches_of_a_set_by_name(tmp_path, monkeypatch, name):
    _, settings = made(monkeypatch, name, tmp_path / "data")
    data = open_data(settings)
    settings = settings_in_force(settings, read_topology(), data)
    assert settings.num_classes == NAMED_DATA[name].classes or len(data.classes) == 3
    side = NATIVE[name][0]
    images, targets = load(data, settings, stop=1)[0]
    assert (images.shape, images.dtype) == ((2, 3, side, side), torch.float32)
    assert set(targets.tolist()) <= {0, 1, 2}
    with contextlib.closing(validation_loader(data, settings, ALL_CPUS)) as loader:
        batches = list(loader.batches(BadImages()))
    assert sum(len(targets) for _, targets in batches) == len(data.val)
    picture, _ = data.val[0]
    colour = torch.tensor(np.asarray(decoded(picture))[0, 0] / 255, dtype=torch.float32)
    expected = (colour - torch.tensor(settings.mean)) / torch.tensor(settings.std)
    found = batches[0][0][0].mean(dim=(1, 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@ALL_SETS
def test_what_is_said_of_a_set_by_name(tmp_path, monkeypatch, name):
    classes, settings = made(monkeypatch, name, tmp_path)
    (line,) = describe_data(open_data(settings))
    train, val = (5, "3 (0.38 of each class) kept apart") if name == "eurosat" else (8, "4")
    assert line.startswith(f"data      {train} images of {len(classes)} classes ({classes[0]}, ")
    assert line.endswith(f") to train on, {val} to validate with")


@pytest.mark.parametrize("name", ["eurosat", "flowers102"])
def test_a_plan_shows_a_set_by_name(tmp_path, in_tmp, monkeypatch, capsys, name):
    classes, settings = made(monkeypatch, name, tmp_path / "data")
    options = ["--dataset", name, "--data-path", str(tmp_path / "data"), "-b", "2"]
    assert main(["plan", "--model", "resnet56", *options]) == 0
    printed = capsys.readouterr().out
    assert f"\n{describe_data(open_data(settings))[0]}\n" in printed
    assert f" for {len(classes)} classes, " in printed
    assert f"an image of {NATIVE[name][0]} px takes" in printed
    assert not list(in_tmp.iterdir())


def test_which_sets_there_are():
    """The words say what torchvision is asked for."""
    assert list(NAMED_DATA) == ["digits", *WRITERS]
    for name, told in NAMED_DATA.items():
        train, val = told.parts
        assert (val is not None) == (told.val > 0)
        assert name == "digits" or issubclass(
            getattr(torchvision.datasets, told.reader), torch.utils.data.Dataset
        )
        ready = Preprocessing(**told.preprocessing)
        assert told.padded == (ready.image_size if name in {*SIDES, "eurosat"} else 0)
        block = re.search(rf"^{name}\n(  .*\n)*", DATA_SETS + "\n", re.MULTILINE)[0]
        words = " ".join(block.split())
        assert words.startswith(f"{name} what {told.what} layout {told.layout}")
        assert f"images {told.train} to train, " in words
        assert f" classes {told.classes}" in words
        assert ("--download fetches it" in words) == (name not in ("digits", "imagenet"))
        if told.val:
            (key,) = train.keys() - {"size"}
            assert {**train, key: val[key]} == val
            part = re.search(rf", {told.val} to validate, its (test|val) part ", words)[1]
            assert val[key] == (False if key == "train" else part)


@ALL_SETS
def test_where_a_set_lies_is_told(tmp_path, monkeypatch, name):
    _, settings = made(monkeypatch, name, tmp_path)
    open_data(settings)
    for layout in re.findall(r"PATH/(\S+\w)", NAMED_DATA[name].layout):
        assert (tmp_path / layout).exists()


def test_known_numbers_of_images():
    """Literally, as their authors give them."""
    counts = {name: (told.train, told.val, told.classes) for name, told in NAMED_DATA.items()}
    assert counts == {
        "digits": (1437, 360, 10),
        "imagenet": (1281167, 50000, 1000),
        "imagenette": (9469, 3925, 10),
        "imagenette-320": (9469, 3925, 10),
        "imagenette-160": (9469, 3925, 10),
        "cifar10": (50000, 10000, 10),
        "cifar100": (50000, 10000, 100),
        "fashion-mnist": (60000, 10000, 10),
        "flowers102": (1020, 1020, 102),
        "food101": (75750, 25250, 101),
        "oxford-pets": (3680, 3669, 37),
        "eurosat": (27000, 0, 10),
        "dtd": (1880, 1880, 47),
        "gtsrb": (26640, 12630, 43),
        "svhn": (73257, 26032, 10),
        "stl10": (5000, 8000, 10),
    }


def test_the_names_of_imagenets_classes_are_those_of_its_weights():
    """Of the thousand; both cranes are `crane` in its own list, and both maillots `maillot`."""

    class Source:
        classes = [(f"class {number % 500}",) for number in range(1000)]

    names = class_names(Source, 1000)
    assert len(set(names)) == 1000
    assert (names[0], names[134], names[517]) == ("tench", "crane bird", "crane")
    assert names == tuple(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])


# How their pictures are read


@pytest.mark.parametrize("name", ["oxford-pets", "gtsrb", "food101", "imagenette"])
def test_pictures_are_opened_as_those_of_folders_are(tmp_path, monkeypatch, name):
    """Grey of 16 bits is scaled and EXIF data turn a picture, whatever torchvision would do."""
    _, settings = made(monkeypatch, name, tmp_path)
    data = open_data(settings)
    grey, turned, broken = (Path(data.train.samples[index][0]) for index in range(3))
    Image.fromarray(np.full((8, 8), 25700, np.uint16)).save(grey, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(turned, "JPEG", exif=exif)
    broken.write_bytes(b"no picture")
    assert np.array_equal(np.asarray(data.train[0][0]), np.full((8, 8, 3), 100))
    assert data.train[1][0].size == (20, 30)
    with pytest.raises(BrokenImage, match=f"^broken image {broken}: "):
        data.train[2]


def transforms_of(name, **settings):
    known = NAMED_DATA[name]
    native = Preprocessing(**known.preprocessing)
    data = ImageData(name, None, None, ("a", "b"), native, padded=known.padded)
    return training_transform(data, Settings(**settings), 64).transforms


@pytest.mark.parametrize(
    ("name", "side", "padding"),
    [("cifar100", 32, 4), ("fashion-mnist", 28, 4), ("eurosat", 64, 8), ("stl10", 96, 12)],
)
def test_small_pictures_are_padded_by_an_eighth(name, side, padding):
    crop, resize, *_ = transforms_of(name)
    assert type(crop).__name__ == "RandomCrop"
    assert (list(crop.size), crop.padding) == ([side, side], [padding] * 4)
    assert list(resize.size) == [64]


@pytest.mark.parametrize("name", ["imagenet", "gtsrb", "imagenette-160"])
def test_training_shows_parts_of_pictures_of_many_sizes(name):
    crop = transforms_of(name, min_scale=0.6)[0]
    assert type(crop).__name__ == "RandomResizedCrop"
    assert crop.scale == (0.6, 1)


@pytest.mark.parametrize(
    ("name", "policy"), [("cifar100", "cifar10"), ("svhn", "svhn"), ("food101", "imagenet")]
)
def test_autoaugment_by_data_set(name, policy):
    steps = transforms_of(name, auto_augment="aa")
    assert [step.policy.value for step in steps if hasattr(step, "policy")] == [policy]


@pytest.mark.parametrize(
    ("options", "hflip", "min_scale"),
    [
        ("--dataset svhn", 0.0, 0.08),
        ("--dataset gtsrb", 0.0, 0.6),
        ("--dataset gtsrb --hflip 0.5 --min-scale 0.08", 0.5, 0.08),
        ("--dataset svhn --recipe cifar10", 0.0, 0.08),
        ("--dataset cifar10", 0.5, 0.08),
        ("", 0.5, 0.08),
    ],
)
def test_digits_and_signs_are_not_mirrored_unless_asked_for(options, hflip, min_scale):
    _, settings = parse_arguments(["--data-path", "data", *options.split()])
    assert (settings.hflip, settings.min_scale) == (hflip, min_scale)


# What is not there, or not whole


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "imagenet"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_set_that_is_not_there_is_told_in_a_line(tmp_path, in_tmp, capsys, name, exists):
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    assert main(["--dataset", name, "--data-path", str(root), "--steps", "1"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    title = NAMED_DATA[name].what.partition(":")[0]
    assert f"error: --data-path {root}: no {title}: Dataset not found" in error
    assert error.rstrip(".").endswith("You can use --download to download it")
    assert not list(in_tmp.iterdir()) and root.exists() == exists


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar100", "cifar-100-python/train"),
        ("flowers102", "flowers-102/setid.mat"),
        ("svhn", "test_32x32.mat"),
        ("stl10", "stl10_binary/test_X.bin"),
    ],
)
@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, Path.unlink])
def test_a_damaged_file_is_not_taken(tmp_path, monkeypatch, name, file, damage):
    _, settings = made(monkeypatch, name, tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError, match="no .*: Dataset not found or corrupted"):
        open_data(settings)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fashion-mnist", "FashionMNIST/raw/t10k-images-idx3-ubyte"),
        ("food101", "food-101/meta/train.json"),
        ("oxford-pets", "oxford-iiit-pet/annotations/test.txt"),
        ("gtsrb", "gtsrb/GT-final_test.csv"),
    ],
)
def test_what_torchvision_does_not_verify_ends_in_a_line_too(tmp_path, monkeypatch, name, file):
    _, settings = made(monkeypatch, name, tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-3])
    with pytest.raises(UserError, match=f"^--data-path {tmp_path}: ") as caught:
        open_data(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["imagenet", "imagenette", "eurosat", "gtsrb"])
def test_a_set_whose_unpacking_was_broken_off_is_not_taken(tmp_path, monkeypatch, name):
    """Its folder is there: torchvision would take it for whole."""
    _, settings = made(monkeypatch, name, tmp_path)
    data = open_data(settings)
    Path(data.train.samples[-1][0]).unlink()
    title = NAMED_DATA[name].what.partition(":")[0]
    error = f"{tmp_path}: {title} has 8 images, of which only 7 are there: if unpacking was broken"
    with pytest.raises(UserError, match=error):
        open_data(settings)


@pytest.mark.parametrize("name", ["imagenet", "flowers102", "svhn"])
def test_a_set_that_takes_scipy_says_so(tmp_path, monkeypatch, name):
    _, settings = made(monkeypatch, name, tmp_path)
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    needs = r"takes the package scipy\S* to read it: pip install scipy"
    with pytest.raises(UserError, match=needs):
        open_data(settings)
    assert NAMED_DATA[name].needs.startswith("scipy")
    assert [each for each, told in NAMED_DATA.items() if "scipy" in told.needs] == [
        "imagenet",
        "flowers102",
        "svhn",
    ]


# Options that contradict each other, before anything is imported


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset flowers", "no data set 'flowers' .*stl10\\); did you mean flowers102\\?$"),
        ("--dataset CIFAR-100", "no data set 'CIFAR-100' .*; did you mean .*cifar100.*\\?$"),
        ("--dataset Oxford_Pets", "; did you mean oxford-pets\\?$"),
        ("--dataset xyzzy", "no data set 'xyzzy' .*imagenet, imagenette, .*, stl10\\)$"),
        ("--dataset dtd", "^--dataset dtd needs --data-path, the folder where it is$"),
        ("--dataset dtd --download", "^--download needs --data-path, the folder to put dtd into$"),
        (
            "--dataset imagenet --data-path d --download",
            "^--download: imagenet is only for those who ask for it: put ILSVRC2012_devkit_t1"
            "2.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from https://image-net",
        ),
    ],
)
def test_options_of_data_sets_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_arguments(options.split())
    assert "\n" not in str(caught.value)


# ImageNet from its archives


def test_a_plan_prepares_imagenet(tmp_path, in_tmp, monkeypatch, capsys):
    made(monkeypatch, "imagenet", tmp_path)
    archives = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    options = ["--model", "resnet56", "--image-size", "32", "-b", "2", "-j", "0"]
    options += ["--dataset", "imagenet", "--data-path", str(tmp_path)]
    assert main(["plan", *options]) == 0
    printed = capsys.readouterr()
    named = ", ".join(archives)
    assert printed.err == f"verifying and unpacking {named} in {tmp_path}; this takes long\n"
    found = "data      8 images of 3 classes (tench, English springer, cassette player) to train on"
    assert f"{found}, 4 to validate with\n" in printed.out
    folders = {"train", "val", in_tmp.name}
    assert {path.name for path in tmp_path.iterdir()} == {*archives, "meta.bin", *folders}
    for part, count in (("train", 8), ("val", 4)):
        assert sorted(path.name for path in (tmp_path / part).iterdir()) == list(WORDNET)
        assert len(list((tmp_path / part).rglob("*.JPEG"))) == count
    for name in archives:  # which nothing needs any more
        (tmp_path / name).unlink()
    assert main([*options, "--epochs", "1"]) == 0
    assert "unpacking" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "missing", ["ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz", "all"]
)
def test_imagenet_is_not_unpacked_in_parts(tmp_path, monkeypatch, missing):
    _, settings = made(monkeypatch, "imagenet", tmp_path)
    archives = sorted(tmp_path.iterdir())
    for path in archives:
        if missing in ("all", path.name):
            path.unlink()
    names = ", ".join(path.name for path in archives if not path.exists())
    with pytest.raises(UserError, match=f"no ImageNet: .*{missing.replace('all', '')}") as error:
        open_data(settings)
    assert all(name in str(error.value) for name in names.split(", "))
    assert "from https://image-net.org/download.php, there; train and val alone are" in str(
        error.value
    )
    assert not (tmp_path / "train").exists()


def test_a_damaged_archive_of_imagenet_is_not_unpacked(tmp_path, monkeypatch, capsys):
    _, settings = made(monkeypatch, "imagenet", tmp_path)
    flip_a_bit(tmp_path / "ILSVRC2012_img_train.tar")
    with pytest.raises(UserError, match="no ImageNet: The archive ILSVRC2012_img_train.tar is"):
        open_data(settings)
    assert not (tmp_path / "train").exists()


# Fetching


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that is served on this machine, and its address."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_set_by_name_is_fetched_once(tmp_path, site, monkeypatch, capsys, in_tmp):
    folder, address = site
    classes = WRITERS["flowers102"](folder, TRAIN, VAL)
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as tar:
        tar.add(folder / "flowers-102/jpg", "jpg")
    for name in ("imagelabels.mat", "setid.mat"):
        shutil.move(folder / "flowers-102" / name, folder)
    accept(monkeypatch, "flowers102", folder, (len(TRAIN), len(VAL)))
    flowers = torchvision.datasets.Flowers102
    monkeypatch.setattr(flowers, "_download_url_prefix", address)
    options = ["plan", "--model", "resnet56", "--dataset", "flowers102", "--download", "-b", "2"]
    options += ["--data-path", str(tmp_path / "new")]
    for _ in range(2):
        assert main(options) == 0
        assert f"data      8 images of {len(classes)} classes" in capsys.readouterr().out
        for path in folder.glob("*.*"):
            path.unlink()


@pytest.mark.parametrize("name", ["flowers102", "fashion-mnist"])
def test_a_set_that_cannot_be_fetched_is_told_in_a_line(tmp_path, site, monkeypatch, capsys, name):
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_download_url_prefix", site[1])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [site[1]])
    settings = small(dataset=name, data_path=tmp_path / "new", download=True)
    with pytest.raises(UserError, match="no F.*: .*HTTP Error 404: File not found") as caught:
        open_data(settings)
    assert "\n" not in str(caught.value)


def test_a_plan_for_a_set_that_is_not_there_yet(in_tmp, capsys):
    options = ["--model", "resnet56", "--dataset", "flowers102", "--data-path", "later"]
    assert main(["plan", *options]) == 0
    note, _, _ = capsys.readouterr().out.splitlines()[-3:]
    assert note == "note: later does not exist yet: 102 classes, 224 px taken instead"


# CIFAR-10 with and without its name


def test_cifar10_by_name_is_what_its_folder_is_recognised_as(tmp_path, monkeypatch):
    made(monkeypatch, "cifar10", tmp_path)
    plain = small(data_path=tmp_path, num_classes=3)
    named = small(data_path=tmp_path / "cifar-10-batches-py", num_classes=3, dataset="cifar10")
    data, again = open_data(plain), open_data(named)
    assert (data.kind, data.native, data.padded) == (again.kind, again.native, again.padded)
    assert (data.kind, data.native, data.padded) == ("cifar10", CIFAR10, 32)
    assert describe_images(data) == describe_images(again)
    for (images, targets), (others, labels) in zip(
        load(data, plain), load(again, named), strict=True
    ):
        assert torch.equal(images, others) and torch.equal(targets, labels)


@pytest.mark.parametrize(("share", "kept"), [(None, 3), (0.0, 0), (0.5, 5)])
def test_eurosat_has_images_drawn_to_validate_with(tmp_path, monkeypatch, share, kept):
    _, settings = made(monkeypatch, "eurosat", tmp_path)
    data = open_data(dataclasses.replace(settings, val_share=share))
    assert (len(data.val) if data.val else 0, len(data.chosen)) == (kept, len(TRAIN) - kept)


@pytest.mark.parametrize("name", ["dtd", "cifar10"])
def test_no_share_of_a_set_that_has_a_part_to_validate_with(tmp_path, monkeypatch, name):
    _, settings = made(monkeypatch, name, tmp_path)
    with pytest.raises(UserError, match=f"0.2: {tmp_path} has 4 images to validate with; leav"):
        open_data(dataclasses.replace(settings, val_share=0.2))


def test_the_fingerprint_is_of_the_files(tmp_path, monkeypatch):
    _, settings = made(monkeypatch, "eurosat", tmp_path)
    data = open_data(settings)
    before = describe_images(data)
    for index, (path, _) in enumerate(data.train.samples):
        content = Path(path).read_bytes()
        Path(path).write_bytes(content + b"\0")
        assert (describe_images(data) == before) == (index in data.val.indices)
        Path(path).write_bytes(content)
    moved = dataclasses.replace(settings, data_path=tmp_path / "moved")
    shutil.copytree(tmp_path / "eurosat", tmp_path / "moved/eurosat")
    assert describe_images(open_data(moved)) == before
