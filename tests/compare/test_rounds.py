"""Rounds, their length, and those that others disturbed.

Run: python -m pytest tests/compare/test_rounds.py
"""

import dataclasses
import math

import pytest
from patching import set_everywhere
from records import record
from rounds_made_up import disturbed, make_round, make_way

from split_affinity.compare.report import disturbance_lines
from split_affinity.compare.rounds import (
    Pace,
    choose_batches,
    choose_steps,
    find_pace,
    rounds_used,
    run_rounds,
    with_phases,
)
from split_affinity.compare.ways import all_ways
from split_affinity.machine.plan import PhaseTimes
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings
from split_affinity.training.steps import StepResult


def make_pace(rest_s, step_s, strict=True):
    return Pace(rest_s, step_s, batches=8, strict=strict)


@pytest.mark.parametrize(
    ("round_s", "batches"),
    [
        (math.inf, (8, 8, 8, 8)),
        (58, (8, 8, 8, 8)),
        (57, (7, 8, 8, 8)),
        (44, (2, 5, 8, 8)),
        (32, (1, 1, 8, 8)),
        (1, (1, 1, 8, 8)),
    ],
)
def test_what_of_a_step_is_measured_in_limited_time(round_s, batches):
    """Only where batches come one after the other, a part of the step will do."""
    paces = {
        "plain": make_pace(1, 16.0),
        "none": make_pace(1, 8.0),
        "overlap": make_pace(3, 10.0, strict=False),
        "delayed": make_pace(3, 16.0, strict=False),
    }
    assert tuple(choose_batches(paces, 1, round_s).values()) == batches


@pytest.mark.parametrize(
    ("asked", "shortest_s", "steps"),
    [(None, 3.0, 1), (None, 0.5, 4), (None, 0.001, 32), (1, 0.001, 1), (8, 9.0, 2)],
)
def test_how_many_steps_a_round_has(asked, shortest_s, steps):
    assert choose_steps(asked, [make_pace(1, 9.0), make_pace(1, shortest_s)]) == steps


def test_every_way_leaves_a_batch_out():
    settings = Settings(batch_size=32, precision="bf16", num_classes=3, image_size=32)
    for accumulate, left_out in ((8, [1] * 7), (1, [1, 1, 1, 1, 2, 1, 1])):
        asked = dataclasses.replace(settings, accumulate=accumulate)
        assert [way.warmup for way in all_ways(asked, read_topology())] == left_out


def test_phases_without_company_are_those_of_sequential():
    alone = PhaseTimes(1.0, 2.0, 0.5, 0.0)
    others = {
        "sequential 1:2": dataclasses.replace(make_round(1.0), alone=alone),
        "sequential": make_round(1.0),
    }
    bare = dataclasses.replace(make_round(1.0), alone=None)
    steps = (StepResult(1, 1.0, 8, 1.0, (*bare.steps[0].records, record("refresh", 2, 0.25))),)
    way = dataclasses.replace(make_way("delayed"), name="delayed 1:2")
    found = with_phases(way, dataclasses.replace(bare, steps=steps), others)
    assert found.alone == PhaseTimes(1.0, 2.0, 0.5, 0.25)
    assert with_phases(make_way("plain bf16"), bare, others) is bare
    own = make_round(2.0)
    assert with_phases(make_way("overlap"), own, others) is own
    assert with_phases(make_way("ranks"), bare, others) is bare


def test_the_pace_of_a_way_by_its_first_round():
    part = {"update_s": 0.25, "share": 0.125}
    first = dataclasses.replace(make_round(0.5), steps=make_round(0.5).steps[:1], **part)
    settings = Settings(batch_size=8, accumulate=8)
    pace = find_pace(make_way("none", settings), first, turn_s=3.0)
    assert pace == Pace(2.5, 8 * 0.25 + 0.25, 8, strict=True)
    pace = find_pace(make_way("plain", settings), first, turn_s=3.0)
    assert pace.rest_s == 2.5, "a plain loop leaves a batch out, too"
    # Forward 0.25, backward 0.5, update 0.125: two batches take 1.375 s if overlapped, eight 4.375.
    first = dataclasses.replace(first, steps=make_round(2.75).steps[:1], share=0.25)
    pace = find_pace(make_way("overlap", settings), first, turn_s=7.5)
    assert pace == Pace(4.75, 2 * 4.375, 8, strict=False)


class FakeWays:
    """Ways to train whose rounds are known; counts them."""

    def __init__(self, shares):
        self.orders, self.shares = [], [0.0, *shares]

    def __getitem__(self, way):
        return self

    def send(self, order):
        self.orders.append(order)
        each = dataclasses.replace(make_round(1.0), share=order.batches / 2)
        share = self.shares[order.number] if order.number < len(self.shares) else 0.0
        return disturbed(each, share)


@pytest.mark.parametrize(
    ("shares", "count", "used"),
    [
        ([], 7, (1, 2, 3, 4, 5, 6, 7)),
        ([0.09] * 7, 7, (1, 2, 3, 4, 5, 6, 7)),
        ([0, 0.1, 0, 0.4], 9, (1, 3, 5, 6, 7, 8, 9)),
        ([0.3] * 3, 10, (4, 5, 6, 7, 8, 9, 10)),
        ([0.3, 0.2, 0.5, 0.9], 10, (2, 5, 6, 7, 8, 9, 10)),
        ([0.5] * 6 + [0.4] * 4, 10, (1, 2, 3, 7, 8, 9, 10)),
    ],
)
def test_disturbed_rounds_are_repeated_and_left_out(shares, count, used, monkeypatch, capsys):
    fakes = FakeWays(shares)
    set_everywhere(monkeypatch, "start_ways", lambda *args: fakes)
    set_everywhere(monkeypatch, "measure", FakeWays.send)
    ways = [make_way(name, Settings(batch_size=4, accumulate=2)) for name in ("none", "overlap")]
    rounds = run_rounds(ways, (0, 1, 2), 0.0, drawn=False)
    assert {way: len(each) for way, each in rounds.items()} == {"none": count, "overlap": count}
    assert [index + 1 for index in rounds_used(rounds)] == list(used)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("disturbed: other processes took") == sum(share >= 0.1 for share in shares)
    assert printed.count(", a repetition, images/s: none ") == count - 7


def test_the_words_for_disturbed_rounds():
    clean = make_round(1.0)
    by_host = disturbed(clean, 0.2, stolen=0.3)
    rounds = {"none": [clean] * 9, "delayed": [*[clean] * 7, disturbed(clean, 0.25), by_host]}
    assert list(disturbance_lines(rounds)) == [
        "round 8 was disturbed: other processes took 25% of the forward cores (delayed); left out",
        "round 9 was disturbed: the hypervisor took 30% (delayed); left out",
    ]
    rounds = {way: each[3:] for way, each in rounds.items()}
    kept = "kept, for want of an undisturbed one"
    assert [line.rpartition("; ")[2] for line in disturbance_lines(rounds)] == [kept, kept]


def test_the_last_round_is_whole_for_the_picture(monkeypatch, capsys):
    fakes = FakeWays([])
    set_everywhere(monkeypatch, "start_ways", lambda *args: fakes)
    set_everywhere(monkeypatch, "measure", FakeWays.send)
    set_everywhere(monkeypatch, "TIME_LIMIT_S", 0)
    run_rounds([make_way(name) for name in ("plain", "none")], (0,), 0.0, drawn=True)
    assert [order.batches for order in fakes.orders] == [1, 1] * 7 + [1, 2]
    assert "a part is measured: plain 1 of 2, none 1 of 2 batches" in " ".join(
        capsys.readouterr().out.split()
    )
