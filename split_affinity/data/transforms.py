"""From a picture to a tensor: augmentation, resizing, mixup and CutMix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torchvision.transforms import v2

from split_affinity.data.pictures import ImageData
from split_affinity.models.pretrained import Preprocessing
from split_affinity.options.settings import RESIZING_STEP, DataSettings, Settings


def image_size_in(settings: DataSettings, epoch: int) -> int:
    """The side of the training images in an epoch (from 1): a linear ramp in steps of 32 pixels."""
    low, high = settings.min_res, settings.image_size
    if low is None or epoch >= settings.end_ramp:
        return high
    part = (epoch - 1) / max(1, settings.end_ramp - 1)
    return low + RESIZING_STEP * math.floor(part * (high - low) / RESIZING_STEP)


def to_tensor(ready: Preprocessing) -> list[Any]:
    """Transforms from a picture to a normalised float32 tensor (3, height, width)."""
    normalize = v2.Normalize(ready.mean, ready.std)
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]


def auto_augmentation(data: ImageData, settings: Settings, stronger: bool) -> list[v2.Transform]:
    """The augmentation by a policy, if there is one; `stronger` is that of confused classes."""
    magnitude = settings.ra_magnitude
    if stronger and settings.auto_augment != "none":
        return [v2.RandAugment(3, min(magnitude + 5, 30))]
    small = "svhn" if data.kind == "svhn" else "cifar10"
    policy = v2.AutoAugmentPolicy(small if data.padded else "imagenet")
    chosen = {
        "none": [],
        "ra": [v2.RandAugment(magnitude=magnitude)],
        "ta": [v2.TrivialAugmentWide()],
        "aa": [v2.AutoAugment(policy)],
    }
    return chosen["ra" if stronger else settings.auto_augment]


def training_transform(
    data: ImageData, settings: Settings, size: int, stronger: bool = False
) -> v2.Transform:
    """The augmentation of one picture, to a tensor (3, size, size)."""
    ready = data.native.overruled(settings)
    resized = {"interpolation": v2.InterpolationMode(ready.interpolation), "antialias": True}
    if data.kind == "synthetic":
        return v2.Compose([v2.Resize((size, size), **resized), *to_tensor(ready)])
    steps: list[Any] = [v2.RandomResizedCrop(size, (settings.min_scale, 1), **resized)]
    if side := data.padded:  # by 4 for 32 pixels, as in He et al. 2016 (arXiv 1512.03385)
        steps = [v2.RandomCrop(side, padding=round(side / 8)), v2.Resize(size, **resized)]
    steps += [v2.RandomHorizontalFlip(settings.hflip)]
    steps += auto_augmentation(data, settings, stronger)
    if settings.color_jitter:
        steps.append(v2.ColorJitter(*3 * (settings.color_jitter,)))
    return v2.Compose([*steps, *to_tensor(ready), v2.RandomErasing(settings.random_erase)])


def validation_transform(ready: Preprocessing) -> v2.Transform:
    """A picture's middle, as a tensor (3, image_size, image_size)."""
    how = v2.InterpolationMode(ready.interpolation)
    resize = v2.Resize(ready.val_resize, how, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(ready.image_size), *to_tensor(ready)])


def mixing_transform(settings: Settings) -> v2.Transform | None:
    """mixup (arXiv 1710.09412) and CutMix (1905.04899) of whole batches, if asked for."""
    kinds = (v2.MixUp, settings.mixup_alpha), (v2.CutMix, settings.cutmix_alpha)
    count = settings.num_classes
    mixes = [mix(alpha=alpha, num_classes=count) for mix, alpha in kinds if alpha]
    return v2.RandomChoice(mixes) if mixes else None


def transform_of_epoch(
    data: ImageData, settings: Settings, epoch: int, stronger: bool = False
) -> v2.Transform:
    """The augmentation of one picture, to the image size of an epoch."""
    return training_transform(data, settings, image_size_in(settings, epoch), stronger)


def same_transform(transform: v2.Transform, epoch: int) -> v2.Transform:
    """One transform for every epoch."""
    return transform
