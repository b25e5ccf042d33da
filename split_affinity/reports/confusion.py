"""Which classes are taken for which: confusion matrix, worst pairs, accuracy by class."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from split_affinity.files import write_whole
from split_affinity.reports.timeline import new_figure, save_figure
from split_affinity.terminal import say
from split_affinity.text import csv_text, markdown_table
from split_affinity.training.network import Confusion

CONFUSION, PAIRS, CONFUSED = "confusion", "confusion-pairs.csv", "confused.json"

CLASSES_TO_SHOW, PAIRS_TO_WRITE = 30, 1000
LONGEST_NAME = 40  # of a class, so that its row fits 80 columns
LARGEST_MATRIX = 4000  # classes: to draw that many takes 1 GiB, twice as many four times that


def confusion_matrix(confusion: Confusion, count: int) -> torch.Tensor:
    """How often an image of class i was taken for class j, (count, count)."""
    matrix = torch.zeros(count, count, dtype=torch.long)
    for pair, images in confusion.items():
        matrix[pair] = images
    return matrix


def draw_confusion(
    path: Path, title: str, matrix: torch.Tensor, classes: Sequence[str], footer: str = ""
) -> None:
    """A confusion matrix, as shares of each row's class; with counts if there is room."""
    count = len(classes)
    side_inches = min(12, 3 + 0.45 * count)
    figure = new_figure(side_inches + 1, side_inches, footer)
    ax = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, label="share of the true class", shrink=0.8)
    if count <= CLASSES_TO_SHOW:
        ax.set_xticks(range(count), classes, rotation=90, parse_math=False)
        ax.set_yticks(range(count), classes, parse_math=False)
        for row, column in matrix.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.6 else "black"
            text = str(matrix[row, column].item())
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    ax.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def confusion_csv(matrix: torch.Tensor, classes: Sequence[str]) -> str:
    """A confusion matrix with a row per true class, a column per predicted one."""
    rows = ([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    return csv_text(itertools.chain([["true class", *classes]], rows))


def worst_pairs(confusion: Confusion) -> list[tuple[tuple[int, int], int]]:
    """The pairs of classes that were confused most often, with how often, the worst first."""
    wrong = [(pair, images) for pair, images in confusion.items() if pair[0] != pair[1]]
    return sorted(wrong, key=lambda each: (-each[1], each[0]))[:PAIRS_TO_WRITE]


def pairs_csv(confusion: Confusion, classes: Sequence[str]) -> str:
    """The worst pairs, with a row for each."""
    rows = ((classes[a], classes[b], images) for (a, b), images in worst_pairs(confusion))
    return csv_text([("true class", "predicted class", "images"), *rows])


def confused_json(confusion: Confusion, classes: Sequence[str], checkpoint: str) -> str:
    """What was tested, and the worst pairs, a line for each, so that they are easily left out:
    `images` of the `true` class, a `share` of them, were `taken_for` the other.
    """
    totals = images_by_class(confusion)
    right, count = sum(confusion[true, true] for true in totals), totals.total()
    top1 = round(100 * right / count, 4)
    lines = (
        {
            "true": classes[true],
            "taken_for": classes[predicted],
            "images": images,
            "share": round(images / totals[true], 4),
        }
        for (true, predicted), images in worst_pairs(confusion)
    )
    listed = ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    head = {"checkpoint": checkpoint, "images": count, "top1": top1, "pairs": []}
    text = json.dumps(head, ensure_ascii=False).removesuffix("]}")
    return f"{text}\n{listed}\n]}}\n"


def write_confusion(
    folder: Path,
    title: str,
    confusion: Confusion,
    classes: Sequence[str],
    checkpoint: str,
    footer: str = "",
) -> None:
    """Write the confused pairs of a checkpoint, and the confusion matrix, as text and as a picture;
    of too many classes for one, the worst pairs instead, and say so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFUSED, confused_json(confusion, classes, checkpoint))
    count = len(classes)
    if count > LARGEST_MATRIX:
        write_whole(folder / PAIRS, pairs_csv(confusion, classes))
        say(f"{folder / PAIRS}: the worst confusions; {count} classes are too many for a matrix")
        return
    matrix = confusion_matrix(confusion, count)
    write_whole(folder / f"{CONFUSION}.csv", confusion_csv(matrix, classes))
    draw_confusion(folder / f"{CONFUSION}.png", title, matrix, classes, footer)


def images_by_class(confusion: Confusion) -> Counter[int]:
    """How many images there were of each class that had any."""
    totals: Counter[int] = Counter()
    for (true, _), images in confusion.items():
        totals[true] += images
    return totals


def class_lines(confusion: Confusion, classes: Sequence[str]) -> list[str]:
    """A table of the accuracy of each class, the worst first, of many classes only those."""
    found = []
    for true, total in images_by_class(confusion).items():
        right = confusion[true, true]
        found.append((right / total, classes[true], f"{right / total:.1%}", str(right), str(total)))
    rows = [
        (name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "...", *cells)
        for _, name, *cells in sorted(found)[:CLASSES_TO_SHOW]
    ]
    lines = [markdown_table(("class", "right", "images right", "images"), rows)]
    if len(found) > CLASSES_TO_SHOW:
        lines.append(f"(the worst {CLASSES_TO_SHOW} of {len(found)} classes)")
    return lines
