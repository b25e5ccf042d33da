"""New runs from old weights, and teachers.

Run: python -m pytest tests/checkpoints/test_starting_weights.py
"""

import argparse
import dataclasses
import math
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from patching import set_everywhere
from saved_runs import (
    DELAYED,
    OVERLAP,
    Bomb,
    assert_same_result,
    differences,
    interrupt,
    output,
    state_of,
)
from small import needs_two_cpus, small_model
from torch import nn

from split_affinity.errors import Stopped, UserError
from split_affinity.models.pretrained import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Pretrained
from split_affinity.models.weights import take_weights
from split_affinity.options.settings import Settings
from split_affinity.runs.starting_weights import build_teacher, read_weights
from train_split_affinity import main

pytestmark = pytest.mark.usefixtures("no_pictures")

# A new run from old weights


@pytest.mark.parametrize("classes", [2, 5])
def test_init_from_takes_the_averaged_weights_that_fit(trained, classes):
    model = small_model(classes, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved = read_weights(trained / "last.pt")
    assert (saved.classes, saved.part) == (("flower", "temple"), "moving average")
    assert saved.settings["model"] == "small"
    some = "7 of 9 tensors; new: 6.weight (5, 16), 6.bias (5)"
    assert take_weights(model, saved.weights) == (some if classes == 5 else "all 9 tensors")
    average = state_of(trained)["average"]
    for name, value in model.state_dict().items():
        kept = classes == 5 and name.startswith("6.")
        assert torch.equal(value, before[name] if kept else average[name]), name


def test_init_from_without_an_average_takes_the_weights(in_tmp, train):
    train(in_tmp / "out", epochs=1, lr_warmup_epochs=0, model_ema=False)
    model = small_model(2, 32)
    saved = read_weights(in_tmp / "out/last.pt")
    assert saved.part == ""
    assert take_weights(model, saved.weights) == "all 9 tensors"
    for name, value in state_of(in_tmp / "out")["model"].items():
        assert torch.equal(model.state_dict()[name], value), name


def test_only_some_of_many_new_layers_are_named(trained):
    model = nn.Sequential(*small_model(2, 32), *(nn.Linear(2, 3) for _ in range(3)))
    note = take_weights(model, read_weights(trained / "last.pt").weights)
    new = "7.weight (3, 2), 7.bias (3), 8.weight (3, 2), 8.bias (3) and 2 more"
    assert note == f"9 of 15 tensors; new: {new}"


def test_a_run_says_which_layers_are_new(trained, in_tmp, arguments, capsys):
    options = [*arguments, "--init-from", str(trained / "last.pt"), "--resume", "auto"]
    options += output(in_tmp / "out")
    assert main([*options, "--num-classes", "5", "--steps", "3"]) == 0
    note = f"weights from {trained / 'last.pt'} (moving average): "
    some = f"{note}7 of 9 tensors; new: 6.weight (5, 16), 6.bias (5)\n"
    assert capsys.readouterr().out.count(some) == 1
    assert main([*options, "--num-classes", "5"]) == 0
    assert note not in capsys.readouterr().out, "nothing is taken by a run that goes on"
    assert main([*options, *output(in_tmp / "other"), "--steps", "1"]) == 0
    assert capsys.readouterr().out.count(f"{note}all 9 tensors\n") == 1


def test_init_from_for_other_classes_leaves_the_classifier_new(
    trained, in_tmp, arguments, renamed, capsys
):
    """As many of them, under other names."""
    path = trained / "last.pt"
    options = [*arguments, "--data-path", str(renamed), "--epochs", "1", "--lr", "0"]
    options += ["--no-model-ema", "--init-from", str(path), *output(in_tmp / "out")]
    assert main(options) == 0
    some = "7 of 9 tensors; new: 6.weight (2, 16), 6.bias (2); it knows other classes\n"
    assert f"weights from {path} (moving average): {some}" in capsys.readouterr().out
    average, model = state_of(trained)["average"], state_of(in_tmp / "out")["model"]
    assert torch.equal(model["0.weight"], average["0.weight"])
    assert not torch.equal(model["6.weight"], average["6.weight"])


def test_init_from_begins_a_new_run(trained, in_tmp, arguments):
    options = [*arguments, "--num-classes", "5", "--epochs", "1", "--lr", "0", "--no-model-ema"]
    options += ["--init-from", str(trained / "last.pt"), *output(in_tmp / "out")]
    assert main(options) == 0
    state = state_of(in_tmp / "out")
    assert state["progress"]["step"] == 3
    assert len(state["progress"]["history"]) == 1
    assert state["model"]["6.weight"].shape == (5, 16)
    assert torch.equal(state["model"]["0.weight"], state_of(trained)["average"]["0.weight"])


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (
            "squeezenet1_1",
            "last.pt",
            "--init-from {}, made by small, for squeezenet1_1: only 0 of 52 tensors fit; missing: "
            "features.0.weight (64, 3, 3, 3), features.0.bias (64), "
            "features.3.squeeze.weight (16, 64, 1, 1), features.3.squeeze.bias (16) and 48 more; "
            "left over: 0.weight (4, 3, 3, 3), 0.bias (4), 1.weight (4), 1.bias (4) and 5 more",
        ),
        ("small", "nowhere.pt", "--init-from {}: cannot be read: No such file or directory"),
    ],
)
def test_init_from_what_does_not_fit(trained, in_tmp, capsys, arguments, model, name, message):
    path = trained / name
    options = [*arguments, "--model", model, "--init-from", str(path), *output(in_tmp / "out")]
    assert main(options) == 2
    error = f"train_split_affinity.py: error: {message.format(path)}\n"
    assert capsys.readouterr().err == error
    assert not list(in_tmp.iterdir())


