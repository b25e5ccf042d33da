"""Which logical CPUs each group gets, and how ranks share a machine out: pure decisions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from split_affinity.errors import UserError
from split_affinity.files import read_text
from split_affinity.machine.topology import Core, Topology, cpus_of
from split_affinity.options.settings import CoreSettings
from split_affinity.text import format_cpu_list, plural, shown


@dataclass(frozen=True)
class Group:
    """The logical CPUs (ascending) of one lane, the number of its threads, and on how many physical
    cores the CPUs are.
    """

    name: str
    cpus: tuple[int, ...]
    threads: int
    cores: int = 1

    @functools.cached_property
    def cpu_set(self) -> frozenset[int]:
        """The logical CPUs, made once: every thread of every phase is compared with them."""
        return frozenset(self.cpus)

    def busy(self, cpu_s: float, elapsed_s: float) -> float:
        """CPU time as a share of what the group can use: the time of its cores; with more threads
        than cores, of as many of its logical CPUs as there are threads.
        """
        return cpu_s / (elapsed_s * max(self.cores, min(self.threads, len(self.cpus))))

    def __str__(self) -> str:
        return f"cores {format_cpu_list(self.cpus)}, {plural(self.threads, 'thread')}"


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds that the phases take while nothing else runs; of one micro-batch, where it counts."""

    forward_s: float
    backward_s: float
    update_s: float
    refresh_s: float
    reduce_s: float = 0.0


@dataclass(frozen=True)
class CorePlan:
    """Which cores do what. With `--split none`, forward and backward are the same group; with
    `--split auto`, `measured` are the phases' times by number of cores.
    """

    split: str
    forward: Group
    backward: Group
    loader_cpus: tuple[int, ...]
    notes: tuple[str, ...] = ()
    measured: dict[int, PhaseTimes] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that get a lane."""
        return (self.forward,) if self.forward is self.backward else (self.forward, self.backward)

    def group(self, lane: str) -> Group:
        """The group of a lane."""
        return self.forward if lane == self.forward.name else self.backward


def plan_cores(topology: Topology, settings: CoreSettings) -> CorePlan:
    """Decide which logical CPUs each group gets. Pure; raises UserError for what cannot be.

    Without lists the cores are shared out in the ratio of `--split`, rounded to whole physical
    cores (a tie goes to the backward group), each group at least one. Groups have the same mix of
    fast and slow cores, and sockets, NUMA nodes and L3 domains stay whole where the sizes allow.
    """
    check_core_options(topology, settings)
    usable, notes = usable_cores(topology), []
    if settings.split == "none":
        threads = settings.forward_threads or settings.backward_threads
        forward = backward = make_group(topology, "all", cpus_of(usable), threads)
    else:
        cpus = settings.forward_cores, settings.backward_cores
        if cpus == (None, None):
            cpus = divide_cores(usable, settings.split.replace("even", "1:1"))
            notes += ratio_notes(usable, settings.split)
        forward = make_group(topology, "forward", cpus[0], settings.forward_threads)
        backward = make_group(topology, "backward", cpus[1], settings.backward_threads)
    notes += plan_notes(topology, forward, backward)
    loader_cpus = settings.loader_cores or forward.cpus
    return CorePlan(split_name(settings), forward, backward, loader_cpus, tuple(notes))


def split_name(settings: CoreSettings) -> str:
    """How the cores were asked to be divided: `lists` where they were given by hand."""
    return "lists" if settings.forward_cores else settings.split


def check_core_options(topology: Topology, settings: CoreSettings) -> None:
    """Raise UserError for core options that contradict each other, the machine or the system."""
    lists = {
        "--forward-cores": settings.forward_cores,
        "--backward-cores": settings.backward_cores,
        "--loader-cores": settings.loader_cores,
    }
    given = {flag: cpus for flag, cpus in lists.items() if cpus}
    if not topology.has_affinity and (given or settings.split != "none"):
        asked = next(iter(given), f"--split {settings.split}")
        system = "its system" if settings.machine else platform.system()
        reason = f"{system} cannot keep threads on cores"
        if topology.affinity_refused:
            reason = f"the system keeps no thread on cores ({topology.affinity_refused})"
        raise UserError(f"{asked}: {reason}; only --split none works")
    for flag, cpus in given.items():
        check_cpus(topology, flag, cpus)
    for flag, other in itertools.permutations(("--forward-cores", "--backward-cores")):
        if flag in given and other not in given:
            raise UserError(f"{flag} {format_cpu_list(given[flag])} needs {other} beside it")
    forward, backward = settings.forward_cores, settings.backward_cores
    if forward and settings.split != "even":
        raise UserError(f"--split {settings.split} contradicts --forward-cores: give one of them")
    if forward and (both := set(forward) & set(backward)):
        first, other, twice = map(format_cpu_list, (forward, backward, both))
        raise UserError(f"--forward-cores {first} and --backward-cores {other} overlap in {twice}")
    threads = settings.forward_threads or settings.backward_threads
    if settings.split == "auto" and threads:
        raise UserError(f"--split auto chooses the thread counts itself: {threads} cannot be given")
    if settings.split == "none" and settings.forward_threads and settings.backward_threads:
        raise UserError("--split none has one lane: give --forward-threads alone")


def check_cpus(topology: Topology, flag: str, cpus: Sequence[int]) -> None:
    """Raise UserError for the first CPU of a list that is not online and allowed."""
    for cpu in sorted(set(cpus) - topology.allowed):
        if cpu in topology.online:
            reason = "not allowed for this process"
        else:
            reason = "offline" if cpu in topology.offline else "not in this machine"
        asked, allowed = format_cpu_list(cpus), format_cpu_list(topology.allowed)
        raise UserError(f"{flag} {asked}: CPU {cpu} is {reason} (allowed: {allowed})")


def usable_cores(topology: Topology) -> list[Core]:
    """The cores, cut down to their allowed CPUs, that the CPU quota leaves room for; of these the
    ones that are idle now, if that is known (see idle_first).
    """
    cores = [
        dataclasses.replace(core, cpus=cpus)
        for core in topology.cores
        if (cpus := tuple(cpu for cpu in core.cpus if cpu in topology.allowed))
    ]
    room = len(cores) if topology.quota_cpus is None else max(1, math.floor(topology.quota_cpus))
    return sorted(idle_first(cores, core_loads(topology), room)) if room < len(cores) else cores


BUSY_SHARE = 0.1  # a core that others use for longer is not idle
DOMAINS = "package", "node", "l3"


def core_loads(topology: Topology) -> dict[int, float]:
    """How busy a logical CPU's core is, its busiest hardware thread: others slow that down, too."""
    return {
        cpu: max(topology.busy.get(each, 0.0) for each in core.cpus)
        for core in topology.cores
        for cpu in core.cpus
    }


