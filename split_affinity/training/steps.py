"""Optimizer steps one after the other, with their records; signals and other ranks between them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from split_affinity.data.loader import BadImages, Batches, Loader
from split_affinity.data.pictures import ImageData
from split_affinity.data.samples import LoadRecord
from split_affinity.errors import RunError, Stopped
from split_affinity.lanes.audit import PhaseRecord
from split_affinity.lanes.contention import Contention
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import CorePlan
from split_affinity.machine.topology import Topology
from split_affinity.options.settings import CoreSettings, Settings
from split_affinity.ranks.ranks import RankLost, Ranks
from split_affinity.signals import StopRequest
from split_affinity.training.network import NonFiniteLoss, Scores, combine_scores, interleave
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.update import TrainState

PHASES = ("forward", "backward", "reduce", "update", "refresh")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: its figures, over all ranks, and its records, of this rank.

    `loss` is the mean per image; `top1` and `top5` count right answers. `records` are the phases
    that ended in the step, in order. `main_thread_s` is CPU time. `contention` is None unless
    somebody looked after this step. `energy_j` is that of the whole machine, None unless counted.
    Of several ranks, `ready_s` is the time that each took until it had all its gradients; at
    `synced_s` (of time.perf_counter) all had made the step. `profiled` steps are slower (see
    OperatorWatch).
    """

    step: int
    loss: float
    images: int
    step_s: float
    records: tuple[PhaseRecord, ...]
    loads: tuple[LoadRecord, ...] = ()
    main_thread_s: float = 0.0
    top1: int = 0
    top5: int = 0
    lr: float = 0.0
    contention: Contention | None = None
    energy_j: float | None = None
    ready_s: tuple[float, ...] = ()
    synced_s: float = 0.0
    profiled: bool = False

    @property
    def waited_s(self) -> tuple[float, ...]:
        """How long each rank waited for the slowest one."""
        return tuple(max(self.ready_s) - ready_s for ready_s in self.ready_s)

    def total(self, quantity: str, phase: str | None = None) -> float:
        """The sum of a quantity of PhaseRecord, over the records of a phase or all of them."""
        records = (record for record in self.records if phase in (None, record.phase))
        return sum(getattr(record, quantity) for record in records)

    def as_metrics(self) -> dict[str, Any]:
        """The step's line in metrics.jsonl."""
        line = {"type": "step", "step": self.step, "loss": self.loss, "images": self.images}
        line |= {"top1": self.top1, "top5": self.top5, "lr": self.lr, "step_s": self.step_s}
        line |= {f"{phase}_s": self.total("duration_s", phase) for phase in PHASES}
        line |= {f"{phase}_cpu_s": self.total("cpu_s", phase) for phase in PHASES}
        others = {"contention": dataclasses.asdict(self.contention)} if self.contention else {}
        others |= {"energy_j": self.energy_j} if self.energy_j is not None else {}
        others |= {"waited_s": self.waited_s} if self.ready_s else {}
        others |= {"profiled": True} if self.profiled else {}
        return line | {"stray_s": self.total("stray_s")} | others


class Diverged(RunError):
    """A loss is not finite; nothing was updated."""


