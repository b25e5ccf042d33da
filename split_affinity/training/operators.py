"""Where the time of profiled steps goes: by operator, by kind of operator, by layer group. Pure."""

from __future__ import annotations

import bisect
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from split_affinity.training.steps import PHASES, StepResult

# Ranges of the profiler begin so: a phase, "measured" or before that, and where a layer begins.
MEASURED, BEFORE, LAYER = "phase measured/", "phase before/", "layer/"
ENGINE = "autograd::engine::evaluate_function: "

# Kinds of operators, by how their names begin; the first that fits counts.
CONVOLUTIONS = ("convolution forward", "convolution backward")
KINDS = {
    "convolution backward": ("ConvolutionBackward", "aten::convolution_backward"),
    "convolution forward": (
        *("aten::conv2d", "aten::convolution", "aten::_convolution"),
        "mkldnn::_convolution_pointwise",
    ),
    "fused norm backward": ("FusedNormBackward",),
    "fused norm forward": ("FusedNorm",),
    "batch norm backward": ("NativeBatchNorm", "aten::native_batch_norm_backward"),
    "batch norm forward": ("aten::batch_norm", "aten::native_batch_norm"),
    "layer norm backward": ("NativeLayerNorm",),
    "layer norm forward": ("aten::layer_norm", "aten::native_layer_norm"),
    "attention": ("aten::scaled_dot_product", "ScaledDotProduct"),
    "ReLU forward": ("aten::relu",),
    "ReLU backward": ("ReluBackward", "aten::threshold_backward"),
    "other activations": (
        *("aten::hardtanh", "aten::hardswish", "aten::hardsigmoid", "aten::silu", "aten::gelu"),
        *("aten::sigmoid", "aten::leaky_relu", "Hardtanh", "Hardswish", "Hardsigmoid", "Silu"),
        *("Gelu", "Sigmoid", "LeakyRelu"),
    ),
    "sums of gradients": ("torch::autograd::AccumulateGrad",),
    "matrix products": (
        *("aten::linear", "aten::addmm", "aten::matmul", "aten::mm", "aten::bmm", "Addmm"),
        *("MmBackward", "Bmm", "TBackward"),
    ),
    "loss and scores": (
        *("aten::cross_entropy", "NllLoss", "LogSoftmax", "aten::nll", "aten::log_softmax"),
        *("aten::topk",),
    ),
    "additions": ("aten::add", "AddBackward"),
    "casts and copies": (
        *("aten::to", "aten::contiguous", "aten::clone", "aten::copy_", "ToCopyBackward"),
        *("CloneBackward", "CopyBackwards"),
    ),
    "pooling": (
        *("aten::max_pool", "aten::avg_pool", "aten::adaptive_avg_pool", "aten::mean"),
        *("MaxPool", "AvgPool", "AdaptiveAvgPool", "MeanBackward"),
    ),
    "optimizer": ("Optimizer.", "aten::_fused_", "aten::_foreach_"),
    "sums over ranks": ("c10d::",),
}
REST, OUTSIDE = "other operators", "outside of operators"

# Groups of what belongs to no layer: before the first one, loss and scores; of other phases none.
FIRST_GROUP = {"forward": "input", "backward": "loss"}
UNKNOWN_GROUP = "unknown"


@dataclass(frozen=True)
class Touched:
    """How much memory a phase has read or written; None if it did not run alone."""

    lane: str
    phase: str
    size_bytes: int | None


def kind_of(name: str) -> str | None:
    """The kind of an operator by its name, or None."""
    name = name.removeprefix(ENGINE)
    for kind, beginnings in KINDS.items():
        if name.startswith(beginnings):
            return kind
    return None


def outermost_kind(event: Any) -> str:
    """The kind of an operator of the profiler: that of the outermost one around it that has any."""
    kind = REST
    while event is not None:
        kind = kind_of(event.name) or kind
        event = event.cpu_parent
    return kind


def time_by_kind(events: Iterable[Any]) -> Counter[str]:
    """Microseconds of the profiler's events by kind."""
    found: Counter[str] = Counter()
    for event in events:
        found[outermost_kind(event)] += event.self_cpu_time_total
    return found


@dataclass(frozen=True)
class OperatorTime:
    """What an operator took in the phases of a layer group, as the mean of a step.

    `self_ms` is without the operators that it called. `kind` is that of the outermost one.
    """

    lane: str
    phase: str
    layer_group: str
    operator: str
    kind: str
    calls: float
    self_ms: float
    total_ms: float


