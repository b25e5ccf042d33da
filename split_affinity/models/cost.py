"""What a model costs, counted without computing anything: parameters, operations, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from split_affinity.errors import LESS_MEMORY, UserError
from split_affinity.machine.topology import Topology
from split_affinity.models.freezing import describe_frozen, freeze, mostly_frozen
from split_affinity.models.registry import check_input_shape, meta_model
from split_affinity.options.settings import Settings
from split_affinity.text import plural


@dataclass(frozen=True)
class ModelFigures:
    """The size of a model, and its operations for one image."""

    parameters: int
    weight_bytes: int  # with buffers
    flops: dict[str, float]  # of convolutions and matrix products, by phase


def measure_model(
    name: str, num_classes: int, image_size: int, frozen: str | None = None
) -> ModelFigures:
    """Count by a run on the meta device, with the weights of `frozen` (as `--freeze`) frozen."""
    model = meta_model(name, num_classes, image_size)
    check_input_shape(model, name, 2, image_size)
    freeze(model, frozen, name, num_classes, image_size)
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as forward:
        output = model(images)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    counters = {"forward": forward, "backward": backward}
    flops = {phase: each.get_total_flops() / len(images) for phase, each in counters.items()}
    return ModelFigures(parameters, weight_bytes, flops)


def describe_model(settings: Settings, num_classes: int, image_size: int) -> list[str]:
    """A line on size and work, the work of most epochs, and one on what is frozen, if anything."""
    shape = settings.model, num_classes, image_size
    figures = measure_model(*shape, mostly_frozen(settings))
    forward, backward = (figures.flops[phase] / 1e9 for phase in ("forward", "backward"))
    line = (
        f"model {settings.model}: {figures.parameters:,} parameters for {num_classes} classes, "
        f"{figures.weight_bytes / 2**20:.1f} MiB; an image of {image_size} px takes "
        f"{forward:.2f} GFLOP forward, {backward:.2f} backward"
    )
    if not settings.freeze:
        return [line]
    model = meta_model(*shape)
    frozen = describe_frozen(settings, model, freeze(model, settings.freeze, *shape))
    span = " in most epochs" if settings.freeze_epochs else ""
    return [line, f"{frozen}; forward has {forward / (forward + backward):.2%} of the work{span}"]


def describe_teacher(name: str, num_classes: int, image_size: int) -> str:
    """A line on a teacher's size and work; it runs forward only."""
    figures = measure_model(name, num_classes, image_size)
    return (
        f"teacher {name}: {figures.weight_bytes / 2**20:.1f} MiB; an image takes "
        f"{figures.flops['forward'] / 1e9:.2f} GFLOP more forward"
    )


def weight_copies(settings: Settings, is_trained: bool = True) -> int:
    """How many times the size of the weights a run holds in memory, at least."""
    if settings.test_only:
        return 1
    if not is_trained:
        return 1 + settings.model_ema
    weights_and_gradients = 2
    momentum = settings.momentum > 0
    optimizer = {"sgd": momentum, "adam": 2, "adamw": 2, "nadam": 2, "rmsprop": 1 + momentum}
    delayed = 2 * (settings.schedule == "delayed")
    sent_to_ranks = settings.ranks > 1
    kept = optimizer[settings.opt] + settings.model_ema
    return weights_and_gradients + kept + delayed + sent_to_ranks


def check_memory(settings: Settings, topology: Topology, images: int) -> None:
    """Raise UserError if the machine has no room for the weights and two copies of the images.

    The copies are single images and their batch, or two memory formats of a batch, in float32.
    The check comes first because Linux promises memory that it does not have: allocations succeed,
    and the kernel kills the run later, without a message.
    """
    size, classes = settings.min_res or settings.image_size, settings.num_classes
    shape = settings.model, classes, settings.image_size
    model = meta_model(*shape)
    freeze(model, None if settings.freeze_epochs else settings.freeze, *shape)
    needed_bytes = sum(
        weight.nbytes * weight_copies(settings, weight.requires_grad)
        for weight in model.parameters()
    )
    if not settings.test_only:
        needed_bytes += 2 * images * 3 * size**2 * 4
        if settings.teacher:
            teacher = meta_model(settings.teacher, classes, settings.image_size)
            needed_bytes += sum(value.nbytes for value in teacher.state_dict().values())
    if needed_bytes > topology.memory_bytes:
        raise UserError(
            f"{plural(images, 'image')} of {size} px, {settings.model} with {classes} classes: at "
            f"least {needed_bytes / 2**30:.1f} GiB of memory are needed, "
            f"{topology.memory_bytes / 2**30:.1f} are there: {LESS_MEMORY}"
        )
