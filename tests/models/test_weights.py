"""Weights by the names of others. Run: python -m pytest tests/models/test_weights.py"""

import re

import pytest
import torch
import torchvision
from torch import nn

from split_affinity.errors import UserError
from split_affinity.models.weights import take_weights

# Weights from elsewhere


def renamed(weights, pattern, new):
    return {re.sub(pattern, new, name): value for name, value in weights.items()}


def small_vit(mlp=32):
    return torchvision.models.VisionTransformer(64, 32, 2, 2, 16, mlp, num_classes=7)


# As in the files that torchvision offers: of models whose names have changed since.
VIT = r"\.mlp\.(0|3)\.", lambda found: f".mlp.linear_{1 + int(found[1]) // 3}."
DENSENET = r"(\.denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."


@pytest.mark.parametrize(
    ("make", "old_names"),
    [
        (small_vit, VIT),
        (lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 8, num_classes=7), DENSENET),
        (lambda: torchvision.models.mnasnet0_5(num_classes=7), None),
        (lambda: torchvision.models.resnet18(num_classes=7), None),
    ],
    ids=["vit", "densenet", "mnasnet", "resnet"],
)
def test_a_model_takes_weights_by_the_names_of_its_older_files(make, old_names):
    """Which have no counts of BatchNorm's batches either."""
    source, model = make(), make()
    for parameter in source.parameters():
        parameter.data.add_(1)
    weights = source.state_dict()
    if old_names:
        weights = renamed(weights, *old_names)
        assert not weights.keys() <= model.state_dict().keys()
    weights = {key: value for key, value in weights.items() if "num_batches" not in key}
    assert take_weights(model, weights) == f"all {len(weights)} tensors"
    for (key, value), expected in zip(
        model.state_dict().items(), source.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), key


@pytest.mark.parametrize(
    ("changes", "options", "taken"),
    [
        ({}, {}, "all 4 tensors"),
        ({"1.bias": None}, {}, "3 of 4 tensors; new: 1.bias (2)"),
        ({"1.bias": torch.zeros(3)}, {}, "3 of 4 tensors; new: 1.bias (2)"),
        (
            {},
            {"left_out": {"1.weight", "1.bias"}},
            "2 of 4 tensors; new: 1.weight (2, 2), 1.bias (2)",
        ),
        ({"odd": torch.zeros(1, 2)}, {}, "all 4 tensors; left over: odd (1, 2)"),
    ],
)
def test_what_is_taken_is_told(changes, options, taken):
    def make():
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    saved = {
        key: value for key, value in (make().state_dict() | changes).items() if value is not None
    }
    assert take_weights(make(), saved, **options) == taken
    if taken.startswith("3"):
        with pytest.raises(UserError, match=r"^only 3 of 4 tensors fit; missing: 1.bias \(2\)$"):
            take_weights(make(), saved, least=1)


def test_fewer_than_half_of_the_tensors_do_not_fit():
    saved = {"0.weight": torch.zeros(2, 2), "features.0.weight": torch.zeros(3, 4)}
    with pytest.raises(UserError) as caught:
        take_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), saved)
    assert str(caught.value) == (
        "only 1 of 4 tensors fit; missing: 0.bias (2), 1.weight (2, 2), 1.bias (2); "
        "left over: features.0.weight (3, 4)"
    )


def test_weights_by_old_names_in_other_shapes_do_not_fit():
    weights = renamed(small_vit().state_dict(), *VIT)
    with pytest.raises(UserError, match="^size mismatch for encoder.*: copying a param with"):
        take_weights(small_vit(mlp=48), weights)


def test_half_precision_is_taken_in_full_precision():
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    half = {name: value.bfloat16() for name, value in source.state_dict().items()}
    assert take_weights(model, half) == "all 2 tensors"
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, source.weight.bfloat16().float())
