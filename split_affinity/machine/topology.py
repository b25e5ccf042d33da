"""What the machine has: cores, caches, memory, quotas, read from the system's files.

The files are read under a root that tests can replace. Knows nothing of options.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from split_affinity import AFFINITY_REFUSED, ALLOWED_CPUS
from split_affinity.files import read_text
from split_affinity.options.values import parse_cpu_list
from split_affinity.text import format_cpu_list

BF16_FLAGS = "amx_bf16", "avx512_bf16", "bf16"
LOOK_S = 0.2  # 20 ticks


@dataclass(frozen=True, order=True)
class Core:
    """One physical core and where it sits."""

    package: int
    node: int
    l3: int  # the lowest logical CPU that shares the cache; -1: unknown
    core_id: int
    cpus: tuple[int, ...]  # online hardware threads, ascending
    capacity: int = 1024  # relative speed; 1024 for the fastest cores


@dataclass(frozen=True)
class Topology:
    """A machine as one process may use it."""

    cpu_model: str
    cores: tuple[Core, ...]
    offline: frozenset[int]
    allowed: frozenset[int]
    quota_cpus: float | None  # of the cgroup
    has_affinity: bool
    bf16: str = ""  # one of BF16_FLAGS: its native arithmetic, if any
    memory_bytes: float = math.inf  # unknown
    # Of the moment, not of the machine: why the system keeps no thread on cores though it could;
    # the share of time in which each CPU works, known only if a CPU quota leaves a choice.
    affinity_refused: str = ""
    busy: dict[int, float] = field(default_factory=dict, compare=False)
    # The name of the file or folder of --machine; empty for the machine that this runs on.
    recorded_in: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """What a sentence calls the machine; only the one that this runs on is `this machine`."""
        return self.recorded_in or "this machine"

    @property
    def online(self) -> tuple[int, ...]:
        """All online logical CPUs, ascending."""
        return cpus_of(self.cores)

    def count_cores(self, cpus: Iterable[int]) -> int:
        """The number of physical cores that have any of the CPUs."""
        return sum(not set(cpus).isdisjoint(core.cpus) for core in self.cores)

    def load(self, part: Core) -> float:
        """How busy a core is, if only a part of it: as its busiest thread, which slows the rest."""
        (whole,) = (core for core in self.cores if part.cpus[0] in core.cpus)
        return max(self.busy.get(cpu, 0.0) for cpu in whole.cpus)


def cpus_of(cores: Iterable[Core]) -> tuple[int, ...]:
    """The logical CPUs of some cores, ascending."""
    return tuple(sorted(cpu for core in cores for cpu in core.cpus))


def read_number(path: Path, default: int) -> int:
    """The number in a system file; `default` if it is missing or negative."""
    text = read_text(path)
    return int(text) if text.isdecimal() else default


def read_cpus(path: Path) -> tuple[int, ...]:
    """The logical CPUs listed in a system file; none if it is missing or empty."""
    text = read_text(path)
    return parse_cpu_list(text) if text else ()


def read_topology(
    root: Path = Path("/"), allowed: frozenset[int] = ALLOWED_CPUS, look_s: float = LOOK_S
) -> Topology:
    """The machine that the files under `root` show; the process may use the `allowed` CPUs.

    Without sysfs (macOS) every allowed CPU counts as a core. If a CPU quota leaves a choice of
    cores, this takes `look_s` seconds to see which of them others use.
    """
    system = root / "sys/devices/system"
    online = tuple(sorted(allowed.union(read_cpus(system / "cpu/online"))))
    node_of = {
        cpu: int(directory.name.removeprefix("node"))
        for directory in (system / "node").glob("node[0-9]*")
        for cpu in read_cpus(directory / "cpulist")
    }
    capacity_of = read_capacities(root, online)
    cores = {  # all hardware threads of a core give the same one
        read_core(system / f"cpu/cpu{cpu}", cpu, online, node_of.get(cpu, 0), capacity_of[cpu])
        for cpu in online
    }
    quota = read_quota(root)
    allowed_cores = sum(not allowed.isdisjoint(core.cpus) for core in cores)
    has_choice = quota is not None and quota < allowed_cores
    cpu_model, bf16 = read_processor(root)
    return Topology(
        cpu_model=cpu_model,
        cores=tuple(sorted(cores)),
        offline=frozenset(read_cpus(system / "cpu/offline")),
        allowed=allowed,
        quota_cpus=quota,
        has_affinity=hasattr(os, "sched_setaffinity") and not AFFINITY_REFUSED,
        bf16=bf16,
        memory_bytes=read_memory(root),
        affinity_refused=AFFINITY_REFUSED,
        busy=busy_now(root, online, look_s) if has_choice else {},
    )


def read_core(directory: Path, cpu: int, online: Sequence[int], node: int, capacity: int) -> Core:
    """The physical core of a logical CPU, from the CPU's directory in sysfs."""
    topology = directory / "topology"
    older, newer = topology / "thread_siblings_list", topology / "core_cpus_list"
    siblings = read_cpus(newer) or read_cpus(older)
    cpus = tuple(sibling for sibling in siblings if sibling in online) or (cpu,)
    sharing_l3 = [
        sharing
        for cache in directory.glob("cache/index*")
        if read_text(cache / "level") == "3"
        for sharing in read_cpus(cache / "shared_cpu_list")
    ]
    package = read_number(topology / "physical_package_id", 0)
    core_id = read_number(topology / "core_id", cpus[0])
    return Core(package, node, min(sharing_l3, default=-1), core_id, cpus, capacity)


