"""What was seen of a whole data set, and what that adds up to. Pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from split_affinity.inspection.looks import Look
from split_affinity.inspection.twins import Twins, compared, find_twins

TRAIN, VALIDATION = "train", "validation"
HUGE_PIXELS = 40_000_000  # take a third of a second and more to decode


@dataclass(frozen=True)
class Seen:
    """A picture of the data: where it is, what it is said to be, and what was seen of it.

    Without a look, `fault` says why it cannot be read.
    """

    path: str  # below the data's folder; a number if it is in no file
    label: int  # its class
    part: str
    index: int  # in that part's data set
    look: Look | None
    fault: str = ""


@dataclass(frozen=True)
class ClassRow:
    """A class: how many of its pictures are to train and to validate, and their usual size."""

    name: str
    train: int
    validation: int
    median_side: float | None  # shorter side in pixels


@dataclass(frozen=True)
class Bar:
    """How many pictures have a shorter side from `low` pixels on, and below `high`."""

    low: int
    high: int
    pictures: int


@dataclass(frozen=True)
class Survey:
    """All pictures of a data set, as they were seen.

    `image_size` is that of a run; `left_out` has kind and path of what is no picture of a class;
    `can_compare` is false without the package that finds pictures which are nearly the same.
    """

    name: str
    classes: Sequence[str]
    seen: Sequence[Seen]
    image_size: int
    left_out: Sequence[tuple[str, str]] = ()
    can_compare: bool = True

    @cached_property
    def looks(self) -> list[Look]:
        """The looks at all pictures that can be read."""
        return [each.look for each in self.seen if each.look]

    @cached_property
    def twins(self) -> list[Twins]:
        """The pictures that are there twice, by their places in `seen`."""
        looks = [each.look for each in self.seen]
        labels, parts = ([getattr(each, name) for each in self.seen] for name in ("label", "part"))
        return find_twins(looks, labels, parts)

    @property
    def not_compared(self) -> int:
        """How many pictures were not compared with others: too even, too many, or no package."""
        same = {look.digest for look in self.looks}
        return len(same) - len(compared([each.look for each in self.seen]))

    def of_part(self, part: str) -> list[Seen]:
        """The pictures to train, or to validate."""
        return [each for each in self.seen if each.part == part]

    @property
    def broken(self) -> list[Seen]:
        """Pictures that cannot be read."""
        return [each for each in self.seen if not each.look]

    @property
    def tiny(self) -> list[Seen]:
        """Pictures that would be enlarged to more than twice their sides."""
        return [s for s in self.seen if s.look and 2 * s.look.shorter_side < self.image_size]

    @property
    def huge(self) -> list[Seen]:
        """Pictures that take long to decode."""
        return [s for s in self.seen if s.look and math.prod(s.look.size) > HUGE_PIXELS]

    @property
    def turned(self) -> list[Seen]:
        """Pictures that EXIF data turn or mirror."""
        return [s for s in self.seen if s.look and s.look.orientation not in (0, 1)]

    @property
    def modes(self) -> dict[str, int]:
        """How many pictures have which mode and kind of file, the most frequent first."""
        texts = (f"{look.kind} {look.mode}".strip() for look in self.looks)
        return dict(Counter(texts).most_common())

    @property
    def rows(self) -> list[ClassRow]:
        """The classes, in their order."""
        counts = Counter((each.label, each.part) for each in self.seen)
        sides: dict[int, list[int]] = {}
        for each in self.seen:
            if each.look:
                sides.setdefault(each.label, []).append(each.look.shorter_side)
        return [
            ClassRow(
                name,
                counts[label, TRAIN],
                counts[label, VALIDATION],
                statistics.median(sides[label]) if label in sides else None,
            )
            for label, name in enumerate(self.classes)
        ]

    @property
    def imbalance(self) -> float:
        """The most pictures to train of a class, to the fewest of one that has any."""
        counts = [row.train for row in self.rows if row.train]
        return max(counts) / min(counts) if counts else 1.0

    @property
    def sides(self) -> list[int]:
        """The shorter sides of all pictures in pixels, ascending."""
        return sorted(look.shorter_side for look in self.looks)

    @property
    def bars(self) -> list[Bar]:
        """A histogram of the shorter sides: two bars for each doubling."""
        if not self.looks:
            return []
        places = Counter(math.floor(2 * math.log2(side)) for side in self.sides)
        edges = [math.ceil(2 ** (place / 2)) for place in range(min(places), max(places) + 2)]
        return [
            Bar(low, high, places[min(places) + number])
            for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False))
        ]

    @property
    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation of each channel, of values from 0 to 1, of the pictures to train.

        Each picture counts alike, whatever its size.
        """
        looks = [each.look for each in self.of_part(TRAIN) if each.look]
        if not looks:
            return None
        mean = [statistics.fmean(look.sums[c] / look.pixels for look in looks) for c in range(3)]
        square = [
            statistics.fmean(look.squares[c] / look.pixels for look in looks) for c in range(3)
        ]
        pairs = zip(mean, square, strict=True)
        deviation = [math.sqrt(max(0.0, each - middle**2)) for middle, each in pairs]
        return tuple(round(each, 4) for each in mean), tuple(round(each, 4) for each in deviation)


def survey_figures(survey: Survey) -> dict[str, Any]:
    """What a survey adds up to, in plain types; pictures are named by their paths."""
    mean, deviation = survey.colours or (None, None)
    sides = survey.sides
    return {
        "data": survey.name,
        "pictures": {part: len(survey.of_part(part)) for part in (TRAIN, VALIDATION)},
        "classes": [dataclasses.asdict(row) for row in survey.rows],
        "imbalance": round(survey.imbalance, 2),
        "shorter_side": {
            "smallest": sides[0],
            "median": statistics.median(sides),
            "largest": sides[-1],
        }
        if sides
        else None,
        "histogram": [dataclasses.asdict(bar) for bar in survey.bars],
        "modes": survey.modes,
        "mean": mean,
        "std": deviation,
        "turned": [each.path for each in survey.turned],
        "broken": [{"path": each.path, "why": each.fault} for each in survey.broken],
        "tiny": [{"path": each.path, "size": each.look.size} for each in survey.tiny],
        "huge": [{"path": each.path, "size": each.look.size} for each in survey.huge],
        "left_out": [{"kind": kind, "path": path} for kind, path in survey.left_out],
        "not_compared": survey.not_compared,
        "twins": [twins_figures(survey, each) for each in survey.twins],
    }


def twins_figures(survey: Survey, twins: Twins) -> dict[str, Any]:
    """A group of pictures that are the same, in plain types."""
    pictures = [survey.seen[place] for place in twins.pictures]
    return {
        "exact": twins.exact,
        "between_parts": twins.between_parts,
        "between_classes": twins.between_classes,
        "pictures": [
            {"path": each.path, "class": survey.classes[each.label], "part": each.part}
            for each in pictures
        ],
    }