# Weights of other programs


def small_weights():
    """Values that tell the tensors apart."""
    weights = small_model(2, 32).state_dict().items()
    return {name: torch.full_like(value, number) for number, (name, value) in enumerate(weights)}


def prefixed(prefix):
    return {prefix + name: value for name, value in small_weights().items()}


OTHER = {name: value + 50 for name, value in small_weights().items()}


FILES = {
    "a state dict": (small_weights(), ""),
    "an OrderedDict": (OrderedDict(small_weights()), ""),
    "DataParallel": (prefixed("module."), ""),
    "compiled": (prefixed("_orig_mod."), ""),
    "both": (prefixed("module._orig_mod."), ""),
    "the other way round": (prefixed("_orig_mod.module."), ""),
    "pytorch/examples": (
        {"epoch": 3, "arch": "small", "state_dict": small_weights()},
        "state_dict",
    ),
    "torchvision": (
        {"model": OTHER, "args": argparse.Namespace(lr=0.1), "epoch": 3}
        | {"model_ema": prefixed("module.") | {"n_averaged": torch.tensor(7)}},
        "model_ema",
    ),
    "timm": (
        {"arch": "small", "state_dict": OTHER, "state_dict_ema": small_weights()}
        | {"args": argparse.Namespace(opt="sgd"), "version": 2, "metric": 71.5},
        "state_dict_ema",
    ),
    "ema": ({"ema": small_weights(), "model": OTHER}, "ema"),
    "no average yet": ({"model": small_weights(), "model_ema": None}, "model"),
    "PyTorch's tutorial": (
        {"model_state_dict": small_weights(), "optimizer_state_dict": {}, "loss": 0.1},
        "model_state_dict",
    ),
    "more than tensors": (small_weights() | {"epoch": 3, "names": ["a"], 5: {"x": 1}}, ""),
}


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize(("content", "part"), FILES.values(), ids=FILES)
def test_state_dicts_of_other_programs(content, part, old_format, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    saved = read_weights(path)
    assert (saved.classes, saved.settings, saved.part) == (None, {}, part)
    model = small_model(2, 32)
    taken = take_weights(model, saved.weights)
    assert taken == "all 9 tensors" + ("; left over: n_averaged ()" if part == "model_ema" else "")
    for name, value in small_weights().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(prefixed("module."), path)
    saved = read_weights(path)
    assert (saved.classes, saved.settings, saved.part) == (None, {}, "")
    assert saved.weights.keys() == small_weights().keys()
    for name, value in small_weights().items():
        assert torch.equal(saved.weights[name], value), name


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError) as caught:
        read_weights(path)
    reason = "the package safetensors is needed: pip install safetensors"
    assert str(caught.value) == f"--init-from {path}: {reason}"


