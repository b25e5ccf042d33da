"""The settings of a run that goes on, and what a checkpoint brings along.

Run: python -m pytest tests/checkpoints/test_resume.py
"""

import dataclasses
import hashlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from patching import set_everywhere
from saved_runs import (
    EARLIER,
    EarlierImages,
    assert_same_result,
    contents,
    differences,
    interrupt,
    output,
    state_of,
    step_of,
)
from small import needs_two_cpus, read_metrics

from split_affinity.checkpoints.resume import check_resumable, defaults_to_go_on, saved_defaults
from split_affinity.checkpoints.state import (
    BadCheckpoint,
    asked_again,
    preprocessing_of,
    read_checkpoint,
    saved_settings,
    settings_to_go_on,
    versions,
)
from split_affinity.data.dataset import describe_images, open_data
from split_affinity.errors import Stopped, UserError
from split_affinity.models.pretrained import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from split_affinity.options.recipes import RECIPES
from split_affinity.options.settings import Settings, plain_settings
from train_split_affinity import main

pytestmark = pytest.mark.usefixtures("no_pictures")

# Settings of a resumed run

BASE = Settings(output_dir=Path("out"), epochs=3, lr=0.1, accumulate=2)
SAVED = {"settings": plain_settings(BASE), "versions": versions()}


def changed(**settings):
    return check_resumable(Path("last.pt"), SAVED, dataclasses.replace(BASE, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"workers": 7, "save_steps": 5, "save_freq": 2, "keep_best": 9},
        {"output_dir": Path("elsewhere"), "log_file": Path("log.md"), "data_path": Path("moved")},
        {"resume": Path("auto"), "mirror": "memory://m", "print_freq": 1},
        {"early_stopping": 3, "target_top1": 90.0, "max_bad_images": 4},
        {"split": "1:3", "loader_cores": (0,), "tuned_malloc": False},
        {"augment_confused": Path("c.json"), "class_weights": "w.json"},  # what is in them counts
    ],
)
def test_settings_that_may_change(settings):
    assert changed(**settings) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet18"}, "--model resnet18: last.pt has resnet50"),
        ({"num_classes": 5}, "--num-classes 5: last.pt has None"),
        ({"batch_size": 16}, "--batch-size 16: last.pt has 32"),
        ({"accumulate": 1}, "--accumulate 1: last.pt has 2 batches a step"),
        ({"subset": 0.5}, "--subset 0.5: last.pt has 1.0"),
        ({"opt": "adam"}, "--opt adam: last.pt has sgd"),
        ({"lr_scheduler": "cosine"}, "--lr-scheduler cosine: last.pt has constant"),
        ({"model_ema": True}, "--model-ema True: last.pt has False"),
        ({"skip_decay_1d": True}, "--skip-decay-1d True: last.pt has False"),
        ({"norm_weight_decay": 0.0}, "--norm-weight-decay 0.0: last.pt has None"),
        ({"bias_weight_decay": 0.0}, "--bias-weight-decay 0.0: last.pt has None"),
    ],
)
def test_settings_that_must_not_change(settings, message):
    with pytest.raises(UserError) as caught:
        changed(**settings)
    assert str(caught.value) == f"{message}; --init-from takes its weights alone"


@pytest.mark.parametrize(
    ("settings", "listed"),
    [
        ({"lr": 0.05}, ["--lr 0.1 -> 0.05"]),
        ({"seed": 1, "epochs": 4}, ["--epochs 3 -> 4", "--seed 0 -> 1"]),
        ({"schedule": "overlap"}, ["--schedule sequential -> overlap"]),
        ({"forward_threads": 2}, ["--forward-threads None -> 2"]),
        ({"lr_milestones": (1, 2)}, ["--lr-milestones (30, 60, 80) -> (1, 2)"]),
        ({"precision": "fp32"}, ["--precision auto -> fp32"]),
        ({"mixup_alpha": 0.2, "hflip": 0.0}, ["--hflip 0.5 -> 0.0", "--mixup-alpha 0.0 -> 0.2"]),
    ],
)
def test_settings_that_change_the_numbers_are_listed(settings, listed):
    assert changed(**settings) == listed


