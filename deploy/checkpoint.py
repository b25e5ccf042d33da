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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would tell its maker of what it runs

import torch
from torch.utils.data import Dataset, Subset

import train_split_affinity as tsa

HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def needed_packages() -> Iterator[None]:
    """End the program with one line if a package that is imported meanwhile is missing."""
    try:
        yield
    except ImportError as error:
        program, remedy = Path(sys.argv[0]).name, f"pip install -r {HERE / 'requirements.txt'}"
        print(f"{program}: error: {error}: {remedy}", file=sys.stderr)
        sys.exit(tsa.UserError.exit_code)


@contextlib.contextmanager
def stop_signals_raised() -> Iterator[None]:
    """Have Ctrl-C and the like raise tsa.Stopped meanwhile, so that nothing half made stays."""

    def stop(signum: int, _: object) -> None:
        raise tsa.Stopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in tsa.STOP_SIGNALS}
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
    @tsa.lossy_output()
    def main(argv: Sequence[str] | None = None) -> int:
        name = Path(sys.modules[run.__module__].__file__).name
        try:
            with tsa.memory_errors(), stop_signals_raised():
                run(argv)
        except (tsa.UserError, tsa.RunError, tsa.Stopped) as error:
            prefix = "" if isinstance(error, tsa.Stopped) else "error: "
            tsa.say(f"{name}: {prefix}{error}", sys.stderr)
            return error.exit_code
        except Exception as error:
            reason, where = tsa.likely_reason(error), tsa.write_traceback(None, error)
            tsa.say(f"{name}: error: {reason}; {where}", sys.stderr)
            return tsa.RunError.exit_code
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
        type=tsa.whole_number(1),
        default=32,
        metavar="N",
        help="images that go through the model together (%(default)s)",
    )
    return parser


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's saved state, and its model, ready to be used (evaluation mode, fp32)."""

    path: Path
    state: tsa.State
    trained: tsa.Trained

    @property
    def model(self) -> torch.nn.Module:
        """Maps images (n, 3, size, size), made ready, to logits (n, classes)."""
        return self.trained.model

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, in the order of the logits."""
        return self.trained.classes


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, verified. Raises tsa.BadCheckpoint."""
    state = tsa.read_checkpoint(path)
    return Checkpoint(path, state, tsa.trained_model(path, state, tsa.Settings()))


def settings_as_given(state: tsa.State, native: tsa.Preprocessing) -> tsa.Settings:
    """What was asked for, as it was typed then, without what followed from how the data's own
    pictures are made ready.
    """
    asked = state.get("asked") or {}  # earlier versions did not save it
    typed = {name: value for name, value in asked.items() if name not in tsa.PLACES}
    settings = tsa.settings_of(tsa.saved_settings(state) | typed)
    followed = dict.fromkeys(("val_resize", "interpolation", "mean", "std"))
    derived = native.overruled(dataclasses.replace(settings, **followed))
    unasked = {name: None for name in followed if getattr(settings, name) == getattr(derived, name)}
    return dataclasses.replace(settings, **unasked)


def use_allowed_cores() -> int:
    """Have PyTorch compute with as many threads as there are cores for it: those that this process
    may use, and no more than a container's quota allows. Returns their number.
    """
    plan = tsa.plan_cores(tsa.read_topology(), tsa.Settings(split="none"))
    torch.set_num_threads(plan.forward.threads)
    return plan.forward.threads


def open_images(checkpoint: Checkpoint, data_path: Path | None = None) -> tsa.ImageData:
    """The data that a checkpoint was trained on and validated with, from where they were or from
    `data_path`. Raises UserError for data that are not there, or of other classes.
    """
    path, state = checkpoint.path, checkpoint.state
    settings = tsa.settings_to_go_on(state)
    settings = dataclasses.replace(settings, batch_size=1, accumulate=1, augment_confused=None)
    if data_path:
        settings = dataclasses.replace(settings, data_path=data_path)
    if settings.data_path is None:
        raise tsa.UserError(f"{path}: trained on synthetic images; --data-path DIR names real ones")
    data = tsa.open_data(settings)
    tsa.check_classes(path, state, data.classes)
    if data.val is None:
        reason = "has no images to validate with"
        raise tsa.UserError(f"--data-path {settings.data_path}: {reason}")
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
    transform = tsa.validation_transform(checkpoint.trained.ready)
    samples = tsa.Samples(Numbered(pictures), 0, functools.partial(tsa.same_transform, transform))
    seen = 0
    for keys in tsa.EpochOrder(chosen, batch_size, None):
        loaded = samples[keys]
        for message in loaded.broken:
            tsa.warn(f"{message}: left out")
        if loaded.batch:
            seen += len(loaded.batch[0])
            yield loaded.batch
    if not seen:
        raise tsa.RunError("none of the images can be read")


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What a file with a model in it says of that, by name: all that whoever uses it has to know to
    make pictures ready and to name the answers. Values are JSON, as formats take text alone.
    """
    trained = checkpoint.trained
    facts = {
        "model": trained.settings.model,
        "classes": list(checkpoint.classes),
        "preprocessing": vars(trained.ready),
        "versions": checkpoint.state["versions"],
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
