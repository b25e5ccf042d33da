"""Comparison. Run: python -m pytest tests/test_comparison.py"""

import dataclasses
import json
import random
import statistics
from collections import Counter

import machines
import pytest
import torch
from conftest import needs_two_cpus
from records import PLAN, record
from torch import nn

import train_split_affinity as tsa
from train_split_affinity import PhaseTimes, Settings


@pytest.mark.parametrize(
    ("batch", "parts"), [(32, 4), (8, 4), (4, 2), (2, 2), (6, 2), (9, 3), (7, 7)]
)
def test_micro_batches(batch, parts):
    assert tsa.micro_batches(batch) == parts


def test_one_image_cannot_be_divided():
    with pytest.raises(tsa.UserError, match="--batch-size 1: overlap needs"):
        tsa.micro_batches(1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_ways_have_the_same_images_in_a_step(accumulate):
    settings = Settings(batch_size=32, accumulate=accumulate, split="1:2")
    chosen = {way: tsa.way_settings(settings, way) for way in tsa.WAYS}
    for way, each in chosen.items():
        assert each.batch_size * each.accumulate == 32 * accumulate
        assert each.split == ("none" if way in ("plain", "none") else "1:2")
        assert each.schedule == (way if way in tsa.SCHEDULES else "sequential")
        assert not list(tsa.contradictions("compare", each))
    assert chosen["overlap"].accumulate == (4 if accumulate == 1 else 3)


def test_the_images_of_a_comparison_may_be_mixed(photos):
    settings = Settings(
        data_path=photos,
        num_classes=2,
        image_size=32,
        batch_size=2,
        accumulate=3,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
    )
    whole = tsa.load_steps(settings, 3)
    assert [images.shape for images, _ in whole] == [(6, 3, 32, 32)] * 3
    for _, targets in whole:
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 6)
    assert whole[0] is whole[2], "an epoch has two steps: they are taken again"


def make_round(step_s, forward_s=0.25, backward_s=0.5, rates=None):
    records = (record("forward", 0, forward_s), record("backward", 1, backward_s))
    steps = tuple(tsa.StepResult(n, 1.0, 8, step_s * n, records) for n in (1, 2, 3))
    rates = rates or {"forward": 100.0, "backward": 200.0}
    alone = PhaseTimes(forward_s, backward_s, 0.125, 0.0)
    return tsa.Round(steps, {"forward": 0.5, "backward": 0.9}, alone, rates, 2**30)


def test_the_figures_of_a_way():
    rounds = {
        "plain": [make_round(4.0), make_round(4.0), make_round(4.0)],
        "none": [make_round(1.0), make_round(2.0), make_round(0.5)],
        "delayed": [make_round(2.0), make_round(2.0), make_round(2.0)],
    }
    settings = Settings(schedule="delayed", batch_size=4, accumulate=2)
    flops = {"forward": 10.0, "backward": 30.0}
    row = tsa.compared_way("delayed", rounds, settings, PLAN, flops)
    assert (row.cores, row.batches) == ("0 + 1-2", "2 x 4")
    assert row.images_per_s == pytest.approx(8 / 4), "the median of steps of 2, 4 and 6 s"
    assert row.to_none == pytest.approx(0.5)
    assert row.to_none_rounds == pytest.approx((0.5, 1.0, 0.25))
    assert row.to_plain == pytest.approx(2)
    assert row.bound_images_per_s == pytest.approx(8 / 1.125)
    assert row.bound_share == pytest.approx(1.125 / 4)
    assert row.gflops == pytest.approx(40 * 2 / 1e9)
    assert row.matrix_share["forward"] == pytest.approx(10 * 8 / 0.25 / 100)
    assert row.matrix_share["backward"] == pytest.approx(30 * 8 / 0.5 / 200)
    one_lane = {"none": [make_round(1.0, rates={"all": 1000.0})], "plain": [make_round(2.0)]}
    row = tsa.compared_way("none", one_lane, settings, PLAN, flops)
    assert row.matrix_share == pytest.approx({"all": 40 * 8 / 2 / 1000})


def test_how_busy_the_plain_loop_is_by_physical_cores(tmp_path, monkeypatch):
    root = machines.write_machine(tmp_path, machines.SMT_FAR)
    topology = tsa.read_topology(root, frozenset(range(8)))
    step = tsa.StepResult(0, 1.0, 2, step_s=0.5, records=(), main_thread_s=2.0)
    monkeypatch.setattr(tsa, "build_model", lambda *shape: nn.Linear(1, 1))
    monkeypatch.setattr(tsa, "time_plain_step", lambda *args: step)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    rounds = tsa.plain_rounds(Settings(), topology, [()])
    next(rounds)
    assert rounds.send(tsa.Order(0, 2, keep_memory=True)).busy == {"all": 1.0}


