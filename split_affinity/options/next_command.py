"""Which command is of use after another: the last line of each. Pure."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_affinity.options.recipes import FROM_CHECKPOINT, recipe_defaults
from split_affinity.options.settings import Settings, as_options
from split_affinity.text import option_text

RANGE_STEPS = 100  # of find-lr, without --steps
MORE_STEPS = 3  # times as many, if they show nothing
PICTURES, PHOTOS = "PICTURES", "PHOTOS"  # places that you fill in
OF_A_SPLIT = "forward_cores", "backward_cores", "forward_threads", "backward_threads"


@dataclass(frozen=True)
class Left:
    """What a command has left behind, as far as the next one depends on it."""

    checkpoint: Path | None = None  # the best one, else the latest
    validated: bool = False  # whether that is the best one of some
    lr: float | None = None  # that find-lr suggests
    way: Settings | None = None  # that compare or data advises
    start: str = ""  # how the program was started
    torchrun: str = ""  # the same below torchrun --nproc-per-node N
    report: str = ""  # how deploy/report.py is started, if it is there


def next_commands(command: str, settings: Settings, left: Left) -> list[str]:
    """The commands to go on with once one has ended well, the most useful one first."""
    if command == "train" and settings.test_only:
        return after_test(settings, left)
    if command == "train":
        return [after_training(settings, left)]
    if command == "predict":
        return after_answers(settings, left)
    if command == "find-lr":
        if left.lr is None:
            steps = MORE_STEPS * (settings.steps or RANGE_STEPS)
            return [started(dataclasses.replace(settings, steps=steps), left, command)]
        return [to_train(dataclasses.replace(settings, steps=None, lr=left.lr), left)]
    if command == "compare":
        return [after_comparison(settings, left)]
    if command == "data":
        return [to_train(left.way or settings, left)]
    return [to_train(settings, left)] if command == "plan" else []


def started(settings: Settings, left: Left, command: str = "") -> str:
    """A command with all that these settings need, in as many processes as they have ranks."""
    start = f"torchrun --nproc-per-node {settings.ranks} {left.torchrun}"
    start = start if settings.ranks > 1 else left.start
    return " ".join(filter(None, (start, command, as_options(settings))))


def taken_by(command: str, settings: Settings) -> Settings:
    """These settings without what the command does not take."""
    others = {
        each.name: each.default
        for each in dataclasses.fields(settings)
        if each.metadata["only"] and command not in each.metadata["only"]
    }
    return dataclasses.replace(settings, **others)


def to_train(settings: Settings, left: Left) -> str:
    """The training that another command's settings describe, without what only that one takes."""
    settings = taken_by("train", settings)
    if settings.recipe in FROM_CHECKPOINT and not (settings.init_from or settings.weights):
        settings = dataclasses.replace(settings, weights="DEFAULT")
    return started(settings, left)


def after_training(settings: Settings, left: Left) -> str:
    """How good the model is, or what it says of pictures; if nothing was saved, a run that does."""
    if left.checkpoint and left.validated:
        return tested(left.checkpoint, settings, left)
    if left.checkpoint:
        return f"{left.start} predict {PICTURES} --resume {quoted(left.checkpoint)}"
    if not settings.data_path:  # they serve to measure
        compared = taken_by("compare", dataclasses.replace(settings, steps=None))
        return started(compared, left, "compare")
    if not settings.epochs:
        return started(finetuned(data_path=settings.data_path), left)
    folder = Path("out", settings.data_path.name or "run")
    return to_train(dataclasses.replace(settings, output_dir=folder), left)


def tested(checkpoint: Path, settings: Settings, left: Left) -> str:
    """How good a checkpoint is, with as many loaders as before: it does not bring their number."""
    asked = Settings(workers=settings.workers)
    return " ".join(
        filter(None, (left.start, f"--test-only --resume {quoted(checkpoint)}", as_options(asked)))
    )


def after_test(settings: Settings, left: Left) -> list[str]:
    """What the model says of other pictures; and the report, if there is a checkpoint for it."""
    if left.checkpoint:
        answers = f"{left.start} predict {PICTURES} --resume {quoted(left.checkpoint)}"
        return [answers, *reported(left)]
    named = Settings(model=settings.model, weights=settings.weights)
    return [f"{left.start} predict {PICTURES} {as_options(named)}"]


def after_answers(settings: Settings, left: Left) -> list[str]:
    """The report, else how good the model is; for weights by name, a training of your own."""
    if settings.weights:
        named = {"model": settings.model, "weights": settings.weights}
        return [started(finetuned(data_path=Path(PHOTOS), **named), left)]
    if left.checkpoint and left.validated:
        return reported(left) or [tested(left.checkpoint, settings, left)]
    return []


def finetuned(**others: Any) -> Settings:
    """The settings of the recipe that learns from pictures of one's own."""
    return Settings(**{"recipe": "finetune", **recipe_defaults("finetune"), **others})


def after_comparison(settings: Settings, left: Left) -> str:
    """A training in the way that is advised; the comparison once more if none is."""
    if left.way is None:
        return started(settings, left, "compare")
    way = left.way
    chosen = {"split": way.split, "schedule": way.schedule}
    if way.ranks > 1:  # one lane over the cores of each
        chosen = {"split": "none", "ranks": way.ranks}
    if chosen["split"] == "none":
        chosen |= dict.fromkeys(OF_A_SPLIT)
    if (way.batch_size, way.accumulate) != (settings.batch_size, settings.accumulate):
        chosen |= {"batch_size": way.batch_size, "accumulate": way.accumulate}
    return to_train(dataclasses.replace(settings, steps=None, **chosen), left)


def reported(left: Left) -> list[str]:
    """The report on a checkpoint, where the program for it is there and has images to judge by."""
    is_possible = left.report and left.checkpoint and left.validated
    return [f"{left.report} {quoted(left.checkpoint)}"] if is_possible else []


def quoted(path: Path) -> str:
    """A path for the command line, without a login."""
    return shlex.quote(option_text(path))
