"""A way to train, in its own process: the plain loop, and that of the lanes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from split_affinity import process_cpus
from split_affinity.compare.ways import Way, is_loading, steps_in_round, way_of_rank
from split_affinity.data.dataset import open_data
from split_affinity.data.loader import BadImages, Batches, training_loader
from split_affinity.data.samples import Batch, Loaded
from split_affinity.lanes.contention import ContentionMonitor
from split_affinity.lanes.lane import (
    Lanes,
    confine_thread,
    coordinating,
    give_memory_back,
    start_team,
    tune_allocator,
)
from split_affinity.machine.plan import PhaseTimes, this_host
from split_affinity.machine.topology import read_topology
from split_affinity.models.freezing import freeze
from split_affinity.models.registry import build_model
from split_affinity.options.settings import DataSettings, Settings
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks, SeveralRanks
from split_affinity.reports.summary import lanes_busy, peak_memory_bytes
from split_affinity.runs.measurement import phase_times, time_phases
from split_affinity.runs.setup import build_train_state
from split_affinity.runs.starting_weights import build_teacher
from split_affinity.training.network import build_loss, weighted_mean
from split_affinity.training.optimizer import build_optimizer
from split_affinity.training.steps import StepResult, run_schedule

PRELOADED_BATCHES = 8  # at the least


@dataclass(frozen=True)
class RoundRequest:
    """How many steps to make in a round, and whether to keep the memory afterwards."""

    number: int  # of the round; 0 warms up
    steps: int
    keep_memory: bool


ByLane = dict[str, float]  # a figure of each lane, by the lane's name


@dataclass(frozen=True)
class BatchSupply:
    """The batches of a round, by its number, so many; and the weights of classes in their loss."""

    give: Callable[[int, int], Batches]
    class_weights: Sequence[float] | None = None

    def __call__(self, number: int, count: int) -> Batches:
        """The batches of a round."""
        return self.give(number, count)


@dataclass(frozen=True)
class WayRound:
    """What one way to train did in one round of a comparison."""

    steps: tuple[StepResult, ...]
    busy: ByLane
    phase_times_alone: PhaseTimes | None  # of phases that do not overlap
    matrix_flops: ByLane  # a second, in matrix products; not of plain loops
    peak_memory_bytes: int
    fused: bool = False  # its norms, with what follows them

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step, median."""
        return statistics.median(step.step_s for step in self.steps)

    @property
    def images_per_s(self) -> float:
        """Images a second, by the median step."""
        return self.steps[0].images / self.step_s

    def phase_s(self, phase: str) -> float:
        """Seconds of a phase in a step, mean."""
        return statistics.fmean(step.total("duration_s", phase) for step in self.steps)

    @property
    def disturbance(self) -> tuple[float, str]:
        """The largest share of its cores that others took meanwhile, and who took it."""
        seen = [step.contention for step in self.steps if step.contention]
        shares = [(each.stolen, f"the hypervisor took {each.stolen:.0%}") for each in seen]
        for each in seen:
            for lane, share in each.others.items():
                cores = "all cores" if lane == "all" else f"the {lane} cores"
                shares.append((share, f"other processes took {share:.0%} of {cores}"))
        return max(shares, default=(0.0, ""))


