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
from split_affinity.options.settings import CoreSettings, DataSettings
from split_affinity.options.values import SWEEP
from split_affinity.text import format_cpu_list, plural, shown

BUSY_SHARE = 0.1  # a core that others use for longer is not idle
DOMAINS = "package", "node", "l3"
LEAST_LOADERS, MOST_LOADERS, CORES_A_LOADER = 2, 16, 8  # unless --workers says how many


@dataclass(frozen=True)
class Group:
    """One lane's logical CPUs (ascending), its number of threads, and of physical cores."""

    name: str
    cpus: tuple[int, ...]
    threads: int
    cores: int = 1

    @functools.cached_property
    def cpu_set(self) -> frozenset[int]:
        """The logical CPUs, made once: every thread of every phase is compared with them."""
        return frozenset(self.cpus)

    def busy(self, cpu_s: float, elapsed_s: float) -> float:
        """CPU time as a share of that of the group's cores, or of its threads' CPUs if more."""
        return cpu_s / (elapsed_s * max(self.cores, min(self.threads, len(self.cpus))))

    def __str__(self) -> str:
        return f"cores {format_cpu_list(self.cpus)}, {plural(self.threads, 'thread')}"


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of each phase while nothing else runs, of one micro-batch where it counts."""

    forward_s: float
    backward_s: float
    update_s: float
    refresh_s: float
    reduce_s: float = 0.0


@dataclass(frozen=True)
class CorePlan:
    """Which cores do what. With `--split none`, forward and backward are the same group."""

    split: str
    forward: Group
    backward: Group
    loader_cpus: tuple[int, ...]
    notes: tuple[str, ...] = ()
    measured: dict[int, PhaseTimes] = field(default_factory=dict)  # by cores, for --split auto

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that get a lane."""
        return (self.forward,) if self.forward is self.backward else (self.forward, self.backward)

    @property
    def cores(self) -> int:
        """The number of physical cores of the lanes."""
        return sum(group.cores for group in self.groups)

    def group(self, lane: str) -> Group:
        """The group of a lane."""
        return self.forward if lane == self.forward.name else self.backward