@pytest.mark.parametrize(
    ("name", "other", "listed"),
    [
        ("ra_magnitude", 12, "--ra-magnitude 9 -> 12"),
        ("weight_decay", 0.1, "--weight-decay 0.0001 -> 0.1"),
        ("opt", "adam", "--opt adam: last.pt has sgd; "),
    ],
)
def test_a_setting_that_an_older_checkpoint_does_not_know_had_its_default(name, other, listed):
    settings = {key: value for key, value in SAVED["settings"].items() if key != name}
    older = SAVED | {"settings": settings}
    assert check_resumable(Path("last.pt"), older, BASE) == []
    newer = dataclasses.replace(BASE, **{name: other})
    if name == "opt":
        with pytest.raises(UserError, match=listed):
            check_resumable(Path("last.pt"), older, newer)
    else:
        assert check_resumable(Path("last.pt"), older, newer) == [listed]


def test_a_checkpoint_from_before_smaller_decoding_goes_on_with_full_decoding():
    values = {key: value for key, value in SAVED["settings"].items() if key != "full_decode"}
    older = SAVED | {"settings": values}
    assert settings_to_go_on(older).full_decode
    assert not settings_to_go_on(SAVED).full_decode
    full = dataclasses.replace(BASE, full_decode=True)
    assert check_resumable(Path("last.pt"), older, full) == []
    listed = ["--full-decode True -> False"]
    assert check_resumable(Path("last.pt"), older, BASE) == listed


def test_what_an_older_checkpoint_does_not_know_is_no_other_rate():
    """Else the course of the learning rate would be made anew."""
    older = {"settings": {key: value for key, value in SAVED["settings"].items() if key != "fused"}}
    assert saved_settings(older) == SAVED["settings"]
    assert saved_settings({"settings": {"fused": False, "lr": 3.0}})["fused"] is False


def test_a_run_of_a_version_without_folding_goes_on_without_it():
    settings = {key: value for key, value in SAVED["settings"].items() if key != "fold_norm"}
    older = SAVED | {"settings": settings}
    assert settings_to_go_on(older).fold_norm is False
    assert settings_to_go_on(SAVED).fold_norm is True
    assert check_resumable(Path("last.pt"), older, dataclasses.replace(BASE, fold_norm=False)) == []
    (line,) = check_resumable(Path("last.pt"), older, BASE)
    assert line.startswith("--fold-norm")


def test_another_torch_is_listed():
    saved = SAVED | {"versions": SAVED["versions"] | {"torch": "1.0", "python": "3.8"}}
    now = versions()["torch"]
    assert check_resumable(Path("last.pt"), saved, BASE) == [f"torch 1.0 -> {now}"]


def test_changes_are_told(copied, capsys, arguments):
    assert main([*arguments, *output(copied), "--resume", "auto", "--seed", "1"]) == 0
    told = "numbers can differ from those of an unbroken run: --seed 0 -> 1\n"
    assert told in capsys.readouterr().out


def test_a_change_that_makes_no_sense_ends_in_one_line(copied, capsys, arguments):
    before = contents(copied)
    assert main([*arguments, *output(copied), "--resume", "auto", "--opt", "adam"]) == 2
    path = copied / "last.pt"
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: --opt adam: {path} has sgd; --init-from takes its "
        "weights alone\n"
    )
    assert contents(copied) == before


def test_other_data_is_an_error(copied, capsys, arguments, pictures, tmp_path):
    fewer = shutil.copytree(pictures, tmp_path / "fewer")
    for picture in list((fewer / "train/temple").iterdir())[:4]:
        picture.unlink()
    options = [*arguments, *output(copied), "--data-path", str(fewer), "--resume", "auto"]
    assert main(options) == 2
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: {copied / 'last.pt'}: made with 3 batches an epoch, "
        "not 2\n"
    )


