"""Going on from a checkpoint: the settings that it brings, and what must be the same."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from split_affinity import ALLOWED_CPUS
from split_affinity.checkpoints.folder import Checkpoints
from split_affinity.checkpoints.state import (
    ON_RESUME,
    Progress,
    SavedState,
    preprocessing_of,
    read_checkpoint,
    restore_state,
    saved_settings,
    settings_to_go_on,
    versions,
)
from split_affinity.errors import UserError, memory_errors, one_line
from split_affinity.options.commands import ASKED_WITH, command_defaults
from split_affinity.options.recipes import FROM_CHECKPOINT, GIVE_WEIGHTS
from split_affinity.options.saved import PATHS
from split_affinity.options.settings import (
    CheckpointSettings,
    DataSettings,
    Settings,
    batches_in_step,
    plain_settings,
    settings_of,
)
from split_affinity.options.values import Values
from split_affinity.text import as_option, plural
from split_affinity.training.steps import Run


def check_classes(path: Path, saved: SavedState, classes: Sequence[str]) -> None:
    """Raise UserError if a checkpoint's classes are not those of the data."""
    if saved.get("data"):
        check_same_classes(str(path), saved["data"]["classes"], classes)


def check_same_classes(where: str, known: Sequence[str], classes: Sequence[str]) -> None:
    """Raise UserError if the classes of a checkpoint, or of weights, are not those of the data."""
    for number, pair in enumerate(itertools.zip_longest(known, classes)):
        if pair[0] != pair[1]:
            theirs, ours = (name or "missing" for name in pair)
            raise UserError(
                f"{where}: its class {number} is {theirs}, not {ours} as in --data-path"
            )


def check_resumable(
    path: Path, saved: SavedState, settings: Settings, data: SavedState | None = None
) -> list[str]:
    """Differences from the saved run that change the numbers, in words: settings, versions, images.

    Raises UserError for a difference that makes no sense.
    """
    former, asked = saved_settings(saved), saved.get("asked") or {}
    differences = check_same_step(path, former, settings)
    for name, value in plain_settings(settings).items():
        before = former[name]
        unknown = before is None and name not in saved["settings"]  # to the version that saved it
        same = value in (before, asked.get(name, before)) or name == "accumulate"  # checked above
        if ON_RESUME[name] == "free" or same or unknown:
            continue
        flag = f"--{name.replace('_', '-')}"
        if ON_RESUME[name] == "fixed":
            raise UserError(
                f"{flag} {value}: {path} has {before}; --init-from takes its weights alone"
            )
        differences.append(f"{flag} {before} -> {value}")
    for name, value in versions().items():
        if name in ("torch", "torchvision") and saved["versions"].get(name) != value:
            differences.append(f"{name} {saved['versions'].get(name)} -> {value}")
    before = saved.get("data")
    if data and before:
        check_classes(path, saved, data["classes"])
        if before["fingerprint"] != data["fingerprint"]:
            counts = f"{before['images']} -> {data['images']}"
            differences.append(f"images to train on (names or sizes) {counts}")
        each = [", ".join(those.get("confused", [])) or "none" for those in (before, data)]
        if each[0] != each[1]:
            differences.append(f"classes that are augmented more strongly {' -> '.join(each)}")
        differences += other_weights(before, data)
    return differences


def other_weights(before: SavedState, now: SavedState) -> list[str]:
    """The classes that have other weights in the loss than before, in words, if there are any."""
    plain = [1.0] * len(now["classes"])
    then, today = (data.get("class_weights") or plain for data in (before, now))
    pairs = zip(now["classes"], then, today, strict=True)
    names = [name for name, was, weight in pairs if was != weight]
    listed = textwrap.shorten(", ".join(names), 60, placeholder=" ...")
    return [f"weights of {plural(len(names), 'class')} in the loss ({listed})"] if names else []


