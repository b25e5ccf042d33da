"""`--operators`: some steps under PyTorch's profiler, with the lanes' phases as its ranges.

Nothing of it is paid outside of these steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from split_affinity.errors import UserError
from split_affinity.files import read_text
from split_affinity.kernels.fused_norm import before_fused_norm
from split_affinity.lanes.audit import PhaseRecord
from split_affinity.lanes.lane import Lanes
from split_affinity.models.freezing import layer_groups
from split_affinity.training.network import Network
from split_affinity.training.operators import (
    BEFORE,
    LAYER,
    MEASURED,
    OperatorTimes,
    Touched,
    operator_times,
)
from split_affinity.training.steps import StepResult

PROFILED_STEPS = 3
TEACHER = "teacher"
CLEAR_REFS, PAGES = Path("/proc/self/clear_refs"), Path("/proc/self/smaps_rollup")


def all_threads() -> Any:
    """The profiler's setting for all lanes' threads. Raises UserError if this torch has none."""
    # Its messages would stand between ours; kineto reads this when it begins.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        return torch.profiler._ExperimentalConfig(profile_all_threads=True)
    except (AttributeError, TypeError):
        missing = f"torch {torch.__version__} cannot profile the threads of lanes"
        raise UserError(f"--operators: {missing}; torch 2.10 or newer can") from None


def new_profiler() -> torch.profiler.profile:
    """A profiler of all threads."""
    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        experimental_config=all_threads(),
        acc_events=True,
    )


def profile_nothing() -> None:
    """Have the profiler begin for the first time."""
    with new_profiler():
        pass


class LayerMarks:
    """Marks in a profile where the layers of another group begin, within forward phases.

    The groups are those of gradients.png. A layer without weights is a group by itself.
    """

    def __init__(self, network: Network):
        self._teacher = network.teacher.model if network.teacher else None
        self._groups = {*layer_groups(name for name, _ in network.model.named_parameters())}
        self._depth = max((group.count(".") for group in self._groups), default=0) + 1
        self._found: dict[nn.Module, str] = {}  # the group of each module; empty for what is none
        self._thread = threading.local()

    @contextlib.contextmanager
    def placing(self) -> Iterator[None]:
        """Place marks for a while, in phases that are in `forward`."""
        before_fused_norm.append(self._enter)
        # Hooks of modules themselves would keep torch.fx from following the model.
        hook = register_module_forward_pre_hook(self._enter)
        try:
            yield
        finally:
            hook.remove()
            before_fused_norm.remove(self._enter)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """A forward phase, on the calling thread."""
        self._thread.group = ""
        try:
            yield
        finally:
            del self._thread.group

    def _enter(self, module: nn.Module, *_: Any) -> None:
        latest = getattr(self._thread, "group", None)
        if latest is None:
            return
        if module not in self._found:  # the root: the model, its graph, or a copy of one
            for name, each in module.named_modules():
                name = getattr(each, "stands_for", name)  # of a FoldedConvolution
                own = self.group_of(name, is_layer=not any(each.children()))
                self._found[each] = TEACHER if module is self._teacher else own
        group = self._found[module] or latest
        if group != latest:
            self._thread.group = group
            with torch.profiler.record_function(LAYER + group):
                pass

    def group_of(self, name: str, is_layer: bool) -> str:
        """The group of a module by its name; empty for one that only holds others of no group."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if (group := ".".join(parts[:length])) in self._groups:
                return group
        return ".".join(parts[: self._depth]) if is_layer else ""


