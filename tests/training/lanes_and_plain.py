"""The same training through lanes and as a plain loop."""

import pytest
import torch
from small import as_loaded
from torch import nn

from split_affinity.data.loader import Batches
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.training.network import Network
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.update import TrainState

LR = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
ALL_SCHEDULES = pytest.mark.parametrize("schedule", list(SCHEDULES))


def make_batches(count, side=32):
    torch.manual_seed(1)
    return [(torch.randn(4, 3, side, side), torch.randint(0, 10, (4,))) for _ in range(count)]


def make_tiny_model():
    """BatchNorm's buffers and dropout's random numbers, in a model of some milliseconds."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, 10),
    )


def make_train_state(model, accumulate, **switches):
    optimizer = torch.optim.SGD(model.parameters(), **LR)
    names = switches.keys() & {"bf16", "channels_last", "fold_norm", "fused"}
    parts = {name: switches.pop(name) for name in names}
    network = Network(model, nn.CrossEntropyLoss(), accumulate, **parts)
    return TrainState(network, optimizer, **switches)


def make_stream(batches):
    return Batches(as_loaded(batches), len(batches))


def train_through_lanes(plan, model, batches, accumulate, schedule="sequential", **switches):
    """The loss of each micro-batch."""
    train_state = make_train_state(model, accumulate, **switches)
    train_state.network.build_view()
    torch.manual_seed(3)
    with Lanes(plan, ()) as lanes:
        steps = list(SCHEDULES[schedule](lanes, train_state, make_stream(batches)))
    return [scores.loss for step in steps for scores in step]


def train_plainly(
    threads, model, batches, accumulate, update_age=0, epoch_steps=None, loss_of=None
):
    """A plain PyTorch loop, no lanes, with a given number of threads.

    With `update_age` 1 it simulates weights that are one update old: a step's gradients are those
    of the weights before the step before, and go to the weights of today. The first step of an
    epoch has no step before it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), **LR)
    parameters = list(model.parameters())
    history = [[parameter.detach().clone() for parameter in parameters]]
    losses = []
    loss_of = loss_of or (
        lambda images, targets: nn.functional.cross_entropy(model(images), targets)
    )
    stream = iter(batches)
    for step in range(len(batches) // accumulate):
        first = step - step % (epoch_steps or len(batches))
        set_values(parameters, history[max(first, step - update_age)])
        for _ in range(accumulate):
            images, targets = next(stream)
            loss = loss_of(images, targets)
            (loss / accumulate).backward()
            losses.append(loss.item())
        set_values(parameters, history[-1])
        optimizer.step()
        optimizer.zero_grad()
        history.append([parameter.detach().clone() for parameter in parameters])
    torch.set_num_threads(before)
    return losses


def set_values(parameters, values):
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def assert_same_state(model, other):
    """Weights and buffers, bit for bit."""
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    for (name, value), expected in pairs:
        assert torch.equal(value, expected), name


def with_threads(plan, threads):
    """The plan, with another number of threads in each group."""
    first, last = (
        Group(group.name, group.cpus, threads) for group in (plan.forward, plan.backward)
    )
    return CorePlan(plan.split, first, first if len(plan.groups) == 1 else last, plan.loader_cpus)
