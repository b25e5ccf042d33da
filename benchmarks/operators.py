"""Where the time of one lane goes, by kinds of operators, and what is left to the limit. A
measurement of a minute, not a test.

    python benchmarks/operators.py --batch-size 32 --steps 4

Trains with --split none on random images from memory; any option of training can be given. Half of
the steps are timed as they are, the others under PyTorch's profiler. An operator's time is that of
the lane's main thread, which waits for its team; an operator inside of another one counts as part
of that: the copies inside of a convolution are convolution. The limit is the speed if nothing but
the convolutions took any time.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity.data.loader import Batches
from split_affinity.data.samples import Loaded
from split_affinity.errors import RunError, UserError
from split_affinity.lanes.lane import Lanes, coordinating, tune_allocator
from split_affinity.machine.description import describe_topology
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import Topology, read_topology
from split_affinity.options.commands import parse_arguments
from split_affinity.options.settings import Settings
from split_affinity.reports.tables import describe_run
from split_affinity.runs.measurement import measured_settings
from split_affinity.runs.setup import build_train_state
from split_affinity.terminal import say
from split_affinity.text import markdown_table
from split_affinity.training.operators import CONVOLUTIONS, OUTSIDE, REST, time_by_kind
from split_affinity.training.profiling import all_threads
from split_affinity.training.steps import run_schedule

STEPS = 4  # of each half, unless --steps asks for more


def profiled_steps(settings: Settings, topology: Topology) -> tuple[list[float], float, Counter]:
    """Seconds of each step, of a step under the profiler, and its microseconds by kind."""
    steps = settings.steps or STEPS
    size = (settings.batch_size, 3, settings.image_size, settings.image_size)
    loaded = [Loaded((torch.randn(size), torch.randint(settings.num_classes, size[:1])))]
    plan = plan_cores(topology, settings)
    with coordinating(settings, plan), Lanes(plan, topology.online) as lanes:
        state = build_train_state(settings, lanes)
        batches = Batches(loaded, settings.accumulate * 2 * (steps + 1))
        running = run_schedule(settings, lanes, state, batches)
        next(running)  # fetches memory
        plain_s = [step.step_s for step in itertools.islice(running, steps)]
        config = all_threads()
        with torch.profiler.profile(experimental_config=config) as profile:
            next(running)
        with torch.profiler.profile(experimental_config=config) as profile:
            made = [step.step_s for step in itertools.islice(running, steps)]
        running.close()
    total = time_by_kind(profile.events())
    step_us = Counter({kind: time_us / steps for kind, time_us in total.items()})
    return plain_s, statistics.fmean(made), step_us


def table_of(step_s: float, step_us: Counter[str]) -> str:
    """A profiled step by kinds of operators: milliseconds and share."""
    by_kind = dict(sorted(step_us.items(), key=lambda item: -item[1]))
    rest = {REST: by_kind.pop(REST, 0.0)}
    rest[OUTSIDE] = max(0.0, 1e6 * step_s - step_us.total())
    rows = [
        [kind, f"{time_us / 1e3:.1f}", f"{time_us / 1e6 / step_s:.1%}"]
        for kind, time_us in (by_kind | rest).items()
    ]
    rows.append(["a step, profiled", f"{1e3 * step_s:.1f}", ""])
    return markdown_table(["operators", "ms a step", "share"], rows)


def limit_of(images: int, plain_s: Sequence[float], step_us: Counter[str]) -> str:
    """The speed of steps as they are, and if convolutions were everything, in a sentence."""
    speed = images / statistics.median(plain_s)
    limit = 1e6 * images / sum(step_us[kind] for kind in CONVOLUTIONS)
    return (
        f"{speed:.2f} images/s without the profiler; with convolutions alone {limit:.2f}, "
        f"{limit / speed:.2f} times as many"
    )


def main(options: list[str]) -> int:
    """Measure, and print; returns the exit code."""
    if {"-h", "--help"} & {*options}:
        print(f"usage: {Path(__file__).name} [-h] [options of training ...]\n\n{__doc__ or ''}")
        return 0
    topology = read_topology()
    try:
        command, asked = parse_arguments(["--split", "none", *options])
        if command != "train" or asked.split != "none" or asked.data_path:
            raise UserError("only options of one lane, with images from memory")
        settings = measured_settings(asked, topology)
        if settings.tuned_malloc:
            tune_allocator()
        print(f"{describe_run(settings)}; {describe_topology(topology)}", flush=True)
        plain_s, step_s, step_us = profiled_steps(settings, topology)
    except (UserError, RunError) as error:
        say(f"{Path(__file__).name}: error: {error}", sys.stderr)
        return error.exit_code
    print(table_of(step_s, step_us))
    print(limit_of(settings.batch_size * settings.accumulate, plain_s, step_us))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
