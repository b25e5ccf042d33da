"""Sums of operators. Run: python -m pytest tests/training/test_operator_sums.py"""

import pytest
from profiled import made_up_times

from split_affinity.training.operators import ENGINE, OUTSIDE, kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::conv2d", "convolution forward"),
        ("mkldnn::_convolution_pointwise_", "convolution forward"),
        (f"{ENGINE}ConvolutionBackward0", "convolution backward"),
        ("aten::native_batch_norm_backward", "batch norm backward"),
        ("aten::batch_norm", "batch norm forward"),
        ("NativeBatchNormBackward0", "batch norm backward"),
        ("aten::relu_", "ReLU forward"),
        ("ReluBackward0", "ReLU backward"),
        ("FusedNorm", "fused norm forward"),
        ("FusedNormBackward", "fused norm backward"),
        ("aten::add_", "additions"),
        ("aten::addmm", "matrix products"),
        ("aten::topk", "loss and scores"),
        (f"{ENGINE}torch::autograd::AccumulateGrad", "sums of gradients"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("Optimizer.step#SGD.step", "optimizer"),
        ("aten::empty", None),
    ],
)
def test_kinds_of_operators(name, kind):
    assert kind_of(name) == kind


def test_operators_belong_to_phases_and_layers():
    times = made_up_times()
    found = {
        (row.phase, row.layer_group, row.operator, row.kind): (row.self_ms, row.total_ms)
        for row in times.rows
        if row.kind != OUTSIDE
    }
    assert found == {
        ("forward", "input", "aten::clone", "casts and copies"): (5, 5),
        ("forward", "conv1", "aten::clone", "casts and copies"): (0.5, 0.5),
        ("forward", "conv1", "aten::conv2d", "convolution forward"): (30, 40),
        ("forward", "conv1", "aten::copy_", "convolution forward"): (10, 10),
        ("forward", "fc", "aten::linear", "matrix products"): (8, 8),
        ("backward", "loss", "aten::topk", "loss and scores"): (4, 4),
        ("backward", "loss", f"{ENGINE}NllLossBackward0", "loss and scores"): (3, 3),
        ("backward", "fc", f"{ENGINE}AddmmBackward0", "matrix products"): (20, 20),
        ("backward", "conv1", f"{ENGINE}ConvolutionBackward0", "convolution backward"): (10, 60),
        ("backward", "conv1", "aten::convolution_backward", "convolution backward"): (50, 50),
        (
            *("backward", "conv1", f"{ENGINE}torch::autograd::AccumulateGrad"),
            "sums of gradients",
        ): (6, 6),
    }
    outside = {row.phase: (row.calls, row.self_ms) for row in times.rows if row.kind == OUTSIDE}
    assert outside == {
        "forward": (2, pytest.approx(46.5)),
        "backward": (2, pytest.approx(107)),
        "update": (1, pytest.approx(50)),
    }
