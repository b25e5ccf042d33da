"""The verdict. Run: python -m pytest tests/compare/test_verdict.py"""

import dataclasses
import random
import statistics
from collections import Counter

import pytest
from rounds_made_up import make_round, make_way

from split_affinity.compare.verdict import compared_way, judge_rounds, judge_ways
from split_affinity.compare.ways import ROUNDS
from split_affinity.training.schedules import SCHEDULES


def make_rows(splits=1, ranks=False):
    names = ["plain", "plain bf16", "none", *SCHEDULES, *["ranks"] * ranks]
    rounds = [{name: make_round(1.0) for name in names}]
    flops = {"forward": 1.0, "backward": 1.0}
    rows = [compared_way(make_way(name), rounds, flops) for name in names]
    return rows + rows[3:] * (splits - 1)


@pytest.mark.parametrize(
    ("ratios", "judgement"),
    [
        ((0.8, 0.9, 0.9, 0.9, 0.95, 0.97, 0.99), "the split costs speed"),
        ((0.8, 0.9, 0.9, 0.9, 0.95, 0.97, 1.02), "the split costs speed"),
        ((0.8, 0.9, 0.9, 0.9, 0.95, 0.97, 1.04), "no difference beyond the noise"),
        ((0.8, 0.9, 0.9, 0.9, 0.95, 1.001, 1.002), "no difference beyond the noise"),
        ((0.8, 0.99, 1.2, 1.2, 1.2, 1.3, 1.3), "no difference beyond the noise"),
        ((0.998, 0.999, 1.2, 1.2, 1.2, 1.3, 1.3), "no difference beyond the noise"),
        ((0.96, 1.03, 1.2, 1.2, 1.2, 1.3, 1.3), "no difference beyond the noise"),
        ((0.98, 1.03, 1.2, 1.2, 1.2, 1.3, 1.3), "the split pays"),
        ((1.01, 1.03, 1.2, 1.2, 1.2, 1.3, 1.3), "the split pays"),
    ],
)
def test_the_verdict(ratios, judgement):
    rows = make_rows()
    rows[3:5] = (dataclasses.replace(row, to_none=0.5) for row in rows[3:5])
    rows[5] = dataclasses.replace(rows[5], to_none=ratios[3], to_none_rounds=ratios[::-1])
    text = judge_ways(rows)
    assert text.startswith(f"Verdict: {judgement}. The fastest schedule of the split, delayed, ")
    assert f"at {ratios[3]:.2f} of the speed of one lane" in text
    assert f"({ratios[0]:.2f} to {ratios[-1]:.2f} in 7 rounds)" in text
    assert "at 1.00 of that of a plain PyTorch loop with the best flags, plain bf16." in text
    advice = {
        "the split costs speed": "For speed alone, train with --split none.",
        "the split pays": "For speed alone, train with --split even --schedule delayed.",
        "no difference beyond the noise": "For speed alone, either will do.",
    }
    assert f"{advice[judgement]} Delayed has weights one update old." in text


def test_the_verdict_on_listed_cores():
    rounds = {"to_none": 1.2, "to_none_rounds": (1.2,) * 7, "split": "lists"}
    text = judge_ways([dataclasses.replace(row, **rounds) for row in make_rows()])
    assert "at 1.20 of the speed of one lane over all of these cores (1.20 to 1.20 in 7 " in text
    assert "For speed alone, train on these cores with --schedule " in text


def test_the_best_of_many_schedules_needs_all_rounds():
    ratios = (0.99, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1)
    assert judge_rounds(ratios, candidates=9) == "the split pays"
    assert judge_rounds(ratios, candidates=12) == "no difference beyond the noise"
    assert judge_rounds((1.01, *ratios[1:]), candidates=12) == "the split pays"


