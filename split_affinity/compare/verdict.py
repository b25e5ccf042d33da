"""What the rounds show: each way's medians, and whether the split pays beyond the noise."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from split_affinity.compare.loops import ByLane, WayRound
from split_affinity.compare.rounds import Round, disturbance, rounds_used
from split_affinity.compare.ways import Way, best_plain
from split_affinity.machine.plan import split_name
from split_affinity.machine.topology import Topology
from split_affinity.options.settings import Settings
from split_affinity.text import format_cpu_list, plural
from split_affinity.training.schedules import step_bound_s

PAYS = "the split pays"


@dataclass(frozen=True)
class Compared:
    """One way to train in a comparison: medians over the rounds; ranges are (lowest, highest).

    Ratios are taken within a round; `to_plain` is that to the plain loop with the best flags.
    `bound_share` is the bound's share of the step's time. `gflops` are those of the whole machine;
    `matrix_share`, by lane, is the rate of convolutions and matrix products, relative to that of
    large matrix products: over whole steps for a single lane, over its phases for a lane of two.
    With several `ranks`, `batches` are ranks x batches x images. `fused` says whether its norms are
    one operator with what follows them.
    """

    way: str
    split: str
    schedule: str
    cores: str
    ranks: int
    batches: str
    images_per_s: float
    images_per_s_range: tuple[float, float]
    to_none: float
    to_none_rounds: tuple[float, ...]
    to_plain: float
    bound_images_per_s: float | None
    bound_share: float | None
    busy: ByLane
    peak_memory_bytes: int
    gflops: float
    matrix_share: ByLane
    matrix_gflops: ByLane
    stray_s: float
    fused: bool


def matrix_share(lane: str, each: WayRound, flops: ByLane) -> float:
    """The rate of a lane's convolutions and matrix products, relative to `matrix_flops`."""
    if lane in flops:
        achieved_flops = flops[lane] * each.steps[0].images / each.phase_s(lane)
    else:
        achieved_flops = sum(flops.values()) * each.images_per_s / len(each.matrix_flops)
    return achieved_flops / each.matrix_flops[lane]


def lane_medians(rounds: Sequence[ByLane]) -> ByLane:
    """The median of each lane's figures."""
    return {lane: median(each[lane] for each in rounds) for lane in rounds[0]}


def compared_way(way: Way, rounds: Sequence[Round], flops: ByLane) -> Compared:
    """The figures of one way to train; `flops` are an image's operations by phase."""
    own, settings = [each[way.name] for each in rounds], way.settings
    schedule, batches = settings.schedule, (settings.accumulate, settings.batch_size)
    speeds = [each.images_per_s for each in own]
    to_none, to_plain = (
        [each[way.name].images_per_s / each[other].images_per_s for each in rounds]
        for other in ("none", best_plain(rounds[0]))
    )
    bound_speed = bound_share = None
    if own[0].phase_times_alone:
        bounds_s = [
            step_bound_s(schedule, each.phase_times_alone, settings.accumulate) for each in own
        ]
        bound_speed = math.prod(batches) / median(bounds_s)
        pairs = zip(bounds_s, own, strict=True)
        bound_share = median(bound_s / each.step_s for bound_s, each in pairs)
    shares = [{lane: matrix_share(lane, each, flops) for lane in each.matrix_flops} for each in own]
    rates = lane_medians([each.matrix_flops for each in own])
    return Compared(
        way=way.name,
        split=split_name(settings),
        schedule=schedule,
        cores=" + ".join(format_cpu_list(group.cpus) for group in way.plan.groups),
        ranks=way.ranks,
        batches=" x ".join(map(str, batches if way.ranks == 1 else (way.ranks, *batches))),
        images_per_s=median(speeds),
        images_per_s_range=(min(speeds), max(speeds)),
        to_none=median(to_none),
        to_none_rounds=tuple(to_none),
        to_plain=median(to_plain),
        bound_images_per_s=bound_speed,
        bound_share=bound_share,
        busy=lane_medians([each.busy for each in own]),
        peak_memory_bytes=max(each.peak_memory_bytes for each in own),
        gflops=sum(flops.values()) * median(speeds) / 1e9,
        matrix_share=lane_medians(shares),
        matrix_gflops={lane: rate / 1e9 for lane, rate in rates.items()},
        stray_s=sum(step.total("stray_s") for each in own for step in each.steps),
        fused=all(each.fused for each in own),
    )


