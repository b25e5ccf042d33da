"""Variables that bind OpenMP threads, where libgomp read them before Python began (LD_PRELOAD).

By then it has cut the process's mask and made up its mind: the program begins anew without them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from split_affinity import BEGUN_ANEW, DROPPED_VARIABLES, VARIABLES_HERE, process_cpus
from split_affinity.errors import UserError
from split_affinity.files import read_text
from split_affinity.text import format_cpu_list


def begin_anew() -> None:
    """Begin the program anew, once, with all allowed CPUs, if a libgomp has bound it already.

    Call this before PyTorch brings a libgomp. Raises UserError if nobody knows the allowed CPUs any
    more, also if a process that started this one, such as torchrun, is bound.
    """
    read = {name: value for name, value in VARIABLES_HERE.items() if name != "KMP_AFFINITY"}
    if not read:
        return
    binding = binding_variables(read)
    library, (outer, inherited) = loaded_libgomp("self"), unbound_ancestor(binding)
    if not library and not inherited:
        return
    places = libgomp_places(library) or [process_cpus()]
    allowed = process_cpus().union(*places)
    cut_before = inherited or len(places) == 1 or lists_cpus(binding)
    unknown = binding and cut_before and not cpus_of_process(outer) <= allowed
    if unknown or (library and BEGUN_ANEW):
        name, value = next(iter((binding or read).items()))
        raise UserError(
            f"{name}={value}: by it libgomp, which was loaded before this program (LD_PRELOAD, or "
            f"torch in what started it), keeps it on cores {format_cpu_list(process_cpus())}; "
            f"unset {name}"
        )
    if library:
        with contextlib.suppress(AttributeError, OSError):  # then libgomp was refused it, too
            os.sched_setaffinity(0, allowed)
        dropped = "\n".join(f"{name}={value}" for name, value in DROPPED_VARIABLES.items())
        environment = os.environ | {"SPLIT_AFFINITY_BEGUN_ANEW": dropped}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def binding_variables(variables: dict[str, str]) -> dict[str, str]:
    """The variables that make libgomp cut the mask of the thread that loads it."""
    if variables.get("OMP_PROC_BIND", "").strip().lower() == "false":
        return {}
    return {name: value for name, value in variables.items() if name != "OMP_DYNAMIC"}


def lists_cpus(variables: dict[str, str]) -> bool:
    """Whether the places may leave out some allowed CPUs: they are listed, or counted."""
    places = variables.get("OMP_PLACES", "")
    return "GOMP_CPU_AFFINITY" in variables or not re.fullmatch(r"\s*[A-Za-z_]*\s*", places)


def loaded_libgomp(process: int | str) -> str:
    """Path of the libgomp that a process has loaded; empty if none, or unknown."""
    maps = read_text(Path(f"/proc/{process}/maps"))
    found = re.search(r" (/[^\n]*/libgomp[^/\n]*)$", maps, re.MULTILINE)
    return found[1] if found else ""


def unbound_ancestor(variables: Iterable[str]) -> tuple[int, bool]:
    """The nearest ancestor that libgomp has not bound by these variables (0 if none can be seen),
    and whether there are bound ones in between.
    """
    pid, between = os.getppid(), False
    while pid and loaded_libgomp(pid):
        environment = read_text(Path(f"/proc/{pid}/environ")).split("\0")
        if {*variables}.isdisjoint(entry.partition("=")[0] for entry in environment):
            break
        stat = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
        pid, between = int(stat[1]) if stat else 0, True
    return pid, between


def libgomp_places(library: str) -> list[frozenset[int]]:
    """The CPUs of each place of libgomp: those allowed when it was loaded, or those listed.

    Empty if it binds nothing.
    """
    places = []
    with contextlib.suppress(OSError, AttributeError):
        gomp = ctypes.CDLL(library) if library else None
        for place in range(gomp.omp_get_num_places()):
            ids = (ctypes.c_int * gomp.omp_get_place_num_procs(place))()
            gomp.omp_get_place_proc_ids(place, ids)
            places.append(frozenset(ids))
    return places


def cpus_of_process(pid: int) -> frozenset[int]:
    """The CPUs that a process may run on; for 0, outside of a container, all there are."""
    with contextlib.suppress(AttributeError, OSError):
        if pid:
            return frozenset(os.sched_getaffinity(pid))
    return frozenset(range(os.cpu_count() or 1))
