"""Which weights are trained and which stay as they are: `--freeze` and `--freeze-epochs`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from torch import nn

from split_affinity.errors import UserError
from split_affinity.models.weights import Weights, classifier_weights
from split_affinity.options.settings import TrainingSettings
from split_affinity.text import plural


def trainable_weights(model: nn.Module) -> Weights:
    """The weights that are not frozen, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def layer_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter names by the part of the model that has them.

    The parts are the model's children. If there are fewer than four, or one has nearly all names,
    the parts are their children, and so on. If no depth will do, it is the second.
    """
    names = list(names)
    by_depth = []
    for depth in range(1, 5):
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(".".join(name.split(".")[:-1][:depth]) or name, []).append(name)
        if len(groups) >= 4 and max(map(len, groups.values())) < 0.8 * len(names):
            return groups
        by_depth.append(groups)
    return by_depth[1]


def freeze(
    model: nn.Module, asked: str | None, name: str, num_classes: int, image_size: int
) -> tuple[str, ...]:
    """Freeze what `--freeze` asks for; returns the names of these weights.

    `body` is all but the classifier, other names are layer groups. Raises UserError for a group
    that does not exist, or if nothing is left to train.
    """
    if asked is None:
        return ()
    weights = trainable_weights(model)
    classifier = classifier_weights(name, num_classes, image_size)
    groups = layer_groups(weights) | {"body": [each for each in weights if each not in classifier]}
    frozen: dict[str, None] = {}
    for group in asked.split(","):
        if group not in groups:
            known = f"its layer groups are {', '.join(groups)} (all but the classifier)"
            raise UserError(f"--freeze {asked}: {name} has no {group!r}; {known}")
        frozen |= dict.fromkeys(groups[group])
    if len(frozen) == len(weights):
        raise UserError(f"--freeze {asked}: nothing of {name} would be left to train")
    for each in frozen:
        weights[each].requires_grad_(False)
    begin_training(model)
    return tuple(frozen)


def begin_training(model: nn.Module) -> None:
    """Put a model into training mode, but modules whose weights are all frozen into evaluation."""
    model.train()
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


def is_frozen(settings: TrainingSettings, epoch: int) -> bool:
    """Whether the weights of `--freeze` are frozen in an epoch, counted from 0."""
    return bool(settings.freeze) and epoch < (settings.freeze_epochs or math.inf)


def mostly_frozen(settings: TrainingSettings) -> str | None:
    """What is frozen in most epochs of a run: all of `--freeze`, or nothing."""
    return settings.freeze if is_frozen(settings, (settings.epochs or 0) // 2) else None


def describe_frozen(settings: TrainingSettings, model: nn.Module, frozen: Collection[str]) -> str:
    """How much of a model is frozen, and for how long."""
    count = plural(len(list(model.parameters())), "weight")
    span = f" for {plural(settings.freeze_epochs, 'epoch')}" if settings.freeze_epochs else ""
    return f"frozen: {len(frozen)} of {count} ({settings.freeze}){span}"
