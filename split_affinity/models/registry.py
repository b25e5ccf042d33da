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

# Models with auxiliary heads, which are left out. Their weights were trained with values from -1 to
# 1: torchvision's model makes those of ImageNet's mean and deviation itself, ours has them at once.
WITH_HEADS = ("googlenet", "inception_v3")

# By name, as in OWN_NAMES, what makes a model from (num_classes, image_size).
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
    """timm, an optional package, which takes seconds to import."""
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


def check_timm_name(name: str, flag: str) -> None:
    """Raise UserError, with the nearest names, for a model that timm does not have."""
    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    names = timm_package().list_models()
    if architecture not in names:
        hint = did_you_mean(architecture, names, 0.4) or "; any name of timm.list_models() will do"
        raise UserError(f"{flag} {name}: unknown to timm{hint}")
    if tag and tag not in timm_tags(architecture):
        tags = ", ".join(timm_tags(architecture)) or "none"
        raise UserError(f"{flag} {name}: weights unknown to timm, which has {tags}")


def build_timm(name: str, num_classes: int, image_size: int, **options: Any) -> nn.Module:
    """A classifier of timm, made for the image size where a model is made for one."""
    timm, own = timm_package(), name.removeprefix(TIMM)
    if timm.get_pretrained_cfg(own).fixed_input_size:
        options["img_size"] = image_size
    return timm.create_model(own, num_classes=num_classes, **options)


def check_model_name(name: str, flag: str = "--model") -> None:
    """Raise UserError, with the nearest names, for a model that does not exist."""
    if name.startswith(TIMM):
        check_timm_name(name, flag)
        return
    for message in unknown_model(name, classifier_names(), flag):
        raise UserError(message)


def build_model(
    name: str, num_classes: int, image_size: int, stochastic_depth: float = 0.0
) -> nn.Module:
    """A classifier in training mode, mapping (n, 3, size, size) to (n, classes).

    Transformers are built for the image size, and the auxiliary heads of GoogLeNet and Inception,
    which the papers use to train without batch normalisation, are left out. The blocks of a ResNet
    begin as identities (their last batch normalisation at 0; Goyal et al. 2017, 5.1): without that,
    the loss of the first steps jumps. `stochastic_depth` is the probability of leaving out the last
    residual block; with 0 it is what the model has by itself.
    """
    options = builder_options(name, image_size, stochastic_depth)
    if name in OWN_MODELS:
        model = OWN_MODELS[name](num_classes, image_size)
    else:
        model = library_model(name, num_classes, image_size, options)
    if stochastic_depth and options.keys().isdisjoint({"stochastic_depth_prob", "drop_path_rate"}):
        leave_blocks_out(model, name, stochastic_depth)
    return model


def library_model(
    name: str, num_classes: int, image_size: int, options: dict[str, Any]
) -> nn.Module:
    """A model of torchvision or timm. Raises UserError for an image size, or a stochastic depth,
    that it does not take.
    """
    try:
        with memory_errors():
            if name.startswith(TIMM):
                return build_timm(name, num_classes, image_size, **options)
            return torchvision.models.get_model(name, num_classes=num_classes, **options)
    except NotImplementedError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--image-size {image_size}, {name}: {one_line(error)}") from None


def builder_options(name: str, image_size: int, stochastic_depth: float) -> dict[str, Any]:
    """What torchvision's or timm's builder of a model is given beside the number of classes."""
    if name.startswith(TIMM):
        return {"drop_path_rate": stochastic_depth} if stochastic_depth else {}
    if name in WITH_HEADS:
        return {"aux_logits": False, "init_weights": True}
    if "resne" in name:  # ResNet, ResNeXt, Wide ResNet
        return {"zero_init_residual": True}
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    if name.startswith(("convnext_", "efficientnet_")) and stochastic_depth:
        return {"stochastic_depth_prob": stochastic_depth}
    return {}


def leave_blocks_out(model: nn.Module, name: str, highest: float) -> None:
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): in training, each image skips
    residual blocks, with a probability that rises linearly with the depth, to `highest`.

    Layers that do so in a model of torchvision get other probabilities; those of Swin and MaxViT
    are no option of their builders. Blocks of a ResNet, which have none, begin to do so behind
    their last batch normalisation, without another name in the state dict.
    """
    own = [layer for layer in model.modules() if isinstance(layer, StochasticDepth)]
    blocks = [block for block in model.modules() if isinstance(block, BasicBlock | Bottleneck)]
    if not own and not blocks:
        some = "ResNets, EfficientNets, ConvNeXt, Swin and MaxViT have some"
        reason = f"{name} has no blocks that can be left out ({some}): give 0"
        raise UserError(f"--stochastic-depth {highest:g}: {reason}")
    factor = highest / max((layer.p for layer in own), default=1.0)
    for layer in own:
        layer.p *= factor
    for number, block in enumerate(blocks, 1):
        last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        last.register_forward_hook(partial(skipped, highest * number / len(blocks)))


def skipped(
    probability: float, norm: nn.Module, _: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """The output of a residual branch (n, ...), which is 0 for some images if it is trained."""
    return torchvision.ops.stochastic_depth(output, probability, "row", norm.training)


def meta_model(name: str, num_classes: int, image_size: int) -> nn.Module:
    """A classifier without memory for its weights: shapes alone."""
    with contextlib.suppress(NotImplementedError), torch.device("meta"):
        return build_model(name, num_classes, image_size)
    # A RegNet computes its widths with tensors, which without memory have no values.
    return build_model(name, num_classes, image_size).to("meta")


def check_input_shape(model: nn.Module, name: str, batch_size: int, image_size: int) -> None:
    """Raise UserError if the model cannot train on such batches (too small for its strides, say).

    Runs the forward pass on the meta device, which computes shapes alone.
    """
    weights = {key: value.to("meta") for key, value in model.state_dict().items()}
    try:
        images = torch.empty(batch_size, 3, image_size, image_size, device="meta")
        torch.func.functional_call(model, weights, (images,))
    except (AssertionError, RuntimeError, ValueError) as error:
        asked = f"--batch-size {batch_size} --image-size {image_size}"
        reason = f"{name} cannot train on such batches: {one_line(error)}"
        raise UserError(f"{asked}: {reason}") from None


def parameter_count(name: str) -> int:
    """Parameters of a classifier for 1000 classes: what torchvision says of its own, which takes no
    time, but for the one that it counts with the auxiliary head that is left out here.
    """
    if name in OWN_MODELS or name == "inception_v3":
        return sum(weight.numel() for weight in meta_model(name, 1000, 224).parameters())
    return min(each.meta["num_params"] for each in torchvision.models.get_model_weights(name))
