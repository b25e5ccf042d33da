"""The package behind train_split_affinity.py: importing any part of it comes before PyTorch.

What stands here must have happened before `import torch`; everything else has a room of its own.
"""

from __future__ import annotations

import os

__version__ = "1.0.0"
PROGRAM = "train_split_affinity.py"  # what messages, checkpoints and logs call it


def process_cpus() -> frozenset[int]:
    """Logical CPUs that the calling thread may run on; all of them where no affinity exists."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


# These two must precede `import torch`. With one of the first four variables set, libgomp shrinks
# the main thread to a single CPU as it loads, and binds every team to one list of places for the
# whole process [pytorch 49971, 91989, 149422]; lanes place their own threads. With the last one,
# teams shrink as the machine's load grows, also in the middle of a run (see start_team).
ALLOWED_CPUS = process_cpus()
DROPPED_VARIABLES = {
    name: os.environ.pop(name)
    for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_DYNAMIC")
    if name in os.environ
}
