"""Runs that are interrupted, and what they have saved."""

import itertools
import json
import os
import signal
from pathlib import Path

import torch
import torchvision
from kill import differing
from torch import nn

from split_affinity.checkpoints.state import read_checkpoint
from split_affinity.options.settings import Settings
from split_affinity.reports.run_report import RunReport
from split_affinity.reports.timeline import new_figure, save_figure
from split_affinity.training.network import Network
from split_affinity.training.update import TrainState

OVERLAP = {"schedule": "overlap", "accumulate": 2, "batch_size": 2}
DELAYED = {"schedule": "delayed"}


def output(folder):
    return ["--output-dir", str(folder), "--log-file", str(folder.parent / "logs.md")]


def interrupt(monkeypatch, method, calls, signum=signal.SIGTERM):
    """Signal this process in those calls of a method, counted from 1 over all runs."""
    kinds = Network, TrainState, RunReport
    kind = next(kind for kind in kinds if hasattr(kind, method))
    real, count = getattr(kind, method), itertools.count(1)

    def interrupted(self, *args):
        if next(count) in calls:
            os.kill(os.getpid(), signum)
        return real(self, *args)

    monkeypatch.setattr(kind, method, interrupted)


def differences(first, second):
    """Where two states differ; settings, in force, asked for or left, and versions do not count."""
    parts = (first.keys() | second.keys()) - {"settings", "asked", "left", "versions"}
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


def train_state_on(model):
    network = Network(model, nn.CrossEntropyLoss())
    return TrainState(network, torch.optim.SGD(model.parameters(), 0.1))


def tiny_model(num_classes, image_size):
    return nn.Linear(3, num_classes)


def tiny_train_state():
    return train_state_on(tiny_model(2, 0))


def tiny_run(folder, **settings):
    """Settings of a run that saves `tiny_train_state`."""
    return Settings(output_dir=folder, model="tiny", num_classes=2, **settings)


def row_of(epoch, top1, **others):
    """The figures of an epoch, as far as checkpoints look at them."""
    return {"epoch": epoch, "val_top1": top1, "gradient_norms": {}} | others


def save_epochs(checkpoints, progress, top1):
    """Save the ends of epochs of ten steps with those accuracies."""
    for value in top1:
        progress.step += 10
        progress.end_epoch(row_of(progress.epoch + 1, value), 2)
        checkpoints.save(tiny_train_state(), progress)
    return progress


def raise_(error, *args, **options):
    raise error


def picture(path):
    figure = new_figure(4, 4)
    figure.subplots().plot(range(9))
    save_figure(figure, path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# Checkpoints of an earlier version, made on an AMD EPYC (Zen 4) with torch 2.15 by this program as
# it was at 6,036 lines: after step 7 of 20, in the middle of the first epoch, and at the end.

EARLIER = Path(__file__).parent / "earlier"


class EarlierImages(torchvision.datasets.FakeData):
    """The synthetic images that the earlier version had: noise, with random labels."""

    patterns = 3

    def __init__(self, count, side, classes, seed):
        super().__init__(count, (3, side, side), classes, random_offset=seed)
