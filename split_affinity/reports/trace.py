"""What every lane and loader did when, as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from split_affinity.machine.plan import CorePlan
from split_affinity.reports.timeline import owned_phases
from split_affinity.text import format_cpu_list
from split_affinity.training.steps import StepResult


def shifted(steps: Iterable[StepResult], by_s: float) -> list[StepResult]:
    """Steps with other times of all phases and batches, as another clock has them."""

    def later(span: Any) -> Any:
        times = {"start_s": span.start_s + by_s, "end_s": span.end_s + by_s}
        return dataclasses.replace(span, **times)

    return [
        dataclasses.replace(
            step,
            records=tuple(map(later, step.records)),
            loads=tuple(map(later, step.loads)),
            contention=step.contention and later(step.contention),
            synced_s=step.synced_s + by_s,
        )
        for step in steps
    ]


def by_one_clock(steps_by_rank: Sequence[Sequence[StepResult]]) -> list[list[StepResult]]:
    """The same steps of several ranks, all by the clock of the first: at the end of each step they
    have all just heard of each other.
    """
    first = [step.synced_s for step in steps_by_rank[0]]
    aligned = []
    for steps in steps_by_rank:
        ahead_s = (now_s - step.synced_s for now_s, step in zip(first, steps, strict=True))
        aligned.append(shifted(steps, statistics.median(ahead_s)))
    return aligned


def beginning_s(steps: Iterable[StepResult]) -> float:
    """When the first phase of some steps began, or the loading of their first batch."""
    return min(span.start_s for step in steps for span in (*step.records, *step.loads))


def trace_of_ranks(
    plans: Sequence[CorePlan], steps_by_rank: Sequence[Sequence[StepResult]]
) -> dict[str, Any]:
    """The steps of several ranks by one clock, as in `trace_events`: each rank is a process."""
    zero_s = beginning_s(itertools.chain.from_iterable(steps_by_rank))
    events = []
    for rank, (plan, steps) in enumerate(zip(plans, steps_by_rank, strict=True)):
        names = {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        events += [names, *trace_events(plan, steps, rank, zero_s)["traceEvents"]]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def trace_events(
    plan: CorePlan, steps: Sequence[StepResult], rank: int = 0, zero_s: float | None = None
) -> dict[str, Any]:
    """The steps in the Trace Event Format: a row per lane and per loader, times in microseconds
    from the beginning, or since `zero_s`.

    A batch is shown only once a step has taken it, so the last ones that were loaded are missing.
    """
    loads = [load for step in steps for load in step.loads]
    names: dict[str | int, str] = {group.name: f"{group.name} lane" for group in plan.groups}
    for loader in sorted({load.loader for load in loads}):
        names[loader] = "main thread" if loader < 0 else f"loader {loader}"
    rows = {key: number for number, key in enumerate(names)}
    zero_s = beginning_s(steps) if zero_s is None else zero_s
    events = [
        {"name": "thread_name", "ph": "M", "pid": rank, "tid": rows[key], "args": {"name": name}}
        for key, name in names.items()
    ]
    spans = [(load, "load", load.loader, {}) for load in loads]
    for record, owner in owned_phases(steps):
        name = f"{record.phase} {owner.get('micro_batch', '')}".strip()
        used = {"cpu_s": record.cpu_s, "stray_s": record.stray_s}
        cores = {"cores": format_cpu_list(record.mask)}
        spans.append((record, name, record.lane, owner | used | cores))
    for span, name, key, args in spans:
        place = {"ts": 1e6 * (span.start_s - zero_s), "dur": 1e6 * (span.end_s - span.start_s)}
        kind = {"name": name, "cat": name.split()[0], "ph": "X"}
        events.append({**kind, "pid": rank, "tid": rows[key], **place, "args": args})
    return {"displayTimeUnit": "ms", "traceEvents": events}
