"""A model as a graph of its layers, by torch.fx: for what must see which layer follows which."""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torchvision
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from split_affinity.errors import one_line

# Called as they are: a norm is what others look for (timm's BatchNormAct2d has an activation in
# it), and stochastic depth reads its own mode. torch.fx adds the layers of torch.nn.
LEAVES = (_BatchNorm, StochasticDepth)


class CannotTrace(Exception):
    """The code of a model does not have the form of a graph; the message says why, in one line."""


def trace(model: nn.Module) -> fx.GraphModule:
    """A graph of the model's layers, which computes what the model computes, bit for bit.

    It shares the model's layers, parameters and buffers, by their names. It is for the mode in
    which the model is now: layers look up their mode in each call, but what the model's own code
    decides by `self.training` is decided here. A submodule stays whole if it has hooks, which so
    run, or if its code branches on values or shapes. No other thread may call a model meanwhile:
    torch.fx replaces `nn.Module.__call__` for all of them. Raises CannotTrace.
    """
    if has_hooks(model):
        raise CannotTrace(f"{type(model).__name__} has forward hooks")
    whole: set[type] = set()
    while True:
        tracer = LayerTracer(model, whole)
        try:
            with all_contexts():
                graph = tracer.trace(model)
        except Exception as error:  # whatever a model's code makes of values that it does not get
            if tracer.failed is None:
                reason = f"{type(model).__name__}: {one_line(error)}"
                raise CannotTrace(reason) from error
            whole.add(tracer.failed)
        else:
            return fx.GraphModule(model, graph, type(model).__name__)


class LayerTracer(fx.Tracer):
    """Traces down to layers, and to the types that are to stay `whole`.

    `failed` is the type of the innermost submodule, below the model, that cannot be traced.
    """

    def __init__(self, model: nn.Module, whole: Collection[type]):
        of_timm = any(type(each).__module__.startswith("timm.") for each in model.modules())
        timm = sys.modules["timm"].models if of_timm else None  # which made the model
        functions = tuple(timm.get_notrace_functions()) if timm else ()
        super().__init__((math, torchvision.ops), functions)
        self.failed: type | None = None
        self._leaves = (*LEAVES, *(timm.get_notrace_modules() if timm else ()))
        self._whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph calls a module instead of what that calls."""
        if isinstance(m, self._leaves) or type(m) in self._whole or has_hooks(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a submodule, or enter a call of it; remember it if that fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and not self.is_leaf_module(m, ""):
                self.failed = type(m)
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the result of an operation while the model's code runs."""
        return InPlaceProxy(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Enter an operation; a graph does not hold the `with` around it, so there can be none."""
        if not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
            raise CannotTrace("it changes autocast, or whether there are gradients, on its way")
        return super().create_proxy(*args, **kwargs)


class InPlaceProxy(fx.Proxy):
    """Keeps `+=` and `*=` in place; torch.fx's own makes `+` and `*` of them, with a new tensor."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


@contextlib.contextmanager
def all_contexts() -> Iterator[None]:
    """Autocast and gradients: code that turns one of them off is noticed."""
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after a module's forward, which a trace would not see."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
