"""A sweep over the ratios of a machine's cores: phases alone, then all ways, ratio by ratio.

Of each ratio only its own ways live at once, beside `none` and a plain loop in the same rounds. So
ratios are compared by their speeds relative to `none`. The best bound comes first: what it reaches
rules others out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from statistics import median

from split_affinity.compare.curve import Out, Sweep, swept_ways
from split_affinity.compare.loops import ByLane
from split_affinity.compare.ratios import (
    Bound,
    Ratio,
    Timed,
    all_ratios,
    even_ratio,
    group_sizes,
    is_ruled_out,
    median_times,
    thinned_ratios,
    way_bound,
    way_bound_s,
)
from split_affinity.compare.report import split_lines
from split_affinity.compare.rounds import rounds_used, run_rounds
from split_affinity.compare.verdict import (
    Comparison,
)
from split_affinity.compare.ways import ROUNDS, Way, all_ways, steps_in_round
from split_affinity.errors import UserError
from split_affinity.machine.description import read_machine
from split_affinity.machine.plan import check_core_options, usable_cores
from split_affinity.machine.topology import Topology
from split_affinity.options.settings import Settings
from split_affinity.runs.measurement import group_of_size, times_on_groups
from split_affinity.runs.setup import check_place
from split_affinity.terminal import say, say_lines
from split_affinity.text import plural, span_text

PHASE_ROUNDS = 7  # in which phases are timed alone
START_S = 5.0  # of a process, about
BEYOND_BOUNDS = 1.2  # how much longer ways take than their bounds say, about


def check_sweep(settings: Settings, topology: Topology) -> Topology | None:
    """The machine to simulate, if there is one; raises UserError for what cannot be swept."""
    check_core_options(topology, settings)
    check_place("--csv", settings.csv)
    if len(usable_cores(topology)) < 2:
        raise UserError(
            f"--split {settings.split}: one core has no ratio of whole cores; compare without it "
            "takes the core's hardware threads"
        )
    if not settings.simulate:
        return None
    machine = read_machine(settings.simulate, "--simulate")
    reason = ""
    if not machine.has_affinity:
        reason = "its system cannot keep threads on cores"
    elif len(usable_cores(machine)) < 2:
        reason = "one core, which has no ratio of whole cores"
    if reason:
        raise UserError(f"--simulate {settings.simulate}: {reason}")
    return machine


def sweep(
    asked: Settings,
    settings: Settings,
    topology: Topology,
    machine: Topology | None,
    flops: ByLane,
) -> Sweep:
    """Time phases alone, then run the ways, ratio by ratio; to simulate, the even ratio alone."""
    begun_s, cores = time.perf_counter(), len(usable_cores(topology))
    ratios = [even_ratio(cores)] if machine else thinned_ratios(cores)
    say_lines([describe_ratios(ratios, cores, machine)])
    ways = swept_ways(settings)
    timed = time_phases_alone(settings, ways, topology, group_sizes(ratios, cores))
    bounds = {
        (name, ratio): way_bound(way, ways["none"], ratio, timed)
        for ratio in ratios
        for name, way in ways.items()
        if name != "none"
    }
    ordered = best_first(ratios, bounds)
    expected_s = {ratio: seconds_expected(ways, ratio, bounds, timed) for ratio in ratios}
    say_lines([describe_duration(sum(expected_s.values()), ratios, ways)])
    blocks: dict[Ratio, Comparison] = {}
    ruled_out: dict[Out, Bound] = {}
    for number, ratio in enumerate(ordered, 1):
        out = ruled_out_at(ratio, bounds, blocks)
        ruled_out |= out
        if out:
            say(describe_ruled_out(ratio, out))
        ways_here = ways_at(settings, topology, ratio)
        left = [way for way in ways_here if not {(way_kind(way), ratio)} & out.keys()]
        if not any(way.settings.split == str(ratio) for way in left):
            continue
        say(f"ratio {ratio}, {number} of {len(ordered)}")
        say_lines(split_lines(ways_here))
        block_s = time.perf_counter()
        chosen = dataclasses.replace(settings, split=str(ratio))
        rounds = run_rounds(timing_phases(left), topology.online)
        took_s = time.perf_counter() - block_s
        blocks[ratio] = Comparison(asked, chosen, topology, left, rounds, flops, took_s)
        if number < len(ordered):
            pace = took_s / expected_s[ratio]
            left_s = pace * sum(expected_s[each] for each in ordered[number:])
            say(f"ratio {ratio} took {span_text(took_s)}; about {span_text(left_s)} left")
    seconds = time.perf_counter() - begun_s
    return Sweep(asked, settings, topology, ratios, timed, blocks, ruled_out, machine, seconds)


def time_phases_alone(
    settings: Settings, ways: dict[str, Settings], topology: Topology, sizes: Sequence[int]
) -> Timed:
    """Phase times of each size of batch on groups of all sizes, PHASE_ROUNDS times in turn."""
    batches = sorted({way.batch_size for way in ways.values()}, reverse=True)
    images = " and ".join(map(str, batches))
    say(
        f"sweep: the phases of {settings.model} alone, batches of {images}, on "
        f"{', '.join(map(str, sizes))} cores, in {plural(PHASE_ROUNDS, 'round')}"
    )
    groups = [group_of_size(topology, size) for size in sizes] * PHASE_ROUNDS
    timed = {}
    for batch_size in batches:
        chosen = dataclasses.replace(settings, batch_size=batch_size)
        found = times_on_groups(chosen, topology.online, groups)
        by_size = (tuple(found[index :: len(sizes)]) for index in range(len(sizes)))
        timed[batch_size] = dict(zip(sizes, by_size, strict=True))
    return timed


def best_first(ratios: Sequence[Ratio], bounds: dict[Out, Bound]) -> list[Ratio]:
    """Ratios, the one with the best bound of any way first."""

    def best(ratio: Ratio) -> float:
        return max(median(bound.to_none) for (_, at), bound in bounds.items() if at == ratio)

    return sorted(ratios, key=best, reverse=True)


def seconds_expected(
    ways: dict[str, Settings], ratio: Ratio, bounds: dict[Out, Bound], timed: Timed
) -> float:
    """About how long all rounds of a ratio take, nothing ruled out; a plain loop counts as none."""
    none = ways["none"]
    whole = median_times(timed[none.batch_size][ratio.forward + ratio.backward])
    none_s = way_bound_s(none, whole, whole)
    to_none = [median(bounds[name, ratio].to_none) for name in ways if name != "none"]
    steps_s = [none_s, none_s, *(none_s / share for share in to_none)]
    processes = 1 + sum(way.ranks for way in ways.values())
    steps = steps_in_round(none.steps, min(steps_s)) + 1 / none.accumulate
    return processes * START_S + BEYOND_BOUNDS * sum(steps_s) * (1 + ROUNDS * steps)


def ruled_out_at(
    ratio: Ratio, bounds: dict[Out, Bound], blocks: dict[Ratio, Comparison]
) -> dict[Out, Bound]:
    """The ways that a ratio's bounds rule out, by what the best of each has reached so far."""
    out = {}
    for (way, at), bound in bounds.items():
        rows = {
            row.way: (row, block)
            for measured, block in blocks.items()
            for row in block.rows
            if row.way == f"{way} {measured}"
        }
        if at != ratio or not rows:
            continue
        row, block = max(rows.values(), key=lambda each: each[0].to_none)
        counting = [block.rounds[index][row.way] for index in rounds_used(block.rounds)]
        speeds = [each.images_per_s for each in counting]
        if is_ruled_out(bound, speeds, row.to_none_rounds):
            out[way, ratio] = bound
    return out


