"""The audit: where every phase really ran, by the CPU clock and the mask of each thread.

At both ends of a phase it reads how much CPU time each thread of the process has used, and where
each may run. Knows nothing of what a phase computes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import operator
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from split_affinity.counters.counters import NO_COUNTERS, Counters
from split_affinity.files import read_text
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.text import format_cpu_list, plural

# One object each for all records without a closer look: a long run has many of them.
UNKNOWN: dict[Any, Any] = {}
NOT_LOOKED_AT = {
    "cpu_busy_s": UNKNOWN,
    "cpu_before_s": UNKNOWN,
    "seen_on": frozenset(),
    "used_on_s": UNKNOWN,
    "counts": UNKNOWN,
}
LOOK_SHARE = 0.01  # of the time may go into looking closely at each kind of phase
STRAY_WARNING_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """What one phase did. Times are seconds; start and end are of time.perf_counter.

    CPU time during two phases at once, stray time above all, counts in each. Without a closer look
    (see Lane) its fields are empty.
    """

    phase: str
    lane: str
    start_s: float
    end_s: float
    mask: frozenset[int]  # in force
    cpu_busy_s: dict[int, float]  # closer look: by CPU, busy with anything in the phase
    cpu_s: float  # CPU time of compute threads confined to the phase's group
    stray_s: float  # of compute threads that were not
    # Of the other lane's threads inside their own group: at a phase of their own, or waiting. An
    # idle OpenMP worker spins for some milliseconds before it sleeps.
    other_lane_s: float
    python_s: float  # of the main thread and the interpreter's helper threads
    seen_on: frozenset[int]  # closer look: where the group's threads were last seen
    audit_s: float = 0.0  # the audit's own time before and after the phase
    # Closer look: by CPU, `cpu_s` of the threads last seen there.
    used_on_s: dict[int, float] = field(default_factory=lambda: UNKNOWN)
    # Closer look: by CPU, busy between boot and the phase.
    cpu_before_s: dict[int, float] = field(default_factory=lambda: UNKNOWN)
    # Closer look, if asked for: what was counted (see counters/), by name.
    counts: dict[str, Any] = field(default_factory=lambda: UNKNOWN)

    @property
    def duration_s(self) -> float:
        """Wall-clock seconds."""
        return self.end_s - self.start_s


def thread_ids() -> list[int]:
    """Kernel ids of the process's threads; none if the system does not show them."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return []


def process_cpu_ns(pid: int) -> int:
    """CPU time of a process in nanoseconds, with ended threads. Raises OSError if it is gone."""
    return time.clock_gettime_ns((~pid << 3) | 2)  # clock_getcpuclockid(3)


def thread_cpu_ns(tid: int) -> int:
    """CPU time of a thread of this process in nanoseconds. Raises OSError if it has ended."""
    # pthread_getcpuclockid(3) is exact while the thread runs; its schedstat lags by up to a tick.
    return time.clock_gettime_ns((~tid << 3) | 6)


def last_cpu(tid: int) -> int:
    """The logical CPU that a thread of this process last ran on (`processor` in proc(5))."""
    stat = read_text(Path(f"/proc/self/task/{tid}/stat"))
    return int(stat.rpartition(")")[2].split()[36])


def thread_clocks_ns(known: Collection[int] = ()) -> dict[int, int]:
    """CPU time so far of each thread; without /proc, of Python's threads, and of 0 for all others.

    `known` are the threads of an earlier reading, listed again only if one has come or gone.
    """
    # A thread that is born and ends between two readings goes unseen; PyTorch starts none.
    with contextlib.suppress(OSError):
        if known and Path("/proc/self/task").stat().st_nlink == 2 + len(known):
            return dict(zip(known, map(thread_cpu_ns, known), strict=True))
    clocks, listed = {}, thread_ids()
    for tid in listed or python_threads():
        with contextlib.suppress(OSError):  # ended since it was listed
            clocks[tid] = thread_cpu_ns(tid)
    if not listed:
        clocks[0] = time.process_time_ns() - sum(clocks.values())
    return clocks


def python_threads() -> set[int]:
    """Kernel ids of the interpreter's threads; none without affinity, which tells them apart."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    return {thread.native_id for thread in threading.enumerate()}


def cpu_times() -> list[Any]:
    """Seconds since boot of each online logical CPU in each state (proc_stat(5)), if shown."""
    try:
        return psutil.cpu_times(percpu=True)
    except (OSError, ValueError, TypeError):  # no /proc/stat, or none that psutil understands
        return []


def cpu_busy_s() -> list[float]:
    """Seconds that each online logical CPU has worked since boot, for anybody."""
    names = ("user", "nice", "system", "irq", "softirq")
    return [sum(getattr(times, name, 0.0) for name in names) for times in cpu_times()]


def children_cpu_ns() -> int:
    """CPU time so far of the processes that this one started, such as loaders, ended or not."""
    living_ns = 0
    for process in multiprocessing.active_children():  # it also reaps those that have ended
        with contextlib.suppress(OSError):
            living_ns += process_cpu_ns(process.pid)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return living_ns + round(1e9 * (ended.ru_utime + ended.ru_stime))


def hidden_figures(plan: CorePlan, online: Sequence[int]) -> Iterator[str]:
    """What a run cannot know of a plan's cores, since the system does not show it."""
    if (shown := len(cpu_times())) != len(online):
        yield (
            f"/proc/stat shows the times of {shown} of {plural(len(online), 'CPU')}: how busy each "
            "was, and what others took of the cores, is unknown"
        )
    if len(plan.groups) > 1 and not thread_ids():
        yield "/proc/self/task does not show the process's threads: stray time is unknown"


