"""Curves by epoch, gradient norms, and the range test of find-lr, as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_affinity.checkpoints.state import best_epoch
from split_affinity.reports.tables import PARTS
from split_affinity.reports.timeline import new_figure, save_figure, write_title

LARGE_RATIO = 30  # of the largest value to the smallest, from which on an axis is logarithmic


def spans_decades(values: Sequence[float]) -> bool:
    """Whether an axis of these values is logarithmic; on another the small ones look the same."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > LARGE_RATIO


def draw_curves(
    path: Path,
    title: str,
    history: Sequence[dict[str, Any]],
    footer: str = "",
    best: Sequence[tuple[float, int]] = (),
) -> None:
    """Draw losses, accuracies and learning rate by epoch, and mark the best one (`best_epoch`)."""
    epochs = [row["epoch"] for row in history]
    figure = new_figure(9.5, 8, footer)
    losses, accuracies, rates = figure.subplots(3, sharex=True, height_ratios=(3, 3, 2))
    points = {"marker": ".", "markersize": 6 if len(epochs) <= 60 else 2}
    for ax, suffix in ((losses, "loss"), (accuracies, "top1"), (accuracies, "top5")):
        for part, colour in zip(PARTS, ("#4477aa", "#cc6677", "#ddaa33"), strict=True):
            values = [row.get(f"{part}_{suffix}") for row in history]
            if any(value is not None for value in values):
                style = ":" if suffix == "top5" else "-"
                label = f"{PARTS[part]} {suffix}".replace("top", "top-")
                ax.plot(epochs, values, style, color=colour, label=label, **points)
    rates.plot(epochs, [row["lr"] for row in history], color="#228833", **points)
    if row := best_epoch(history, best):
        label = f"best: {row['val_top1']:.2f} % in epoch {row['epoch']}"
        for ax in (losses, accuracies):
            style = {"color": "#555555", "linestyle": "--", "linewidth": 0.8}
            ax.axvline(row["epoch"], label=label if ax is accuracies else None, **style)
    for ax in (losses, accuracies):  # beside the curves, which may fill any corner
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    known = [row.get(f"{part}_loss") for row in history for part in PARTS]
    losses.set_ylabel("loss")
    if spans_decades([value for value in known if value is not None]):
        losses.set(yscale="log", ylabel="loss (logarithmic)")
        losses.yaxis.set_major_formatter("{x:g}")
    accuracies.set_ylabel("right answers, %")
    rates.set(ylabel="learning rate", ylim=(0, None))
    save_axes(figure, path, title, "epoch")


def draw_gradients(
    path: Path, title: str, history: Sequence[dict[str, Any]], footer: str = ""
) -> None:
    """Draw the norm of the gradients of each layer group by epoch."""
    from matplotlib import colormaps

    figure = new_figure(8, 5, footer)
    ax = figure.subplots()
    epochs, groups = [row["epoch"] for row in history], list(history[-1]["gradient_norms"])
    for number, group in enumerate(groups):  # from the input's end, dark, to the output's, light
        norms = [row["gradient_norms"].get(group) or math.nan for row in history]
        colour = colormaps["viridis"](0.9 * number / max(1, len(groups) - 1))
        ax.plot(epochs, norms, marker=".", color=colour, label=group)
    ax.set(yscale="log", ylabel="norm of the gradients, mean over an epoch")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_axes(figure, path, title, "epoch")


@dataclass(frozen=True)
class RangeTest:
    """Rising learning rates, the smoothed loss at each, and the suggested rate, if any."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float | None


def draw_range_test(path: Path, title: str, result: RangeTest, footer: str = "") -> None:
    """Draw the smoothed loss by learning rate, and the suggestion if there is one."""
    figure = new_figure(8, 5, footer)
    ax = figure.subplots()
    ax.plot(result.rates, result.losses, marker=".", color="#4477aa", label="loss, smoothed")
    if result.suggestion:
        label = f"suggestion: {result.suggestion:.2g}"
        ax.axvline(result.suggestion, color="#cc6677", linestyle="--", label=label)
    ax.set(xscale="log", ylabel="loss")
    if max(result.losses) > 2 * result.losses[0]:  # where it explodes is of no interest
        ax.set_ylim(0.9 * min(result.losses), 2 * result.losses[0])
    ax.legend(frameon=False)
    save_axes(figure, path, title, "learning rate")


def save_axes(figure: Any, path: Path, title: str, x_label: str) -> None:
    """Give axes that share the x axis a title, a grid and a light frame, and write the picture."""
    from matplotlib.ticker import MaxNLocator

    write_title(figure, title)
    figure.axes[-1].set_xlabel(x_label)
    if x_label == "epoch":
        figure.axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for ax in figure.axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