@pytest.mark.parametrize(
    ("best", "ratios", "said", "advice"),
    [
        (0.75, (0.97, 0.99, 1.0, 1.0, 1.0, 1.01, 1.02), True, "train with --split none"),
        (0.75, (0.8,) * 7, True, "train with --split none"),
        (0.75, (0.7,) * 7, False, "train with --split none"),
        (1.2, (1.1,) * 7, True, "train with --split even --schedule sequential"),
        (1.2, (1.1, 1.3, 1.3, 1.3, 1.4, 1.4, 1.4), True, "train with --split even --schedule sequ"),
        (1.2, (1.3,) * 7, True, "train in two ranks (torchrun --nproc-per-node 2, --split none)"),
        (0.75, (1.1,) * 7, True, "train in two ranks (torchrun --nproc-per-node 2, --split none)"),
    ],
)
def test_the_verdict_on_ranks_is_one_of_a_rival(best, ratios, said, advice):
    """They are no schedule of the split, whatever their speed."""
    rows = [dataclasses.replace(row, to_none_rounds=(1.0,) * 7) for row in make_rows(ranks=True)]
    rounds = {"to_none": best, "to_none_rounds": (best,) * 7}
    rows[3:6] = (dataclasses.replace(row, **rounds) for row in rows[3:6])
    rows[6] = dataclasses.replace(rows[6], to_none=ratios[3], to_none_rounds=ratios)
    text = judge_ways(rows)
    assert "The fastest schedule of the split, sequential, trains at" in text
    sentence = (
        f" Data parallelism on the same groups, ranks, trains at {ratios[3]:.2f} of one lane's "
        f"speed ({ratios[0]:.2f} to {ratios[-1]:.2f}). For speed alone, "
    )
    assert (sentence in text) == said
    assert f" For speed alone, {advice}" in text


def simulate(speeds, noise, comparisons=2000):
    """The share of each judgement among simulated comparisons.

    `speeds` are the true ones of the schedules, three of each split, relative to one lane. Each
    way's time in each round has noise of its own; ratios are taken within a round, so that those of
    a round have one lane's noise in common; and the fastest schedule is chosen afterwards, by its
    median.
    """
    others, rows = make_rows()[:3], make_rows(len(speeds) // 3)[3:]
    dice, judged = random.Random(f"{speeds} {noise}"), Counter()
    for _ in range(comparisons):
        none_s = [dice.gauss(1, noise) for _ in range(ROUNDS)]
        simulated = []
        for row, speed in zip(rows, speeds, strict=True):
            ratios = [speed * time_s / dice.gauss(1, noise) for time_s in none_s]
            median = statistics.median(ratios)
            simulated.append(dataclasses.replace(row, to_none=median, to_none_rounds=tuple(ratios)))
        judged[judge_ways([*others, *simulated]).split(".")[0]] += 1
    return {text.removeprefix("Verdict: "): count / comparisons for text, count in judged.items()}


@pytest.mark.parametrize("noise", [0.03, 0.1])
@pytest.mark.parametrize(
    "speeds",
    [(0.5, 0.6, 1.0), (0.5, 1.0, 1.0), *((1.0, 1.0, 1.0) * splits for splits in (1, 2, 3, 4, 5))],
)
def test_a_difference_that_is_none_is_seldom_found(speeds, noise):
    """The fastest schedule is as fast as one lane: that the split pays is as wrong as that it
    costs speed.
    """
    judged = simulate(speeds, noise)
    assert 1 - judged["no difference beyond the noise"] <= 0.05, judged


@pytest.mark.parametrize(
    ("speeds", "judgement"),
    [
        ((0.5, 0.6, 1.1), "the split pays"),
        ((1.1, 1.1, 1.1), "the split pays"),
        ((0.5, 0.6, 0.9), "the split costs speed"),
        ((0.9, 0.9, 0.9), "the split costs speed"),
    ],
)
def test_a_difference_of_a_tenth_is_nearly_always_found(speeds, judgement):
    assert simulate(speeds, 0.03)[judgement] >= 0.97
