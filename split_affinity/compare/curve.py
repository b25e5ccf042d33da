"""What a sweep shows: the points of its curve, and whether the split pays at any ratio."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from split_affinity.compare.loops import WayRound
from split_affinity.compare.ratios import (
    MEASURED,
    RULED_OUT,
    Bound,
    Point,
    Ratio,
    Timed,
    even_ratio,
    lane_times,
    median_times,
    way_bound,
)
from split_affinity.compare.rounds import Round, disturbance, rounds_used
from split_affinity.compare.simulation import (
    LawCheck,
    Scaling,
    capacity_of,
    check_laws,
    group_capacities,
    simulate,
    simulated_speed,
)
from split_affinity.compare.verdict import Compared, Comparison, advised_way, judge_ways
from split_affinity.compare.ways import is_loading, way_settings
from split_affinity.machine.plan import PhaseTimes, usable_cores
from split_affinity.machine.topology import Topology, cpus_of
from split_affinity.options.settings import Settings
from split_affinity.runs.measurement import group_of_size
from split_affinity.text import plural

Out = tuple[str, Ratio]  # a way that is ruled out at a ratio


@dataclass(frozen=True)
class Sweep:
    """What has been swept: phase times, the comparisons by ratio, and what was ruled out."""

    asked: Settings
    settings: Settings  # in force
    topology: Topology
    ratios: Sequence[Ratio]
    timed: Timed
    blocks: dict[Ratio, Comparison]
    ruled_out: dict[Out, Bound]
    machine: Topology | None  # to simulate
    seconds: float

    @functools.cached_property
    def ways(self) -> dict[str, Settings]:
        """The settings of one lane and of the ways at a ratio, by name."""
        return swept_ways(self.settings)

    @functools.cached_property
    def rows(self) -> list[Compared]:
        """The figures of all ways: `none` and the plain loop are those of the first ratio.

        Ranks are only those of equal groups: with others the larger one waits.
        """
        rows = {row.way: row for block in reversed(self.blocks.values()) for row in block.rows}
        even = f"ranks {even_ratio(len(usable_cores(self.topology)))}"
        kept = [row for row in rows.values() if row.ranks == 1 or row.way == even]
        return sorted(kept, key=lambda row: row.split != "none")

    @property
    def rounds(self) -> list[Round]:
        """The rounds of all ratios that count."""
        return [
            block.rounds[index]
            for block in self.blocks.values()
            for index in rounds_used(block.rounds)
        ]

    @property
    def verdict(self) -> str:
        """The verdict; none if others disturbed most rounds of a ratio."""
        if self.advised is None:
            return (
                f"No verdict, and no advice: others disturbed most rounds of "
                f"{', '.join(map(str, self._unreliable))}, so the figures may be their doing. "
                "Sweep once more while nothing else runs on this machine."
            )
        disturbed = sum(map(is_disturbed, self.rounds))
        warning = f" But {disturbed} of the {plural(len(self.rounds), 'round')} were disturbed by "
        return judge_ways(self.rows) + (f"{warning}others." if disturbed else "")

    @property
    def advised(self) -> Settings | None:
        """The settings of the way to train in; None if others disturbed most rounds of a ratio."""
        if self._unreliable:
            return None
        name = advised_way(self.rows)
        ways = itertools.chain.from_iterable(block.ways for block in self.blocks.values())
        return next(way.settings for way in ways if way.name == name)

    @property
    def _unreliable(self) -> list[Ratio]:
        """The ratios of which most rounds were disturbed."""
        counting = {
            ratio: [is_disturbed(block.rounds[index]) for index in rounds_used(block.rounds)]
            for ratio, block in self.blocks.items()
        }
        return [ratio for ratio, seen in counting.items() if 2 * sum(seen) >= len(seen)]

    @functools.cached_property
    def scaling(self) -> dict[int, Scaling]:
        """Phase times on one and on two cores, by the images of a batch."""
        few, many = (self.capacities[count] for count in (1, 2))
        return {size: Scaling(few, many, sizes[1], sizes[2]) for size, sizes in self.timed.items()}

    @functools.cached_property
    def capacities(self) -> dict[int, float]:
        """What the groups on which phases were timed are worth, by their cores."""
        return {
            count: capacity_of(self.topology, group_of_size(self.topology, count).cpus)
            for count in next(iter(self.timed.values()))
        }

    @functools.cached_property
    def law_checks(self) -> list[LawCheck]:
        """Amdahl's law through one and two cores, beside phases on more."""
        return list(check_laws(self.scaling, self.timed, self.capacities))

    @functools.cached_property
    def points(self) -> list[Point]:
        """The curve: one lane and the plain loop, then all ways at all ratios."""
        none = [each["none"] for each in self.rounds]
        points = [self._on_all_cores("none", none)]
        points[0] = dataclasses.replace(
            points[0], simulated_images_per_s=self._simulated("none", None)
        )
        plain = next(iter(self.blocks.values())).plain
        points.append(self._on_all_cores(plain, [each[plain] for each in self.rounds]))
        for ratio, way in itertools.product(self.ratios, self.ways):
            if way == "none":
                continue
            if (way, ratio) in self.ruled_out:
                points.append(self._ruled_out(way, ratio))
            elif ratio in self.blocks:
                points.append(self._measured(way, ratio))
        return points

    @functools.cached_property
    def simulated(self) -> list[Point]:
        """The curves of the machine that is simulated, one by each law; none without a machine."""
        return [*simulate(self.machine, self.ways, self.scaling)] if self.machine else []

    def _on_all_cores(self, way: str, rounds: Sequence[WayRound]) -> Point:
        speeds = [each.images_per_s for each in rounds]
        to_none = [each[way].images_per_s / each["none"].images_per_s for each in self.rounds]
        alone = [each.phase_times_alone for each in rounds if each.phase_times_alone]
        return Point(
            way,
            MEASURED,
            None,
            images_per_s=median(speeds),
            images_per_s_range=(min(speeds), max(speeds)),
            to_none=median(to_none),
            to_none_range=(min(to_none), max(to_none)),
            times=median_times(alone) if alone else None,
        )

    def _measured(self, way: str, ratio: Ratio) -> Point:
        block, name = self.blocks[ratio], f"{way} {ratio}"
        row = next(row for row in block.rows if row.way == name)
        alone = [block.rounds[index][name].phase_times_alone for index in rounds_used(block.rounds)]
        bound_speed, bound_share = row.bound_images_per_s, row.bound_share
        if bound_speed is None:  # of ranks, whose phases never run alone
            bound = way_bound(self.ways[way], self.ways["none"], ratio, self.timed)
            bound_speed = median(bound.images_per_s)
            bound_to_none = self._bound_to_none(bound)
        else:
            bound_to_none = row.to_none / bound_share
        return Point(
            way,
            MEASURED,
            ratio,
            images_per_s=row.images_per_s,
            images_per_s_range=row.images_per_s_range,
            to_none=row.to_none,
            to_none_range=(min(row.to_none_rounds), max(row.to_none_rounds)),
            bound_images_per_s=bound_speed,
            bound_to_none=bound_to_none,
            simulated_images_per_s=self._simulated(way, ratio),
            times=median_times(alone) if all(alone) else self._times_before(way, ratio),
        )

    def _ruled_out(self, way: str, ratio: Ratio) -> Point:
        bound = self.ruled_out[way, ratio]
        return Point(
            way,
            RULED_OUT,
            ratio,
            bound_images_per_s=median(bound.images_per_s),
            bound_to_none=self._bound_to_none(bound),
            simulated_images_per_s=self._simulated(way, ratio),
            times=self._times_before(way, ratio),
        )

    def _bound_to_none(self, bound: Bound) -> float:
        """A bound relative to one lane; where images are loaded, to one lane as it was measured."""
        if is_loading(self.settings):
            return median(bound.images_per_s) / median(
                each["none"].images_per_s for each in self.rounds
            )
        return median(bound.to_none)

    def _times_before(self, way: str, ratio: Ratio) -> PhaseTimes:
        """Phase times of a way at a ratio, as they were before any way was run."""
        sizes = self.timed[self.ways[way].batch_size]
        return lane_times(
            *(median_times(sizes[count]) for count in (ratio.forward, ratio.backward))
        )

    def _simulated(self, way: str, ratio: Ratio | None) -> float:
        """What Amdahl's law says of a way on this machine."""
        whole = capacity_of(self.topology, cpus_of(usable_cores(self.topology)))
        capacities = (whole, whole)
        if ratio:
            capacities = group_capacities(self.topology, [ratio])[ratio]
        law = self.scaling[self.ways[way].batch_size].through_medians()
        return simulated_speed(self.ways[way], capacities, law)


def is_disturbed(each: Round) -> bool:
    """Whether others took a tenth or more of a way's cores in a round."""
    return disturbance(each)[0] > 0


def swept_ways(settings: Settings) -> dict[str, Settings]:
    """The settings of one lane and of the ways at a ratio, by name."""
    ways = way_settings(dataclasses.replace(settings, split="even"))
    return {name: way for name, way in ways.items() if not name.startswith("plain")}
