"""Batch normalisation in training, with the addition and the ReLU that follow, as one operator.

fused_norm.c has the arithmetic. This is what PyTorch's autograd knows of it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from split_affinity.kernels.compiler import load_library

LEAST_CHANNELS = 16  # of a vector in the C file
# Called with each norm before it is computed, as nn.Module's hooks are for layers that are called.
before_fused_norm: list[Callable[[nn.Module], object]] = []

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Job(ctypes.Structure):
    """`struct norm` of the C file, where the fields are explained."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "rows channels parts bf16 relu".split()),
        *((name, ctypes.c_double) for name in "eps momentum".split()),
        *(
            (name, ctypes.c_void_p)
            for name in """weight bias running_mean running_var mean inverse_std x residual y
            dy dy2 dz dx dweight dbias room""".split()
        ),
    )


@functools.cache
def kernels() -> ctypes.CDLL:
    """The compiled C file. Raises CannotCompile."""
    library = load_library("fused_norm.c")
    library.fused_norm_room.argtypes = ctypes.c_int64, ctypes.c_int64
    library.fused_norm_room.restype = ctypes.c_int64
    return library


def run_kernel(
    name: str, x: torch.Tensor, numbers: dict[str, float], **tensors: torch.Tensor | None
) -> None:
    """Run a function of the C file on the calling thread's OpenMP team, without the GIL."""
    channels, parts = x.shape[1], torch.get_num_threads()
    room = torch.empty(kernels().fused_norm_room(channels, parts), dtype=torch.uint8)
    arrays = {"x": x, "room": room, **tensors}
    pointers = {each: array.data_ptr() for each, array in arrays.items() if array is not None}
    job = Job(
        rows=x.numel() // channels,
        channels=channels,
        parts=parts,
        bf16=x.dtype == torch.bfloat16,
        **numbers,
        **pointers,
    )
    getattr(kernels(), name)(ctypes.byref(job))


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Room for an activation (n, channels, height, width), as the C file wants it."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def dense(x: torch.Tensor) -> torch.Tensor:
    """An activation as the C file wants it."""
    return x.contiguous(memory_format=torch.channels_last)


class FusedNorm(torch.autograd.Function):
    """Normalise a batch, add, clip. With `twice` the output comes twice, for two consumers: so
    their gradients come apart, and are added on the way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running: tuple[torch.Tensor | None, torch.Tensor | None],
        numbers: dict[str, float],
        twice: bool,
    ) -> Output:
        x, y = dense(x), empty_like(x)
        residual = None if residual is None else dense(residual)
        mean, inverse_std = torch.empty(2, x.shape[1], dtype=torch.float32).unbind()
        ctx.numbers, ctx.adds = numbers, residual is not None
        run_kernel(
            "fused_norm_forward",
            x,
            numbers,
            residual=residual,
            weight=weight,
            bias=bias,
            running_mean=running[0],
            running_var=running[1],
            mean=mean,
            inverse_std=inverse_std,
            y=y,
        )
        # Without a residual the input tells what was clipped.
        clipped = y if ctx.adds and numbers["relu"] else None
        ctx.save_for_backward(x, clipped, weight, bias, mean, inverse_std)
        return (y, y.detach()) if twice else y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor, dy2: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        x, y, weight, bias, mean, inverse_std = ctx.saved_tensors
        dx, dy = empty_like(x), dense(dy)
        dy2 = None if dy2 is None else dense(dy2)
        dz = empty_like(x) if ctx.adds or dy2 is not None else None
        dweight, dbias = torch.empty(2, x.shape[1], dtype=torch.float32).unbind()
        run_kernel(
            "fused_norm_backward",
            x,
            ctx.numbers,
            residual=dz if ctx.adds else None,  # only whether there was one
            weight=weight,
            bias=bias,
            mean=mean,
            inverse_std=inverse_std,
            y=y,
            dy=dy,
            dy2=dy2,
            dz=dz,
            dx=dx,
            dweight=dweight,
            dbias=dbias,
        )
        gradients = dx, dz if ctx.adds else None, dweight, dbias
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(each if needed else None for each, needed in wanted), None, None, None


def fused_norm(
    norm: _BatchNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    relu: bool = False,
    twice: bool = False,
) -> Output:
    """What `norm` makes of an activation (n, channels, height, width), plus `residual`, clipped.

    With `twice`, the same output twice, for two consumers. What the kernels are not made for goes
    through PyTorch's operators: evaluation mode above all.
    """
    for hook in before_fused_norm:
        hook(norm)
    if not suits(norm, x, residual):
        y = norm(x) if residual is None else norm(x) + residual
        y = nn.functional.relu(y) if relu else y
        return (y, y) if twice else y
    momentum, keeps = norm.momentum, norm.running_mean is not None
    if keeps and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the mean of all batches so far
            momentum = 1 / float(norm.num_batches_tracked)
    running = (norm.running_mean, norm.running_var) if keeps else (None, None)
    numbers = {"eps": norm.eps, "momentum": momentum or 0.0, "relu": relu}
    return FusedNorm.apply(x, residual, norm.weight, norm.bias, running, numbers, twice)


def suits(norm: _BatchNorm, x: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether the kernels are made for this: a batch to learn from, of more than one row."""
    own = [each for each in (norm.weight, norm.bias, norm.running_mean) if each is not None]
    return (
        norm.training
        and x.ndim == 4
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.shape[1] >= LEAST_CHANNELS
        and x.numel() > x.shape[1]
        and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype))
        and all(each.dtype == torch.float32 for each in own)
    )
