"""All ways to train that are compared: plain loops, one lane, and every schedule of each split."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import distributed

from split_affinity.errors import UserError
from split_affinity.machine.plan import CorePlan, make_group
from split_affinity.machine.topology import Topology
from split_affinity.options.settings import Settings, TrainingSettings
from split_affinity.runs.measurement import plan_for
from split_affinity.training.schedules import SCHEDULES

ROUNDS = 7
MOST_STEPS = 32  # of a way in a round, unless --steps asks for more
LEAST_STEPS_S = 2.0  # where steps are short, a round has as many as take so long


@dataclass(frozen=True)
class Way:
    """One way to train: a plain PyTorch loop, the lanes of a plan, or two ranks on its groups."""

    name: str
    settings: Settings
    plan: CorePlan
    # Its phases are timed by themselves: its batches have another size than those of `sequential`.
    times_phases: bool = False

    @property
    def plain(self) -> bool:
        """Whether this is a plain loop, without lanes."""
        return self.name.startswith("plain")

    @property
    def ranks(self) -> int:
        """In how many processes it trains."""
        return self.settings.ranks


def best_plain(names: Iterable[str]) -> str:
    """The plain loop with the best flags, among the names of ways."""
    return next(name for name in names if name.startswith("plain "))


def way_settings(settings: Settings) -> dict[str, Settings]:
    """The settings of the ways to train, by name; all have the same images in an optimizer step."""
    # Lists of cores and thread counts are for the lanes of a split alone.
    own = ("forward_cores", "backward_cores", "forward_threads", "backward_threads")
    none = dataclasses.replace(settings, split="none", schedule="sequential", **dict.fromkeys(own))
    plain = dataclasses.replace(none, fold_norm=False, channels_last=False)
    best = "plain bf16" if settings.precision == "bf16" else "plain nhwc"
    ways = {
        "plain": dataclasses.replace(plain, precision="fp32"),
        best: dataclasses.replace(plain, channels_last=True),
        "none": none,
    }
    splits, halves = settings.split.split(","), halved_step(settings)
    connected = distributed.is_available() and distributed.is_gloo_available()
    kinds = [*SCHEDULES, *(["ranks"] if halves and connected else [])]
    for split, kind in itertools.product(splits, kinds):
        name = kind if len(splits) == 1 else f"{kind} {split}"
        chosen = {"schedule": kind} if kind in SCHEDULES else {"ranks": 2, **halves}
        if kind == "overlap" and settings.accumulate == 1:
            parts = micro_batches(settings.batch_size)
            chosen |= {"batch_size": settings.batch_size // parts, "accumulate": parts}
        ways[name] = dataclasses.replace(settings, split=split, **chosen)
    return ways


def halved_step(settings: TrainingSettings) -> dict[str, int]:
    """What one of two ranks has of a step: half of the batches, or of their size; else nothing."""
    if settings.accumulate % 2 == 0:
        return {"accumulate": settings.accumulate // 2}
    size, rest = divmod(settings.batch_size, 2)
    return {"batch_size": size} if size > 1 and not rest else {}  # BatchNorm needs two images


def micro_batches(batch_size: int) -> int:
    """Into how many equal parts to divide a batch: 4 of two images or more, else the fewest."""
    candidates = ([4] if batch_size >= 8 else []) + list(range(2, batch_size + 1))
    parts = next((count for count in candidates if batch_size % count == 0), None)
    if parts is None:
        raise UserError(f"--batch-size {batch_size}: overlap needs a batch that can be divided")
    return parts


def all_ways(settings: Settings, topology: Topology) -> list[Way]:
    """The ways to train, with their cores: where these are listed, each way has all of them."""
    listed = {*(settings.forward_cores or ()), *(settings.backward_cores or ())}
    ways = []
    for name, chosen in way_settings(settings).items():
        if chosen.ranks > 1:
            plan = ways[-1].plan  # of the split beside which they stand
            if plan.forward.cpus != plan.backward.cpus:
                ways.append(Way(name, chosen, plan_of_ranks(plan)))
            continue
        plan = plan_for(chosen, topology)
        if plan.split == "none" and (listed or name.startswith("plain")):
            # A plain loop knows nothing of a quota: it has all that are allowed.
            group = make_group(topology, "all", sorted(listed or topology.allowed), None)
            plan = CorePlan("none", group, group, chosen.loader_cores or group.cpus)
        ways.append(Way(name, chosen, plan, chosen.batch_size != settings.batch_size))
    return ways


def plan_of_ranks(plan: CorePlan) -> CorePlan:
    """A rank on each group of a split; loaders beside both groups if so listed, else in them."""
    groups = [
        dataclasses.replace(group, name=f"rank {rank}") for rank, group in enumerate(plan.groups)
    ]
    used = set().union(*(group.cpus for group in groups))
    loader_cpus = tuple(sorted(set(plan.loader_cpus) - used or used))
    return dataclasses.replace(plan, forward=groups[0], backward=groups[1], loader_cpus=loader_cpus)


def way_of_rank(way: Way, rank: int) -> Way:
    """A way as one of its ranks trains it: with several, on one lane over the rank's group."""
    if way.ranks == 1:
        return way
    group = way.plan.groups[rank]
    own = tuple(cpu for cpu in way.plan.loader_cpus if cpu in group.cpu_set)
    plan = CorePlan("none", group, group, own or way.plan.loader_cpus)
    return dataclasses.replace(way, plan=plan)


def is_loading(settings: Settings) -> bool:
    """Whether images are loaded while steps are timed, as in a run."""
    return bool(settings.data_path) and not settings.preload


def steps_in_round(asked: int | None, shortest_s: float | None = None) -> int:
    """Steps of each way in a round: as asked in all rounds, or enough to take LEAST_STEPS_S."""
    if asked:
        return math.ceil(asked / ROUNDS)
    if shortest_s is None:  # the shortest way's step is not known yet
        return MOST_STEPS
    return max(1, min(MOST_STEPS, math.ceil(LEAST_STEPS_S / shortest_s)))
