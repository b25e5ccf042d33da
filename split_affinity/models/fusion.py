"""Batch normalisation fused with what follows it: a model's graph for training.

Evaluation, export and `predict` use the model itself.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx, nn

from split_affinity.kernels.fused_norm import LEAST_CHANNELS, fused_norm
from split_affinity.models.tracing import has_hooks, trace

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
RELUS = {nn.functional.relu, nn.functional.relu_, torch.relu, torch.relu_, "relu", "relu_"}


def fuse_norms(model: nn.Module) -> tuple[nn.Module, int]:
    """A model for training that shares the layers of `model`, and how many norms of it are fused.

    It is for the mode in which the model is now: layers in evaluation mode, such as frozen ones,
    stay as they are. Raises CannotTrace.
    """
    traced = trace(model)
    drop_identities(traced)
    norms = [node for node in traced.graph.nodes if can_be_fused(traced, node)]
    # From the end on, since the later of two norms that are added up takes the addition.
    for norm in reversed(norms):
        fuse(traced, norm)
    traced.recompile()
    return traced, len(norms)


def layer_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer that a node calls, if it calls one that has no hooks."""
    if node.op != "call_module":
        return None
    layer = traced.get_submodule(node.target)
    return None if has_hooks(layer) or layer._backward_hooks else layer


def operation_of(node: fx.Node) -> Any:
    """The function that a node calls, or the name of its method."""
    return node.target if node.op in ("call_function", "call_method") else None


def drop_identities(traced: fx.GraphModule) -> None:
    """Take out layers that do nothing, such as timm's places for what it leaves out."""
    for node in list(traced.graph.nodes):
        if type(layer_of(traced, node)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def has_norms(model: nn.Module) -> bool:
    """Whether a model has norms that can be fused, if they are trained."""
    return any(is_known(layer) for layer in model.modules())


def is_known(layer: nn.Module | None) -> bool:
    """Whether a layer is a norm that the kernels know."""
    known = type(layer) is nn.BatchNorm2d or own_activation(layer) is not None
    return known and layer.num_features >= LEAST_CHANNELS


def can_be_fused(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a norm in training mode that the kernels know."""
    layer = layer_of(traced, node)
    return is_known(layer) and layer.training and len(node.args) == 1 and not node.kwargs


def own_activation(layer: nn.Module | None) -> type | None:
    """The activation inside timm's BatchNormAct2d: nn.ReLU or nn.Identity; None for all others."""
    timm = sys.modules.get("timm")
    if not timm or type(layer) is not timm.layers.BatchNormAct2d or has_hooks(layer.act):
        return None
    kind = type(layer.act)
    return kind if type(layer.drop) is nn.Identity and kind in (nn.ReLU, nn.Identity) else None


def is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node clips at 0."""
    return operation_of(node) in RELUS or type(layer_of(traced, node)) is nn.ReLU


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses a node's output, if it is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def added_to(traced: fx.GraphModule, node: fx.Node, addition: fx.Node | None) -> fx.Node | None:
    """What an addition adds to a node's output; None if it is no addition of two activations.

    None too if others see that the addition writes into what it adds.
    """
    if addition is None or operation_of(addition) not in ADDITIONS or addition.kwargs:
        return None
    others = [each for each in addition.args if each is not node]
    if len(addition.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    seen = addition.args[0] is not node and len(others[0].users) > 1
    return None if seen and is_in_place(traced, addition) else others[0]


def is_in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may write into what it is given."""
    operation = operation_of(node)
    name = getattr(operation, "__name__", operation) or ""
    of_operator = getattr(operation, "__module__", "") == "_operator" and name.startswith("i")
    by_layer = node.op == "call_module" and getattr(
        traced.get_submodule(node.target), "inplace", False
    )
    return bool(name.endswith("_") or of_operator or node.kwargs.get("inplace") or by_layer)


def fuse(traced: fx.GraphModule, norm: fx.Node) -> None:
    """Replace a norm, with the addition and the ReLU behind it, by one operator."""
    fused = [norm]
    relu, residual = own_activation(layer_of(traced, norm)) is nn.ReLU, None
    if not relu:
        if residual := added_to(traced, norm, only_user(norm)):
            fused.append(only_user(norm))
        after = only_user(fused[-1])
        if after and is_relu(traced, after):
            relu = True
            fused.append(after)
    last = fused[-1]
    consumers = list(last.users)
    twice = len(consumers) == 2 and not any(
        is_in_place(traced, each) or each.op == "output" or each.all_input_nodes.count(last) > 1
        for each in consumers
    )
    with traced.graph.inserting_before(last):
        layer = traced.graph.get_attr(norm.target)
        arguments = {"residual": residual, "relu": relu, "twice": twice}
        output = traced.graph.call_function(fused_norm, (layer, norm.args[0]), arguments)
        outputs = [output] * len(consumers)
        if twice:
            outputs = [traced.graph.call_function(operator.getitem, (output, i)) for i in (0, 1)]
    for consumer, own in zip(consumers, outputs, strict=True):
        consumer.replace_input_with(last, own)
    for node in reversed(fused):
        traced.graph.erase_node(node)
