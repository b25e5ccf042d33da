"""What another trainer does in a round of a measurement, step by step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from split_affinity.compare.loops import WayRound
from split_affinity.compare.ways import Way
from split_affinity.errors import RunError
from split_affinity.lanes.contention import CONTENTION_SHARE, ContentionMonitor
from split_affinity.reports.summary import peak_memory_bytes
from split_affinity.training.steps import StepResult

# Makes so many optimizer steps, and calls the function after each, when its loss is known.
Loop = Callable[[int, Callable[[], None]], None]


@dataclass(frozen=True)
class PeerRound:
    """What one way did in a round; `first_step_s` is that of the step left out, if known."""

    images_per_s: float
    first_step_s: float | None
    disturbed: str  # who took how much of its cores; empty if nobody took CONTENTION_SHARE
    peak_memory_bytes: int


def summed_up(made: WayRound, first_step_s: float | None = None) -> PeerRound:
    """A round's figures, by its median step."""
    share, who = made.disturbance
    disturbed = who if share >= CONTENTION_SHARE else ""
    return PeerRound(made.images_per_s, first_step_s, disturbed, made.peak_memory_bytes)


def timed_round(loop: Loop, way: Way, online: Sequence[int], steps: int) -> PeerRound:
    """Have a loop make a step that is left out, and those to time; RunError if it makes fewer."""
    ends_s = [time.perf_counter()]
    monitor = contention = None

    def step_done() -> None:
        nonlocal monitor, contention
        ends_s.append(time.perf_counter())
        if len(ends_s) == 2:
            monitor = ContentionMonitor(way.plan, online)
            ends_s[1:] = [ends_s[1], time.perf_counter()]  # the reading takes time
        elif len(ends_s) == steps + 3:
            contention = monitor.look(0)

    loop(steps + 1, step_done)
    if len(ends_s) != steps + 3:
        raise RunError(f"{way.name}: it made {max(0, len(ends_s) - 2)} of {steps + 1} steps")
    start_s, first_s, *others_s = ends_s
    images = way.settings.batch_size
    pairs = zip(others_s, others_s[1:], strict=False)
    timed = [StepResult(0, 0.0, images, end_s - begin_s, ()) for begin_s, end_s in pairs]
    timed[-1] = dataclasses.replace(timed[-1], contention=contention)
    made = WayRound(tuple(timed), {}, None, {}, peak_memory_bytes())
    return summed_up(made, first_s - start_s)