def check_same_step(path: Path, former: Values, settings: Settings) -> list[str]:
    """What another number of ranks changes, in words. Raises UserError unless an optimizer step
    has as many batches as before.
    """
    then, now = former["accumulate"] * former["ranks"], batches_in_step(settings)
    if then != now:
        count = plural(settings.ranks, "rank")
        asked = (
            f"--accumulate {settings.accumulate} on {count}" if now != settings.accumulate else ""
        )
        raise UserError(
            f"{asked or f'--accumulate {settings.accumulate}'}: {path} has {then} batches a step; "
            "--init-from takes its weights alone"
        )
    if former["ranks"] == settings.ranks:
        return []
    changed = "BatchNorm starts from the mean of all ranks, dropout draws anew"
    return [f"ranks {former['ranks']} -> {settings.ranks} ({changed})"]


def find_resumed(
    settings: CheckpointSettings, checkpoints: Checkpoints
) -> tuple[Path, SavedState] | None:
    """The checkpoint of --resume; None without one, as auto finds none in a new folder."""
    if settings.resume == Path("auto"):
        return checkpoints.newest_good()
    return (settings.resume, read_checkpoint(settings.resume)) if settings.resume else None


# Options that replace others of the saved run.
IN_PLACE_OF = {
    "split": ("forward_cores", "backward_cores", "forward_threads", "backward_threads"),
    "forward_cores": ("split",),
    "image_size": ("max_res",),
    "epochs": ("steps",),
}


