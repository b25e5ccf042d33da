"""Fixtures shared by all test files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from photos import make_photos

import train_split_affinity as tsa

TWO_CPUS = len(tsa.ALLOWED_CPUS) >= 2
needs_two_cpus = pytest.mark.skipif(not TWO_CPUS, reason="needs two logical CPUs")

# A run that takes about a second.
TINY = [
    "--model",
    "squeezenet1_1",
    "--image-size",
    "32",
    "-b",
    "2",
    "--num-classes",
    "3",
    "-j",
    "0",
]


def as_loaded(batches: list) -> list[tsa.Loaded]:
    """Batches in the form in which a loader gives them."""
    return [(batch, tsa.LoadRecord(-1, 0.0, 0.0)) for batch in batches]


@pytest.fixture
def two_groups() -> tuple[tsa.Group, tsa.Group]:
    """Two lanes' groups on two different CPUs, each with two threads, to have a team to place."""
    first, second = sorted(tsa.ALLOWED_CPUS)[:2]
    return tsa.Group("forward", (first,), 2), tsa.Group("backward", (second,), 2)


@pytest.fixture
def split_plan(two_groups) -> tsa.CorePlan:
    """A core plan of those groups."""
    return tsa.CorePlan("even", *two_groups, two_groups[0].cpus)


@pytest.fixture
def one_lane_plan() -> tsa.CorePlan:
    """A core plan without a split, of two threads over all CPUs."""
    group = tsa.Group("all", tuple(sorted(tsa.ALLOWED_CPUS)), 2)
    return tsa.CorePlan("none", group, group, group.cpus)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """An image folder of 12 crops of scikit-learn's two photographs, in two classes."""
    return make_photos(tmp_path_factory.mktemp("photos"), 12, smallest=64, largest=128)


@pytest.fixture(autouse=True)
def untouched_process():
    """No test may change the mask or the thread count of the thread that runs the tests."""
    before = tsa.process_cpus(), torch.get_num_threads()
    yield
    assert (tsa.process_cpus(), torch.get_num_threads()) == before
