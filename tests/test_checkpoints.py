"""Checkpoints and resuming. Run: python -m pytest tests/test_checkpoints.py"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from types import NoneType

import fsspec
import pytest
import safetensors.torch
import torch
import torchvision
from cifar import accept, make_cifar_digits
from conftest import TINY, needs_two_cpus, read_metrics, small_model
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from kill import differing
from patching import set_everywhere
from torch import nn

import train_split_affinity as script
from split_affinity.checkpoints.folder import Checkpoints, Mirror
from split_affinity.checkpoints.resume import check_resumable, defaults_to_go_on, saved_defaults
from split_affinity.checkpoints.state import (
    CHECKPOINT_FORMAT,
    SEAL_BYTES,
    BadCheckpoint,
    Progress,
    asked_again,
    make_state,
    preprocessing_of,
    read_checkpoint,
    restore_state,
    saved_settings,
    seal,
    settings_to_go_on,
    versions,
)
from split_affinity.data.dataset import describe_images, open_data
from split_affinity.data.loader import Batches
from split_affinity.data.named import CIFAR10, CIFAR10_MEAN, CIFAR10_STD
from split_affinity.errors import RunError, Stopped, UserError
from split_affinity.files import LOCK, append_text, lock_folder, read_text, write_whole
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.models.own import SmallResNet
from split_affinity.models.pretrained import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Pretrained
from split_affinity.models.registry import OWN_MODELS
from split_affinity.models.weights import take_weights
from split_affinity.options.recipes import RECIPES
from split_affinity.options.settings import Settings, plain_settings
from split_affinity.reports.log import LogSection
from split_affinity.reports.run_report import RunReport
from split_affinity.reports.timeline import new_figure, save_figure
from split_affinity.runs import evaluation
from split_affinity.runs.starting_weights import build_teacher, read_weights
from split_affinity.training.network import Network
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.steps import StopRequest
from split_affinity.training.update import MovingAverage, Work
from train_split_affinity import main

OVERLAP = {"schedule": "overlap", "accumulate": 2, "batch_size": 2}
DELAYED = {"schedule": "delayed"}
DELAYED_2 = {"schedule": "delayed", "accumulate": 2, "batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """`--model small`, and no pictures: drawing them takes longer than the runs of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OWN_MODELS, "small", small_model)
        for name in ("draw_timelines", "draw_curves", "draw_gradients"):
            set_everywhere(patch, name, lambda *args: None)
        yield


@pytest.fixture(scope="module")
def pictures(photos, tmp_path_factory):
    """An image folder with 12 images to train on, and the same ones to validate."""
    root = tmp_path_factory.mktemp("pictures")
    for part in ("train", "val"):
        shutil.copytree(photos / "train", root / part)
    return root


@pytest.fixture
def train(pictures):
    """Runs of two epochs with three steps each, of which the first epoch is the warm-up."""

    def run(folder, **settings):
        chosen = Settings(
            **{
                "model": "small",
                "data_path": pictures,
                "image_size": 32,
                "batch_size": 4,
                "workers": 0,
                "epochs": 2,
                "lr": 0.05,
                "lr_scheduler": "cosine",
                "lr_warmup_epochs": 1,
                "model_ema": True,
                "model_ema_decay": 0.9,
                "mixup_alpha": 0.2,
                "clip_grad_norm": 1.0,
                "output_dir": folder,
                "log_file": folder.parent / "logs.md",
            }
            | settings
        )
        topology = read_topology()
        return script.train(chosen, topology, plan_cores(topology, chosen))

    return run


@pytest.fixture(scope="module")
def arguments(pictures):
    """The same as `train`, for the command line."""
    options = "--model small --image-size 32 -b 4 -j 0 --epochs 2 --lr 0.05 --model-ema"
    return [*options.split(), "--data-path", str(pictures)]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """The output folder of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    assert main([*arguments, *output(folder)]) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(trained, tmp_path / "copied")


def output(folder):
    return ["--output-dir", str(folder), "--log-file", str(folder.parent / "logs.md")]


def interrupt(monkeypatch, method, calls, signum=signal.SIGTERM):
    """Signal this process in those calls of a method, counted from 1 over all runs."""
    kinds = Network, Work, RunReport
    kind = next(kind for kind in kinds if hasattr(kind, method))
    real, count = getattr(kind, method), itertools.count(1)

    def interrupted(self, *args):
        if next(count) in calls:
            os.kill(os.getpid(), signum)
        return real(self, *args)

    monkeypatch.setattr(kind, method, interrupted)


def differences(first, second):
    """Where two states differ; settings, in force and asked for, and versions do not count."""
    parts = (first.keys() | second.keys()) - {"settings", "asked", "versions"}
    return [path for part in parts for path in differing(first[part], second[part], part)]


def kinds(value):
    """The types of a nested structure."""
    inner = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, (dict, list, tuple))
    return {type(value)}.union(*map(kinds, inner if nested else ()))


def state_of(folder, name="last.pt"):
    return read_checkpoint(folder / name)


def step_of(folder, name="last.pt"):
    return state_of(folder, name)["progress"]["step"]


def metrics(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["type"] == kind]


def assert_same_result(folder, whole):
    """Two runs ended in the same state, and every step was made once, with the same loss."""
    assert differences(state_of(folder), state_of(whole)) == []
    for kind, figure in (("step", "loss"), ("epoch", "val_loss")):
        ours, theirs = ([line[figure] for line in metrics(each, kind)] for each in (folder, whole))
        assert ours == theirs


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


# Errors


def fail_at(patch, owner, name, call, error):
    """Have a function raise in one call, counted from 1, before it does anything."""
    real, count = getattr(owner, name), itertools.count(1)

    def failing(*args, **options):
        if next(count) == call:
            raise error
        return real(*args, **options)

    patch.setattr(owner, name, failing)


NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")


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
        (Work, "update", 1, 4),
        (nn.utils, "clip_grad_norm_", 1, 1),
        (Network, "step_end", 1, 2),
        (Work, "evaluate", 1, 3),
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
            train(in_tmp / name, data_path=broken, **asked)
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
    checkpoints = Checkpoints(Settings(output_dir=tmp_path), warnings.append)
    checkpoints.save(tiny_work(), Progress(step=1))
    for step, value in ((2, math.inf), (3, math.nan)):
        work = tiny_work()
        work.network.model.bias.data[1] = value
        checkpoints.save(work, Progress(step=step))
        assert "last.pt: not saved: bias holds values that are infinite or no" in warnings.pop()
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


def test_killed_outright(in_tmp):
    """The line of a step is printed right before its save."""
    options = [*TINY, "--steps", "4", "--save-steps", "1", "--print-freq", "1"]
    assert main([*options, *output(in_tmp / "whole")]) == 0
    with subprocess.Popen(
        [sys.executable, script.__file__, *options, *output(in_tmp / "out")],
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


# Killed inside a save


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it reaches the disk."""


