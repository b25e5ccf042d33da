"""Scores, and evaluation. Run: python -m pytest tests/training/test_scores.py"""

import copy
import dataclasses
import math

import pytest
import torch
from lanes_and_plain import assert_same_state, make_batches, make_tiny_model, make_train_state
from small import needs_two_cpus
from torch import nn

from split_affinity.training.network import Scores, score_batch
from split_affinity.training.update import MovingAverage

pytestmark = needs_two_cpus


# Scores


LOGITS = torch.tensor(
    [
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0],
        [4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        [0.0, 0.0, 0.0, 9.0, 0.0, -1.0],
    ]
)


@pytest.mark.parametrize(
    ("targets", "top1", "top5"),
    [
        ([0, 5, 3], 3, 3),
        ([4, 1, 3], 1, 3),
        ([5, 0, 5], 0, 0),
        ([0, 4, 5], 1, 2),
    ],
)
def test_right_answers(targets, top1, top5):
    assert score_batch(0.5, LOGITS, torch.tensor(targets)) == Scores(0.5, 3, top1, top5)


def test_of_mixed_images_the_larger_share_is_right():
    targets = torch.tensor(
        [
            [0.7, 0.3, 0.0, 0.0, 0.0, 0.0],
            [0.4, 0.0, 0.0, 0.0, 0.0, 0.6],
            [0.9, 0.0, 0.0, 0.1, 0.0, 0.0],
        ]
    )
    assert score_batch(0.5, LOGITS, targets) == Scores(0.5, 3, 2, 3)


def test_with_fewer_than_five_classes_all_are_among_the_first_five():
    targets = torch.tensor([1, 1, 2])
    assert score_batch(0.5, LOGITS[:, :3], targets) == Scores(0.5, 3, 0, 3)


def test_scores_keep_no_graph():
    logits = LOGITS.clone().requires_grad_()
    scores = score_batch(0.5, logits, torch.tensor([0, 5, 3]))
    assert all(type(value) in (int, float) for value in dataclasses.astuple(scores))


def test_the_figures_of_scores():
    assert Scores(0.5, 8, 1, 6).figures() == {"loss": 0.5, "top1": 12.5, "top5": 75.0}


def make_evaluated(**parts):
    """A model with all that an evaluation could change, and a batch."""
    train_state = make_train_state(make_tiny_model(), 1, **parts)
    train_state.network.model.eval()
    return train_state, make_batches(1, side=16)[0]


def test_an_evaluation_changes_nothing():
    train_state, (images, targets) = make_evaluated()
    before, random_state = copy.deepcopy(train_state.network.model), torch.get_rng_state()
    (scores,), predicted, alike = train_state.evaluate((images, targets))
    assert_same_state(train_state.network.model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(weight.grad is None for weight in train_state.network.model.parameters())
    assert train_state.evaluate((images, targets))[0] == [scores]
    with torch.no_grad():
        logits = before(images)
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    assert predicted.tolist() == logits.argmax(1).tolist()
    assert scores.top1 == (predicted == targets).sum()
    exponentials = [[*map(math.exp, row)] for row in logits.tolist()]
    expected = [max(row) / sum(row) for row in exponentials]
    assert alike.tolist() == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_is_of_the_moving_average_if_there_is_one():
    """And of the model's own weights beside it."""
    train_state, batch = make_evaluated()
    (own,), *_ = train_state.evaluate(batch)
    train_state.average = MovingAverage(train_state.network.model, 0.9)
    assert train_state.evaluate(batch)[0] == [own, own]
    train_state.average.values["9.weight"].zero_()
    train_state.average.values["9.bias"].copy_(torch.arange(10.0))
    before = copy.deepcopy(train_state.average.values)
    (scores, raw), predicted, _ = train_state.evaluate(batch)
    assert predicted.tolist() == [9, 9, 9, 9]
    assert scores.loss != own.loss
    assert raw == own
    assert all(
        torch.equal(value, before[name]) for name, value in train_state.average.values.items()
    )


def test_an_evaluation_uses_the_buffers_of_the_moving_average():
    train_state, batch = make_evaluated()
    (own,), *_ = train_state.evaluate(batch)
    train_state.average = MovingAverage(train_state.network.model, 0.9)
    train_state.average.values["4.running_var"].fill_(100.0)
    (scores, raw), *_ = train_state.evaluate(batch)
    assert scores.loss != own.loss
    assert raw == own


def test_an_evaluation_measures_plain_cross_entropy():
    """Not the loss that is trained, which may be smoothed."""
    train_state, batch = make_evaluated()
    plain, *_ = train_state.evaluate(batch)
    train_state.network.loss = nn.CrossEntropyLoss(label_smoothing=0.5)
    assert train_state.evaluate(batch)[0] == plain


def test_an_evaluation_with_folded_norms():
    """Of the weights and buffers as they are when it begins; nothing of it stays."""
    train_state, batch = make_evaluated(fold_norm=True)
    train_state.average = MovingAverage(train_state.network.model, 0.9)
    train_state.average.values["4.running_var"].fill_(4.0)
    for _ in range(2):
        (average, own), predicted, _ = train_state.evaluate(batch)
        with train_state.folded_norms():
            kinds = [{type(each) for each in model.modules()} for model in train_state.folded]
            assert len(kinds) == 2
            assert all(nn.BatchNorm2d not in each for each in kinds)
            folded = train_state.evaluate(batch)
            assert train_state.evaluate(batch)[0] == folded[0], "to the bit"
        (folded_average, folded_own), folded_predicted, _ = folded
        assert folded_average.loss == pytest.approx(average.loss, rel=1e-5)
        assert folded_own.loss == pytest.approx(own.loss, rel=1e-5)
        assert own.loss != pytest.approx(average.loss, rel=1e-5)
        assert torch.equal(folded_predicted, predicted)
        assert train_state.evaluate(batch)[0] == [average, own]
        with torch.no_grad():  # another weight in the next round
            train_state.network.model[0].weight.mul_(1.5)
            train_state.average.values["0.weight"].mul_(0.5)


def test_without_the_option_the_models_themselves_are_evaluated():
    train_state, _ = make_evaluated()
    with train_state.folded_norms():
        assert list(train_state.evaluated()) == [train_state.network.model]
