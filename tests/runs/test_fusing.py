"""What `--fused-norm` decides, and what it says.

Run: python -m pytest tests/runs/test_fusing.py
"""

import platform

import pytest
from torch import nn

from split_affinity.kernels.compiler import CannotCompile
from split_affinity.models.registry import build_model
from split_affinity.models.tracing import CannotTrace
from split_affinity.options.settings import Settings
from split_affinity.runs import fusing
from split_affinity.runs.fusing import fuse_where_it_pays
from split_affinity.training.network import Network


def make_network(model="resnet18", **options):
    model = build_model(model, 10, 32)
    return Network(model, nn.CrossEntropyLoss(), **{"channels_last": True} | options)


def decide(network, **options):
    return fuse_where_it_pays(network, Settings(model="resnet18", **options))


def fails_with(error):
    def fails(*_):
        raise error

    return fails


@pytest.mark.parametrize("asked", ["on", "auto"])
def test_fused(asked, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    network = make_network()
    said = decide(network, fused_norm=asked)
    assert said == "batch norm is fused with what follows it, 20 times in resnet18"
    assert network.fused
    assert network.view is not None


def test_not_fused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    cases = {
        "as asked": decide(make_network(), fused_norm="off"),
        "the operator is made for channels_last": decide(make_network(channels_last=False)),
        "resnet18 has none of 16 channels or more": decide(
            Network(nn.Linear(2, 2), nn.CrossEntropyLoss(), channels_last=True)
        ),
        "not measured on riscv64; --fused-norm on tries it": decide(make_network()),
    }
    for reason, said in cases.items():
        assert said == f"batch norm is not fused: {reason}"


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("kernels", CannotCompile("there is no C compiler (cc, gcc, clang)")),
        ("kernels", CannotCompile("cc fails: error: no space")),
    ],
)
def test_a_machine_that_cannot_trains_as_before(where, error, monkeypatch):
    monkeypatch.setattr(fusing, where, fails_with(error))
    network = make_network()
    assert decide(network, fused_norm="on") == f"batch norm is not fused: {error}"
    assert not network.fused
    assert network.view is None


def test_a_model_without_a_graph_trains_as_before(monkeypatch):
    monkeypatch.setattr(
        "split_affinity.training.network.fuse_norms", fails_with(CannotTrace("it branches"))
    )
    network = make_network()
    assert decide(network, fused_norm="on") == "batch norm is not fused: it branches"
    assert not network.fused
    assert network.view is None


def test_tests_of_a_model_decide_nothing():
    network = make_network()
    assert decide(network, test_only=True) == ""
    assert network.view is None