@pytest.mark.parametrize("options", [[], ["--test-only"]])
def test_other_classes_are_an_error(copied, capsys, arguments, renamed, options):
    path = copied / "last.pt"
    asked = [*arguments, *output(copied), "--data-path", str(renamed), "--resume", str(path)]
    before = contents(copied)
    assert main([*asked, *options]) == 2
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: {path}: its class 0 is flower, not temple as in "
        "--data-path\n"
    )
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("before", "now", "listed"),
    [
        ({"confused": ["b"]}, ["b"], []),
        ({"confused": []}, [], []),
        ({}, [], []),  # an older version
        ({"confused": ["b"]}, ["a", "b"], ["classes that are augmented more strongly b -> a, b"]),
        ({}, ["a"], ["classes that are augmented more strongly none -> a"]),
    ],
)
def test_other_classes_that_are_augmented_more_strongly_are_listed(before, now, listed):
    data = {"classes": ["a", "b"], "images": 4, "fingerprint": "x"}
    saved = SAVED | {"data": data | before}
    found = check_resumable(Path("last.pt"), saved, BASE, data | {"confused": now})
    assert found == listed


@pytest.mark.parametrize(
    ("before", "now", "listed"),
    [
        ([0.5, 2.0], [0.5, 2.0], []),
        (None, None, []),
        ([0.5, 2.0], [0.5, 1.5], ["weights of 1 class in the loss (b)"]),
        (None, [0.5, 2.0], ["weights of 2 classes in the loss (a, b)"]),
        ([1.0, 2.0], None, ["weights of 1 class in the loss (b)"]),
    ],
)
def test_other_class_weights_are_listed(before, now, listed):
    data = {"classes": ["a", "b"], "images": 4, "fingerprint": "x"}
    then, today = (data | ({"class_weights": each} if each else {}) for each in (before, now))
    assert check_resumable(Path("last.pt"), SAVED | {"data": then}, BASE, today) == listed


def test_a_run_with_class_weights_goes_on_with_the_same_ones(in_tmp, monkeypatch, train, capsys):
    """A file has to be named again, and is read anew; balanced ones are taken."""
    path, parts = in_tmp / "w.json", in_tmp / "parts"
    path.write_text('{"flower": 3}')
    train(in_tmp / "whole", class_weights=str(path))
    interrupt(monkeypatch, "update", [2])
    with pytest.raises(Stopped):
        train(parts, class_weights=str(path))
    assert main(["--resume", str(parts / "last.pt"), "--steps", "6"]) == 2
    assert f"its run had --class-weights {path}; no checkpoint" in capsys.readouterr().err
    train(parts, class_weights=str(path), resume=Path("auto"))
    assert_same_result(parts, in_tmp / "whole")
    assert state_of(parts)["data"]["class_weights"] == [1.5, 0.5]
    path.write_text('{"flower": 4}')
    train(parts, class_weights="w.json", resume=Path("auto"), epochs=3)
    printed = capsys.readouterr().out
    assert "weights of 2 classes in the loss (flower, temple)" in printed
    assert "weights   flower 1.6, temple 0.4 in the loss" in printed
    train(in_tmp / "even", class_weights="balanced", steps=1)
    again = Settings(resume=in_tmp / "even/last.pt")
    assert saved_defaults("train", again, {})["class_weights"] == "balanced"


