"""Frozen weights, and their thaw. Run: python -m pytest tests/training/test_thaw.py"""

import copy

import pytest
import torch
from lanes_and_plain import (
    ALL_SCHEDULES,
    LR,
    assert_same_state,
    make_batches,
    make_stream,
    make_tiny_model,
    set_values,
    with_threads,
)
from small import needs_two_cpus
from torch import nn

from split_affinity.lanes.lane import Lanes
from split_affinity.models.freezing import begin_training, freeze, trainable_weights
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.settings import Settings
from split_affinity.training.network import Network
from split_affinity.training.optimizer import build_optimizer
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.steps import run_schedule
from split_affinity.training.update import GradientNorms, MovingAverage, TrainState

pytestmark = needs_two_cpus


@ALL_SCHEDULES
def test_frozen_weights_stay_and_have_no_copies(schedule, split_plan):
    model = make_tiny_model()
    for weight in (*model[0].parameters(), *model[1].parameters()):
        weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    settings = Settings(lr=0.1)
    train_state = TrainState(
        Network(model, nn.CrossEntropyLoss()),
        build_optimizer(model, settings),
        gradient_norms=GradientNorms(model),
    )
    frozen = {"0.weight", "0.bias", "1.weight", "1.bias"}
    with Lanes(split_plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, train_state, make_stream(make_batches(4, side=16))):
            copied = train_state.end.weights or {}
            assert not copied or copied.keys() == trainable_weights(model).keys()
    changed = {
        name
        for name, value in train_state.model_state().items()
        if not torch.equal(value, before[name])
    }
    assert changed.isdisjoint(frozen), "BatchNorm's statistics move, its weights do not"
    assert changed >= {"3.weight", "9.weight", "1.running_mean"}
    assert len(train_state.optimizer.state) == len(trainable_weights(model)) == 6
    assert all(norm > 0 for norm in train_state.gradient_norms.pop_means().values()), (
        "no warning of vanishing gradients"
    )


@ALL_SCHEDULES
@pytest.mark.parametrize("switches", [{}, {"channels_last": True}, {"bf16": True}])
@pytest.mark.parametrize("grads_to_none", [True, False])
def test_what_is_frozen_stays_to_the_bit(
    schedule, switches, grads_to_none, split_plan, monkeypatch
):
    """Buffers of batch normalisation too, after steps with decay, clipping and an average."""
    monkeypatch.setitem(OWN_MODELS, "tiny", lambda num_classes, image_size: make_tiny_model())
    model = make_tiny_model()
    settings = Settings(opt="adam", lr=0.1, weight_decay=0.1)
    frozen = freeze(model, "0,1,3,4", "tiny", 10, 16)
    before = copy.deepcopy(model.state_dict())
    network = Network(model, nn.CrossEntropyLoss(), 2, frozen=frozen, **switches)
    train_state = TrainState(
        network,
        build_optimizer(model, settings),
        average=MovingAverage(model, 0.9),
        clip_grad_norm=0.1,
        grads_to_none=grads_to_none,
    )
    with Lanes(split_plan, ()) as lanes:
        list(SCHEDULES[schedule](lanes, train_state, make_stream(make_batches(6, side=16))))
    for values in (train_state.model_state(), train_state.average.values):
        changed = {name for name in before if not torch.equal(values[name], before[name])}
        assert changed == {"9.weight", "9.bias"}
    assert len(train_state.optimizer.state) == 2


@ALL_SCHEDULES
@pytest.mark.parametrize("bf16", [False, True])
def test_a_frozen_part_without_norms_trains_the_rest_alike(schedule, bf16, split_plan, monkeypatch):
    """The model itself keeps its norms, which train again once it is thawed."""
    monkeypatch.setitem(OWN_MODELS, "tiny", lambda num_classes, image_size: make_tiny_model())
    ends = []
    for fold_norm in (False, True):
        model, settings = make_tiny_model(), Settings(**LR)
        frozen = freeze(model, "0,1", "tiny", 10, 16)
        how = {"frozen": frozen, "bf16": bf16, "fold_norm": fold_norm}
        network = Network(model, nn.CrossEntropyLoss(), **how)
        train_state = TrainState(network, build_optimizer(model, settings))
        torch.manual_seed(3)
        with Lanes(split_plan, ()) as lanes:
            for _ in range(2):
                batches = make_stream(make_batches(3, side=16))
                list(run_schedule(Settings(schedule=schedule), lanes, train_state, batches))
                kinds = [type(each) for each in (network.view or model).modules()]
                assert kinds.count(nn.BatchNorm2d) == (1 if fold_norm and network.frozen else 2)
                ends.append(copy.deepcopy(model.state_dict()))
                train_state.thaw()
    first, second, *folded = ends
    for there, here in zip((first, second), folded, strict=True):
        for name, value in there.items():
            most = 0.05 if bf16 else 1e-4
            torch.testing.assert_close(here[name], value, rtol=most, atol=most)
    assert torch.equal(first["1.running_mean"], folded[0]["1.running_mean"])
    assert not torch.equal(folded[0]["1.running_mean"], folded[1]["1.running_mean"])


@ALL_SCHEDULES
@pytest.mark.parametrize("fused", [True, False])
def test_a_thaw_is_that_of_a_plain_loop(schedule, fused, split_plan):
    """Two epochs of three steps; in the first one batch normalisation computes with the running
    statistics of its layers.
    """
    batches = make_batches(6, side=16)
    model, reference = make_tiny_model(), make_tiny_model()
    frozen = tuple(f"{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias"))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    begin_training(model)
    settings = Settings(**LR, fused=fused)
    train_state = TrainState(
        Network(model, nn.CrossEntropyLoss(), frozen=frozen),
        build_optimizer(model, settings),
    )
    torch.manual_seed(3)
    with Lanes(with_threads(split_plan, 1), ()) as lanes:
        losses = []
        for epoch in (batches[:3], batches[3:]):
            steps = SCHEDULES[schedule](lanes, train_state, make_stream(epoch))
            losses += [scores.loss for (scores,) in steps]
            train_state.thaw()
    age = int(schedule == "delayed")
    reference[:2].eval().requires_grad_(False)
    assert losses == train_thawing(reference, batches, age, fused)
    assert_same_state(model, reference)


def train_thawing(model, batches, update_age, fused):
    """A plain loop of three steps with the first two layers frozen, and three of the whole model,
    with gradients of weights that are some updates old.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    front, rest = list(model[:2].parameters()), list(model[2:].parameters())
    optimizers = [torch.optim.SGD(rest, **LR, fused=fused)]
    history, losses = [copy.deepcopy([*front, *rest])], []
    for step, (images, targets) in enumerate(batches):
        if step == 3:
            model[:2].train().requires_grad_(True)
            optimizers.append(torch.optim.SGD(front, **LR, fused=fused))
        set_values([*front, *rest], history[max(step - step % 3, step - update_age)])
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        losses.append(loss.item())
        set_values([*front, *rest], history[-1])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append(copy.deepcopy([*front, *rest]))
    torch.set_num_threads(before)
    return losses
