"""Runs that are broken off and go on end as if they had not been.

Run: python -m pytest tests/checkpoints/test_exactness.py
"""

import functools
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from types import NoneType

import pytest
import torch
from places import SCRIPT
from saved_runs import (
    DELAYED,
    NO_MEMORY,
    OVERLAP,
    assert_same_result,
    differences,
    fail_at,
    interrupt,
    kinds,
    output,
    state_of,
    step_of,
    tiny_run,
    tiny_train_state,
)
from small import TINY, needs_two_cpus
from torch import nn

from split_affinity.checkpoints.folder import Checkpoints
from split_affinity.checkpoints.state import Progress
from split_affinity.data.loader import Batches
from split_affinity.errors import RunError, Stopped
from split_affinity.models.own import SmallResNet
from split_affinity.models.registry import OWN_MODELS
from split_affinity.signals import StopRequest
from split_affinity.training.network import Network
from split_affinity.training.update import MovingAverage, TrainState
from train_split_affinity import main

pytestmark = pytest.mark.usefixtures("no_pictures")

DELAYED_2 = {"schedule": "delayed", "accumulate": 2, "batch_size": 2}


# Exactness


@needs_two_cpus
@pytest.mark.parametrize(
    "settings", [{}, OVERLAP, DELAYED, DELAYED_2], ids=["sequential", "overlap", "delayed", "2"]
)
def test_stopped_after_each_step(in_tmp, monkeypatch, train, settings):
    """Every run makes one step; workers are changed from run to run, which must not matter."""
    train(in_tmp / "whole", **settings)
    interrupt(monkeypatch, "update", range(1, 6))
    for run in range(5):
        with pytest.raises(Stopped):
            train(in_tmp / "parts", resume=Path("auto"), workers=run % 2, **settings)
        assert step_of(in_tmp / "parts") == run + 1
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert_same_result(in_tmp / "parts", in_tmp / "whole")


@needs_two_cpus
@pytest.mark.parametrize("decay", [0.9999, 0.3], ids=["rising", "reached"])
@pytest.mark.parametrize(
    "settings", [{}, OVERLAP, DELAYED], ids=["sequential", "overlap", "delayed"]
)
def test_the_decay_of_a_moving_average_goes_on_where_it_was(
    in_tmp, monkeypatch, train, settings, decay
):
    """0.3 is reached by the fourth update: 4/13."""
    train(in_tmp / "whole", model_ema_decay=decay, **settings)
    interrupt(monkeypatch, "update", [2, 4])
    for _ in range(2):
        with pytest.raises(Stopped):
            train(in_tmp / "parts", resume=Path("auto"), model_ema_decay=decay, **settings)
    train(in_tmp / "parts", resume=Path("auto"), model_ema_decay=decay, **settings)
    assert_same_result(in_tmp / "parts", in_tmp / "whole")


def test_stopped_after_the_very_last_step(in_tmp, monkeypatch, train):
    """The last validation is still to come."""
    train(in_tmp / "whole")
    interrupt(monkeypatch, "update", [6])
    with pytest.raises(Stopped):
        train(in_tmp / "parts")
    train(in_tmp / "parts", resume=Path("auto"))
    assert_same_result(in_tmp / "parts", in_tmp / "whole")


@needs_two_cpus
@pytest.mark.parametrize("settings", [{}, DELAYED], ids=["sequential", "delayed"])
@pytest.mark.parametrize(
    ("method", "epochs"), [("evaluate", 0), ("epoch", 1)], ids=["in it", "between two epochs"]
)
def test_stopped_around_a_validation(in_tmp, monkeypatch, train, settings, method, epochs):
    train(in_tmp / "whole", **settings)
    interrupt(monkeypatch, method, [1])
    with pytest.raises(Stopped):
        train(in_tmp / "parts", **settings)
    progress = state_of(in_tmp / "parts")["progress"]
    assert (progress["step"], progress["epoch"]) == (3, epochs)
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert differences(state_of(in_tmp / "parts"), state_of(in_tmp / "whole")) == []


@pytest.mark.slow
@needs_two_cpus
@pytest.mark.parametrize(
    ("model", "settings"),
    [("squeezenet1_1", OVERLAP), ("squeezenet1_1", DELAYED), ("resnet18", DELAYED)],
)
def test_models_of_torchvision(in_tmp, monkeypatch, train, model, settings):
    settings = settings | {"model": model, "epochs": 1, "lr_warmup_epochs": 0, "model_ema": False}
    train(in_tmp / "whole", **settings)
    interrupt(monkeypatch, "update", [2])
    with pytest.raises(Stopped):
        train(in_tmp / "parts", **settings)
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert_same_result(in_tmp / "parts", in_tmp / "whole")


