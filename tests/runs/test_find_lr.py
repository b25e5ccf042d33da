"""The range test of the learning rate. Run: python -m pytest tests/runs/test_find_lr.py"""

import copy
import dataclasses
import itertools
import math
import random

import pytest
import torch
from small_runs import ALL_SCHEDULES, TINY, interrupt, with_plan

from split_affinity.errors import RunError, Stopped
from split_affinity.reports.plots import RangeTest
from split_affinity.runs.find_lr import judge_rates, range_test
from split_affinity.training.network import NonFiniteLoss, Scores
from split_affinity.training.schedules import SCHEDULES
from train_split_affinity import set_up

# The range test


@ALL_SCHEDULES
def test_a_range_test_leaves_the_model_and_the_disk_alone(in_tmp, epochs, schedule):
    asked = {"split": "even", "schedule": schedule, "accumulate": 2, "batch_size": 2, "steps": 8}
    settings = dataclasses.replace(TINY, **epochs | asked)
    with with_plan(set_up, settings) as run, run.stop:
        before = copy.deepcopy(run.train_state.network.model)
        result = range_test(run)
        for name, value in run.train_state.network.model.state_dict().items():
            assert torch.equal(value, before.state_dict()[name]), name
    assert result.rates[:3] == pytest.approx((1e-6, 1e-5, 1e-4))
    assert len(result.losses) == len(result.rates) <= 8
    assert not list(in_tmp.iterdir())


def say_losses(monkeypatch, *losses):
    """Training steps with these losses, but for the last one, which is not finite."""

    def script(lanes, train_state, batches):
        for loss in losses:
            train_state.optimizer.step()
            train_state.scheduler.step()
            yield [Scores(loss, 4, 0, 0)]
        raise NonFiniteLoss("nan")

    monkeypatch.setitem(SCHEDULES, "sequential", script)


def find_lr(**settings):
    chosen = dataclasses.replace(TINY, **{"split": "none"} | settings)
    with with_plan(set_up, chosen) as run, run.stop:
        return range_test(run)


def test_a_range_test_ends_once_the_loss_has_exploded(monkeypatch):
    """Four steps to a decade. The rate rises for good between 0.1 and 0.178."""
    fall = 2.0, 1.6, 1.2, 0.9, 0.7, 0.7, 0.7
    say_losses(monkeypatch, *[2.3] * 14, *fall, 3.0, 9.0, 30.0, 0.1, 0.1, 0.1)
    result = find_lr(steps=29)
    assert result.rates == pytest.approx([10 ** (step / 4 - 6) for step in range(23)])
    smoothed = *[2.3] * 14, 2.0, 1.6, 1.2, 0.9, 0.7, 0.7, 0.7, 3.0, 6.0
    assert result.losses == pytest.approx(smoothed), "medians of three"
    assert result.suggestion == pytest.approx(math.sqrt(0.01 * 0.0178), rel=1e-3)


def test_a_range_test_ends_where_the_loss_is_not_finite(monkeypatch):
    say_losses(monkeypatch, *[2.3] * 10, 2.0, 1.5, 1.0)
    result = find_lr(steps=29)
    assert result.losses[-4:] == pytest.approx((2.3, 2.0, 1.5, 1.25))
    assert result.rates[-1] == pytest.approx(1e-3)
    assert result.suggestion == pytest.approx(1e-4)


def test_a_range_test_has_a_hundred_steps_up_to_a_rate_of_10(monkeypatch):
    say_losses(monkeypatch, *[1.0] * 100)
    result = find_lr(steps=None)
    assert len(result.rates) == 100
    assert result.rates[-1] == pytest.approx(10)
    assert result.rates[33] == pytest.approx(2.1544e-4, rel=1e-3), "a third of the way, by powers"
    assert result.suggestion is None


# Courses of the loss: corners (power of ten of the rate, loss) with straight lines between them.
COURSES = {
    "valley": [(-6, 2.3), (-4, 2.3), (-2, 0.6), (-1.5, 0.5), (-1, 4), (1, 40)],
    "wide valley": [(-6, 2.3), (-4.5, 2.3), (-4, 0.5), (-1, 0.5), (-0.5, 6), (1, 9)],
    "second valley": [(-6, 2.3), (-4, 2.3), (-2.5, 1), (-1.5, 0.9), (-1.2, 7), (-0.7, 7)]
    + [(-0.3, 0.5), (0.4, 0.5), (0.7, 9), (1, 9)],
    "only falling": [(-6, 2.3), (-4, 2.2), (1, 0.3)],
    # ResNet-56 on the digits
    "small fall": [(-6, 2.75), (-5, 2.72), (-3.7, 2.33), (-2, 2.31), (-1.4, 3.1), (-1.1, 2.9)]
    + [(-0.3, 2.2), (0.1, 2.25), (0.7, 3.4), (1, 4)],
    "flat": [(-6, 2.3), (1, 2.3)],
    "flat, then exploding": [(-6, 2.3), (-1, 2.3), (0, 30), (1, 90)],
    "exploding at once": [(-6, 2.3), (-5.5, 5), (1, 90)],
    "a valley after an explosion": [(-6, 2.3), (-2, 2.3), (-1.7, 8), (-1, 8), (-0.7, 0.5)]
    + [(0.4, 0.5), (0.7, 9), (1, 9)],
}


