"""Trained weights by name, and how pictures are made ready for them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torchvision
from torchvision.models import vision_transformer

from split_affinity.errors import UserError, one_line
from split_affinity.models.registry import (
    OWN_MODELS,
    TIMM,
    WITH_HEADS,
    build_timm,
    timm_package,
    timm_tags,
)
from split_affinity.models.weights import Weights
from split_affinity.options.settings import DataSettings
from split_affinity.text import plural

LONGEST_SILENCE_S = 20.0  # of a server; without a limit a firewall can hold a run for minutes
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def largest_size(settings: DataSettings, native: int) -> int:
    """The largest side of the training images in pixels: `native` unless the settings say it."""
    return settings.max_res or settings.image_size or native


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model's input, except in training.

    Data sets and trained weights have their own; settings of the same names overrule it.
    """

    image_size: int = 224  # the side of the square that is cut out of the middle
    val_resize: int = 256  # the shorter side before that
    interpolation: str = "bilinear"
    mean: Sequence[float] = IMAGENET_MEAN  # of each channel, of values from 0 to 1
    std: Sequence[float] = IMAGENET_STD

    def overruled(self, settings: DataSettings) -> Preprocessing:
        """The same with what the settings say; `val_resize` grows in proportion to the size."""
        size = largest_size(settings, self.image_size)
        return Preprocessing(
            size,
            settings.val_resize or round(size * self.val_resize / self.image_size),
            settings.interpolation or self.interpolation,
            settings.mean or self.mean,
            settings.std or self.std,
        )


def imagenet_classes() -> tuple[str, ...]:
    """ImageNet's 1,000 classes as torchvision names them."""
    return tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])


@dataclass(frozen=True)
class Pretrained:
    """Trained weights by name: what is known of them before they are fetched."""

    classes: tuple[str, ...]
    native: Preprocessing
    load: Callable[[], Weights]  # fetches them
    title: str = ""  # their full name


def find_weights(
    model: str, name: str, flag: str = "--weights", image_size: int | None = None
) -> Pretrained:
    """Trained weights of a model by their name, for an image size (default: their own).

    Raises UserError for a model without weights, or an unknown name; the flag begins the message.
    """
    asked = f"{flag} {name}"
    if model.startswith(TIMM):
        return find_timm_weights(model, name, flag, image_size)
    if model in OWN_MODELS:
        remedy = "--init-from takes a file, --recipe scratch needs none"
        raise UserError(f"{asked}: {model} has no weights by name; {remedy}")
    known = torchvision.models.get_model_weights(model)
    member = name.removeprefix(f"{known.__name__}.").upper()
    if member not in known.__members__:
        raise UserError(f"{asked}: {model} has {', '.join(known.__members__) or 'none by name'}")
    weights = known[member]
    ready, classes = weights.transforms(), weights.meta.get("categories") or ()
    native = Preprocessing(
        ready.crop_size[0],
        ready.resize_size[0],
        ready.interpolation.value,
        tuple(ready.mean),
        tuple(ready.std),
    )
    if model in WITH_HEADS:
        native = dataclasses.replace(native, mean=3 * (0.5,), std=3 * (0.5,))
    load = partial(load_torchvision, weights, asked, image_size)
    return Pretrained(tuple(classes), native, load, str(weights))