def ways_at(settings: Settings, topology: Topology, ratio: Ratio) -> list[Way]:
    """The ways of a ratio, its own named after it; of plain loops the one with the best flags."""
    ways = all_ways(dataclasses.replace(settings, split=str(ratio)), topology)
    return [
        dataclasses.replace(way, name=f"{way.name} {ratio}")
        if way.settings.split == str(ratio)
        else way
        for way in ways
        if way.name != "plain"
    ]


def way_kind(way: Way) -> str:
    """The name of a way without its ratio."""
    return way.name.partition(" ")[0]


def timing_phases(ways: Sequence[Way]) -> list[Way]:
    """The ways, each timing its own phases where `sequential` is not there to do so for it."""
    if any(way_kind(way) == "sequential" for way in ways):
        return list(ways)
    lanes = ("overlap", "delayed")
    return [dataclasses.replace(way, times_phases=way_kind(way) in lanes) for way in ways]


def describe_ratios(ratios: Sequence[Ratio], cores: int, machine: Topology | None) -> str:
    """Which ratios are run, forward:backward."""
    listed, count = ", ".join(map(str, ratios)), len(all_ratios(cores))
    if machine:
        return f"sweep: simulated; on this machine's {cores} cores {listed} is run, to check it"
    if count == 1:
        return f"sweep: {cores} cores have one ratio, {listed}; --simulate draws other machines"
    some = "all" if len(ratios) == count else f"{len(ratios)} of the"
    return f"sweep: {some} {count} ratios of {cores} cores, forward:backward {listed}"


def describe_duration(seconds: float, ratios: Sequence[Ratio], ways: dict[str, Settings]) -> str:
    """How long all ratios take, said before."""
    text = (
        f"about {span_text(seconds)}: {plural(len(ratios), 'ratio')}, {ROUNDS} rounds each of "
        f"{len(ways) + 1} ways"
    )
    return text + ("; less where a bound rules ways out" if len(ratios) > 1 else "")


def describe_ruled_out(ratio: Ratio, out: dict[Out, Bound]) -> str:
    """What is not run at a ratio, and why."""
    ways = (f"{way} at most {median(bound.to_none):.2f}" for (way, _), bound in out.items())
    return f"ruled out by their bounds at {ratio}: {', '.join(ways)} of none; others reach more"
