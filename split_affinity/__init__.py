"""The package behind train_split_affinity.py: what stands here must precede `import torch`."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

__version__ = "1.0.0"
PROGRAM = "train_split_affinity.py"  # its name in messages, checkpoints and logs


def process_cpus() -> frozenset[int]:
    """Logical CPUs that the calling thread may run on; all if the system does not say."""
    with contextlib.suppress(AttributeError, OSError):  # no such call, or a refused one
        return frozenset(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        status = Path("/proc/thread-self/status").read_text("utf-8", "replace")
        if listed := re.search(r"^Cpus_allowed_list:\s*([\d,-]+)$", status, re.MULTILINE):
            cpus: set[int] = set()
            for part in listed[1].split(","):
                first, _, last = part.partition("-")
                cpus.update(range(int(first), int(last or first) + 1))
            return frozenset(cpus)
    return frozenset(range(os.cpu_count() or 1))


def affinity_refusal() -> str:
    """Which call a filter of system calls (seccomp) refuses, and why; empty if it refuses none."""
    name = "sched_getaffinity"
    try:
        mask = os.sched_getaffinity(0)
        name = "sched_setaffinity"
        os.sched_setaffinity(0, mask)
    except AttributeError:  # a system without thread affinity
        return ""
    except OSError as error:
        return f"{name}: {error.strerror}"
    return ""


AFFINITY_REFUSED = affinity_refusal()
if AFFINITY_REFUSED.startswith("sched_getaffinity"):
    # Python and PyTorch call it if it exists, and neither expects it to fail.
    del os.sched_getaffinity, os.sched_setaffinity

# With one of the first four variables set, libgomp confines the main thread to a single CPU when it
# is loaded, and binds all teams to one list of places [pytorch 49971, 91989, 149422]; lanes place
# their own threads. With the last one, teams shrink as the machine's load grows, even during a run
# (see start_team).
ALLOWED_CPUS = process_cpus()
VARIABLES_HERE = {
    name: os.environ.pop(name)
    for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_DYNAMIC")
    if name in os.environ
}
# Those that were dropped before a restart (see machine/binding.py), one on each line.
BEGUN_ANEW = os.environ.pop("SPLIT_AFFINITY_BEGUN_ANEW", "")
DROPPED_VARIABLES = {
    name: value
    for name, _, value in (line.partition("=") for line in BEGUN_ANEW.split("\n"))
    if name
} | VARIABLES_HERE
