"""The command `data`, on a folder in which much is wrong.

Run: python -m pytest tests/inspection/test_data_command.py
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
from cifar import accept, make_cifar
from looking import noise, parts_of_photographs, save
from PIL import Image

from split_affinity.inspection import command
from train_split_affinity import main


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """Three classes to train and to validate, with one fault of each kind."""
    root = tmp_path_factory.mktemp("messy") / "photos"
    pictures = parts_of_photographs()
    for number, picture in enumerate(pictures):
        part = "val" if number % 4 == 3 else "train"
        save(picture, root / part / ("cat", "dog", "eel")[number % 3] / f"{number:02}.jpg")
    train, val = root / "train", root / "val"
    shutil.copy(train / "cat/00.jpg", train / "cat/00 copy.jpg")
    save(pictures[1].resize((150, 150)), val / "dog/smaller.png")
    save(pictures[2].convert("L"), train / "cat/grey.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    save(noise(5, (120, 150)), train / "cat/turned.jpg", exif=exif)
    save(noise(6, (20, 24)), train / "cat/tiny.png")
    (train / "dog/broken.jpg").write_bytes(b"\xff\xd8 cut short")
    (train / "dog/notes.txt").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def looked_at(messy):
    """What the command prints of that folder, and the folder that it writes into."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(messy.parent)
        assert main(["data", os.fspath(messy), "--image-size", "96", "-b", "4"]) == 0
    return printed.getvalue(), messy.parent / "out/data/photos"


def test_all_faults_are_found(looked_at):
    printed, folder = looked_at
    figures = json.loads((folder / "data.json").read_text())
    assert figures["pictures"] == {"train": 14, "validation": 4}
    assert [each["path"] for each in figures["broken"]] == ["train/dog/broken.jpg"]
    assert figures["turned"] == ["train/cat/turned.jpg"]
    assert [each["path"] for each in figures["tiny"]] == ["train/cat/tiny.png"]
    assert figures["left_out"] == [{"kind": "other file", "path": "train/dog/notes.txt"}]
    twins = [
        ({each["path"] for each in group["pictures"]}, group["exact"]) for group in figures["twins"]
    ]
    assert twins == [
        ({"train/eel/02.jpg", "train/cat/grey.jpg"}, False),
        ({"train/dog/01.jpg", "val/dog/smaller.png"}, False),
        ({"train/cat/00.jpg", "train/cat/00 copy.jpg"}, True),
    ]
    titles = [each["title"] for each in figures["findings"]]
    for title in titles:
        assert f"- {title}: " in printed
    assert titles[:3] == [
        "1 picture in two classes",
        "1 validation picture known from training",
        "1 picture more than once in its class",
    ]


def test_no_file_tells_where_it_was_made(looked_at):
    folder = looked_at[1]
    for name in ("data.html", "data.json"):
        text = (folder / name).read_text()
        assert os.fspath(folder.parents[2]) not in text
        assert sys.prefix not in text


def test_the_page_shows_pictures_of_every_class(looked_at):
    folder = looked_at[1]
    page = (folder / "data.html").read_text()
    for name in ("cat", "dog", "eel"):
        assert f"<h3><bdi>{name}</bdi></h3>" in page
    # Of each class as they are and augmented, and both of three pairs.
    figures = json.loads((folder / "data.json").read_text())
    readable = {row["name"]: row["train"] for row in figures["classes"]}
    readable["dog"] -= 1
    expected = 2 * sum(min(6, count) for count in readable.values()) + 6
    assert len(re.findall(r'src="data:image/', page)) == expected
    assert "http" not in page.replace("http-equiv", "")


def test_a_folder_without_validation_is_split_as_a_training_would(
    photos, in_tmp, capsys, monkeypatch
):
    shutil.copytree(photos / "train", "mine")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("BROWSER", raising=False)
    assert main(["data", "mine", "--val-share", "0.5", "-b", "2", "--open"]) == 0
    figures = json.loads((in_tmp / "out/data/mine/data.json").read_text())
    assert figures["pictures"] == {"train": 6, "validation": 6}
    printed = capsys.readouterr().out
    assert " (0.5 of each class) kept apart to validate with" in printed
    assert "nothing here can open pictures; they are out/data/mine/data.html\n" in printed
    assert printed.splitlines()[-1].startswith("next: ")
    assert "--val-share 0.5" in figures["next"]


def test_pictures_without_files(in_tmp, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    pixels[5] = 200
    accept(
        monkeypatch, make_cifar(in_tmp / "cifar", (pixels[:4], [0, 1, 2, 3]), (pixels[4:], [4, 5]))
    )
    assert main(["data", "--dataset", "cifar10", "--data-path", "cifar", "-b", "2"]) == 0
    figures = json.loads((in_tmp / "out/data/cifar/data.json").read_text())
    assert figures["pictures"] == {"train": 4, "validation": 2}
    assert figures["modes"] == {"RGB": 6}
    assert figures["not_compared"] == 1, "one of one colour"
    assert "--dataset cifar10" in figures["next"]


def test_a_name_that_is_markup_stays_a_name(photos, in_tmp):
    shutil.copytree(photos / "train", "own")
    Path("own/flower").rename("own/<b>\u202eflower")
    assert main(["data", "own"]) == 0
    page = (in_tmp / "out/data/own/data.html").read_text()
    assert "<b>\u202e" not in page and "<b>\\u202e" not in page
    assert "&lt;b&gt;\\u202eflower" in page


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([], "data needs your pictures: data FOLDER, or --dataset NAME --data-path DIR"),
        (["a", "b"], "data a b: give one folder"),
        (["a", "--data-path", "b"], "data a b: give one folder"),
        (
            ["nowhere"],
            "--data-path nowhere does not exist; give an image folder: DIR/<class>/*.jpg",
        ),
        (
            ["photos", "--output-dir", "file/x"],
            "--output-dir file/x: cannot be written: Not a directory",
        ),
        (["photos", "--resume", "x.pt"], "--resume x.pt is for "),
    ],
)
def test_errors_are_one_line(options, error, photos, in_tmp, capsys):
    shutil.copytree(photos / "train", "photos")
    (in_tmp / "file").write_text("")
    before = sorted(in_tmp.rglob("*"))
    assert main(["data", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert error in line
    assert sorted(in_tmp.rglob("*")) == before


def test_a_signal_ends_it_and_leaves_nothing(messy, in_tmp, capsys, monkeypatch):
    shutil.copytree(messy, "photos")
    look_at_part = command.look_at_part

    def interrupted(*args):
        for count, found in enumerate(look_at_part(*args)):
            if count == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    monkeypatch.setattr(command, "look_at_part", interrupted)
    assert main(["data", "photos"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1].endswith("stopped by SIGTERM")
    assert not (in_tmp / "out").exists()
    assert not active_children()
