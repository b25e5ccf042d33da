"""Classifiers by name: torchvision's, timm's and our own. Knows nothing of cores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

from split_affinity.errors import UserError, memory_errors, one_line
from split_affinity.models.own import Hybrid, SmallResNet
from split_affinity.options.existence import TIMM, unknown_model
from split_affinity.text import did_you_mean

# They are built without their auxiliary heads. Their weights were trained with values from -1 to 1:
# torchvision's models rescale ImageNet's values themselves, ours take such values.
WITH_HEADS = ("googlenet", "inception_v3")

# Builders by name, as in OWN_NAMES: (num_classes, image_size) to a model.
OWN_MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet20": lambda num_classes, image_size: SmallResNet(num_classes, blocks=3),
    "resnet56": lambda num_classes, image_size: SmallResNet(num_classes),
    "hybrid": Hybrid,
    "hybrid-light": partial(Hybrid, channels=(32, 64, 128, 256), width=384, blocks=2),
    "hybrid-heavy": partial(Hybrid, channels=(96, 192, 384, 768), width=1024, blocks=6),
}


def classifier_names() -> list[str]:
    """The names that `--model` takes, without timm's."""
    return [*OWN_MODELS, *torchvision.models.list_models(module=torchvision.models)]


def timm_package() -> Any:
    """The package timm, which is optional. Importing it takes seconds."""
    try:
        import timm
    except ImportError as error:
        reason = f"({one_line(error)}): pip install timm"
        raise UserError(f"a model {TIMM}NAME needs the package timm {reason}") from None
    return timm


def timm_tags(architecture: str) -> list[str]:
    """timm's names for the weights of one of its models."""
    names = (name.partition(".") for name in timm_package().list_models(pretrained=True))
    return [tag for found, _, tag in names if found == architecture]


def build_timm(name: str, num_classes: int, image_size: int, **options: Any) -> nn.Module:
    """A classifier of timm, built for the image size if it takes one size only."""
    timm, own = timm_package(), name.removeprefix(TIMM)
    if timm.get_pretrained_cfg(own).fixed_input_size:
        options["img_size"] = image_size
    return timm.create_model(own, num_classes=num_classes, **options)


def check_model_name(name: str, flag: str = "--model") -> None:
    """Raise UserError, with the nearest names, for a model that does not exist."""
    if not name.startswith(TIMM):
        for message in unknown_model(name, classifier_names(), flag):
            raise UserError(message)
        return
    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    names = timm_package().list_models()
    if architecture not in names:
        hint = did_you_mean(architecture, names, 0.4) or "; any name of timm.list_models() will do"
        raise UserError(f"{flag} {name}: unknown to timm{hint}")
    if tag and tag not in timm_tags(architecture):
        tags = ", ".join(timm_tags(architecture)) or "none"
        raise UserError(f"{flag} {name}: weights unknown to timm, which has {tags}")


def build_model(
    name: str, num_classes: int, image_size: int, stochastic_depth: float = 0.0
) -> nn.Module:
    """A classifier in training mode: images (n, 3, size, size) to logits (n, classes).

    `stochastic_depth` is the probability of leaving out the last residual block; 0 keeps what the
    model has by itself. Raises UserError for an image size or a depth that the model does not take.
    """
    options = library_options(name, image_size, stochastic_depth)
    if name in OWN_MODELS:
        model = OWN_MODELS[name](num_classes, image_size)
    else:
        model = build_library_model(name, num_classes, image_size, options)
    if stochastic_depth and options.keys().isdisjoint({"stochastic_depth_prob", "drop_path_rate"}):
        add_stochastic_depth(model, name, stochastic_depth)
    return model


def build_library_model(
    name: str, num_classes: int, image_size: int, options: dict[str, Any]
) -> nn.Module:
    """A classifier of torchvision or timm; UserError for an image size that it does not take."""
    try:
        with memory_errors():
            if name.startswith(TIMM):
                return build_timm(name, num_classes, image_size, **options)
            return torchvision.models.get_model(name, num_classes=num_classes, **options)
    except NotImplementedError:  # a RuntimeError that meta_model looks for
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--image-size {image_size}, {name}: {one_line(error)}") from None


def library_options(name: str, image_size: int, stochastic_depth: float) -> dict[str, Any]:
    """What torchvision's or timm's builder of a model gets beside the number of classes."""
    if name.startswith(TIMM):
        return {"drop_path_rate": stochastic_depth} if stochastic_depth else {}
    if name in WITH_HEADS:  # the papers use the heads to train without batch normalisation
        return {"aux_logits": False, "init_weights": True}
    if "resne" in name:  # ResNet, ResNeXt, Wide ResNet
        # Blocks begin as identities (Goyal et al. 2017, 5.1): otherwise the loss jumps at first.
        return {"zero_init_residual": True}
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    if name.startswith(("convnext_", "efficientnet_")) and stochastic_depth:
        return {"stochastic_depth_prob": stochastic_depth}
    return {}


def add_stochastic_depth(model: nn.Module, name: str, highest: float) -> None:
    """Let each training image skip residual blocks (Huang et al. 2016, arXiv 1603.09382).

    The probability rises linearly with the depth, to `highest`. Raises UserError for a model
    without residual blocks. No name in the state dict changes.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, StochasticDepth)]
    blocks = [block for block in model.modules() if isinstance(block, BasicBlock | Bottleneck)]
    if not layers and not blocks:
        some = "ResNets, EfficientNets, ConvNeXt, Swin and MaxViT have some"
        reason = f"{name} has no blocks that can be left out ({some}): give 0"
        raise UserError(f"--stochastic-depth {highest:g}: {reason}")
    # Swin and MaxViT have such layers, but no option for their probability.
    factor = highest / max((layer.p for layer in layers), default=1.0)
    for layer in layers:
        layer.p *= factor
    for number, block in enumerate(blocks, 1):
        last_norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        last_norm.register_forward_hook(partial(drop_branch, highest * number / len(blocks)))


def drop_branch(
    probability: float, norm: nn.Module, _: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """A residual branch's output (n, ...), set to 0 for some images in training: a forward hook."""
    return torchvision.ops.stochastic_depth(output, probability, "row", norm.training)


def meta_model(name: str, num_classes: int, image_size: int) -> nn.Module:
    """A classifier on the meta device: its weights have shapes and no memory."""
    with contextlib.suppress(NotImplementedError), torch.device("meta"):
        return build_model(name, num_classes, image_size)
    # A RegNet computes its widths with tensors, which have no values on the meta device.
    return build_model(name, num_classes, image_size).to("meta")


def check_input_shape(model: nn.Module, name: str, batch_size: int, image_size: int) -> None:
    """Raise UserError if the model cannot train on such batches: images may be too small for it."""
    weights = {key: value.to("meta") for key, value in model.state_dict().items()}
    try:
        images = torch.empty(batch_size, 3, image_size, image_size, device="meta")
        torch.func.functional_call(model, weights, (images,))
    except (AssertionError, RuntimeError, ValueError) as error:
        asked = f"--batch-size {batch_size} --image-size {image_size}"
        reason = f"{name} cannot train on such batches: {one_line(error)}"
        raise UserError(f"{asked}: {reason}") from None


def parameter_count(name: str) -> int:
    """The parameters of a classifier for 1000 classes."""
    # torchvision says it of its own, which is fast, but counts the head of inception_v3.
    if name in OWN_MODELS or name == "inception_v3":
        return sum(weight.numel() for weight in meta_model(name, 1000, 224).parameters())
    return min(each.meta["num_params"] for each in torchvision.models.get_model_weights(name))
