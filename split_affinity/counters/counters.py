"""All that is counted in a phase beside its clocks: of threads, of the hardware, of the machine.

Counters are read with the audit's closer looks alone, so that they too stay within its share of the
time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from split_affinity.counters.clocks import Clocks
from split_affinity.counters.dram import MemoryTraffic
from split_affinity.counters.energy import Energy
from split_affinity.counters.memory import Memory
from split_affinity.counters.perf_events import HARDWARE_EVENTS, PerfEvents
from split_affinity.counters.source import Source
from split_affinity.counters.threads import SCHED_NAMES, STAT_FIELDS, ThreadCounts
from split_affinity.machine.plan import CorePlan
from split_affinity.options.settings import ReportSettings

# What adds up over phases, and what is as it is at a phase's end. OF_THREADS are whole numbers.
OF_THREADS = *SCHED_NAMES.values(), *STAT_FIELDS
SUMS = (
    *OF_THREADS,
    *("task_clock_s", *HARDWARE_EVENTS),
    *("dram_read_bytes", "dram_written_bytes", "package_j", "dram_j"),
)
STATES = "clock_mhz", "resident_bytes", "node_bytes"


class Counters:
    """Some sources as one; without any it reads nothing, and costs nothing."""

    def __init__(self, sources: Sequence[Source] = ()):
        self._sources = sources
        self._energy = next((each for each in sources if isinstance(each, Energy)), None)
        self._energy_before: Any = None

    def __bool__(self) -> bool:
        return bool(self._sources)

    def watch(self, lane: str, threads: Iterable[int]) -> None:
        """Count for these threads of a lane, by kernel id."""
        threads = sorted(threads)
        for source in self._sources:
            source.watch(lane, threads)

    def read(self, lane: str) -> list[Any]:
        """The readings before a phase, or after it."""
        return [source.read(lane) for source in self._sources]

    def between(self, lane: str, before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
        """What was counted between two readings, by the names of SUMS and STATES."""
        counts: dict[str, Any] = {}
        for source, *readings in zip(self._sources, before, after, strict=True):
            counts |= source.between(lane, *readings)
        return counts

    def step_energy_j(self) -> float | None:
        """Joules of the whole machine since the last call; None if unknown, and at first."""
        if not self._energy or "package_j" in self._energy.missing:
            return None
        now, before = self._energy.read(), self._energy_before
        self._energy_before = now
        return sum(self._energy.between("", before, now).values()) if before else None

    def notes(self) -> list[str]:
        """What is not counted on this machine, and why, in a line for each reason."""
        by_reason: dict[str, list[str]] = {}
        for source in self._sources:
            for name, reason in source.missing.items():
                by_reason.setdefault(reason, []).append(name)
        lines = [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        others = [note for source in self._sources for note in source.notes]
        return [f"not counted: {line}" for line in lines] + others

    def close(self) -> None:
        """Stop counting."""
        with contextlib.ExitStack() as stack:
            for source in self._sources:
                stack.callback(source.close)


NO_COUNTERS = Counters()


def open_counters(settings: ReportSettings, plan: CorePlan) -> Counters:
    """The counters that `--phases` and `--counters` ask for."""
    sources: list[Source] = []
    if settings.phases or settings.counters:
        sources.append(ThreadCounts())
    if settings.counters:
        cpus = sorted(plan.forward.cpu_set | plan.backward.cpu_set)
        sources += [PerfEvents(), MemoryTraffic(), Energy(), Clocks(cpus)]
    if sources:
        sources.append(Memory())
    return Counters(sources)