@dataclass(frozen=True)
class Comparison:
    """What has been compared, and all rounds of it."""

    asked: Settings
    settings: Settings  # in force
    topology: Topology
    ways: Sequence[Way]
    rounds: Sequence[Round]
    flops: ByLane  # of an image, by phase
    seconds: float  # that all of it took

    @functools.cached_property
    def rows(self) -> list[Compared]:
        """The figures of the ways, from the rounds that count."""
        counting = [self.rounds[index] for index in rounds_used(self.rounds)]
        return [compared_way(way, counting, self.flops) for way in self.ways]

    @property
    def plain(self) -> str:
        """The name of the plain loop with the best flags."""
        return best_plain(self.rounds[0])

    @property
    def verdict(self) -> str:
        """The verdict, with a warning if disturbed rounds count; none if most are disturbed."""
        used, disturbed = len(rounds_used(self.rounds)), self._disturbed
        if self.advised is None:
            return (
                f"No verdict, and no advice: others disturbed {disturbed} of the "
                f"{plural(used, 'round')}, so the figures may be their doing; {used // 2 + 1} "
                "undisturbed ones are needed. Compare once more while nothing else runs on this "
                "machine."
            )
        warning = f" But {disturbed} of the {plural(used, 'round')} were disturbed by others."
        return judge_ways(self.rows) + (warning if disturbed else "")

    @property
    def advised(self) -> Settings | None:
        """The settings of the way to train in; None if most of the rounds are disturbed."""
        used = len(rounds_used(self.rounds))
        # Where most are undisturbed, medians lie between their figures, whatever the others are.
        if used - self._disturbed < used // 2 + 1:
            return None
        name = advised_way(self.rows)
        return next(way.settings for way in self.ways if way.name == name)

    @property
    def _disturbed(self) -> int:
        """How many of the rounds that count were disturbed by others."""
        return sum(disturbance(self.rounds[index])[0] > 0 for index in rounds_used(self.rounds))


def judge_rounds(ratios: Iterable[float], candidates: int = 3) -> str:
    """What the speeds relative to one lane show of the fastest of some schedules."""
    words = {1: PAYS, 0: "no difference beyond the noise", -1: "the split costs speed"}
    return words[beyond_noise(ratios, candidates)]


def beyond_noise(ratios: Iterable[float], candidates: int) -> int:
    """Whether the fastest of some candidates is faster (1) or slower (-1) than another, or neither.

    Each of its relative speeds comes from a round of its own. All rounds have to agree, but for at
    most the one nearest to 1: in seven rounds, a signed-rank test at 3 in 100. The fastest of many
    looks better than it is: with the schedules of more than three splits, all have to agree.
    """
    decisive = sorted(map(math.log, ratios), key=abs)[candidates <= 9 :]
    return (min(decisive) > 0) - (max(decisive) < 0)


def fastest_split(compared: Sequence[Compared]) -> tuple[Compared, str]:
    """The fastest schedule of the split, and what its speed shows beside that of one lane."""
    candidates = [row for row in compared if row.split != "none" and row.ranks == 1]
    best = max(candidates, key=lambda row: row.to_none)
    return best, judge_rounds(best.to_none_rounds, len(candidates))


def advised_way(compared: Sequence[Compared]) -> str:
    """The name of the way to train in: the fastest beyond the noise, else one lane."""
    best, judgement = fastest_split(compared)
    rival = fastest_ranks(compared)
    if rival and judge_ranks(best, compared)[1]:
        return rival.way
    return best.way if judgement == PAYS else "none"


def judge_ways(compared: Sequence[Compared]) -> str:
    """What a comparison says about the split, and what to do, in some sentences."""
    best, judgement = fastest_split(compared)
    low, high = min(best.to_none_rounds), max(best.to_none_rounds)
    rival, ahead = judge_ranks(best, compared)
    listed = best.split == "lists"
    advice = "train with --split none"
    if ahead:
        advice = "train in two ranks (torchrun --nproc-per-node 2, --split none)"
    elif judgement == PAYS:
        how = "on these cores with" if listed else f"with --split {best.split}"
        advice = f"train {how} --schedule {best.schedule}"
    elif judgement != "the split costs speed":
        advice = "either will do"
    old = " Delayed has weights one update old." if best.schedule == "delayed" else ""
    return (
        f"Verdict: {judgement}. The fastest schedule of the split, {best.way}, trains at "
        f"{best.to_none:.2f} of the speed of one lane over all {'of these ' * listed}cores "
        f"({low:.2f} to {high:.2f} in {plural(len(best.to_none_rounds), 'round')}), and at "
        f"{best.to_plain:.2f} of that of a plain PyTorch loop with the best flags, "
        f"{best_plain(row.way for row in compared)}.{rival} For speed alone, {advice}.{old}"
    )


def fastest_ranks(compared: Sequence[Compared]) -> Compared | None:
    """The fastest of the ways that train in several ranks, if there are any."""
    rivals = (row for row in compared if row.ranks > 1)
    return max(rivals, key=lambda row: row.to_none, default=None)


def judge_ranks(best: Compared, compared: Sequence[Compared]) -> tuple[str, bool]:
    """A sentence on ranks that beat `best` or one lane; whether they beat both beyond noise."""
    rivals = [row for row in compared if row.ranks > 1]
    rival = fastest_ranks(compared)
    if not rival or rival.to_none <= min(1.0, best.to_none):
        return "", False
    rounds = rival.to_none_rounds
    pairs = zip(rounds, best.to_none_rounds, strict=True)
    ahead = [own / max(1.0, other) for own, other in pairs]
    where = "the same groups" if rival.split == best.split else f"groups of {rival.split}"
    sentence = (
        f" Data parallelism on {where}, {rival.way}, trains at {rival.to_none:.2f} of one "
        f"lane's speed ({min(rounds):.2f} to {max(rounds):.2f})."
    )
    return sentence, beyond_noise(ahead, len(rivals)) > 0
