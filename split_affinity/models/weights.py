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

# How the names of a DenseNet's layers were before: with a dot in front of their number.
DENSENET_NAMES = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")

Weights = dict[str, torch.Tensor]  # parameters, or buffers, by name


def classifier_weights(name: str, num_classes: int, image_size: int) -> set[str]:
    """Names of the weights whose shape depends on the number of classes."""
    some, more = (
        meta_model(name, count, image_size).state_dict() for count in (num_classes, num_classes + 1)
    )
    return {weight for weight, value in some.items() if value.shape != more[weight].shape}


def listed_tensors(tensors: Weights, names: Collection[str], most: int = 4) -> str:
    """The first names of some, each with its shape, and how many more there are."""
    shapes = (", ".join(map(str, tensors[name].shape)) for name in names)
    texts = [f"{name} ({shape})" for name, shape in zip(names, shapes, strict=True)]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def versioned(weights: Weights, model: nn.Module) -> OrderedDict[str, torch.Tensor]:
    """Weights as the model's `load_state_dict` takes them: MNASNet's insists on a version, which a
    plain dictionary has not.
    """
    state = OrderedDict(weights)
    state._metadata = {"": {"version": model._version}}
    return state


def take_weights(
    model: nn.Module, saved: Weights, left_out: Collection[str] = (), least: float = 0.5
) -> str:
    """Give a model all saved tensors that have the name and the shape of one of its own, but for
    those `left_out`; says what was taken, what is new, and which names the model does not know.

    The model itself knows its names in older files (a ViT's), but for DenseNet's, which torchvision
    looks after elsewhere; BatchNorm's counts of batches may be missing there. Raises UserError if
    fewer than `least` of the tensors fit.
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
    rest = f"; left over: {listed_tensors(saved, unknown)}" if unknown else ""
    listed = listed_tensors(own, new)
    if taken < least * total:
        raise UserError(f"only {taken} of {total} tensors fit; missing: {listed}{rest}")
    return (f"{taken} of {total} tensors; new: {listed}" if new else f"all {total} tensors") + rest


def with_tensors(model: nn.Module, tensors: Weights) -> nn.Module:
    """A copy of a model with other tensors, by the names of its state_dict, in place of some of its
    own; all others belong to both. To be run while the model runs, unlike torch's functional_call,
    which puts the others into the model itself for a while.
    """
    own = model.state_dict(keep_vars=True)
    kept = {id(tensor): tensor for tensor in own.values()}
    return copy.deepcopy(model, kept | {id(own[name]): tensors[name] for name in tensors})
