"""Time by kinds of operators. Run: python -m pytest tests/test_operators.py"""

from collections import Counter
from types import SimpleNamespace

import operators
import pytest


def test_what_is_inside_of_an_operator_is_part_of_it():
    outer = SimpleNamespace(name="aten::conv2d", cpu_parent=None, self_cpu_time_total=5)
    inner = SimpleNamespace(name="aten::copy_", cpu_parent=outer, self_cpu_time_total=7)
    update = SimpleNamespace(name="Optimizer.step", cpu_parent=None, self_cpu_time_total=1)
    added = SimpleNamespace(name="aten::add_", cpu_parent=update, self_cpu_time_total=2)
    alone = SimpleNamespace(name="aten::zeros", cpu_parent=None, self_cpu_time_total=4)
    found = operators.time_by_kind([outer, inner, update, added, alone])
    assert found == {"convolution forward": 12, "optimizer": 3, operators.REST: 4}


def test_the_limit_is_convolutions_alone():
    step_us = Counter({"convolution forward": 1e6, "convolution backward": 1e6, "optimizer": 9})
    text = operators.limit_of(32, [4.0, 5.0, 4.0], step_us)
    assert text.startswith("8.00 images/s")
    assert "with convolutions alone 16.00, 2.00 times as many" in text


def test_errors_are_one_line(capsys):
    for wrong in (["--stepz", "3"], ["--split", "even"], ["--batch-size", "0"]):
        assert operators.main(wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("operators.py: error: ")
        assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("fused", "norm"), [("on", "fused norm"), ("off", "batch norm")])
def test_a_step_by_operators(capsys, fused, norm):
    given = ["--model", "resnet18", "--image-size", "32", "--batch-size", "2", "--steps", "1"]
    assert operators.main([*given, "--no-tuned-malloc", "--fused-norm", fused]) == 0
    printed = capsys.readouterr().out
    norms = f"{norm} forward", f"{norm} backward"
    for kind in ("convolution forward", "convolution backward", *norms, "optimizer"):
        assert f"| {kind} " in printed
    assert "images/s without the profiler" in printed