def idle_first(cores: Sequence[Core], load: dict[int, float], count: int) -> list[Core]:
    """The `count` cores to take beside others' work, of which `load` tells by logical CPU: idle
    ones, the fastest of them; in one L3 domain, node or package, if one has so many, and in that
    with the least work. If no core is busy these are the first; if too few are idle, the least
    busy ones join them.
    """
    fastest_first = sorted(cores, key=lambda core: -core.capacity)
    busy = [core for core in cores if load[core.cpus[0]] > BUSY_SHARE]
    idle = [core for core in fastest_first if core not in busy]
    fast = [core for core in idle if core.capacity == idle[0].capacity]
    if not busy:
        return fastest_first[:count]
    if len(idle) < count:
        return (idle + sorted(busy, key=lambda core: load[core.cpus[0]]))[:count]
    for depth in range(len(DOMAINS), 0, -1):
        place = operator.attrgetter(*DOMAINS[:depth])
        domains = {place(core): [] for core in fast}
        for core in fast:
            domains[place(core)].append(core)
        fitting = [there for there in domains.items() if len(there[1]) >= count]
        if fitting:
            works = Counter(map(place, busy))
            _, chosen = min(fitting, key=lambda there: works[there[0]])
            return choose_cores(chosen, count, DOMAINS[depth:])
    return idle[:count]


def why_these(topology: Topology, used: Sequence[Core]) -> str:
    """Which cores were taken under a CPU quota, and why; empty where nobody knows who is busy."""
    if not topology.busy:
        return ""
    cpus, load = cpus_of(used), core_loads(topology)
    here = f"CPU{'s' if len(cpus) > 1 else ''} {format_cpu_list(cpus)}"
    allowed = [core for core in topology.cores if not topology.allowed.isdisjoint(core.cpus)]
    busy = [core for core in allowed if load[core.cpus[0]] > BUSY_SHARE]
    taken = sum(load[core.cpus[0]] > BUSY_SHARE for core in used)
    if not busy:
        return f", {here}: the first, since all are idle"
    if not taken:
        return f", {here}: idle now, while others work on {plural(len(busy), 'core')}"
    return f", {here}: the least busy ones, since others work on {plural(len(busy), 'core')}"


