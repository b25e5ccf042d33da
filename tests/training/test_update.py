"""What an update consists of. Run: python -m pytest tests/training/test_update.py"""

import pytest
import torch
from lanes_and_plain import (
    ALL_SCHEDULES,
    make_batches,
    make_stream,
    make_tiny_model,
    make_work,
    train_through_lanes,
)
from small import needs_two_cpus
from torch import nn

from split_affinity.lanes.lane import Lanes
from split_affinity.training.network import Network
from split_affinity.training.schedules import SCHEDULES, delayed
from split_affinity.training.update import GradientFlow, MovingAverage, Work

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
    return Work(Network(model, nn.CrossEntropyLoss()), optimizer, **parts), optimizer


def test_an_update_measures_clips_steps_and_then_looks_ahead():
    model = make_linear()
    flow, average = GradientFlow(model), MovingAverage(model, 0.75)
    work, optimizer = make_update(model, flow=flow, average=average, clip_grad_norm=1.0)
    work.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    work.update()
    assert flow.take() == {"weight": 5.0}, "before clipping"
    moved = torch.tensor([[-0.6, -0.8]])
    torch.testing.assert_close(model.weight, moved, msg="clipped, and with the rate of this step")
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1), "the rate of the next one"
    torch.testing.assert_close(average.values["weight"], 0.9 * moved)
    assert model.weight.grad is None


def test_an_update_without_any_of_that():
    work, _ = make_update(make_linear())
    work.update()
    assert work.network.model.weight.tolist() == [[-3.0, -4.0]]


@pytest.mark.parametrize("grads_to_none", [True, False])
def test_an_update_with_the_gradients_of_a_copy(grads_to_none):
    work, _ = make_update(make_linear(), grads_to_none=grads_to_none)
    copied = work.network.copy()
    copied.weight.grad = torch.tensor([[1.0, 2.0]])
    work.update(copied)
    assert work.network.model.weight.tolist() == [[-1.0, -2.0]]
    assert copied.weight.tolist() == [[0.0, 0.0]]
    left = copied.weight.grad
    assert left is None if grads_to_none else left.tolist() == [[0.0, 0.0]]


def test_clipping_leaves_short_gradients_alone():
    work, _ = make_update(make_linear(), clip_grad_norm=5.1)
    work.update()
    assert work.network.model.weight.tolist() == [[-3.0, -4.0]]


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
    work = make_work(make_tiny_model(), accumulate)
    torch.manual_seed(3)
    with Lanes(split_plan, ()) as lanes:
        for step, _ in enumerate(delayed(lanes, work, make_stream(batches)), start=1):
            model, random_state = done[step]
            for name, value in model.state_dict().items():
                assert torch.equal(work.values()[name], value), (step, name)
            assert (work.end.weights is None) == (step == 4), "the pipeline is drained"
            if work.end.weights:
                assert torch.equal(work.end.random_state, random_state)
                for name, weight in done[step - 1][0].named_parameters():
                    assert torch.equal(work.end.weights[name], weight), "one update old"
                running_mean = work.network.model.state_dict()["1.running_mean"]
                assert not torch.equal(running_mean, work.values()["1.running_mean"])


@ALL_SCHEDULES
def test_a_moving_average_takes_in_nothing_of_a_step_already_begun(schedule, split_plan):
    """One that forgets at once is the model after the step, buffers too."""
    work = make_work(make_tiny_model(), 2)
    work.average = MovingAverage(work.network.model, 0.0)
    with Lanes(split_plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, work, make_stream(make_batches(6, side=16))):
            for name, value in work.values().items():
                assert torch.equal(work.average.values[name], value), name
            running_mean = work.network.model.state_dict()["1.running_mean"]
            begun = not torch.equal(work.average.values["1.running_mean"], running_mean)
            assert begun == (work.end.weights is not None)


@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
def test_other_schedules_begin_nothing(schedule, split_plan):
    work = make_work(make_tiny_model(), 2)
    with Lanes(split_plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, work, make_stream(make_batches(4, side=16))):
            assert work.end.weights is None
            for name, value in work.network.model.state_dict().items():
                assert torch.equal(work.values()[name], value)
