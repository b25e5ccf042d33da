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
from typing import Any

import torch
from torch import distributed, nn

from split_affinity import process_cpus
from split_affinity.compare.ways import Way, is_loading, of_one_rank, steps_in_round
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
from split_affinity.options.settings import Settings
from split_affinity.ranks.ranks import ONE_PROCESS, Ranks, SeveralRanks
from split_affinity.reports.summary import lanes_busy, peak_memory_bytes
from split_affinity.runs.measurement import phase_times, time_phases
from split_affinity.runs.setup import build_train_state
from split_affinity.runs.starting_weights import build_teacher
from split_affinity.training.optimizer import build_optimizer
from split_affinity.training.steps import StepResult, run_schedule

PRELOADED_BATCHES = 8  # at the least


@dataclass(frozen=True)
class Order:
    """What a way to train shall do in a round: steps of so many batches to measure; and whether it
    may keep its memory afterwards. Round 0 is the one to warm up.
    """

    number: int
    batches: int
    steps: int
    keep_memory: bool


Rounds = Generator["Round | None", Order, None]
ByLane = dict[str, float]  # a figure of each lane, by the lane's name
Supply = Callable[[int, int], Batches]  # of a round, by its number, so many batches


@dataclass(frozen=True)
class Round:
    """What one way to train did in one round of a comparison. Lanes by name; plain has none.

    `alone` are phase times without company, `matrix_flops` the lane's rate in matrix products. The
    steps have `share` of the batches of a whole one, and an update, of `update_s`; that of ranks
    has the sum of their gradients in it, from when the last of them has its own.
    """

    steps: tuple[StepResult, ...]
    busy: ByLane
    alone: PhaseTimes | None
    matrix_flops: ByLane
    peak_memory_bytes: int
    update_s: float = 0.0
    share: float = 1.0

    @property
    def step_s(self) -> float:
        """Seconds of a whole optimizer step, from the median of those measured."""
        measured_s = statistics.median(step.step_s for step in self.steps)
        return (measured_s - self.update_s) / self.share + self.update_s

    @property
    def images_per_s(self) -> float:
        """Images a second in a whole optimizer step."""
        return self.steps[0].images / self.share / self.step_s

    def phase_s(self, phase: str) -> float:
        """Seconds of a phase in the steps measured, mean."""
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
def supplied(settings: Settings, cpus: Sequence[int], rank: int = 0) -> Iterator[Supply]:
    """What gives the batches of a round, to one of the ranks its part: from memory; or from loader
    processes of the way's own, which begin with the round, and have nothing to do any more after
    its last batch.
    """
    loading, data = is_loading(settings), open_data(settings)
    settings = dataclasses.replace(settings, workers=settings.workers if loading else 0)
    count = max(PRELOADED_BATCHES, settings.accumulate)
    if loading:  # an epoch shall be long enough for any round
        count = settings.accumulate * steps_in_round(settings) + batches_ahead(settings) + 4
    bad = BadImages.of(settings, data)
    epochs = -(-count * settings.ranks * settings.batch_size // len(data.chosen))
    data = dataclasses.replace(data, chosen=[*data.chosen] * epochs)
    with contextlib.closing(training_loader(data, settings, cpus, rank)) as loader:
        if loading:
            yield lambda number, count: loader.batches(bad, number, 0, count * settings.ranks)
            return
        kept = [Loaded(batch) for batch in loader.batches(bad, 1, 0, count * settings.ranks)]
    yield lambda number, count: Batches(kept, count)


def batches_ahead(settings: Settings) -> int:
    """Batches that a run has fetched or asked for beyond those of a step: two for each loader, the
    one that waits for the next forward phase, and the one that `delayed` has sent there.
    """
    return 2 * settings.workers + 2


class PlainLoop:
    """A textbook loop over all cores, with nothing of this program but its loaders: in PyTorch's
    own defaults (fp32, NCHW), or with the flags of the way's settings, as other trainers have them.
    """

    def __init__(self, way: Way, online: Sequence[int], stack: contextlib.ExitStack):
        settings, group = way.settings, way.plan.forward
        self._way, self._online = way, online
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # no team yet: loaders are forked, and its threads are counted
        self._supply = stack.enter_context(supplied(settings, way.plan.loader_cpus))
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
        self._criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self._teacher = build_teacher(settings, ())

    def learn(self, images: torch.Tensor, targets: torch.Tensor) -> float:
        """Forward and backward pass of a batch; its loss."""
        settings, images = self._way.settings, images.contiguous(memory_format=self._layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            taught = self._teacher(images) if self._teacher else None
            logits = self._model(images)
            loss = self._criterion(logits, targets)
            if self._teacher:
                loss = self._teacher.loss(loss, logits, taught)
        (loss / settings.accumulate).backward()
        return loss.item()

    def step(self, batches: Iterable[Batch]) -> tuple[StepResult, float]:
        """An optimizer step, and the seconds of its update; the main thread's CPU time is that of
        its whole team.
        """
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        images = loss = 0
        for batch in batches:
            loss = self.learn(*batch)
            images += len(batch[0])
        learnt_s = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad()
        end_s, cpu_s = time.perf_counter(), time.process_time() - cpu_start_s
        step = StepResult(0, loss, images, end_s - start_s, (), main_thread_s=cpu_s)
        return step, end_s - learnt_s

    def round(self, order: Order) -> Round:
        """The batches to leave out, then the steps to measure."""
        warmup = self._way.warmup
        count = warmup + order.batches * order.steps
        batches = self._supply(order.number, count + batches_ahead(self._way.settings))
        for batch in itertools.islice(batches, warmup):
            self.learn(*batch)
        monitor = ContentionMonitor(self._way.plan, self._online)
        timed = [self.step(itertools.islice(batches, order.batches)) for _ in range(order.steps)]
        steps = with_contention((step for step, _ in timed), monitor)
        exhaust(batches)
        used_s = sum(step.main_thread_s for step in steps)
        return Round(
            steps,
            {"all": self._group.busy(used_s, sum(step.step_s for step in steps))},
            None,
            {},
            peak_memory_bytes(),
            statistics.median(update_s for _, update_s in timed),
            order.batches / self._way.settings.accumulate,
        )


class LaneLoop:
    """The loop of this program, on the lanes of a way's plan; `ranks` have such a loop each."""

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
        self._supply = stack.enter_context(supplied(way.settings, cpus, ranks.rank))
        first = self._supply(1, 1) if way.times_phases else ()
        self._ready = list(map(Loaded, first))  # for phases without company, or loading
        self._lanes = stack.enter_context(Lanes(way.plan, online))
        self._train_state = build_train_state(way.settings, self._lanes, ranks=ranks)
        self._lanes.backward.adopt(ranks.start)
        stack.callback(ranks.close, together=False)

    def round(self, order: Order) -> Round:
        """The steps to measure, and the phases without company: those of the steps themselves if
        they have none, or others before them if that is asked for.
        """
        lanes, network = self._lanes, self._train_state.network
        network.accumulate, alone = 1, None
        if self._way.times_phases:
            warmup = self._way.warmup
            alone = time_phases(lanes, self._train_state, Batches(self._ready, warmup), warmup)
        steps = self._measure(order)
        records = [record for step in steps for record in step.records]
        rates = {
            lane.group.name: lane.call(matrix_flops, network.bf16)
            for lane in dict.fromkeys((lanes.forward, lanes.backward))
        }
        if not order.keep_memory:
            give_memory_back()
        return Round(
            steps,
            lanes_busy(lanes.plan, records, sum(step.step_s for step in steps)),
            phase_times(records) if self._way.strict else alone,
            rates,
            peak_memory_bytes(),
            statistics.median(map(end_s, steps)),
            order.batches / self._way.settings.accumulate,
        )

    def _measure(self, order: Order) -> tuple[StepResult, ...]:
        """The steps to measure, after one of a batch, which is left out: it fetches memory, and
        brings loaders and `delayed`, which work ahead, to where they are in the midst of a run.
        """
        settings, network, lead = self._way.settings, self._train_state.network, 1
        count = lead + order.batches * order.steps + batches_ahead(settings)
        batches = self._supply(order.number, count)
        steps = run_schedule(settings, self._lanes, self._train_state, batches)
        exhaust(itertools.islice(steps, lead))
        network.accumulate = order.batches
        monitor = ContentionMonitor(self._lanes.plan, self._online)
        measured = with_contention(itertools.islice(steps, order.steps), monitor)
        steps.close()
        exhaust(batches)
        return measured


def with_contention(
    steps: Iterable[StepResult], monitor: ContentionMonitor
) -> tuple[StepResult, ...]:
    """The steps, once they are done, the last one with what others took of the cores in all."""
    *steps, last = steps
    return (*steps, dataclasses.replace(last, contention=monitor.look()))


def exhaust(items: Iterable[Any]) -> None:
    """Go to the end: loaders, say, shall have nothing left to do when it is another way's turn."""
    deque(items, maxlen=0)


def rounds_of(way: Way, online: Sequence[int], rank: int = 0, place: str = "") -> Rounds:
    """A way to train, in its own process: None when it is ready, then a Round for each Order. Its
    ranks, of which this is one, meet in the file `place`.
    """
    if way.settings.tuned_malloc and not way.plain:
        tune_allocator()
    torch.manual_seed(way.settings.seed)
    # Nothing can diverge, at the same speed.
    settings = dataclasses.replace(way.settings, lr=0.0, lr_scheduler="constant")
    with contextlib.ExitStack() as stack:
        way = dataclasses.replace(way, settings=settings)
        if way.plain:
            loop = PlainLoop(way, online, stack)
        else:
            ranks = met_in(place, settings, rank)
            loop = LaneLoop(of_one_rank(way, rank), online, stack, ranks)
        order = yield None
        while True:
            order = yield loop.round(order)


def met_in(place: str, settings: Settings, rank: int) -> Ranks:
    """The ranks of a way, processes of this machine, which meet in a file."""
    if settings.ranks == 1:
        return ONE_PROCESS
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(place, settings.ranks)
    ranks = SeveralRanks(rank, settings.ranks, store, settings.timeout)
    ranks.hosts = ranks.exchange(this_host(read_topology()))
    return ranks


def end_s(step: StepResult) -> float:
    """Seconds of what comes but once in a step: the update, and before it the sum over ranks."""
    return step.total("duration_s", "reduce") + step.total("duration_s", "update")


def matrix_flops(bf16: bool) -> float:
    """Floating-point operations a second of the calling thread's team, in products of square
    matrices of 2,048: the median of five, after one to warm up.
    """
    size, times_s = 2048, []
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(6):
        start_s = time.perf_counter()
        torch.mm(left, right)
        times_s.append(time.perf_counter() - start_s)
    return 2 * size**3 / statistics.median(times_s[1:])
