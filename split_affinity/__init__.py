"""The package behind train_split_affinity.py: importing any part of it comes before PyTorch.

What stands here must have happened before `import torch`; everything else has a room of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

__version__ = "1.0.0"
PROGRAM = "train_split_affinity.py"  # what messages, checkpoints and logs call it


def process_cpus() -> frozenset[int]:
    """Logical CPUs that the calling thread may run on; all where the system does not say."""
    with contextlib.suppress(AttributeError, OSError):  # no such call, or a refused one
        return frozenset(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        status = Path("/proc/thread-self/status").read_text("utf-8", "replace")
        if listed := re.search(r"^Cpus_allowed_list:\s*([\d,-]+)$", status, re.MULTILINE):
            runs = [part.partition("-") for part in listed[1].split(",")]
            return frozenset(
                cpu for first, _, last in runs for cpu in range(int(first), int(last or first) + 1)
            )
    return frozenset(range(os.cpu_count() or 1))


def affinity_refusal() -> str:
    """Which call the system refuses, and in which words, where it knows thread affinity and lets
    nobody use it: a filter of system calls does so (seccomp). Empty where nothing is refused.
    """
    name = "sched_getaffinity"
    try:
        mask = os.sched_getaffinity(0)
        name = "sched_setaffinity"
        os.sched_setaffinity(0, mask)
    except AttributeError:
        return ""
    except OSError as error:
        return f"{name}: {error.strerror}"
    return ""


AFFINITY_REFUSED = affinity_refusal()
if AFFINITY_REFUSED.startswith("sched_getaffinity"):
    # Python and PyTorch call it wherever it exists, and neither foresees that it fails.
    del os.sched_getaffinity, os.sched_setaffinity

# These two must precede `import torch`. With one of the first four variables set, libgomp shrinks
# the main thread to a single CPU as it loads, and binds every team to one list of places for the
# whole process [pytorch 49971, 91989, 149422]; lanes place their own threads. With the last one,
# teams shrink as the machine's load grows, also in the middle of a run (see start_team).
ALLOWED_CPUS = process_cpus()
VARIABLES_HERE = {
    name: os.environ.pop(name)
    for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_DYNAMIC")
    if name in os.environ
}
# Those that were dropped before the program began anew (see machine/binding.py), a line for each.
BEGUN_ANEW = os.environ.pop("SPLIT_AFFINITY_BEGUN_ANEW", "")
DROPPED_VARIABLES = {
    name: value
    for name, _, value in (line.partition("=") for line in BEGUN_ANEW.split("\n"))
    if name
} | VARIABLES_HERE
