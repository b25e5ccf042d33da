"""Norms within convolutions. Run: python -m pytest tests/models/test_folding.py"""

import copy

import pytest
import torch
from building import build
from torch import nn

from split_affinity.models import folding
from split_affinity.models.folding import FoldedConvolution, fold
from split_affinity.models.freezing import begin_training, freeze
from split_affinity.models.registry import build_model


def with_statistics(model):
    """A model whose norms have something to fold, in evaluation mode."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def norms(model):
    return sum(isinstance(each, nn.BatchNorm2d) for each in model.modules())


def layers(model):
    return [each for each in model.modules() if isinstance(each, FoldedConvolution)]


def check_same(model, folded, images, most=1e-5, bf16=False):
    """The same outputs, twice, from images that stay as they were."""
    before = images.clone(memory_format=torch.preserve_format)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = model(images).float()
        images.copy_(before)
        first = folded(images).float()
        images.copy_(before)
        assert torch.equal(folded(images).float(), first)
    assert (first - expected).norm() <= most * expected.norm()


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [
        ("resnet20", 16, 0),
        ("resnet18", 32, 0),
        ("resnet50", 32, 0),
        ("mobilenet_v3_small", 32, 0),
        ("efficientnet_b0", 32, 0),
        ("densenet121", 32, 62),  # before a convolution, or of what several blocks use
        ("shufflenet_v2_x0_5", 32, 0),
        ("googlenet", 32, 0),
        ("regnet_y_400mf", 32, 0),
        ("hybrid-light", 32, 0),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_copy_without_norms_computes_the_same(name, size, left, layout):
    model = with_statistics(build(name, 7, size)).to(memory_format=layout)
    state = copy.deepcopy(model.state_dict())
    images = torch.randn(3, 3, size, size).contiguous(memory_format=layout)
    for bf16, most in ((False, 1e-5), (True, 0.05)):
        folded = fold(model, bf16)
        assert norms(folded) == left
        assert len(layers(folded)) == norms(model) - left
        assert not folded.training
        kinds = {each.weight.dtype for each in layers(folded)}
        assert kinds == {torch.bfloat16 if bf16 else torch.float32}
        check_same(model, folded, images, most, bf16)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bf16", [False, True])
def test_without_kernels_the_parts_are_computed_one_by_one(bf16, monkeypatch):
    model = with_statistics(build("resnet20", 7, 16))
    monkeypatch.setattr(folding, "has_kernels", lambda bf16: False)
    check_same(model, fold(model, bf16), torch.randn(3, 3, 16, 16), 0.02 if bf16 else 1e-5, bf16)


def test_activations_and_sums_are_within_the_kernels():
    resnet = fold(with_statistics(build("resnet50")), False)
    assert [each.op for each in resnet.graph.nodes].count("call_module") == 53 + 3  # pools, fc
    assert sum(type(each.activation) is nn.ReLU for each in layers(resnet)) == 49
    assert sum(each.in_place for each in layers(resnet)) == 16
    kinds = {type(each.activation) for each in layers(fold(build("efficientnet_b0").eval(), False))}
    assert kinds == {nn.SiLU, nn.Identity}


def conv_norm(channels=4):
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))


class Parts(nn.Module):
    """Two convolutions with their norms, put together by a function."""

    def __init__(self, together):
        super().__init__()
        self.one, self.two, self.relu = conv_norm(), conv_norm(), nn.ReLU(inplace=True)
        self.together = together

    def forward(self, images):
        return self.together(self, images)


def in_place_before(parts, images):
    """The sum is written into what `kept` names too."""
    features = parts.one(images)
    kept = features
    features += parts.two(features)
    return parts.relu(features) + kept


def used_after(parts, images):
    features = parts.one(images)
    return parts.relu(parts.two(features) + features) - features


def with_a_part(parts, images):
    features = parts.one(images)
    half = features.flatten(1).view_as(features)
    return parts.relu(parts.two(features) + features) + half


def changed_meanwhile(parts, images):
    features = parts.one(images) * 2
    branch = parts.two(features)
    return parts.relu(branch + parts.relu(features))


def broadcast(parts, images):
    features = parts.one(images)
    return parts.relu(parts.two(features) + features.mean((2, 3), keepdim=True))


def doubled(parts, images):
    features = parts.one(images)
    return parts.relu(features + features)


def norm_twice(parts, images):
    return parts.one[1](parts.two[0](parts.one(images)))


def result_twice(parts, images):
    features = parts.one[0](images)
    return parts.one[1](features) + features


def of_other_type(parts, images):
    return parts.relu(parts.one(images) + images.double().mul(2))


@pytest.mark.parametrize(
    ("together", "folds"),
    [
        (in_place_before, 2),
        (used_after, 2),
        (with_a_part, 2),
        (changed_meanwhile, 2),
        (broadcast, 2),
        (doubled, 1),
        (norm_twice, 2),
        (result_twice, 0),
        (of_other_type, 1),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_odd_ways_to_put_parts_together(together, folds, bf16):
    model = with_statistics(Parts(together)).to(memory_format=torch.channels_last)
    folded = fold(model, bf16)
    assert len(layers(folded)) == folds
    images = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    check_same(model, folded, images, 0.02 if bf16 else 1e-5, bf16)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 8, 3, dilation=2),
        nn.Conv2d(4, 4, 5, padding=2, groups=4),
        nn.Conv2d(4, 8, 3, padding="same"),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 8, 2, stride=2),
    ],
)
@pytest.mark.parametrize("affine", [False, True])
def test_kinds_of_convolutions(convolution, affine):
    norm = nn.BatchNorm2d(convolution.out_channels, affine=affine, eps=1e-3)
    model = nn.Sequential(convolution, norm, nn.Hardswish()).eval()
    nn.init.normal_(norm.running_mean)
    check_same(model, fold(model, False), torch.randn(2, 4, 9, 9))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False).eval()]
)
def test_a_norm_that_computes_statistics_stays(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    assert fold(model, False) is model


class Choice(nn.Module):
    """Cannot be traced."""

    def forward(self, images):
        return images if images.sum() > 0 else -images


def test_a_model_with_nothing_to_fold_comes_back_itself():
    for model in (Choice(), build("vit_b_32").eval(), build("convnext_tiny").eval()):
        assert fold(model, False) is model


def test_hooks_run_and_those_of_stochastic_depth_are_not_needed():
    model = with_statistics(build_model("resnet20", 10, 16, stochastic_depth=0.5))
    images, seen = torch.randn(2, 3, 16, 16), []
    folded = fold(model, False)
    assert norms(folded) == 0
    check_same(model, folded, images)
    model.stage1[0].bn2.register_forward_hook(lambda *_: seen.append("hook"))
    folded = fold(model, False)
    assert norms(folded) == 1
    folded(images)
    assert seen == ["hook"]


def test_the_copy_has_weights_of_its_own_only_where_it_has_to():
    model = with_statistics(build("resnet20", 7, 16))
    folded, images = fold(model, False), torch.randn(2, 3, 16, 16)
    assert folded.fc.weight is model.fc.weight
    with torch.no_grad():
        before = folded(images)
        model.stem[0].weight.zero_()
        assert torch.equal(folded(images), before)


@torch.no_grad()
def test_an_activation_within_a_norm_of_timm():
    pytest.importorskip("timm")
    for name in ("timm/efficientnet_b0", "timm/resnet18", "timm/mobilenetv3_small_050"):
        model = with_statistics(build(name, 7, 32))
        folded = fold(model, False)
        assert norms(folded) == 0, name
        check_same(model, folded, torch.randn(2, 3, 32, 32))


# What is frozen in training


@pytest.mark.parametrize("groups", ["body", "stem,stage1", "stage2"])
def test_only_what_is_in_front_of_all_trained_weights_is_folded(groups):
    model, images = with_statistics(build("resnet20", 7, 16)), torch.randn(2, 3, 16, 16)
    freeze(model, groups, "resnet20", 7, 16)
    begin_training(model)
    folded = fold(model, False, frozen_alone=True)
    assert len(layers(folded)) == {"body": 19, "stem,stage1": 7, "stage2": 0}[groups]
    statistics = copy.deepcopy(model.state_dict())
    model(images).square().sum().backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(statistics)
    model.zero_grad()
    folded(images).square().sum().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == (expected[name] is None)
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-3, atol=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, after[name])


def test_a_frozen_branch_beside_a_trained_one_is_no_part_of_their_sum():
    model = with_statistics(Parts(lambda parts, images: parts.one(images) + parts.two(images)))
    model.one.requires_grad_(False)
    begin_training(model)
    folded, images = fold(model, False, frozen_alone=True), torch.randn(2, 4, 5, 5)
    assert len(layers(folded)) == 1
    folded(images).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.two.parameters())
