"""What the records of a run add up to. Pure, but for readings of the memory in use."""

from __future__ import annotations

import dataclasses
import itertools
import math
import resource
import statistics
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from split_affinity.counters.counters import SUMS
from split_affinity.counters.memory import memory_by_node
from split_affinity.lanes.audit import NOT_LOOKED_AT, PhaseRecord
from split_affinity.lanes.contention import Contention, mean_contention
from split_affinity.machine.plan import CorePlan
from split_affinity.reports.loading import Loading, summarise_loading
from split_affinity.text import format_cpu_list
from split_affinity.training.steps import PHASES, StepResult

LATEST_STEPS = 2000
STEPS_TO_DRAW = 3
FIGURES_BY_CPU = 20_000  # of the latest steps are kept, at least those to draw: some megabytes
WARM_UP_STEPS = 2  # left out of most figures, if as many or more others follow
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
    # Of all closer looks: sums of what was counted (see counters/), their number, their seconds.
    counts: dict[str, float]
    looks: int
    looked_at_s: float


@dataclass(frozen=True)
class Summary:
    """A whole run. Speeds and shares: of the latest 2,000 steps, without `warmup_steps`, and
    without those that were profiled unless these are most of them.
    """

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
    profiled_steps: int = 0  # that were left out
    waited_s: tuple[float, ...] = ()  # by rank, for the slowest rank, mean of the steps
    joules_per_image: float | None = None  # of the whole machine
    loading: Loading | None = None  # None without images to load

    @property
    def threads_seen(self) -> bool:
        """Whether the system showed where threads ran; else stray time is unknown."""
        return any(phase.seen_on != format_cpu_list(()) for phase in self.phases)


class RunStatistics:
    """What the summary needs of a run, in bounded memory: totals, and the latest steps.

    Figures by CPU (12 KB a phase with 128 CPUs) are added up at once, and kept for as many steps as
    FIGURES_BY_CPU allows.
    """

    def __init__(self, plan: CorePlan, loads_images: bool = True):
        """Synthetic images are made, not loaded: nothing is said about their loading."""
        self.steps = self.images = self._first = 0
        self.latest: deque[StepResult] = deque(maxlen=LATEST_STEPS)
        self.contention: Contention | None = None
        self.looks: list[Contention] = []  # those of the latest CONTENTION_WINDOW_S
        self._plan, self._loads_images = plan, loads_images
        self._cpus = 1  # those with figures
        self._loss_first = math.nan
        self._stray_s: Counter[str] = Counter()  # by phase, like the next ones
        self._cpu_busy_s: dict[str, Counter[int]] = {phase: Counter() for phase in PHASES}
        self._looked_at_s: Counter[str] = Counter()
        self._seen_on: dict[str, set[int]] = {phase: set() for phase in PHASES}
        self._counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
        self._looks, self._counted_s = Counter[str](), Counter[str]()
        self._waiting_s = self._main_thread_s = 0.0

    def add(self, step: StepResult) -> None:
        """Take in one step."""
        if not self.steps:
            self._loss_first, self._first = step.loss, step.step
        if self.steps == WARM_UP_STEPS:  # they have met page faults that no other step will meet
            for counted in (*self._counts.values(), self._looks, self._counted_s):
                counted.clear()
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
            if record.counts:
                sums = {name: record.counts[name] for name in SUMS if name in record.counts}
                self._counts[record.phase].update(sums)
                self._looks[record.phase] += 1
                self._counted_s[record.phase] += record.duration_s
        self._cpus = max(self._cpus, *(len(record.cpu_busy_s) for record in step.records))
        kept = max(STEPS_TO_DRAW, FIGURES_BY_CPU // (self._cpus * len(step.records)))
        if len(self.latest) > kept:
            old = self.latest[-1 - kept]
            slim = []
            for record in old.records:
                looked_at = record.seen_on or record.cpu_busy_s
                slim.append(dataclasses.replace(record, **NOT_LOOKED_AT) if looked_at else record)
            self.latest[-1 - kept] = dataclasses.replace(old, records=tuple(slim))

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
        warmup = min(WARM_UP_STEPS, (self.steps - 1) // 2)
        warm = [step for step in self.latest if step.step >= self._first + warmup]
        plain = [step for step in warm if not step.profiled]
        timed = plain if len(plain) >= len(warm) / 2 else warm
        timed_s = sum(step.step_s for step in timed)
        records = [record for step in timed for record in step.records]
        audit_s = sum(record.audit_s for record in records)
        seen = {record.phase for record in records}
        waits_s = zip(*(step.waited_s for step in timed), strict=True)  # of each rank
        energies_j, images = [step.energy_j for step in timed], sum(step.images for step in timed)
        return Summary(
            steps=self.steps,
            warmup_steps=warmup,
            images=self.images,
            images_per_s=images / timed_s,
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
            profiled_steps=len(warm) - len(timed),
            waited_s=tuple(map(statistics.fmean, waits_s)),
            joules_per_image=None if None in energies_j else sum(energies_j) / images,
            loading=self._summarise_loading(timed),
        )

    def _summarise_loading(self, timed: Sequence[StepResult]) -> Loading | None:
        cpus = self._plan.loader_cpus
        return summarise_loading(timed, cpus) if self._loads_images else None

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
            counts=dict(self._counts[phase]),
            looks=self._looks[phase],
            looked_at_s=self._counted_s[phase],
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
