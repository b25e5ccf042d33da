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

CONTENTION_SHARE = 0.1  # of a lane's cores: if others take that much, the user is told


@dataclass(frozen=True)
class Contention:
    """What others took of the cores between two moments (seconds of time.perf_counter)."""

    start_s: float
    end_s: float
    others: dict[str, float]  # by lane: other processes' share of what it can use (Group.busy)
    stolen: float  # the hypervisor's share of all used CPUs, for other virtual machines


@dataclass(frozen=True)
class Usage:
    """What clocks showed at one moment."""

    at_s: float
    busy_s: list[float]  # by online logical CPU: with anybody's processes
    stolen_s: list[float]  # likewise: by the hypervisor
    threads_ns: dict[int, int]  # CPU time of this process's threads, by id
    process_ns: int  # of all its threads that ever were
    children_ns: int  # of the processes that it started


def read_usage(known: Collection[int] = ()) -> Usage:
    """Read the clocks; `known` are the threads of an earlier reading."""
    at_s, cpus = time.perf_counter(), cpu_times()
    return Usage(
        at_s=at_s,
        # Without interrupts: no process is to blame for them.
        busy_s=[times.user + times.nice + times.system for times in cpus],
        stolen_s=[getattr(times, "steal", 0.0) for times in cpus],
        threads_ns=thread_clocks_ns(known),
        process_ns=time.process_time_ns(),
        children_ns=children_cpu_ns(),
    )


def own_time_s(
    before: Usage, after: Usage, loader_cpus: Iterable[int], online: Iterable[int]
) -> Counter[frozenset[int]]:
    """CPU seconds of this process and its children between two readings, by the CPUs possible for
    them: a thread's mask, the loaders' CPUs for children, all CPUs for ended threads.
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


def subtract_own_time(
    busy_s: dict[frozenset[int], float], own_s: dict[frozenset[int], float]
) -> dict[frozenset[int], float]:
    """The busy seconds of disjoint sets of CPUs without the own time (see own_time_s), 0 at least.

    Own time that only one set can have had goes first. Time that several sets can have had is taken
    from each of them, in proportion to what is left there.
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
    """What others took between two readings; None if the system hides some CPUs, or all masks."""
    complete = len(online) == len(before.busy_s) == len(after.busy_s)
    if not complete or not hasattr(os, "sched_getaffinity"):
        return None
    elapsed_s = after.at_s - before.at_s
    busy_s = dict(zip(online, map(operator.sub, after.busy_s, before.busy_s), strict=True))
    stolen_s = dict(zip(online, map(operator.sub, after.stolen_s, before.stolen_s), strict=True))
    lanes = {group.cpu_set for group in plan.groups}
    sets = [*lanes, frozenset(online).difference(*lanes)]
    busy = {cpus: sum(busy_s[cpu] for cpu in cpus) for cpus in sets}
    left_s = subtract_own_time(busy, own_time_s(before, after, plan.loader_cpus, online))
    others = {group.name: group.busy(left_s[group.cpu_set], elapsed_s) for group in plan.groups}
    used = {*plan.loader_cpus}.union(*lanes)
    return Contention(
        start_s=before.at_s,
        end_s=after.at_s,
        others={lane: min(1.0, share) for lane, share in others.items()},
        stolen=min(1.0, sum(stolen_s[cpu] for cpu in used) / (elapsed_s * len(used))),
    )


class ContentionMonitor:
    """Watches who else uses the cores of a plan, from when it is made.

    CPUs' times come in ticks of 10 ms, and are off by about 1 % over a second. It does not see what
    another process runs on a hardware thread outside of the lanes, beside one inside.
    """

    def __init__(self, plan: CorePlan, online: Sequence[int]):
        self._plan, self._online = plan, online
        self._cost_s = 0.0
        self._latest = read_usage()

    def look(self, least_s: float = 1.0) -> Contention | None:
        """Contention since the latest look, or None if it is too soon or unknown.

        Looks are `least_s` apart, and rarer if they would take more than LOOK_SHARE of the time.
        With 0 there is no limit.
        """
        start_s, before = time.perf_counter(), self._latest
        if least_s and start_s - before.at_s < max(least_s, self._cost_s / LOOK_SHARE):
            return None
        self._latest = read_usage(before.threads_ns)
        contention = contention_between(self._plan, self._online, before, self._latest)
        self._cost_s = time.perf_counter() - start_s
        return contention


def mean_contention(contentions: Sequence[Contention]) -> Contention:
    """The mean by time of several spans, one after the other."""
    lengths_s = [each.end_s - each.start_s for each in contentions]

    def mean(shares: Iterable[float]) -> float:
        return math.fsum(map(operator.mul, shares, lengths_s)) / sum(lengths_s)

    others = {
        lane: mean(each.others[lane] for each in contentions) for lane in contentions[0].others
    }
    stolen = mean(each.stolen for each in contentions)
    return Contention(contentions[0].start_s, contentions[-1].end_s, others, stolen)
