"""Weights by their names: which belong to the classifier, which fit a model, copies with others."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Collection

import torch
from torch import nn

from split_affinity.errors import UserError
from split_affinity.models.registry import meta_model

# Older names of a DenseNet's layers have a dot before the number.
DENSENET_NAMES = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")

Weights = dict[str, torch.Tensor]  # parameters, or buffers, by name


def classifier_weights(name: str, num_classes: int, image_size: int) -> set[str]:
    """Names of the weights whose shape depends on the number of classes."""
    some, more = (
        meta_model(name, count, image_size).state_dict() for count in (num_classes, num_classes + 1)
    )
    return {weight for weight, value in some.items() if value.shape != more[weight].shape}


def list_tensors(tensors: Weights, names: Collection[str], most: int = 4) -> str:
    """The first names, each with its shape, and how many more there are."""
    texts = [f"{name} ({', '.join(map(str, tensors[name].shape))})" for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def versioned(weights: Weights, model: nn.Module) -> OrderedDict[str, torch.Tensor]:
    """The weights for the model's `load_state_dict`: MNASNet's wants a version beside them."""
    state = OrderedDict(weights)
    state._metadata = {"": {"version": model._version}}
    return state


def take_weights(
    model: nn.Module, saved: Weights, left_out: Collection[str] = (), least: float = 0.5
) -> str:
    """Load all saved tensors that fit by name and shape, but for `left_out`; returns a description.

    The description says what was loaded, what stays new, and which names the model does not know.
    Raises UserError if fewer than the part `least` of the tensors fit. BatchNorm's counts of
    batches do not matter, and a model knows its older names, but for DenseNet's.
    """
    own = model.state_dict()
    saved = {DENSENET_NAMES.sub(r"\1", name): value for name, value in saved.items()}
    fitting = {
        name: value
        for name, value in saved.items()
        if name not in left_out and (name not in own or own[name].shape == value.shape)
    }
    try:
        new, unknown = model.load_state_dict(versioned(fitting, model), strict=False)
    except RuntimeError as error:  # a name of older files, with another shape
        raise UserError(str(error).splitlines()[-1].strip()) from None
    counts = {name for name in own.keys() - saved.keys() if name.endswith("num_batches_tracked")}
    total = len(own) - len(counts)
    taken = total - len(new)
    rest = f"; left over: {list_tensors(saved, unknown)}" if unknown else ""
    listed = list_tensors(own, new)
    if taken < least * total:
        raise UserError(f"only {taken} of {total} tensors fit; missing: {listed}{rest}")
    return (f"{taken} of {total} tensors; new: {listed}" if new else f"all {total} tensors") + rest


def with_tensors(model: nn.Module, tensors: Weights) -> nn.Module:
    """A copy of a model with other tensors, by their names in its state_dict; it shares the rest.

    The copy can run while the model runs: torch's functional_call would change the model itself.
    """
    own = model.state_dict(keep_vars=True)
    kept = {id(tensor): tensor for tensor in own.values()}
    return copy.deepcopy(model, kept | {id(own[name]): tensors[name] for name in tensors})
