"""Lanes: threads that each own one core group, used like device queues.

A lane's OpenMP team is born inside the group's affinity mask and stays there. To move the calling
thread alone would leave the workers of an older team behind [pytorch 161576]. Knows nothing of
models.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from split_affinity import AFFINITY_REFUSED, process_cpus
from split_affinity.counters.counters import NO_COUNTERS, Counters
from split_affinity.errors import RunError
from split_affinity.lanes.audit import (
    LOOK_SHARE,
    Audit,
    PhaseRecord,
    hidden_figures,
    thread_ids,
)
from split_affinity.lanes.contention import ContentionMonitor
from split_affinity.machine.plan import CorePlan, Group
from split_affinity.options.settings import Settings
from split_affinity.text import format_cpu_list, plural


def confine_thread(cpus: Iterable[int]) -> frozenset[int]:
    """Confine the calling thread to `cpus`; returns the mask in force, or raises RunError."""
    wanted = frozenset(cpus)
    refused = AFFINITY_REFUSED or not hasattr(os, "sched_setaffinity")
    if refused or process_cpus() == wanted:
        return wanted
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        asked, allowed = format_cpu_list(wanted), format_cpu_list(process_cpus())
        reason = f"the system allows none of the cores {asked}, only {allowed}"
        if error.errno != errno.EINVAL:
            reason = f"the system does not keep a thread on cores {asked} any more"
            reason += f" (sched_setaffinity: {error.strerror})"
        raise RunError(reason) from error
    return process_cpus()  # the kernel silently drops CPUs that a container manager has taken away


@contextlib.contextmanager
def confined_to(cpus: Iterable[int]) -> Iterator[None]:
    """Confine the calling thread, and threads that it starts, to `cpus` for a while."""
    before = process_cpus()
    confine_thread(cpus)
    try:
        yield
    finally:
        with contextlib.suppress(RunError):  # it would hide an error inside
            confine_thread(before)


def tune_allocator() -> str:
    """Have glibc keep freed memory for the next step, for good; returns why it cannot, or nothing.

    By default a step's large buffers go back to the kernel. It hands them out again page by page
    and zeroed: some 100,000 page faults a step (mallopt(3)).
    """
    if platform.libc_ver()[0] != "glibc":
        return "the allocator stays as it is: its settings are known for glibc alone"
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # of malloc.h
    chosen = {m_mmap_max: 0, m_trim_threshold: 2**31 - 1, m_top_pad: 2**28, m_arena_max: 1}
    if not all(libc.mallopt(name, value) for name, value in chosen.items()):
        return "the allocator stays as it is: glibc refuses the settings"
    return ""


def start_team() -> set[int]:
    """Have OpenMP start the calling thread's workers, which inherit its mask; returns their ids.

    Call this before the thread's first parallel operation.
    """
    before, asked = set(thread_ids()), torch.get_num_threads()
    torch.zeros(asked * 2**16).add_(1)  # PyTorch gives a thread at least 32,768 elements
    workers = set(thread_ids()) - before
    if before and len(workers) + 1 < asked:  # OMP_THREAD_LIMIT
        # Kernels of oneDNN would spin forever at a barrier for the missing threads.
        torch.set_num_threads(len(workers) + 1)
    return workers


class Lane:
    """One core group and the thread that works for it, used like a device queue.

    The audit takes a closer look (where each thread was last seen, how busy each CPU was) at each
    kind of phase as often as that costs LOOK_SHARE of the time: always, unless phases are short or
    cores many.
    """

    def __init__(self, group: Group, audit: Audit):
        self.group = group  # with as many threads as OpenMP gave
        self.records: list[PhaseRecord] = []  # of each phase, in order
        self.notes: list[str] = []
        self.around: Callable[[str], Any] = contextlib.nullcontext  # a context for each phase
        self._audit = audit
        self._ident = 0  # of its thread, for Python
        self._look_at_s: dict[str, float] = {}  # by phase: when to look closely again
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"{group.name} lane")
        try:
            with confined_to(group.cpus):  # a thread inherits the mask: not a moment elsewhere
                self.call(self._start_team)
        except BaseException:
            self.close()
            raise

    def submit(self, phase: str, function: Callable[..., Any], *args: Any) -> Future:
        """Queue one phase; the future gives the function's result or raises its exception."""
        return self._executor.submit(self._run_phase, phase, function, args)

    def run(self, phase: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run one phase and wait for its result."""
        return self.submit(phase, function, *args).result()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run something on the lane's thread that is no phase, such as building a model.

        Ctrl-C while waiting interrupts it too: a download, say.
        """
        future = self._executor.submit(self._run_inside_group, function, args)
        try:
            return future.result()
        except KeyboardInterrupt:
            if future.running():
                ident, error = ctypes.c_ulong(self._ident), ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)
            raise

    def adopt(self, function: Callable[..., Any], *args: Any) -> Any:
        """As `call`, for something that starts threads, as gloo does; they belong to the lane."""

        def adopting() -> Any:
            before = set(thread_ids())
            result = self._run_inside_group(function, args)
            self._audit.born_for |= dict.fromkeys(set(thread_ids()) - before, self.group)
            return result

        return self._executor.submit(adopting).result()

    def close(self) -> None:
        """Drop what is queued, wait for what is running, and end the thread."""
        self._executor.shutdown(cancel_futures=True)

    def _enter_group(self) -> frozenset[int]:
        """Confine the calling thread to the group; returns the mask in force."""
        mask = confine_thread(self.group.cpus)
        if torch.get_num_threads() != self.group.threads:  # setting it clears oneDNN's cache
            torch.set_num_threads(self.group.threads)
        # One object for all records.
        return self.group.cpu_set if mask == self.group.cpu_set else mask

    def _run_inside_group(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        self._enter_group()
        return function(*args)

    def _start_team(self) -> None:
        """Start the lane's workers, inside the mask, and register them."""
        self._ident = threading.get_ident()
        lane_and_workers = {threading.get_native_id(), *start_team()}
        if (threads := torch.get_num_threads()) < self.group.threads:
            self.notes.append(
                f"{self.group.name} lane: OpenMP started {plural(threads, 'thread')}, "
                f"not {self.group.threads} (is OMP_THREAD_LIMIT set?)"
            )
            self.group = dataclasses.replace(self.group, threads=threads)
        self._audit.born_for |= dict.fromkeys(lane_and_workers, self.group)
        self._audit.counters.watch(self.group.name, lane_and_workers)

    def _run_phase(self, phase: str, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        called_s = time.perf_counter()
        mask = self._enter_group()
        look = called_s >= self._look_at_s.get(phase, 0.0)
        before = self._audit.begin(self.group, look)
        start_s = time.perf_counter()
        with self.around(phase):
            result = function(*args)
        end_s = time.perf_counter()
        used = self._audit.end(self.group, before)
        now_s = time.perf_counter()
        audit_s = (start_s - called_s) + (now_s - end_s)
        if look:
            self._look_at_s[phase] = now_s + audit_s / LOOK_SHARE
        record = PhaseRecord(phase, self.group.name, start_s, end_s, mask, **used, audit_s=audit_s)
        self.records.append(record)
        return result


class Lanes:
    """The two lanes of a core plan; with `--split none`, one lane under both names.

    Leaving this context manager, by an exception too, drains and ends both lanes. `plan` has the
    threads that OpenMP gave; `notes` are for the user; `monitor` watches who else uses the cores.
    `counters` count in each phase, and are closed with the lanes.
    """

    def __init__(self, plan: CorePlan, online: Sequence[int], counters: Counters = NO_COUNTERS):
        audit = Audit(online, counters)
        self.counters = counters
        self._lanes: list[Lane] = []
        try:
            for group in plan.groups:  # one after the other, so that each team is known by birth
                self._lanes.append(Lane(group, audit))
        except BaseException:
            self.close()
            raise
        self.forward, self.backward = self._lanes[0], self._lanes[-1]
        groups = {"forward": self.forward.group, "backward": self.backward.group}
        self.plan = dataclasses.replace(plan, **groups)
        notes = [note for lane in self._lanes for note in lane.notes]
        self.notes = [*notes, *hidden_figures(self.plan, online), *counters.notes()]
        self.monitor = ContentionMonitor(self.plan, online)

    def take_records(self) -> tuple[PhaseRecord, ...]:
        """The phases since the last call, by start time; forgets them."""
        records = []
        for lane in self._lanes:
            records += lane.records
            lane.records = []
        return tuple(sorted(records, key=lambda record: record.start_s))

    def close(self) -> None:
        """Close all lanes."""
        for lane in self._lanes:
            lane.close()
        self.counters.close()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextlib.contextmanager
def coordinating(settings: Settings, plan: CorePlan) -> Iterator[None]:
    """Make the calling thread the coordinator for a while: on the loaders' cores, without a team,
    and with the process's switches for determinism and denormals as set.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(settings.deterministic)
    torch.set_flush_denormal(settings.flush_denormals)  # of each thread; lanes inherit it
    try:
        with confined_to(plan.loader_cpus):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.set_flush_denormal(False)


def give_memory_back() -> None:
    """Return freed memory to the system: other processes of a comparison want to use it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