class OperatorWatch:
    """Has some steps of a run profiled, and knows the `times` of their operators then.

    The first step is left out, since it fetches memory; the second one warms the profiler up, and
    tells which layers the backward phases of `delayed` belong to. The next ones count.
    """

    def __init__(self, lanes: Lanes, network: Network, wanted: bool = True):
        self.wanted = wanted
        self.times: OperatorTimes | None = None
        lanes_once = dict.fromkeys((lanes.forward, lanes.backward))  # one may have both names
        self._lanes, self._network = [*lanes_once], network
        self._first = self._looks = True

    def steps(self, steps: Iterator[StepResult]) -> Iterator[StepResult]:
        """The steps of an epoch; of these, some are profiled unless those of another were."""
        if self.wanted and self._first:
            self._first = False
            yield from itertools.islice(steps, 1)
        if self.wanted and not self.times:
            yield from self._profiled(steps)
        if self.times and self._looks:
            yield from self._touching(steps)
        yield from steps

    def _profiled(self, steps: Iterator[StepResult]) -> Iterator[StepResult]:
        marks, measured = LayerMarks(self._network), []
        # The profiler starts a thread, which goes on for as long as the process does. It belongs to
        # a lane, or the audit would call its time stray.
        self._lanes[0].adopt(profile_nothing)
        profiler = new_profiler()
        try:
            with marks.placing(), profiler:
                with self._around_phases(functools.partial(ranged, marks, BEFORE)):
                    yield from profiled(steps, 1)
                with self._around_phases(functools.partial(ranged, marks, MEASURED)):
                    for step in profiled(steps, PROFILED_STEPS):
                        measured.append(step)
                        yield step
        finally:  # also if the run ends meanwhile
            if measured:
                self.times = operator_times(profiler.events(), measured)

    def _touching(self, steps: Iterator[StepResult]) -> Iterator[StepResult]:
        try:
            touched_bytes()
        except (OSError, ValueError):
            self._looks = False
            hidden = "the system does not show it"
            self.times = dataclasses.replace(self.times, untouched=hidden)
            return
        found: list[tuple[str, str, int]] = []
        with self._around_phases(functools.partial(touching, found)):
            for step in profiled(steps, 1):
                self._looks = False
                touched = tuple(touched_alone(found, step.records))
                self.times = dataclasses.replace(self.times, touched=touched, untouched="")
                yield step

    @contextlib.contextmanager
    def _around_phases(self, around: Any) -> Iterator[None]:
        for lane in self._lanes:
            lane.around = functools.partial(around, lane.group.name)
        try:
            yield
        finally:
            for lane in self._lanes:
                lane.around = contextlib.nullcontext


def profiled(steps: Iterator[StepResult], count: int) -> Iterator[StepResult]:
    """The next steps, which say that they were profiled."""
    for step in itertools.islice(steps, count):
        yield dataclasses.replace(step, profiled=True)


@contextlib.contextmanager
def ranged(marks: LayerMarks, kind: str, lane: str, phase: str) -> Iterator[None]:
    """A phase as a range of the profiler."""
    layers = marks.forward() if phase == "forward" else contextlib.nullcontext()
    with torch.profiler.record_function(f"{kind}{lane}/{phase}"), layers:
        yield


def touched_bytes() -> int:
    """The size of the pages that the process has used since the last call (proc_pid_smaps(5)).

    Raises OSError or ValueError where the system does not tell.
    """
    for line in read_text(PAGES).splitlines():
        if line.startswith("Referenced:"):
            CLEAR_REFS.write_text("1")
            return 1024 * int(line.split()[1])
    raise ValueError("no such figure")


@contextlib.contextmanager
def touching(found: list[tuple[str, str, int]], lane: str, phase: str) -> Iterator[None]:
    """A phase whose memory is measured, by the pages that the whole process uses meanwhile."""
    touched_bytes()
    yield
    found.append((lane, phase, touched_bytes()))


def touched_alone(
    found: Sequence[tuple[str, str, int]], records: Sequence[PhaseRecord]
) -> list[Touched]:
    """What phases touched, of those that no other phase ran beside; `records` are the same phases.

    Both are in the order of each lane. Beside another phase the figure is too large or too small.
    """
    touched = []
    for lane in {lane for lane, _, _ in found}:
        own = [record for record in records if record.lane == lane]
        sizes = [each for each in found if each[0] == lane]
        for record, (_, phase, size_bytes) in zip(own, sizes, strict=True):
            alone = all(
                other.end_s <= record.start_s or record.end_s <= other.start_s
                for other in records
                if other is not record
            )
            touched.append(Touched(lane, phase, size_bytes if alone else None))
    return touched
