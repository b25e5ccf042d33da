"""Models as graphs. Run: python -m pytest tests/models/test_tracing.py"""

import pytest
import torch
from building import build
from torch import nn
from torchvision.ops import StochasticDepth

from split_affinity.models.freezing import begin_training, freeze
from split_affinity.models.registry import build_model
from split_affinity.models.tracing import CannotTrace, trace
from split_affinity.models.weights import versioned, with_tensors

# Image sizes that are as small as the models take.
SIZES = {
    "resnet18": 32,
    "resnet50": 32,
    "mobilenet_v3_small": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "convnext_tiny": 32,
    "vit_b_32": 32,
    "swin_t": 32,
    "regnet_y_400mf": 32,
    "inception_v3": 75,
    "googlenet": 32,
    "mnasnet0_5": 32,
    "shufflenet_v2_x0_5": 32,
    "resnet20": 16,
    "resnet56": 16,
    "hybrid-light": 64,
}


def outputs(model, images):
    """What a model gives, with the same random numbers in each call."""
    torch.manual_seed(1)
    return model(images)


def check_same(model, graph, images):
    """In training, where running statistics change too, and in evaluation mode."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = outputs(model, images)
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(versioned(start, model))
    assert torch.equal(outputs(graph, images), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, changed[name]), name


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_a_graph_computes_what_the_model_computes(name):
    size = SIZES[name]
    model, images = build(name, 7, size), torch.randn(2, 3, size, size)
    check_same(model, trace(model), images)
    model.eval()
    check_same(model, trace(model), images)


@torch.no_grad()
def test_norms_of_timm_keep_their_activation():
    pytest.importorskip("timm")
    model, images = build("timm/efficientnet_b0", 7, 32).eval(), torch.randn(2, 3, 32, 32)
    graph = trace(model)
    assert "bn1" in [node.target for node in graph.graph.nodes]
    check_same(model, graph, images)


def test_gradients_reach_the_models_own_weights():
    model, images = build("resnet20", size=16), torch.randn(2, 3, 16, 16)
    graph = trace(model)
    names = dict(graph.named_parameters())
    assert names.keys() == dict(model.named_parameters()).keys()
    assert all(names[name] is weight for name, weight in model.named_parameters())
    model(images).sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    graph(images).sum().backward()
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, expected[name]), name


def test_layers_look_up_their_mode():
    model, images = build("resnet20", size=16), torch.randn(2, 3, 16, 16)
    graph = trace(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(graph(images), model(images))


def test_a_part_that_is_frozen_is_in_evaluation_mode_in_a_graph_too():
    model, images = build("resnet20", size=16), torch.randn(2, 3, 16, 16)
    freeze(model, "body", "resnet20", 10, 16)
    begin_training(model)
    check_same(model, trace(model), images)


def test_a_copy_with_other_weights_has_a_graph_of_its_own():
    model, images = build("resnet20", size=16), torch.randn(2, 3, 16, 16)
    doubled = {name: 2 * weight.detach() for name, weight in model.named_parameters()}
    copied = with_tensors(trace(model), doubled)
    direct = with_tensors(model, doubled)
    with torch.no_grad():
        assert torch.equal(copied(images), direct(images))
        assert not torch.equal(copied(images), model(images))


def test_other_image_sizes_go_through_the_same_graph():
    model = build("hybrid-light", size=64).eval()
    graph = trace(model)
    for size in (64, 96):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.equal(graph(images), model(images)), size


def test_norms_and_modules_that_branch_are_called_whole():
    called = [node.target for node in trace(build("hybrid-light", size=64)).graph.nodes]
    assert "stem.1" in called  # a norm within Conv2dNormActivation
    assert "encoder" in called  # branches on a shape
    model = build("efficientnet_b0")
    graph = trace(model)
    kinds = [type(each) for name, each in graph.named_modules() if name]
    assert StochasticDepth in kinds
    assert nn.BatchNorm2d in kinds


class InPlace(nn.Module):
    """Changes what it is given."""

    def forward(self, images):
        before = images
        images += 1
        images *= 2
        return images, before


def test_what_is_in_place_stays_so():
    images = torch.zeros(2)
    after, before = trace(InPlace())(images)
    assert after is before is images
    assert torch.equal(images, torch.full((2,), 2.0))


@torch.no_grad()
def test_hooks_run_in_a_graph():
    model = build_model("resnet20", 10, 16, stochastic_depth=0.5)  # by hooks on the last norms
    images = torch.randn(4, 3, 16, 16)
    check_same(model, trace(model), images)
    seen = []
    model.stage2.register_forward_hook(lambda *_: seen.append("after"))
    model.stage3[1].register_forward_pre_hook(lambda *_: seen.append("before"))
    trace(model)(images)
    assert seen == ["after", "before"]


class Sign(nn.Module):
    """Branches on a value."""

    def forward(self, images):
        return images if images.sum() > 0 else -images


class WithoutAutocast(nn.Module):
    """Computes a part of its operations in float32, whatever is asked for."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):
            return self.linear(images.float())


def test_a_model_that_branches_on_values_has_no_graph():
    with pytest.raises(CannotTrace, match=r"^Sign: [^\n]+$"):
        trace(Sign())
    part = nn.Sequential(nn.Linear(4, 4), Sign())
    images = -torch.ones(2, 4)
    assert torch.equal(trace(part)(images), part(images))


@torch.no_grad()
def test_a_module_that_leaves_autocast_is_called_whole():
    model, images = nn.Sequential(nn.Linear(4, 4), WithoutAutocast()), torch.randn(2, 4)
    graph = trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert torch.equal(graph(images), model(images))


def test_a_model_with_hooks_of_its_own_has_no_graph():
    model = build("resnet20")
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(CannotTrace, match="SmallResNet has forward hooks"):
        trace(model)