def run_schedule(
    settings: CoreSettings,
    lanes: Lanes,
    train_state: TrainState,
    batches: Batches,
    first_step: int = 1,
) -> Iterator[StepResult]:
    """Train step by step until the batches run out.

    Raises Diverged, before any update, if a loss is not finite. An error on one rank ends all.
    """
    lanes.forward.call(train_state.network.build_view)
    steps = SCHEDULES[settings.schedule](lanes, train_state, batches)
    # Joules are those of a machine: several ranks may have one each, or one together.
    energy_j = lanes.counters.step_energy_j if train_state.ranks.size == 1 else lambda: None
    energy_j()  # from now on
    for step in itertools.count(first_step):
        start_s, thread_start_s = time.perf_counter(), time.thread_time()
        lr = train_state.optimizer.param_groups[0]["lr"]
        try:
            scores = next(steps, None)
        except NonFiniteLoss as error:
            text = f"step {step}: the loss is {error}; try a lower --lr"
            raise agreed_error(lanes, train_state, Diverged(text)) from None
        except Exception as error:
            raise agreed_error(lanes, train_state, error) from error.__cause__
        if scores is None:
            return
        records = lanes.take_records()
        scores, ready_s = scores_of_ranks(train_state.ranks, scores, records, start_s)
        yield StepResult(
            step,
            **vars(combine_scores(scores)),
            step_s=time.perf_counter() - start_s,
            records=records,
            loads=batches.take_records(),
            main_thread_s=time.thread_time() - thread_start_s,
            lr=lr,
            energy_j=energy_j(),
            ready_s=ready_s,
            synced_s=time.perf_counter(),
        )


def agreed_error(lanes: Lanes, train_state: TrainState, error: Exception) -> Exception:
    """The error that ends a step on all ranks: that of the first rank that has one.

    This rank keeps its own error if the others know it already, or if the gradients of the step are
    already summed.
    """
    ranks = train_state.ranks
    known = ranks.agreed or isinstance(error, RankLost)
    if not known and train_state.reducer and not train_state.reduced:
        try:
            lanes.backward.call(train_state.reducer.give_up, error)
        except Exception as agreed:
            return agreed if ranks.agreed else error
    return error


def scores_of_ranks(
    ranks: Ranks, scores: list[Scores], records: Sequence[PhaseRecord], start_s: float
) -> tuple[list[Scores], tuple[float, ...]]:
    """The scores of a step's micro-batches on all ranks, in order, and StepResult.ready_s."""
    if ranks.size == 1:
        return scores, ()
    ready_s = max(record.start_s for record in records if record.phase == "reduce") - start_s
    figures = [figure for each in scores for figure in dataclasses.astuple(each)]
    ready, dealt = [], []
    for first, *others in ranks.gather_numbers([ready_s, *figures]):
        ready.append(first)
        quads = zip(*4 * [iter(others)], strict=True)
        dealt.append([Scores(loss, *map(int, counts)) for loss, *counts in quads])
    return interleave(dealt), tuple(ready)


@dataclass(frozen=True)
class Run:
    """Everything that a run works with; `settings` are those in force."""

    settings: Settings
    topology: Topology
    plan: CorePlan
    data: ImageData
    train: Loader
    val: Loader | None
    lanes: Lanes
    train_state: TrainState
    stop: StopRequest
    bad: BadImages
    notes: tuple[str, ...]

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return self.train_state.ranks


def check_between_steps(run: Run) -> None:
    """Raise Stopped if a signal has come to any rank, RunError if there are too many bad images.

    Bad images that one rank has found count for all.
    """
    ranks, bad = run.ranks, run.bad
    if ranks.size == 1:
        run.stop.check()
        return
    signums, counts = zip(
        *ranks.gather_numbers([run.stop.signum or 0, len(bad.messages)]), strict=True
    )
    if max(counts) > bad.shared:
        with ranks.together():
            bad.share(ranks.gather_objects(bad.messages))
    if signum := int(max(signums)):
        ranks.raise_on_all(Stopped(signum))


def check_same_weights(run: Run, step: int) -> None:
    """Raise Diverged unless all ranks have the same weights, to the bit."""
    if run.ranks.size == 1:
        return
    digest = hashlib.blake2b()
    for weight in run.train_state.network.model.parameters():
        digest.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy())
    found = run.ranks.gather_objects(digest.digest())
    others = [rank for rank, each in enumerate(found) if each != found[0]]
    if others:
        where = ", ".join(f"rank {rank} on {run.ranks.hosts[rank].name}" for rank in others)
        text = f"the weights of {where} are not those of rank 0 after step {step}"
        run.ranks.raise_on_all(Diverged(f"{text}; are the processors of one kind?"))
