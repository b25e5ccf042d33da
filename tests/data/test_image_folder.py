"""Image folders. Run: python -m pytest tests/data/test_image_folder.py"""

import os
import shutil
from pathlib import Path

import pytest
import torchvision
from loading import Labels, folder_of, load, small
from small import TINY

from split_affinity.data.dataset import describe_data, open_data
from split_affinity.data.image_folder import folder_data
from split_affinity.data.pictures import ImageData
from split_affinity.errors import RunError, UserError
from split_affinity.models.pretrained import Preprocessing
from train_split_affinity import main


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


SPELLINGS = [
    ("Train", "Val"),
    ("TRAIN", "VALID"),
    ("training", "validation"),
    ("x_train", "x_val"),
    ("train2017", "val2017"),
    ("TrainSet", "ValidationSet"),
    ("trainset", "devset"),
    ("images_train", "images-val"),
    ("seg_train", "seg_dev"),
    ("train", "Val"),
]


@pytest.mark.parametrize(("train", "val"), SPELLINGS)
def test_parts_are_known_in_any_spelling(tmp_path, train, val):
    parts = train, val, "Test"
    root = folder_of(tmp_path, *(f"{part}/{name}/1.png" for part in parts for name in "ab"))
    data = folder_data(root)
    assert data.classes == ("a", "b")
    assert (Path(data.train.root).name, Path(data.val.root).name) == (train, val)
    assert data.left_out == [("unused folder", str(root / "Test"))]


def test_a_folder_to_train_on_without_others(tmp_path):
    data = folder_data(folder_of(tmp_path / "alone", "Train/a/1.png", "Train/b/1.png"))
    assert (data.classes, data.val) == (("a", "b"), None)
    names = [f"{part}/{name}/1.png" for part in ("Training", "Testing") for name in "ab"]
    data = folder_data(folder_of(tmp_path / "tested", *names))
    assert (data.classes, data.val) == (("a", "b"), None)


@pytest.mark.parametrize(
    "classes",
    [
        ("Train", "bus", "car"),
        ("bullet_train", "steam_train"),
        ("invalid", "valid"),
        ("contrast", "test"),
    ],
)
def test_classes_that_are_called_like_parts(tmp_path, classes):
    assert (
        folder_data(folder_of(tmp_path, *(f"{name}/1.png" for name in classes))).classes == classes
    )


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["test/a", "val/a"], "test, val: parts, not classes; needed is DIR/train/<class>/"),
        (["Test/a"], "Test: parts, not classes; needed is DIR/train/<class>/"),
        (["train/test", "train/train"], "test, train: parts, not classes; needed is "),
        (["Train", "Val"], "no images: no class folder in {root}/Train$"),
        (["Train/a", "training/a", "val/a"], "which of Train, training is to train on"),
        (["Train/a", "Train/b", "Val/a"], "class b is not in both of train and val"),
    ],
)
def test_parts_alone_are_refused(tmp_path, names, error):
    root = folder_of(tmp_path, *(f"{name}/1.png" for name in names))
    with pytest.raises(UserError, match=f"^--data-path {root}: {error.format(root=root)}"):
        folder_data(root)


NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_accents_encoded_in_two_ways_are_one_class(tmp_path):
    root = folder_of(tmp_path, *(f"{part}/1.png" for part in (f"train/{NFC}", "train/tea")))
    folder_of(tmp_path, f"val/{NFD}/1.png", "val/tea/1.png")
    data = folder_data(root)
    assert data.classes == (NFC, "tea")
    assert data.train.targets == data.val.targets == [0, 1]


def test_accents_that_change_the_order_of_classes_are_told(tmp_path):
    names = [f"train/{NFC}", "train/cafz", f"val/{NFD}", "val/cafz"]
    root = folder_of(tmp_path, *(f"{name}/1.png" for name in names))
    with pytest.raises(UserError, match="accents in names of classes are encoded in two ways"):
        folder_data(root)


def test_classes_that_look_alike_are_refused(tmp_path):
    root = folder_of(tmp_path, *(f"{name}/1.png" for name in (NFC, NFD, "tea")))
    with pytest.raises(UserError, match=f"{NFC}: two classes look alike, as accents are encoded"):
        folder_data(root)
