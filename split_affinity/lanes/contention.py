"""Who else uses the cores of a plan: the CPUs' busy time less this process's own."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from split_affinity.lanes.audit import LOOK_SHARE, children_cpu_ns, cpu_times, thread_clocks_ns
from split_affinity.machine.plan import CorePlan

CONTENTION_SHARE = 0.1  # of a lane's cores: if others take that much, it is told


@dataclass(frozen=True)
class Contention:
    """What others took of the cores between two moments (seconds of time.perf_counter): `others`,
    by lane, is the time that other processes used of the lane's logical CPUs, as a share of what
    the lane can use (Group.busy), 1 at most; `stolen` is the share of all used CPUs' time that the
    hypervisor gave to other virtual machines.
    """

    start_s: float
    end_s: float
    others: dict[str, float]
    stolen: float


@dataclass(frozen=True)
class Usage:
    """What clocks showed at one moment. Seconds, by online logical CPU: `busy_s` with processes,
    whosever they are, and `stolen_s` by the hypervisor. Nanoseconds of CPU time: of each thread of
    this process, of all its threads that ever were, and of the processes that it started.
    """

    at_s: float
    busy_s: list[float]
    stolen_s: list[float]
    threads_ns: dict[int, int]
    process_ns: int
    children_ns: int


def read_usage(known: Collection[int] = ()) -> Usage:
    """Read the clocks; `known` are the threads of an earlier reading. Interrupts are left out of
    what is busy: no process is to blame for them.
    """
    at_s, cpus = time.perf_counter(), cpu_times()
    return Usage(
        at_s=at_s,
        busy_s=[times.user + times.nice + times.system for times in cpus],
        stolen_s=[getattr(times, "steal", 0.0) for times in cpus],
        threads_ns=thread_clocks_ns(known),
        process_ns=time.process_time_ns(),
        children_ns=children_cpu_ns(),
    )


def own_time_s(
    before: Usage, after: Usage, loader_cpus: Iterable[int], online: Iterable[int]
) -> Counter[frozenset[int]]:
    """CPU seconds that this process and its children used between two readings, by the logical CPUs
    on which that can have been: threads by their masks, children on those of the loaders, threads
    that have ended anywhere.
    """
    used_s: Counter[frozenset[int]] = Counter()
    for tid, now_ns in after.threads_ns.items():
        with contextlib.suppress(OSError):  # ended just now
            mask = frozenset(os.sched_getaffinity(tid))
            used_s[mask] += max(0, now_ns - before.threads_ns.get(tid, 0)) / 1e9
    process_s = (after.process_ns - before.process_ns) / 1e9
    used_s[frozenset(online)] += max(0.0, process_s - used_s.total())
    used_s[frozenset(loader_cpus)] += max(0, after.children_ns - before.children_ns) / 1e9
    return used_s


def less_own_s(
    busy_s: dict[frozenset[int], float], own_s: dict[frozenset[int], float]
) -> dict[frozenset[int], float]:
    """What is left of the busy seconds of some sets of CPUs, none of which overlap, without the
    own time (see own_time_s); never below 0. Time that can have been in several sets is taken from
    each in proportion to what is left there, after all that can have been in fewer.
    """
    left_s = dict(busy_s)
    spread = [([cpus for cpus in busy_s if cpus & mask], used_s) for mask, used_s in own_s.items()]
    for places, used_s in sorted(spread, key=lambda each: len(each[0])):
        total_s = sum(left_s[cpus] for cpus in places)
        for cpus in places:
            left_s[cpus] *= max(0.0, 1 - used_s / total_s) if total_s else 0.0
    return left_s


def contention_between(
    plan: CorePlan, online: Sequence[int], before: Usage, after: Usage
) -> Contention | None:
    """What others took between two readings; None where the system hides the times of some CPUs, or
    has no affinity, by which own time is known.
    """
    whole = len(online) == len(before.busy_s) == len(after.busy_s)
    if not whole or not hasattr(os, "sched_getaffinity"):
        return None
    elapsed_s = after.at_s - before.at_s
    busy_s, stolen_s = (
        dict(zip(online, map(operator.sub, now_s, then_s), strict=True))
        for now_s, then_s in ((after.busy_s, before.busy_s), (after.stolen_s, before.stolen_s))
    )
    lanes = {group.cpu_set for group in plan.groups}
    sets = [*lanes, frozenset(online).difference(*lanes)]
    busy = {cpus: sum(busy_s[cpu] for cpu in cpus) for cpus in sets}
    left_s = less_own_s(busy, own_time_s(before, after, plan.loader_cpus, online))
    others = {group.name: group.busy(left_s[group.cpu_set], elapsed_s) for group in plan.groups}
    used = {*plan.loader_cpus}.union(*lanes)
    return Contention(
        start_s=before.at_s,
        end_s=after.at_s,
        others={lane: min(1.0, share) for lane, share in others.items()},
        stolen=min(1.0, sum(stolen_s[cpu] for cpu in used) / (elapsed_s * len(used))),
    )


class ContentionMonitor:
    """Looks who else uses the cores of a plan, from when it is made.

    CPUs' times come in ticks of 10 ms, and are off by about 1 % over a second. What another process
    runs on a hardware thread that is in no lane, beside one that is, goes unseen.
    """

    def __init__(self, plan: CorePlan, online: Sequence[int]):
        self._plan, self._online = plan, online
        self._cost_s = 0.0
        self._latest = read_usage()

    def look(self, least_s: float = 1.0) -> Contention | None:
        """What others took since the latest look; None if that is less than `least_s` ago, or so
        little that looks would cost more than LOOK_SHARE of the time (with 0 it may cost what it
        does), or if nobody can tell.
        """
        start_s, before = time.perf_counter(), self._latest
        if least_s and start_s - before.at_s < max(least_s, self._cost_s / LOOK_SHARE):
            return None
        self._latest = read_usage(before.threads_ns)
        contention = contention_between(self._plan, self._online, before, self._latest)
        self._cost_s = time.perf_counter() - start_s
        return contention


def mean_contention(contentions: Sequence[Contention]) -> Contention:
    """What others took in several spans, one after the other: the mean by time."""
    lengths_s = [each.end_s - each.start_s for each in contentions]

    def mean(shares: Iterable[float]) -> float:
        return math.fsum(map(operator.mul, shares, lengths_s)) / sum(lengths_s)

    others = {
        lane: mean(each.others[lane] for each in contentions) for lane in contentions[0].others
    }
    stolen = mean(each.stolen for each in contentions)
    return Contention(contentions[0].start_s, contentions[-1].end_s, others, stolen)