@dataclass(frozen=True)
class Host:
    """Where a rank is, as it says itself: its machine (`kernel` is the same for all processes of
    one), the machine's name, and what of it the rank may use.
    """

    kernel: str
    name: str
    topology: Topology
    torch_version: str


def this_host(topology: Topology) -> Host:
    """The machine of this process, told apart by the id that the kernel draws when it starts."""
    name = shown(platform.node())
    kernel = read_text(Path("/proc/sys/kernel/random/boot_id")) or name
    return Host(kernel, name, topology, str(torch.__version__))


def rank_topology(hosts: Sequence[Host], rank: int) -> Topology:
    """What a rank may use: its part of the CPUs that are allowed to it and to others on the same
    machine, as they have not been given any of their own.

    Ranks with the same allowed CPUs share them out; a mask that a launcher has set for one rank
    (mpirun --bind-to, taskset) stays as it is. Of a CPU quota and of the
    memory each rank of the machine has the same part. bfloat16 is native if it is so for all ranks.
    Pure; raises UserError if there are more ranks than cores.
    """
    own = hosts[rank]
    there = [number for number, host in enumerate(hosts) if host.kernel == own.kernel]
    allowed = own.topology.allowed
    sharing = [number for number in there if hosts[number].topology.allowed == allowed]
    part = len(sharing) / len(there)
    quota = own.topology.quota_cpus and own.topology.quota_cpus * part
    # All of them go by what the first one saw: their sets must fit together.
    busy = hosts[sharing[0]].topology.busy
    cores = usable_cores(dataclasses.replace(own.topology, quota_cpus=quota, busy=busy))
    if len(sharing) > len(cores):
        limit = "" if own.topology.quota_cpus is None else ", with the CPU quota"
        raise UserError(
            f"{len(sharing)} ranks on {own.name}: more than its {plural(len(cores), 'core')} that "
            f"can be used (allowed: {format_cpu_list(allowed)}{limit}); start fewer"
        )
    share = cpus_of(share_out(cores, len(sharing))[sharing.index(rank)])
    return dataclasses.replace(
        own.topology,
        allowed=frozenset(share),
        memory_bytes=own.topology.memory_bytes / len(there),
        bf16=own.topology.bf16 if all(host.topology.bf16 for host in hosts) else "",
    )