FROZEN = {"model": "blocks", "freeze": "stem,stage1", "freeze_epochs": 1, "stochastic_depth": 0.5}


@pytest.fixture
def blocks(monkeypatch):
    """`--model blocks`: a ResNet of three blocks."""
    make = functools.partial(SmallResNet, blocks=1)
    monkeypatch.setitem(OWN_MODELS, "blocks", lambda num_classes, image_size: make(num_classes))


@needs_two_cpus
@pytest.mark.parametrize(
    "schedule",
    [{"split": "none"}, {}, OVERLAP, DELAYED],
    ids=["none", "sequential", "overlap", "delayed"],
)
@pytest.mark.parametrize(("opt", "model_ema"), [("sgd", True), ("adamw", False)])
def test_stopped_before_at_and_after_a_thaw(
    in_tmp, monkeypatch, train, blocks, schedule, opt, model_ema
):
    """At it twice: before and after the validation of the frozen epoch."""
    settings = FROZEN | schedule | {"opt": opt, "model_ema": model_ema}
    train(in_tmp / "whole", **settings)
    interrupt(monkeypatch, "update", [1, 3, 4])
    interrupt(monkeypatch, "epoch", [1])
    for step in (1, 3, 3, 4):
        with pytest.raises(Stopped):
            train(in_tmp / "parts", resume=Path("auto"), **settings)
        assert step_of(in_tmp / "parts") == step
        held = state_of(in_tmp / "parts")["optimizer"]["state"]
        assert len(held) == (14 if step < 4 else 23), "nothing of what is frozen"
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert_same_result(in_tmp / "parts", in_tmp / "whole")


@pytest.mark.parametrize("opt", ["sgd", "rmsprop", "nadam"])
def test_frozen_from_beginning_to_end(in_tmp, monkeypatch, train, blocks, opt):
    settings = FROZEN | {"freeze_epochs": None, "freeze": "body", "opt": opt}
    train(in_tmp / "whole", **settings)
    interrupt(monkeypatch, "update", [2, 4])
    for _ in range(2):
        with pytest.raises(Stopped):
            train(in_tmp / "parts", resume=Path("auto"), **settings)
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert_same_result(in_tmp / "parts", in_tmp / "whole")
    torch.manual_seed(0)
    begun = SmallResNet(2, blocks=1).state_dict()
    for part in ("model", "average"):
        values = state_of(in_tmp / "parts")[part]
        for name, value in begun.items():
            assert torch.equal(value, values[name]) == (not name.startswith("fc.")), name


@needs_two_cpus
@pytest.mark.parametrize("schedule", [{}, DELAYED], ids=["sequential", "delayed"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"freeze": "stem"}, {}),
        ({"freeze": "stem"}, {"freeze": "stage3,stem"}),
        ({}, {"freeze": "body"}),
        ({}, {"freeze": "stage1", "freeze_epochs": 1}),
    ],
)
def test_what_is_frozen_may_change_when_a_run_is_resumed(
    in_tmp, monkeypatch, train, blocks, capsys, schedule, first, then
):
    interrupt(monkeypatch, "update", [2])
    with pytest.raises(Stopped):
        train(in_tmp / "out", model="blocks", **schedule, **first)
    before = state_of(in_tmp / "out")["model"]
    train(in_tmp / "out", model="blocks", resume=Path("auto"), **schedule, **then)
    after = state_of(in_tmp / "out")["model"]
    stays = {name.partition(".")[0] for name in before if torch.equal(before[name], after[name])}
    expected = {"body": {"stem", "stage1", "stage2", "stage3"}, "stage3,stem": {"stem", "stage3"}}
    assert stays == expected.get(then.get("freeze"), set())
    told = f"--freeze {first.get('freeze')} -> {then.get('freeze')}"
    assert f"numbers can differ from those of an unbroken run: {told}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"opt": "adam", "lr_scheduler": "onecycle", "lr_warmup_epochs": 0},
        {"opt": "adamw", "lr_scheduler": "warm-restarts", "lr_restart_epochs": 1},
        {"opt": "nadam", "lr_body_factor": 0.1, "min_lr": 0.01},
        {
            "opt": "rmsprop",
            "lr_body_factor": 0.5,
            "lr_scheduler": "onecycle",
            "lr_warmup_epochs": 0,
        },
        {"skip_decay_1d": True, "lr_scheduler": "multistep", "lr_milestones": (2,)},
        {"momentum": 0.0, "lr_scheduler": "step", "lr_step_epochs": 1, "model_ema": False},
        {"split": "none", "epochs": None, "steps": 5, "lr_warmup_epochs": 0},
    ],
    ids=["adam", "adamw", "nadam", "rmsprop", "multistep", "step", "one lane, steps"],
)
def test_optimizers_and_courses_of_the_rate(in_tmp, monkeypatch, train, settings):
    train(in_tmp / "whole", **settings)
    interrupt(monkeypatch, "update", [2, 4])
    for _ in range(2):
        with pytest.raises(Stopped):
            train(in_tmp / "parts", resume=Path("auto"), **settings)
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert_same_result(in_tmp / "parts", in_tmp / "whole")
    plain = {dict, OrderedDict, Counter, list, tuple, torch.Tensor, str, int, float, bool, NoneType}
    for name in ("last.pt", "previous.pt"):
        assert kinds(state_of(in_tmp / "parts", name)) <= plain