@pytest.mark.parametrize("change", ["added", "resized", "renamed", "none"])
def test_other_images_are_listed(copied, capsys, arguments, pictures, tmp_path, change):
    """Wherever the folder is, and as many batches as it may make."""
    folder = shutil.copytree(pictures, tmp_path / "moved")
    some = folder / "train/flower/0001.jpg"
    if change == "added":
        shutil.copy(some, folder / "train/flower/0001a.jpg")
    elif change == "resized":
        some.write_bytes(some.read_bytes() + b"\0")
    elif change == "renamed":
        some.rename(folder / "train/flower/0001a.jpg")
    options = [*arguments, *output(copied), "--data-path", str(folder), "--resume", "auto"]
    assert main(options) == 0
    count = 13 if change == "added" else 12
    told = f"unbroken run: images to train on (names or sizes) 12 -> {count}\n"
    assert (told in capsys.readouterr().out) == (change != "none")


def test_the_images_of_a_subset_alone_count(pictures, tmp_path):
    settings = Settings(data_path=pictures, batch_size=2, subset=0.5)
    folder = shutil.copytree(pictures, tmp_path / "copy")
    data = open_data(settings)
    before = describe_images(data)
    assert (before["classes"], before["images"]) == (["flower", "temple"], 6)
    for index, (path, _) in enumerate(data.train.samples):
        other = folder / Path(path).relative_to(pictures)
        other.write_bytes(other.read_bytes() + b"\0")
        copy = open_data(dataclasses.replace(settings, data_path=folder))
        assert (describe_images(copy) == before) == (index not in data.chosen)
        other.write_bytes(other.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("lr", 0.05, 0.01), ("momentum", 0.9, 0.5), ("weight_decay", 1e-4, 1e-2)],
)
def test_a_changed_setting_is_in_force(in_tmp, train, name, before, after):
    """A rate lowered in the middle of a run, say: what is listed as changed has to be changed."""
    plain = {"lr_scheduler": "constant", "lr_warmup_epochs": 0}
    train(in_tmp / "out", epochs=1, **plain, **{name: before})
    train(in_tmp / "out", epochs=2, resume=Path("auto"), **plain, **{name: after})
    assert state_of(in_tmp / "out")["optimizer"]["param_groups"][0][name] == after


@pytest.mark.parametrize("opt", ["sgd", "rmsprop"])
def test_a_momentum_begins_in_the_middle_of_a_run(in_tmp, train, opt):
    plain = {"opt": opt, "lr_scheduler": "constant", "lr": 1e-3, "lr_warmup_epochs": 0}
    train(in_tmp / "out", epochs=1, **plain, momentum=0.0)
    train(in_tmp / "out", epochs=2, resume=Path("auto"), **plain, momentum=0.5)
    kept = state_of(in_tmp / "out")["optimizer"]["state"].values()
    assert all(each["momentum_buffer"].abs().sum() > 0 for each in kept)


def test_more_epochs_follow_the_course_of_the_longer_run(in_tmp, train):
    """Over two epochs, cosine would have ended by now."""
    train(in_tmp / "out", epochs=2, lr_warmup_epochs=0)
    train(in_tmp / "out", epochs=4, lr_warmup_epochs=0, resume=Path("auto"))
    rates = [row["lr"] for row in state_of(in_tmp / "out")["progress"]["history"]]
    assert rates == pytest.approx([0.0375, 0.0033494, 0.0125, 0.00085185], rel=1e-4)


def test_a_default_rate_goes_on_rising(in_tmp, train):
    """Over 10 epochs of 3 steps it rises in 3; the run is stopped after 2 of them."""
    course = {"epochs": 10, "lr": None, "lr_warmup_epochs": None}
    train(in_tmp / "whole", **course, steps=4)
    train(in_tmp / "out", **course, steps=2)
    train(in_tmp / "out", **course, steps=4, resume=Path("auto"))
    for folder in ("whole", "out"):
        steps = read_metrics(in_tmp / folder, "step")
        rates = [1.5625e-05, 0.00053125, 0.001046875, 0.0015625]
        assert [step["lr"] for step in steps] == pytest.approx(rates)
    for name, value in state_of(in_tmp / "whole")["model"].items():
        assert torch.equal(state_of(in_tmp / "out")["model"][name], value), name