@dataclass(frozen=True)
class OperatorTimes:
    """The operators of some steps; `step_ms` is their mean. What is outside of operators has rows
    too, so that the rows of a phase add up to the time that the audit measured. `untouched` says
    why it is unknown what phases touch; it is empty if that is known.
    """

    first: int
    last: int
    step_ms: float
    rows: tuple[OperatorTime, ...]
    touched: tuple[Touched, ...] = ()
    untouched: str = "no step was left to see it"

    @property
    def steps(self) -> int:
        """How many were profiled."""
        return self.last - self.first + 1

    def phases(self) -> list[tuple[str, str]]:
        """Lane and phase, in the order of a step."""
        found = dict.fromkeys((row.lane, row.phase) for row in self.rows)
        return sorted(found, key=lambda each: PHASES.index(each[1]))

    def of_phase(self, phase: str) -> list[OperatorTime]:
        """The rows of a phase."""
        return [row for row in self.rows if row.phase == phase]


class Attribution:
    """Finds the phase and the layer group of each event, of events in the order of time.

    A backward operator belongs to the layer whose forward operator has its sequence number, on the
    thread that the number is of.
    """

    def __init__(self) -> None:
        self._phase: dict[int, Any] = {}  # by thread, the event of the latest one
        self._group: dict[int, str] = {}  # by thread, the latest one
        self._numbers: dict[int, list[int]] = defaultdict(list)  # by thread, and their groups
        self._groups_of_numbers: dict[int, list[str]] = defaultdict(list)

    def place(self, event: Any) -> tuple[Any, str] | None:
        """The event of the phase around an operator, and its group; None for what is none."""
        thread, name = event.thread, event.name
        if name.startswith((BEFORE, MEASURED)):
            self._phase[thread] = event
            self._group[thread] = FIRST_GROUP.get(phase_of(event)[1], "")
            return None
        around = self._phase.get(thread)
        if around is None or event.time_range.start >= around.time_range.end:
            return None
        if name.startswith(LAYER):
            self._group[thread] = name.removeprefix(LAYER)
            return None
        phase, outermost = phase_of(around)[1], event.cpu_parent is around
        if phase == "backward" and outermost:
            self._group[thread] = self._group_of_backward(event)
        if phase in FIRST_GROUP and event.sequence_nr >= 0 and not name.startswith(ENGINE):
            self._numbers[thread].append(event.sequence_nr)
            self._groups_of_numbers[thread].append(self._group[thread])
        return around, self._group[thread]

    def _group_of_backward(self, event: Any) -> str:
        if not event.name.startswith(ENGINE):
            return FIRST_GROUP["backward"]
        if event.sequence_nr < 0:  # a gradient is added up right after it was computed
            return self._group[event.thread]
        # Of the operators with a number the last one is counted by it; some have none themselves.
        place = bisect.bisect_right(self._numbers[event.fwd_thread], event.sequence_nr)
        return self._groups_of_numbers[event.fwd_thread][place - 1] if place else UNKNOWN_GROUP


def phase_of(event: Any) -> tuple[str, str]:
    """Lane and phase of a range of the profiler."""
    lane, phase = event.name.rpartition(" ")[2].split("/")[1:]
    return lane, phase


def operator_times(events: Iterable[Any], profiled: Sequence[StepResult]) -> OperatorTimes:
    """What operators took (torch's FunctionEvents), largest first in each phase and layer group."""
    steps = len(profiled)
    attribution = Attribution()
    sums: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    left_ms: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for step in profiled:
        for record in step.records:
            left_ms[record.lane, record.phase] += 1e3 * record.duration_s
            calls[record.lane, record.phase] += 1
    in_order = sorted(events, key=lambda each: (each.time_range.start, -each.cpu_time_total))
    for event in in_order:
        placed = attribution.place(event)
        if not placed or not placed[0].name.startswith(MEASURED):
            continue
        lane, phase = phase_of(placed[0])
        each = sums[lane, phase, placed[1], event.name, outermost_kind(event)]
        each[0] += 1
        each[1] += event.self_cpu_time_total / 1e3
        each[2] += event.cpu_time_total / 1e3
        left_ms[lane, phase] -= event.self_cpu_time_total / 1e3
    rows = [
        OperatorTime(*key, each[0] / steps, each[1] / steps, each[2] / steps)
        for key, each in sums.items()
    ]
    rows += [
        OperatorTime(*key, "", "", OUTSIDE, calls[key] / steps, each_ms / steps, each_ms / steps)
        for key, each_ms in left_ms.items()
    ]
    groups = list(dict.fromkeys((row.lane, row.phase, row.layer_group) for row in rows))
    rows.sort(key=lambda row: (groups.index((row.lane, row.phase, row.layer_group)), -row.self_ms))
    return OperatorTimes(
        first=profiled[0].step,
        last=profiled[-1].step,
        step_ms=1e3 * statistics.fmean(step.step_s for step in profiled),
        rows=tuple(rows),
    )
