"""Batch norm fused with what follows it, beside PyTorch's operators. A measurement, not a test.

    python benchmarks/fused_norm.py --precision bf16

Times norms of ResNet-50 with 32 images of 224 px on all cores, forward and backward, both ways in
turn. A row is an activation and what is computed: a ReLU behind the norm, or an addition and a ReLU
whose output has two consumers, or the norm alone. What another CPU would do is seen with
CC="gcc -mno-avx512f" and ATEN_CPU_CAPABILITY=avx2 in the environment.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity.kernels.fused_norm import fused_norm
from split_affinity.lanes.lane import tune_allocator
from split_affinity.machine.description import describe_topology
from split_affinity.machine.topology import read_topology
from split_affinity.text import markdown_table

SHAPES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (1024, 14), (2048, 7))
KINDS = {  # the residual is added, the output clipped, used twice
    "norm, ReLU": (False, True, False),
    "norm, addition, ReLU, twice": (True, True, True),
    "norm": (False, False, False),
}
Timed = tuple[float, float]  # seconds forward and backward


def pytorchs(
    norm: nn.BatchNorm2d, x: torch.Tensor, residual: torch.Tensor | None, relu: bool, twice: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What `fused_norm` computes, by PyTorch's operators."""
    y = norm(x) if residual is None else norm(x) + residual
    y = nn.functional.relu(y, inplace=True) if relu else y
    return (y, y) if twice else y


def timed(
    function: Callable, leaves: list[torch.Tensor], gradients: list[torch.Tensor], call: Callable
) -> Timed:
    """How long one way takes."""
    for leaf in leaves:
        leaf.grad = None
    start_s = time.perf_counter()
    outputs = call(function)
    middle_s = time.perf_counter()
    torch.autograd.backward(outputs, gradients)
    return middle_s - start_s, time.perf_counter() - middle_s


def measure(channels: int, side: int, kind: str, dtype: torch.dtype, rounds: int) -> list[str]:
    """A row of the table."""
    adds, relu, twice = KINDS[kind]
    norm = nn.BatchNorm2d(channels)
    drawn = (torch.randn(32, channels, side, side).to(dtype) for _ in range(4))
    drawn = [each.contiguous(memory_format=torch.channels_last) for each in drawn]
    x, residual = drawn[0].requires_grad_(), drawn[1].requires_grad_() if adds else None
    leaves, gradients = (
        [x, *([residual] if adds else []), *norm.parameters()],
        drawn[2:][: 1 + twice],
    )

    def call(function: Callable) -> list[torch.Tensor]:
        output = function(norm, x, residual, relu, twice)
        return list(output) if twice else [output]

    times = [
        [timed(function, leaves, gradients, call) for function in (pytorchs, fused_norm)]
        for _ in range(rounds + 2)
    ][2:]
    row = [f"{channels} x {side} x {side}", kind]
    for place in range(2):
        ratios = [theirs[place] / ours[place] for theirs, ours in times]
        row.append(f"{1e3 * statistics.median(each[0][place] for each in times):.1f}")
        row.append(f"{1e3 * statistics.median(each[1][place] for each in times):.1f}")
        row.append(f"{statistics.median(ratios):.2f}")
    return row


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    tune_allocator()
    dtype = torch.bfloat16 if asked.precision == "bf16" else torch.float32
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{describe_topology(read_topology())}; PyTorch uses {capability}; {asked.precision}")
    rows = [
        measure(*shape, kind, dtype, asked.rounds)
        for kind in KINDS
        for shape in SHAPES
        if kind == "norm, ReLU" or shape[0] >= 256
    ]
    header = ["activation", "computed", "forward ms, PyTorch", "fused", "ratio"]
    print(markdown_table([*header, "backward ms, PyTorch", "fused", "ratio"], rows))


if __name__ == "__main__":
    main()
