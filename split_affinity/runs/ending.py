"""What follows a command that has ended well: its pictures are opened, the next one is named."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import split_affinity
from split_affinity.checkpoints.folder import BEST, LAST
from split_affinity.options.commands import ANSWERING, start_words
from split_affinity.options.next_command import Left, next_commands
from split_affinity.options.settings import Settings
from split_affinity.options.values import SWEEP
from split_affinity.reports.confusion import MATRIX_PNG
from split_affinity.reports.opening import open_files
from split_affinity.reports.page import SURVEY_PAGE
from split_affinity.reports.tables import (
    CURVES,
    GRADIENTS,
    RANGE_PLOT,
    SIMULATED_PLOT,
    SWEEP_PLOT,
    TIMELINE,
)
from split_affinity.terminal import terminal_columns
from split_affinity.text import shown, try_print

# What --open opens, by command.
DRAWN = {
    "train": (CURVES, GRADIENTS, TIMELINE),
    "find-lr": (RANGE_PLOT,),
    "compare": (TIMELINE,),
    "data": (SURVEY_PAGE,),
}
TESTED = (MATRIX_PNG,)
REPORT = Path("deploy", "report.py")


def end_well(command: str, settings: Settings, result: Any) -> None:
    """Open pictures if asked to, and print the next command.

    `result` is what the command's function returned. Programs may read predict's answers: there the
    next command goes to standard error, and only to a terminal.
    """
    if settings.open and settings.output_dir:
        open_files([settings.output_dir / name for name in drawn(command, settings)])
    stream = sys.stderr if command in ANSWERING else sys.stdout
    if command in ANSWERING and not terminal_columns(stream):
        return
    left = left_behind(command, settings, result)
    for each in next_commands(command, settings, left):
        try_print(shown(f"next: {each}"), stream)  # in one line, however long, to be copied


def drawn(command: str, settings: Settings) -> tuple[str, ...]:
    """The names of the pictures that a command has drawn."""
    if settings.split == SWEEP:
        return (SIMULATED_PLOT if settings.simulate else SWEEP_PLOT,)
    return TESTED if settings.test_only else DRAWN.get(command, ())


def left_behind(command: str, settings: Settings, result: Any) -> Left:
    """What a command has left behind, and how programs are started here."""
    words = start_words()
    program = words[-2:] if "-m" in words else words[-1:]  # torchrun brings Python
    checkpoint = found_checkpoint(command, settings)
    return Left(
        checkpoint,
        validated=bool(checkpoint) and checkpoint.with_name(BEST).exists(),
        lr=float(f"{result.suggestion:.2g}") if getattr(result, "suggestion", None) else None,
        way=getattr(result, "advised", None),
        start=shlex.join(words),
        torchrun=shlex.join(program),
        report=report_program(words),
    )


def found_checkpoint(command: str, settings: Settings) -> Path | None:
    """The checkpoint that was asked, or that a training has left: the best one, else the latest."""
    asks = command == "predict" or settings.test_only
    if asks and settings.resume not in (None, Path("auto")):
        return settings.resume
    if settings.output_dir and not (asks and settings.weights):
        for name in (BEST, LAST):
            if (settings.output_dir / name).exists():
                return settings.output_dir / name
    return None


def report_program(words: list[str]) -> str:
    """How deploy/report.py is started, if it is beside the program; else nothing."""
    started = Path(sys.argv[0]).parent / REPORT
    beside = Path(split_affinity.__file__).parent.parent / REPORT
    program = next((path for path in (started, beside) if path.exists()), None)
    return shlex.join([words[0], str(program)]) if program else ""