def cut_short(path, kept):
    """A file that ends early."""
    path.write_bytes(path.read_bytes()[:kept])


def write_bad(kind, path, trained):
    """A file of weights that is of no use."""
    if kind == "another model":
        torch.save(torchvision.models.squeezenet1_1(num_classes=2).state_dict(), path)
    elif kind in ("code", "code, nested"):
        bomb = Bomb(path.with_name("exploded"))
        torch.save({"state_dict": bomb} if "nested" in kind else bomb, path)
    elif kind == "a whole model":
        torch.save(small_model(2, 32), path)
    elif kind == "no tensors":
        torch.save({"epoch": 3, "state_dict": {"lr": 0.1}}, path)
    elif kind == "a tensor":
        torch.save(torch.ones(3), path)
    elif kind == "not finite":
        torch.save(small_weights() | {"0.bias": torch.full((4,), math.inf)}, path)
    elif kind == "cut short":
        torch.save(small_weights(), path)
        cut_short(path, 2000)
    elif kind == "safetensors":
        safetensors.torch.save_file(small_weights(), path)
        cut_short(path, path.stat().st_size - 5)
    elif kind == "safetensors' head":
        safetensors.torch.save_file(small_weights(), path)
        cut_short(path, 100)
    elif kind == "a checkpoint":  # which is told from a state dict, whatever is left of its end
        shutil.copy(trained / "last.pt", path)
        cut_short(path, path.stat().st_size - 10)
    elif kind == "a checkpoint's middle":
        content = bytearray((trained / "last.pt").read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("another model", "w.pth", ", for small: only 0 of 8 tensors fit; missing: 0.weight (4, 3"),
        ("code", "w.pt", ": cannot be read: it holds more than plain data: posix.mkdir, which is "),
        ("code, nested", "w.pth", "it holds more than plain data: posix.mkdir, which is not run"),
        ("a whole model", "w.pth", "plain data: torch.nn.modules.container.Sequential, which is "),
        ("no tensors", "w.pth", ": no state dict: it holds no tensors by name"),
        ("a tensor", "w.pth", ": no state dict: it holds no tensors by name"),
        ("not finite", "w.pth", ": 0.bias holds values that are infinite or no numbers: the run "),
        ("cut short", "w.pth", "failed reading zip archive: failed finding central directory"),
        (
            "safetensors",
            "w.safetensors",
            ": cannot be read: not a safetensors file, or cut short: ",
        ),
        ("safetensors' head", "w.safetensors", "not a safetensors file, or cut short: "),
        ("a checkpoint", "w.pt", ": damaged: it does not end with its SHA-256"),
        (
            "a checkpoint's middle",
            "w.pt",
            ": damaged: its SHA-256 is not the one that it ends with",
        ),
        ("nothing", ".", ": cannot be read: Is a directory"),
        ("nothing", "nowhere.safetensors", ": cannot be read: No such file or directory"),
    ],
)
def test_weights_of_no_use_are_one_line(
    kind, name, message, tmp_path, in_tmp, trained, arguments, capsys
):
    path = tmp_path / name
    write_bad(kind, path, trained)
    before = sorted(tmp_path.iterdir())
    assert main([*arguments, "--init-from", str(path), *output(in_tmp / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: --init-from {path}")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before, "no code was run"
    assert not list(in_tmp.iterdir()), "nothing written"


@pytest.mark.parametrize("classes", [2, 3])
def test_a_run_says_what_it_took_from_a_state_dict(in_tmp, arguments, capsys, classes):
    """The classifier too, if it fits: a state dict does not name its classes."""
    torch.save({"model": small_model(classes, 32).state_dict()}, "w.pth")
    options = [*arguments, "--init-from", "w.pth", "--lr", "0", "--no-model-ema", "--steps", "1"]
    assert main([*options, *output(in_tmp / "out")]) == 0
    note = "all 9 tensors; its classes, which it does not name, are taken to be those of the data"
    if classes == 3:
        note = "7 of 9 tensors; new: 6.weight (2, 16), 6.bias (2)"
    assert f"weights from w.pth (model): {note}\n" in capsys.readouterr().out
    state, weights = state_of(in_tmp / "out")["model"], torch.load("w.pth")["model"]
    for name in ("0.weight", "6.weight"):
        kept = name == "0.weight" or classes == 2
        assert (state[name].shape == weights[name].shape) == kept
        assert not kept or torch.equal(state[name], weights[name])


# A teacher


@needs_two_cpus
@pytest.mark.parametrize(
    "settings", [{}, OVERLAP, DELAYED], ids=["sequential", "overlap", "delayed"]
)
def test_a_run_with_a_teacher_goes_on_exactly(in_tmp, monkeypatch, train, trained, settings):
    """It is read anew, and no part of the checkpoint."""
    settings = settings | {"teacher_weights": str(trained / "last.pt"), "teacher_share": 0.7}
    train(in_tmp / "whole", **settings)
    interrupt(monkeypatch, "update", [2, 4])
    for _ in range(2):
        with pytest.raises(Stopped):
            train(in_tmp / "parts", resume=Path("auto"), **settings)
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert_same_result(in_tmp / "parts", in_tmp / "whole")
    state, before = state_of(in_tmp / "whole"), state_of(trained)
    assert state["model"].keys() == before["model"].keys() == state["average"].keys()
    assert len(state["optimizer"]["state"]) == len(before["optimizer"]["state"])
    assert state["flow"]["sums"].keys() == before["flow"]["sums"].keys()
    assert state["settings"]["teacher"] == "small"


def test_a_teacher_changes_what_is_learnt_but_not_how_it_begins(in_tmp, train, trained):
    """No random number is drawn for it; with no share of the target it is as if it were not."""
    teacher = {"teacher": "small", "teacher_weights": str(trained / "last.pt")}
    shares = {"alone": {}, "zero": teacher | {"teacher_share": 0.0}, "half": teacher}
    for name, settings in shares.items():
        train(in_tmp / name, steps=2, **settings)
    alone, zero, half = (state_of(in_tmp / name) for name in shares)
    assert differences(alone, zero) == []
    assert torch.equal(half["random_state"], alone["random_state"])
    assert not torch.equal(half["model"]["0.weight"], alone["model"]["0.weight"])


def test_a_run_says_who_teaches_it(trained, in_tmp, arguments, capsys):
    path = trained / "last.pt"
    options = [*arguments, "--teacher-weights", str(path), "--steps", "1", *output(in_tmp / "out")]
    assert main(options) == 0
    told = f"taught by small, weights {path}: 0.5 of the target\n"
    assert told in capsys.readouterr().out
    in_force = f"teacher small, teacher_weights {path}, teacher_share 0.5"
    assert in_force in (in_tmp / "logs.md").read_text()
    assert main([*options, "--resume", "auto", "--teacher-share", "0.2", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert told.replace("0.5", "0.2") in printed
    assert "--teacher-share 0.5 -> 0.2" in printed


def test_a_teacher_that_is_gone_is_one_line(trained, in_tmp, arguments, capsys):
    path = shutil.copy(trained / "last.pt", in_tmp / "teacher.pt")
    options = [*arguments, "--teacher-weights", str(path), *output(in_tmp / "out")]
    assert main([*options, "--steps", "1"]) == 0
    (in_tmp / "teacher.pt").unlink()
    assert main([*options, "--resume", "auto"]) == 2
    message = f"--teacher-weights {path}: cannot be read: No such file or directory"
    assert capsys.readouterr().err == f"train_split_affinity.py: error: {message}\n"
    evaluated = ["--test-only", "--resume", str(in_tmp / "out/last.pt")]
    assert main([*options, *evaluated]) == 0, "which needs no teacher"


WORDNET = ("n01440764", "n01443537", "n01484850")


def test_a_teacher_of_torchvision_by_name(monkeypatch, one_lane_plan):
    """Whose classes have other names, and images another mean."""
    source, asked = small_model(3, 32), []
    names, native = ("tench", "goldfish", "shark"), Preprocessing(mean=(0.5, 0.5, 0.5))

    def find(*about):
        asked.append(about)
        return Pretrained(names, native, source.state_dict)

    set_everywhere(monkeypatch, "find_weights", find)
    settings = Settings(
        num_classes=3, image_size=32, teacher="small", teacher_weights="DEFAULT", teacher_share=0.3
    )
    settings = dataclasses.replace(settings, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    teacher = build_teacher(settings, WORDNET)
    assert asked == [("small", "DEFAULT", "--teacher-weights")]
    assert (teacher.share, teacher.model.training) == (0.3, False)
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    kinds = {type(each) for each in teacher.model.modules()}
    assert nn.BatchNorm2d not in kinds, "it is folded"
    teacher = build_teacher(dataclasses.replace(settings, fold_norm=False), WORDNET)
    for name, value in source.state_dict().items():
        assert torch.equal(teacher.model.state_dict()[name], value), name
    expected = (torch.tensor(IMAGENET_MEAN) - 0.5) / torch.tensor(IMAGENET_STD)
    assert teacher.scale.flatten().tolist() == pytest.approx([1, 1, 1])
    assert teacher.shift.flatten().tolist() == pytest.approx(expected.tolist())
    with pytest.raises(UserError, match="DEFAULT: its class 0 is tench, not goldfish as in"):
        build_teacher(settings, ("goldfish", "shark", "tench"))


def write_teacher(kind, trained):
    """A file of weights that cannot teach."""
    weights = small_weights()
    if kind == "a checkpoint":
        return str(trained / "last.pt")
    if kind == "three classes":
        weights = small_model(3, 32).state_dict()
    elif kind == "a part":
        del weights["0.bias"]
    elif kind == "another model":
        weights = torchvision.models.squeezenet1_1(num_classes=2).state_dict()
    torch.save(Bomb(Path("exploded")) if kind == "code" else weights, "t.pth")
    return "t.pth"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("a checkpoint", ["--teacher", "resnet18"], "--teacher resnet18: {} was made by small"),
        ("a state dict", [], "--teacher-weights {}: give --teacher too: it names no model"),
        (
            "three classes",
            ["--teacher", "small"],
            "--teacher-weights {}: small knows 3 classes, not 2",
        ),
        (
            "a checkpoint",
            ["--num-classes", "3"],
            "--teacher-weights {}: small knows 2 classes, not 3",
        ),
        (
            "a part",
            ["--teacher", "small"],
            "--teacher-weights {}, small: only 8 of 9 tensors fit; missing: 0.bias (4)",
        ),
        (
            "another model",
            ["--teacher", "small"],
            "--teacher-weights {}, small: only 0 of 8 tensors fit; missing: 0.weight (4, 3, 3, 3), "
            "0.bias (4), 1.weight (4), 1.bias (4) and 4 more; left over: features.0.weight (64, 3, "
            "3, 3), features.0.bias (64), features.3.squeeze.weight (16, 64, 1, 1), "
            "features.3.squeeze.bias (16) and 48 more",
        ),
        (
            "code",
            ["--teacher", "small"],
            "--teacher-weights {}: cannot be read: it holds more than plain data: posix.mkdir, "
            "which is not run",
        ),
    ],
)
def test_a_teacher_that_cannot_teach(kind, options, message, trained, in_tmp, arguments, capsys):
    path = write_teacher(kind, trained)
    before = sorted(in_tmp.iterdir())
    options = [*options, "--teacher-weights", path, *output(in_tmp / "out")]
    assert main([*arguments, *options]) == 2
    error = f"train_split_affinity.py: error: {message.format(path)}\n"
    assert capsys.readouterr().err == error
    assert sorted(in_tmp.iterdir()) == before, "nothing run, nothing written"


def test_a_teacher_of_other_classes(trained, in_tmp, arguments, renamed, capsys):
    """As many of them, under other names."""
    path = trained / "last.pt"
    options = [*arguments, "--data-path", str(renamed), "--teacher-weights", str(path)]
    assert main([*options, *output(in_tmp / "out")]) == 2
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: --teacher-weights {path}: its class 0 is flower, not "
        "temple as in --data-path\n"
    )
    assert not list(in_tmp.iterdir())
