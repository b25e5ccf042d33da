"""What the programs of this folder share: a checkpoint's model, the images that it was validated
with, what a file says of the model inside it, and errors that end in one line.

The trainer is imported as a library; nothing of a run is started.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would tell its maker of what it runs

from split_affinity.errors import (
    STOP_SIGNALS,
    RunError,
    Stopped,
    UserError,
    likely_reason,
    memory_errors,
)
from split_affinity.start import PACKAGES, check_address_space, explain_import_error
from split_affinity.text import readable, shown, try_print

HERE, PROGRAM = Path(__file__).resolve().parent, Path(sys.argv[0]).name


OURS = {"importlib", "contextlib", "split_affinity", "__main__"}.union(
    file.stem for file in HERE.glob("*.py")
)


@contextlib.contextmanager
def needed_packages() -> Iterator[None]:
    """End the program with one line if a package that is imported meanwhile cannot be, or if Ctrl-C
    comes.
    """
    try:
        yield
    except Exception as error:  # packages raise many kinds
        try_print(f"{PROGRAM}: error: {why_not_loaded(error)}", sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        stopped = Stopped(signal.SIGINT)
        try_print(f"{PROGRAM}: {stopped}", sys.stderr)
        sys.exit(stopped.exit_code)


def why_not_loaded(error: Exception) -> str:
    """Why a package cannot be loaded, and what helps."""
    too_little = "cannot load all packages: too little memory or address space: raise `ulimit -v`"
    if isinstance(error, SystemError):  # so little that Python lost the error
        return too_little
    try:
        text = explain_import_error(error, package_of(error))
    except (MemoryError, OSError):  # so little that it cannot be told which package it was
        return too_little
    if isinstance(error, ModuleNotFoundError):
        text += f"; all that deploy/ needs: pip install -r {HERE / 'requirements.txt'}"
    return text


def package_of(error: Exception) -> str:
    """The package that was imported when an error arose: the first whose code had begun, or the one
    that it names.
    """
    begun = (frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__))
    names = (name.partition(".")[0] for name in (*begun, getattr(error, "name", None) or "torch"))
    return next(name for name in names if name not in OURS)


with needed_packages():
    check_address_space((*PACKAGES, "scipy.stats"))  # whose OpenBLAS ends the process, too
    import torch
    from torch.utils.data import Dataset, Subset

    from split_affinity.checkpoints.resume import check_classes
    from split_affinity.checkpoints.state import (
        SavedState,
        saved_settings,
        settings_to_go_on,
    )
    from split_affinity.checkpoints.state import read_checkpoint as read_state
    from split_affinity.data.dataset import open_data
    from split_affinity.data.pictures import ImageData
    from split_affinity.data.samples import EpochOrder, Samples
    from split_affinity.data.transforms import same_transform, validation_transform
    from split_affinity.files import write_traceback
    from split_affinity.machine.plan import plan_cores
    from split_affinity.machine.topology import read_topology
    from split_affinity.models.pretrained import Preprocessing
    from split_affinity.options.saved import PATHS
    from split_affinity.options.settings import Settings, settings_of
    from split_affinity.options.values import whole_number
    from split_affinity.runs.predict import Trained, trained_model
    from split_affinity.terminal import lossy_output, say, warn


@contextlib.contextmanager
def stop_signals_raised() -> Iterator[None]:
    """Have Ctrl-C and the like raise Stopped meanwhile, so that nothing half made stays."""

    def stop(signum: int, _: object) -> None:
        raise Stopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def program(run: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """A program's `main`, from what it does with its arguments: returns the exit code. Everything
    that a user can cause ends in one line.
    """

    @functools.wraps(run)
    @lossy_output()
    def main(argv: Sequence[str] | None = None) -> int:
        name = Path(sys.modules[run.__module__].__file__).name
        try:
            with memory_errors(), stop_signals_raised():
                run(argv)
        except (UserError, RunError, Stopped) as error:
            prefix = "" if isinstance(error, Stopped) else "error: "
            say(shown(f"{name}: {prefix}{error}"), sys.stderr)
            return error.exit_code
        except Exception as error:
            reason, where = likely_reason(error), write_traceback(None, error)
            say(f"{name}: error: {shown(reason)}; {where}", sys.stderr)
            return RunError.exit_code
        return 0

    return main


def common_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every program takes; `description` stands above them in --help."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="of train_split_affinity.py, such as best.pt")
    parser.add_argument(
        "--data-path",
        type=Path,
        metavar="DIR",
        help="where its data are now, if they were moved",
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=whole_number(1),
        default=32,
        metavar="N",
        help="images that go through the model together (%(default)s)",
    )
    return parser


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's saved state, and its model, ready to be used (evaluation mode, fp32)."""

    path: Path
    state: SavedState
    trained: Trained

    @property
    def model(self) -> torch.nn.Module:
        """Maps images (n, 3, size, size), made ready, to logits (n, classes)."""
        return self.trained.model

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, in the order of the logits."""
        return self.trained.classes


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, verified. Raises BadCheckpoint."""
    state = read_state(path)
    return Checkpoint(path, state, trained_model(path, state, Settings()))


