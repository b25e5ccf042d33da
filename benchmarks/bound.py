"""How near each schedule comes to its bound, with phases that only wait.

    python benchmarks/bound.py

Phases of known length show what a schedule itself loses, whatever the machine computes: each line
has the mean time of an optimizer step and the bound (see step_bound_s in
split_affinity/training/schedules.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_affinity import ALLOWED_CPUS
from split_affinity.data.loader import Batches
from split_affinity.data.samples import Loaded
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import (
    CorePlan,
    Group,
    PhaseTimes,
)
from split_affinity.training.network import Scores
from split_affinity.training.schedules import (
    SCHEDULES,
    step_bound_s,
)

# Milliseconds of forward, backward, update and refresh: in turn each lane is the slower one.
TIMES_MS = ((100, 50, 30, 5), (50, 100, 30, 5), (50, 50, 30, 5))


class Stub:
    """Stands for work and its network: phases that take a given time and compute nothing."""

    end = None

    def __init__(self, times: PhaseTimes, accumulate: int):
        self.network, self.times, self.accumulate = self, times, accumulate

    def forward(self, batch, weights=None):
        time.sleep(self.times.forward_s)
        return batch

    def backward(self, output):
        time.sleep(self.times.backward_s)
        return Scores(0.0, 1, 0, 0)

    def update(self, *args):
        time.sleep(self.times.update_s)

    def copy(self, begun=None):
        return None

    def refresh(self, weights):
        time.sleep(self.times.refresh_s)


def step_s(lanes: Lanes, schedule: str, stub: Stub, steps: int) -> float:
    """Mean seconds of a step, but for the first and the last, which fill and drain a pipeline."""
    batch = torch.zeros(1), torch.zeros(1)
    batches = Batches([Loaded(batch)], stub.accumulate * (steps + 2))
    ends_s = [time.perf_counter() for _ in SCHEDULES[schedule](lanes, stub, batches)]
    return (ends_s[-2] - ends_s[0]) / steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of each line (default: 20)")
    given = parser.parse_args()
    cpus = sorted(ALLOWED_CPUS)
    groups = Group("forward", (cpus[0],), 1), Group("backward", (cpus[-1],), 1)
    print("forward/backward/update/refresh ms, micro-batches: step, bound, of bound")
    with Lanes(CorePlan("even", *groups, groups[0].cpus), ()) as lanes:
        for schedule in SCHEDULES:
            for times_ms in TIMES_MS:
                times = PhaseTimes(*(time_ms / 1e3 for time_ms in times_ms))
                for accumulate in (1, 2, 4):
                    bound_s = step_bound_s(schedule, times, accumulate)
                    took_s = step_s(lanes, schedule, Stub(times, accumulate), given.steps)
                    print(
                        f"{schedule:10} {'/'.join(map(str, times_ms)):13} {accumulate}: "
                        f"{1e3 * took_s:6.1f} {1e3 * bound_s:6.1f} {bound_s / took_s:6.1%}"
                    )


if __name__ == "__main__":
    main()
