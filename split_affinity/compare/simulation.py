"""How fast a machine with other cores would train, by laws fitted to one and two cores. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from split_affinity.compare.ratios import (
    BY_AMDAHL,
    BY_POWER,
    Point,
    Ratio,
    all_ratios,
    lane_times,
    median_times,
    way_bound_s,
)
from split_affinity.machine.plan import PhaseTimes, divide_cores, usable_cores
from split_affinity.machine.topology import Topology, cpus_of
from split_affinity.options.settings import Settings, images_in_step

Curve = Callable[[float], float]  # seconds of a phase, by cores
Law = Callable[[float, float, float, float], Curve]  # fitted to two sizes
TimesOn = Callable[[float], PhaseTimes]  # of all phases, by cores
ASSUMPTIONS = (
    "each core is as fast as one of the machine that was measured (a slower one counts by its "
    "capacity)",
    "a phase takes serial + parallel / n seconds on n cores (Amdahl's law), or t * n**-a (a power "
    "law), each through the times on one core and on two; bands: the middle half of the rounds in "
    "which these were measured",
    "neither group slows the other down, and ranks add their gradients up at no cost",
    "memory bandwidth, caches, the clock under load, NUMA and batches too small for many cores are "
    "left out: a real machine may lie below both laws, the more so the more cores it has",
)


def amdahl(few: float, few_s: float, many: float, many_s: float) -> Curve:
    """serial + parallel / n seconds, by the times on `few` and on `many` cores."""
    speedup = few_s / many_s
    if speedup <= 1:
        part = 0.0
    elif speedup >= many / few:  # more than linear: a cache, or noise
        part = 1.0
    else:
        part = (1 - speedup) / (1 - speedup - 1 / few + speedup / many)
    return levelled(lambda cores: 1 - part + part / cores, few, few_s, many, many_s)


def power(few: float, few_s: float, many: float, many_s: float) -> Curve:
    """t * n**-a seconds, a from 0 to 1, by the times on `few` and on `many` cores."""
    exponent = math.log(few_s / many_s) / math.log(many / few)
    exponent = min(1.0, max(0.0, exponent))
    return levelled(lambda cores: cores**-exponent, few, few_s, many, many_s)


def levelled(shape: Curve, few: float, few_s: float, many: float, many_s: float) -> Curve:
    """A curve of this shape through both times; where its shape was limited, between them."""
    level_s = math.sqrt(few_s / shape(few) * many_s / shape(many))
    return lambda cores: level_s * shape(cores)


LAWS = {BY_AMDAHL: amdahl, BY_POWER: power}


@dataclass(frozen=True)
class Scaling:
    """Phase times on groups of two sizes (in cores of full capacity), round by round."""

    few: float
    many: float
    on_few: tuple[PhaseTimes, ...]
    on_many: tuple[PhaseTimes, ...]

    def through_medians(self, law: Law = amdahl) -> TimesOn:
        """A law through the medians."""
        return self._times_on(law, median_times(self.on_few), median_times(self.on_many))

    def through_rounds(self, law: Law) -> list[TimesOn]:
        """A law through the times of each round."""
        return [
            self._times_on(law, few, many)
            for few, many in zip(self.on_few, self.on_many, strict=True)
        ]

    def _times_on(self, law: Law, on_few: PhaseTimes, on_many: PhaseTimes) -> TimesOn:
        """All phases by one law; a phase that takes no time on one of the sizes takes none."""
        curves = {}
        for name, few_s in dataclasses.asdict(on_few).items():
            many_s = getattr(on_many, name)
            is_timed = few_s > 0 and many_s > 0
            curves[name] = law(self.few, few_s, self.many, many_s) if is_timed else lambda _: 0.0
        return lambda cores: PhaseTimes(**{name: curve(cores) for name, curve in curves.items()})


def limited_phases(scaling: dict[int, Scaling]) -> Iterator[str]:
    """What was measured and no law can follow: phases that two cores do not help, or more than
    double.
    """
    for batch_size, each in scaling.items():
        on_few, on_many = median_times(each.on_few), median_times(each.on_many)
        for phase in ("forward", "backward", "update"):
            few_s, many_s = (getattr(times, f"{phase}_s") for times in (on_few, on_many))
            if not few_s or not many_s or 1 < few_s / many_s < each.many / each.few:
                continue
            found = f"{phase} of {batch_size} images took {few_s:.4f} s on one core, {many_s:.4f} s"
            if few_s <= many_s:
                yield f"{found} on two: counted as wholly serial (did others use the cores?)"
            else:
                yield f"{found} on two, less than half: counted as wholly parallel"


def capacity_of(machine: Topology, cpus: Iterable[int]) -> float:
    """How many cores of full capacity some CPUs are worth, each core counted once."""
    used = {*cpus}
    return sum(core.capacity for core in machine.cores if used & {*core.cpus}) / 1024


def group_capacities(
    machine: Topology, ratios: Iterable[Ratio]
) -> dict[Ratio, tuple[float, float]]:
    """What the forward and the backward group of each ratio are worth."""
    usable, found = usable_cores(machine), {}
    for ratio in ratios:
        forward, backward, _ = divide_cores(usable, str(ratio))
        found[ratio] = capacity_of(machine, forward), capacity_of(machine, backward)
    return found


def simulated_speed(way: Settings, capacities: tuple[float, float], law: TimesOn) -> float:
    """Images a second of a way, by a law."""
    return images_in_step(way) / way_bound_s(way, *map(law, capacities))


def simulate(
    machine: Topology, ways: dict[str, Settings], scaling: dict[int, Scaling]
) -> Iterator[Point]:
    """The points of a machine by each law: one lane over all cores, then all ways at all ratios.

    `ways` are by name, `none` among them; `scaling` is by the images of a batch.
    """
    usable = usable_cores(machine)
    whole = capacity_of(machine, cpus_of(usable))
    groups = group_capacities(machine, all_ratios(len(usable)))
    for kind, law in LAWS.items():
        fitted = {
            size: [each.through_medians(law), *each.through_rounds(law)]
            for size, each in scaling.items()
        }
        none = ways["none"]
        lanes = [simulated_speed(none, (whole, whole), each) for each in fitted[none.batch_size]]
        yield simulated_point("none", kind, None, none, (whole, whole), fitted, lanes)
        for (ratio, capacities), (name, way) in itertools.product(groups.items(), ways.items()):
            if name != "none":
                yield simulated_point(name, kind, ratio, way, capacities, fitted, lanes)


def simulated_point(
    name: str,
    kind: str,
    ratio: Ratio | None,
    way: Settings,
    capacities: tuple[float, float],
    fitted: dict[int, list[TimesOn]],
    lanes: Sequence[float],
) -> Point:
    """A point of a simulation, by a law fitted to the medians and to each round.

    `lanes` are the speeds of one lane over all cores, likewise.
    """
    laws = fitted[way.batch_size]
    speeds = [simulated_speed(way, capacities, law) for law in laws]
    to_none = [own / lane for own, lane in zip(speeds, lanes, strict=True)]
    return Point(
        name,
        kind,
        ratio,
        images_per_s=speeds[0],
        images_per_s_range=middle_half(speeds),
        to_none=to_none[0],
        to_none_range=middle_half(to_none),
        times=lane_times(*map(laws[0], capacities)),
    )


def middle_half(figures: Sequence[float]) -> tuple[float, float]:
    """The quartiles of the rounds, and in any case the first figure, that of the medians.

    The whole range would tell of others that disturbed a round, magnified by many cores.
    """
    through_medians, *by_round = figures
    lower, _, upper = quantiles(by_round, n=4, method="inclusive")
    return min(through_medians, lower), max(through_medians, upper)


@dataclass(frozen=True)
class LawCheck:
    """What the law says of a phase on a number of cores that was measured, beside the median."""

    batch_size: int
    cores: int
    phase: str
    measured_s: float
    simulated_s: float

    @property
    def error(self) -> float:
        """How far off the law is, relative to what was measured."""
        return self.simulated_s / self.measured_s - 1


def check_laws(
    scaling: dict[int, Scaling],
    timed: dict[int, dict[int, tuple[PhaseTimes, ...]]],
    capacities: dict[int, float],
) -> Iterator[LawCheck]:
    """Amdahl's law beside what was measured on more than two cores; `capacities` by cores."""
    for batch_size, sizes in timed.items():
        law = scaling[batch_size].through_medians()
        for cores, rounds in sizes.items():
            for phase in ("forward", "backward", "update", "refresh"):
                measured_s = median(getattr(each, f"{phase}_s") for each in rounds)
                simulated_s = getattr(law(capacities[cores]), f"{phase}_s")
                if cores > 2 and measured_s > 0:
                    yield LawCheck(batch_size, cores, phase, measured_s, simulated_s)
