"""Phase records and steps made by hand, shared by the tests of summary, timelines and reports."""

from __future__ import annotations

from split_affinity.lanes.audit import PhaseRecord
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.reports.summary import RunStatistics
from split_affinity.training.steps import StepResult

PLAN = CorePlan("even", Group("forward", (0,), 1), Group("backward", (1, 2), 2), (0,))


def record(phase, start_s, duration_s, **used):
    """A phase that kept its cores busy all the time."""
    group = PLAN.forward if phase in ("forward", "refresh") else PLAN.backward
    values = {
        "mask": frozenset(group.cpus),
        "cpu_busy_s": {cpu: duration_s if cpu in group.cpus else 0.0 for cpu in range(3)},
        "cpu_s": duration_s * len(group.cpus),
        "stray_s": 0.0,
        "other_lane_s": 0.0,
        "python_s": 0.0,
        "seen_on": frozenset(group.cpus),
    }
    return PhaseRecord(phase, group.name, start_s, start_s + duration_s, **(values | used))


def step(number, forward_s=0.1, backward_s=0.2, update_s=0.05, step_s=0.4, **used):
    """A step of two micro-batches."""
    records = (
        record("forward", 0.0, forward_s / 2),
        record("backward", 1.0, backward_s / 2, **used),
        record("forward", 2.0, forward_s / 2),
        record("backward", 3.0, backward_s / 2, **used),
        record("update", 4.0, update_s),
    )
    return StepResult(number, 5.0 - number, 8, step_s, records)


def summarise(steps, plan=PLAN):
    run_statistics = RunStatistics(plan)
    for result in steps:
        run_statistics.add(result)
    return run_statistics.summary()
