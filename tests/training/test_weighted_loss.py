"""Class weights in the loss. Run: python -m pytest tests/training/test_weighted_loss.py"""

import pytest
import torch
from lanes_and_plain import (
    ALL_SCHEDULES,
    make_batches,
    make_stream,
    make_tiny_model,
    make_train_state,
    train_plainly,
    with_threads,
)
from small import needs_two_cpus
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from split_affinity.lanes.lane import Lanes
from split_affinity.training.network import Network, Teacher, build_loss, weighted_mean
from split_affinity.training.schedules import SCHEDULES

pytestmark = needs_two_cpus

WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.5, 4.0, 0.7, 1.5, 2.5, 0.1, 1.0])
SHARE = 0.3
KINDS = pytest.mark.parametrize(
    ("smoothing", "is_mixed", "is_taught"),
    [
        (0.0, False, False),
        (0.1, False, False),
        (0.0, True, False),
        (0.0, False, True),
        (0.1, True, True),
    ],
    ids=["plain", "smoothed", "mixed", "taught", "all"],
)


def batches_of(count, is_mixed):
    """Batches of four images, with targets as mixup has them or with classes."""
    batches = make_batches(count, side=16)
    if not is_mixed:
        return batches
    return [
        (images, 0.3 * one_hot(targets, 10).float() + 0.7 * one_hot(targets.flip(0), 10).float())
        for images, targets in batches
    ]


def make_teacher():
    model = make_tiny_model()
    model[9].weight.data.mul_(-3.0)
    return Teacher(model.eval().requires_grad_(False), SHARE)


def weighted_by_hand(model, teacher, smoothing):
    """The sum of w * l over images, divided by their number, in plain PyTorch; l has one target, of
    smoothed labels and the teacher's probabilities.
    """

    def loss_of(images, targets):
        labels = targets if targets.ndim == 2 else one_hot(targets, 10).float()
        weights = (labels * WEIGHTS).sum(1)
        target = (1 - smoothing) * labels + smoothing / 10
        if teacher:
            with torch.no_grad():
                taught = torch.softmax(teacher.model(images), 1)
            target = (1 - SHARE) * target + SHARE * taught
        losses = -(target * torch.log_softmax(model(images), 1)).sum(1)
        return (weights * losses).sum() / len(images)

    return loss_of


def weigh(network, smoothing, teacher):
    network.loss, network.class_weights = build_loss(smoothing, WEIGHTS), WEIGHTS
    network.teacher = teacher


@ALL_SCHEDULES
@KINDS
def test_steps_with_weights_are_those_of_a_plain_loop(
    schedule, smoothing, is_mixed, is_taught, split_plan
):
    """Two steps of two micro-batches each, with momentum: losses, weights and buffers."""
    batches, teacher = batches_of(4, is_mixed), make_teacher() if is_taught else None
    model, reference = make_tiny_model(), make_tiny_model()
    train_state = make_train_state(model, 2)
    weigh(train_state.network, smoothing, teacher)
    torch.manual_seed(3)
    with Lanes(with_threads(split_plan, 1), ()) as lanes:
        steps = list(SCHEDULES[schedule](lanes, train_state, make_stream(batches)))
    losses = [scores.loss for step in steps for scores in step]
    by_hand = weighted_by_hand(reference, teacher, smoothing)
    age = int(schedule == "delayed")
    expected = train_plainly(1, reference, batches, 2, age, loss_of=by_hand)
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("accumulate", "ranks"), [(4, 1), (1, 4), (2, 2)])
@KINDS
def test_the_parts_of_a_step_add_up_to_the_whole_step(
    accumulate, ranks, smoothing, is_mixed, is_taught
):
    """Whatever the weights of the images in each part are: four parts of four images."""
    batches = batches_of(4, is_mixed)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    gradients, losses = [], []
    for parts, counts in (([whole], (1, 1)), (batches, (accumulate, ranks))):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
        network = Network(model, nn.CrossEntropyLoss(), counts[0], ranks=counts[1])
        weigh(network, smoothing, make_teacher() if is_taught else None)
        losses.append(sum(network.backward(network.forward(part)).loss for part in parts))
        gradients.append(model[1].weight.grad)
    assert losses[1] / 4 == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_the_weighted_mean_against_pytorchs_own():
    """The sum is the same where targets are classes. Its mean is divided by a batch's weights."""
    torch.manual_seed(4)
    logits, targets = torch.randn(6, 10), torch.tensor([1, 1, 8, 4, 0, 3])
    ours = weighted_mean(build_loss(0.0, WEIGHTS)(logits, targets), targets, WEIGHTS)
    theirs = cross_entropy(logits, targets, WEIGHTS, reduction="sum")
    torch.testing.assert_close(ours, theirs / 6)
    mean = cross_entropy(logits, targets, WEIGHTS)
    torch.testing.assert_close(mean, theirs / WEIGHTS[targets].sum())


def test_weights_of_1_change_nothing():
    torch.manual_seed(4)
    logits, targets, ones = torch.randn(6, 10), torch.arange(6), torch.ones(10)
    ours = weighted_mean(build_loss(0.1, ones)(logits, targets), targets, ones)
    torch.testing.assert_close(ours, build_loss(0.1)(logits, targets))


def test_an_evaluation_is_not_weighted():
    train_state = make_train_state(make_tiny_model().eval(), 1)
    batch = make_batches(1, side=16)[0]
    plain, *_ = train_state.evaluate(batch)
    weigh(train_state.network, 0.1, None)
    assert train_state.evaluate(batch)[0] == plain