def share_out(cores: Sequence[Core], ranks: int) -> list[list[Core]]:
    """The cores of each rank: as many as of any other or one more, with the same mix of fast and
    slow ones; sockets, NUMA nodes and L3 domains stay whole where the sizes allow.
    """
    left, shares = list(cores), []
    for others in reversed(range(ranks)):
        count = -(-len(left) // (others + 1))
        chosen = [
            core for kind, part in share_by_kind(left, count) for core in choose_cores(kind, part)
        ]
        shares.append(sorted(chosen))
        left = [core for core in left if core not in chosen]
    return shares


def plan_notes(topology: Topology, forward: Group, backward: Group) -> Iterator[str]:
    """What the user should know about an allocation."""
    used_cpus = forward.cpu_set | backward.cpu_set
    used, allowed = (
        sum(not cpus.isdisjoint(core.cpus) for core in topology.cores)
        for cpus in (used_cpus, topology.allowed)
    )
    if topology.quota_cpus is not None and topology.quota_cpus < allowed:
        quota = f"CPU quota of {topology.quota_cpus:g} CPUs"
        usable = usable_cores(topology)
        why = why_these(topology, usable) if {*cpus_of(usable)} == used_cpus else ""
        yield f"{quota}: {used} of {plural(allowed, 'allowed core')} used{why}"
    if topology.affinity_refused:
        yield f"the system keeps no thread on cores ({topology.affinity_refused})"
    if forward is not backward and forward.cpus == backward.cpus:
        yield "one core: both groups share it, nothing is separated"
    for core in topology.cores if forward.cpus != backward.cpus else ():
        if set(core.cpus) & set(forward.cpus) and set(core.cpus) & set(backward.cpus):
            name = f"core {core.core_id} of socket {core.package}"
            cpus = f"CPUs {format_cpu_list(core.cpus)}"
            yield f"{name} ({cpus}) is in both groups, by different hardware threads"
    for group in dict.fromkeys((forward, backward)):
        if group.threads > len(group.cpus):
            yield f"{group.name}: {group.threads} threads on {plural(len(group.cpus), 'CPU')}"


def make_group(topology: Topology, name: str, cpus: Sequence[int], threads: int | None) -> Group:
    """A group of logical CPUs; by default with one thread per physical core among them."""
    cores = sum(not set(cpus).isdisjoint(core.cpus) for core in topology.cores)
    return Group(name, tuple(cpus), threads or cores, cores)


def divide_cores(cores: Sequence[Core], split: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The CPUs of the forward and the backward group, in the ratio of `split`.

    A single core is divided into its hardware threads; if it has but one, both groups get it.
    """
    cores = divisible(cores)
    if len(cores) == 1:
        return cores[0].cpus, cores[0].cpus
    count = forward_count(len(cores), *map(int, split.split(":")))
    forward = [
        core for kind, share in share_by_kind(cores, count) for core in choose_cores(kind, share)
    ]
    return cpus_of(forward), cpus_of(core for core in cores if core not in forward)


def divisible(cores: Sequence[Core]) -> Sequence[Core]:
    """What a group cannot have a part of: cores; of a single core its hardware threads, each as a
    core of its own.
    """
    if len(cores) > 1:
        return cores
    return [dataclasses.replace(cores[0], cpus=(cpu,)) for cpu in cores[0].cpus]


def ratio_notes(cores: Sequence[Core], split: str) -> Iterator[str]:
    """What became of a ratio that was asked for, if so many cores cannot be divided in it."""
    count = len(divisible(cores))
    if split == "even" or count == 1:
        return
    forward, backward = map(int, split.split(":"))
    given = forward_count(count, forward, backward)
    if given * backward != (count - given) * forward:
        what = "core" if len(cores) > 1 else "hardware thread"
        yield f"split {split} of {plural(count, what)} became {given}:{count - given}"


def forward_count(count: int, forward: int, backward: int) -> int:
    """How many of `count` cores come nearest to forward:backward; a tie goes to the backward
    group, and each group gets at least one.
    """
    parts = forward + backward
    nearest = -((parts - 2 * count * forward) // (2 * parts))  # ceil(count * share - 1/2)
    return min(max(nearest, 1), count - 1)


def share_by_kind(cores: Sequence[Core], count: int) -> list[tuple[list[Core], int]]:
    """Each kind of core, fastest first, with its part of `count`, by largest remainders.

    A tie goes to the slower kind, so that the other group gets the faster core.
    """
    by_speed = sorted(cores, key=lambda core: -core.capacity)
    kinds = [list(kind) for _, kind in itertools.groupby(by_speed, lambda core: core.capacity)]
    shares = [len(kind) * count // len(cores) for kind in kinds]
    remainders = [len(kind) * count % len(cores) for kind in kinds]
    order = sorted(range(len(kinds)), key=lambda index: (-remainders[index], -index))
    for index in order[: count - sum(shares)]:
        shares[index] += 1
    return list(zip(kinds, shares, strict=True))


def choose_cores(cores: Sequence[Core], count: int, levels: Sequence[str] = DOMAINS) -> list[Core]:
    """Choose `count` cores so that at each level at most one domain is split."""
    if count in (0, len(cores)) or not levels:
        return list(cores[:count])
    domains: dict[int, list[Core]] = {}
    for core in cores:
        domains.setdefault(getattr(core, levels[0]), []).append(core)
    parts = list(domains.values())
    whole = fullest_subset([len(part) for part in parts], count)
    chosen = [core for index in whole for core in parts[index]]
    if len(chosen) < count:  # any domain left over is larger than what is missing
        rest = next(part for index, part in enumerate(parts) if index not in whole)
        chosen += choose_cores(rest, count - len(chosen), levels[1:])
    return chosen


def fullest_subset(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    """Indices of sizes with the largest sum that does not exceed `limit`; early ones preferred."""
    subsets: dict[int, tuple[int, ...]] = {0: ()}
    for index, size in enumerate(sizes):
        for total, subset in list(subsets.items()):
            if total + size <= limit:
                subsets.setdefault(total + size, (*subset, index))
    return subsets[max(subsets)]
