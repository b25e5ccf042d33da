"""Hardware counters of a lane's threads, by perf_event_open(2).

Linux counts for each thread by itself, and only while it runs: what others do on the same cores is
not in these figures. Read by ctypes, since no package that is kept up to date wraps the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from split_affinity.counters.source import Source
from split_affinity.files import read_text

CALL_NUMBERS = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "ppc64le": 319, "s390x": 331}
HARDWARE, SOFTWARE, CACHE = 0, 1, 3  # kinds of events in linux/perf_event.h
LAST_LEVEL_READ_MISS = 2 | 0 << 8 | 1 << 16  # cache | operation << 8 | result << 16
HARDWARE_EVENTS = {
    "cycles": (HARDWARE, 0),
    "instructions": (HARDWARE, 1),
    "llc_misses": (CACHE, LAST_LEVEL_READ_MISS),
}
TASK_CLOCK = (SOFTWARE, 1)  # nanoseconds
# Each reading: how many events, nanoseconds counted for, of these really on the counters, values.
GROUP_FORMAT = 1 << 3 | 1 << 0 | 1 << 1
EXCLUDE_KERNEL, EXCLUDE_HYPERVISOR = 1 << 5, 1 << 6
ATTRIBUTES = struct.Struct("=IIQQQQQIIQ")  # of perf_event_attr, in its first version: 64 bytes
CLOSE_ON_EXEC = 1 << 3
FILES_SHARE = 0.5  # of the open files that a process may have


def open_event(
    event: tuple[int, int], thread: int, leader: int = -1, flags: int = 0, cpu: int = -1
) -> int:
    """The file of an event, (kind, number), that counts from now on. Raises OSError.

    Of a thread on all CPUs, or, with thread -1, of all threads on one CPU.
    """
    number = CALL_NUMBERS.get(platform.machine())
    if not number or platform.system() != "Linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    kind, config = event
    attributes = ATTRIBUTES.pack(kind, ATTRIBUTES.size, config, 0, 0, GROUP_FORMAT, flags, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = map(ctypes.c_long, (thread, cpu, leader, CLOSE_ON_EXEC))
    file = libc.syscall(ctypes.c_long(number), ctypes.c_char_p(attributes), *numbers)
    if file < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return file


def read_group(file: int) -> tuple[int, ...]:
    """Nanoseconds counted for, nanoseconds on the counters, and the values of a group's events."""
    numbers = memoryview(os.read(file, 8 * (3 + len(HARDWARE_EVENTS)))).cast("Q")
    return tuple(numbers[1 : 3 + numbers[0]])


def core_kinds(root: Path) -> list[int]:
    """The kinds of cores, as the upper half of an event's number: one 0, or P and E cores' own."""
    devices = root / "sys/bus/event_source/devices"
    kinds = (read_text(devices / name / "type") for name in ("cpu_core", "cpu_atom"))
    return [int(kind) << 32 for kind in kinds if kind.isdecimal()] or [0]


@dataclass(frozen=True)
class Group:
    """Events of a thread that are on the counters at the same time, read by one file."""

    names: tuple[str, ...]
    files: tuple[int, ...]  # the first one leads
    scaled: bool  # to the whole time, where it was on the counters for a part of it


