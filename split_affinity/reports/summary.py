"""What the records of a run add up to. Pure, but for readings of the memory in use."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import resource
import statistics
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from split_affinity.files import read_text
from split_affinity.lanes.audit import NOT_LOOKED_AT, PhaseRecord
from split_affinity.lanes.contention import Contention, mean_contention
from split_affinity.machine.plan import CorePlan
from split_affinity.text import format_cpu_list
from split_affinity.training.steps import PHASES, StepResult

LATEST_STEPS = 2000
STEPS_TO_DRAW = 3
SHORTEST_LOOK_S = 0.25  # at what others took: with ticks of 10 ms, what is shorter tells nothing
CONTENTION_WINDOW_S = 10  # contention counts if it is large for so long: short bursts do not


def time_in_phases_s(records: Iterable[PhaseRecord]) -> float:
    """Seconds during which at least one phase ran, of phases by start time."""
    total_s, busy_until_s = 0.0, -math.inf
    for record in records:
        total_s += max(0.0, record.end_s - max(record.start_s, busy_until_s))
        busy_until_s = max(busy_until_s, record.end_s)
    return total_s


def phases_alone(records: Sequence[PhaseRecord]) -> Iterator[PhaseRecord]:
    """The phases that ran while no other did, of phases by start time."""
    busy_until_s = -math.inf
    for record, following in itertools.zip_longest(records, records[1:]):
        if busy_until_s <= record.start_s and not (following and following.start_s < record.end_s):
            yield record
        busy_until_s = max(busy_until_s, record.end_s)


@dataclass(frozen=True)
class PhaseSummary:
    """One phase of a run."""

    phase: str
    cores: str
    threads: int
    median_ms: float  # in an optimizer step, as the next two
    p95_ms: float
    share: float  # of the step
    busy: float  # a share of what the group can use
    stray_ms: float  # in the whole run
    seen_on: str  # the CPUs, by the audit's closer looks; as the shares of time that follow
    cpu_busy: dict[int, float]


@dataclass(frozen=True)
class Summary:
    """A whole run. Speeds and shares: of the latest 2,000 steps, without `warmup_steps`."""

    steps: int
    warmup_steps: int
    images: int
    images_per_s: float
    median_step_s: float
    no_phase_share: float
    phases: tuple[PhaseSummary, ...]
    busy: dict[str, float]  # by lane, see lanes_busy
    stray_s: float
    waiting_s: float  # CPU time of a lane's threads while only the other lane had a phase
    main_thread_s: float
    audit_ms: float  # a phase
    audit_share: float  # of a step
    loss_first: float
    loss_last: float
    peak_memory_bytes: int
    contention: Contention | None  # in the whole run; None if unknown
    memory_by_node: dict[int, int]  # bytes, if there are several NUMA nodes
    waited_s: tuple[float, ...] = ()  # by rank, for the slowest rank, mean of the steps

    @property
    def threads_seen(self) -> bool:
        """Whether the system showed where threads ran; else stray time is unknown."""
        return any(phase.seen_on != format_cpu_list(()) for phase in self.phases)


class RunStatistics:
    """What the summary needs of a run, in bounded memory: totals, and the latest steps.

    Figures by CPU (12 KB a phase with 128 CPUs) are added up at once, and kept only for the steps
    that a picture can show.
    """

    def __init__(self, plan: CorePlan):
        self.steps = self.images = self._first = 0
        self.latest: deque[StepResult] = deque(maxlen=LATEST_STEPS)
        self.contention: Contention | None = None
        self.looks: list[Contention] = []  # those of the latest CONTENTION_WINDOW_S
        self._plan = plan
        self._loss_first = math.nan
        self._stray_s: Counter[str] = Counter()  # by phase, like the next three
        self._cpu_busy_s: dict[str, Counter[int]] = {phase: Counter() for phase in PHASES}
        self._looked_at_s: Counter[str] = Counter()
        self._seen_on: dict[str, set[int]] = {phase: set() for phase in PHASES}
        self._waiting_s = self._main_thread_s = 0.0

    def add(self, step: StepResult) -> None:
        """Take in one step."""
        if not self.steps:
            self._loss_first, self._first = step.loss, step.step
        self.steps += 1
        self.images += step.images
        self.latest.append(step)
        self._main_thread_s += step.main_thread_s
        self._waiting_s += sum(record.other_lane_s for record in phases_alone(step.records))
        for record in step.records:
            self._stray_s[record.phase] += record.stray_s
            self._seen_on[record.phase] |= record.seen_on
            if record.cpu_busy_s:
                self._looked_at_s[record.phase] += record.duration_s
                self._cpu_busy_s[record.phase].update(record.cpu_busy_s)
        if len(self.latest) > STEPS_TO_DRAW:
            old = self.latest[-1 - STEPS_TO_DRAW]
            slim = []
            for record in old.records:
                looked_at = record.seen_on or record.cpu_busy_s
                slim.append(dataclasses.replace(record, **NOT_LOOKED_AT) if looked_at else record)
            self.latest[-1 - STEPS_TO_DRAW] = dataclasses.replace(old, records=tuple(slim))

    def add_contention(self, contention: Contention) -> Contention | None:
        """Take in a look; returns the contention of the latest 10 s, or None before so long."""
        known = [self.contention] if self.contention else []
        self.contention = mean_contention([*known, contention])
        since_s = contention.end_s - CONTENTION_WINDOW_S
        self.looks = [each for each in self.looks if each.end_s >= since_s] + [contention]
        lately = mean_contention(self.looks)
        return lately if lately.end_s - lately.start_s >= CONTENTION_WINDOW_S else None

    def summary(self) -> Summary:
        """The figures so far, after at least one step."""
        warmup = min(2, (self.steps - 1) // 2)
        timed = [step for step in self.latest if step.step >= self._first + warmup]
        timed_s = sum(step.step_s for step in timed)
        records = [record for step in timed for record in step.records]
        audit_s = sum(record.audit_s for record in records)
        seen = {record.phase for record in records}
        waits_s = zip(*(step.waited_s for step in timed), strict=True)  # of each rank
        return Summary(
            steps=self.steps,
            warmup_steps=warmup,
            images=self.images,
            images_per_s=sum(step.images for step in timed) / timed_s,
            median_step_s=statistics.median(step.step_s for step in timed),
            no_phase_share=1 - sum(time_in_phases_s(step.records) for step in timed) / timed_s,
            phases=tuple(
                self._summarise_phase(phase, timed, timed_s) for phase in PHASES if phase in seen
            ),
            busy=lanes_busy(self._plan, records, timed_s),
            stray_s=self._stray_s.total(),
            waiting_s=self._waiting_s,
            main_thread_s=self._main_thread_s,
            audit_ms=1e3 * audit_s / max(1, len(records)),
            audit_share=audit_s / timed_s,
            loss_first=self._loss_first,
            loss_last=self.latest[-1].loss,
            peak_memory_bytes=peak_memory_bytes(),
            contention=self.contention,
            memory_by_node=memory_by_node(),
            waited_s=tuple(map(statistics.fmean, waits_s)),
        )

    def _summarise_phase(
        self, phase: str, timed: Sequence[StepResult], timed_s: float
    ) -> PhaseSummary:
        durations_s = [step.total("duration_s", phase) for step in timed]
        phase_s = sum(durations_s)
        records = [record for step in timed for record in step.records if record.phase == phase]
        group = self._plan.group(records[0].lane)
        cpu_busy_s, looked_at_s = self._cpu_busy_s[phase], self._looked_at_s[phase]
        return PhaseSummary(
            phase=phase,
            cores=format_cpu_list(group.cpus),
            threads=group.threads,
            median_ms=1e3 * statistics.median(durations_s),
            p95_ms=1e3 * float(torch.tensor(durations_s, dtype=torch.float64).quantile(0.95)),
            share=phase_s / timed_s,
            busy=group.busy(sum(record.cpu_s for record in records), phase_s),
            stray_ms=1e3 * self._stray_s[phase],
            seen_on=format_cpu_list(self._seen_on[phase]),
            cpu_busy={cpu: min(1.0, busy_s / looked_at_s) for cpu, busy_s in cpu_busy_s.items()},
        )


def lanes_busy(
    plan: CorePlan, records: Iterable[PhaseRecord], elapsed_s: float
) -> dict[str, float]:
    """Each lane's CPU time in its own phases as a share of what its group can use."""
    used_s: Counter[str] = Counter()
    for record in records:
        used_s[record.lane] += record.cpu_s
    return {group.name: group.busy(used_s[group.name], elapsed_s) for group in plan.groups}


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had, without its loader processes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_by_node(root: Path = Path("/")) -> dict[int, int]:
    """Bytes of this process's memory in each NUMA node, without files; empty with a single node.

    Weights, gradients and activations count; libraries, and batches from loader processes, do not.
    Activations count between steps too, if the allocator keeps freed memory (see tune_allocator).
    The kernel goes through all pages for this: do not ask in every step.
    """
    if len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) < 2:
        return {}
    counted: Counter[int] = Counter()
    for line in read_text(root / "proc/self/numa_maps").splitlines():
        page_kib = re.search(r" kernelpagesize_kB=(\d+)", line)
        if page_kib and " file=" not in line:
            for node, pages in re.findall(r" N(\d+)=(\d+)", line):
                counted[int(node)] += 1024 * int(page_kib[1]) * int(pages)
    return dict(sorted(counted.items()))
