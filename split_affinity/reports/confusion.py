"""Which classes are taken for which: confusion matrix, worst pairs, accuracy by class."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from split_affinity.files import write_whole
from split_affinity.reports.labels import short_labels
from split_affinity.reports.timeline import new_figure, save_figure, write_title
from split_affinity.terminal import say_lines
from split_affinity.text import UNSEEN, csv_text, folded, markdown_table, shown
from split_affinity.training.network import Confusion

MATRIX_PNG, MATRIX_CSV = "confusion.png", "confusion.csv"
PAIRS, CONFUSED = "confusion-pairs.csv", "confused.json"

CLASSES_TO_SHOW, PAIRS_TO_WRITE = 30, 1000
CLASSES_IN_LOG = 10  # at a glance; of more the pairs that are confused most often, as many
LONGEST_NAME = 40  # of a class, so that its row fits 80 columns
USUAL_LETTERS, LETTER_INCHES = 12, 0.08  # of names beside a picture; what longer ones need
LARGEST_MATRIX = 4000  # classes: to draw that many takes 1 GiB, twice as many four times that


def write_confusion(
    folder: Path,
    title: str,
    confusion: Confusion,
    classes: Sequence[str],
    checkpoint: str,
    footer: str = "",
) -> list[str]:
    """Write confused.json and the confusion matrix, or the worst pairs of too many classes.

    Returns the names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFUSED, confused_json(confusion, classes, checkpoint))
    count = len(classes)
    if count > LARGEST_MATRIX:
        pairs = [(classes[a], classes[b], images) for (a, b), images in worst_pairs(confusion)]
        write_whole(folder / PAIRS, csv_text([("true class", "predicted class", "images"), *pairs]))
        many = f"{count} classes are too many for a matrix"
        say_lines([f"{folder / PAIRS}: the worst confusions; {many}"])
        return [PAIRS, CONFUSED]
    matrix = confusion_matrix(confusion, count)
    rows = [[name, *images] for name, images in zip(classes, matrix.tolist(), strict=True)]
    write_whole(folder / MATRIX_CSV, csv_text([["true class", *classes], *rows]))
    draw_confusion(folder / MATRIX_PNG, title, matrix, classes, footer)
    return [MATRIX_PNG, MATRIX_CSV, CONFUSED]


def confusion_matrix(confusion: Confusion, count: int) -> torch.Tensor:
    """How often an image of class i was taken for class j, (count, count)."""
    matrix = torch.zeros(count, count, dtype=torch.long)
    for pair, images in confusion.items():
        matrix[pair] = images
    return matrix


def draw_confusion(
    path: Path, title: str, matrix: torch.Tensor, classes: Sequence[str], footer: str = ""
) -> None:
    """Draw a confusion matrix as shares of each row, with names and counts if there is room."""
    count = len(classes)
    names, families, numbered = short_labels(classes if count <= CLASSES_TO_SHOW else ())
    longest = max(map(len, names), default=0)
    side_inches = min(12, 3 + 0.45 * count) + LETTER_INCHES * max(0, longest - USUAL_LETTERS)
    figure = new_figure(side_inches + 1, side_inches, footer)
    ax = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, label="share of the true class", shrink=0.8)
    if names:
        style = {"fontfamily": families, "parse_math": False}
        ax.set_xticks(range(count), names, rotation=90, **style)
        ax.set_yticks(range(count), names, **style)
        for row, column in matrix.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.6 else "black"
            text = str(matrix[row, column].item())
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    ax.set(xlabel="predicted class", ylabel="true class")
    write_title(figure, title)
    save_figure(figure, path)
    if numbered:
        listed = ", ".join(f"no. {number} {name}" for number, name in numbered.items())
        reason = "the fonts here lack characters of these names, or they are alike in short"
        say_lines([f"note: {path} has numbers for some classes: {reason}: {listed}"])


def worst_pairs(confusion: Confusion) -> list[tuple[tuple[int, int], int]]:
    """The pairs of classes that were confused most often, and how often, worst first."""
    wrong = [(pair, images) for pair, images in confusion.items() if pair[0] != pair[1]]
    return sorted(wrong, key=lambda each: (-each[1], each[0]))[:PAIRS_TO_WRITE]


def confused_json(confusion: Confusion, classes: Sequence[str], checkpoint: str) -> str:
    """The worst pairs as JSON, one a line, so that you can delete some of them."""
    totals = images_by_class(confusion)
    right, count = sum(confusion[true, true] for true in totals), totals.total()
    lines = []
    for (true, predicted), images in worst_pairs(confusion):
        pair = {"true": classes[true], "taken_for": classes[predicted], "images": images}
        lines.append(json_line(pair | {"share": round(images / totals[true], 4)}))
    top1 = round(100 * right / count, 4)
    head = json_line({"checkpoint": checkpoint, "images": count, "top1": top1, "pairs": []})
    return "\n".join([head.removesuffix("]}"), ",\n".join(lines), "]}\n"])


def json_line(value: Any) -> str:
    """A value as JSON in one line, safe on a terminal: letters stay, what is unseen is escaped."""
    escaped = (*UNSEEN, "Cs")  # and lone surrogates, which UTF-8 cannot hold
    return "".join(
        json.dumps(each)[1:-1] if unicodedata.category(each) in escaped else each
        for each in json.dumps(value, ensure_ascii=False)
    )


def images_by_class(confusion: Confusion) -> Counter[int]:
    """How many images each class has, of classes that have any."""
    totals: Counter[int] = Counter()
    for (true, _), images in confusion.items():
        totals[true] += images
    return totals


def confusion_tables(confusion: Confusion, classes: Sequence[str]) -> list[str]:
    """For a log: the accuracy by class; of many classes the worst pairs, and that folded."""
    by_class = "\n\n".join(class_lines(confusion, classes))
    totals = images_by_class(confusion)
    if len(totals) <= CLASSES_IN_LOG:
        return [by_class]
    rows = []
    for (true, predicted), images in worst_pairs(confusion)[:CLASSES_IN_LOG]:
        names = shown(classes[true]), shown(classes[predicted])
        rows.append((*names, str(images), f"{images / totals[true]:.1%}"))
    header = ("class", "taken for", "images", "share of the class")
    pairs = markdown_table(header, rows) if rows else "No image was taken for one of another class."
    return [pairs, folded("accuracy by class", by_class)]


def class_lines(confusion: Confusion, classes: Sequence[str]) -> list[str]:
    """A table of the accuracy of each class, worst first; of many classes only the worst."""
    found = []
    for true, total in images_by_class(confusion).items():
        right = confusion[true, true]
        found.append((right / total, shown(classes[true]), str(right), str(total)))
    rows = []
    for share, name, right, total in sorted(found)[:CLASSES_TO_SHOW]:
        short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."
        rows.append((short, f"{share:.1%}", right, total))
    lines = [markdown_table(("class", "right", "images right", "images"), rows)]
    if len(found) > CLASSES_TO_SHOW:
        lines.append(f"(the worst {CLASSES_TO_SHOW} of {len(found)} classes)")
    return lines
