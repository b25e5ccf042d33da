"""Models whose norms are fused: the same outputs, gradients, statistics and names."""

import copy

import pytest
import torch
from torch import nn

from split_affinity.kernels.fused_norm import fused_norm
from split_affinity.models.freezing import begin_training
from split_affinity.models.fusion import fuse_norms, has_norms
from split_affinity.models.registry import add_stochastic_depth, build_model
from split_affinity.models.weights import with_tensors


def built(name, size):
    torch.manual_seed(0)
    model = build_model(name, 10, size).to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def learn(model, images, targets):
    logits = model(images)
    nn.functional.cross_entropy(logits, targets).backward()
    return logits


def calls(fused):
    """The arguments of each call of the operator, in order."""
    return [dict(node.kwargs) for node in fused.graph.nodes if node.target is fused_norm]


# The counts of ResNets are those of the papers: a ReLU behind all but the shortcuts, and two
# consumers of each block's output but the last one's, and of the stem's where it is no pooling.
@pytest.mark.parametrize(
    ("name", "size", "norms", "relus", "sums", "twice"),
    [
        ("resnet50", 32, 53, 49, 16, 15),
        ("resnet18", 32, 20, 17, 8, 7),
        ("resnet20", 32, 19, 19, 9, 9),
        ("mobilenet_v3_small", 32, 34, 5, 6, 7),
        ("densenet121", 32, 121, 121, 0, 0),
    ],
)
def test_real_models(name, size, norms, relus, sums, twice):
    model = built(name, size)
    exact, plain, shared = copy.deepcopy(model).double(), copy.deepcopy(model), model
    fused, count = fuse_norms(shared)
    found = calls(fused)
    assert count == len(found) == norms
    assert sum(call["relu"] for call in found) == relus
    assert sum(call["residual"] is not None for call in found) == sums
    assert sum(call["twice"] for call in found) == twice
    assert shared.state_dict().keys() == exact.state_dict().keys()

    images = torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last)
    targets = torch.arange(4)
    wanted = learn(exact, images.double(), targets)
    errors = []
    for one, call in ((plain, plain), (shared, fused)):
        logits = learn(call, images, targets)
        pairs = zip(one.parameters(), exact.parameters(), strict=True)
        differences = [(weight.grad - other.grad).norm() for weight, other in pairs]
        largest = max(weight.grad.norm() for weight in exact.parameters())
        errors.append(((logits - wanted).norm() / wanted.norm(), max(differences) / largest))
        for buffer, other in zip(one.buffers(), exact.buffers(), strict=True):
            torch.testing.assert_close(buffer.double(), other.double(), rtol=1e-3, atol=1e-5)
    for theirs, ours in zip(*errors, strict=True):
        assert ours < 2 * theirs + 1e-5


class Block(nn.Module):
    """A norm, and what `rest` makes of it."""

    def __init__(self, rest):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.rest = rest

    def forward(self, x):
        return self.rest(self, x)


def in_place_on_the_other(self, x):
    kept = self.conv(x)
    kept += self.norm(x)
    return kept


def seen_by_others(self, x):
    kept = self.conv(x)
    changed = kept
    changed += self.norm(x)
    return kept * changed


def norm_used_again(self, x):
    y = self.norm(self.conv(x))
    return y + self.relu(y + 1)


def same_twice(self, x):
    y = self.norm(self.conv(x))
    return (y + y).relu()


def a_number_is_added(self, x):
    return torch.relu(self.norm(self.conv(x)) + 1)


def scaled_sum(self, x):
    return torch.add(self.norm(self.conv(x)), x, alpha=2).relu()


def methods(self, x):
    return self.norm(self.conv(x)).add(x).relu_()


def consumers_in_place(self, x):
    y = nn.functional.relu(self.norm(self.conv(x)) + x)
    return self.conv(y) + y.mul_(2)


def two_consumers(self, x):
    y = self.relu(self.norm(self.conv(x)) + x)
    return self.conv(y) * y.sigmoid()


def three_consumers(self, x):
    y = self.norm(x)
    return self.conv(y) + y.sigmoid() * y.tanh()


def shared_norm(self, x):
    return self.norm(self.norm(x).relu())


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (in_place_on_the_other, [(True, False, False)]),
        (seen_by_others, [(False, False, False)]),
        (norm_used_again, [(False, False, True)]),
        (same_twice, [(False, False, False)]),
        (a_number_is_added, [(False, False, False)]),
        (scaled_sum, [(False, False, False)]),
        (methods, [(True, True, False)]),
        (consumers_in_place, [(True, True, False)]),
        (two_consumers, [(True, True, True)]),
        (three_consumers, [(False, False, False)]),
        (shared_norm, [(False, True, False), (False, False, False)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_odd_blocks(rest, expected):
    plain = Block(rest)
    fused, _ = fuse_norms(ours := copy.deepcopy(plain))
    found = [(call["residual"] is not None, call["relu"], call["twice"]) for call in calls(fused)]
    assert found == expected
    x = torch.randn(2, 16, 5, 5)
    gradients = []
    for model, call in ((plain, plain), (ours, fused)):
        given = x.clone().requires_grad_()
        try:
            y = call(given)
            y.square().sum().backward()
        except RuntimeError as error:  # of autograd: what it needs was changed in place
            gradients.append(str(error)[:60])
            continue
        gradients.append([y, given.grad, *(weight.grad for weight in model.parameters())])
    if isinstance(gradients[0], str):
        assert gradients[0] == gradients[1]
    else:
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    for one, other in zip(plain.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_norm_with_a_hook_stays_whole():
    """Stochastic depth is one, on the last norm of each block."""
    model = build_model("resnet18", 10, 32)
    add_stochastic_depth(model, "resnet18", 0.5)
    fused, count = fuse_norms(model)
    assert count == 20 - 8
    assert not any(call["residual"] for call in calls(fused)[:2])
    torch.manual_seed(1)
    one = fused(torch.ones(2, 3, 32, 32))
    torch.manual_seed(1)
    torch.testing.assert_close(model(torch.ones(2, 3, 32, 32)), one, rtol=1e-3, atol=1e-4)


def test_frozen_layers_stay_as_they_are():
    model = build_model("resnet18", 10, 32)
    model.layer1.requires_grad_(False)
    begin_training(model)
    fused, count = fuse_norms(model)
    assert count == 20 - 4
    before = copy.deepcopy(model.layer1.state_dict())
    fused(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(
        torch.equal(value, before[name]) for name, value in model.layer1.state_dict().items()
    )
    assert model.layer1[0].conv1.weight.grad is None
    assert model.conv1.weight.grad is not None


def test_a_copy_has_weights_of_its_own_and_the_same_statistics():
    model = build_model("resnet20", 10, 32)
    fused, _ = fuse_norms(model)
    own = {name: nn.Parameter(weight + 1) for name, weight in model.named_parameters()}
    copied = with_tensors(fused, own)
    copied(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(weight.grad is not None for weight in own.values())
    assert all(weight.grad is None for weight in model.parameters())
    assert {*map(id, copied.buffers())} == {*map(id, model.buffers())}
    counts = [value for name, value in model.named_buffers() if "num_batches" in name]
    assert counts == [1] * 19


def test_what_has_norms():
    assert has_norms(build_model("resnet20", 10, 32))
    assert not has_norms(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm1d(64), nn.LayerNorm(16)))
