"""Fixtures shared by all test files."""

from __future__ import annotations

import os
import shutil
import threading
import urllib.error
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
import torchvision
from patching import set_everywhere
from photos import make_photos
from torch import nn

from split_affinity import ALLOWED_CPUS, process_cpus
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.models.registry import WITH_HEADS

# Examples have no time limit: the machine may be busy. `--hypothesis-profile thorough` tries more.
UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("usual", **UNTIMED)
hypothesis.settings.register_profile("thorough", max_examples=5000, **UNTIMED)
hypothesis.settings.load_profile("usual")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Start workers whose OpenMP teams sleep while they wait: the other worker needs the cores."""
    os.environ["OMP_WAIT_POLICY"] = "passive"


if "PYTEST_XDIST_WORKER" in os.environ:  # OpenMP has read it: processes run as users start them
    os.environ.pop("OMP_WAIT_POLICY", None)


def pytest_sessionstart(session: pytest.Session) -> None:
    """In a worker, let Python know the thread that receives messages, which execnet started.

    The audit of lanes takes threads that Python does not know for those of OpenMP.
    """
    for plugin in session.config.pluginmanager.get_plugins():
        if hear := getattr(plugin, "handle_command", None):
            plugin.handle_command = lambda *message, hear=hear: (
                threading.current_thread(),
                hear(*message),
            )


@pytest.fixture
def two_groups() -> tuple[Group, Group]:
    """Two lanes' groups on two different CPUs, each with two threads, to have a team to place."""
    first, second = sorted(ALLOWED_CPUS)[:2]
    return Group("forward", (first,), 2), Group("backward", (second,), 2)


@pytest.fixture
def split_plan(two_groups) -> CorePlan:
    """A core plan of those groups."""
    return CorePlan("even", *two_groups, two_groups[0].cpus)


@pytest.fixture
def one_lane_plan() -> CorePlan:
    """A core plan without a split, of two threads over all CPUs."""
    group = Group("all", tuple(sorted(ALLOWED_CPUS)), 2)
    return CorePlan("none", group, group, group.cpus)


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


@pytest.fixture(scope="session")
def photos_with_val(photos, tmp_path_factory) -> Path:
    """The same photographs, to train and to validate."""
    root = tmp_path_factory.mktemp("photos_with_val")
    for part in ("train", "val"):
        shutil.copytree(photos / "train", root / part)
    return root


def torchvision_model(name: str) -> nn.Module:
    """A classifier with random weights, with all that torchvision's own weights have."""
    whole = {"aux_logits": True, "init_weights": False} if name in WITH_HEADS else {}
    model = torchvision.models.get_model(name, **whole)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -1, 0)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


@pytest.fixture
def torch_cache(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Puts random weights of a torchvision model into a cache of torch's, as the file that would be
    fetched, and returns its path. There is no network.
    """

    def no_network(*args, **options):
        raise urllib.error.URLError("no network")

    def put(name: str, state: dict | None = None) -> Path:
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        path = tmp_path / "torch/hub/checkpoints" / url.rpartition("/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(1)
        torch.save(torchvision_model(name).state_dict() if state is None else state, path)
        return path

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return put


@pytest.fixture
def imagenet_photos(photos_with_val, tmp_path):
    """The photographs, as two classes of ImageNet: temples are 999, flowers 0."""
    names = {"temple": "n15075141", "flower": "tench"}
    for part in ("train", "val"):
        for name, known in names.items():
            shutil.copytree(photos_with_val / part / name, tmp_path / "imagenet" / part / known)
    return tmp_path / "imagenet"


@pytest.fixture(autouse=True)
def untouched_process():
    """No test may change the mask or the thread count of the thread that runs the tests."""
    before = process_cpus(), torch.get_num_threads()
    yield
    assert (process_cpus(), torch.get_num_threads()) == before


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing them takes longer than a run."""
    for name in ("draw_timelines", "draw_curves", "draw_gradients"):
        set_everywhere(monkeypatch, name, lambda *args: None)
