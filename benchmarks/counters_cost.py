"""What do `--phases` and `--counters` cost? A measurement of some minutes.

    python benchmarks/counters_cost.py
    python benchmarks/counters_cost.py --model resnet20 --image-size 32 --rounds 200

Trains the same model on three pairs of lanes over the same cores, which take turns, step by step:
with nothing counted, with the counters of --phases, and with those of --counters. Printed are the
median ratio of a step's time to that of the step before it without counters, its range between the
quartiles, and how much of a step the audit itself took, by its own clock: the ratio has the noise
of the machine, that share has not. Any option of training can be given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity.counters.counters import open_counters
from split_affinity.data.loader import Batches
from split_affinity.data.samples import Loaded
from split_affinity.lanes.lane import Lanes, coordinating, tune_allocator
from split_affinity.machine.description import describe_topology
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.options.commands import parse_arguments
from split_affinity.reports.tables import describe_run
from split_affinity.runs.measurement import measured_settings
from split_affinity.runs.setup import build_train_state
from split_affinity.text import markdown_table
from split_affinity.training.steps import StepResult, run_schedule

KINDS = {"nothing": {}, "--phases": {"phases": True}, "--counters": {"counters": True}}
WARM_UP = 3  # rounds


def main(arguments: list[str]) -> None:
    """Measure, and print the table."""
    if "--help" in arguments:
        usage = "[-h] [--rounds N] [options of training ...]"
        print(f"usage: {Path(__file__).name} {usage}\n\n{__doc__ or ''}")
        raise SystemExit(0)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=30)
    own, options = parser.parse_known_args(arguments)
    topology = read_topology()
    settings = measured_settings(parse_arguments(options)[1], topology)
    settings = dataclasses.replace(settings, lr=0.0, lr_scheduler="constant")
    plan = plan_cores(topology, settings)
    size = (settings.batch_size, 3, settings.image_size, settings.image_size)
    loaded = [Loaded((torch.randn(size), torch.randint(settings.num_classes, size[:1])))]
    tune_allocator()
    steps: dict[str, list[StepResult]] = {name: [] for name in KINDS}
    with contextlib.ExitStack() as stack:
        stack.enter_context(coordinating(settings, plan))
        runs = {}
        for name, asked in KINDS.items():
            counters = open_counters(dataclasses.replace(settings, **asked), plan)
            lanes = stack.enter_context(Lanes(plan, topology.online, counters))
            runs[name] = lanes, build_train_state(settings, lanes)
        for _ in range(WARM_UP + own.rounds):
            for name, (lanes, train_state) in runs.items():
                batches = Batches(loaded, settings.accumulate)
                steps[name] += run_schedule(settings, lanes, train_state, batches)
    print(f"{describe_run(settings)}, {settings.schedule}; {describe_topology(topology)}")
    rows = []
    for name, every in steps.items():
        pairs = list(zip(every, steps["nothing"], strict=True))[WARM_UP:]
        ratios = [step.step_s / other.step_s for step, other in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        audit = sum(step.total("audit_s") for step, _ in pairs)
        share = audit / sum(step.step_s for step, _ in pairs)
        looks = sum(bool(record.seen_on) for step, _ in pairs for record in step.records)
        phases = sum(len(step.records) for step, _ in pairs)
        audit_ms = f"{1e3 * audit / phases:.2f}"
        spread = f"{low:.3f} to {high:.3f}"
        looked_at = f"{looks / phases:.0%}"
        rows.append((name, f"{middle:.3f}", spread, audit_ms, f"{share:.2%}", looked_at))
    header = ("counted", "step", "quartiles", "audit ms a phase", "of a step", "phases looked at")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
