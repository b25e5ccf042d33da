"""How far loading held training up, and how many loaders would keep up: from records. Pure."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from split_affinity.lanes.audit import PhaseRecord
from split_affinity.text import format_cpu_list
from split_affinity.training.steps import StepResult

HELD_UP_IN_SUMMARY = 0.05  # below that it is not worth a line


@dataclass(frozen=True)
class Loading:
    """What loading took, and what training had to wait for."""

    held_up: float  # share of the steps' time in which nothing ran for want of the next batch
    load_s: float  # a batch, mean, in one process
    longest_load_s: float
    train_s: float  # a batch, mean of the steps' time without that wait
    loaders: int  # 0: the main thread
    enough_loaders: int  # so many load batches as fast as they are trained with
    cpus: str  # where loaders run


def summarise_loading(steps: Sequence[StepResult], cpus: Iterable[int]) -> Loading | None:
    """What the loading of some successive steps took; None if nothing was loaded.

    Only the time in which no phase ran at all counts as held up, and of that only the part in which
    the batch of the next forward phase was still being loaded.
    """
    loads = [load for step in steps for load in step.loads]
    if not loads:
        return None
    records = sorted(
        (record for step in steps for record in step.records), key=lambda each: each.start_s
    )
    forward_starts_s = [record.start_s for record in records if record.phase == "forward"]
    held_up_s = 0.0
    for start_s, end_s in idle_times(steps, records):
        begun = bisect.bisect_left(forward_starts_s, end_s)
        if begun < len(loads):  # batches are trained with in the order of their records
            waited_for = loads[begun]
            wait_s = min(end_s, waited_for.end_s) - max(start_s, waited_for.start_s)
            held_up_s += max(0.0, wait_s)
    loads_s = [load.end_s - load.start_s for load in loads]
    total_s = sum(step.step_s for step in steps)
    load_s, train_s = statistics.fmean(loads_s), (total_s - held_up_s) / len(loads)
    return Loading(
        held_up=held_up_s / total_s,
        load_s=load_s,
        longest_load_s=max(loads_s),
        train_s=train_s,
        loaders=1 + max(load.loader for load in loads),
        enough_loaders=max(1, math.ceil(load_s / train_s)),
        cpus=format_cpu_list(cpus),
    )


def idle_times(
    steps: Iterable[StepResult], records: Sequence[PhaseRecord]
) -> Iterator[tuple[float, float]]:
    """The times within steps at which no phase ran, of all phases by start time."""
    position, busy_until_s = 0, -math.inf
    for step in steps:
        idle_since_s = max(step.synced_s - step.step_s, busy_until_s)
        while position < len(records) and records[position].start_s < step.synced_s:
            record = records[position]
            if record.start_s > idle_since_s:
                yield idle_since_s, record.start_s
            busy_until_s = max(busy_until_s, record.end_s)
            idle_since_s = max(idle_since_s, record.end_s)
            position += 1
        if idle_since_s < step.synced_s:
            yield idle_since_s, step.synced_s


def loading_lines(loading: Loading | None) -> list[str]:
    """A line if loading held training up, and what `-j` would do about it."""
    if loading is None or loading.held_up < HELD_UP_IN_SUMMARY:
        return []
    who = "loaders" if loading.loaders else "loading in the main thread (-j 0)"
    line = (
        f"{who} held training up for {100 * loading.held_up:.0f} % of the time: a batch takes "
        f"{loading.load_s:.3g} s to load and {loading.train_s:.3g} s to train with"
    )
    if loading.enough_loaders > loading.loaders:
        line += (
            f"; -j {loading.enough_loaders} would keep up, if each had a core to itself; "
            f"loaders have cores {loading.cpus} (--loader-cores)"
        )
    else:
        line += f"; -j {loading.loaders} keeps up in the mean, but the longest load took "
        line += f"{loading.longest_load_s:.3g} s"
    return [line]