def kill_at(patch, operation):
    """Kill this process, as far as the disk can tell, at the n-th thing that is done to files;
    what torch saves then is written by half.
    """
    left = itertools.count(operation - 1, -1)

    def mortal(real, last_words=None):
        def call(*args):
            remaining = next(left)
            if remaining == 0 and last_words:
                last_words(*args)
            if remaining <= 0:
                raise Killed
            return real(*args)

        return call

    def half(state, file):
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])

    save = torch.save
    patch.setattr(torch, "save", mortal(save, half))
    for name in ("fsync", "replace", "rename", "unlink", "link"):
        patch.setattr(os, name, mortal(getattr(os, name)))


def work_on(model):
    network = Network(model, nn.CrossEntropyLoss())
    return Work(network, torch.optim.SGD(model.parameters(), 0.1))


def tiny_work():
    return work_on(nn.Linear(3, 2))


def save_epochs(checkpoints, progress, top1):
    """Save the ends of epochs of ten steps with those accuracies."""
    for value in top1:
        progress.step += 10
        progress.end_epoch({"val_top1": value}, 2)
        checkpoints.save(tiny_work(), progress)
    return progress


def at_each_operation(tmp_path, prepare, save):
    """Yield the folder that a kill at each operation of a save leaves, until none is left to do."""
    for operation in itertools.count(1):
        folder = tmp_path / str(operation)
        folder.mkdir()
        checkpoints = Checkpoints(Settings(output_dir=folder, keep_best=2), pytest.fail)
        progress = prepare(checkpoints)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, operation)
            try:
                save(checkpoints, progress)
            except Killed:
                pass
            else:
                assert operation > 4
                return
        yield folder


def test_killed_at_any_moment_of_a_save(tmp_path):
    """Epochs 1 and 2 are saved whole, and epoch 3, the best, by a process that is killed."""

    def prepare(checkpoints):
        return save_epochs(checkpoints, Progress(), [50.0, 40.0])

    def save(checkpoints, progress):
        save_epochs(checkpoints, progress, [60.0])

    seen = set()
    for folder in at_each_operation(tmp_path, prepare, save):
        for path in folder.glob("*.pt"):
            read_checkpoint(path)
        warnings = []
        checkpoints = Checkpoints(Settings(output_dir=folder, keep_best=2), warnings.append)
        path, state = checkpoints.newest_good()
        seen.add((path.name, state["progress"]["step"]))
        progress = Progress(**state["progress"])
        progress.step += 1
        progress.batches = 1
        checkpoints.save(tiny_work(), progress)
        assert step_of(folder) == state["progress"]["step"] + 1, "what is left does not disturb"
        assert warnings == []
    assert seen == {("last.pt", 20), ("previous.pt", 20), ("last.pt", 30)}


def test_killed_at_any_moment_of_the_save_after_a_damaged_one(tmp_path):
    """The good one before it must not be given up before there is a new one."""

    def prepare(checkpoints):
        for step in (1, 2):
            checkpoints.save(tiny_work(), Progress(step=step))
        (checkpoints.folder / "last.pt").write_bytes(b"damaged")
        return Progress(step=2)

    def save(checkpoints, progress):
        checkpoints.save(tiny_work(), Progress(step=3))

    for folder in at_each_operation(tmp_path, prepare, save):
        checkpoints = Checkpoints(Settings(output_dir=folder), lambda text: None)
        assert checkpoints.newest_good()[1]["progress"]["step"] in (1, 3)


def test_names_that_a_kill_kept_from_being_given(in_tmp, monkeypatch, train):
    """Epoch 1 is the best one, and its file is what a run of weeks is made for."""
    with monkeypatch.context() as patch:
        set_everywhere(patch, "link_file", functools.partial(raise_, Killed()))
        with pytest.raises(Killed):
            train(in_tmp / "out", save_freq=1)
    assert [path.name for path in (in_tmp / "out").glob("*.pt")] == ["last.pt"]
    interrupt(monkeypatch, "update", [1])
    with pytest.raises(Stopped):
        train(in_tmp / "out", save_freq=1, resume=Path("auto"))
    for name in ("best.pt", "best-0001.pt", "epoch-0001.pt"):
        assert step_of(in_tmp / "out", name) == 3


def raise_(error, *args, **options):
    raise error


# Disks that take no more


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    warnings = []
    checkpoints = Checkpoints(Settings(output_dir=tmp_path), warnings.append)
    for step in (1, 2):
        checkpoints.save(tiny_work(), Progress(step=step))
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    checkpoints.save(tiny_work(), Progress(step=3))
    assert warnings == [
        f"{tmp_path / 'last.pt'}: not saved: No space left on device; earlier checkpoints "
        "are untouched"
    ]
    assert (step_of(tmp_path), step_of(tmp_path, "previous.pt")) == (2, 1)
    assert not list(tmp_path.glob("*.tmp"))
    checkpoints.save(tiny_work(), Progress(step=3))
    assert (step_of(tmp_path), step_of(tmp_path, "previous.pt")) == (3, 2)


def patch_from_epoch_2(monkeypatch, patch, owner, error):
    """Have a function fail once the second epoch is finished: `patch` puts another in its place."""
    finish_epoch = evaluation.finish_epoch

    def finish(run, progress, report):
        finish_epoch(run, progress, report)
        if progress.epoch == 2:
            patch(*owner, functools.partial(raise_, error))

    set_everywhere(monkeypatch, "finish_epoch", finish)


