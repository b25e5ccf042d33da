"""What the machine has: cores, caches, memory, quotas, read from the system's files.

The files are read under a root that tests can replace. Knows nothing of options.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from split_affinity import AFFINITY_REFUSED, ALLOWED_CPUS
from split_affinity.files import read_text
from split_affinity.machine.idleness import LOOK_S, busy_now
from split_affinity.options.values import parse_cpu_list
from split_affinity.text import format_cpu_list


@dataclass(frozen=True, order=True)
class Core:
    """One physical core and where it sits; `cpus` are its online hardware threads, ascending.

    `l3` is the lowest logical CPU that shares the L3 cache (-1: none known), `capacity` the
    relative speed (1024 for the fastest cores).
    """

    package: int
    node: int
    l3: int
    core_id: int
    cpus: tuple[int, ...]
    capacity: int = 1024


@dataclass(frozen=True)
class Topology:
    """A machine as one process may use it. `quota_cpus` is the cgroup's CPU quota, if any; `bf16`
    names the instructions that compute in bfloat16, empty where there are none; `memory_bytes` are
    infinite where nothing is known. Of the moment, and so no part of a machine's description, are
    `affinity_refused`, why the system keeps no thread on cores though it could, and `busy`, for
    which share of the time each CPU works, where a CPU quota leaves a choice.
    """

    cpu_model: str
    cores: tuple[Core, ...]
    offline: frozenset[int]
    allowed: frozenset[int]
    quota_cpus: float | None
    has_affinity: bool
    bf16: str = ""
    memory_bytes: float = math.inf
    affinity_refused: str = ""
    busy: dict[int, float] = field(default_factory=dict, compare=False)

    @property
    def online(self) -> tuple[int, ...]:
        """All online logical CPUs, ascending."""
        return cpus_of(self.cores)


def cpus_of(cores: Iterable[Core]) -> tuple[int, ...]:
    """The logical CPUs of some cores, ascending."""
    return tuple(sorted(cpu for core in cores for cpu in core.cpus))


def read_number(path: Path, default: int) -> int:
    """A system file that holds one number; `default` where it is missing or negative."""
    text = read_text(path)
    return int(text) if text.isdecimal() else default


def read_cpus(path: Path) -> tuple[int, ...]:
    """A system file that holds a list of logical CPUs; none where it is missing or empty."""
    text = read_text(path)
    return parse_cpu_list(text) if text else ()


def read_topology(
    root: Path = Path("/"), allowed: frozenset[int] = ALLOWED_CPUS, look_s: float = LOOK_S
) -> Topology:
    """Read the machine's topology from the files under `root`.

    `allowed` are the logical CPUs that the process may use. Where sysfs tells nothing (macOS),
    every allowed CPU counts as a core. Where a CPU quota leaves a choice of cores, it is looked for
    `look_s` seconds who else uses them.
    """
    system = root / "sys/devices/system/cpu"
    online = tuple(sorted(allowed.union(read_cpus(system / "online"))))
    node_of = {
        cpu: int(directory.name.removeprefix("node"))
        for directory in (root / "sys/devices/system/node").glob("node[0-9]*")
        for cpu in read_cpus(directory / "cpulist")
    }
    capacity_of = read_capacities(root, online)
    cores = {
        read_core(system / f"cpu{cpu}", cpu, online, node_of.get(cpu, 0), capacity_of[cpu])
        for cpu in online
    }
    quota = read_quota(root)
    chosen = quota is not None and quota < sum(not allowed.isdisjoint(core.cpus) for core in cores)
    return Topology(
        cpu_model=read_cpu_model(root),
        cores=tuple(sorted(cores)),
        offline=frozenset(read_cpus(system / "offline")),
        allowed=allowed,
        quota_cpus=quota,
        has_affinity=hasattr(os, "sched_setaffinity") and not AFFINITY_REFUSED,
        bf16=read_bf16(root),
        memory_bytes=read_memory(root),
        affinity_refused=AFFINITY_REFUSED,
        busy=busy_now(root, online, look_s) if chosen else {},
    )


def read_core(directory: Path, cpu: int, online: Sequence[int], node: int, capacity: int) -> Core:
    """The physical core that `cpu` belongs to; all its hardware threads give the same Core."""
    topology = directory / "topology"
    older, newer = topology / "thread_siblings_list", topology / "core_cpus_list"
    siblings = read_cpus(newer) or read_cpus(older)
    cpus = tuple(sibling for sibling in siblings if sibling in online) or (cpu,)
    sharing_l3 = [
        read_cpus(cache / "shared_cpu_list")
        for cache in directory.glob("cache/index*")
        if read_text(cache / "level") == "3"
    ]
    l3 = min(itertools.chain(*sharing_l3), default=-1)
    package = read_number(topology / "physical_package_id", 0)
    core_id = read_number(topology / "core_id", cpus[0])
    return Core(package, node, l3, core_id, cpus, capacity)


def read_capacities(root: Path, online: Sequence[int]) -> dict[int, int]:
    """Relative speed of each logical CPU: Intel's P and E lists, else the kernel's capacities."""
    efficient = read_cpus(root / "sys/devices/cpu_atom/cpus")
    if efficient and read_cpus(root / "sys/devices/cpu_core/cpus"):
        return {cpu: 512 if cpu in efficient else 1024 for cpu in online}
    system = root / "sys/devices/system/cpu"
    return {cpu: read_number(system / f"cpu{cpu}/cpu_capacity", 1024) for cpu in online}


def read_cpu_model(root: Path) -> str:
    """The processor's name as the kernel gives it, or the nearest thing to it."""
    match = re.search(r"^model name\s*:\s*(.+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    if root != Path("/"):  # another machine's files, of whose processor Python knows nothing
        return match[1].strip() if match else "unknown CPU"
    return match[1].strip() if match else platform.processor() or platform.machine()


BF16_FLAGS = "amx_bf16", "avx512_bf16", "bf16"


def read_bf16(root: Path) -> str:
    """The CPU's native bfloat16 arithmetic: AMX, AVX512-BF16 or Arm BF16; else empty."""
    text = read_text(root / "proc/cpuinfo")
    lists = re.findall(r"^(?:flags|Features)[ \t]*:(.*)$", text, re.MULTILINE)
    flags = set(lists[0].split()) if lists else set()
    return next((flag for flag in BF16_FLAGS if flag in flags), "")


# Containers by what shows them: a file that their manager makes, a part of the cgroup's path.
CONTAINERS = {
    "kubernetes": ("run/secrets/kubernetes.io", "kubepods"),
    "docker": (".dockerenv", "docker"),
    "podman": ("run/.containerenv", "libpod"),
    "lxc": ("dev/lxd", "lxc"),
    "apptainer": (".singularity.d", "apptainer"),
}
VIRTUAL_MAKERS = "QEMU|KVM|VMware|Virtual|Xen|Parallels|EC2|Google Compute Engine|OpenStack"


def host_kind(root: Path = Path("/")) -> str:
    """`bare metal`, `virtual machine`, or a container and which of these it is on, as in `container
    (docker) on bare metal`; `unknown` where the system does not tell (macOS).
    """
    if not read_text(root / "proc/cpuinfo"):
        return "unknown"
    host = "virtual machine" if is_virtual(root) else "bare metal"
    for name, (mark, part) in CONTAINERS.items():
        in_path = re.search(rf"/{part}\b(?!\.service)", read_text(root / "proc/self/cgroup"))
        if in_path or any(root.glob(mark)):
            return f"container ({name}) {'on' if host == 'bare metal' else 'in a'} {host}"
    return host


def is_virtual(root: Path) -> bool:
    """Whether a hypervisor shows. On x86 a flag of the CPU tells; elsewhere the names of maker and
    product do, and a cloud's whole machines are called .metal.
    """
    flags = re.search(r"^flags\s*:(.*)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    if flags:
        return "hypervisor" in flags[1].split()
    dmi = root / "sys/class/dmi/id"
    names = f"{read_text(dmi / 'sys_vendor')} {read_text(dmi / 'product_name')}"
    virtual = re.search(VIRTUAL_MAKERS, names) and not names.endswith(".metal")
    return bool(virtual or read_text(root / "sys/hypervisor/type"))


def read_quota(root: Path) -> float | None:
    """The CPU quota in CPUs: the smallest among the process's cgroup and those around it.

    In each directory it stands in `cpu.max` (v2) or in `cpu.cfs_quota_us` and `cpu.cfs_period_us`.
    """
    quotas = []
    for directory in cgroups(root, "cpu"):
        v1 = [read_text(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        match = re.fullmatch(r"(\d+) ([1-9]\d*)", read_text(directory / "cpu.max") or " ".join(v1))
        if match:
            quotas.append(int(match[1]) / int(match[2]))
    return min(quotas, default=None)


def read_memory(root: Path) -> float:
    """Bytes of memory that the process can use, swap included: all of the machine's, or what the
    limits of its cgroups leave.
    """
    lines = re.findall(r"^(\w+): +(\d+) kB$", read_text(root / "proc/meminfo"), re.MULTILINE)
    size_bytes = {name: 1024 * int(size_kib) for name, size_kib in lines}
    limits = [size_bytes.get("MemTotal", math.inf)]
    for directory in cgroups(root, "memory"):
        texts = (read_text(directory / f"memory.{name}") for name in ("max", "limit_in_bytes"))
        limits += [int(text) for text in texts if text.isdecimal()]
    return min(limits) + size_bytes.get("SwapTotal", 0)


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Directories of the process's cgroups that can hold a limit of a controller (cpu, memory),
    innermost first, v1 and v2.

    A mount may show only a part of the hierarchy (its root, in /proc/self/mountinfo): a container
    sees its own cgroup there, and a path outside that part cannot be looked at.
    """
    path_of = {}  # by controller; v2 has one path for all, under the empty name
    for line in read_text(root / "proc/self/cgroup").split("\n"):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if path:
            path_of |= dict.fromkeys(controllers.split(","), PurePosixPath(path))
    for mount_root, mount_point, kind, options in mounts(root):
        has_limits = kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
        path = path_of.get("" if kind == "cgroup2" else controller)
        if not has_limits or path is None:
            continue
        inside = PurePosixPath("/")
        if path.is_relative_to(mount_root):
            inside /= path.relative_to(mount_root)
        for directory in (inside, *inside.parents):
            yield root / mount_point.lstrip("/") / str(directory).lstrip("/")


def mounts(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """The process's mounts: what of the file system each shows, where, the kind of file system, and
    its options. Lines that have no such fields are left out.

    Fields end at single blanks, lines at line feeds (proc_pid_mountinfo(5)): a source can be empty,
    and a name can have any other white space.
    """
    for line in read_text(root / "proc/self/mountinfo").split("\n"):
        mount, _, source = line.partition(" - ")
        fields, source_fields = mount.split(" "), source.split(" ")
        if len(fields) >= 5 and len(source_fields) >= 3:
            kind, _, options = source_fields[:3]
            yield unescaped(fields[3]), unescaped(fields[4]), kind, options


def unescaped(name: str) -> str:
    """A name of /proc/self/mountinfo, where blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def machine_metrics(topology: Topology) -> dict[str, Any]:
    """The machine, as metrics.jsonl has it: in figures, and core by core."""
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
    return {"host_kind": host_kind(), "machine": machine, "topology": cores}