def find_timm_weights(model: str, name: str, flag: str, image_size: int | None) -> Pretrained:
    """The same for a model of timm: DEFAULT or a tag such as a1_in1k.

    A tag may also follow the model's name. timm would stretch or pad some pictures to a square;
    here the middle is cut out, as for other weights.
    """
    timm, own = timm_package(), model.removeprefix(TIMM)
    architecture = own.partition(".")[0]
    tags = timm_tags(architecture)
    if name != "DEFAULT":
        own = f"{architecture}.{name}"
    if not tags or name not in ("DEFAULT", *tags):
        raise UserError(f"{flag} {name}: {model} has {', '.join(tags) or 'none by name'}")
    weights = timm.get_pretrained_cfg(own)
    ready = timm.data.resolve_data_config(pretrained_cfg=weights.to_dict())
    size, interpolation = ready["input_size"][-1], ready["interpolation"]
    native = Preprocessing(
        size,
        math.floor(size / ready["crop_pct"]),
        interpolation if interpolation == "bilinear" else "bicubic",
        tuple(ready["mean"]),
        tuple(ready["std"]),
    )
    classes = imagenet_classes()
    if weights.num_classes != len(classes):  # larger ImageNets: WordNet ids; others: numbers
        subset = timm.data.infer_imagenet_subset({"num_classes": weights.num_classes})
        names = timm.data.ImageNetInfo(subset).label_names() if subset else ()
        classes = tuple(map(str, names or range(weights.num_classes)))
    load = partial(load_timm, own, weights, f"{flag} {name}", image_size or size)
    return Pretrained(classes, native, load, f"{TIMM}{architecture}.{weights.tag}".rstrip("."))


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Have connections fail that hear nothing for LONGEST_SILENCE_S seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(LONGEST_SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def load_timm(own: str, weights: Any, asked: str, image_size: int) -> Weights:
    """Weights of timm from its cache or the network; UserError if they cannot be had."""
    hub_id = weights.hf_hub_id
    cache = hub_cache(hub_id) if hub_id else torch_cache(weights.url)
    try:
        with impatient():
            if hub_id and not cache.exists():
                check_hub()
            return build_timm(own, weights.num_classes, image_size, pretrained=True).state_dict()
    except Exception as error:  # of the network, of the disk, of a file's format
        remedy = f"if you have it from elsewhere, put it there as {cache}"
        source = hub_id or weights.url
        raise UserError(f"{asked}: cannot load {source}: {one_line(error)}; {remedy}") from None


def hub_cache(hub_id: str) -> Path:
    """Where the Hugging Face hub's client keeps what it has fetched of a model."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}")


def check_hub() -> None:
    """Ask the Hugging Face hub for anything, once; raises what its client raises.

    To fetch a file, the client would try six times, for a minute in all.
    """
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=LONGEST_SILENCE_S)


def torch_cache(url: str) -> Path:
    """Where torch keeps a file that it has fetched."""
    return Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(url).name)


def load_torchvision(weights: Any, asked: str, image_size: int | None) -> Weights:
    """Weights of torchvision from torch's cache or the network; UserError if they cannot be had.

    A transformer's positions are interpolated for the image size.
    """
    cached = torch_cache(weights.url)
    try:
        with impatient():
            saved = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        # The classifier of VGG16_Weights.IMAGENET1K_FEATURES is NaN: it was never trained.
        saved = {name: value for name, value in saved.items() if value.isfinite().all()}
    except Exception as error:  # of the network, of the disk, of pickle, or a checksum's
        reason = one_line(error)
        if cached.exists():
            remedy = "it is fetched anew once it is gone"
            raise UserError(f"{asked}: {cached} holds no weights: {reason}; {remedy}") from None
        remedy = f"if you have it from elsewhere, put it there as {cached}"
        raise UserError(f"{asked}: cannot fetch {weights.url}: {reason}; {remedy}") from None
    if image_size and "encoder.pos_embedding" in saved:
        patch = saved["conv_proj.weight"].shape[-1]
        saved = vision_transformer.interpolate_embeddings(image_size, patch, saved)
    return dict(saved)


def describe_weights(known: Pretrained) -> str:
    """A line on the weights: their classes and their preprocessing."""
    ready, classes = known.native, plural(len(known.classes), "class")
    sizes = (
        f"{ready.image_size} px of pictures resized to {ready.val_resize} ({ready.interpolation})"
    )
    return f"weights   {known.title}: {classes}, {sizes}; fetched when a run needs them"