@pytest.mark.parametrize(
    ("broken", "number", "reason"),
    [
        ("fsync", errno.EIO, "Input/output error"),
        ("save", errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_fails_while_the_run_goes_on(
    in_tmp, monkeypatch, capsys, arguments, broken, number, reason
):
    error = OSError(number, os.strerror(number))
    owner = os if broken == "fsync" else torch, broken
    patch_from_epoch_2(monkeypatch, monkeypatch.setattr, owner, error)
    assert main([*arguments, *output(in_tmp / "out")]) == 0
    captured = capsys.readouterr()
    assert f"last.pt: not saved: {reason}; earlier checkpoints are untouched" in captured.err
    assert "finished after 6 of 6 steps" in captured.out
    assert step_of(in_tmp / "out") == 3
    assert step_of(in_tmp / "out", "best.pt") == 3


def test_a_name_that_cannot_be_given_is_told(in_tmp, monkeypatch, capsys, arguments):
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    patch = functools.partial(set_everywhere, monkeypatch)
    patch_from_epoch_2(monkeypatch, patch, ["link_file"], error)
    options = [*arguments, *output(in_tmp / "out"), "--keep-best", "2"]
    assert main(options) == 0
    told = capsys.readouterr().err
    assert step_of(in_tmp / "out") == 6
    assert "best-0002.pt" in told
    assert "Disk quota exceeded" in told
    assert "last.pt: not saved" not in told


def test_a_written_file_that_reads_differently_is_not_kept(tmp_path, monkeypatch):
    """What the disk made of it is looked at before the name is given."""
    warnings = []
    checkpoints = Checkpoints(Settings(output_dir=tmp_path), warnings.append)
    checkpoints.save(tiny_work(), Progress(step=1))
    fsync = os.fsync

    def forgetful(descriptor):
        os.pwrite(descriptor, bytes(100), 100)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", forgetful)
    checkpoints.save(tiny_work(), Progress(step=2))
    assert len(warnings) == 1
    assert "last.pt: not saved: " in warnings[0]
    assert "damaged" in warnings[0]
    assert os.listdir(tmp_path) == ["last.pt"]
    assert step_of(tmp_path) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB; unmounted in the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk):
    """Leave a disk no room at all."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def test_a_disk_that_fills_up(small_disk, capsys):
    """There is room for three checkpoints of 5.8 MB, and from step 5 on for two."""
    options = [*TINY, "--save-steps", "1", "--log-file", str(small_disk.parent / "logs.md")]
    options += ["--output-dir", str(small_disk / "out")]
    assert main([*options, "--steps", "4"]) == 0
    assert capsys.readouterr().err == ""
    (small_disk / "filler").write_bytes(bytes(8_000_000))
    options += ["--steps", "8", "--resume", "auto"]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert captured.err.count("last.pt: not saved: ") == 5, "after each step, and in the end"
    assert captured.err.count("; earlier checkpoints are untouched\n") == 5
    assert "finished after 8 of 8 steps" in captured.out
    assert step_of(small_disk / "out") == 4
    assert step_of(small_disk / "out", "previous.pt") == 3
    (small_disk / "filler").unlink()
    assert main(options) == 0
    assert step_of(small_disk / "out") == 8


def test_a_full_disk_is_called_full(small_disk):
    """torch's own message, of a larger file, is of unexpected positions."""
    (small_disk / "filler").write_bytes(bytes(20_000_000))
    warnings = []
    work = work_on(nn.Linear(2000, 1000))
    Checkpoints(Settings(output_dir=small_disk), warnings.append).save(work, Progress(step=1))
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_takes_nothing_at_all(small_disk, monkeypatch, capsys, arguments, trouble):
    """Not even a line of metrics: going on or not, the run says why, and loses nothing."""
    folder = small_disk / "out"
    options = [*arguments, "--output-dir", str(folder), "--save-steps", "1"]
    options += ["--log-file", str(small_disk.parent / "logs.md")]
    update, steps = Work.update, itertools.count(1)

    def spoil(self, *args):
        if next(steps) == 3:
            if trouble == "full":
                fill(small_disk)
            else:
                for kind in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
                    subprocess.run(["mount", *kind, str(folder)], check=True)
        update(self, *args)

    monkeypatch.setattr(Work, "update", spoil)
    main(options)
    if trouble == "read-only":
        subprocess.run(["umount", str(folder)], check=True)
    reason = "No space left" if trouble == "full" else "Read-only file system"
    assert reason in capsys.readouterr().err
    assert (step_of(folder), step_of(folder, "previous.pt")) == (2, 1)


def picture(path):
    figure = new_figure(4, 4)
    figure.subplots().plot(range(9))
    save_figure(figure, path)


WRITERS = {
    "whole.png": picture,
    "whole.json": lambda path: write_whole(path, "text" * 3000),
    "appended.md": lambda path: append_text(path, "text" * 3000, "header"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_has_whole_files_or_none(small_disk, name):
    """What was there before stays, though its room would do for a part of the new file."""
    (small_disk / "earlier").mkdir()
    earlier = small_disk / "earlier" / name
    earlier.write_text("earlier")
    fill(small_disk)
    for path in (small_disk / name, earlier):
        with pytest.raises(RunError, match=f"{path}: cannot be written: No space left"):
            WRITERS[name](path)
    assert earlier.read_text() == "earlier"
    left = {path.name: path.stat().st_size for path in small_disk.iterdir()}
    assert left.pop(name, 0) == 0 if name == "appended.md" else name not in left
    assert left.keys() == {"earlier", "filler"}
    assert [path.name for path in earlier.parent.iterdir()] == [name]
    (small_disk / "filler").unlink()
    WRITERS[name](earlier)
    assert earlier.stat().st_size > 4096


def test_a_full_disk_leaves_the_log_as_it_was(small_disk):
    path = small_disk / "logs.md"
    log = LogSection(path, "\n## heading\n\n", True)
    log.begin()
    log.add_epoch("epoch: 1")
    before = path.read_text()
    fill(small_disk)
    with pytest.raises(RunError, match=f"{path}: cannot be written: No space left"):
        log.add_epoch("x" * 9000)
    assert path.read_text() == before
    (small_disk / "filler").unlink()
    log.add_epoch("epoch: 2")
    log.end("ended\n")
    assert path.read_text().endswith("\n```\nepoch: 1\nepoch: 2\n```\n\nended\n")


def test_the_report_of_a_run_on_a_full_disk(small_disk, monkeypatch, capsys):
    folder, finish = small_disk / "out", RunReport.finish
    folder.mkdir()
    for name in ("timeline.png", "trace.json"):
        (folder / name).write_text("earlier")
    monkeypatch.setattr(RunReport, "finish", lambda *args: (fill(small_disk), finish(*args)))
    set_everywhere(monkeypatch, "draw_timelines", lambda path, *_: picture(path))
    options = ["--log-file", str(small_disk.parent / "logs.md"), "--output-dir", str(folder)]
    assert main([*TINY, "--steps", "8", *options]) == 0
    error = capsys.readouterr().err
    for name in ("timeline.png", "trace.json"):
        assert f"warning: {folder / name}: cannot be written: No space left on device\n" in error
        assert (folder / name).read_text() == "earlier"
    names = {path.name for path in folder.iterdir()}
    assert names == {"last.pt", "metrics.jsonl", "timeline.png", "trace.json"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "c.json", tmp_path / "elsewhere/file"
    link.symlink_to("elsewhere/file")
    for text in ("new", "newer"):
        write_whole(link, text)
        assert (link.is_symlink(), file.read_text()) == (True, text)
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_pipe_is_written_to():
    reading, writing = os.pipe()
    write_whole(Path(f"/dev/fd/{writing}"), "text\n")
    assert os.read(reading, 100) == b"text\n"
    os.close(reading)
    os.close(writing)


# Damaged and foreign files


def saved_by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def plain_zip(good):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    return file.getvalue()


def sealed(content):
    return content + seal(hashlib.sha256(content))


def changed_state(good, change):
    """A checkpoint with another content, as sound as any."""
    state = torch.load(io.BytesIO(good), weights_only=True)
    change(state)
    return sealed(saved_by_torch(state))


def flipped(content, position, bit):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def other_bit(part):
    """Change the lowest bit of the byte that comes after those bytes."""
    return lambda good: flipped(good, good.index(part) + len(part), 0)


def bit_of_a_weight(good):
    weight = torch.load(io.BytesIO(good), weights_only=True)["model"]["1.running_mean"]
    return other_bit(weight.numpy().tobytes()[:-1])(good)


def folder_for_a_weight(good):
    """In the archive's directory, call the entry with a weight's values a folder. The archive's own
    checksums still fit, and torch.load gives a tensor of whatever its memory held before.
    """
    entry = good.index(b"/data/0", good.index(b"PK\x01\x02")) - len("archive")
    damaged = flipped(good, entry - 8, 4)
    assert zipfile.ZipFile(io.BytesIO(damaged)).testzip() is None
    assert list(torch.load(io.BytesIO(damaged), weights_only=True)) == list(
        torch.load(io.BytesIO(good), weights_only=True)
    )
    return damaged


DAMAGES = {
    "empty": lambda good: b"",
    "one byte": lambda good: good[:1],
    "cut in half": lambda good: good[: len(good) // 2],
    "cut at the end": lambda good: good[:-1],
    "garbage": lambda good: b"no checkpoint " * 1000,
    "zeros": lambda good: bytes(len(good)),
    "a bit of the format": other_bit(b"train_split"),
    "a bit of a number": other_bit(b"loss_sum"),
    "a bit of a weight": bit_of_a_weight,
    "a bit of the archive's directory": folder_for_a_weight,
    "a bit of the seal": lambda good: flipped(good, len(good) - 10, 0),
    "no seal": lambda good: good[:-SEAL_BYTES],
    "a seal alone": lambda good: sealed(b""),
    "weights alone": lambda good: saved_by_torch(nn.Linear(2, 2).state_dict()),
    "sealed weights": lambda good: sealed(saved_by_torch(nn.Linear(2, 2).state_dict())),
    "a tensor": lambda good: sealed(saved_by_torch(torch.zeros(3))),
    "a whole model": lambda good: sealed(saved_by_torch(nn.Linear(2, 2))),
    "a class": lambda good: sealed(saved_by_torch({"format": CHECKPOINT_FORMAT, "path": Path()})),
    "a zip file": plain_zip,
    "a sealed zip file": lambda good: sealed(plain_zip(good)),
    "a pickle": lambda good: sealed(pickle.dumps({"format": CHECKPOINT_FORMAT}, 2)),
    "another format": lambda good: sealed(saved_by_torch({"format": "train_split_affinity 2"})),
    "a missing key": lambda good: changed_state(good, lambda state: state.pop("optimizer")),
    "an unknown key": lambda good: changed_state(good, lambda state: state.update(later=1)),
    "progress with a missing key": lambda good: changed_state(
        good, lambda state: state["progress"].pop("loss_sum")
    ),
    "progress with an unknown key": lambda good: changed_state(
        good, lambda state: state["progress"].update(later=1)
    ),
    "no progress": lambda good: changed_state(good, lambda state: state.update(progress=None)),
    "a weight that is no number": lambda good: changed_state(
        good, lambda state: state["model"]["0.weight"][3, 2, 1].fill_(math.nan)
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files(copied, damage):
    """Named in one line; under auto the one before it is used."""
    bad = copied / "last.pt"
    content = damage(bad.read_bytes())
    bad.unlink()  # best.pt may be the same file
    bad.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=f"^{bad}: .") as caught:
        read_checkpoint(bad)
    assert "\n" not in str(caught.value)
    warnings = []
    path, state = Checkpoints(Settings(output_dir=copied), warnings.append).newest_good()
    assert path == copied / "previous.pt"
    assert state["progress"]["epoch"] == 1
    assert warnings == [f"{caught.value}; the one before it is tried"]


def test_a_file_with_a_class_runs_none_of_its_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "last.pt").write_bytes(sealed(saved_by_torch(Bomb())))
    with pytest.raises(BadCheckpoint, match="plain data: .*getattr, which is not run$"):
        read_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state: state.pop("flow"), "flow is missing"),
        (lambda state: state.update(later=1), "later is unknown to this version"),
        (lambda state: state["progress"].pop("step"), "progress.step is missing"),
        (lambda state: state["progress"].update(x=1), "progress.x is unknown to this version"),
        (
            lambda state: state.update(format="train_split_affinity 12"),
            "made by a newer version of this program (format 12; this one: 1)",
        ),
        (
            lambda state: state.update(format="another 2"),
            "no checkpoint of this program (train_split_affinity 1)",
        ),
        (
            lambda state: state["model"]["1.running_var"].fill_(math.inf),
            "1.running_var holds values that are infinite or no numbers: the run had diverged",
        ),
    ],
)
def test_what_is_wrong_with_a_state(copied, capsys, arguments, change, fault):
    path = copied / "last.pt"
    content = changed_state(path.read_bytes(), change)
    path.unlink()
    path.write_bytes(content)
    assert main([*arguments, *output(copied), "--resume", str(path)]) == 2
    assert capsys.readouterr().err == f"train_split_affinity.py: error: {path}: {fault}\n"


def test_a_state_that_fits_no_optimizer_is_one_line(copied, capsys, arguments):
    path = copied / "last.pt"
    content = changed_state(
        path.read_bytes(), lambda state: state["optimizer"]["param_groups"].pop()
    )
    path.unlink()
    path.write_bytes(content)
    assert main([*arguments, *output(copied), "--resume", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: {path} does not fit --model small")
    assert error.count("\n") == 1


def test_a_state_that_memory_cannot_hold_does_not_misfit(copied, capsys, arguments, monkeypatch):
    fail_at(monkeypatch, Network, "step_end", 1, NO_MEMORY)
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 2
    assert "error: not enough memory: can't allocate memory: " in capsys.readouterr().err


def test_checkpoints_from_before_the_data_was_saved(copied, arguments, trained):
    path = copied / "last.pt"
    content = changed_state(path.read_bytes(), lambda state: state.pop("data"))
    path.unlink()
    path.write_bytes(content)
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 0
    assert main([*arguments, "--test-only", "--resume", str(path)]) == 0


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_found(trained, part, bit):
    """Wherever it is."""
    good = (trained / "previous.pt").read_bytes()
    path = trained.parent / "flipped.pt"
    path.write_bytes(flipped(good, int(part * len(good)), bit))
    with pytest.raises(BadCheckpoint, match=f"^{path}: damaged") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_torch_reads_a_checkpoint_as_it_is(trained):
    """The seal is no obstacle to who wants the weights without this program."""
    state = torch.load(trained / "last.pt", weights_only=True)
    assert differences(state, state_of(trained)) == []


@pytest.mark.parametrize("name", ["last.pt", "nowhere.pt", "."])
def test_resuming_a_bad_file_is_an_error(copied, capsys, arguments, name):
    path = copied / name
    (copied / "last.pt").write_bytes(b"damaged")
    before = contents(copied)
    assert main([*arguments, *output(copied), "--resume", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: {path}: ")
    assert error.count("\n") == 1
    assert contents(copied) == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_auto_names_the_damaged_one_and_goes_on_from_the_one_before(
    copied, trained, capsys, arguments
):
    (copied / "last.pt").unlink()
    (copied / "last.pt").write_bytes(b"damaged")
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"warning: {copied / 'last.pt'}: damaged, or no checkpoint")
    assert captured.err.count("\n") == 1
    assert f"resumed from {copied / 'previous.pt'}, after step 3\n" in captured.out
    assert differences(state_of(copied), state_of(trained)) == []


def test_auto_uses_the_newest_that_is_left(tmp_path):
    warnings = []
    checkpoints = Checkpoints(Settings(output_dir=tmp_path, save_freq=2), warnings.append)
    save_epochs(checkpoints, Progress(), [50.0, 40.0, 30.0, 20.0, 10.0])
    for name, used in (
        ("last.pt", "previous.pt"),
        ("previous.pt", "epoch-0004.pt"),
        ("epoch-0004.pt", "best-0002.pt"),
        ("best-0002.pt", "epoch-0002.pt"),
    ):
        path = tmp_path / name
        path.unlink()
        path.write_bytes(b"damaged")
        warnings.clear()
        assert checkpoints.newest_good()[0].name == used
        assert path.name in warnings[-1]


def test_auto_with_nothing_good_left(copied, capsys, arguments):
    for path in copied.glob("*.pt"):
        path.write_bytes(b"damaged")
    before = contents(copied)
    assert main([*arguments, *output(copied), "--resume", "auto"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train_split_affinity.py: error: --resume auto: no good checkpoint; ")
    assert str(copied) in error
    assert contents(copied) == before


@pytest.mark.parametrize("exists", [True, False])
def test_auto_without_checkpoints_begins_anew(tmp_path, exists):
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
        (folder / "last.pt.tmp").write_bytes(b"half of a")
    assert Checkpoints(Settings(output_dir=folder), pytest.fail).newest_good() is None


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
        {"augment_confused": Path("c.json")},  # what is in it counts
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


def test_what_an_older_checkpoint_does_not_know_is_no_other_rate():
    """Else the course of the learning rate would be made anew."""
    older = {"settings": {key: value for key, value in SAVED["settings"].items() if key != "fused"}}
    assert saved_settings(older) == SAVED["settings"]
    assert saved_settings({"settings": {"fused": False, "lr": 3.0}})["fused"] is False


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


@pytest.fixture
def renamed(pictures, tmp_path):
    """The pictures with a class that has another name, and so another place among the classes."""
    folder = shutil.copytree(pictures, tmp_path / "renamed")
    for part in ("train", "val"):
        (folder / part / "flower").rename(folder / part / "zinnia")
    return folder


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
    assert "finished after 9 of" in capsys.readouterr().out
    assert step_of(in_tmp / "out") == 9


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
    assert not list((in_tmp / "else").iterdir()), "the log, too, is where it was"
    assert (in_tmp / "logs.md").read_text().count("\n## ") == 4


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
    assert not Path("logs.md").exists()


def test_a_run_goes_on_where_its_folder_is_now(project, in_tmp, capsys):
    (project / "out").rename(in_tmp / "moved")
    assert main(["--resume", "moved/last.pt", "--epochs", "2"]) == 0
    assert step_of(in_tmp / "moved") == 6
    assert not (project / "out").exists()
    assert (project / "logs.md").read_text().count("\n## ") == 2


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
    }, "all else is as it was asked for, and paths are absolute"


def test_what_was_asked_for_is_taken_again(in_tmp):
    Path("teacher.pt").touch()
    asked = Settings(
        data_path=Path("data"), teacher_weights="teacher.pt", mirror="memory://x", split="1:2"
    )
    ready = {"image_size": 64, "val_resize": 73, "mean": (0.1, 0.2, 0.3)}
    found = {"precision": "fp32", "loader_cores": (0,), "tuned_malloc": False, "lr": 0.1}
    in_force = dataclasses.replace(asked, **ready, **found)
    again = asked_again(asked, in_force)
    assert again == {
        "data_path": str(in_tmp / "data"),
        "teacher_weights": str(in_tmp / "teacher.pt"),
        "log_file": str(in_tmp / "logs.md"),
        "precision": "auto",
        "loader_cores": None,
        "tuned_malloc": True,
        "lr": None,
    }
    state = {"settings": plain_settings(in_force), "asked": again}
    taken = settings_to_go_on(state)
    paths = {"data_path": in_tmp / "data", "log_file": in_tmp / "logs.md"}
    paths["teacher_weights"] = str(in_tmp / "teacher.pt")
    assert taken == dataclasses.replace(asked, **ready, **paths)
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
        workers=0,
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
        output_dir=Path("out"),
    )


CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
NO_FILES = hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    ("settings", "data", "ready"),
    [
        ({"image_size": 32}, (CIFAR10_CLASSES, NO_FILES), CIFAR10),
        (
            {"image_size": 64},
            (CIFAR10_CLASSES, NO_FILES),
            Preprocessing(64, 64, "bilinear", CIFAR10_MEAN, CIFAR10_STD),
        ),
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
    ids=["CIFAR-10", "larger", "a folder of it", "folder", "synthetic", "unknown", "saved"],
)
def test_how_pictures_were_made_ready(settings, data, ready):
    state = {"settings": settings, "data": data and {"classes": data[0], "fingerprint": data[1]}}
    assert preprocessing_of(state) == ready


def test_the_classes_of_cifar10_in_a_checkpoint(in_tmp, monkeypatch):
    """In files of versions that saved nothing else that tells them from a folder's."""
    folder = accept(monkeypatch, make_cifar_digits(in_tmp / "c", 15))
    data = describe_images(open_data(Settings(data_path=folder, batch_size=2)))
    assert preprocessing_of({"settings": {}, "data": data}) == CIFAR10


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
    mirror="memory://x",
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


def test_a_log_whose_folder_is_gone_is_begun_here():
    settings = dataclasses.replace(RUN, log_file=Path("/nowhere/at/all.md"))
    state = {"settings": plain_settings(settings), "asked": {}}
    assert defaults_to_go_on(Path("a.pt"), state, {})["log_file"] == Path("logs.md")


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


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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
    teacher = build_teacher(settings, ("n01440764", "n01443537", "n01484850"))
    assert asked == [("small", "DEFAULT", "--teacher-weights")]
    assert (teacher.share, teacher.model.training) == (0.3, False)
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
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


# Evaluating a checkpoint


def test_test_only_gives_the_figures_of_the_epoch(trained, in_tmp, capsys, arguments):
    options = [*arguments, "--test-only", "--resume", str(trained / "last.pt")]
    assert main([*options, *output(in_tmp / "out")]) == 0
    printed = capsys.readouterr().out
    row = state_of(trained)["progress"]["history"][-1]
    assert f"{trained / 'last.pt'}: epoch 2, step 6\n" in printed
    assert (
        f"12 images: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} %, "
        f"top-5 {row['val_top5']:.2f} %\nraw, without the moving average: "
        f"loss {row['val_raw_loss']:.4f}, top-1 {row['val_raw_top1']:.2f} %, "
        f"top-5 {row['val_raw_top5']:.2f} %\n" in printed
    )
    with (in_tmp / "out/confusion.csv").open() as file:
        head, *rows = csv.reader(file)
    assert head == ["true class", "flower", "temple"]
    assert [name for name, *_ in rows] == ["flower", "temple"]
    counts = [list(map(int, cells)) for _, *cells in rows]
    assert [sum(row) for row in counts] == [6, 6]
    assert counts[0][0] + counts[1][1] == round(row["val_top1"] * 12 / 100)
    assert sorted(path.name for path in (in_tmp / "out").iterdir()) == [
        "confused.json",
        "confusion.csv",
        "confusion.png",
    ]
    confused = json.loads((in_tmp / "out/confused.json").read_text())
    pairs = {(pair["true"], pair["taken_for"]): pair["images"] for pair in confused.pop("pairs")}
    wrong = {("flower", "temple"): counts[0][1], ("temple", "flower"): counts[1][0]}
    assert pairs == {pair: images for pair, images in wrong.items() if images}
    top1 = round(row["val_top1"], 4)
    assert confused == {"checkpoint": str(trained / "last.pt"), "images": 12, "top1": top1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "squeezenet1_1"], "--model squeezenet1_1: {} has small"),
        (["--num-classes", "5"], "--num-classes 5: {} has 2"),
    ],
)
def test_test_only_of_another_model(trained, capsys, arguments, changes, message):
    path = trained / "last.pt"
    assert main([*arguments, "--test-only", "--resume", str(path), *changes]) == 2
    error = f"train_split_affinity.py: error: {message.format(path)}\n"
    assert capsys.readouterr().err == error


def test_test_only_without_a_checkpoint(in_tmp, capsys, arguments):
    options = [*arguments, "--test-only", *output(in_tmp / "out")]
    assert main([*options, "--resume", "auto"]) == 2
    assert f"--test-only: no checkpoint in {in_tmp / 'out'}" in capsys.readouterr().err
    assert main([*options, "--resume", "nowhere.pt"]) == 2
    assert "error: nowhere.pt: no such checkpoint" in capsys.readouterr().err
    assert not list(in_tmp.iterdir())


# The names in the folder


@pytest.mark.parametrize("links", [True, False])
def test_which_checkpoints_are_kept(tmp_path, monkeypatch, links):
    """Of equal accuracies the earlier epoch is the better one."""
    if not links:  # some network disks
        error = OSError(errno.EPERM, os.strerror(errno.EPERM))
        monkeypatch.setattr(os, "link", functools.partial(raise_, error))
    checkpoints = Checkpoints(Settings(output_dir=tmp_path, keep_best=2, save_freq=3), pytest.fail)
    progress = Progress()
    for top1, best, kept in (
        (50.0, 1, ["best-0001.pt"]),
        (70.0, 2, ["best-0001.pt", "best-0002.pt"]),
        (60.0, 2, ["best-0002.pt", "best-0003.pt", "epoch-0003.pt"]),
        (70.0, 2, ["best-0002.pt", "best-0004.pt", "epoch-0003.pt"]),
        (20.0, 2, ["best-0002.pt", "best-0004.pt", "epoch-0003.pt"]),
        (80.0, 6, ["best-0002.pt", "best-0006.pt", "epoch-0003.pt", "epoch-0006.pt"]),
    ):
        progress.step += 10
        progress.end_epoch({"val_top1": top1}, 2)
        checkpoints.save(tiny_work(), progress)
        epoch = progress.epoch
        expected = kept + ["best.pt", "last.pt"] + ["previous.pt"] * (epoch > 1)
        assert sorted(path.name for path in tmp_path.glob("*.pt")) == sorted(expected)
        assert step_of(tmp_path) == 10 * epoch
        assert step_of(tmp_path, "best.pt") == 10 * best
        for name in kept:
            assert step_of(tmp_path, name) == 10 * int(name[-7:-3])
        if epoch > 1:
            assert step_of(tmp_path, "previous.pt") == 10 * (epoch - 1)
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt") == links


def test_from_epoch_10000_on(tmp_path):
    """Names get a digit more, and count as the others do."""
    checkpoints = Checkpoints(Settings(output_dir=tmp_path, keep_best=2, save_freq=1), pytest.fail)
    progress = Progress(epoch=9997)
    save_epochs(checkpoints, progress, [30.0, 20.0, 40.0, 50.0])
    best = sorted(path.name for path in tmp_path.glob("best-*"))
    assert best == ["best-10000.pt", "best-10001.pt"]
    for name in ("last.pt", "previous.pt", "epoch-10001.pt", "best-10001.pt"):
        (tmp_path / name).unlink()
    assert checkpoints.newest_good()[0].name == "best-10000.pt"
    (tmp_path / "best-10000.pt").unlink()
    assert checkpoints.newest_good()[0].name == "epoch-10000.pt"


def test_the_best_of_later_epochs_outlive_a_run_that_goes_on_from_an_earlier_one(tmp_path):
    """They are no longer in its list, but nobody asked for their removal."""
    checkpoints = Checkpoints(Settings(output_dir=tmp_path, keep_best=1, save_freq=1), pytest.fail)
    save_epochs(checkpoints, Progress(), [50.0, 60.0, 70.0])
    progress = Progress(**state_of(tmp_path, "epoch-0001.pt")["progress"])
    save_epochs(checkpoints, progress, [40.0])
    assert (tmp_path / "best-0003.pt").exists()
    save_epochs(checkpoints, progress, [30.0])
    assert not (tmp_path / "best-0003.pt").exists(), "that was epoch 3 of this run, and no best"


def test_no_other_names_are_left(tmp_path):
    """The best epoch stays the same here: rename(2) between links to one file does nothing."""
    checkpoints = Checkpoints(Settings(output_dir=tmp_path, save_freq=1), pytest.fail)
    save_epochs(checkpoints, Progress(), [50.0, 40.0])
    assert not list(tmp_path.glob("*.tmp"))


def test_saves_within_an_epoch_leave_the_best_alone(tmp_path):
    checkpoints = Checkpoints(Settings(output_dir=tmp_path, save_freq=1), pytest.fail)
    progress = save_epochs(checkpoints, Progress(), [50.0])
    for _ in range(3):
        progress.add_step(images=4, loss=1.0, top1=1, top5=2, batches=1)
        checkpoints.save(tiny_work(), progress)
    names = ["best-0001.pt", "best.pt", "epoch-0001.pt", "last.pt", "previous.pt"]
    assert sorted(os.listdir(tmp_path)) == names
    steps = {"best.pt": 10, "epoch-0001.pt": 10, "last.pt": 13, "previous.pt": 12}
    for name, step in steps.items():
        assert step_of(tmp_path, name) == step


def test_files_of_other_names_are_left_alone(tmp_path):
    for name in ("best-mine.pt", "notes-1.txt"):
        (tmp_path / name).write_bytes(b"mine")
    checkpoints = Checkpoints(Settings(output_dir=tmp_path, keep_best=1), pytest.fail)
    save_epochs(checkpoints, Progress(), [50.0, 60.0])
    for name in ("best-mine.pt", "notes-1.txt"):
        assert (tmp_path / name).read_bytes() == b"mine"


def test_a_state_is_saved_once(tmp_path):
    checkpoints = Checkpoints(Settings(output_dir=tmp_path), pytest.fail)
    progress = Progress(step=1)
    for _ in range(2):
        checkpoints.save(tiny_work(), progress)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_no_validation_means_no_best(tmp_path):
    checkpoints = Checkpoints(Settings(output_dir=tmp_path, save_freq=2), pytest.fail)
    save_epochs(checkpoints, Progress(), [None, None])
    assert sorted(os.listdir(tmp_path)) == ["epoch-0002.pt", "last.pt", "previous.pt"]


def test_without_a_folder_nothing_is_saved(in_tmp):
    Checkpoints(Settings(), pytest.fail).save(tiny_work(), Progress(step=1))
    assert not list(in_tmp.iterdir())


# The mirror


@pytest.fixture
def uploads(monkeypatch):
    """Makes the store memory:// raise some errors, one at each upload; returns the pauses that the
    mirror makes, which take no time here.
    """

    def fail_with(*errors):
        left, pauses = iter(errors), []
        put_file = MemoryFileSystem.put_file

        def put(*args, **options):
            for error in left:
                raise error
            return put_file(*args, **options)

        monkeypatch.setattr(MemoryFileSystem, "put_file", put)
        monkeypatch.setattr(time, "sleep", pauses.append)
        return pauses

    return fail_with


@pytest.fixture
def far(tmp_path):
    """An address in memory that no other test uses."""
    yield f"memory://{tmp_path}/far"
    MemoryFileSystem.store.clear()


def mirror_files(url, *paths):
    """Copy files; what the mirror has to say."""
    mirror = Mirror(url)
    for path in paths:
        mirror.copy(path)
    mirror.close()
    return mirror.messages


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_the_mirror_ends_up_equal(in_tmp, train, protocol):
    url = f"{protocol}://{in_tmp}/far"
    train(in_tmp / "out", epochs=3, save_steps=1, save_freq=2, keep_best=1, mirror=url)
    filesystem, root = fsspec.core.url_to_fs(url)
    copies = {Path(path).name: filesystem.cat_file(path) for path in filesystem.ls(root, False)}
    kept = {path.name: path.read_bytes() for path in (in_tmp / "out").glob("*.pt")}
    del kept["previous.pt"]
    assert len([name for name in kept if name.startswith("best-")]) == 1
    assert copies == kept


def test_an_upload_is_tried_three_times(uploads, tmp_path, far):
    path = tmp_path / "last.pt"
    path.write_bytes(b"a state")
    pauses = uploads(ConnectionError("asleep"), TimeoutError("still asleep"))
    assert mirror_files(far, path) == []
    assert pauses == [1, 2]
    assert fsspec.open(f"{far}/last.pt").open().read() == b"a state"


def test_uploads_that_fail_are_told_in_one_line_and_the_run_goes_on(
    uploads, in_tmp, capsys, arguments, far
):
    uploads(*[ConnectionError("no such\nhost")] * 99)
    options = [*arguments, *output(in_tmp / "out"), "--epochs", "1", "--mirror", far]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert sorted(captured.err.splitlines()) == [
        f"warning: mirror: {name} not copied in 3 attempts: no such"
        for name in ("best-0001.pt", "best.pt", "last.pt")
    ]
    assert "finished after 3 of 3 steps" in captured.out
    assert step_of(in_tmp / "out") == 3


def test_half_an_upload_is_never_under_the_name(monkeypatch, tmp_path, far):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    assert mirror_files(far, path) == []
    path.write_bytes(b"a new state")

    def put(self, local, remote, **options):
        self.pipe_file(remote, Path(local).read_bytes()[:5])
        raise ConnectionError("cable cut")

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    set_everywhere(monkeypatch, "UPLOAD_ATTEMPTS", 1)
    assert mirror_files(far, path) == ["mirror: last.pt not copied in 1 attempt: cable cut"]
    assert fsspec.open(f"{far}/last.pt").open().read() == b"old"


def test_a_file_that_is_gone_is_left_out(tmp_path, far):
    path = tmp_path / "last.pt"
    path.write_bytes(b"a state")
    assert mirror_files(far, tmp_path / "best-0001.pt", path) == []
    assert fsspec.core.url_to_fs(far)[0].exists(f"{far}/last.pt")


def test_no_copy_is_removed_for_want_of_the_file(tmp_path, far):
    """Only for the asking."""
    path = tmp_path / "best.pt"
    path.write_bytes(b"a state")
    assert mirror_files(far, path) == []
    path.unlink()
    assert mirror_files(far, path) == []
    filesystem, root = fsspec.core.url_to_fs(far)
    assert filesystem.exists(f"{root}/best.pt")
    mirror = Mirror(far)
    for _ in range(2):  # the second time there is nothing to remove
        mirror.remove(path)
    mirror.close()
    assert mirror.messages == []
    assert not filesystem.exists(f"{root}/best.pt")


def test_a_removal_that_fails_is_told(monkeypatch, uploads, tmp_path, far):
    path = tmp_path / "best-0001.pt"
    path.write_bytes(b"a state")
    assert mirror_files(far, path) == []

    def refuse(self, path):
        raise PermissionError("not yours")

    pauses = uploads()
    monkeypatch.setattr(MemoryFileSystem, "rm_file", refuse)
    mirror = Mirror(far)
    mirror.remove(path)
    mirror.close()
    assert mirror.messages == ["mirror: best-0001.pt not removed in 3 attempts: not yours"]
    assert pauses == [1, 2]


def test_a_place_that_is_not_there_is_told(uploads, tmp_path, far):
    """s3fs raises FileNotFoundError for a bucket that does not exist."""
    path = tmp_path / "last.pt"
    path.write_bytes(b"a state")
    uploads(*[FileNotFoundError("The specified bucket does not exist")] * 3)
    assert mirror_files(far, path) == [
        "mirror: last.pt not copied in 3 attempts: The specified bucket does not exist"
    ]


@pytest.fixture
def hanging_store(monkeypatch):
    """A memory:// that takes a file and does not give an answer, and when it got the first one."""
    begun, released = threading.Event(), threading.Event()

    def put(*args, **options):
        begun.set()
        released.wait()

    set_everywhere(monkeypatch, "LAST_UPLOADS_S", 0.1)
    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    yield begun
    released.set()


def test_an_upload_that_hangs_does_not_hold_the_run_up(hanging_store, tmp_path, far):
    mirror = Mirror(far)
    for name in ("best.pt", "last.pt"):
        (tmp_path / name).write_bytes(b"a state")
        mirror.copy(tmp_path / name)
    hanging_store.wait()
    mirror.close()
    assert mirror.messages == ["mirror: best.pt, last.pt not copied within 0.1 s"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [("nope://bucket/run", "Protocol not known: nope"), ("memory://x::nope://y", "nope")],
)
def test_an_unknown_address_is_an_error(in_tmp, capsys, arguments, url, reason):
    assert main([*arguments, *output(in_tmp / "out"), "--mirror", url]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_split_affinity.py: error: --mirror {url}: ")
    assert reason in error
    assert error.count("\n") == 1
    assert not list(in_tmp.iterdir())


# A folder belongs to one running process


def test_a_folder_belongs_to_one_process(tmp_path):
    folder = tmp_path / "out"
    first, second = (Checkpoints(Settings(output_dir=folder), pytest.fail) for _ in range(2))
    first.hold()
    assert not folder.exists(), "nothing is made before the run is known to begin"
    first.hold(make=True)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            second.hold(make=True)
        assert str(caught.value).startswith(
            f"--output-dir {folder}: process {os.getpid()} on {platform.node()} is training there"
        )
    second.close()
    with pytest.raises(UserError):
        second.hold()
    first.close()
    assert not list(folder.iterdir())
    second.hold()
    second.close()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The one that had it ends between our opening the file and our locking it."""
    first = lock_folder(tmp_path)
    flock, calls = fcntl.flock, itertools.count(1)

    def late(file, operation):
        if next(calls) == 1:
            (tmp_path / LOCK).unlink()
            first.close()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock_folder(tmp_path):
        assert next(calls) == 3
        with pytest.raises(UserError):
            lock_folder(tmp_path)


def test_a_file_system_without_locks_is_told(in_tmp, monkeypatch, capsys, arguments):
    error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def no_lock(file, operation):
        if operation & fcntl.LOCK_NB:  # the log, too, is locked while it is written
            raise error

    monkeypatch.setattr(fcntl, "flock", no_lock)
    assert main([*arguments, "--epochs", "1", *output(in_tmp / "out")]) == 0
    assert capsys.readouterr().err == (
        f"warning: {in_tmp / 'out'} cannot be locked (No locks available): see to it that no "
        "other run is started there\n"
    )
    assert step_of(in_tmp / "out") == 3


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_second_run_is_refused_until_the_first_one_is_killed(
    in_tmp, photos, capsys, monkeypatch, workers
):
    """Its loader processes may outlive it for some seconds."""
    options = [*TINY, "-j", workers, "--data-path", str(photos), *output(in_tmp / "out")]
    options += ["--save-steps", "1", "--print-freq", "1", "--resume", "auto", "--steps"]
    with subprocess.Popen(
        [sys.executable, script.__file__, *options, "100000"], stdout=subprocess.PIPE, text=True
    ) as process:
        next(line for line in process.stdout if line.startswith("step 2/"))
        before = (in_tmp / "out/metrics.jsonl").read_text()
        assert main([*options, "4"]) == 2
        error = capsys.readouterr().err
        assert error == (
            f"train_split_affinity.py: error: --output-dir {in_tmp / 'out'}: process {process.pid} "
            f"on {platform.node()} is training there; wait for its end, or choose another folder\n"
        )
        process.kill()
        process.wait()
        assert (in_tmp / "out/metrics.jsonl").read_text().startswith(before)
        _, state = Checkpoints(Settings(output_dir=in_tmp / "out"), pytest.fail).newest_good()
        assert main([*options, str(state["progress"]["step"] + 1)]) == 0


# New runs


@pytest.mark.parametrize("left", ["last.pt", "previous.pt", "best.pt", "best-0001.pt"])
def test_going_on_elsewhere_does_not_take_the_place_of_another_run(
    copied, trained, arguments, capsys, left
):
    """Nor of what is left of one."""
    for path in copied.glob("*.pt"):
        path.unlink()
    shutil.copy(trained / "last.pt", copied / left)
    before = contents(copied)
    resumed = str(trained / "previous.pt")
    assert main([*arguments, *output(copied), "--resume", resumed]) == 2
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: --resume {resumed}: --output-dir {copied} has the "
        "checkpoints of another run: go on with that by --resume auto, or choose another folder\n"
    )
    assert contents(copied) == before


def test_going_on_in_a_folder_of_its_own(trained, in_tmp, arguments):
    resumed = str(trained / "previous.pt")
    assert main([*arguments, *output(in_tmp / "new"), "--resume", resumed]) == 0
    assert differences(state_of(in_tmp / "new"), state_of(trained)) == []


def test_a_new_run_does_not_take_the_place_of_an_earlier_one(copied, arguments, capsys):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert main([*arguments, *output(copied)]) == 2
    assert capsys.readouterr().err == (
        f"train_split_affinity.py: error: --output-dir {copied} has the checkpoints of an earlier "
        "run: go on with it by --resume auto, or choose another folder\n"
    )
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_one_command_starts_from_weights_and_goes_on_after_a_kill(trained, in_tmp, arguments):
    options = ["--init-from", str(trained / "last.pt"), "--resume", "auto", *output(in_tmp / "out")]
    assert main([*arguments, *options, "--steps", "3"]) == 0
    assert main([*arguments, *options]) == 0
    assert step_of(in_tmp / "out") == 6


def test_a_recipe_that_needs_weights_does_not_start_without(in_tmp, arguments, capsys):
    recipe = ["--recipe", "imagenet-full", "--resume", "auto", *output(in_tmp / "out")]
    assert (
        main([*arguments, *recipe, *"--accumulate 1 --drop-path 0 --lr-warmup-epochs 0".split()])
        == 2
    )
    text = f"starts from trained weights, and {in_tmp / 'out'} has none: give --init-from PATH"
    assert text in capsys.readouterr().err
    assert not list(in_tmp.iterdir())


# Checkpoints of an earlier version, made on an AMD EPYC (Zen 4) with torch 2.15 by this program as
# it was at 6,036 lines: after step 7 of 20, in the middle of the first epoch, and at the end.

EARLIER = Path(__file__).parent / "checkpoints"
EARLIER_OPTIONS = (
    "--model small --image-size 32 --num-classes 3 -b 64 --accumulate 2 -j 0 --epochs 2 --lr 0.1 "
    "--lr-scheduler cosine --mixup-alpha 0.4 --model-ema --clip-grad-norm 1 --seed 3 "
    "--precision fp32 --forward-threads 1 --backward-threads 1 --no-fused --schedule"
).split()


EARLIER_CPU = "199a5eaa6c75fd7b"


def kind_of_cpu():
    """A digest of what kernels may be chosen by: kind of CPU, cache, instructions."""
    first = read_text(Path("/proc/cpuinfo")).split("\n\n")[0]
    names = "cpu family", "model\t", "stepping", "cache size", "flags"
    lines = [line for line in first.splitlines() if line.startswith(names)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class EarlierImages(torchvision.datasets.FakeData):
    """The synthetic images that the earlier version had: noise, with random labels."""

    patterns = 3

    def __init__(self, count, side, classes, seed):
        super().__init__(count, (3, side, side), classes, random_offset=seed)


@pytest.fixture
def go_on_from_earlier(monkeypatch):
    """Runs of today's program on the images of then."""
    set_everywhere(monkeypatch, "SyntheticImages", EarlierImages)
    return resume_earlier


def resume_earlier(schedule):
    options = ["--resume", str(EARLIER / f"{schedule}.pt"), "--output-dir", "out"]
    assert main([*EARLIER_OPTIONS, schedule, *options]) == 0
    return read_checkpoint(Path("out/last.pt"))


@needs_two_cpus
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_checkpoint_of_an_earlier_version_goes_on(schedule, in_tmp, go_on_from_earlier):
    """To the same numbers: to the bit with the kind of CPU and the versions that computed them."""
    ours, theirs = go_on_from_earlier(schedule), read_checkpoint(EARLIER / f"{schedule}-end.pt")
    assert ours["progress"]["step"] == theirs["progress"]["step"] == 20
    for part in ("model", "average"):
        for name, value in theirs[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-3, atol=1e-5)
    assert torch.equal(ours["random_state"], theirs["random_state"])
    same = all(
        ours["versions"][name] == theirs["versions"][name] for name in ("torch", "torchvision")
    )
    if same and kind_of_cpu() == EARLIER_CPU:
        assert differences(ours, theirs) == []


@needs_two_cpus
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_checkpoint_of_an_earlier_version_is_restored_to_the_bit(
    schedule, in_tmp, monkeypatch, go_on_from_earlier
):
    states, restore = [], restore_state

    def restored(state, work, settings):
        progress = restore(state, work, settings)
        made = make_state(settings, work, progress, state["data"])
        states.append(copy.deepcopy([state, made]))
        return progress

    set_everywhere(monkeypatch, "restore_state", restored)
    go_on_from_earlier(schedule)
    ((saved, made),) = states
    assert saved["progress"]["step"] == 7
    assert (saved["ahead"] is None) == (schedule != "delayed")
    assert differences(saved, made) == []
