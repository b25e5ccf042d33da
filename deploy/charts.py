"""Line charts as a template draws them: all places computed, in the units of a small drawing, so
that the text in it can be read on a phone; colours are left to the style sheet, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint import needed_packages
from figures import Calibration

from split_affinity.reports.plots import spans_decades
from split_affinity.text import plural

with needed_packages():
    from matplotlib.ticker import LogLocator, MaxNLocator

LEFT, RIGHT, TOP, BOTTOM = 58, 346, 12, 196  # of axes, in a drawing of 360 x 230

Values = Sequence[float | None]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along a side of the drawing, `start` to `end`; `ticks` are
    values.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value is."""
        low, high, at = (
            math.log(each) if self.is_log else each for each in (self.low, self.high, value)
        )
        return round(self.start + (self.end - self.start) * (at - low) / (high - low), 1)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Each tick's place and text."""
        inside = (each for each in self.ticks if self.low <= each <= self.high)
        return [(self.place(each), f"{each:g}") for each in inside]


def axis_of(
    values: Sequence[float], start: float, end: float, integer: bool = False, most: float = math.inf
) -> Axis:
    """An axis with room for finite values, at whose ends there are round numbers, or the `most`
    that values can be.
    """
    low, high = min(values), max(values)
    if spans_decades(values):
        ticks = [float(each) for each in LogLocator(numticks=6).tick_values(low, high)]
        return Axis(low / 1.1, high * 1.1, start, end, ticks, is_log=True)
    locator = MaxNLocator(5, integer=integer, min_n_ticks=1)
    if integer:
        return Axis(low - 0.3, high + 0.3, start, end, locator.tick_values(low, high).tolist())
    low = 0.0 if 0 < low <= high / 2 or low == high > 0 else low
    ticks = locator.tick_values(low, high if high > low else low + max(abs(low), 1e-9)).tolist()
    return Axis(ticks[0], min(ticks[-1], most), start, end, ticks)


@dataclass(frozen=True)
class Line:
    """A named line: `runs` are its unbroken pieces, as SVG has points; `dots` are all points."""

    name: str
    runs: Sequence[str]
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A drawing with two axes and some lines; `mark` is the place of a value of x, or None."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    x_title: str
    mark: float | None = None


def line_of(name: str, xs: Sequence[float], ys: Values, x: Axis, y: Axis) -> Line:
    """A line, broken where values are missing."""
    runs: list[list[tuple[float, float]]] = [[]]
    for at, value in zip(xs, ys, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((x.place(at), y.place(value)))
    texts = [" ".join(f"{left},{top}" for left, top in run) for run in runs if len(run) > 1]
    return Line(name, texts, [point for run in runs for point in run])


def line_chart(
    title: str,
    epochs: Sequence[int],
    series: dict[str, Values],
    best: int | None = None,
    most: float = math.inf,
) -> Chart | None:
    """Curves by epoch, those that have values, which are `most` or less; None if none has any."""
    series = {name: values for name, values in series.items() if any(v is not None for v in values)}
    known = [value for values in series.values() for value in values if value is not None]
    if not known:
        return None
    x, y = axis_of(epochs, LEFT, RIGHT, integer=True), axis_of(known, BOTTOM, TOP, most=most)
    lines = [line_of(name, epochs, values, x, y) for name, values in series.items()]
    return Chart(title, x, y, lines, "epoch", best and x.place(best))


@dataclass(frozen=True)
class Dot:
    """A point of the reliability curve, the larger the more images; `top` and `bottom` are the ends
    of its interval, and `text` says it in words.
    """

    x: float
    y: float
    radius: float
    top: float
    bottom: float
    text: str


def reliability(found: Calibration) -> tuple[Chart, list[Dot]]:
    """The reliability curve: the share of right answers by confidence; both as percentages."""
    ticks = [0, 20, 40, 60, 80, 100]
    x, y = Axis(0, 100, LEFT, RIGHT, ticks), Axis(0, 100, BOTTOM, TOP, ticks)
    most = max(each.right.of for each in found.bins)
    dots = []
    for each in found.bins:
        low, high = each.right.ends
        text = (
            f"{plural(each.right.of, 'image')} with a confidence of {each.confidence:.1%}: "
            f"{each.right.value:.1%} right"
        )
        place = x.place(100 * each.confidence), y.place(100 * each.right.value)
        radius = round(2.5 + 5.5 * math.sqrt(each.right.of / most), 1)
        dots.append(Dot(*place, radius, y.place(100 * high), y.place(100 * low), text))
    return Chart("Right answers by confidence", x, y, [], "confidence, %"), dots
