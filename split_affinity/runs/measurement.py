"""Measuring on this machine: processes for it, phase times, and the split that suits them.

Measurements run in processes of their own: the allocator's settings, threads and peak memory belong
to a process. Only one of them works at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import multiprocessing.connection
import signal
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import psutil
import torch

from split_affinity.data.dataset import open_data
from split_affinity.data.loader import Batches, LoaderDied
from split_affinity.data.samples import Loaded
from split_affinity.errors import STOP_SIGNALS, RunError, UserError, likely_reason, memory_errors
from split_affinity.files import write_traceback
from split_affinity.lanes.audit import PhaseRecord
from split_affinity.lanes.lane import Lanes, coordinating, tune_allocator
from split_affinity.machine.plan import (
    CorePlan,
    Group,
    PhaseTimes,
    check_core_options,
    divide_cores,
    loader_count,
    make_group,
    plan_cores,
    usable_cores,
)
from split_affinity.machine.topology import Topology, cpus_of
from split_affinity.models.cost import check_memory
from split_affinity.models.freezing import mostly_frozen
from split_affinity.models.registry import check_model_name
from split_affinity.options.settings import Settings
from split_affinity.ranks.ranks import RankLost
from split_affinity.runs.setup import build_train_state, check_writable, settings_in_force
from split_affinity.signals import StopRequest
from split_affinity.terminal import say
from split_affinity.text import plural
from split_affinity.training.schedules import sequential, step_bound_s
from split_affinity.training.steps import PHASES
from split_affinity.training.update import TrainState

ENDED_WITHIN_S = 5  # a process whose pipe is closed


class MeasuringProcess(Iterator[Any]):
    """The generator that `function(*args)` makes, in a process of its own, which must be closed.

    `check_stop` is called while waiting, and may raise.
    """

    def __init__(self, check_stop: Callable[[], None], function: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.check_stop = check_stop
        self.pipe, theirs = context.Pipe()
        # No daemon: it may have loader processes, which a daemon must not.
        self._process = context.Process(target=run_generator, args=(theirs, function, args))
        # It inherits what is blocked: Ctrl-C must not reach it before it can ignore signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self._process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def __next__(self) -> Any:
        return send_to_all([self], None)[0]

    def why_gone(self) -> RunError:
        """Why the process has ended by itself."""
        self._process.join(ENDED_WITHIN_S)
        code = self._process.exitcode
        if code == -signal.SIGKILL:  # by the system, most likely
            return RunError("a measuring process was killed (out of memory?)")
        how = f"exit code {code}"
        if code is None:
            how = "no word"
        elif code < 0:
            how = signal.Signals(-code).name
        return RunError(f"a measuring process ended by itself, with {how}")

    def close(self) -> None:
        """End the process and its loaders, whatever they are doing."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for loader in psutil.Process(self._process.pid).children():
                loader.kill()
        self._process.kill()
        self._process.join()
        self.pipe.close()


def send_to_all(processes: Sequence[MeasuringProcess], value: Any) -> list[Any]:
    """Send a value to several generators at once, and wait for the next result of each."""
    asked = {process.pipe: process for process in processes}
    results: dict[Any, Any] = {}
    for pipe, process in asked.items():
        try:
            pipe.send(value)
        except OSError:
            results[pipe] = process.why_gone()
    while True:
        errors = [each for each in results.values() if isinstance(each, Exception)]
        if errors:  # the others may be waiting for the one that had it; RankLost says least
            raise min(errors, key=lambda error: isinstance(error, RankLost))
        if len(results) == len(asked):
            return [results[pipe] for pipe in asked]
        processes[0].check_stop()
        for pipe in multiprocessing.connection.wait(asked.keys() - results, 0.1):
            try:
                results[pipe] = pipe.recv()
            except (EOFError, OSError):
                results[pipe] = asked[pipe].why_gone()