@pytest.mark.parametrize(
    "scheduler",
    [
        "cosine",
        "onecycle",
    ],
)
def test_fewer_epochs_than_there_were(in_tmp, capsys, train, scheduler):
    course = {"lr_scheduler": scheduler, "lr_warmup_epochs": 0}
    train(in_tmp / "out", epochs=3, **course)
    train(in_tmp / "out", epochs=1, resume=Path("auto"), **course)
    assert "\nfinished after 9 steps; 3 were asked for\n" in capsys.readouterr().out
    assert step_of(in_tmp / "out") == 9


def test_more_epochs_and_then_fewer_of_a_course_that_knows_its_length(in_tmp, capsys, train):
    """Of onecycle, which takes no step beyond its last one."""
    course = {"lr_scheduler": "onecycle", "lr_warmup_epochs": 0}
    train(in_tmp / "out", epochs=3, **course)
    train(in_tmp / "out", epochs=6, resume=Path("auto"), **course)
    assert "\nfinished after 18 of 18 steps\n" in capsys.readouterr().out
    rates = [step["lr"] for step in read_metrics(in_tmp / "out", "step")]
    assert len(rates) == 18
    assert rates[8] < 1e-5 < rates[9], "it goes on within the course of the longer run"
    last = state_of(in_tmp / "out")
    train(in_tmp / "out", epochs=3, resume=Path("auto"), **course)
    assert "\nfinished after 18 steps; 9 were asked for\n" in capsys.readouterr().out
    assert differences(state_of(in_tmp / "out"), last) == []


def test_a_finished_run_writes_no_checkpoint(copied, arguments):
    before = {path.name: path.stat().st_mtime_ns for path in copied.glob("*.pt")}
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in copied.glob("*.pt")} == before


# A checkpoint alone


UNLIKE_DEFAULTS = {
    "sequential": "--opt adam --mixup-alpha 0.2 --label-smoothing 0.1 --hflip 0 --seed 3",
    "one lane": "--split none --no-fused --no-channels-last --precision fp32 --std 0.2,0.3,0.4",
    "growing": "--min-res 32 --max-res 64 --end-ramp 2 --lr-scheduler onecycle --val-resize 80",
    "overlap": "--schedule overlap --accumulate 2 -b 2 --lr-scheduler cosine --model-ema",
    "delayed": "--schedule delayed --momentum 0.5 --lr-scheduler multistep --lr-milestones 1",
    "recipe": "--recipe digits --lr-warmup-epochs 1 --interpolation bicubic",
}


def run_at(folder, monkeypatch, *arguments):
    """The program as from another working directory."""
    monkeypatch.chdir(folder)
    return main([*map(str, arguments)])


@needs_two_cpus
@pytest.mark.parametrize("name", UNLIKE_DEFAULTS)
def test_a_checkpoint_goes_on_without_any_other_option(in_tmp, monkeypatch, capsys, pictures, name):
    """From another working directory, too; the learning rate and its warm-up are defaults."""
    shutil.copytree(pictures, "data")
    (in_tmp / "else").mkdir()
    options = "--image-size 32 -b 4 -j 0 --epochs 3 --data-path data".split()
    if name == "growing":
        options = options[2:]
    options = [*options, *UNLIKE_DEFAULTS[name].split(), "--model", "small", "--output-dir"]
    assert main([*options, "whole"]) == 0
    interrupt(monkeypatch, "update", [2, 4])
    assert main([*options, "parts"]) == 128 + signal.SIGTERM
    assert run_at("else", monkeypatch, "--resume", "../parts/last.pt") == 128 + signal.SIGTERM
    assert step_of(in_tmp / "parts") == 4
    capsys.readouterr()
    assert run_at(in_tmp, monkeypatch, "--resume", "parts/last.pt") == 0
    captured = capsys.readouterr()
    assert captured.out.count("\nresumed from parts/last.pt, after step 4\n") == 1
    assert "numbers can differ" not in captured.out
    assert captured.err == ""
    assert_same_result(in_tmp / "parts", in_tmp / "whole")
    assert state_of(in_tmp / "parts")["settings"].items() >= {"epochs": 3, "model": "small"}.items()
    assert [path.name for path in (in_tmp / "else").iterdir()] == ["logs.md"]
    assert (in_tmp / "logs.md").read_text().count("\n## ") == 3