def make_rows():
    rounds = {way: [make_round(1.0)] for way in ("plain", "none", *tsa.SCHEDULES)}
    settings, flops = Settings(batch_size=8), {"forward": 1.0, "backward": 1.0}
    return [tsa.compared_way(way, rounds, settings, PLAN, flops) for way in rounds]


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
    rows[2:4] = (dataclasses.replace(row, to_none=0.5) for row in rows[2:4])
    rows[4] = dataclasses.replace(rows[4], to_none=ratios[3], to_none_rounds=ratios[::-1])
    text = tsa.verdict(rows)
    assert text.startswith(f"Verdict: {judgement}. The fastest schedule of the split, delayed, ")
    assert f"at {ratios[3]:.2f} of the speed of one lane" in text
    assert f"({ratios[0]:.2f} to {ratios[-1]:.2f} in 7 rounds)" in text


def simulate(speeds, noise, comparisons=2000):
    """The share of each judgement among simulated comparisons.

    `speeds` are the true ones of the three schedules relative to one lane. Each way's time in each
    round has noise of its own; ratios are taken within a round, so that those of a round have one
    lane's noise in common; and the fastest schedule is chosen afterwards, by its median.
    """
    dice, rows, judged = random.Random(f"{speeds} {noise}"), make_rows()[2:], Counter()
    for _ in range(comparisons):
        none_s = [dice.gauss(1, noise) for _ in range(tsa.ROUNDS)]
        simulated = []
        for row, speed in zip(rows, speeds, strict=True):
            ratios = [speed * time_s / dice.gauss(1, noise) for time_s in none_s]
            median = statistics.median(ratios)
            simulated.append(dataclasses.replace(row, to_none=median, to_none_rounds=tuple(ratios)))
        judged[tsa.verdict(simulated).split(".")[0]] += 1
    return {text.removeprefix("Verdict: "): count / comparisons for text, count in judged.items()}


@pytest.mark.parametrize("noise", [0.03, 0.1])
@pytest.mark.parametrize("speeds", [(0.5, 0.6, 1.0), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0)])
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


@needs_two_cpus
def test_a_comparison(in_tmp, capfd, monkeypatch):
    monkeypatch.setattr(tsa, "ROUNDS", 2)
    arguments = "--model resnet18 --image-size 32 -b 4 --num-classes 5 --steps 1".split()
    places = ["--json", "c.json", "--output-dir", "out"]
    assert tsa.main(["compare", *arguments, *places]) == 0
    printed = capfd.readouterr().out
    figures = json.loads((in_tmp / "c.json").read_text())
    assert [row["way"] for row in figures["ways"]] == list(tsa.WAYS)
    none = figures["ways"][1]
    for row in figures["ways"]:
        low, high = row["images_per_s_range"]
        assert 0 < low <= row["images_per_s"] <= high
        assert row["stray_s"] == 0
        assert row["peak_memory_bytes"] > 2**27
        assert (row["bound_share"] is None) == (row["way"] == "plain")
        assert row["way"] in printed
    assert none["to_none"] == 1
    assert set(none["matrix_share"]) == {"all"}
    assert set(figures["ways"][-1]["matrix_share"]) == {"forward", "backward"}
    assert figures["verdict"] in printed
    assert printed.count("images/s: plain") == tsa.ROUNDS
    assert (in_tmp / "out/timeline.png").stat().st_size > 10_000
    assert not (in_tmp / "logs.md").exists()


@pytest.mark.parametrize("option", [["--split", "none"], ["--schedule", "delayed"]])
def test_compare_chooses_schedules_itself(in_tmp, capsys, option):
    assert tsa.main(["compare", *option]) == 2
    assert f"{' '.join(option)}: compare runs every schedule" in capsys.readouterr().err


def test_a_recipe_can_be_compared(tmp_path):
    _, settings = tsa.parse_arguments(["compare", "--recipe", "cifar10", "--model", "resnet18"])
    measured = tsa.measured_settings(settings, tsa.read_topology())
    assert (measured.epochs, measured.num_classes, measured.image_size) == (None, 1000, 224)