class PerfEvents(Source):
    """Cycles, instructions and last-level cache misses of a lane's threads, and their task clock.

    Reads misses alone, not prefetches: LLC-load-misses of perf-list(1).
    """

    def __init__(self, root: Path = Path("/")):
        super().__init__()
        self._kinds = core_kinds(root)
        self._groups: dict[str, list[Group]] = {}  # by lane
        self._flags = EXCLUDE_HYPERVISOR
        try:
            os.close(open_event(TASK_CLOCK, 0, flags=self._flags))
        except OSError:  # as by kernel.perf_event_paranoid 2
            self._flags |= EXCLUDE_KERNEL
        self._names = [name for name in HARDWARE_EVENTS if self._exists(name)]
        if self._flags & EXCLUDE_KERNEL and self._names:
            self.notes.append("cycles, instructions, llc_misses: without those in the kernel")

    def _exists(self, name: str) -> bool:
        """Whether this machine has an event of the hardware; keeps the reason if not."""
        kind, config = HARDWARE_EVENTS[name]
        try:
            for core_kind in self._kinds:
                os.close(open_event((kind, config | core_kind), 0, flags=self._flags))
        except OSError as error:
            self.missing[name] = why_no_event(error)
        return name not in self.missing

    def watch(self, lane: str, threads: Iterable[int]) -> None:
        """Count for these threads of a lane, by kernel id."""
        self._groups[lane] = groups = []
        threads = list(threads)
        needed = len(threads) * (1 + len(self._names) * len(self._kinds))
        allowed = FILES_SHARE * resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if needed > allowed:
            reason = f"needs {needed} open files; see ulimit -n"
            self.missing |= dict.fromkeys((*self._names, "task_clock_s"), reason)
            return
        hardware = [HARDWARE_EVENTS[name] for name in self._names]
        try:
            for thread in threads:
                groups.append(self._open_group(("task_clock_s",), [TASK_CLOCK], thread))
                for core_kind in self._kinds if hardware else ():
                    events = [(kind, config | core_kind) for kind, config in hardware]
                    groups.append(self._open_group(tuple(self._names), events, thread))
        except OSError as error:
            close_all(file for group in groups for file in group.files)
            groups.clear()
            self.missing |= dict.fromkeys((*self._names, "task_clock_s"), why_no_event(error))

    def _open_group(
        self, names: tuple[str, ...], events: Sequence[tuple[int, int]], thread: int
    ) -> Group:
        """Events that count together. Raises OSError, with nothing left open."""
        files: list[int] = []
        try:
            for event in events:
                leader = files[0] if files else -1
                files.append(open_event(event, thread, leader, self._flags))
        except OSError:
            close_all(files)
            raise
        # A group of one kind of cores rests while its thread runs on the other kind.
        return Group(names, tuple(files), scaled=len(self._kinds) == 1)

    def read(self, lane: str) -> list[tuple[int, ...]]:
        """The values of each group so far."""
        return [read_group(group.files[0]) for group in self._groups.get(lane, ())]

    def between(
        self, lane: str, before: Sequence[tuple[int, ...]], after: Sequence[tuple[int, ...]]
    ) -> dict[str, float]:
        """What was counted between two readings, but for events that no counter was free for."""
        total: Counter[str] = Counter()
        starved: set[str] = set()
        for group, first, last in zip(self._groups.get(lane, ()), before, after, strict=True):
            enabled_ns, running_ns, *values = (b - a for a, b in zip(first, last, strict=True))
            if enabled_ns and not running_ns and group.scaled:
                starved.update(group.names)
                continue
            scale = enabled_ns / running_ns if group.scaled and running_ns else 1.0
            for name, value in zip(group.names, values, strict=True):
                total[name] += scale * value
        if "task_clock_s" in total:
            total["task_clock_s"] /= 1e9
        return {name: value for name, value in total.items() if name not in starved}

    def close(self) -> None:
        """Stop counting."""
        for groups in self._groups.values():
            close_all(file for group in groups for file in group.files)
        self._groups = {}


def close_all(files: Iterable[int]) -> None:
    """Close files by their numbers."""
    for file in files:
        with contextlib.suppress(OSError):
            os.close(file)


def why_no_event(error: OSError) -> str:
    """Why the system counts no such event, in words."""
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
        return "this processor, or its hypervisor, shows none"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "not allowed (kernel.perf_event_paranoid, or the container's seccomp profile)"
    if error.errno == errno.ENOSYS:
        return "the system has no perf_event_open"
    return f"perf_event_open: {error.strerror}"
