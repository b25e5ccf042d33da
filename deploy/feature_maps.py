"""Where a model's last feature map is, and class activation maps for models whose head lets them
be computed in the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from checkpoint import Checkpoint, tsa
from torch import nn


@dataclass(frozen=True)
class MapLayer:
    """A layer whose output is looked at as a map of `grid` x `grid` places: features (n, channels,
    grid, grid), or tokens (n, extra + grid * grid, channels), where the extra ones, such as that of
    the class, come first.
    """

    name: str
    grid: int
    is_tokens: bool = False


def seen_shapes(
    model: nn.Module, images: torch.Tensor
) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Each layer of a model that ran, by name, with the shape of its output, in the order in which
    they finished; those without a tensor as output are left out.
    """
    seen: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(layer: nn.Module, _: object, output: object) -> None:
            if torch.is_tensor(output):
                seen.pop(name, None)
                seen[name] = layer, tuple(output.shape)

        return note

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in model.named_modules()]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def zero_images(checkpoint: Checkpoint, count: int = 1) -> torch.Tensor:
    """Images (count, 3, size, size) of the size that a checkpoint's model takes."""
    size = checkpoint.trained.ready.image_size
    return torch.zeros(count, 3, size, size)


def map_of(name: str, shape: tuple[int, ...]) -> MapLayer | None:
    """A layer with that shape of output as a map, if it is one of more than one place."""
    if len(shape) == 4 and shape[2] == shape[3] > 1:
        return MapLayer(name, shape[2])
    if len(shape) == 3 and shape[1] > 3:
        return MapLayer(name, math.isqrt(shape[1]), is_tokens=True)
    return None


def first_norm_of_last_block(model: nn.Module) -> str | None:
    """The layer before the last attention of a vision transformer, by name: what comes after that
    has only the class token in it to do with the answer. None for other models.
    """
    blocks = getattr(getattr(model, "encoder", model), "layers", None)
    blocks = getattr(model, "blocks", None) if blocks is None else blocks
    kinds = {"VisionTransformer"}
    if blocks is None or not kinds.intersection(kind.__name__ for kind in type(model).__mro__):
        return None
    names = {layer: name for name, layer in model.named_modules()}
    return names[next(each for each in blocks[-1].modules() if isinstance(each, nn.LayerNorm))]


def find_map_layer(checkpoint: Checkpoint, asked: str | None = None) -> MapLayer:
    """The layer that heat maps are made of: the one `asked` for, or else the last feature map of a
    convolutional net, what comes before the tokens of a hybrid, the last tokens of a vision
    transformer that all have a part in the answer.

    Raises UserError for a layer that does not exist or is no map, or if there is none.
    """
    model = checkpoint.model
    shapes = seen_shapes(model, zero_images(checkpoint))
    maps = {name: map_of(name, shape) for name, (_, shape) in shapes.items()}
    if asked is None and isinstance(model, tsa.Hybrid):
        asked = "attention"
    if asked := asked or first_norm_of_last_block(model):
        if found := maps.get(asked):
            return found
        shape = shapes.get(asked, (None, None))[1]
        reason = f"its output {shape} is no map of several places" if shape else "no such layer"
        known = ", ".join(name for name, found in maps.items() if found and "." not in name)
        raise tsa.UserError(
            f"--layer {asked}: {reason} of {checkpoint.trained.settings.model}; "
            f"maps are made by {known or 'none of its parts'}"
        )
    pooled = nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d
    for name, (layer, shape) in reversed(shapes.items()):
        if len(shape) == 4 and maps[name] and not isinstance(layer, pooled):
            return maps[name]
    size = checkpoint.trained.ready.image_size
    raise tsa.UserError(
        f"{checkpoint.trained.settings.model} has no feature map of several places at {size} px"
    )


@dataclass(frozen=True)
class LinearHead:
    """The end of a model that averages a feature map over its places, and has one linear layer
    after that: `layer` makes the map, (n, channels, h, w), and `linear` the logits.
    """

    layer: str
    linear: nn.Linear


def find_linear_head(checkpoint: Checkpoint) -> LinearHead | None:
    """A model's linear head, if it ends in one, which is found out by trying: the means of its last
    feature map have to be what its last linear layer gets, and that has to make the logits.
    """
    model = checkpoint.model
    try:
        layer = find_map_layer(checkpoint)
    except tsa.UserError:
        return None
    linears = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if layer.is_tokens or not linears:
        return None
    held: dict[str, torch.Tensor] = {}
    head = linears[-1]
    hooks = [
        model.get_submodule(layer.name).register_forward_hook(
            lambda _, __, output: held.update(map=output)
        ),
        head.register_forward_hook(
            lambda _, inputs, output: held.update(got=inputs[0], made=output)
        ),
    ]
    size = checkpoint.trained.ready.image_size
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            logits = model(noise)
    finally:
        for hook in hooks:
            hook.remove()
    means, got = held["map"].mean((2, 3)), held.get("got")
    fits = got is not None and got.shape == means.shape and torch.equal(held["made"], logits)
    if fits and torch.allclose(means, got, rtol=1e-4, atol=1e-5 * got.abs().max().item()):
        return LinearHead(layer.name, head)
    return None


class WithMaps(nn.Module):
    """A model with class activation maps as its second output (Zhou et al. 2016, arXiv 1512.04150):
    for images (n, 3, size, size) logits (n, classes) and maps (n, classes, h, w), whose mean over
    the places is the logit less the bias of the class.
    """

    def __init__(self, model: nn.Module, head: LinearHead):
        super().__init__()
        self.model, self._layer = model, head.layer
        self.register_buffer("directions", head.linear.weight.detach()[:, :, None, None])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and maps."""
        held: list[torch.Tensor] = []
        layer = self.model.get_submodule(self._layer)
        hook = layer.register_forward_hook(lambda _, __, output: held.append(output))
        try:
            logits = self.model(images)
        finally:
            hook.remove()
        return logits, nn.functional.conv2d(held[-1], self.directions)
