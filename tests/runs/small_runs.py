"""Runs of a small model."""

import dataclasses
import itertools
import os
import signal

import pytest
import torch
from small import needs_two_cpus

import train_split_affinity as script
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings
from split_affinity.training.network import Network
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.update import TrainState

TINY = Settings(
    model="small", image_size=32, batch_size=4, num_classes=5, workers=0, steps=3, lr=0.01
)
ALL_SCHEDULES = pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=needs_two_cpus) for name in SCHEDULES]
)


def with_plan(function, settings):
    topology = read_topology()
    return function(settings, topology, plan_cores(topology, settings))


def train(**settings):
    return with_plan(script.train, dataclasses.replace(TINY, **settings))


def interrupt(monkeypatch, method, call, signum=signal.SIGTERM):
    """Send this process one signal, in a call of a method of Work, counted from 1."""
    kind = TrainState if hasattr(TrainState, method) else Network
    original, count = getattr(kind, method), itertools.count(1)

    def interrupted(self, *args):
        if next(count) == call:
            os.kill(os.getpid(), signum)
        return original(self, *args)

    monkeypatch.setattr(kind, method, interrupted)


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)
