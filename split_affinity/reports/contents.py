"""Which of the program's own files an output folder holds, in words."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

from split_affinity.checkpoints.folder import BEST, LAST, NAMED_BY_EPOCH, PREVIOUS
from split_affinity.files import TRACEBACK
from split_affinity.reports.confusion import CONFUSED, MATRIX_CSV, MATRIX_PNG, PAIRS
from split_affinity.reports.operators import OPERATORS_CSV
from split_affinity.reports.phases import PHASES_CSV, PHASES_PARQUET
from split_affinity.reports.tables import (
    CURVES,
    GRADIENTS,
    METRICS,
    RANGE_PLOT,
    TENSORBOARD,
    TIMELINE,
    TRACE,
)

SUBSET = "subset.json"
OF_TRAINING = (CURVES, GRADIENTS, TIMELINE, TRACE, METRICS, PHASES_CSV, PHASES_PARQUET)
BESIDE = (OPERATORS_CSV, TENSORBOARD, SUBSET)
OF_TESTS = (MATRIX_PNG, MATRIX_CSV, PAIRS, CONFUSED)
NAMED_ONE_BY_ONE = 5  # files of one kind that are named by an epoch; of more the first and the last


def own_files(folder: Path, to_come: Collection[str] = ()) -> list[str]:
    """The names of the program's files in a folder and of those still `to_come`, checkpoints first.

    Others may keep files of their own there.
    """
    there = {*to_come}
    with contextlib.suppress(OSError):  # it may have been taken away
        there |= {path.name for path in folder.iterdir()}
    found = {name: [name] for name in there} | {
        kind: by_epoch(kind, there) for kind in ("best-", "epoch-")
    }
    checkpoints = (BEST, "best-", LAST, PREVIOUS, "epoch-")
    names = (*checkpoints, *OF_TRAINING, *BESIDE, *OF_TESTS, RANGE_PLOT, TRACEBACK)
    return [text for name in names for text in found.get(name, ())]


def by_epoch(kind: str, names: Collection[str]) -> list[str]:
    """The names of one kind of checkpoints, in the order of epochs; of many, one text for all."""
    matches = filter(None, map(NAMED_BY_EPOCH.fullmatch, names))
    found = sorted((int(match[2]), match[0]) for match in matches if match[0].startswith(kind))
    if len(found) > NAMED_ONE_BY_ONE:
        return [f"{found[0][1]} to {found[-1][1]} ({len(found)} files)"]
    return [name for _, name in found]


def files_line(folder: Path, names: Collection[str]) -> str:
    """Where files are, and their names."""
    return f"files in {folder}: {', '.join(names)}"
