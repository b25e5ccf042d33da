"""What every lane and loader did when, as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from split_affinity.lanes.audit import PhaseRecord
from split_affinity.machine.plan import CorePlan
from split_affinity.reports.timeline import by_start, number_batches
from split_affinity.text import format_cpu_list
from split_affinity.training.steps import StepResult


def trace_of_ranks(
    plans: Sequence[CorePlan], steps_by_rank: Sequence[Sequence[StepResult]]
) -> dict[str, Any]:
    """The steps of each rank, all by one clock, in the Trace Event Format: a process per rank.

    Times are microseconds from the start of the first phase, or of the first loading. A batch is
    shown once a step has taken it: the latest loaded ones are missing.
    """
    zero_s = min(
        span.start_s
        for steps in steps_by_rank
        for step in steps
        for span in (*step.records, *step.loads)
    )
    events = []
    for rank, (plan, steps) in enumerate(zip(plans, steps_by_rank, strict=True)):
        if len(plans) > 1:
            name = {"name": f"rank {rank}"}
            events.append({"name": "process_name", "ph": "M", "pid": rank, "args": name})
        events += trace_events(plan, steps, rank, zero_s)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def trace_events(
    plan: CorePlan, steps: Sequence[StepResult], rank: int, zero_s: float
) -> list[dict[str, Any]]:
    """The events of one rank: a row per lane and per loader."""
    loads = [load for step in steps for load in step.loads]
    names: dict[str | int, str] = {group.name: f"{group.name} lane" for group in plan.groups}
    for loader in sorted({load.loader for load in loads}):
        names[loader] = "main thread" if loader < 0 else f"loader {loader}"
    rows = {key: number for number, key in enumerate(names)}
    events = [
        {"name": "thread_name", "ph": "M", "pid": rank, "tid": rows[key], "args": {"name": name}}
        for key, name in names.items()
    ]
    spans = [(load, "load", load.loader, {}) for load in loads]
    for record, owner in phase_owners(steps):
        name = f"{record.phase} {owner.get('micro_batch', '')}".strip()
        used = {"cpu_s": record.cpu_s, "stray_s": record.stray_s}
        cores = {"cores": format_cpu_list(record.mask)}
        spans.append((record, name, record.lane, owner | used | cores))
    for span, name, key, args in spans:
        place = {"ts": 1e6 * (span.start_s - zero_s), "dur": 1e6 * (span.end_s - span.start_s)}
        kind = {"name": name, "cat": name.split()[0], "ph": "X"}
        events.append({**kind, "pid": rank, "tid": rows[key], **place, "args": args})
    return events


def phase_owners(steps: Sequence[StepResult]) -> Iterator[tuple[PhaseRecord, dict[str, int]]]:
    """The phases by start time, each with the step and the micro-batch that it worked for.

    A step's records are the phases that ended in it. `delayed` has begun the next step by then: it
    has refreshed a copy for it, and the first micro-batch has gone forward.
    """
    owners = []
    for step in steps:
        batches = sum(record.phase == "backward" for record in step.records)
        owners += [{"step": step.step, "micro_batch": 1 + batch} for batch in range(batches)]
    owners.append({"step": steps[-1].step + 1, "micro_batch": 1})
    step_of = {id(record): step.step for step in steps for record in step.records}
    records = by_start(record for step in steps for record in step.records)
    for record, number in zip(records, number_batches(records), strict=True):
        if number:
            yield record, owners[number - 1]
        else:
            yield record, {"step": step_of[id(record)] + (record.phase == "refresh")}
