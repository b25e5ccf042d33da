"""Where a model's last feature map is, and class activation maps for models whose head lets them
be computed in the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from checkpoint import Checkpoint
from torch import nn

from split_affinity.errors import UserError
from split_affinity.models.own import Hybrid

Shapes = dict[str, tuple[nn.Module, tuple[int, ...]]]  # layers and their outputs', by name
Watch = Callable[[str, nn.Module, tuple, Any], None]


@dataclass(frozen=True)
class MapLayer:
    """A layer whose output is looked at as a map of `grid` x `grid` places: features (n, channels,
    grid, grid), or tokens (n, extra + grid * grid, channels), where the extra ones, such as that of
    the class, come first.
    """

    name: str
    grid: int
    is_tokens: bool = False


def run_watched(model: nn.Module, images: torch.Tensor, watch: Watch) -> torch.Tensor:
    """The logits (n, classes) of images (n, 3, size, size). `watch` is told of each layer that has
    run, as it finishes: its name, the layer, its inputs and its output.
    """

    def telling(name: str) -> Callable[[nn.Module, tuple, object], None]:
        return lambda layer, inputs, output: watch(name, layer, inputs, output)

    hooks = [each.register_forward_hook(telling(name)) for name, each in model.named_modules()]
    try:
        with torch.inference_mode():
            return model(images)
    finally:
        for hook in hooks:
            hook.remove()


def seen_shapes(model: nn.Module, images: torch.Tensor) -> Shapes:
    """Each layer of a model that ran, by name, with the shape of its output, in the order in which
    they finished; those without a tensor as output are left out.
    """
    seen: Shapes = {}

    def note(name: str, layer: nn.Module, _: tuple, output: object) -> None:
        if torch.is_tensor(output):
            seen.pop(name, None)
            seen[name] = layer, tuple(output.shape)

    run_watched(model, images, note)
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
    kinds = {kind.__name__ for kind in type(model).__mro__}  # torchvision's, or timm's
    if blocks is None or "VisionTransformer" not in kinds:
        return None
    names = {layer: name for name, layer in model.named_modules()}
    return names[next(each for each in blocks[-1].modules() if isinstance(each, nn.LayerNorm))]


def last_map(shapes: Shapes) -> str | None:
    """The last layer of a convolutional net that makes a map of several places, by name. None if
    there is none, or if later maps have their channels last, which are not taken.
    """
    pooled = nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d  # these can make several places of one
    for name, (layer, shape) in reversed(shapes.items()):
        if len(shape) != 4 or isinstance(layer, pooled):
            continue
        if map_of(name, shape):
            return name
        if shape[1] == shape[2] > 1:  # rows and columns come before the channels
            return None
    return None


def asked_layer(asked: str, shapes: Shapes, model_name: str) -> MapLayer:
    """The layer that `--layer` names. Raises UserError for one that is no map."""
    maps = {name: map_of(name, shape) for name, (_, shape) in shapes.items()}
    if found := maps.get(asked):
        return found
    reason = f"{model_name} has no such layer"
    if asked in shapes:
        reason = f"its output {shapes[asked][1]} is no map of several places"
    known = ", ".join(name for name, found in maps.items() if found and name and "." not in name)
    raise UserError(f"--layer {asked}: {reason}; parts that make one: {known or 'none'}")


def find_map_layer(checkpoint: Checkpoint, asked: str | None = None) -> MapLayer:
    """The layer that heat maps are made of: the one `asked` for, or else the last feature map of a
    convolutional net, what comes before the tokens of a hybrid, the last tokens of a vision
    transformer that all have a part in the answer.

    Raises UserError for a layer that does not exist or is no map, or if there is none.
    """
    model, model_name = checkpoint.model, checkpoint.trained.settings.model
    shapes = seen_shapes(model, zero_images(checkpoint))
    if asked:
        return asked_layer(asked, shapes, model_name)
    own = "attention" if isinstance(model, Hybrid) else first_norm_of_last_block(model)
    name = own or last_map(shapes)
    if name and (found := map_of(name, shapes[name][1])):
        return found
    size = checkpoint.trained.ready.image_size
    raise UserError(f"{model_name} has no feature map of several places at {size} px")


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
    except UserError:
        return None
    linears = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if layer.is_tokens or not linears:
        return None
    held: dict[str, torch.Tensor] = {}

    def hold(name: str, each: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if name == layer.name:
            held["map"] = output  # as it is in the end: a ReLU after it may work in place
        if each is linears[-1]:
            held.update(got=inputs[0], made=output)

    noise = torch.rand(zero_images(checkpoint, 2).shape, generator=torch.Generator().manual_seed(0))
    logits = run_watched(model, noise, hold)
    means, got = held["map"].mean((2, 3)), held.get("got")
    if got is None or got.shape != means.shape:
        return None
    fits = torch.allclose(means, got, rtol=1e-4, atol=1e-5 * got.abs().max().item())
    return LinearHead(layer.name, linears[-1]) if fits and held["made"].equal(logits) else None


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