@dataclass(frozen=True)
class Reading:
    """What each thread has used so far and, for a closer look, how long each CPU was busy, and what
    counters say.
    """

    threads_ns: dict[int, int]
    cpus_s: list[float] | None
    counts: list[Any]


class Audit:
    """Shares CPU time out among phases; `born_for` has the group of each lane's threads, by id."""

    def __init__(self, online: Sequence[int], counters: Counters = NO_COUNTERS):
        self.online = online
        self.counters = counters
        self.born_for: dict[int, Group] = {}
        self._known: dict[int, int] = {}  # the latest reading

    def begin(self, group: Group, look: bool) -> Reading:
        """The reading before a phase. A closer look takes some milliseconds on a large machine."""
        cpus_s = cpu_busy_s() if look else None
        counts = self.counters.read(group.name) if look else []
        # Threads' clocks are read last, and first after the phase: they are the most exact.
        return Reading(thread_clocks_ns(self._known), cpus_s, counts)

    def end(self, group: Group, before: Reading) -> dict[str, Any]:
        """The fields of a PhaseRecord, from the reading before the phase and one now."""
        self._known = threads_ns = thread_clocks_ns(before.threads_ns)
        look = before.cpus_s is not None
        counts = self.counters.read(group.name) if look else []
        after_s = cpu_busy_s() if look else []
        fields = NOT_LOOKED_AT | self.attribute(group, before.threads_ns, threads_ns, look)
        if look and self.counters:
            fields["counts"] = self.counters.between(group.name, before.counts, counts)
        if look and len(self.online) == len(before.cpus_s) == len(after_s):  # none is hidden
            busy_s = map(operator.sub, after_s, before.cpus_s)
            fields["cpu_busy_s"] = dict(zip(self.online, busy_s, strict=True))
            fields["cpu_before_s"] = dict(zip(self.online, before.cpus_s, strict=True))
        return fields

    def attribute(
        self, group: Group, before_ns: dict[int, int], after_ns: dict[int, int], look: bool = True
    ) -> dict[str, Any]:
        """Share the CPU time between two readings out over the fields of a PhaseRecord."""
        totals = Counter()
        used_on_s = Counter()
        python = python_threads() - set(self.born_for)
        for tid, now_ns in after_ns.items():
            used_s = (now_ns - before_ns.get(tid, 0)) / 1e9
            if used_s <= 0:
                continue
            try:
                mask = os.sched_getaffinity(tid) if tid else group.cpu_set
                role = thread_role(mask, group, self.born_for.get(tid), tid in python)
            except OSError:  # the thread ended just now: nobody can tell where it ran
                role = "stray_s"
            totals[role] += used_s
            if role == "cpu_s" and tid and look:
                with contextlib.suppress(IndexError):  # ended just now, or hidden
                    used_on_s[last_cpu(tid)] += used_s
        roles = ("cpu_s", "stray_s", "other_lane_s", "python_s")
        used = {role: totals[role] for role in roles}
        if look:
            used |= {"seen_on": frozenset(used_on_s), "used_on_s": dict(used_on_s)}
        return used


def thread_role(mask: Set[int], group: Group, born_for: Group | None, is_python: bool) -> str:
    """The PhaseRecord field to which a thread's CPU time belongs, during a phase of `group`."""
    if born_for and born_for.name != group.name:
        return "other_lane_s" if mask <= born_for.cpu_set else "stray_s"
    if is_python:  # the interpreter's threads coordinate and never compute
        return "python_s"
    return "cpu_s" if mask <= group.cpu_set else "stray_s"


def placement_warnings(record: PhaseRecord, plan: CorePlan) -> Iterator[str]:
    """What a phase's record shows to be wrong with the placement of threads."""
    group = plan.group(record.lane)
    cores = format_cpu_list(group.cpus)
    if record.mask != group.cpu_set:
        allowed = format_cpu_list(record.mask)
        yield f"{group.name} lane: the system allows only cores {allowed} of {cores} now"
    if record.stray_s > STRAY_WARNING_SHARE * record.duration_s:
        yield (
            f"{record.phase}: {1e3 * record.stray_s:.1f} ms of CPU time strayed from cores {cores} "
            f"in a phase of {1e3 * record.duration_s:.1f} ms"
        )
