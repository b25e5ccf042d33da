"""What the metrics.jsonl beside a checkpoint says of its run: machine, core plan, time per phase.

The file may be anybody's: every value that is taken from it has the kind that a run writes.
"""

from __future__ import annotations

import collections
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from split_affinity.errors import UserError
from split_affinity.files import open_itself
from split_affinity.lanes.contention import Contention, mean_contention
from split_affinity.reports.tables import disturbance
from split_affinity.text import format_cpu_list, plural

LATEST_STEPS = 2000
WORDS = {dict: "an object", list: "a list", str: "a text", int: "a count", float: "a number"}
MOST = 2**31  # of whatever is counted


@dataclass(frozen=True)
class Phase:
    """What a phase of a step took: on which cores (a list of logical CPUs, and threads), the
    median in ms, and the share of the time; what was not recorded is None.
    """

    name: str
    cores: str
    median_ms: float
    share: float | None


@dataclass(frozen=True)
class Recorded:
    """What metrics.jsonl says of a run: its machine, its core plan, and the time per phase. If
    others disturbed it so much that times do not count, `disturbed` says so.
    """

    machine: str
    plan: Sequence[str]
    phases: Sequence[Phase]
    images_per_s: float | None
    disturbed: str


def recorded_run(path: Path, model: str) -> Recorded | None:
    """What a file says of the latest run in it; None if it is not there, says too little, as those
    of earlier versions do, or is of another model. Raises UserError if it is no such file.
    """
    try:
        with open_regular(path) as lines:
            run, summary, steps = read_records(lines)
        if not run or entry(entry(run, "settings", dict), "model", str) != model:
            return None
        return told_of(run, summary, steps)
    except (FileNotFoundError, KeyError):
        return None
    except RecursionError:
        reason = "nested too deeply"
    except OSError as error:
        reason = error.strerror
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path}: not what a run records: {reason}; move it away to do without")


def open_regular(path: Path) -> TextIO:
    """A file to read; not a pipe or a device, which may have no end, nor a beginning. Raises
    OSError.
    """
    descriptor = open_itself(path.resolve(), os.O_RDONLY)
    return os.fdopen(descriptor, encoding="utf-8", errors="replace")


def read_records(lines: TextIO) -> tuple[dict, dict | None, list[dict]]:
    """The latest run, its summary if it came to one, and its latest steps, of which there can be
    millions: they are taken apart last. A last line that was cut short counts for nothing. Raises
    ValueError, RecursionError.
    """
    run, summary, steps = {}, None, collections.deque(maxlen=LATEST_STEPS)
    for line in lines:
        if not line.endswith("}\n"):
            continue
        if line.startswith('{"type": "run"'):
            run, summary = json.loads(line), None
            steps.clear()
        elif line.startswith('{"type": "step"'):
            steps.append(line)
        elif line.startswith('{"type": "summary"'):
            summary = json.loads(line)
    return run, summary, [json.loads(line) for line in steps]


def entry(record: Any, name: str, kind: type) -> Any:
    """What a record has under a name. Raises KeyError if that is nothing, ValueError if it is not
    of the kind that a run writes, or no number that can be shown.
    """
    value = of_kind(record, "a record", dict)[name]
    if value is None:
        raise KeyError(name)
    return of_kind(value, name, kind)


def of_kind(value: Any, name: str, kind: type) -> Any:
    """A value, if it is of a kind. Raises ValueError."""
    if kind is float and type(value) is int and abs(value) < MOST:
        return float(value)
    fits = type(value) is kind
    if kind in (int, float):
        fits = fits and math.isfinite(value) and abs(value) < MOST
    if not fits:
        raise ValueError(f"{name} is not {WORDS[kind]}")
    return value


def told_of(run: dict, summary: dict | None, steps: Sequence[dict]) -> Recorded:
    """The same of what was read. Raises KeyError, ValueError."""
    machine = entry(run, "machine", dict)
    cores = plural(entry(machine, "cores", int), "core")
    return Recorded(
        f"{entry(machine, 'cpu_model', str)}, {cores}, {entry(run, 'host_kind', str)}",
        list(plan_lines(entry(run, "plan", dict))),
        list(phases_of_summary(summary) if summary else phases_of_steps(steps)),
        summary and entry(summary, "images_per_s", float),
        disturbance(contention_of([summary] if summary else steps)),
    )


def contention_of(records: Sequence[dict]) -> Contention | None:
    """What others took of the cores, the mean of what records say; None if none says it. Raises
    KeyError, ValueError.
    """
    looks = [look_of(entry(each, "contention", dict)) for each in records if each.get("contention")]
    return mean_contention(looks) if looks else None


def look_of(record: dict) -> Contention:
    """A look at what others took. Raises KeyError, ValueError."""
    start_s, end_s, stolen = (entry(record, name, float) for name in ("start_s", "end_s", "stolen"))
    if end_s <= start_s:
        raise ValueError("a look at contention ends before it begins")
    shares = entry(record, "others", dict).items()
    others = {lane: of_kind(share, "what others took", float) for lane, share in shares}
    return Contention(start_s, end_s, others, stolen)


def phases_of_summary(summary: dict) -> Iterator[Phase]:
    """The time per phase."""
    for each in entry(summary, "phases", list):
        threads = plural(entry(each, "threads", int), "thread")
        yield Phase(
            entry(each, "phase", str),
            f"{entry(each, 'cores', str)} ({threads})",
            entry(each, "median_ms", float),
            entry(each, "share", float),
        )


def phases_of_steps(steps: Sequence[dict]) -> Iterator[Phase]:
    """The time per phase of a run without a summary."""
    for name in ("forward", "backward", "update", "refresh") if steps else ():
        median_s = statistics.median(entry(step, f"{name}_s", float) for step in steps)
        if median_s:
            yield Phase(name, "", 1000 * median_s, None)


def plan_lines(plan: dict) -> Iterator[str]:
    """A core plan, a line for each group."""
    yield f"split {entry(plan, 'split', str)}"
    groups = [entry(plan, name, dict) for name in ("forward", "backward") if plan.get(name)]
    yield from dict.fromkeys(
        f"{entry(group, 'name', str)}: {cpus_of(group, 'cpus')}, "
        f"{plural(entry(group, 'threads', int), 'thread')}"
        for group in groups
    )
    yield f"loaders and main thread: {cpus_of(plan, 'loader_cpus')}"


def cpus_of(record: dict, name: str) -> str:
    """A list of logical CPUs in words."""
    cpus = [of_kind(cpu, name, int) for cpu in entry(record, name, list)]
    return f"CPUs {format_cpu_list(cpus)}"
