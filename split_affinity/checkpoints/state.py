"""What is in a checkpoint, how it is sealed, and how a run is put back into it.

Plain types and tensors only. Knows nothing of cores.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
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
    fault_of_archive,
    fault_of_content,
    fault_of_sizes,
    fault_of_weights,
    like,
    like_optimizer,
)
from split_affinity.data.named import CIFAR10
from split_affinity.data.pictures import derived_seed
from split_affinity.errors import UserError, one_line
from split_affinity.files import new_file, open_itself
from split_affinity.models.pretrained import Preprocessing
from split_affinity.models.weights import versioned
from split_affinity.options.contradictions import is_name
from split_affinity.options.saved import TAKEN, settings_brought, settings_left
from split_affinity.options.settings import Settings, plain_settings, settings_of
from split_affinity.options.values import Values
from split_affinity.training.optimizer import begin_momentum, planned_steps
from split_affinity.training.update import RankState, TrainState, mean_rank_state

CHECKPOINT_FORMAT = "train_split_affinity 1"
SEAL = b"\nsha256 "
SEAL_BYTES = len(SEAL) + 64 + 1  # 64 hexadecimal digits and a line feed

# What a machine decides where it is not given.
BY_MACHINE = "loader_cores forward_threads backward_threads precision tuned_malloc".split()

# What becomes of another value of each setting when a run is resumed: see `option`.
ON_RESUME = {each.name: each.metadata["on_resume"] for each in dataclasses.fields(Settings)}

State = dict[str, Any]  # what a checkpoint holds, or its part on the data: plain types, tensors


class BadCheckpoint(UserError):
    """A file that is missing, damaged, or no checkpoint of this program; the message names it."""


@dataclass
class Progress:
    """Where a run stands, the same on all ranks. `epoch` epochs are finished and `batches` of the
    next one are taken;
    `loss_sum`, `top1`, `top5` and `images` are that epoch's so far, of `epoch_batches` batches.
    `best` has (top-1, epoch) of the best epochs, best first; `history` a row for each finished one.
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
        """Take in one optimizer step; `loss` is the mean per image."""
        self.step += 1
        self.batches += batches
        self.images += images
        self.loss_sum += loss * images
        self.top1 += top1
        self.top5 += top5

    def begin_epoch(self) -> None:
        """The running epoch is finished."""
        self.epoch += 1
        self.batches = self.images = self.top1 = self.top5 = 0
        self.loss_sum = 0.0

    def end_epoch(self, row: dict[str, Any], keep_best: int) -> None:
        """Enter a finished epoch's figures; the next one begins."""
        self.begin_epoch()
        self.history.append(row)
        if row["val_top1"] is not None:
            ranked = [*map(tuple, self.best), (row["val_top1"], self.epoch)]
            self.best = sorted(ranked, key=lambda one: (-one[0], one[1]))[:keep_best]


def versions() -> dict[str, str]:
    """Versions of all that the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "psutil": psutil.__version__,
        "system": f"{platform.system()} {platform.release()}",
        Path(PROGRAM).stem: __version__,
    }


def make_state(
    settings: Settings,
    train_state: TrainState,
    progress: Progress,
    data: State | None = None,
    asked: Values | None = None,
    rank_states: Sequence[RankState] = (),
) -> State:
    """Everything needed to go on from the end of the latest optimizer step, in plain types and
    tensors. Raises BadCheckpoint if an update was broken off.

    `settings` are those in force; `asked` are those that a run which goes on takes in their place.
    `parts` are those of several ranks, whose mean the model gets.
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


def saved_settings(state: State) -> Values:
    """The settings of a saved run, as JSON types. One that its version did not know yet counts as
    its default, which is to leave things as they were.
    """
    return plain_settings(Settings()) | state["settings"]


def asked_again(asked: Settings, in_force: Settings) -> Values:
    """Settings that a run which goes on takes in place of those that were in force, in plain types:
    what was left to the data or the machine is decided anew, and the images are found from any
    folder.
    """
    values, decided = plain_settings(asked), plain_settings(in_force)
    if asked.data_path:
        values["data_path"] = os.fspath(asked.data_path.absolute())
    ready = vars(Preprocessing())
    return {key: values[key] for key in values if values[key] != decided[key] and key not in ready}


