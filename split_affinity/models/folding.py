"""Models for evaluation alone: batch norm, activation and residual sum within the convolutions."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torchvision.ops import StochasticDepth

from split_affinity.models.registry import drop_branch
from split_affinity.models.tracing import CannotTrace, trace

# Activations that a convolution's kernel computes itself: their names, and numbers, for oneDNN.
FUSED: dict[type, tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
ADDITIONS = (operator.add, operator.iadd, torch.add)
DROPOUTS = (nn.Dropout, StochasticDepth)
RELUS = (nn.functional.relu, torch.relu)


def fold(model: nn.Module, bf16: bool, frozen_alone: bool = False) -> nn.Module:
    """A copy of a model in evaluation mode, as its weights are now, without batch norms.

    A norm is folded into the convolution before it, if nothing else uses what that computes; the
    activation and the residual sum that follow go into the same kernel. These weights are the
    copy's own, with `bf16` in bfloat16, in which it then computes; it shares all else. With
    `frozen_alone` the copy can be trained: only the part in front of all trained weights changes.
    A model that has nothing of this kind, or no graph, comes back itself.

    No other thread may call a model meanwhile (see `trace`).
    """
    try:
        traced = trace(model)
    except CannotTrace:
        return model
    folder = Folder(traced, bf16, trained_nodes(traced) if frozen_alone else ())
    for node in list(traced.graph.nodes):
        folder.skip(node)
    for node in list(traced.graph.nodes):
        if folder.is_foldable(node):
            folder.fold(node)
    if not folder.layers:
        return model
    reuse_memory(traced, folder.layers)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def trained_nodes(traced: fx.GraphModule) -> set[fx.Node]:
    """The operations through which gradients flow."""
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        weights: Collection[torch.Tensor] = ()
        if node.op == "call_module":
            weights = list(traced.get_submodule(node.target).parameters())
        elif node.op == "get_attr":
            weights = [operator.attrgetter(node.target)(traced)]
        if any(each.requires_grad for each in weights) or found & {*node.all_input_nodes}:
            found.add(node)
    return found


class Folder:
    """Replaces norms in a graph; `layers` has the convolutions that it made, by their nodes.

    Gradients flow through the operations of `trained`, which so stay as they are.
    """

    def __init__(self, traced: fx.GraphModule, bf16: bool, trained: Collection[fx.Node] = ()):
        self.layers: dict[fx.Node, FoldedConvolution] = {}
        self._traced, self._bf16, self._trained = traced, bf16, trained
        self._order = {node: place for place, node in enumerate(traced.graph.nodes)}

    def _module(self, node: Any) -> nn.Module | None:
        """The layer that a node calls, if it calls one that has no hooks but those of dropping."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs:
            return None
        module = self._traced.get_submodule(node.target)
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # In evaluation mode such a hook does nothing.
        dropping = all(getattr(hook, "func", None) is drop_branch for hook in hooks)
        return module if dropping else None

    def skip(self, node: fx.Node) -> None:
        """Take a dropout out of the graph, which does nothing in evaluation mode."""
        module = self._module(node)
        if isinstance(module, DROPOUTS) and not module.training and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            self._traced.graph.erase_node(node)

    def is_foldable(self, node: fx.Node) -> bool:
        """Whether a node is a norm in evaluation mode whose convolution has no other user."""
        norm = self._module(node)
        if node in self._trained or not is_norm(norm):
            return False
        if norm.training or norm.running_var is None:
            return False
        convolution = self._module(node.args[0])
        return (
            type(convolution) is nn.Conv2d
            and convolution.padding_mode == "zeros"
            and not isinstance(convolution.padding, str)
            and len(node.args[0].users) == 1
        )

    def fold(self, node: fx.Node) -> None:
        """Put a convolution in place of one with a norm and what follows it."""
        first, graph = node.args[0], self._traced.graph
        convolution, norm = self._module(first), self._module(node)
        last, other, activation = node, None, getattr(norm, "act", None)
        if activation is None:
            if other := self._residual(node):
                (last,) = node.users
            if (follows := self._activation(last)) and not (other and type(follows) is not nn.ReLU):
                activation = follows
        layer = FoldedConvolution(convolution, norm, activation or nn.Identity(), self._bf16)
        layer.stands_for = first.target
        name = f"folded{len(self.layers)}"
        self._traced.add_submodule(name, layer)
        inputs = (first.args[0], other) if other else (first.args[0],)
        replaced = last
        if activation and activation is not getattr(norm, "act", None):
            (replaced,) = last.users
        with graph.inserting_before(last):
            new = graph.call_module(name, inputs)
        self._order[new] = self._order[last]
        replaced.replace_all_uses_with(new)
        for each in dict.fromkeys((replaced, last, node, first)):
            graph.erase_node(each)
        self.layers[new] = layer

    def _activation(self, node: fx.Node) -> nn.Module | None:
        """The activation that alone uses what a node gives, if a kernel can compute it."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if user.op == "call_function" and user.target in RELUS:
            return nn.ReLU()
        module = self._module(user)
        return module if type(module) in FUSED else None

    def _residual(self, node: fx.Node) -> fx.Node | None:
        """What is added to a norm's result, if the convolution can wait until it is there."""
        if len(node.users) != 1:
            return None
        (added,) = node.users
        pair = added.args
        if added.target not in ADDITIONS or added.kwargs:
            return None
        if not all(isinstance(each, fx.Node) for each in pair) or pair[0] is pair[1]:
            return None
        other = pair[1] if pair[0] is node else pair[0]
        if other in self._trained:
            return None
        first, end = node.args[0], self._order[added]
        # In the meantime, another user could change its input in place.
        waits = (self._order[each] for each in first.args[0].users if each is not first)
        if any(self._order[first] < place < end for place in waits):
            return None
        changed = added.target is operator.iadd and pair[0] is other
        if changed and any(self._order[each] > end for each in other.users):
            return None
        return other


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a batch norm, or timm's batch norm with an activation and no more."""
    if type(module) is nn.BatchNorm2d:
        return True
    of_timm = type(module).__module__.startswith("timm.") and isinstance(module, nn.BatchNorm2d)
    return of_timm and hasattr(module, "act") and type(getattr(module, "drop", None)) is nn.Identity


