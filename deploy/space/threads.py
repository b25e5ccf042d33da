"""How many threads have CPUs to run on."""

from __future__ import annotations

import os
import re
from pathlib import Path


def read(file: Path) -> str:
    """A small file's text; empty if there is none."""
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def quotas(root: Path = Path("/")) -> list[int]:
    """In whole CPUs the quotas, if there are any, of the process's cgroup and of those around it:
    those of version 2 in `cpu.max`, those of version 1 in two files.
    """
    found = []
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup" / ("cpu" if "cpu" in controllers.split(",") else "")
        group = mount / path.lstrip("/")
        for each in (group, *group.parents):
            v1 = [read(each / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            if limit := re.fullmatch(r"(\d+) (\d+)", read(each / "cpu.max") or " ".join(v1)):
                found.append(int(limit[1]) // int(limit[2]))
    return found


def allowed_threads(cpus: int, quotas: list[int]) -> int:
    """As many threads as there are CPUs, or as a container's quotas leave room for."""
    return max(1, min([cpus, *quotas]))


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