def settings_to_go_on(state: State) -> Settings:
    """The settings that a run takes from the saved one which it goes on with, and where that had
    its images. Versions that did not save what was asked for had these decided anew each time.
    """
    asked = state.get("asked")
    if asked is None:
        plain = plain_settings(Settings())
        asked = {name: plain[name] for name in BY_MACHINE}
    saved = saved_settings(state) | asked
    taken = {name: saved[name] for name in (*TAKEN, "data_path")}
    if is_name(saved["teacher_weights"] or ""):
        taken["teacher_weights"] = saved["teacher_weights"]
    return settings_of(taken)


def preprocessing_of(state: State) -> Preprocessing:
    """How pictures were made ready to validate a saved model.

    Versions that did not save it did so as for CIFAR-10 or as for ImageNet. Of their data only
    image folders have a fingerprint of files, and the classes of synthetic images are numbers.
    """
    data = state.get("data") or {"classes": ["0"], "fingerprint": ""}
    words = not data["classes"][0].isdigit()
    files = data["fingerprint"] != hashlib.sha256().hexdigest()
    native = CIFAR10 if words and not files else Preprocessing()
    known = {name: state["settings"].get(name) for name in vars(native)}
    return native.overruled(settings_of(known))


def restore_state(state: State, train_state: TrainState, settings: Settings) -> Progress:
    """Put a run's objects, made as for a new run, into a saved state; says where the run stands.

    Rates that are not those of the saved run hold from here on: the learning rate goes on at the
    same step of its new course.
    """
    own = [dict(group, params=None) for group in train_state.optimizer.param_groups]
    progress = Progress(**state["progress"])
    model = train_state.network.model
    ours, saved = plain_settings(settings), saved_settings(state)
    same = all(saved[name] == ours[name] for name in ours if ON_RESUME[name] == "rate")
    optimizer = like_optimizer(train_state.optimizer, state["optimizer"])
    if same:
        scheduler = like(train_state.scheduler.state_dict(), state["scheduler"], "scheduler")
    model.load_state_dict(versioned(state["model"], model))
    train_state.optimizer.load_state_dict(optimizer)
    if same:
        train_state.scheduler.load_state_dict(scheduler)
    else:
        for group, values in zip(train_state.optimizer.param_groups, own, strict=True):
            group |= values | {"params": group["params"]}
        with warnings.catch_warnings():  # torch expects an optimizer step before each of these
            warnings.simplefilter("ignore")
            for _ in range(min(progress.step, planned_steps(settings, progress.epoch_batches))):
                train_state.scheduler.step()
    if train_state.average:
        for name, value in train_state.average.values.items():
            value.copy_(state["average"][name])
        train_state.average.updates = progress.step  # one in each
    if train_state.gradient_norms and state["flow"]:
        train_state.gradient_norms.restore(state["flow"])
    begin_momentum(train_state.optimizer)  # of what the saved run has kept frozen
    restore_rank_state(
        state,
        train_state,
        derived_seed(settings.seed, "rank", train_state.ranks.rank, progress.step),
    )
    train_state.end = train_state.network.step_end(
        state["ahead"] if settings.schedule == "delayed" else None
    )
    return progress


def restore_rank_state(state: State, train_state: TrainState, seed: int) -> None:
    """Go on with what belonged to this rank alone; if there were not as many ranks, with what is
    common to all, and random numbers by the seed, which rank 0 has no need of.
    """
    rank_states, ranks = state.get("ranks") or [], train_state.ranks
    if len(rank_states) == ranks.size:
        train_state.load_buffers(rank_states[ranks.rank])
        torch.set_rng_state(rank_states[ranks.rank]["random_state"])
    elif ranks.rank:
        torch.manual_seed(seed)
    else:
        torch.set_rng_state(state["random_state"])