def settings_as_given(state: SavedState, native: Preprocessing) -> Settings:
    """What was asked for, as it was typed then, without what followed from how the data's own
    pictures are made ready.
    """
    asked = state.get("asked") or {}  # earlier versions did not save it
    typed = {name: value for name, value in asked.items() if name not in PATHS}
    settings = settings_of(saved_settings(state) | typed)
    followed = dict.fromkeys(("val_resize", "interpolation", "mean", "std"))
    derived = native.overruled(dataclasses.replace(settings, **followed))
    unasked = {name: None for name in followed if getattr(settings, name) == getattr(derived, name)}
    return dataclasses.replace(settings, **unasked)


def public(value: Any) -> Any:
    """A setting's value as it may be shown to anybody: of a path that begins at the machine's root,
    or leads out of the folder that the run began in, the last part alone.
    """
    if not isinstance(value, (str, Path)) or "://" in str(value):
        return value
    path = Path(value)
    is_inside = not path.is_absolute() and ".." not in path.parts and str(value)[:1] != "~"
    return value if is_inside else type(value)(path.name or ".")


def public_settings(settings: Settings) -> Settings:
    """Settings as they may be shown to anybody; see `public`."""
    return dataclasses.replace(
        settings, **{name: public(value) for name, value in vars(settings).items()}
    )


def use_allowed_cores() -> int:
    """Have PyTorch compute with as many threads as there are cores for it: those that this process
    may use, and no more than a container's quota allows. Returns their number.
    """
    plan = plan_cores(read_topology(), Settings(split="none"))
    torch.set_num_threads(plan.forward.threads)
    return plan.forward.threads


def open_images(checkpoint: Checkpoint, data_path: Path | None = None) -> ImageData:
    """The data that a checkpoint was trained on and validated with, from where they were or from
    `data_path`. Raises UserError for data that are not there, or of other classes.
    """
    path, state = checkpoint.path, checkpoint.state
    settings = settings_to_go_on(state)
    for_training = {"augment_confused": None, "class_weights": None}
    settings = dataclasses.replace(settings, batch_size=1, accumulate=1, **for_training)
    if data_path:
        settings = dataclasses.replace(settings, data_path=data_path)
    if settings.data_path is None:
        raise UserError(f"{path}: trained on synthetic images; --data-path DIR names real ones")
    data = open_data(settings)
    check_classes(path, state, data.classes)
    if data.val is None:
        reason = "has no images to validate with"
        raise UserError(f"--data-path {settings.data_path}: {reason}")
    return data


def true_classes(pictures: Dataset) -> list[int]:
    """The class index of each picture of a data set."""
    if isinstance(pictures, Subset):
        targets = true_classes(pictures.dataset)
        return [targets[index] for index in pictures.indices]
    return list(pictures.targets)


class Numbered(Dataset):
    """Pictures, each with its own number in place of its class."""

    def __init__(self, pictures: Dataset):
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._pictures[index][0], index


def batches(
    checkpoint: Checkpoint, pictures: Dataset, chosen: Sequence[int], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures made ready for the model as validation made them ready: images (n, 3, size, size)
    and their numbers in the data set (n,), in order. Warns of those that cannot be read.

    Raises RunError if none can.
    """
    transform = validation_transform(checkpoint.trained.ready)
    samples = Samples(Numbered(pictures), 0, functools.partial(same_transform, transform))
    seen = 0
    for keys in EpochOrder(chosen, batch_size, None):
        loaded = samples[keys]
        for message in loaded.broken:
            warn(f"{message}: left out")
        if loaded.batch:
            seen += len(loaded.batch[0])
            yield loaded.batch
    if not seen:
        raise RunError("none of the images can be read")


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What a file with a model in it says of that, by name: all that whoever uses it has to know to
    make pictures ready and to name the answers. Values are JSON, as formats take text alone.
    """
    trained = checkpoint.trained
    facts = {
        "model": trained.settings.model,
        "classes": [readable(name) for name in checkpoint.classes],  # files are in UTF-8
        "preprocessing": vars(trained.ready),
        "full_decode": trained.settings.full_decode,
        "versions": checkpoint.state["versions"],
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
