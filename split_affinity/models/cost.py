"""What a model amounts to, counted without computing anything: parameters, operations, memory."""

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
    """What a model amounts to: parameters, bytes of weights and buffers, and the floating-point
    operations of convolutions and matrix products for one image, by phase.
    """

    parameters: int
    weight_bytes: int
    flops: dict[str, float]


def measure_model(
    name: str, num_classes: int, image_size: int, frozen: str | None = None
) -> ModelFigures:
    """Count, without computing anything: the model, with what is frozen, is built and run on the
    meta device.
    """
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
    flops = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}
    flops = {phase: count / len(images) for phase, count in flops.items()}
    return ModelFigures(parameters, weight_bytes, flops)


def describe_model(settings: Settings, num_classes: int, image_size: int) -> list[str]:
    """What a model amounts to, in a line; in another one what of it is frozen. Work is that of
    most epochs.
    """
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
    """What a teacher amounts to, in a line: it runs forward only."""
    figures = measure_model(name, num_classes, image_size)
    return (
        f"teacher {name}: {figures.weight_bytes / 2**20:.1f} MiB; an image takes "
        f"{figures.flops['forward'] / 1e9:.2f} GFLOP more forward"
    )


def weight_copies(settings: Settings, is_trained: bool = True) -> int:
    """How often a run holds as much as the weights, at the least: themselves, the moving average;
    if they are trained their gradients, what the optimizer keeps, the copies of `delayed`, and what
    travels between ranks.
    """
    if settings.test_only:
        return 1
    if not is_trained:
        return 1 + settings.model_ema
    momentum = settings.momentum > 0
    kept = {"sgd": momentum, "adam": 2, "adamw": 2, "nadam": 2, "rmsprop": 1 + momentum}
    copies = 2 * (settings.schedule == "delayed") + (settings.ranks > 1)
    return 2 + kept[settings.opt] + copies + settings.model_ema


def check_memory(settings: Settings, topology: Topology, images: int) -> None:
    """Raise UserError if the machine cannot even hold the weights and, twice, `images` pixels in
    float32: one by one and as a batch, or as a batch and in another memory format.
    """
    size, classes = settings.min_res or settings.image_size, settings.num_classes
    shape = settings.model, classes, settings.image_size
    model = meta_model(*shape)
    freeze(model, None if settings.freeze_epochs else settings.freeze, *shape)
    image_bytes = 0 if settings.test_only else images * 3 * size**2 * 4
    needed_bytes = 2 * image_bytes + sum(
        weight.nbytes * weight_copies(settings, weight.requires_grad)
        for weight in model.parameters()
    )
    if settings.teacher and not settings.test_only:
        teacher = meta_model(settings.teacher, classes, settings.image_size)
        needed_bytes += sum(value.nbytes for value in teacher.state_dict().values())
    if needed_bytes > topology.memory_bytes:
        raise UserError(
            f"{plural(images, 'image')} of {size} px, {settings.model} with {classes} classes: at "
            f"least {needed_bytes / 2**30:.1f} GiB of memory are needed, "
            f"{topology.memory_bytes / 2**30:.1f} are there: {LESS_MEMORY}"
        )