def seal(digest: Any) -> bytes:
    """What a checkpoint ends with: the SHA-256 of all bytes before it.

    torch.load checks no checksums, and an archive's own cover only the contents of its entries: a
    flipped bit in its directory can make a tensor look like a folder, and torch.load then leaves
    the tensor's memory as it was. What follows an archive, torch.load does not mind.
    """
    return SEAL + digest.hexdigest().encode() + b"\n"


class Digested(io.BufferedWriter):
    """A file to write; `digest` is the SHA-256 of what was written."""

    def __init__(self, path: Path):
        super().__init__(new_file(path))
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """As the file's own."""
        self.digest.update(data)
        return super().write(data)


def verify_checkpoint(path: Path) -> None:
    """Raise BadCheckpoint unless a file ends with the seal of all that stands before it."""
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


def read_checkpoint(path: Path) -> State:
    """A saved state, verified: whole, and of what a state is made of. Of its settings those are
    left that a run may take from it (options/saved.py); the names of others are in `left`.
    Raises BadCheckpoint.
    """
    verify_checkpoint(path)
    state = load_plain(path)
    fault = fault_of_state(state)
    if fault := fault or fault_of_sizes(state, path.stat().st_size):
        raise BadCheckpoint(f"{path}: {fault}")
    state["left"] = settings_left(state["settings"])
    for name in ("settings", "asked"):
        if state.get(name) is not None:
            state[name] = settings_brought(state[name])
    if fault := fault_of_weights(state):
        raise BadCheckpoint(f"{path}: {fault}")
    return state


def load_plain(path: Path, *harmless: type) -> Any:
    """What torch.save wrote into a file: tensors and plain data, and objects of `harmless` classes.
    Nothing that a file holds is run. Raises BadCheckpoint.
    """
    try:
        if fault := fault_of_archive(path):
            raise BadCheckpoint(f"{path}: {fault}")
        with warnings.catch_warnings(), torch.serialization.safe_globals([*harmless]):
            warnings.simplefilter("ignore")  # of the kinds of files that cannot be read
            return torch.load(path, map_location="cpu", weights_only=True)
    except BadCheckpoint:
        raise
    except Exception as error:  # torch raises many kinds
        reason = "not a file of torch.save, or cut short"
        if isinstance(error, (RuntimeError, OSError)):
            reason = re.sub(r"\. (This|In PyTorch) .*", "", one_line(error))
        elif found := re.search(r"GLOBAL (\S+)", str(error)):  # it advises to load it all the same
            reason = f"it holds more than plain data: {found[1]}, which is not run"
    raise BadCheckpoint(f"{path}: cannot be read: {reason}")


def fault_of_state(state: Any) -> str:
    """What keeps a file's content from being a state to go on from, if anything."""
    saved = state.get("format") if isinstance(state, dict) else None
    if saved != CHECKPOINT_FORMAT:
        name, _, number = str(saved).rpartition(" ")
        ours, _, known = CHECKPOINT_FORMAT.rpartition(" ")
        if name == ours and number.isdigit() and int(number) > int(known):
            return f"made by a newer version of this program (format {number}; this one: {known})"
        return f"no checkpoint of this program ({CHECKPOINT_FORMAT})"
    return fault_of_content(state)


def is_sealed(path: Path) -> bool:
    """Whether a file ends as a checkpoint of this program does, damaged or not. Raises OSError."""
    with os.fdopen(open_itself(path.resolve(), os.O_RDONLY), "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SEAL_BYTES))
        return file.read().startswith(SEAL)


def write_verified(path: Path, state: State) -> None:
    """Write a state to disk and read it back. Raises OSError, RuntimeError (torch's, for a full
    disk) or BadCheckpoint, and leaves nothing behind then.
    """
    try:
        with Digested(path) as file:
            torch.save(state, file)
            file.write(seal(file.digest))
            file.flush()
            os.fsync(file.fileno())
        verify_checkpoint(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def best_epoch(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The epoch with the best validation top-1, the first of equals, as for best.pt."""
    validate_batches = (row for row in history if row["val_top1"] is not None)
    return max(validate_batches, key=lambda row: row["val_top1"], default=None)
