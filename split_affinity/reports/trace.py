"""What every lane, loader and core did when, as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from split_affinity.lanes.audit import PhaseRecord
from split_affinity.machine.plan import CorePlan
from split_affinity.reports.phases import PhaseOwners
from split_affinity.reports.timeline import busy_readings, by_start, readings_apart
from split_affinity.text import format_cpu_list
from split_affinity.training.steps import StepResult

Event = dict[str, Any]


def trace_of_ranks(
    plans: Sequence[CorePlan], steps_by_rank: Sequence[Sequence[StepResult]], name: str
) -> dict[str, Any]:
    """The steps of each rank, all by one clock, in the Trace Event Format: a process per rank.

    Times are microseconds from the start of the first phase, or of the first loading. A batch is
    shown once a step has taken it: the latest loaded ones are missing. `name` is what is trained.
    """
    zero_s = min(
        span.start_s
        for steps in steps_by_rank
        for step in steps
        for span in (*step.records, *step.loads)
    )
    events: list[Event] = []
    for rank, (plan, steps) in enumerate(zip(plans, steps_by_rank, strict=True)):
        process = f"rank {rank}, {name}" if len(plans) > 1 else name
        events.append(name_event("process_name", process, rank))
        events += span_events(plan, steps, rank, zero_s)
        events += counter_events(steps, rank, zero_s)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def name_event(kind: str, name: str, rank: int, row: int = 0) -> Event:
    """The name of a process or of one of its rows."""
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}


def span_events(
    plan: CorePlan, steps: Sequence[StepResult], rank: int, zero_s: float
) -> Iterator[Event]:
    """What one rank's lanes and loaders did: a row for each."""
    loads = [load for step in steps for load in step.loads]
    names: dict[str | int, str] = {group.name: f"{group.name} lane" for group in plan.groups}
    for loader in sorted({load.loader for load in loads}):
        names[loader] = "main thread" if loader < 0 else f"loader {loader}"
    # Row 0 would be the process itself, for which the trace knows no thread.
    rows = {key: number for number, key in enumerate(names, 1)}
    for key, name in names.items():
        yield name_event("thread_name", name, rank, rows[key])
    spans = [(load, "load", load.loader, {}) for load in loads]
    for record, step, batch in phase_owners(steps):
        owner = {"step": step} | ({"micro_batch": batch} if batch else {})
        used = {"cpu_s": record.cpu_s, "stray_s": record.stray_s}
        cores = {"cores": format_cpu_list(record.mask)}
        name = f"{record.phase} {batch or ''}".strip()
        # Figures by CPU or node are curves.
        counts = {key: each for key, each in record.counts.items() if not isinstance(each, Mapping)}
        spans.append((record, name, record.lane, owner | used | cores | counts))
    for span, name, key, args in spans:
        place = {"ts": 1e6 * (span.start_s - zero_s), "dur": 1e6 * (span.end_s - span.start_s)}
        kind = {"name": name, "cat": name.split()[0], "ph": "X"}
        yield {**kind, "pid": rank, "tid": rows[key], **place, "args": args}


def phase_owners(steps: Sequence[StepResult]) -> Iterator[tuple[PhaseRecord, int, int | None]]:
    """The phases of steps in a row, each with the step and the micro-batch that it worked for."""
    started = {"forward": math.inf, "backward": math.inf}
    for record in steps[0].records:
        if record.phase in started:
            started[record.phase] = min(started[record.phase], record.start_s)
    # A backward phase comes first: its forward phase ran before all of these.
    owners = PhaseOwners(ahead=int(started["backward"] < started["forward"]))
    for step in steps:
        yield from owners.of(step)


def counter_events(steps: Sequence[StepResult], rank: int, zero_s: float) -> Iterator[Event]:
    """What was measured beside the spans, as curves: each core's load and clock, memory, power."""
    records = by_start(record for step in steps for record in step.records)
    curves: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    readings = readings_apart(busy_readings(records))
    for (start_s, before_s), (end_s, after_s) in itertools.pairwise(readings):
        for cpu, busy_s in after_s.items():
            share = (busy_s - before_s[cpu]) / (end_s - start_s)
            curves[f"CPU {cpu}", "busy %"].append((start_s, 100 * min(1.0, max(0.0, share))))
    for record in records:
        counts, end_s = record.counts, record.end_s
        for cpu, mhz in counts.get("clock_mhz", {}).items():
            curves[f"CPU {cpu}", "MHz"].append((end_s, mhz))
        for node, size_bytes in counts.get("node_bytes", {}).items():
            curves[f"memory of node {node}", "MiB"].append((end_s, size_bytes / 2**20))
        if "resident_bytes" in counts:
            curves["memory", "MiB"].append((end_s, counts["resident_bytes"] / 2**20))
        if "package_j" in counts and record.duration_s:
            watts = counts["package_j"] / record.duration_s
            curves["all processors", "W"].append((record.start_s, watts))
    for (name, unit), points in curves.items():
        for at_s, value in sorted(points):
            place = {"ph": "C", "pid": rank, "ts": 1e6 * (at_s - zero_s)}
            # Perfetto writes the unit behind the name, as the name of a series.
            yield {"name": name, **place, "args": {unit: round(value, 3)}}
