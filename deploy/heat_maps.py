"""Heat maps: which places of a picture speak for a class, by Grad-CAM (Selvaraju et al. 2017,
arXiv 1610.02391), computed by captum.

captum needs a layer and nothing else, few packages, and gives the map before the ReLU, as the
closed form of Zhou et al. 2016 has it; torchcam and grad-cam bring hooks or OpenCV of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from checkpoint import needed_packages
from feature_maps import MapLayer
from PIL import Image
from torch import nn

with needed_packages():
    import numpy as np
    from captum.attr import LayerAttribution, LayerGradCam
    from matplotlib import colormaps

COLOURS = "turbo"
STRONGEST = 0.65  # how much of the picture the hottest place hides


@contextlib.contextmanager
def window_on(model: nn.Module, layer: MapLayer) -> Iterator[nn.Module]:
    """A module through which all goes, meanwhile, that a layer of the model puts out: as features
    (n, channels, grid, grid), of tokens only those that stand for places.

    captum hooks it, and hands a copy on: what comes after may change that in place.
    """
    window, grid = nn.Identity(), (layer.grid, layer.grid)

    def lead_through(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        if not layer.is_tokens:
            return window(output)
        extra = output.shape[1] - layer.grid**2
        first, places = output[:, :extra], output[:, extra:]
        seen = window(places.transpose(1, 2).unflatten(2, grid))
        return torch.cat([first, seen.flatten(2).transpose(1, 2)], 1)

    hook = model.get_submodule(layer.name).register_forward_hook(lead_through)
    try:
        yield window
    finally:
        hook.remove()


@contextlib.contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Have no weight of a model ask for its gradient: backpropagation ends at the window."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in asking:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def grad_cam(
    model: nn.Module, layer: MapLayer, images: torch.Tensor, classes: Sequence[int]
) -> torch.Tensor:
    """Grad-CAM of images (n, 3, size, size), each for one class, before its ReLU: maps (n, grid,
    grid), positive where the picture speaks for the class. The score is the logit.
    """
    with without_weight_gradients(model), window_on(model, layer) as window:
        maps = LayerGradCam(model, window).attribute(images, torch.as_tensor(classes))
    return maps.detach()[:, 0]


def heat(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Maps (n, grid, grid) as heat (n, side, side): what speaks for a class alone, bilinearly
    enlarged, from 0 to 1 at the hottest place of each; all 0 where nothing does.
    """
    spread = LayerAttribution.interpolate(maps.relu()[:, None], (side, side), "bilinear")[:, 0]
    return spread / spread.amax((1, 2), keepdim=True).clamp(min=torch.finfo(spread.dtype).tiny)


def overlay(picture: Image.Image, warmth: torch.Tensor) -> Image.Image:
    """A picture (RGB) with heat (side, side) laid over it: the hotter, the more it is coloured."""
    values = warmth.numpy()
    colours = 255 * colormaps[COLOURS](values)[..., :3]
    share = STRONGEST * values[..., None] ** 0.5
    mixed = (1 - share) * np.asarray(picture) + share * colours
    return Image.fromarray(mixed.round().astype(np.uint8))
