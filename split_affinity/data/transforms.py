"""From a picture to a tensor: augmentation, resizing, mixup and CutMix."""

from __future__ import annotations

import math
from functools import partial

import torch
from PIL import Image
from torchvision.transforms import v2

from split_affinity.data.decoding import TO_TRAIN, TO_VALIDATE, JpegFile, decoded
from split_affinity.data.pictures import ImageData
from split_affinity.models.pretrained import Preprocessing
from split_affinity.options.settings import AugmentationSettings, DataSettings, Settings
from split_affinity.options.values import RESIZING_STEP

# The most that the longer side may have of the shorter one for a picture to be resized whole, as
# torchvision does it. The demo page takes no longer ones.
LONGEST_SHAPE = 100


def image_size_in(settings: DataSettings, epoch: int) -> int:
    """The side of the training images in an epoch (from 1): a linear ramp, in steps of 32 px."""
    low, high = settings.min_res, settings.image_size
    if low is None or epoch >= settings.end_ramp:
        return high
    part = (epoch - 1) / max(1, settings.end_ramp - 1)
    return low + RESIZING_STEP * math.floor(part * (high - low) / RESIZING_STEP)


def tensor_transforms(ready: Preprocessing) -> list[v2.Transform]:
    """The last transforms: a picture to a normalised float32 tensor (3, height, width)."""
    normalize = v2.Normalize(ready.mean, ready.std)
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]


def as_picture(image: torch.Tensor, ready: Preprocessing) -> Image.Image:
    """An image (3, height, width) that was made ready for a model, as a picture again."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (ready.mean, ready.std))
    pixels = (255 * (image * std + mean)).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def auto_augmentation(
    data: ImageData, settings: AugmentationSettings, stronger: bool
) -> list[v2.Transform]:
    """The augmentation of `--auto-augment`, if any; `stronger` for confused classes."""
    magnitude = settings.ra_magnitude
    if stronger and settings.auto_augment != "none":
        return [v2.RandAugment(3, min(magnitude + 5, 30))]
    if stronger or settings.auto_augment == "ra":
        return [v2.RandAugment(magnitude=magnitude)]
    if settings.auto_augment == "ta":
        return [v2.TrivialAugmentWide()]
    if settings.auto_augment == "aa":
        small = "svhn" if data.kind == "svhn" else "cifar10"
        return [v2.AutoAugment(v2.AutoAugmentPolicy(small if data.padded else "imagenet"))]
    return []


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, which has a JPEG decoded no larger than the crop needs.

    The same crops are drawn as of the decoded picture.
    """

    def forward(self, picture: JpegFile | Image.Image) -> Image.Image:
        """A random part of the picture, resized."""
        if not isinstance(picture, JpegFile):
            return super().forward(picture)
        width, height = picture.size
        drawn = self.make_params([torch.empty(1, height, width, device="meta")])
        left, top = drawn["left"], drawn["top"]
        box = left, top, left + drawn["width"], top + drawn["height"]
        filters = Image.Resampling[v2.InterpolationMode(self.interpolation).name]
        return picture.resized(box, (self.size[1], self.size[0]), filters, TO_TRAIN)


def training_transform(
    data: ImageData, settings: Settings, size: int, stronger: bool = False
) -> v2.Transform:
    """The augmentation of a picture, to a tensor (3, size, size)."""
    ready = data.native.overruled(settings)
    resized = {"interpolation": v2.InterpolationMode(ready.interpolation), "antialias": True}
    if data.kind == "synthetic":
        return v2.Compose([v2.Resize((size, size), **resized), *tensor_transforms(ready)])
    steps: list[v2.Transform] = [RandomResizedCrop(size, (settings.min_scale, 1), **resized)]
    if side := data.padded:  # by 4 for 32 pixels, as in He et al. 2016 (arXiv 1512.03385)
        steps = [v2.RandomCrop(side, padding=round(side / 8)), v2.Resize(size, **resized)]
    steps += [v2.RandomHorizontalFlip(settings.hflip)]
    steps += auto_augmentation(data, settings, stronger)
    if settings.color_jitter:
        steps.append(v2.ColorJitter(*3 * (settings.color_jitter,)))
    erasing = v2.RandomErasing(settings.random_erase)
    return v2.Compose([*steps, *tensor_transforms(ready), erasing])


def resize_picture(ready: Preprocessing, picture: JpegFile | Image.Image) -> Image.Image:
    """A picture resized until its shorter side has `val_resize` pixels.

    Of a very long one only the middle is resized, as much as will be cut out: all of a line of
    pixels would take gigabytes.
    """
    how, short = v2.InterpolationMode(ready.interpolation), min(picture.size)
    filters = Image.Resampling[ready.interpolation.upper()]
    if max(picture.size) <= LONGEST_SHAPE * short:
        if isinstance(picture, JpegFile):
            width, height = (int(ready.val_resize * side / short) for side in picture.size)
            return picture.resized((0, 0, *picture.size), (width, height), filters, TO_VALIDATE)
        return v2.functional.resize(picture, [ready.val_resize], how, antialias=True)
    picture = decoded(picture)
    long = int(ready.val_resize * max(picture.size) / short)
    kept = min(long, ready.image_size)
    start = round((long - kept) / 2)  # as CenterCrop rounds
    scale = max(picture.size) / long
    # Pillow's box has 32 bits: it is measured from a place nearby, but beyond all pixels that the
    # interpolation reads.
    near = max(0, math.floor((start - 4) * scale) - 4)
    far = min(max(picture.size), math.ceil((start + kept + 4) * scale) + 4)
    box = start * scale - near, min((start + kept) * scale, far) - near
    if picture.width > picture.height:
        picture = picture.crop((near, 0, far, short))
        return picture.resize((kept, ready.val_resize), filters, (box[0], 0, box[1], short))
    picture = picture.crop((0, near, short, far))
    return picture.resize((ready.val_resize, kept), filters, (0, box[0], short, box[1]))


def validation_transform(ready: Preprocessing) -> v2.Transform:
    """The middle of a picture, as a tensor (3, image_size, image_size)."""
    cut = v2.CenterCrop(ready.image_size)
    return v2.Compose([partial(resize_picture, ready), cut, *tensor_transforms(ready)])


def mixing_transform(settings: Settings) -> v2.Transform | None:
    """mixup (arXiv 1710.09412) or CutMix (1905.04899) of whole batches, if asked for."""
    kinds = (v2.MixUp, settings.mixup_alpha), (v2.CutMix, settings.cutmix_alpha)
    count = settings.num_classes
    mixes = [mix(alpha=alpha, num_classes=count) for mix, alpha in kinds if alpha]
    return v2.RandomChoice(mixes) if mixes else None


def transform_of_epoch(
    data: ImageData, settings: Settings, epoch: int, stronger: bool = False
) -> v2.Transform:
    """The augmentation of a picture, to the image size of an epoch."""
    return training_transform(data, settings, image_size_in(settings, epoch), stronger)


def same_transform(transform: v2.Transform, epoch: int) -> v2.Transform:
    """The same transform in every epoch."""
    return transform