@pytest.fixture
def project(in_tmp, pictures, monkeypatch):
    """A folder with data and with a run of one epoch, given by relative paths, as a user has it."""
    shutil.copytree(pictures, "project/data")
    options = "--model small --image-size 32 -b 4 -j 0 --epochs 1 --data-path data --output-dir out"
    assert run_at("project", monkeypatch, *options.split()) == 0
    monkeypatch.chdir(in_tmp)
    return in_tmp / "project"


def test_a_checkpoint_is_tested_without_any_other_option(project, capsys):
    capsys.readouterr()
    assert main(["--test-only", "--resume", "project/out/best.pt"]) == 0
    (row,) = state_of(project / "out")["progress"]["history"]
    figures = f"12 images: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} %"
    assert figures in capsys.readouterr().out
    assert (project / "out/confusion.csv").exists()
    assert "\n- " + figures in Path("logs.md").read_text(), "here, and not there"
    assert (project / "logs.md").read_text().count("\n## ") == 1


def test_a_run_goes_on_where_its_folder_is_now(project, in_tmp, capsys):
    (project / "out").rename(in_tmp / "moved")
    assert main(["--resume", "moved/last.pt", "--epochs", "2"]) == 0
    assert step_of(in_tmp / "moved") == 6
    assert not (project / "out").exists()
    assert [file.read_text().count("\n## ") for file in (project / "logs.md", Path("logs.md"))] == [
        1,
        1,
    ], "no checkpoint says which file is written"


def test_a_project_that_was_moved_as_a_whole_goes_on_within(project, in_tmp, monkeypatch):
    project.rename(in_tmp / "moved")
    assert run_at("moved", monkeypatch, "--resume", "out/last.pt", "--epochs", "2") == 0
    assert step_of(in_tmp / "moved/out") == 6
    assert Path("logs.md").read_text().count("\n## ") == 2


@pytest.mark.parametrize("options", [[], ["--test-only"]])
def test_data_that_were_moved(project, in_tmp, capsys, options):
    (project / "data").rename(in_tmp / "elsewhere")
    before = contents(project / "out")
    asked = ["--resume", "project/out/last.pt", *options]
    assert main(asked) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "train_split_affinity.py: error: project/out/last.pt: its images are no longer in "
        f"{project / 'data'}: say by --data-path where they are\n"
    )
    assert contents(project / "out") == before
    assert main([*asked, "--data-path", "elsewhere"]) == 0
    assert "numbers can differ" not in capsys.readouterr().out


def test_a_data_path_that_is_not_utf_8(in_tmp, pictures, monkeypatch):
    name = os.fsdecode(b"caf\xe9")
    shutil.copytree(pictures, name)
    options = "--model small --image-size 32 -b 4 -j 0 --steps 1 --output-dir out --data-path"
    assert main([*options.split(), name]) == 0
    Path("else").mkdir()
    assert run_at("else", monkeypatch, "--resume", "../out/last.pt", "--steps", "2") == 0
    assert step_of(in_tmp / "out") == 2


