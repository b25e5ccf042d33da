"""The optimizer and its learning rate schedule, by the options. Knows nothing of cores."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from split_affinity.models.weights import classifier_weights
from split_affinity.options.settings import (
    Settings,
    TrainingSettings,
    batches_in_step,
    learning_rate,
)

WARMUP_START = 0.01  # part of the learning rate at which a warm-up begins

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
BIASES = ("bias", "in_proj_bias")  # the latter is nn.MultiheadAttention's


def steps_in_epoch(settings: Settings, epoch_batches: int) -> int:
    """Optimizer steps of an epoch; batches that do not fill a step are left out."""
    return epoch_batches // batches_in_step(settings)


def total_steps(settings: Settings, epoch_batches: int) -> int:
    """Optimizer steps of the whole run: `--steps`, at most those of all epochs; else 50."""
    planned = planned_steps(settings, epoch_batches)
    return min(settings.steps or planned, planned)


def planned_steps(settings: Settings, epoch_batches: int) -> int:
    """Optimizer steps of the learning rate's schedule: those of all epochs, if there are any."""
    if not settings.epochs:
        return settings.steps or 50
    return settings.epochs * steps_in_epoch(settings, epoch_batches)


def weights_by_decay(
    model: nn.Module, settings: TrainingSettings, names: Collection[str]
) -> list[dict[str, Any]]:
    """The named parameters as groups of an optimizer, each with its weight decay.

    The bias of a normalisation layer counts as a bias, as in torchvision's reference training.
    """
    decays = {"other": settings.weight_decay, "flat": 0.0 if settings.skip_decay_1d else None}
    decays |= {"norm": settings.norm_weight_decay, "bias": settings.bias_weight_decay}
    modules = list(model.modules())
    norms = {each for layer in modules if isinstance(layer, NORMS) for each in layer.parameters()}
    biases = {getattr(layer, name, None) for layer in modules for name in BIASES}
    groups: dict[str, list[torch.Tensor]] = {kind: [] for kind in decays}
    for name, weight in model.named_parameters():
        if name in names:
            kinds = {"bias": weight in biases, "norm": weight in norms, "flat": weight.ndim <= 1}
            own = [kind for kind in kinds if kinds[kind] and decays[kind] is not None]
            groups[own[0] if own else "other"].append(weight)
    return [
        {"params": weights, "weight_decay": decays[kind]}
        for kind, weights in groups.items()
        if weights
    ]


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of `--opt` over all parameters, in groups by learning rate and weight decay.

    Frozen ones are included, so that a thaw does not change the layout: torch skips them.
    """
    lr, momentum, fused = learning_rate(settings), settings.momentum, settings.fused
    names = {name for name, _ in model.named_parameters()}
    parts = [(names, lr)]
    if settings.lr_body_factor < 1:
        shape = settings.model, settings.num_classes, settings.image_size
        classifier = classifier_weights(*shape)
        # The rate that is shown is that of the first group: the classifier's.
        parts = [(classifier, lr), (names - classifier, settings.lr_body_factor * lr)]
    groups = [
        group | {"lr": rate}
        for part, rate in parts
        for group in weights_by_decay(model, settings, part)
    ]
    kinds = {
        "sgd": partial(torch.optim.SGD, momentum=momentum, fused=fused),
        "adam": partial(torch.optim.Adam, fused=fused),
        "adamw": partial(torch.optim.AdamW, fused=fused),
        "nadam": torch.optim.NAdam,
        # The constants are those of torchvision's reference training.
        "rmsprop": partial(torch.optim.RMSprop, momentum=momentum, alpha=0.9, eps=0.0316),
    }
    return kinds[settings.opt](groups, lr=lr)


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give weights without a momentum one of 0, if others have been trained before.

    SGD does so by itself, but its fused kernel fails; RMSprop fails if it had no momentum so far.
    """
    is_sgd = isinstance(optimizer, torch.optim.SGD)  # RMSprop begins what has no state at all
    for group in optimizer.param_groups if optimizer.state else ():
        weights = [weight for weight in group["params"] if weight.requires_grad]
        for weight in weights if group.get("momentum") else ():
            state = optimizer.state[weight]
            if (state or is_sgd) and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(weight)


def warmup_epochs(settings: TrainingSettings, epoch_steps: int, all_steps: int) -> float:
    """Epochs of the warm-up, of `epoch_steps` optimizer steps each.

    By default there is one unless `--lr` is given: the first tenth of `all_steps`, at most 5 epochs
    (Goyal et al., arXiv 1706.02677), and less than the first milestone. onecycle has its own.
    """
    if settings.lr_warmup_epochs is not None:
        return settings.lr_warmup_epochs
    if settings.lr is not None or settings.lr_scheduler == "onecycle":
        return 0
    most = 5
    if settings.lr_scheduler == "multistep":
        most = min(most, settings.lr_milestones[0] - 1)
    return min(most, all_steps // 10 / epoch_steps)


class InProportion:
    """Mixed into schedulers with a lowest rate: torch would give all groups that same rate.

    Here it is the lowest rate of the first group; the others stay in proportion to the first.
    """

    def get_lr(self) -> list[float]:
        """The next rate of each group."""
        first, highest = super().get_lr()[0], self.base_lrs[0] or 1.0
        return [first * (base / highest) for base in self.base_lrs]


class Cosine(InProportion, lr_scheduler.CosineAnnealingLR):
    """Half a cosine."""


class Restarts(InProportion, lr_scheduler.CosineAnnealingWarmRestarts):
    """Half cosines, one after the other."""


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, epoch_steps: int, all_steps: int
) -> LRScheduler:
    """The learning rate's schedule, to be stepped after every optimizer step.

    An epoch has `epoch_steps`. After a warm-up, cosine, steps and restarts begin at its end, as in
    torchvision's reference training; milestones count from the beginning.
    """
    warmup = round(warmup_epochs(settings, epoch_steps, all_steps) * epoch_steps)
    lowest, factor, steps = settings.min_lr, settings.lr_gamma, all_steps - warmup
    match settings.lr_scheduler:
        case "cosine":
            main = Cosine(optimizer, T_max=max(1, steps), eta_min=lowest)
        case "step":
            every = settings.lr_step_epochs * epoch_steps
            main = lr_scheduler.StepLR(optimizer, every, factor)
        case "multistep":
            ends = [epoch * epoch_steps - warmup for epoch in settings.lr_milestones]
            main = lr_scheduler.MultiStepLR(optimizer, ends, factor)
        case "onecycle":
            highest = [group["lr"] for group in optimizer.param_groups]
            # The rate alone: torch would cycle the momentum too, whatever --momentum says.
            main = lr_scheduler.OneCycleLR(
                optimizer, highest, total_steps=max(2, steps), cycle_momentum=False
            )
        case "warm-restarts":
            main = Restarts(optimizer, settings.lr_restart_epochs * epoch_steps, 2, lowest)
        case _:
            main = lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if not warmup:
        return main
    rising = lr_scheduler.LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rising, main], milestones=[warmup])
