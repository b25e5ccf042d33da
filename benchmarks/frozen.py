"""What a frozen body brings to fine-tuning, under every schedule. A measurement, not a test.

Trains ResNet-50 on synthetic images in one lane over all cores and in every schedule of the split,
each with nothing frozen and with all but the classifier frozen, in turn, round by round, and prints
medians of images/s; any option of `compare` can be given:

    python benchmarks/frozen.py --batch-size 16
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from split_affinity.text import markdown_table

ROUNDS = 5
LABELS = {None: "", "body": ", body frozen"}


def ways_to_train(options: list[str], topology: Topology) -> list[Way]:
    """The lanes' ways of `compare`, each without and with a frozen body."""
    ways = []
    for freeze, label in LABELS.items():
        _, asked = parse_arguments(["compare", *options])
        settings = measured_settings(dataclasses.replace(asked, freeze=freeze), topology)
        found = (way for way in all_ways(settings, topology) if not way.plain)
        ways += [dataclasses.replace(way, name=way.name + label) for way in found]
    return ways


def measure(ways: list[Way], topology: Topology) -> dict[str, list[float]]:
    """Images/s of a whole step of each way in each round, after one to warm up."""
    speeds: dict[str, list[float]] = {way.name: [] for way in ways}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        running = start_ways(stack, stop, ways, topology.online)
        for number in range(ROUNDS + 1):
            for way in ways:
                result = measure_way(running[way.name], RoundRequest(number, 1, keep_memory=False))
                if number:
                    speeds[way.name].append(result.images_per_s)
            print(f"round {number}/{ROUNDS}", flush=True)
    return speeds


def main(options: list[str]) -> None:
    """Measure, and print the table."""
    if "--help" in options:
        print(f"usage: {Path(__file__).name} [-h] [options of compare ...]\n\n{__doc__ or ''}")
        raise SystemExit(0)
    topology = read_topology()
    ways = ways_to_train(options, topology)
    print(f"{describe_run(ways[0].settings)}; {describe_topology(topology)}")
    speeds = measure(ways, topology)
    rows = []
    for name in (way.name for way in ways if not way.settings.freeze):
        whole, frozen = speeds[name], speeds[name + LABELS["body"]]
        ratios = [theirs / ours for ours, theirs in zip(whole, frozen, strict=True)]
        medians = [f"{statistics.median(each):.2f}" for each in (whole, frozen, ratios)]
        rows.append([name, *medians, f"{min(ratios):.2f} to {max(ratios):.2f}"])
    header = ["way", "nothing frozen", "body frozen", "ratio", f"in {ROUNDS} rounds"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
