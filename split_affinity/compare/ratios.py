"""Which ratios of a machine's cores are swept, their bounds, and which of them are ruled out. Pure.

Phases are timed alone, on groups of all sizes that the ratios need. From them comes each way's
bound. A way whose bound lies below what has been reached already cannot be the fastest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from split_affinity.machine.plan import PhaseTimes, forward_count
from split_affinity.options.settings import Settings, images_in_step
from split_affinity.training.schedules import step_bound_s

MOST_RATIOS = 8  # of more some are left out
BESIDE_EVEN = 3  # ratios on either side of the even one, where some are left out
MEASURED, RULED_OUT = "measured", "ruled out by its bound"
BY_AMDAHL, BY_POWER = "simulated by Amdahl's law", "simulated by a power law"

Sizes = dict[int, tuple[PhaseTimes, ...]]  # phase times by the cores of a group, round by round
Timed = dict[int, Sizes]  # by the images of a batch


@dataclass(frozen=True, order=True)
class Ratio:
    """How many whole cores the forward and the backward group have."""

    forward: int
    backward: int

    @property
    def share(self) -> float:
        """The forward group's share of the cores."""
        return self.forward / (self.forward + self.backward)

    def __str__(self) -> str:
        return f"{self.forward}:{self.backward}"


@dataclass(frozen=True)
class Point:
    """A way to train at a ratio, or without one on all cores, and how fast it is.

    Ranges are (lowest, highest) of the rounds, of a simulation of their middle half. `to_none` is
    relative to one lane in the same rounds. A way that was ruled out has only a bound. Of what is
    measured `simulated_images_per_s` is what Amdahl's law says. Phase times are those of one batch:
    forward and refresh on the forward group, backward and update on the backward group.
    """

    way: str
    kind: str
    ratio: Ratio | None
    images_per_s: float | None = None
    images_per_s_range: tuple[float, float] | None = None
    to_none: float | None = None
    to_none_range: tuple[float, float] | None = None
    bound_images_per_s: float | None = None
    bound_to_none: float | None = None
    simulated_images_per_s: float | None = None
    times: PhaseTimes | None = None


def even_ratio(cores: int) -> Ratio:
    """The ratio of `--split even`."""
    forward = forward_count(cores, 1, 1)
    return Ratio(forward, cores - forward)


def all_ratios(cores: int) -> list[Ratio]:
    """All ratios of whole cores, by the forward group's share."""
    return [Ratio(forward, cores - forward) for forward in range(1, cores)]


def thinned_ratios(cores: int) -> list[Ratio]:
    """All ratios; of more than MOST_RATIOS the even one, both ends, and some evenly between."""
    ratios = all_ratios(cores)
    if len(ratios) <= MOST_RATIOS:
        return ratios
    middle, last = even_ratio(cores).forward, cores - 1
    parts = [part / BESIDE_EVEN for part in range(BESIDE_EVEN + 1)]
    chosen = {round(1 + part * (middle - 1)) for part in parts}
    chosen |= {round(middle + part * (last - middle)) for part in parts}
    return [ratio for ratio in ratios if ratio.forward in chosen]


def group_sizes(ratios: Iterable[Ratio], cores: int) -> list[int]:
    """The sizes of groups on which phases are timed: also one and two cores, and all."""
    sizes = {1, 2, cores}.union(*((ratio.forward, ratio.backward) for ratio in ratios))
    return sorted(sizes)


def median_times(rounds: Sequence[PhaseTimes]) -> PhaseTimes:
    """The median time of each phase."""
    return PhaseTimes(*map(statistics.median, zip(*map(astuple, rounds), strict=True)))


def lane_times(forward: PhaseTimes, backward: PhaseTimes) -> PhaseTimes:
    """Phase times where each phase runs on its own group."""
    return PhaseTimes(forward.forward_s, backward.backward_s, backward.update_s, forward.refresh_s)


def way_bound_s(way: Settings, forward: PhaseTimes, backward: PhaseTimes) -> float:
    """The shortest step of a way with these times on its groups, if neither slows the other down.

    Ranks have equal work: a step lasts as long as that of the slower one.
    """
    if way.ranks > 1:
        own = (step_bound_s("sequential", each, way.accumulate) for each in (forward, backward))
        return max(own)
    return step_bound_s(way.schedule, lane_times(forward, backward), way.accumulate)


@dataclass(frozen=True)
class Bound:
    """The speed that a way cannot exceed at a ratio, by the round in which phases were timed."""

    images_per_s: tuple[float, ...]
    to_none: tuple[float, ...]


def way_bound(way: Settings, none: Settings, ratio: Ratio, timed: Timed) -> Bound:
    """A way's bound at a ratio, and that bound relative to one lane over all cores."""
    sizes, whole = timed[way.batch_size], timed[none.batch_size][ratio.forward + ratio.backward]
    pairs = zip(sizes[ratio.forward], sizes[ratio.backward], strict=True)
    bounds_s = [way_bound_s(way, *pair) for pair in pairs]
    none_s = [way_bound_s(none, each, each) for each in whole]
    images, of_none = images_in_step(way), images_in_step(none)
    speeds = tuple(images / each_s for each_s in bounds_s)
    lanes = (of_none / each_s for each_s in none_s)
    return Bound(speeds, tuple(own / lane for own, lane in zip(speeds, lanes, strict=True)))


def is_ruled_out(bound: Bound, speeds: Sequence[float], to_none: Sequence[float]) -> bool:
    """Whether a bound lies below what the best so far has reached in each of its rounds.

    In images/s and relative to one lane: the machine may have changed its pace since the phases
    were timed, and loading makes one lane slower than its phases.
    """
    return max(bound.images_per_s) < min(speeds) and max(bound.to_none) < min(to_none)