def run_generator(pipe: Any, function: Callable[..., Generator], args: Sequence[Any]) -> None:
    """In that process: answer each value from the pipe with the next result or the exception."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # A run's loaders are made by the default method, not by spawn as this process.
    multiprocessing.set_start_method(None, force=True)
    with (
        contextlib.suppress(EOFError, BrokenPipeError),  # the asking process has gone
        contextlib.closing(function(*args)) as generator,
    ):
        while True:
            value = pipe.recv()
            try:
                with memory_errors():
                    result = generator.send(value)
            except (UserError, RunError, StopIteration) as error:
                result = error
            except LoaderDied as error:
                result = RunError(likely_reason(error))
            except Exception as error:  # its traceback would not reach the one who asks
                place = write_traceback(None, error)
                result = RunError(f"a measuring process: {likely_reason(error)}; {place}")
            pipe.send(result)


def time_phases(lanes: Lanes, train_state: TrainState, batches: Batches, steps: int) -> PhaseTimes:
    """Times of the phases in `steps` sequential steps, where no two phases overlap."""
    lanes.take_records()
    lanes.forward.call(train_state.network.build_view)
    for _ in itertools.islice(sequential(lanes, train_state, batches), steps):
        pass
    network = train_state.network
    lanes.forward.run("refresh", network.refresh, lanes.forward.call(network.copy))
    return phase_times(lanes.take_records())


def phase_times(records: Iterable[PhaseRecord]) -> PhaseTimes:
    """Median times of the phases; of two, the lower one: the first may have fetched memory."""
    durations_s: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for record in records:
        durations_s[record.phase].append(record.duration_s)
    return PhaseTimes(
        **{f"{name}_s": statistics.median_low(each or [0.0]) for name, each in durations_s.items()}
    )


def plan_for(settings: Settings, topology: Topology) -> CorePlan:
    """The core plan; for `--split auto` phases are timed first (see step_bound_s), in seconds."""
    if settings.split != "auto":
        return plan_cores(topology, settings)
    check_core_options(topology, settings)
    forward, reason, measured = 1, "is the only choice", {}
    cores = len(usable_cores(topology))
    if cores > 2:
        measured = measure_scaling(settings, topology, core_counts(cores))
        bounds_s = split_bounds_s(settings.schedule, settings.accumulate, measured, cores)
        forward, even = min(bounds_s, key=bounds_s.__getitem__), cores // 2
        times = "; ".join(
            f"{count}: {times.forward_s:.3f} and {times.backward_s:.3f} s"
            for count, times in measured.items()
        )
        reason = (
            f"has the smallest bound of a {settings.schedule} step, {bounds_s[forward]:.3f} s "
            f"({even}:{cores - even} has {bounds_s[even]:.3f} s); forward and backward of a batch "
            f"by cores: {times}"
        )
    split = f"{forward}:{max(1, cores - forward)}"
    plan = plan_cores(topology, dataclasses.replace(settings, split=split))
    notes = (*plan.notes, f"split auto: with {plural(cores, 'core')} {split} {reason}")
    return dataclasses.replace(plan, split=f"auto, {split}", notes=notes, measured=measured)


def core_counts(cores: int) -> list[int]:
    """The group sizes to measure: about a quarter, a half and three quarters of the cores."""
    return sorted({max(1, round(cores * share)) for share in (0.25, 0.5, 0.75)})


def split_bounds_s(
    schedule: str, accumulate: int, measured: dict[int, PhaseTimes], cores: int
) -> dict[int, float]:
    """The bound of a step by number of forward cores, where both groups' times are known."""
    bounds_s = {}
    for forward in range(1, cores):
        smaller, larger = sorted((forward, cores - forward))
        if min(measured) <= smaller and larger <= max(measured):
            ours = interpolate_times(measured, forward)
            theirs = interpolate_times(measured, cores - forward)
            times = PhaseTimes(ours.forward_s, theirs.backward_s, theirs.update_s, ours.refresh_s)
            bounds_s[forward] = step_bound_s(schedule, times, accumulate)
    return bounds_s


def interpolate_times(measured: dict[int, PhaseTimes], cores: int) -> PhaseTimes:
    """Phase times on a number of cores between two that were measured, as a power of it."""
    below = max(count for count in measured if count <= cores)
    above = min(count for count in measured if count >= cores)
    part = math.log(cores / below) / math.log(above / below) if above > below else 0.0
    few, many = (dataclasses.astuple(measured[count]) for count in (below, above))
    pairs = zip(few, many, strict=True)
    return PhaseTimes(*(few_s ** (1 - part) * many_s**part for few_s, many_s in pairs))


def measured_settings(settings: Settings, topology: Topology) -> Settings:
    """The settings for measuring: without epochs, growing images, trained weights, unfreezing."""
    left_out = dict.fromkeys(("epochs", "min_res", "init_from", "weights"))
    left_out |= {"freeze": mostly_frozen(settings), "freeze_epochs": None}
    loaders = loader_count(settings, len(usable_cores(topology)))
    data = open_data(settings)
    return settings_in_force(settings, topology, data, workers=loaders, **left_out)


def measure_scaling(
    settings: Settings, topology: Topology, counts: Sequence[int]
) -> dict[int, PhaseTimes]:
    """Phase times on groups of some sizes, one after the other, in a process of their own."""
    check_model_name(settings.model)
    check_writable(settings)
    settings = measured_settings(settings, topology)
    check_memory(settings, topology, settings.batch_size)
    say(f"split auto: measuring {settings.model} on {', '.join(map(str, counts))} cores")
    groups = [group_of_size(topology, count) for count in counts]
    return dict(zip(counts, times_on_groups(settings, topology.online, groups), strict=True))


def group_of_size(topology: Topology, count: int) -> Group:
    """A group of so many of the usable cores, with the same mix of fast and slow ones."""
    cores = usable_cores(topology)
    left = len(cores) - count
    cpus = divide_cores(cores, f"{count}:{left}")[0] if left else cpus_of(cores)
    return make_group(topology, "all", cpus, None)


def times_on_groups(
    settings: Settings, online: Sequence[int], groups: Sequence[Group]
) -> list[PhaseTimes]:
    """Phase times on each group, one after the other, in a process of their own."""
    with StopRequest() as stop:
        measuring = MeasuringProcess(stop.check, time_groups, settings, online, groups)
        with contextlib.closing(measuring):
            return [next(measuring) for _ in groups]


def time_groups(
    settings: Settings, online: Sequence[int], groups: Sequence[Group]
) -> Iterator[PhaseTimes]:
    """Phase times on each group in turn, on random images, after a step that is left out."""
    if settings.tuned_malloc:
        tune_allocator()
    size = (settings.batch_size, 3, settings.image_size, settings.image_size)
    loaded = [Loaded((torch.randn(size), torch.randint(settings.num_classes, size[:1])))]
    # Without a learning rate nothing can diverge, and it takes the same time.
    settings = dataclasses.replace(settings, accumulate=1, lr=0.0, lr_scheduler="constant")
    for group in groups:
        plan = CorePlan("none", group, group, group.cpus)
        with coordinating(settings, plan), Lanes(plan, online) as lanes:
            train_state = build_train_state(settings, lanes)
            time_phases(lanes, train_state, Batches(loaded, 1), 1)
            yield time_phases(lanes, train_state, Batches(loaded, 2), 2)
