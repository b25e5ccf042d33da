"""Rounds that are made up."""

import dataclasses

from records import PLAN, record

from split_affinity.compare.loops import WayRound
from split_affinity.compare.ways import Way, plan_of_ranks
from split_affinity.lanes.contention import Contention
from split_affinity.machine.plan import PhaseTimes
from split_affinity.options.settings import Settings
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.steps import StepResult


def make_round(step_s, forward_s=0.25, backward_s=0.5, rates=None):
    records = (record("forward", 0, forward_s), record("backward", 1, backward_s))
    steps = tuple(StepResult(n, 1.0, 8, step_s * n, records) for n in (1, 2, 3))
    rates = rates or {"forward": 100.0, "backward": 200.0}
    alone = PhaseTimes(forward_s, backward_s, 0.125, 0.0)
    return WayRound(steps, {"forward": 0.5, "backward": 0.9}, alone, rates, 2**30)


def by_round(rounds_of_ways):
    """Lists of rounds, by way, as rounds with all ways in them."""
    each_round = zip(*rounds_of_ways.values(), strict=True)
    return [dict(zip(rounds_of_ways, each, strict=True)) for each in each_round]


def make_way(name, settings=None):
    settings = settings or Settings(batch_size=4, accumulate=2)
    schedule = name if name in SCHEDULES else "sequential"
    split = "even" if name in (*SCHEDULES, "ranks") else "none"
    ranks = 2 if name == "ranks" else 1
    settings = dataclasses.replace(settings, schedule=schedule, split=split, ranks=ranks)
    return Way(name, settings, PLAN if ranks == 1 else plan_of_ranks(PLAN))


def disturbed(each, share, stolen=0.0):
    contention = Contention(0.0, 1.0, {"forward": share, "backward": 0.0}, stolen)
    steps = (dataclasses.replace(each.steps[0], contention=contention), *each.steps[1:])
    return dataclasses.replace(each, steps=steps)
