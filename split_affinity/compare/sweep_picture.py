"""A sweep as a picture: speed against the forward group's share of the cores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from split_affinity.compare.curve import Sweep
from split_affinity.compare.ratios import RULED_OUT, Point, thinned_ratios
from split_affinity.compare.simulation import ASSUMPTIONS, LAWS, limited_phases
from split_affinity.machine.plan import usable_cores
from split_affinity.machine.topology import Topology
from split_affinity.reports.log import picture_footer
from split_affinity.reports.tables import SIMULATED_PLOT, SWEEP_PLOT, describe_run
from split_affinity.reports.timeline import new_figure, save_figure, write_title
from split_affinity.text import speed_text

LOOKS = {  # of ways, by name: colour and marker
    "sequential": ("#4477aa", "o"),
    "overlap": ("#228833", "s"),
    "delayed": ("#cc6677", "D"),
    "ranks": ("#aa3377", "^"),
}
NONE_COLOUR, PLAIN_COLOUR = "#222222", "#999933"
LEGEND = {"loc": "upper left", "bbox_to_anchor": (1.09, 1), "frameon": False, "fontsize": 8}
MARK = {"fontsize": 44, "fontweight": "bold", "rotation": 25, "color": "#dddddd", "zorder": 0}
MARK |= {"ha": "center", "va": "center"}


def draw_sweep(folder: Path, found: Sweep) -> None:
    """Draw the curve of this machine; if another one was simulated, the curves of that one."""
    folder.mkdir(parents=True, exist_ok=True)
    run = describe_run(found.settings)
    if found.machine:
        title = f"SIMULATED, not measured: {cores_of(found.machine)}, {run}"
        assumed = "; ".join([*ASSUMPTIONS, *limited_phases(found.scaling)])
        footer = f"Assumed: {assumed}. {checked(found)}. Phases measured on "
        footer += picture_footer(found.topology)
        draw_simulation(folder / SIMULATED_PLOT, title, footer, found.simulated)
        return
    explained = (
        "Speeds of the ways are those relative to none in the same rounds, times none's median; "
        "bars and bands: lowest to highest of the rounds; dashed: the bound, if neither group "
        "slowed the other down"
    )
    if found.ruled_out:
        explained += "; hollow: ruled out by its bound, at which it is drawn, and not run"
    draw = draw_curve if len(found.ratios) > 1 else draw_one_ratio
    title, footer = f"{cores_of(found.topology)}, {run}", picture_footer(found.topology)
    draw(folder / SWEEP_PLOT, title, f"{explained}. {footer}", found.points)


def ways_of(points: Sequence[Point]) -> list[str]:
    """The ways at a ratio, in order."""
    return [*dict.fromkeys(point.way for point in points if point.ratio)]


def cores_of(machine: Topology) -> str:
    """The machine, and how many of its cores are divided, in words."""
    return f"{len(usable_cores(machine))} cores of {machine.cpu_model}"


def checked(found: Sweep) -> str:
    """What the law says of the machine that was measured, beside the measured speeds."""
    pairs = [
        f"{point.way} {speed_text(point.simulated_images_per_s)} "
        f"({speed_text(point.images_per_s)} measured)"
        for point in found.points
        if point.images_per_s and point.simulated_images_per_s
    ]
    return f"The same law for the {found.ratios[0]} that was measured, images/s: {', '.join(pairs)}"


def drawn_speeds(point: Point, none_speed: float) -> tuple[float, float, float]:
    """Where a measured point is drawn, and the ends of its bar: relative to one lane."""
    low, high = point.to_none_range
    return tuple(none_speed * each for each in (point.to_none, low, high))


def ranged(point: Point) -> str:
    """A speed relative to one lane, with its range."""
    low, high = point.to_none_range
    return f"{point.to_none:.2f} ({low:.2f}-{high:.2f})"


def draw_curve(path: Path, title: str, footer: str, points: Sequence[Point]) -> None:
    """Draw a line for each way over the forward share, and bands for what has no ratio."""
    figure = new_figure(10.5, 5.5, footer)
    ax = figure.subplots()
    none_speed = points[0].images_per_s
    draw_bands(ax, points, none_speed)
    for way in ways_of(points):
        own = [point for point in points if point.way == way and point.ratio]
        draw_measured_way(ax, way, own, none_speed)
    ax.plot([], [], "--", color="#555555", linewidth=0.8, label="bound")
    label_ratios(ax, points)
    finish_axes(ax, none_speed)
    ax.legend(**LEGEND)
    write_title(figure, title)
    save_figure(figure, path)


def draw_simulation(path: Path, title: str, footer: str, points: Sequence[Point]) -> None:
    """Draw the curves by each law beside each other: their speeds may be far apart."""
    figure = new_figure(12, 6.5, footer)
    for ax, kind in zip(figure.subplots(1, len(LAWS)), LAWS, strict=True):
        own = [point for point in points if point.kind == kind]
        draw_bands(ax, own, own[0].images_per_s)
        for way in ways_of(own):
            draw_simulated_way(ax, way, [point for point in own if point.way == way])
        ax.text(0.5, 0.5, "SIMULATED", transform=ax.transAxes, **MARK)
        ax.set_title(kind, fontsize=9)
        label_ratios(ax, own)
        finish_axes(ax, own[0].images_per_s)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False, fontsize=8)
    write_title(figure, title)
    save_figure(figure, path)


def draw_bands(ax: Any, points: Sequence[Point], none_speed: float) -> None:
    """Draw lines with bands over all shares: one lane, and the plain loop if it was measured."""
    for point in points:
        if point.ratio:
            continue
        speed, low, high = drawn_speeds(point, none_speed)
        if point.way == "none":  # relative to itself it has no range
            low, high = point.images_per_s_range
        colour = NONE_COLOUR if point.way == "none" else PLAIN_COLOUR
        ax.axhspan(low, high, color=colour, alpha=0.1, linewidth=0)
        label = f"{point.way}: {ranged(point)} of none"
        if point.way == "none":
            label = f"none: {speed_text(speed)} ({speed_text(low)}-{speed_text(high)}) images/s"
        ax.axhline(speed, color=colour, linewidth=1.2, label=label)


def draw_measured_way(ax: Any, way: str, points: Sequence[Point], none_speed: float) -> None:
    """Draw what was measured with bars, the bounds as a dashed line, and what was ruled out."""
    colour, marker = LOOKS[way]
    bounds = [(100 * each.ratio.share, each.bound_to_none * none_speed) for each in points]
    ax.plot(*zip(*bounds, strict=True), "--", color=colour, linewidth=0.8)
    run = [point for point in points if point.kind != RULED_OUT]
    out = [each for each, point in zip(bounds, points, strict=True) if point.kind == RULED_OUT]
    look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5}
    if run:
        best = max(run, key=lambda point: point.to_none)
        label = f"{way}: best {best.ratio}, {ranged(best)} of none"
        shares = [100 * point.ratio.share for point in run]
        speeds, errors = speeds_and_errors(run, none_speed)
        ax.errorbar(shares, speeds, errors, capsize=3, elinewidth=1, label=label, **look)
    if out:
        look |= {"linestyle": "none", "markerfacecolor": "white"}
        ax.plot(*zip(*out, strict=True), **look)


def speeds_and_errors(
    points: Sequence[Point], none_speed: float
) -> tuple[list[float], list[list[float]]]:
    """The speeds to draw, and their bars downwards and upwards."""
    drawn = [drawn_speeds(point, none_speed) for point in points]
    speeds = [speed for speed, _, _ in drawn]
    return speeds, [[speed - low for speed, low, _ in drawn], [high - at for at, _, high in drawn]]


def draw_simulated_way(ax: Any, way: str, points: Sequence[Point]) -> None:
    """Draw a simulated line, and its band."""
    colour, _ = LOOKS[way]
    shares = [100 * point.ratio.share for point in points]
    speeds = [point.images_per_s for point in points]
    lows, highs = zip(*(point.images_per_s_range for point in points), strict=True)
    best = max(points, key=lambda point: point.images_per_s)
    label = f"{way}: best {best.ratio}, {ranged(best)} of none"
    marker = {"marker": "."} if len(points) <= 40 else {}
    ax.plot(shares, speeds, color=colour, label=label, **marker)
    ax.fill_between(shares, lows, highs, color=colour, alpha=0.12, linewidth=0)


def label_ratios(ax: Any, points: Sequence[Point]) -> None:
    """Name some ratios below the axis, or all if they are few."""
    some = next(point.ratio for point in points if point.ratio)
    named = thinned_ratios(some.forward + some.backward)
    texts = [f"{ratio.share:.0%}\n{ratio}" for ratio in named]
    ax.set_xticks([100 * ratio.share for ratio in named], texts, fontsize=8)
    ax.set_xlabel("share of the cores that the forward group has, and forward:backward cores")


def finish_axes(ax: Any, none_speed: float) -> None:
    """A grid, a frame, and on the right the speed relative to one lane."""
    ax.set_ylabel("images/s")
    ax.set_ylim(0, None)
    right = ax.secondary_yaxis(
        "right", (lambda speed: speed / none_speed, lambda ratio: ratio * none_speed)
    )
    right.set_ylabel("relative to none")
    right.spines["right"].set_visible(False)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def draw_one_ratio(path: Path, title: str, footer: str, points: Sequence[Point]) -> None:
    """Draw the ways side by side, where there is no other ratio; the bound is a dashed stroke."""
    figure = new_figure(9.5, 5, footer)
    ax = figure.subplots()
    none_speed = points[0].images_per_s
    draw_bands(ax, points, none_speed)
    own, texts = [point for point in points if point.ratio], []
    for place, point in enumerate(own):
        colour, marker = LOOKS[point.way]
        speeds, errors = speeds_and_errors([point], none_speed)
        ax.errorbar([place], speeds, errors, color=colour, marker=marker, capsize=4)
        bound = point.bound_to_none * none_speed
        ax.hlines(bound, place - 0.25, place + 0.25, color=colour, linestyle="--", linewidth=1)
        texts.append(f"{point.way}\n{ranged(point)}")
    ax.plot([], [], "--", color="#555555", linewidth=1, label="bound")
    ax.set_xticks(range(len(own)), texts)
    ax.set_xlim(-0.6, len(own) - 0.4)
    ax.set_xlabel(f"the only ratio of forward to backward cores, {own[0].ratio}")
    finish_axes(ax, none_speed)
    ax.legend(**LEGEND)
    write_title(figure, title)
    save_figure(figure, path)