def range_test_of(course, steps, noise=0.0, seed=0):
    """The rates and losses of a range test over a course, with noise relative to the loss."""
    dice = random.Random(f"{course} {steps} {noise} {seed}")
    rates, losses = [10 ** (7 * step / (steps - 1) - 6) for step in range(steps)], []
    for rate in rates:
        at = min(math.log10(rate), 1 - 1e-9)
        (x, y), (x_next, y_next) = next(
            pair for pair in itertools.pairwise(COURSES[course]) if at < pair[1][0]
        )
        loss = y + (y_next - y) * (at - x) / (x_next - x)
        losses.append(loss * dice.gauss(1, noise))
    return rates, losses


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("steps", [30, 100, 300])
@pytest.mark.parametrize(
    ("course", "suggestion"),
    [("valley", 0.004), ("wide valley", 0.012), ("second valley", 0.0036), ("only falling", 1.0)],
)
def test_a_suggestion_depends_neither_on_the_steps_nor_on_chance(course, suggestion, steps, noise):
    results = [judge_rates(*range_test_of(course, steps, noise, n)) for n in range(20)]
    found = [result.suggestion for result in results if result.suggestion]
    assert len(found) >= (15 if noise == 0.1 else 20), "with much noise it may be none"
    assert suggestion / 1.5 < min(found)
    assert max(found) < suggestion * 1.5


@pytest.mark.parametrize(
    ("steps", "noise", "tells"), [(30, 0.1, 0), (100, 0.03, 8), (300, 0.05, 8)]
)
def test_a_loss_that_hardly_falls_is_told_from_chance(steps, noise, tells):
    """And the second valley, which is lower than the first, is never taken."""
    results = [judge_rates(*range_test_of("small fall", steps, noise, n)) for n in range(8)]
    found = [result.suggestion for result in results if result.suggestion]
    assert len(found) == tells
    assert all(0.0016 / 1.5 < rate < 0.0016 * 1.5 for rate in found), found


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("steps", [30, 100, 300])
@pytest.mark.parametrize(
    "course", ["flat", "flat, then exploding", "exploding at once", "a valley after an explosion"]
)
def test_nothing_is_suggested_rather_than_guessed(course, steps, noise):
    results = [judge_rates(*range_test_of(course, steps, noise, n)) for n in range(20)]
    guessed = [result.suggestion for result in results if result.suggestion]
    assert len(guessed) <= (noise == 0.1), guessed
    assert {len(result.losses) for result in results} == {steps}


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_few_steps_tell_nothing(steps):
    losses = [2.3, 1.0, 0.5, 0.4, 0.4, 3.0, 9.0, 9.0][:steps]
    rates = [1e-6 * 10**step for step in range(steps)]
    assert judge_rates(rates, losses) == RangeTest(tuple(rates), tuple(losses), None)


@pytest.mark.parametrize("steps", [29, 85, 281])
def test_a_loss_is_smoothed_over_half_a_decade_of_rates(steps):
    """Whatever the steps: a spike of less than half of that is gone, an edge stays where it is."""
    rates = [10 ** (7 * step / (steps - 1) - 6) for step in range(steps)]
    spike, edge = rates[steps // 4], rates[steps // 2]
    losses = [50.0 if rate == spike else 2.0 if rate < edge else 1.0 for rate in rates]
    smoothed = judge_rates(rates, losses).losses
    assert smoothed == tuple(2.0 if rate < edge else 1.0 for rate in rates)
    narrow = [2.0 if abs(math.log10(rate / spike)) > 0.11 else 50.0 for rate in rates]
    assert set(judge_rates(rates, narrow).losses) == {2.0}
    wide = [2.0 if abs(math.log10(rate / spike)) > 0.26 else 50.0 for rate in rates]
    assert 50.0 in judge_rates(rates, wide).losses


def test_a_range_test_without_any_finite_loss(monkeypatch):
    say_losses(monkeypatch)
    with pytest.raises(RunError, match="find-lr: the loss is not finite even in the first"):
        find_lr(steps=8)


def test_a_signal_ends_a_range_test(in_tmp, monkeypatch, epochs):
    interrupt(monkeypatch, "backward", 2)
    with pytest.raises(Stopped):
        find_lr(**epochs)
    assert not list(in_tmp.iterdir())
