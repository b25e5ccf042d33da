"""What the audit of the phases costs on a large machine, in time and in memory.

    python benchmarks/audit_cost.py

One lane gets as many OpenMP threads as asked for, all of which work in each phase, and /proc/stat
is one with as many CPUs as asked for, in the form of a real one (its lines of CPUs repeated, with
the interrupts that so many have). Printed are the time that a phase takes beside its work and the
hand-over, and how much memory the figures of a long run take. The kernel's own time to make up
/proc/stat for so many CPUs is not in it. The variable AUDITED names the folder of another version
of the program to measure.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, os.environ.get("AUDITED", str(Path(__file__).parents[1])))
from split_affinity import ALLOWED_CPUS
from split_affinity.lanes.lane import (
    Lane,
    Lanes,
)
from split_affinity.machine.plan import (
    CorePlan,
    Group,
)
from split_affinity.reports.summary import RunStatistics
from split_affinity.training.steps import StepResult


def record_proc_stat(folder: Path, cpus: int) -> None:
    """A /proc/stat of many CPUs, of this machine's."""
    lines = Path("/proc/stat").read_text().splitlines()
    own = [line.split()[1:] for line in lines if line.startswith("cpu")][1:]
    many = [f"cpu{number} {' '.join(own[number % len(own)])}" for number in range(cpus)]
    rest = [line for line in lines if not line.startswith(("cpu", "intr"))]
    interrupts = " ".join(str(number % 7) for number in range(12 * cpus))
    (folder / "stat").write_text("\n".join([lines[0], *many, f"intr 1 {interrupts}", *rest]) + "\n")


def seconds(function, *args) -> float:
    """How long a call takes."""
    start_s = time.perf_counter()
    function(*args)
    return time.perf_counter() - start_s


def audit_ms(lane: Lane, threads: int, phases: int) -> tuple[float, float]:
    """Milliseconds of a phase beside its work and the hand-over: mean and largest tenth."""
    values = torch.zeros(threads * 2**15)  # 32,768 elements are the least for a thread of its own
    costs_s = []
    for _ in range(phases):
        hand_over_s = seconds(lane.call, time.perf_counter)
        whole_s = seconds(lane.run, "forward", values.add_, 1)
        costs_s.append(whole_s - lane.records[-1].duration_s - hand_over_s)
    costs_s = sorted(costs_s)[: -max(1, phases // 100)]  # without those that were interrupted
    return 1e3 * statistics.fmean(costs_s), 1e3 * costs_s[-max(1, phases // 10)]


def resident_bytes() -> int:
    """The process's resident size; psutil would look for it beside the other /proc/stat."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_bytes(lanes: Lanes, steps: int, micro_batches: int) -> int:
    """Bytes that the figures of a run take, from the process's resident size."""
    run_statistics = RunStatistics(lanes.plan)
    before = resident_bytes()
    for step in range(1, steps + 1):
        for phase in (*["forward", "backward"] * micro_batches, "update", "refresh"):
            lanes.forward.run(phase, int)
        run_statistics.add(StepResult(step, 1.0, 1, 1.0, lanes.take_records()))
    assert run_statistics.summary().steps == steps
    return resident_bytes() - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("threads", 64), ("cpus", 128), ("phases", 400), ("steps", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default: 8)")
    given = parser.parse_args()
    own_cpus = tuple(sorted(ALLOWED_CPUS))
    group = Group("all", own_cpus, given.threads)
    plan = CorePlan("none", group, group, own_cpus)
    with tempfile.TemporaryDirectory() as folder, Lanes(plan, range(given.cpus)) as lanes:
        record_proc_stat(Path(folder), given.cpus)
        psutil.PROCFS_PATH = folder
        audit_ms(lanes.forward, given.threads, 10)
        mean_ms, tenth_ms = audit_ms(lanes.forward, given.threads, given.phases)
        lanes.take_records()
        print(
            f"{given.threads} threads, /proc/stat of {given.cpus} CPUs: the audit takes "
            f"{mean_ms:.2f} ms a phase (one in ten {tenth_ms:.2f} or more)"
        )
        size = run_bytes(lanes, given.steps, given.micro_batches)
        print(
            f"{given.steps} steps of {given.micro_batches} micro-batches: {size / 1e6:.1f} MB",
        )


if __name__ == "__main__":
    main()
