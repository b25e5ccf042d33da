"""A run's figures for TensorBoard, if that is installed."""

from __future__ import annotations

import io
import os
import platform
import time
from pathlib import Path
from typing import Any

from split_affinity.errors import UserError, one_line
from split_affinity.files import append_bytes
from split_affinity.options.settings import Settings
from split_affinity.reports.tables import EPOCH_FIELDS, RAW_FIELDS
from split_affinity.text import shown
from split_affinity.training.network import Scores
from split_affinity.training.steps import StepResult


def event_record(**event: Any) -> bytes:
    """An event for TensorBoard (event.proto), framed. Raises ImportError without the package."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    RecordWriter(file).write(Event(wall_time=time.time(), **event).SerializeToString())
    return file.getvalue()


def check_tensorboard(settings: Settings) -> None:
    """Raise UserError if `--tensorboard` is asked for and the package is missing or broken."""
    try:
        if settings.tensorboard and not settings.test_only:
            event_record()
    except Exception as error:  # of imports, or of protobuf in a version that does not fit
        remedy = "needs the package tensorboard: pip install tensorboard"
        raise UserError(f"--tensorboard {remedy} ({one_line(error)})") from None


class EventFile:
    """A run's figures for TensorBoard, in a file of its own.

    TensorBoard stops showing what earlier files have from `first_step` on. SummaryWriter does not
    write it: its thread dies of a full disk, and it imports TensorFlow where there is one.
    """

    def __init__(self, folder: Path, first_step: int):
        host = shown(platform.node()).replace("/", "_")
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{host}.{os.getpid()}"
        purge = event_record(step=first_step, session_log={"status": "START"})
        self._header = event_record(file_version="brain.Event:2") + purge

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Write figures, by name, after an optimizer step. Raises RunError if that fails."""
        values = [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]
        self._path.parent.mkdir(exist_ok=True)
        append_bytes(self._path, event_record(step=step, summary={"value": values}), self._header)


def step_scalars(result: StepResult) -> dict[str, float]:
    """A step's figures for TensorBoard; accuracies in percent."""
    scores = Scores(result.loss, result.images, result.top1, result.top5)
    scalars = {f"step/{name}": value for name, value in scores.figures().items()}
    scalars |= {"step/lr": result.lr, "speed/images_per_s": result.images / result.step_s}
    phases = {record.phase for record in result.records}
    times_s = {f"speed/{phase}_s": result.total("duration_s", phase) for phase in sorted(phases)}
    return {**scalars, "speed/step_s": result.step_s, **times_s}


def epoch_scalars(row: dict[str, Any]) -> dict[str, float]:
    """A finished epoch's figures for TensorBoard, as far as they were measured."""
    names = "epoch", *EPOCH_FIELDS, *RAW_FIELDS
    scalars = {f"epoch/{name}": row[name] for name in names if row.get(name) is not None}
    return scalars | {f"gradients/{name}": norm for name, norm in row["gradient_norms"].items()}