def read_capacities(root: Path, online: Sequence[int]) -> dict[int, int]:
    """Relative speed of each logical CPU: Intel's P and E lists, else the kernel's capacities."""
    efficient = read_cpus(root / "sys/devices/cpu_atom/cpus")
    if efficient and read_cpus(root / "sys/devices/cpu_core/cpus"):
        return {cpu: 512 if cpu in efficient else 1024 for cpu in online}
    system = root / "sys/devices/system/cpu"
    return {cpu: read_number(system / f"cpu{cpu}/cpu_capacity", 1024) for cpu in online}


def read_processor(root: Path) -> tuple[str, str]:
    """The processor's name, and its native bfloat16 arithmetic (one of BF16_FLAGS, or empty)."""
    text = read_text(root / "proc/cpuinfo")
    if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        name = match[1].strip()
    elif root == Path("/"):
        name = platform.processor() or platform.machine()
    else:
        name = "unknown CPU"  # another machine's files: Python knows only this one
    match = re.search(r"^(?:flags|Features)[ \t]*:(.*)$", text, re.MULTILINE)
    flags = match[1].split() if match else []
    return name, next((flag for flag in BF16_FLAGS if flag in flags), "")


def busy_now(root: Path, online: Iterable[int], look_s: float) -> dict[int, float]:
    """The share of the next `look_s` seconds in which each online CPU works, for anybody."""
    stat = root / "proc/stat"
    before = cpu_ticks(read_text(stat))
    if not look_s or not before.keys() >= {*online}:  # lxcfs shows some, with its own numbers
        return {}
    time.sleep(look_s)
    after = cpu_ticks(read_text(stat))
    return {
        cpu: max(0, after[cpu][0] - worked) / max(1, after[cpu][1] - total)
        for cpu, (worked, total) in before.items()
        if cpu in after
    }


def cpu_ticks(text: str) -> dict[int, tuple[int, int]]:
    """By CPU, the ticks since boot in which it worked, and all of them, from proc_stat(5)."""
    ticks = {}
    for cpu, numbers in re.findall(r"^cpu(\d+)((?: +\d+){4,})$", text, re.MULTILINE):
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is in user, too
        counts = [*map(int, numbers.split())][:8]
        ticks[int(cpu)] = sum(counts) - sum(counts[3:5]), sum(counts)
    return ticks


# How containers show: a file that their manager makes, a part of the cgroup's path.
CONTAINERS = {
    "kubernetes": ("run/secrets/kubernetes.io", "kubepods"),
    "docker": (".dockerenv", "docker"),
    "podman": ("run/.containerenv", "libpod"),
    "lxc": ("dev/lxd", "lxc"),
    "apptainer": (".singularity.d", "apptainer"),
}
VIRTUAL_MAKERS = "QEMU|KVM|VMware|Virtual|Xen|Parallels|EC2|Google Compute Engine|OpenStack"