def saved_defaults(command: str, settings: Settings, typed: Values) -> Values:
    """The defaults that --resume brings: the settings of the saved run, or none without a run.

    `settings` are those without them, `typed` the options given. predict takes what changes its
    answers. Raises BadCheckpoint, and UserError if the images of the run are gone.

    The checkpoint is read for its settings alone: `resume` reads it again once the output folder is
    locked, and warns of damaged files. To keep it meanwhile would leave it in all loader processes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # loaders are forked later, before any team of threads is born
    try:
        quiet = Checkpoints(dataclasses.replace(settings, mirror=None), lambda text: None)
        found = find_resumed(settings, quiet)
    finally:
        torch.set_num_threads(threads)
    if not found:
        return {}
    path, saved = found
    if command != "predict":
        return defaults_to_go_on(path, saved, typed, settings.ranks)
    model = saved["settings"]["model"]
    if typed.get("model", model) != model:
        raise UserError(f"--model {typed['model']}: {path} has {model}")
    ready = preprocessing_of(saved).overruled(settings_of(typed))
    taken = vars(settings_to_go_on(saved)) | vars(ready)
    return {name: taken[name] for name in {*ASKED_WITH, *vars(ready)}}


def defaults_to_go_on(path: Path, saved: SavedState, typed: Values, ranks: int = 1) -> Values:
    """What a run takes from a saved one, to go on with it or to test it.

    The output folder is where the checkpoint is now. Another recipe than that of the saved run
    counts as typed.
    """
    taken = settings_to_go_on(saved)
    # The ranks of today share the batches of a step.
    batches, rest = divmod(taken.accumulate * saved_settings(saved)["ranks"], ranks)
    accumulate = taken.accumulate if rest else batches
    taken = dataclasses.replace(taken, accumulate=accumulate, ranks=ranks)
    if (recipe := typed.get("recipe")) not in (None, taken.recipe):
        typed = command_defaults("train", {**typed, "resume": path}) | typed
    defaults = vars(taken) | vars(preprocessing_of(saved).overruled(settings_of(typed)))
    for name in typed.keys() & IN_PLACE_OF.keys():
        defaults |= {other: getattr(Settings(), other) for other in IN_PLACE_OF[name]}
    defaults["output_dir"] = path.parent
    if not typed.get("test_only"):
        check_files_are_typed(path, saved, {**vars(taken), **typed})
    for name in ("forward_threads", "backward_threads"):
        if (defaults[name] or 0) > len(ALLOWED_CPUS):
            defaults[name] = None  # from a larger machine, or made up by a stranger
    if not {"data_path", "download"} & typed.keys():
        defaults["data_path"] = find_images(path, saved, taken.data_path)
    return defaults | (typed if recipe else {})


def check_files_are_typed(path: Path, saved: SavedState, given: Values) -> None:
    """Raise UserError for a file that the saved run read, and that you have not typed again."""
    for name in sorted(PATHS - {"data_path"}):
        place = saved_settings(saved)[name]
        if place and not given[name]:
            raise UserError(
                f"{path}: its run had {as_option(name, place)}; no checkpoint says which files are "
                "read: give that again"
            )


def find_images(path: Path, saved: SavedState, absolute: Path | None) -> Path | None:
    """Where the images of a saved run are: where they were, or at the path typed then, from this
    folder. Raises UserError if they are gone.
    """
    as_given = settings_of(saved_settings(saved)).data_path
    for place in filter(None, (absolute, as_given)):
        if place.is_dir():
            return place
    if absolute:
        reason = f"its images are no longer in {absolute}"
        raise UserError(f"{path}: {reason}: say by --data-path where they are")
    return None


@contextlib.contextmanager
def fit_errors(path: Path, settings: DataSettings) -> Iterator[None]:
    """Turn the error for a state with other shapes or contents into one line."""
    try:
        with memory_errors():
            yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"--model {settings.model} --image-size {settings.image_size}"
        raise UserError(f"{path} does not fit {what}: {one_line(error)}") from None


def checkpoint_to_resume(
    settings: Settings, checkpoints: Checkpoints
) -> tuple[Path, SavedState] | None:
    """The checkpoint that a run goes on from; None for a new run.

    Raises UserError if the run would take the place of another one, or lacks the weights that its
    recipe starts from.
    """
    found, folder = find_resumed(settings, checkpoints), checkpoints.folder
    there = f"--output-dir {folder} has the checkpoints of"
    if not found and checkpoints.exist():
        raise UserError(
            f"{there} an earlier run: go on with it by --resume auto, or choose another folder"
        )
    if not found and settings.recipe in FROM_CHECKPOINT:
        if not (settings.init_from or settings.weights):
            raise UserError(
                f"--recipe {settings.recipe} starts from trained weights, and {folder} has none: "
                f"{GIVE_WEIGHTS}"
            )
    elif found and checkpoints.exist() and found[0].resolve().parent != folder.resolve():
        raise UserError(
            f"--resume {found[0]}: {there} another run: go on with that by --resume auto, or "
            "choose another folder"
        )
    return found


def resume(run: Run, checkpoints: Checkpoints) -> tuple[Progress, list[str]]:
    """Restore the state of --resume, if you asked for that; returns where the run stands, and what
    to tell you. Raises UserError for a damaged checkpoint, or one of another kind of run.
    """
    settings, batches = run.settings, len(run.train)
    found = run.ranks.on_rank_0(checkpoint_to_resume, settings, checkpoints)
    if not found:
        return Progress(epoch_batches=batches), list(filter(None, [run.train_state.network.note]))
    path, saved = found
    differences = check_resumable(path, saved, settings, checkpoints.data)
    before = saved["progress"]["epoch_batches"]
    if before != batches:
        raise UserError(f"{path}: made with {before} batches an epoch, not {batches}")
    with fit_errors(path, settings):
        progress = run.lanes.backward.call(restore_state, saved, run.train_state, settings)
    folder = checkpoints.folder
    if folder and path.resolve().parent == folder.resolve():
        checkpoints.keep(path, progress)
    notes = [f"resumed from {path}, after step {progress.step}"]
    was_in = settings_to_go_on(saved).data_path
    if was_in and was_in == (settings.data_path and settings.data_path.absolute()):
        notes.append(f"its images are in {was_in}, as they were")
    typed, defaults = vars(settings) | (checkpoints.asked or {}), vars(Settings())
    left = [name for name in saved["left"] if typed[name] == defaults[name]]
    if left:
        flags = ", ".join(as_option(name, True) for name in left)
        notes.append(f"{flags}: not taken from a checkpoint; give them again, if wanted")
    if differences:
        notes.append(f"numbers can differ from those of an unbroken run: {', '.join(differences)}")
    return progress, notes