@needs_two_cpus
def test_what_delayed_has_begun_is_forgotten_by_another_schedule(in_tmp, monkeypatch, train):
    interrupt(monkeypatch, "update", [1, 2])
    with pytest.raises(Stopped):
        train(in_tmp / "out", schedule="delayed")
    assert state_of(in_tmp / "out")["ahead"] is not None
    with pytest.raises(Stopped):
        train(in_tmp / "out", schedule="sequential", resume=Path("auto"))
    assert state_of(in_tmp / "out")["ahead"] is None


@needs_two_cpus
@pytest.mark.parametrize(
    "settings", [{}, OVERLAP, DELAYED, DELAYED_2], ids=["sequential", "overlap", "delayed", "2"]
)
@pytest.mark.parametrize(
    ("owner", "name", "share", "step"),
    [
        (Network, "forward", 0.5, 2),
        (Network, "backward", 0.5, 2),
        (Network, "backward", 1, 5),
        (TrainState, "update", 1, 4),
        (nn.utils, "clip_grad_norm_", 1, 1),
        (Network, "step_end", 1, 2),
        (TrainState, "evaluate", 1, 3),
        (Batches, "__next__", 0.5, 3),
    ],
)
def test_what_an_error_interrupts_is_saved_as_it_was_between_two_steps(
    in_tmp, train, settings, owner, name, share, step
):
    """Without any save before it, and wherever it comes; `share` of a step's calls succeed."""
    train(in_tmp / "whole", **settings)
    per_step = (
        1
        if name in ("update", "clip_grad_norm_", "step_end")
        else 12 // (3 * settings.get("batch_size", 4))
    )
    call = 1 if name == "evaluate" else math.ceil((step + share) * per_step)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, owner, name, call, NO_MEMORY)
        with pytest.raises(RuntimeError, match="can't allocate"):
            train(in_tmp / "parts", **settings)
    assert 0 < step_of(in_tmp / "parts") < 6
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert_same_result(in_tmp / "parts", in_tmp / "whole")


def test_an_update_that_is_broken_off_is_not_saved(in_tmp, monkeypatch, capsys, train):
    """Nobody can tell which weights are old and which are new."""
    train(in_tmp / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, MovingAverage, "update", 5, MemoryError())
        with pytest.raises(MemoryError):
            train(in_tmp / "parts", save_steps=3)
    reason = "last.pt: not saved: an error broke off the update of the weights; earlier checkpoints"
    assert reason in capsys.readouterr().err
    assert step_of(in_tmp / "parts") == 3, "step 4 is lost"
    train(in_tmp / "parts", resume=Path("auto"))
    assert differences(state_of(in_tmp / "parts"), state_of(in_tmp / "whole")) == []


def test_an_error_in_the_first_step_leaves_no_checkpoint(in_tmp, monkeypatch, train):
    """A new run is the same."""
    fail_at(monkeypatch, Network, "backward", 1, NO_MEMORY)
    with pytest.raises(RuntimeError, match="can't allocate"):
        train(in_tmp / "out")
    assert not list((in_tmp / "out").glob("*.pt*"))


