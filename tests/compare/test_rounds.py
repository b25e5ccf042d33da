"""Rounds, their length, and those that others disturbed.

Run: python -m pytest tests/compare/test_rounds.py
"""

import dataclasses
import itertools
import time

import pytest
from patching import set_everywhere
from records import record
from rounds_made_up import by_round, disturbed, make_round, make_way

from split_affinity.compare.report import disturbance_lines
from split_affinity.compare.rounds import describe_course, rounds_used, run_rounds, with_phases
from split_affinity.compare.ways import all_ways, steps_in_round
from split_affinity.machine.plan import PhaseTimes
from split_affinity.machine.topology import read_topology
from split_affinity.options.commands import parse_arguments
from split_affinity.options.settings import Settings
from split_affinity.training.steps import StepResult


@pytest.mark.parametrize(
    ("asked", "shortest_s", "steps"),
    [(None, 3.0, 1), (None, 0.5, 4), (None, 0.001, 32), (1, 0.001, 1), (8, 9.0, 2)],
)
def test_how_many_steps_a_round_has(asked, shortest_s, steps):
    assert steps_in_round(asked, shortest_s) == steps
    assert steps_in_round(asked) >= steps, "what loaders are prepared for"


def test_phases_are_timed_where_batches_are_not_those_of_sequential():
    settings = Settings(batch_size=32, precision="bf16", num_classes=3, image_size=32)
    for accumulate, timed in ((8, []), (1, ["overlap"])):
        asked = dataclasses.replace(settings, accumulate=accumulate)
        ways = all_ways(asked, read_topology())
        assert len(ways) == 7
        assert [way.name for way in ways if way.times_phases] == timed


def test_phases_without_company_are_those_of_sequential():
    alone = PhaseTimes(1.0, 2.0, 0.5, 0.0)
    others = {
        "sequential 1:2": dataclasses.replace(make_round(1.0), phase_times_alone=alone),
        "sequential": make_round(1.0),
    }
    bare = dataclasses.replace(make_round(1.0), phase_times_alone=None)
    steps = (StepResult(1, 1.0, 8, 1.0, (*bare.steps[0].records, record("refresh", 2, 0.25))),)
    way = dataclasses.replace(make_way("delayed"), name="delayed 1:2")
    found = with_phases(way, dataclasses.replace(bare, steps=steps), others)
    assert found.phase_times_alone == PhaseTimes(1.0, 2.0, 0.5, 0.25)
    assert with_phases(make_way("plain bf16"), bare, others) is bare
    own = make_round(2.0)
    assert with_phases(make_way("overlap"), own, others) is own
    assert with_phases(make_way("ranks"), bare, others) is bare


@pytest.mark.parametrize(
    ("asked", "seconds", "text"),
    [
        ("", 1000, "about 17 minutes: 7 rounds of 7 ways, 128 images a step, 1 step of each in a "),
        ("--steps 14", 89, "about 89 seconds: 7 rounds of 7 ways, 128 images a step, 2 steps of "),
        (
            "--quick",
            1000,
            "about 17 minutes: 7 rounds of 7 ways, 32 images a step, 1 step of each ",
        ),
    ],
)
def test_how_long_a_comparison_takes_is_said_beforehand(asked, seconds, text):
    _, settings = parse_arguments(["compare", *asked.split()])
    said = describe_course(settings, 7, steps_in_round(settings.steps, 9.0), seconds)
    assert said.startswith(text)
    assert said.endswith("; --quick is shorter") == (asked == "")


class FakeWays:
    """Ways to train whose rounds are known; counts them."""

    def __init__(self, shares):
        self.orders, self.shares = [], [0.0, *shares]

    def __getitem__(self, way):
        return self

    def send(self, order):
        self.orders.append(order)
        share = self.shares[order.number] if order.number < len(self.shares) else 0.0
        return disturbed(make_round(1.0), share)


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
    set_everywhere(monkeypatch, "measure_way", FakeWays.send)
    ways = [make_way(name, Settings(batch_size=4, accumulate=2)) for name in ("none", "overlap")]
    rounds = run_rounds(ways, (0, 1, 2))
    assert [list(each) for each in rounds] == [["none", "overlap"]] * count
    assert [index + 1 for index in rounds_used(rounds)] == list(used)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("disturbed: other processes took") == sum(share >= 0.1 for share in shares)
    assert printed.count(", a repetition, images/s: none ") == count - 7


def test_the_words_for_disturbed_rounds():
    clean = make_round(1.0)
    by_host = disturbed(clean, 0.2, stolen=0.3)
    rounds = {"none": [clean] * 9, "delayed": [*[clean] * 7, disturbed(clean, 0.25), by_host]}
    assert list(disturbance_lines(by_round(rounds))) == [
        "round 8 was disturbed: other processes took 25% of the forward cores (delayed); left out",
        "round 9 was disturbed: the hypervisor took 30% (delayed); left out",
    ]
    rounds = {way: each[3:] for way, each in rounds.items()}
    kept = "kept, for want of an undisturbed one"
    assert [line.rpartition("; ")[2] for line in disturbance_lines(by_round(rounds))] == [
        kept,
        kept,
    ]


def test_all_rounds_have_whole_steps_as_many_as_take_a_while(monkeypatch, capsys):
    """Steps take 2 s, the first round 30 s by the clock: a round of three steps takes 38 s."""
    fakes, clock = FakeWays([]), itertools.count(0.0, 30.0)
    set_everywhere(monkeypatch, "start_ways", lambda *args: fakes)
    set_everywhere(monkeypatch, "measure_way", FakeWays.send)
    set_everywhere(monkeypatch, "LEAST_STEPS_S", 5.0)
    monkeypatch.setattr(time, "perf_counter", clock.__next__)
    run_rounds([make_way(name) for name in ("plain", "none")], (0,))
    assert [(order.number, order.steps) for order in fakes.orders] == [
        (0, 1),
        (0, 1),
        *[(number, 3) for number in range(1, 8) for _ in range(2)],
    ]
    course = " ".join(capsys.readouterr().out.split())
    assert course.startswith("about 4 minutes: 7 rounds of 2 ways, 8 images a step, 3 steps of ")