def test_a_checkpoint_holds_what_it_takes_to_use_it(trained, pictures):
    state = state_of(trained)
    assert state["data"]["classes"] == ["flower", "temple"]
    in_force = state["settings"]
    assert (in_force["model"], in_force["num_classes"], in_force["image_size"]) == ("small", 2, 32)
    assert (in_force["val_resize"], in_force["interpolation"]) == (37, "bilinear")
    assert (in_force["mean"], in_force["std"]) == (IMAGENET_MEAN, IMAGENET_STD)
    assert state["asked"] == {
        "num_classes": None,
        "lr_warmup_epochs": None,
        "loader_cores": None,
        "forward_threads": None,
        "backward_threads": None,
        "precision": "auto",
        "fused_norm": "auto",
    }, "all else is as it was asked for, and paths are absolute"


def test_what_was_asked_for_is_taken_again(in_tmp):
    asked = Settings(data_path=Path("data"), teacher_weights="DEFAULT", split="1:2")
    ready = {"image_size": 64, "val_resize": 73, "mean": (0.1, 0.2, 0.3)}
    found = {"precision": "fp32", "loader_cores": (0,), "tuned_malloc": False, "lr": 0.1}
    in_force = dataclasses.replace(asked, **ready, **found)
    again = asked_again(asked, in_force)
    assert again == {
        "data_path": str(in_tmp / "data"),
        "precision": "auto",
        "loader_cores": None,
        "tuned_malloc": True,
        "lr": None,
    }
    state = {"settings": plain_settings(in_force), "asked": again}
    taken = settings_to_go_on(state)
    assert taken == dataclasses.replace(asked, **ready, data_path=in_tmp / "data")
    assert asked_again(taken, dataclasses.replace(taken, **found)) == {
        "precision": "auto",
        "loader_cores": None,
        "tuned_malloc": True,
        "lr": None,
    }, "and so on, from run to run"


def test_a_run_does_not_begin_as_the_saved_one_began():
    begun = {
        "resume": Path("a.pt"),
        "weights": "W",
        "init_from": Path("b.pt"),
        "test_only": True,
        "download": True,
        "machine": Path("m"),
        "record": Path("r"),
        "quick": True,
        "preload": True,
        "pictures": ("x",),
        "json": Path("j"),
        "csv": Path("c"),
    }
    settings = Settings(model="resnet18", recipe="digits", **begun)
    taken = settings_to_go_on({"settings": plain_settings(settings), "asked": {}})
    assert taken == Settings(model="resnet18", recipe="digits")


def test_the_settings_of_an_earlier_version():
    """What a machine decides is decided anew, since it is not known what was asked for."""
    assert settings_to_go_on(read_checkpoint(EARLIER / "delayed.pt")) == Settings(
        model="small",
        num_classes=3,
        image_size=32,
        max_bad_images=0,
        mixup_alpha=0.4,
        batch_size=64,
        accumulate=2,
        epochs=2,
        lr=0.1,
        lr_scheduler="cosine",
        lr_warmup_epochs=0,
        clip_grad_norm=1.0,
        model_ema=True,
        seed=3,
        save_steps=7,
        schedule="delayed",
        fused=False,
        full_decode=True,  # there was no other way
        fold_norm=False,
        fused_norm="off",
    )


CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
NO_FILES = hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    ("settings", "data", "ready"),
    [
        ({"image_size": 32}, (CIFAR10_CLASSES, "ab12"), Preprocessing(32, 37)),
        ({"image_size": 224}, (["cat", "dog"], "ab12"), Preprocessing()),
        ({"image_size": 32}, (["0", "1"], NO_FILES), Preprocessing(32, 37)),
        ({"image_size": 32}, None, Preprocessing(32, 37)),
        (
            {
                "image_size": 96,
                "val_resize": 100,
                "interpolation": "bicubic",
                "mean": [0.1, 0.2, 0.3],
                "std": (0.4, 0.5, 0.6),
            },
            (CIFAR10_CLASSES, NO_FILES),
            Preprocessing(96, 100, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ),
    ],
    ids=["a folder of CIFAR-10", "folder", "synthetic", "unknown", "saved"],
)
def test_how_pictures_were_made_ready(settings, data, ready):
    state = {"settings": settings, "data": data and {"classes": data[0], "fingerprint": data[1]}}
    assert preprocessing_of(state) == ready


