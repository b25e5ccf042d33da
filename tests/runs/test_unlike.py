"""Pictures unlike all classes: the threshold. Run: python -m pytest tests/runs/test_unlike.py"""

import copy
import math

import numpy as np
import pytest

from split_affinity.checkpoints.schema import EPOCH, Fault, check_form
from split_affinity.runs.unlike import (
    LEAST_IMAGES,
    Threshold,
    describe_unlike,
    find_threshold,
    threshold_figures,
)

LIKENESS = [math.sin(number) ** 2 for number in range(50)]


def saved(**row):
    """What a checkpoint says of its progress, after an epoch with a validation."""
    row = {"epoch": 3, "val_top1": 90.0, **threshold_figures(LIKENESS), **row}
    return {"progress": {"epoch": 3, "batches": 0, "history": [row]}}


def test_the_threshold_is_a_quantile_of_the_validation_images():
    figures = threshold_figures(LIKENESS)
    assert figures["unlike_threshold"] == pytest.approx(np.quantile(LIKENESS, 0.05))
    assert figures["unlike_images"] == 50
    threshold, reason = find_threshold(saved())
    assert (threshold.probability, threshold.images, reason) == (
        figures["unlike_threshold"],
        50,
        "",
    )
    assert sum(map(threshold.is_unlike, LIKENESS)) == 3, "5 % of 50, rounded up"
    assert not threshold.is_unlike(threshold.probability)
    assert threshold.is_unlike(math.nan)


@pytest.mark.parametrize(
    ("likeness", "images"),
    [([], 0), (LIKENESS[: LEAST_IMAGES - 1], LEAST_IMAGES - 1), ([*LIKENESS, math.nan], 51)],
)
def test_too_few_images_or_a_diverged_model_give_none(likeness, images):
    figures = threshold_figures(likeness)
    assert (figures["unlike_threshold"], figures["unlike_images"]) == (None, images)


def test_why_a_checkpoint_gives_no_threshold():
    earlier = {"epoch": 3, "val_top1": 90.0}
    within, unvalidated, old = saved(), copy.deepcopy(saved()), saved()
    within["progress"]["batches"] = 2
    unvalidated["progress"]["history"] = []
    old["progress"]["history"] = [earlier]
    for state, reason in (
        (within, "the checkpoint's weights are newer than its latest validation"),
        (saved(epoch=2), "the checkpoint's weights are newer than its latest validation"),
        (unvalidated, "the checkpoint's weights were not validated"),
        (saved(val_top1=None), "the run had no validation images"),
        (old, "the checkpoint is of an earlier version"),
        (saved(unlike_score="odin"), "the checkpoint's score is not this version's"),
        (saved(**threshold_figures([1.0])), "1 validation image is too few, 20 are needed"),
        (saved(**threshold_figures([math.inf] * 30)), "its validation gave no finite scores"),
    ):
        threshold, told = find_threshold(state)
        assert threshold is None
        assert told.startswith(reason)


def test_how_sure_a_threshold_is():
    """Wilson's interval, as statsmodels' proportion_confint gives it for 5 of 100."""
    assert Threshold(0.75, 100).interval() == pytest.approx((0.02154, 0.11175), abs=1e-5)
    text = describe_unlike(2, 7, Threshold(0.75, 24))
    assert text.startswith(
        "2 of 7 pictures called unlike all of these: the likeliest class has less"
    )
    assert (
        "than 75.00 %. A hint, no verdict: so have about 5 % (1 to 21 %) of pictures that" in text
    )
    assert text.endswith("by 24 validation images")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("score", 3),
        ("threshold", math.nan),
        ("threshold", "5"),
        ("threshold", [1.0]),
        ("threshold", 1.01),
        ("false_alarms", -0.1),
        ("false_alarms", True),
        ("images", -1),
        ("images", 2.5),
    ],
)
def test_nonsense_in_a_checkpoint_is_refused(name, wrong):
    row = saved()["progress"]["history"][0] | {"gradient_norms": {}}
    check_form(row, EPOCH)
    with pytest.raises(Fault, match=f"^unlike_{name} is "):
        check_form(row | {f"unlike_{name}": wrong}, EPOCH)