def host_kind(root: Path = Path("/")) -> str:
    """`bare metal`, `virtual machine`, `container (docker) on bare metal`, ..., or `unknown`."""
    cpuinfo = read_text(root / "proc/cpuinfo")
    if not cpuinfo:  # macOS
        return "unknown"
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if flags:
        is_virtual = "hypervisor" in flags[1].split()
    else:  # no x86: maker and product tell; a cloud calls its whole machines .metal
        dmi = root / "sys/class/dmi/id"
        names = f"{read_text(dmi / 'sys_vendor')} {read_text(dmi / 'product_name')}"
        by_name = re.search(VIRTUAL_MAKERS, names) and not names.endswith(".metal")
        is_virtual = by_name or read_text(root / "sys/hypervisor/type")
    host = "virtual machine" if is_virtual else "bare metal"
    cgroup = read_text(root / "proc/self/cgroup")
    for name, (mark, part) in CONTAINERS.items():
        if re.search(rf"/{part}\b(?!\.service)", cgroup) or any(root.glob(mark)):
            return f"container ({name}) {'in a' if is_virtual else 'on'} {host}"
    return host


def read_quota(root: Path) -> float | None:
    """The CPU quota in CPUs: the smallest of the process's cgroup and of those around it."""
    quotas = []
    for directory in cgroups(root, "cpu"):
        v1 = [read_text(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        match = re.fullmatch(r"(\d+) ([1-9]\d*)", read_text(directory / "cpu.max") or " ".join(v1))
        if match:
            quotas.append(int(match[1]) / int(match[2]))
    return min(quotas, default=None)


def read_memory(root: Path) -> float:
    """Bytes of memory that the process can use, swap included, within the limits of its cgroups."""
    lines = re.findall(r"^(\w+): +(\d+) kB$", read_text(root / "proc/meminfo"), re.MULTILINE)
    size_bytes = {name: 1024 * int(size_kib) for name, size_kib in lines}
    limits = [size_bytes.get("MemTotal", math.inf)]
    for directory in cgroups(root, "memory"):
        texts = (read_text(directory / f"memory.{name}") for name in ("max", "limit_in_bytes"))
        limits += [int(text) for text in texts if text.isdecimal()]
    return min(limits) + size_bytes.get("SwapTotal", 0)


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Directories that can limit a controller (cpu, memory) for the process, innermost first.

    A mount may show only a part of the hierarchy: a container sees its own cgroup as the mount's
    root, and nothing outside of it.
    """
    path_of = {}  # by controller; v2 has one path for all, under the empty name
    for line in read_text(root / "proc/self/cgroup").split("\n"):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if path:
            path_of |= dict.fromkeys(controllers.split(","), PurePosixPath(path))
    # Fields end at single blanks, lines at line feeds (proc_pid_mountinfo(5)): a source can be
    # empty, and a name can have any other white space.
    for line in read_text(root / "proc/self/mountinfo").split("\n"):
        mount, _, source = line.partition(" - ")
        fields, source_fields = mount.split(" "), source.split(" ")
        if len(fields) < 5 or len(source_fields) < 3:
            continue  # malformed
        kind, _, options = source_fields[:3]
        has_limits = kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
        path = path_of.get("" if kind == "cgroup2" else controller)
        if not has_limits or path is None:
            continue
        mount_root, mount_point = map(unescape, fields[3:5])
        inside = PurePosixPath("/")
        if path.is_relative_to(mount_root):
            inside /= path.relative_to(mount_root)
        for directory in (inside, *inside.parents):
            yield root / mount_point.lstrip("/") / str(directory).lstrip("/")


def unescape(name: str) -> str:
    """A name of /proc/self/mountinfo, where blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def machine_metrics(topology: Topology) -> dict[str, Any]:
    """The machine in metrics.jsonl: what it is, figures, and core by core."""
    return {"host_kind": host_kind(), **machine_values(topology)}


def machine_values(topology: Topology) -> dict[str, Any]:
    """A machine as JSON types: figures, and core by core."""
    known = math.isfinite(topology.memory_bytes)
    machine = {
        "cpu_model": topology.cpu_model,
        "sockets": len({core.package for core in topology.cores}),
        "cores": len(topology.cores),
        "logical_cpus": len(topology.online),
        "allowed": format_cpu_list(topology.allowed),
        "quota_cpus": topology.quota_cpus,
        "memory_bytes": topology.memory_bytes if known else None,
        "bf16": topology.bf16,
    }
    cores = [dataclasses.asdict(core) for core in topology.cores]
    return {"machine": machine, "topology": cores}