def loader_count(settings: DataSettings, cores: int) -> int:
    """The loader processes of a run, or of a rank, on so many physical cores."""
    if settings.workers is not None:
        return settings.workers
    # ResNet-50 takes about a tenth of a second of one core for an image, and a loader 10 to 20 ms
    # for a photograph: so one loader feeds about eight cores. They share the forward group's cores,
    # from which more would take time. Each needs up to 0.5 GiB, and with a validation there are
    # twice as many: so there is an end to it.
    return min(max(LEAST_LOADERS, cores // CORES_A_LOADER), MOST_LOADERS)


def plan_cores(topology: Topology, settings: CoreSettings) -> CorePlan:
    """Decide which logical CPUs each group gets. Raises UserError for impossible requests.

    Without lists the ratio of `--split` is rounded to whole physical cores (a tie goes to the
    backward group), at least one for each group. Both groups have the same mix of fast and slow
    cores; sockets, NUMA nodes and L3 domains stay whole where the sizes allow.
    """
    check_core_options(topology, settings)
    usable, notes = usable_cores(topology), []
    if settings.split == "none":
        threads = settings.forward_threads or settings.backward_threads
        forward = backward = make_group(topology, "all", cpus_of(usable), threads)
    else:
        cpus = settings.forward_cores, settings.backward_cores
        if cpus == (None, None):
            *cpus, notes = divide_cores(usable, settings.split)
        forward = make_group(topology, "forward", cpus[0], settings.forward_threads)
        backward = make_group(topology, "backward", cpus[1], settings.backward_threads)
    notes += plan_notes(topology, forward, backward)
    loader_cpus = settings.loader_cores or forward.cpus
    return CorePlan(split_name(settings), forward, backward, loader_cpus, tuple(notes))


def split_name(settings: CoreSettings) -> str:
    """The `--split` in force; `lists` if the cores are listed."""
    return "lists" if settings.forward_cores else settings.split


def make_group(topology: Topology, name: str, cpus: Sequence[int], threads: int | None) -> Group:
    """A group of logical CPUs; by default with one thread per physical core among them."""
    cores = topology.count_cores(cpus)
    return Group(name, tuple(cpus), threads or cores, cores)


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
        system = f"the system of {topology.name}" if topology.recorded_in else platform.system()
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
    if settings.split in ("auto", SWEEP) and threads:
        asked = f"--split {settings.split}"
        raise UserError(f"{asked} chooses the thread counts itself: {threads} cannot be given")
    if settings.split == "none" and settings.forward_threads and settings.backward_threads:
        raise UserError("--split none has one lane: give --forward-threads alone")


def check_cpus(topology: Topology, flag: str, cpus: Sequence[int]) -> None:
    """Raise UserError for the first CPU of a list that is not online and allowed."""
    for cpu in sorted(set(cpus) - topology.allowed):
        if cpu in topology.online:
            who = f"on {topology.name}" if topology.recorded_in else "for this process"
            reason = f"not allowed {who}"
        else:
            reason = "offline" if cpu in topology.offline else f"not in {topology.name}"
        asked, allowed = format_cpu_list(cpus), format_cpu_list(topology.allowed)
        raise UserError(f"{flag} {asked}: CPU {cpu} is {reason} (allowed: {allowed})")


def usable_cores(topology: Topology) -> list[Core]:
    """The allowed cores within the CPU quota, reduced to their allowed CPUs; idle ones first."""
    cores = [
        dataclasses.replace(core, cpus=cpus)
        for core in topology.cores
        if (cpus := tuple(cpu for cpu in core.cpus if cpu in topology.allowed))
    ]
    room = len(cores) if topology.quota_cpus is None else max(1, math.floor(topology.quota_cpus))
    if room >= len(cores):
        return cores
    return sorted(choose_idle_cores(topology, cores, room))


def choose_idle_cores(topology: Topology, cores: Sequence[Core], count: int) -> list[Core]:
    """Choose `count` cores, idle and fast ones first, from one L3 domain, node or package if it has
    so many; of several such, from the one with the fewest busy cores.
    """
    fastest_first = sorted(cores, key=lambda core: -core.capacity)
    busy = [core for core in cores if topology.load(core) > BUSY_SHARE]
    if not busy:
        return fastest_first[:count]
    idle = [core for core in fastest_first if core not in busy]
    if len(idle) < count:
        return (idle + sorted(busy, key=topology.load))[:count]
    fast = [core for core in idle if core.capacity == idle[0].capacity]
    for depth in range(len(DOMAINS), 0, -1):
        place = operator.attrgetter(*DOMAINS[:depth])
        domains = {}
        for core in fast:
            domains.setdefault(place(core), []).append(core)
        fitting = [domain for domain, inside in domains.items() if len(inside) >= count]
        if fitting:
            busy_in = Counter(map(place, busy))
            quietest = min(fitting, key=lambda domain: busy_in[domain])
            return choose_cores(domains[quietest], count, DOMAINS[depth:])
    return idle[:count]


def plan_notes(topology: Topology, forward: Group, backward: Group) -> Iterator[str]:
    """What the user should know about an allocation."""
    used_cpus = forward.cpu_set | backward.cpu_set
    used, allowed = topology.count_cores(used_cpus), topology.count_cores(topology.allowed)
    if topology.quota_cpus is not None and topology.quota_cpus < allowed:
        quota = f"CPU quota of {topology.quota_cpus:g} CPUs"
        usable = usable_cores(topology)
        why = explain_choice(topology, usable) if {*cpus_of(usable)} == used_cpus else ""
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


def explain_choice(topology: Topology, used: Sequence[Core]) -> str:
    """Which cores were chosen under a CPU quota, and why; empty if the load is unknown."""
    if not topology.busy:
        return ""
    cpus = cpus_of(used)
    here = f"CPU{'s' if len(cpus) > 1 else ''} {format_cpu_list(cpus)}"
    allowed = [core for core in topology.cores if not topology.allowed.isdisjoint(core.cpus)]
    count = sum(topology.load(core) > BUSY_SHARE for core in allowed)
    if not count:
        return f", {here}: the first, since all are idle"
    if all(topology.load(core) <= BUSY_SHARE for core in used):
        return f", {here}: idle now, while others work on {plural(count, 'core')}"
    return f", {here}: the least busy ones, since others work on {plural(count, 'core')}"


@dataclass(frozen=True)
class Host:
    """A rank's machine, and what of it the rank may use. One machine's processes share `kernel`."""

    kernel: str
    name: str
    topology: Topology
    torch_version: str


def this_host(topology: Topology) -> Host:
    """The machine of this process, identified by the kernel's random boot id.

    With --machine it has the name of that one.
    """
    name = shown(platform.node())
    kernel = read_text(Path("/proc/sys/kernel/random/boot_id")) or name
    return Host(kernel, topology.recorded_in or name, topology, str(torch.__version__))


def rank_topology(hosts: Sequence[Host], rank: int) -> Topology:
    """A rank's part of its machine. Raises UserError if there are more ranks than cores.

    Ranks with the same allowed CPUs divide them; a mask that a launcher has set for one rank
    (mpirun --bind-to, taskset) stays. The CPU quota and the memory are divided evenly.
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
    """The cores of each rank: as many as of any other or one more, with the same mix."""
    left, shares = list(cores), []
    for others in reversed(range(ranks)):
        chosen = choose_mixed_cores(left, -(-len(left) // (others + 1)))
        shares.append(sorted(chosen))
        left = [core for core in left if core not in chosen]
    return shares


def divide_cores(
    cores: Sequence[Core], split: str
) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """The CPUs of the forward and the backward group, in the ratio of `split`; and notes on it."""
    unit = "core"
    if len(cores) == 1:
        unit = "hardware thread"
        cores = [dataclasses.replace(cores[0], cpus=(cpu,)) for cpu in cores[0].cpus]
    if len(cores) == 1:  # both groups share its only hardware thread
        return cores[0].cpus, cores[0].cpus, []
    ratio = (1, 1) if split == "even" else tuple(map(int, split.split(":")))
    count = forward_count(len(cores), *ratio)
    forward = choose_mixed_cores(cores, count)
    backward = [core for core in cores if core not in forward]
    notes = []
    if split != "even" and count * ratio[1] != len(backward) * ratio[0]:
        given = f"{count}:{len(backward)}"
        notes.append(f"split {split} of {plural(len(cores), unit)} became {given}")
    return cpus_of(forward), cpus_of(backward), notes


def forward_count(count: int, forward: int, backward: int) -> int:
    """How many of `count` cores forward gets, nearest to the ratio; each group gets at least 1."""
    parts = forward + backward
    # ceil(count * share - 1/2): a tie goes to the backward group
    nearest = -((parts - 2 * count * forward) // (2 * parts))
    return min(max(nearest, 1), count - 1)


def choose_mixed_cores(cores: Sequence[Core], count: int) -> list[Core]:
    """Choose `count` cores with the same mix of fast and slow ones as all have."""
    kinds = share_by_kind(cores, count)
    return [core for kind, share in kinds for core in choose_cores(kind, share)]


def share_by_kind(cores: Sequence[Core], count: int) -> list[tuple[list[Core], int]]:
    """Each kind of core, fastest first, with its part of `count`, by largest remainders."""
    by_speed = sorted(cores, key=lambda core: -core.capacity)
    kinds = [list(kind) for _, kind in itertools.groupby(by_speed, lambda core: core.capacity)]
    shares = [len(kind) * count // len(cores) for kind in kinds]
    remainders = [len(kind) * count % len(cores) for kind in kinds]
    # A tie goes to the slower kind, so that the other group gets the faster core.
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
    """Indices of sizes with the largest sum up to `limit`; early ones preferred."""
    subsets: dict[int, tuple[int, ...]] = {0: ()}
    for index, size in enumerate(sizes):
        for total, subset in list(subsets.items()):
            if total + size <= limit:
                subsets.setdefault(total + size, (*subset, index))
    return subsets[max(subsets)]
