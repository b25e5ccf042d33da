"""What an update consists of. Run: python -m pytest tests/training/test_update.py"""

import pytest
import torch
from lanes_and_plain import (
    ALL_SCHEDULES,
    make_batches,
    make_stream,
    make_tiny_model,
    make_train_state,
    train_through_lanes,
)
from small import needs_two_cpus
from torch import nn

from split_affinity.lanes.lane import Lanes
from split_affinity.training.network import Network
from split_affinity.training.schedules import SCHEDULES, delayed
from split_affinity.training.update import GradientNorms, MovingAverage, TrainState

pytestmark = needs_two_cpus


# What a step consists of


def make_linear():
    """Two weights of 0, with gradients of 3 and 4: a norm of 5."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    return model


def make_update(model, **parts):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return TrainState(Network(model, nn.CrossEntropyLoss()), optimizer, **parts), optimizer


def test_an_update_measures_clips_steps_and_then_looks_ahead():
    model = make_linear()
    gradient_norms, average = GradientNorms(model), MovingAverage(model, 0.75)
    train_state, optimizer = make_update(
        model, gradient_norms=gradient_norms, average=average, clip_grad_norm=1.0
    )
    train_state.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    train_state.update()
    assert gradient_norms.pop_means() == {"weight": 5.0}, "before clipping"
    moved = torch.tensor([[-0.6, -0.8]])
    torch.testing.assert_close(model.weight, moved, msg="clipped, and with the rate of this step")
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1), "the rate of the next one"
    torch.testing.assert_close(average.values["weight"], 0.9 * moved)
    assert model.weight.grad is None


def test_an_update_without_any_of_that():
    train_state, _ = make_update(make_linear())
    train_state.update()
    assert train_state.network.model.weight.tolist() == [[-3.0, -4.0]]


@pytest.mark.parametrize("grads_to_none", [True, False])
def test_an_update_with_the_gradients_of_a_copy(grads_to_none):
    train_state, _ = make_update(make_linear(), grads_to_none=grads_to_none)
    copied = train_state.network.copy()
    copied.weight.grad = torch.tensor([[1.0, 2.0]])
    train_state.update(copied)
    assert train_state.network.model.weight.tolist() == [[-1.0, -2.0]]
    assert copied.weight.tolist() == [[0.0, 0.0]]
    left = copied.weight.grad
    assert left is None if grads_to_none else left.tolist() == [[0.0, 0.0]]


def test_clipping_leaves_short_gradients_alone():
    train_state, _ = make_update(make_linear(), clip_grad_norm=5.1)
    train_state.update()
    assert train_state.network.model.weight.tolist() == [[-3.0, -4.0]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_delayed_has_begun_is_told_apart_from_what_is_done(accumulate, split_plan):
    """After k steps, with step k + 1 begun, stands what a run of k steps leaves behind."""
    batches = make_batches(4 * accumulate, side=16)
    done = []
    for steps in range(5):
        model = make_tiny_model()
        if steps:
            some = batches[: steps * accumulate]
            train_through_lanes(split_plan, model, some, accumulate, "delayed")
        done.append((model, torch.get_rng_state()))
    train_state = make_train_state(make_tiny_model(), accumulate)
    torch.manual_seed(3)
    with Lanes(split_plan, ()) as lanes:
        for step, _ in enumerate(delayed(lanes, train_state, make_stream(batches)), start=1):
            model, random_state = done[step]
            for name, value in model.state_dict().items():
                assert torch.equal(train_state.model_state()[name], value), (step, name)
            assert (train_state.end.weights is None) == (step == 4), "the pipeline is drained"
            if train_state.end.weights:
                assert torch.equal(train_state.end.random_state, random_state)
                for name, weight in done[step - 1][0].named_parameters():
                    assert torch.equal(train_state.end.weights[name], weight), "one update old"
                running_mean = train_state.network.model.state_dict()["1.running_mean"]
                assert not torch.equal(running_mean, train_state.model_state()["1.running_mean"])


@ALL_SCHEDULES
def test_a_moving_average_takes_in_nothing_of_a_step_already_begun(schedule, split_plan):
    """One that forgets at once is the model after the step, buffers too."""
    train_state = make_train_state(make_tiny_model(), 2)
    train_state.average = MovingAverage(train_state.network.model, 0.0)
    with Lanes(split_plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, train_state, make_stream(make_batches(6, side=16))):
            for name, value in train_state.model_state().items():
                assert torch.equal(train_state.average.values[name], value), name
            running_mean = train_state.network.model.state_dict()["1.running_mean"]
            begun = not torch.equal(train_state.average.values["1.running_mean"], running_mean)
            assert begun == (train_state.end.weights is not None)


@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
def test_other_schedules_begin_nothing(schedule, split_plan):
    train_state = make_train_state(make_tiny_model(), 2)
    with Lanes(split_plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, train_state, make_stream(make_batches(4, side=16))):
            assert train_state.end.weights is None
            for name, value in train_state.network.model.state_dict().items():
                assert torch.equal(train_state.model_state()[name], value)
