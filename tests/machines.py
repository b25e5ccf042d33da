"""Machines as sysfs, procfs and cgroup files show them: literal trees for the topology tests; and
those of docs/machines.

Each machine is a list of rows `(cpu, socket, node, l3, core)`; `l3` numbers the cache's domain.
"""

from __future__ import annotations

from pathlib import Path

from places import ROOT

from split_affinity.machine.description import read_machine
from split_affinity.machine.topology import Topology

DESCRIBED = sorted((ROOT / "docs/machines").glob("*.json"))

Row = tuple[int, int, int, int, int]

ONE = [(0, 0, 0, 0, 0)]
TWO = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 1)]
THREE = [*TWO, (2, 0, 0, 0, 2)]
SEVEN = [(cpu, 0, 0, 0, cpu) for cpu in range(7)]
ONE_CORE_TWO_THREADS = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0)]

# Sibling ids far apart, as on most servers: CPU 0 and 4 are one core.
SMT_FAR = [
    (0, 0, 0, 0, 0),
    (1, 0, 0, 0, 1),
    (2, 0, 0, 0, 2),
    (3, 0, 0, 0, 3),
    (4, 0, 0, 0, 0),
    (5, 0, 0, 0, 1),
    (6, 0, 0, 0, 2),
    (7, 0, 0, 0, 3),
]

# Two sockets of four cores, two L3 domains each; CPU ids alternate between the sockets.
TWO_SOCKETS = [
    (0, 0, 0, 0, 0),
    (2, 0, 0, 0, 1),
    (4, 0, 0, 1, 2),
    (6, 0, 0, 1, 3),
    (1, 1, 1, 2, 0),
    (3, 1, 1, 2, 1),
    (5, 1, 1, 3, 2),
    (7, 1, 1, 3, 3),
]

# Four performance cores with two threads each (0-7), four efficiency cores (8-11), one L3.
HYBRID = [(cpu, 0, 0, 0, cpu // 2) for cpu in range(8)] + [
    (cpu, 0, 0, 0, cpu) for cpu in range(8, 12)
]
HYBRID_FILES = {"sys/devices/cpu_core/cpus": "0-7", "sys/devices/cpu_atom/cpus": "8-11"}

# Arm's big.LITTLE tells capacities instead.
BIG_LITTLE = SEVEN[:4]
BIG_LITTLE_FILES = {
    f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity": capacity
    for cpu, capacity in enumerate(("446", "446", "1024", "1024"))
}

# A workstation: two L3 domains of eight cores, two threads each, with sibling ids far apart.
SIXTEEN_CORES = [(cpu, 0, 0, cpu % 16 // 8, cpu % 16) for cpu in range(32)]

# A server: two sockets of 16 cores, two L3 domains each, two threads a core, siblings far apart.
TWO_SOCKETS_SMT = [
    (cpu, cpu % 32 // 16, cpu % 32 // 16, cpu % 32 // 8, cpu % 16) for cpu in range(64)
]

# A server: two sockets, one node each, of eight L3 domains of eight cores without SMT.
TWO_SOCKETS_128 = [(cpu, cpu // 64, cpu // 64, cpu // 8, cpu % 64) for cpu in range(128)]

CGROUP_V2 = {
    "proc/self/cgroup": "0::/batch/job7\n",
    "proc/self/mountinfo": "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n",
}
CGROUP_V1 = {
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n",
    "proc/self/mountinfo": (
        "40 30 0:33 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
        "41 30 0:34 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
    ),
}


def described(name: str) -> Topology:
    """A machine of docs/machines."""
    return read_machine(ROOT / f"docs/machines/{name}.json")


def cpu_list(cpus: list[int]) -> str:
    """A list in the kernel's form, without ranges."""
    return ",".join(map(str, sorted(cpus)))


def write_files(root: Path, files: dict[str, str]) -> None:
    """Write files given by their path under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_machine(
    root: Path, rows: list[Row], files: dict[str, str] | None = None, offline: str = ""
) -> Path:
    """Write the files of a machine under `root` and return it."""
    system = "sys/devices/system"
    tree = {
        f"{system}/cpu/online": cpu_list([row[0] for row in rows]) + "\n",
        f"{system}/cpu/offline": offline + "\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Example CPU @ 3.0GHz\n",
    }
    for node in {row[2] for row in rows}:
        cpus = [row[0] for row in rows if row[2] == node]
        tree[f"{system}/node/node{node}/cpulist"] = cpu_list(cpus) + "\n"
    for cpu, socket, _, l3, core in rows:
        siblings = [row[0] for row in rows if (row[1], row[4]) == (socket, core)]
        sharing = [row[0] for row in rows if row[3] == l3]
        tree |= {
            f"{system}/cpu/cpu{cpu}/topology/physical_package_id": f"{socket}\n",
            f"{system}/cpu/cpu{cpu}/topology/core_id": f"{core}\n",
            f"{system}/cpu/cpu{cpu}/topology/thread_siblings_list": cpu_list(siblings) + "\n",
            f"{system}/cpu/cpu{cpu}/cache/index0/level": "1\n",
            f"{system}/cpu/cpu{cpu}/cache/index0/shared_cpu_list": f"{cpu}\n",
            f"{system}/cpu/cpu{cpu}/cache/index3/level": "3\n",
            f"{system}/cpu/cpu{cpu}/cache/index3/shared_cpu_list": cpu_list(sharing) + "\n",
        }
    write_files(root, tree | (files or {}))
    return root
