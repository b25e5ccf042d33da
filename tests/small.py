"""Small runs, models and data that tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from split_affinity import ALLOWED_CPUS
from split_affinity.data.samples import Loaded

TWO_CPUS = len(ALLOWED_CPUS) >= 2
needs_two_cpus = pytest.mark.skipif(not TWO_CPUS, reason="needs two logical CPUs")

# A run that takes about a second.
TINY = [
    "--model",
    "squeezenet1_1",
    "--image-size",
    "32",
    "-b",
    "2",
    "--num-classes",
    "3",
    "-j",
    "0",
]


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: (step, value) of each figure, by its name; the test is
    skipped without TensorBoard.
    """
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(scalar.step, scalar.value) for scalar in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def as_loaded(batches: list) -> list[Loaded]:
    """Batches in the form in which a loader gives them."""
    return [Loaded(batch) for batch in batches]


def small_model(num_classes: int, image_size: int) -> nn.Module:
    """BatchNorm's statistics and dropout's random numbers, in a model of some milliseconds."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, num_classes),
    )


def read_metrics(folder: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl, those of one type or all."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in (None, line["type"])]