@needs_two_cpus
@pytest.mark.parametrize("settings", [{}, DELAYED], ids=["sequential", "delayed"])
def test_an_error_right_after_a_run_was_resumed(in_tmp, monkeypatch, train, settings):
    """In a step of which nothing has been updated yet, in another folder."""
    train(in_tmp / "whole", **settings)
    interrupt(monkeypatch, "update", [2])
    with pytest.raises(Stopped):
        train(in_tmp / "first", **settings)
    with monkeypatch.context() as patch:
        fail_at(patch, Network, "backward", 1, NO_MEMORY)
        with pytest.raises(RuntimeError, match="can't allocate"):
            train(in_tmp / "parts", resume=in_tmp / "first/last.pt", **settings)
    assert differences(state_of(in_tmp / "parts"), state_of(in_tmp / "first")) == []
    train(in_tmp / "parts", resume=Path("auto"), **settings)
    assert differences(state_of(in_tmp / "parts"), state_of(in_tmp / "whole")) == []


@needs_two_cpus
@pytest.mark.parametrize("settings", [{}, OVERLAP, DELAYED], ids=["1", "overlap", "delayed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_costs_no_step(in_tmp, train, pictures, tmp_path, settings, workers):
    """Gone on with more of them allowed, or with the file repaired."""
    broken = shutil.copytree(pictures, tmp_path / "broken")
    path = broken / "train/temple/0003.jpg"
    whole_file = path.read_bytes()
    path.write_bytes(b"no picture")
    asked = settings | {"workers": workers}
    train(in_tmp / "allowed", data_path=broken, max_bad_images=1, **asked)
    for name in ("goes on", "repaired"):
        with pytest.raises(RunError, match=f"broken image {path}"):
            train(in_tmp / name, data_path=broken, max_bad_images=0, **asked)
    again = asked | {"resume": Path("auto"), "data_path": broken}
    train(in_tmp / "goes on", max_bad_images=1, **again)
    assert_same_result(in_tmp / "goes on", in_tmp / "allowed")
    path.write_bytes(whole_file)
    train(in_tmp / "repaired", **again)
    train(in_tmp / "whole", **asked)
    assert_same_result(in_tmp / "repaired", in_tmp / "whole")


def test_a_run_that_diverged_is_not_saved(in_tmp, train):
    with pytest.raises(RunError, match="try a lower --lr"):
        train(in_tmp / "out", lr=1e30, lr_warmup_epochs=0, clip_grad_norm=0.0)
    assert not list((in_tmp / "out").glob("*.pt*"))


def test_weights_that_are_no_numbers_do_not_take_the_place_of_good_ones(tmp_path):
    warnings = []
    checkpoints = Checkpoints(tiny_run(tmp_path), warnings.append)
    checkpoints.save(tiny_train_state(), Progress(step=1))
    for step, value in ((2, math.inf), (3, math.nan)):
        train_state = tiny_train_state()
        train_state.network.model.bias.data[1] = value
        checkpoints.save(train_state, Progress(step=step))
        assert "last.pt: not saved: model.bias holds values that are infinite or" in warnings.pop()
    assert step_of(tmp_path) == 1


# Signals


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    in_tmp, monkeypatch, capsys, arguments, signum, code
):
    interrupt(monkeypatch, "backward", [2], signum)
    assert main([*arguments, *output(in_tmp / "out")]) == code
    assert capsys.readouterr().err.endswith(f"train_split_affinity.py: stopped by {signum.name}\n")
    assert step_of(in_tmp / "out") == 2
    assert main([*arguments, *output(in_tmp / "out"), "--resume", "auto"]) == 0
    resumed = f"resumed from {in_tmp / 'out/last.pt'}, after step 2\n"
    assert resumed in capsys.readouterr().out
    assert step_of(in_tmp / "out") == 6


def test_a_second_signal_would_end_the_process_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert signal.getsignal(signum) == signal.SIG_DFL
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()


def test_a_hangup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_killed_outright(in_tmp):
    """The line of a step is printed right before its save."""
    options = [*TINY, "--steps", "4", "--save-steps", "1", "--print-freq", "1"]
    assert main([*options, *output(in_tmp / "whole")]) == 0
    with subprocess.Popen(
        [sys.executable, SCRIPT, *options, *output(in_tmp / "out")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("step 2/4"):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    assert main([*options, *output(in_tmp / "out"), "--resume", "auto"]) == 0
    assert differences(state_of(in_tmp / "out"), state_of(in_tmp / "whole")) == []