@contextlib.contextmanager
def batch_supply(settings: Settings, cpus: Sequence[int], rank: int = 0) -> Iterator[BatchSupply]:
    """A rank's batches for each round: from memory, or from loader processes of the way's own."""
    loading, data = is_loading(settings), open_data(settings)
    settings = dataclasses.replace(settings, workers=settings.workers if loading else 0)
    count = max(PRELOADED_BATCHES, settings.accumulate)
    if loading:  # an epoch is long enough for any round
        count = settings.accumulate * steps_in_round(settings.steps) + batches_ahead(settings) + 4
    bad = BadImages.of(settings, data)
    epochs = -(-count * settings.ranks * settings.batch_size // len(data.chosen))
    data = dataclasses.replace(data, chosen=[*data.chosen] * epochs)
    with contextlib.closing(training_loader(data, settings, cpus, rank)) as loader:
        if loading:

            def load(number: int, count: int) -> Batches:
                return loader.batches(bad, number, 0, count * settings.ranks)

            yield BatchSupply(load, data.class_weights)
            return
        kept = [Loaded(batch) for batch in loader.batches(bad, 1, 0, count * settings.ranks)]
    yield BatchSupply(lambda number, count: Batches(kept, count), data.class_weights)


def batches_ahead(settings: DataSettings) -> int:
    """Batches that a run has fetched or asked for beyond those of a step."""
    # Two for each loader, one that waits for a forward phase, one that `delayed` has sent there.
    return 2 * settings.workers + 2


class PlainLoop:
    """A textbook loop over all cores, with nothing of this program but its loaders."""

    def __init__(self, way: Way, online: Sequence[int], stack: contextlib.ExitStack):
        settings, group = way.settings, way.plan.forward
        self._way, self._online = way, online
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # no team yet: loaders are forked, and its threads are counted
        self._supply = stack.enter_context(batch_supply(settings, way.plan.loader_cpus))
        if group.cpu_set < process_cpus():  # of cores that were listed
            confine_thread(group.cpus)
            threads = group.threads
        torch.set_num_threads(threads)
        start_team()
        self._group = dataclasses.replace(group, threads=torch.get_num_threads())
        shape = settings.model, settings.num_classes, settings.image_size
        model = build_model(*shape, settings.stochastic_depth)
        freeze(model, settings.freeze, *shape)
        last = torch.channels_last if settings.channels_last else torch.contiguous_format
        self._model, self._layout = model.to(memory_format=last), last
        self._optimizer = build_optimizer(model, dataclasses.replace(settings, fused=None))
        weights = self._supply.class_weights
        self._class_weights = torch.tensor(weights) if weights else None
        self._criterion = build_loss(settings.label_smoothing, self._class_weights)
        self._teacher = build_teacher(settings, ())

    def learn(self, images: torch.Tensor, targets: torch.Tensor) -> float:
        """Forward and backward pass of a batch; returns its loss."""
        settings, images = self._way.settings, images.contiguous(memory_format=self._layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            taught = self._teacher(images) if self._teacher else None
            logits = self._model(images)
            loss = self._criterion(logits, targets)
            if self._teacher:
                loss = self._teacher.loss(loss, logits, taught)
        if self._class_weights is not None:
            loss = weighted_mean(loss, targets, self._class_weights)
        (loss / settings.accumulate).backward()
        return loss.item()

    def step(self, batches: Iterable[Batch]) -> StepResult:
        """An optimizer step; the main thread's CPU time is that of its whole team."""
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        images = loss = 0
        for batch in batches:
            loss = self.learn(*batch)
            images += len(batch[0])
        self._optimizer.step()
        self._optimizer.zero_grad()
        step_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_start_s
        return StepResult(0, loss, images, step_s, (), main_thread_s=cpu_s)

    def round(self, order: RoundRequest) -> WayRound:
        """The steps to measure, after a batch that is left out: it fetches memory."""
        settings = self._way.settings
        count = 1 + settings.accumulate * order.steps
        batches = self._supply(order.number, count + batches_ahead(settings))
        self.learn(*next(batches))
        monitor = ContentionMonitor(self._way.plan, self._online)
        steps = with_contention(
            [self.step(itertools.islice(batches, settings.accumulate)) for _ in range(order.steps)],
            monitor,
        )
        exhaust(batches)
        used_s = sum(step.main_thread_s for step in steps)
        busy = {"all": self._group.busy(used_s, sum(step.step_s for step in steps))}
        return WayRound(steps, busy, None, {}, peak_memory_bytes())


class LaneLoop:
    """The loop of this program, on the lanes of a way's plan; each rank has one."""

    def __init__(
        self,
        way: Way,
        online: Sequence[int],
        stack: contextlib.ExitStack,
        ranks: Ranks = ONE_PROCESS,
    ):
        self._way, self._online = way, online
        stack.enter_context(coordinating(way.settings, way.plan))
        cpus = way.plan.loader_cpus
        self._supply = stack.enter_context(batch_supply(way.settings, cpus, ranks.rank))
        # A batch to time phases with, while nothing is loaded.
        self._batch = [Loaded(batch) for batch in self._supply(1, 1)] if way.times_phases else []
        self._lanes = stack.enter_context(Lanes(way.plan, online))
        weights = self._supply.class_weights
        self._train_state = build_train_state(
            way.settings, self._lanes, ranks=ranks, class_weights=weights
        )
        self._lanes.backward.adopt(ranks.start)
        stack.callback(ranks.close, together=False)

    def round(self, order: RoundRequest) -> WayRound:
        """The steps to measure, after a batch that is left out."""
        settings, lanes, network = self._way.settings, self._lanes, self._train_state.network
        network.accumulate, alone = 1, None
        if self._way.times_phases:
            alone = time_phases(lanes, self._train_state, Batches(self._batch, 2), 2)
        count = 1 + settings.accumulate * order.steps
        batches = self._supply(order.number, count + batches_ahead(settings))
        running = run_schedule(settings, lanes, self._train_state, batches)
        # The first batch fetches memory. From then on loaders and `delayed` work ahead.
        next(running)
        network.accumulate = settings.accumulate
        monitor = ContentionMonitor(lanes.plan, self._online)
        steps = with_contention(itertools.islice(running, order.steps), monitor)
        running.close()
        exhaust(batches)
        records = [record for step in steps for record in step.records]
        if settings.schedule == "sequential":  # its phases never overlap
            alone = phase_times(records)
        busy = lanes_busy(lanes.plan, records, sum(step.step_s for step in steps))
        rates = {
            lane.group.name: lane.call(matrix_flops, network.bf16)
            for lane in dict.fromkeys((lanes.forward, lanes.backward))
        }
        if not order.keep_memory:
            give_memory_back()
        return WayRound(steps, busy, alone, rates, peak_memory_bytes(), network.fused)


def with_contention(
    steps: Iterable[StepResult], monitor: ContentionMonitor
) -> tuple[StepResult, ...]:
    """The steps, once they are done; the last one has the contention during all of them."""
    *steps, last = steps
    return (*steps, dataclasses.replace(last, contention=monitor.look()))


def exhaust(batches: Batches) -> None:
    """Take the rest of the batches: no loader may be at work when it is another way's turn."""
    deque(batches, maxlen=0)


def rounds_of(
    way: Way, online: Sequence[int], rank: int = 0, place: str = ""
) -> Generator[WayRound | None, RoundRequest, None]:
    """A way to train, in its own process: None when it is ready, then a round for each request."""
    if way.settings.tuned_malloc and not way.plain:
        tune_allocator()
    torch.manual_seed(way.settings.seed)
    # Nothing can diverge, at the same speed.
    settings = dataclasses.replace(way.settings, lr=0.0, lr_scheduler="constant")
    way, ranks = dataclasses.replace(way, settings=settings), ONE_PROCESS
    if way.ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = distributed.FileStore(place, way.ranks)  # a file in which the ranks meet
        ranks = SeveralRanks(rank, way.ranks, store, settings.timeout)
        ranks.hosts = ranks.gather_objects(this_host(read_topology()))
    with contextlib.ExitStack() as stack:
        if way.plain:
            loop = PlainLoop(way, online, stack)
        else:
            loop = LaneLoop(way_of_rank(way, rank), online, stack, ranks)
        order = yield None
        while True:
            order = yield loop.round(order)


def matrix_flops(bf16: bool) -> float:
    """Floating-point operations a second of the calling thread's team, in matrix products."""
    size, times_s = 2048, []
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(6):
        start_s = time.perf_counter()
        torch.mm(left, right)
        times_s.append(time.perf_counter() - start_s)
    return 2 * size**3 / statistics.median(times_s[1:])  # the first one warms up