def reuse_memory(traced: fx.GraphModule, layers: dict[fx.Node, FoldedConvolution]) -> None:
    """Let sums be written where their other summand is, if nothing needs that any more.

    It must be the result of a folded convolution, and used by such alone: they give new tensors,
    while other layers may give a part of the same one.
    """
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    for node, layer in layers.items():
        other = node.args[1] if len(node.args) == 2 else None
        users = {*other.users} - {node} if other in layers else set()
        earlier = all(each in layers and order[each] < order[node] for each in users)
        layer.in_place = other in layers and earlier and other is not node.args[0]


class FoldedConvolution(nn.Module):
    """A convolution with the batch norm after it, an activation, and a sum before that.

    It has no gradients. Where oneDNN has no such kernel, the parts are computed one by one.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.Module, activation: nn.Module, bf16: bool):
        super().__init__()
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        folded = nn.utils.fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
        kind = torch.bfloat16 if bf16 else torch.float32
        self.weight, self.bias = (nn.Buffer(each.detach().to(kind)) for each in folded)
        self.padding, self.stride = convolution.padding, convolution.stride
        self.dilation, self.groups = convolution.dilation, convolution.groups
        self.activation, self.in_place = activation, False
        self.stands_for = ""  # the name of the convolution in the model
        self.fused = FUSED.get(type(activation)) if has_kernels(bf16) else None

    def forward(self, images: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(n, in, h, w) to (n, out, h', w'); the residual has the shape of the result."""
        images = images.to(self.weight.dtype)
        shape = self.padding, self.stride, self.dilation, self.groups
        if self.fused and residual is not None and self._fits(images, residual):
            name = None if self.fused[0] == "none" else self.fused[0]
            rest = self.weight, self.bias, *shape, "add", 1.0, name, [], None
            if self.in_place:
                return torch.ops.mkldnn._convolution_pointwise_.binary(residual, images, *rest)
            return torch.ops.mkldnn._convolution_pointwise.binary(images, residual, *rest)
        if self.fused and residual is None:
            kernel = torch.ops.mkldnn._convolution_pointwise
            return kernel(images, self.weight, self.bias, *shape, *self.fused, "")
        padding, stride, *rest = shape
        computed = nn.functional.conv2d(images, self.weight, self.bias, stride, padding, *rest)
        return self.activation(computed if residual is None else computed + residual)

    def _fits(self, images: torch.Tensor, residual: torch.Tensor) -> bool:
        """Whether a residual has the type and the shape of the result, and the images are in
        channels_last: a kernel needs that.
        """
        sides = (
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, padding, dilation, kernel, stride in zip(
                images.shape[2:],
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                self.stride,
                strict=True,
            )
        )
        expected = len(images), len(self.weight), *sides
        last = images.stride(1) == 1 and images.stride(3) == images.shape[1]
        return last and residual.dtype == images.dtype and residual.shape == expected


def has_kernels(bf16: bool) -> bool:
    """Whether oneDNN has convolutions with an activation or a sum on this machine."""
    mkldnn = torch.backends.mkldnn
    there = mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return there and (not bf16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
