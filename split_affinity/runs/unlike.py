"""Pictures that are unlike all that a model learnt: the threshold that its validation gives.

A picture is called unlike if its likeliest class has less probability than that of 95 % of the
validation images. So about 5 % of the pictures that do belong to the classes are called unlike too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from split_affinity.checkpoints.state import SavedState
from split_affinity.text import plural
from split_affinity.training.network import LIKENESS

FALSE_ALARMS = 0.05
LEAST_IMAGES = 20  # with fewer, none of them would be below the threshold
LEVEL = 1.96  # standard deviations on each side: an interval of 95 %
UNLIKE = "unlike all of these"


@dataclass(frozen=True)
class Threshold:
    """The probability of the likeliest class below which a picture is called unlike.

    It is from so many validation images.
    """

    probability: float
    images: int
    false_alarms: float = FALSE_ALARMS

    def is_unlike(self, probability: float) -> bool:
        """Whether a picture with this probability is called unlike; one that is no number is."""
        return not probability >= self.probability

    def interval(self) -> tuple[float, float]:
        """The share of false alarms to expect, from and to (Wilson 1927, 95 %)."""
        square = LEVEL**2 / self.images
        middle = self.false_alarms + square / 2
        width = LEVEL * math.sqrt(
            self.false_alarms * (1 - self.false_alarms) / self.images + square / (4 * self.images)
        )
        return (middle - width) / (1 + square), (middle + width) / (1 + square)


def threshold_figures(likeness: Sequence[float]) -> dict[str, Any]:
    """What the figures of an epoch say of the threshold, from the validation images' likeness.

    The threshold is None with too few images, or if the model has diverged.
    """
    values = torch.tensor(likeness, dtype=torch.float64)
    usable = len(values) >= LEAST_IMAGES and bool(values.isfinite().all())
    return {
        "unlike_score": LIKENESS,
        "unlike_threshold": values.quantile(FALSE_ALARMS).item() if usable else None,
        "unlike_false_alarms": FALSE_ALARMS,
        "unlike_images": len(values),
    }


def find_threshold(saved: SavedState) -> tuple[Threshold | None, str]:
    """The threshold of a checkpoint's weights; without one, why there is none."""
    progress = saved["progress"]
    if not progress["history"]:
        return None, "the checkpoint's weights were not validated"
    row = progress["history"][-1]
    if row["epoch"] != progress["epoch"] or progress["batches"]:
        return None, "the checkpoint's weights are newer than its latest validation"
    if row.get("val_top1") is None:
        return None, "the run had no validation images"
    if row.get("unlike_score") is None:
        return None, "the checkpoint is of an earlier version"
    if row["unlike_score"] != LIKENESS:
        return None, f"the checkpoint's score is not this version's ({LIKENESS})"
    probability, images = row.get("unlike_threshold"), row.get("unlike_images") or 0
    if images < LEAST_IMAGES:
        count = plural(images, "validation image")
        verb = "is" if images == 1 else "are"
        return None, f"{count} {verb} too few, {LEAST_IMAGES} are needed"
    if probability is None:
        return None, "its validation gave no finite scores"
    return Threshold(probability, images, row.get("unlike_false_alarms") or FALSE_ALARMS), ""


def describe_unlike(count: int, pictures: int, threshold: Threshold) -> str:
    """How many pictures are called unlike, and how sure that is."""
    low, high = (round(100 * share) for share in threshold.interval())
    return (
        f"{count} of {plural(pictures, 'picture')} called {UNLIKE}: the likeliest class has less "
        f"than {100 * threshold.probability:.2f} %. A hint, no verdict: so have about "
        f"{100 * threshold.false_alarms:g} % ({low} to {high} %) of pictures that do belong to the "
        f"classes, by {plural(threshold.images, 'validation image')}"
    )
