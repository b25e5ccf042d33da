"""What is in a checkpoint, how it is sealed, and how a run is put back into it.

Plain types and tensors only. Knows nothing of cores.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import platform
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torchvision

from split_affinity import PROGRAM, __version__
from split_affinity.checkpoints.schema import (
    CHECKPOINT_FORMAT,
    Fault,
    check_archive,
    check_content,
    check_shapes,
    check_size,
    match_optimizer,
    match_state,
)
from split_affinity.data.pictures import derived_seed
from split_affinity.errors import UserError, one_line
from split_affinity.files import new_file, open_itself
from split_affinity.models.pretrained import Preprocessing
from split_affinity.models.weights import versioned
from split_affinity.options.contradictions import is_name
from split_affinity.options.saved import TAKEN, settings_brought, settings_left
from split_affinity.options.settings import BALANCED, Settings, plain_settings, settings_of
from split_affinity.options.values import Values
from split_affinity.training.optimizer import begin_momentum, planned_steps
from split_affinity.training.update import RankState, TrainState, mean_rank_state

SEAL = b"\nsha256 "
SEAL_BYTES = len(SEAL) + 64 + 1  # 64 hexadecimal digits and a line feed

# What happens to a changed value of each setting when a run is resumed: see `option`.
ON_RESUME = {each.name: each.metadata["on_resume"] for each in dataclasses.fields(Settings)}

SavedState = dict[str, Any]  # a checkpoint's content, or a part of it: plain types and tensors


class BadCheckpoint(UserError):
    """A file that is missing, damaged, or no checkpoint of this program; the message names it."""


@dataclass
class Progress:
    """Where a run stands, the same on all ranks.

    `epoch` epochs are finished; `batches`, `images`, `loss_sum`, `top1` and `top5` are of the next
    one. `best` has (top-1, epoch), best first, in `epoch_order`; `history` has a row for each
    finished epoch.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    images: int = 0
    loss_sum: float = 0.0
    top1: int = 0
    top5: int = 0
    best: list[tuple[float, int]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    bad_images: list[str] = field(default_factory=list)
    epoch_batches: int = 0
    lr: float = 0.0

    def add_step(self, images: int, loss: float, top1: int, top5: int, batches: int) -> None:
        """Add one optimizer step; `loss` is the mean per image."""
        self.step += 1
        self.batches += batches
        self.images += images
        self.loss_sum += loss * images
        self.top1 += top1
        self.top5 += top5

    def begin_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch += 1
        self.batches = self.images = self.top1 = self.top5 = 0
        self.loss_sum = 0.0

    def end_epoch(self, row: dict[str, Any], keep_best: int) -> None:
        """Enter the figures of the finished epoch, and begin the next one."""
        self.begin_epoch()
        self.history.append(row)
        if row["val_top1"] is not None:
            losses = {each.get("epoch"): each.get("val_loss") for each in self.history}
            ranked = [*map(tuple, self.best), (row["val_top1"], self.epoch)]
            ranked.sort(key=lambda one: epoch_order(*one, losses.get(one[1])))
            self.best = ranked[:keep_best]


def epoch_order(top1: float, epoch: int, loss: float | None) -> tuple[float, float, int]:
    """What to sort epochs by, best first: the higher top-1, then the lower validation loss, then
    the earlier one. A loss of None, which was not finite, is the worst.
    """
    return -top1, math.inf if loss is None else loss, epoch


def best_epoch(
    history: Sequence[dict[str, Any]], best: Sequence[tuple[float, int]] = ()
) -> dict[str, Any] | None:
    """The row of the epoch that best.pt is of, by the `best` of a Progress if that is given.

    Earlier versions took the first epoch of equal top-1: `best` knows it, the history does not.
    """
    validated = [row for row in history if row["val_top1"] is not None]
    for row in validated if best else ():
        if row["epoch"] == best[0][1]:
            return row
    return min(
        validated,
        key=lambda row: epoch_order(row["val_top1"], row["epoch"], row.get("val_loss")),
        default=None,
    )


def versions() -> dict[str, str]:
    """Versions of everything that the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "psutil": psutil.__version__,
        "system": f"{platform.system()} {platform.release()}",
        Path(PROGRAM).stem: __version__,
    }


# A run's state, saved and restored.


def make_state(
    settings: Settings,
    train_state: TrainState,
    progress: Progress,
    data: SavedState | None = None,
    asked: Values | None = None,
    rank_states: Sequence[RankState] = (),
) -> SavedState:
    """The state of a run after its latest optimizer step, ready to be saved.

    `settings` are those in force; a resumed run takes those in `asked` instead. With several ranks
    the model gets the mean of their buffers. Raises BadCheckpoint if an update was broken off.
    """
    if train_state.updating:
        raise BadCheckpoint("an error broke off the update of the weights")
    end = train_state.end or train_state.network.step_end()
    mean = mean_rank_state(rank_states) if rank_states else {"buffers": {}, "average": {}}
    return {
        "format": CHECKPOINT_FORMAT,
        "model": train_state.model_state() | mean["buffers"],
        "average": train_state.average.values | mean["average"] if train_state.average else None,
        "optimizer": train_state.optimizer.state_dict(),
        "scheduler": train_state.scheduler.state_dict() if train_state.scheduler else None,
        "flow": train_state.gradient_norms.state() if train_state.gradient_norms else None,
        "ahead": end.weights and {name: value.detach() for name, value in end.weights.items()},
        "random_state": end.random_state,
        "progress": dataclasses.asdict(progress),
        "settings": plain_settings(settings),
        "versions": versions(),
        "data": data,
        "asked": asked or {},
        **({"ranks": list(rank_states)} if rank_states else {}),
    }


def restore_state(saved: SavedState, train_state: TrainState, settings: Settings) -> Progress:
    """Put the objects of a new run into a saved state; returns where the run stands."""
    progress = Progress(**saved["progress"])
    model, ranks = train_state.network.model, train_state.ranks
    model.load_state_dict(versioned(saved["model"], model))
    restore_optimizer(saved, train_state, settings)
    if train_state.average:
        for name, value in train_state.average.values.items():
            value.copy_(saved["average"][name])
        train_state.average.updates = progress.step  # one in each
    if train_state.gradient_norms and saved["flow"]:
        train_state.gradient_norms.restore(saved["flow"])
    rank_states = saved.get("ranks") or []
    if len(rank_states) == ranks.size:
        train_state.load_buffers(rank_states[ranks.rank])
        torch.set_rng_state(rank_states[ranks.rank]["random_state"])
    elif ranks.rank:  # there is another number of ranks now
        torch.manual_seed(derived_seed(settings.seed, "rank", ranks.rank, progress.step))
    else:
        torch.set_rng_state(saved["random_state"])
    ahead = saved["ahead"] if settings.schedule == "delayed" else None
    train_state.end = train_state.network.step_end(ahead)
    return progress


def restore_optimizer(saved: SavedState, train_state: TrainState, settings: Settings) -> None:
    """Put optimizer and scheduler into a saved state, but for rates that you have changed."""
    optimizer, scheduler = train_state.optimizer, train_state.scheduler
    ours, theirs = plain_settings(settings), saved_settings(saved)
    same = all(theirs[name] == ours[name] for name in ours if ON_RESUME[name] == "rate")
    new_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(match_optimizer(optimizer, saved["optimizer"]))
    if same:
        course = match_state(scheduler.state_dict(), saved["scheduler"], "scheduler")
        scheduler.load_state_dict(course)
    else:  # new rates hold from here on, at the same step of their schedule
        for group, new_group in zip(optimizer.param_groups, new_groups, strict=True):
            group |= new_group
        step, epoch_batches = saved["progress"]["step"], saved["progress"]["epoch_batches"]
        with warnings.catch_warnings():  # torch expects an optimizer step before each of these
            warnings.simplefilter("ignore")
            for _ in range(min(step, planned_steps(settings, epoch_batches))):
                scheduler.step()
    begin_momentum(optimizer)  # of weights that were frozen until now


# The settings of a saved run.

# What versions did that did not know an option, where its default does something else.
BEFORE: Values = {"full_decode": True, "fold_norm": False, "fused_norm": "off"}


def saved_settings(saved: SavedState) -> Values:
    """The settings of a saved run, as JSON types; those unknown to its version have defaults, or
    are as it computed.
    """
    return plain_settings(Settings()) | BEFORE | saved["settings"]


def asked_again(asked: Settings, in_force: Settings) -> Values:
    """The settings that a resumed run takes instead of those in force, as JSON types.

    What was left to the data or the machine is decided anew, except for a batch that was fitted to
    the images. The images' path is absolute.
    """
    values, decided = plain_settings(asked), plain_settings(in_force)
    if asked.data_path:
        values["data_path"] = os.fspath(asked.data_path.absolute())
    kept = {*vars(Preprocessing()), "batch_size", "fit_batch"}
    return {key: values[key] for key in values if values[key] != decided[key] and key not in kept}


def settings_to_go_on(saved: SavedState) -> Settings:
    """The settings that a resumed run takes, with the path of the images."""
    asked = saved.get("asked")
    if asked is None:  # an earlier version: leave to the machine what it may have decided
        names = "loader_cores forward_threads backward_threads precision tuned_malloc".split()
        asked = {name: plain_settings(Settings())[name] for name in names}
    values = saved_settings(saved) | asked
    taken = {name: values[name] for name in (*TAKEN, "data_path")}
    if is_name(values["teacher_weights"] or ""):
        taken["teacher_weights"] = values["teacher_weights"]
    if values["class_weights"] == BALANCED:
        taken["class_weights"] = BALANCED
    return settings_of(taken)


def preprocessing_of(saved: SavedState) -> Preprocessing:
    """How pictures were made ready to validate a saved model; ImageNet's way if it does not say."""
    known = {name: saved["settings"].get(name) for name in vars(Preprocessing())}
    return Preprocessing().overruled(settings_of(known))


# Files.


def seal(digest: Any) -> bytes:
    """The end of a checkpoint: the SHA-256 of all bytes before it.

    torch.load checks no checksums, and an archive has none for its directory: a flipped bit there
    can leave a tensor's memory as it was. torch.load ignores what follows an archive.
    """
    return SEAL + digest.hexdigest().encode() + b"\n"


class DigestingWriter(io.BufferedWriter):
    """A new file; `digest` is the SHA-256 of what was written to it."""

    def __init__(self, path: Path):
        super().__init__(new_file(path))
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """As the file's own."""
        self.digest.update(data)
        return super().write(data)


def write_verified(path: Path, saved: SavedState) -> None:
    """Write a state to disk and read it back; if that fails, nothing is left behind."""
    try:
        with DigestingWriter(path) as file:
            torch.save(saved, file)
            file.write(seal(file.digest))
            file.flush()
            os.fsync(file.fileno())
        verify_checkpoint(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def verify_checkpoint(path: Path) -> None:
    """Raise BadCheckpoint unless a file ends with the seal of everything before it."""
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_itself(path.resolve(), os.O_RDONLY), "rb") as file:
            left = max(0, os.fstat(file.fileno()).st_size - SEAL_BYTES)
            while left and (data := file.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
            ending = file.read(SEAL_BYTES)
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise BadCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
    if not ending.startswith(SEAL):
        raise BadCheckpoint(f"{path}: damaged, or no checkpoint of this program")
    if ending != seal(digest):
        raise BadCheckpoint(f"{path}: damaged: its SHA-256 is not the one that it ends with")


def is_sealed(path: Path) -> bool:
    """Whether a file ends as a checkpoint of this program does, damaged or not. Raises OSError."""
    with os.fdopen(open_itself(path.resolve(), os.O_RDONLY), "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SEAL_BYTES))
        return file.read().startswith(SEAL)


def load_plain(path: Path, *harmless: type) -> Any:
    """What torch.save wrote: tensors, plain data and `harmless` classes. Raises BadCheckpoint."""
    try:
        check_archive(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([*harmless]):
            warnings.simplefilter("ignore")  # about the kinds of files that cannot be read
            return torch.load(path, map_location="cpu", weights_only=True)
    except Fault as fault:
        raise BadCheckpoint(f"{path}: {fault}") from None
    except Exception as error:  # torch raises many kinds
        reason = "not a file of torch.save, or cut short"
        if isinstance(error, (RuntimeError, OSError)):
            reason = re.sub(r"\. (This|In PyTorch) .*", "", one_line(error))
        elif found := re.search(r"GLOBAL (\S+)", str(error)):  # it advises to load it all the same
            reason = f"it holds more than plain data: {found[1]}, which is not run"
    raise BadCheckpoint(f"{path}: cannot be read: {reason}")


def read_checkpoint(path: Path) -> SavedState:
    """A saved state, verified and checked. Raises BadCheckpoint.

    Only the settings that a run may take from it are kept (options/saved.py); `left` names those
    that must be typed again.
    """
    verify_checkpoint(path)
    saved = load_plain(path)
    try:
        check_content(saved)
        check_size(saved, path)
        saved["left"] = settings_left(saved["settings"], saved.get("asked"))
        for name in ("settings", "asked"):
            if saved.get(name) is not None:
                saved[name] = settings_brought(saved[name])
        check_shapes(saved)
    except Fault as fault:
        raise BadCheckpoint(f"{path}: {fault}") from None
    return saved
