"""What an option brings, under every schedule. A measurement, not a test.

Trains ResNet-50 on synthetic images in one lane over all cores and in every schedule of the split,
each as it is and with other options, in turn, round by round, and prints medians of images/s. Any
option of `compare` can be given. --rounds are 5 unless it says otherwise:

    python benchmarks/switch.py --other "--freeze body" --batch-size 16
    python benchmarks/switch.py --other "--fused-norm off" --quick
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity.compare.loops import RoundRequest
from split_affinity.compare.rounds import measure_way, start_ways
from split_affinity.compare.ways import (
    Way,
    all_ways,
)
from split_affinity.machine.description import describe_topology
from split_affinity.machine.topology import (
    Topology,
    read_topology,
)
from split_affinity.options.commands import parse_arguments
from split_affinity.reports.tables import describe_run
from split_affinity.runs.measurement import measured_settings
from split_affinity.signals import StopRequest
from split_affinity.terminal import say
from split_affinity.text import markdown_table


def ways_to_train(options: list[str], label: str, topology: Topology) -> list[Way]:
    """The lanes' ways of `compare` with these options, the label behind their names."""
    _, asked = parse_arguments(["compare", *options])
    settings = measured_settings(asked, topology)
    found = (way for way in all_ways(settings, topology) if not way.plain)
    return [dataclasses.replace(way, name=way.name + label) for way in found]


def measure(ways: list[Way], topology: Topology, rounds: int) -> dict[str, list[float]]:
    """Images/s of a whole step of each way in each round, after one to warm up."""
    speeds: dict[str, list[float]] = {way.name: [] for way in ways}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        running = start_ways(stack, stop, ways, topology.online)
        for number in range(rounds + 1):
            disturbed = 0.0
            for way in ways:
                result = measure_way(running[way.name], RoundRequest(number, 1, keep_memory=False))
                disturbed = max(disturbed, result.disturbance[0])
                if number:
                    speeds[way.name].append(result.images_per_s)
            say(f"round {number}/{rounds}, others took {disturbed:.0%} of a way's cores at most")
    return speeds


def main(arguments: list[str]) -> None:
    """Measure, and print the table."""
    if "--help" in arguments:
        print(f"usage: {Path(__file__).name} [-h] [options of compare ...]\n\n{__doc__ or ''}")
        raise SystemExit(0)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--other", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    own, options = parser.parse_known_args(arguments)
    topology, label = read_topology(), f", {own.other}"
    as_it_is = ways_to_train(options, "", topology)
    others = ways_to_train([*options, *shlex.split(own.other)], label, topology)
    print(f"{describe_run(as_it_is[0].settings)}; {describe_topology(topology)}")
    pairs = zip(as_it_is, others, strict=True)
    speeds = measure([way for pair in pairs for way in pair], topology, own.rounds)
    rows = []
    for name in (way.name for way in as_it_is):
        here, there = speeds[name], speeds[name + label]
        ratios = [one / other for one, other in zip(here, there, strict=True)]
        medians = [f"{statistics.median(each):.2f}" for each in (here, there, ratios)]
        rows.append([name, *medians, f"{min(ratios):.2f} to {max(ratios):.2f}"])
    header = ["way", "as it is", own.other, "ratio", f"in {own.rounds} rounds"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