RUN = Settings(
    model="small",
    image_size=128,
    val_resize=140,
    mean=(0.5, 0.5, 0.5),
    min_res=64,
    max_res=128,
    end_ramp=3,
    epochs=9,
    steps=700,
    recipe="cifar10",
    forward_cores=(0,),
    backward_cores=(1,),
    output_dir=Path("former/out"),
)


@pytest.mark.parametrize(
    ("typed", "changes"),
    [
        ({}, {}),
        ({"test_only": True}, {"mirror": None}),
        ({"epochs": 12}, {"steps": None}),
        ({"image_size": 64}, {"image_size": 64, "val_resize": 70, "max_res": None}),
        ({"max_res": 192}, {"image_size": 192, "val_resize": 210}),
        ({"split": "1:2"}, {"forward_cores": None, "backward_cores": None}),
        ({"recipe": "cifar10"}, {}),
        (
            {"recipe": "digits", "epochs": 5},
            {
                **RECIPES["digits"],
                "dataset": None,  # the images stay those of the saved run
                "recipe": "digits",
                "epochs": 5,
                "steps": None,
                "val_resize": 35,
                "max_res": None,
                "output_dir": Path("out/digits"),
            },
        ),
    ],
    ids=lambda value: ",".join(value) or "nothing",
)
def test_options_in_place_of_others_that_a_saved_run_has(typed, changes):
    """Another size is made ready in proportion."""
    state = {"settings": plain_settings(RUN), "asked": {}}
    defaults = defaults_to_go_on(Path("out/last.pt"), state, typed)
    expected = vars(RUN) | {"output_dir": Path("out"), "std": IMAGENET_STD}
    expected |= {"interpolation": "bilinear"} | changes
    assert defaults == expected


def test_no_team_of_threads_reads_the_settings(trained, monkeypatch):
    """Loaders are forked later, and a child of a process that has one could wait for ever."""
    read, threads = read_checkpoint, []

    def counting(path):
        threads.append(torch.get_num_threads())
        return read(path)

    set_everywhere(monkeypatch, "read_checkpoint", counting)
    before = torch.get_num_threads()
    for resumed in (
        {"resume": trained / "last.pt"},
        {"resume": Path("auto"), "output_dir": trained},
    ):
        assert saved_defaults("train", Settings(**resumed), resumed)["model"] == "small"
    with pytest.raises(BadCheckpoint):
        saved_defaults("train", Settings(resume=trained / "no.pt"), {})
    assert threads == [1, 1, 1]
    assert torch.get_num_threads() == before


def test_auto_brings_the_settings_of_the_run_that_it_finds(copied, capsys):
    assert main(["--resume", "auto", *output(copied), "--epochs", "3"]) == 0
    assert step_of(copied) == 9
    told = "numbers can differ from those of an unbroken run: --epochs 2 -> 3\n"
    assert told in capsys.readouterr().out


@needs_two_cpus
def test_a_checkpoint_of_an_earlier_version_goes_on_alone(in_tmp, monkeypatch, capsys):
    set_everywhere(monkeypatch, "SyntheticImages", EarlierImages)
    shutil.copy(EARLIER / "sequential.pt", "last.pt")
    threads = ["--forward-threads", "1", "--backward-threads", "1", "--precision", "fp32"]
    assert main(["--resume", "last.pt", *threads]) == 0
    told = capsys.readouterr().out.partition("numbers can differ from those of an unbroken run: ")
    assert "--" not in told[2].partition("\n")[0], "of other versions alone"
    ours, theirs = (
        read_checkpoint(path) for path in (Path("last.pt"), EARLIER / "sequential-end.pt")
    )
    assert ours["progress"]["step"] == theirs["progress"]["step"] == 20
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, rtol=1e-3, atol=1e-5)
