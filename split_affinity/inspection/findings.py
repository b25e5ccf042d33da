"""What looks wrong with pictures, and what to do about it. Each rule is a pure function that gives
what it found, with the figures that say so, or None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from split_affinity.data.dataset import fitted_batch
from split_affinity.inspection.survey import TRAIN, VALIDATION, Seen, Survey
from split_affinity.inspection.twins import MOST_COMPARED, Twins
from split_affinity.options.data_sets import VAL_SHARE
from split_affinity.options.settings import BALANCED, Settings
from split_affinity.reports.page import Finding
from split_affinity.text import percent, plural

LISTED = 3  # pictures or classes in a sentence
IMBALANCED = 2.0  # times as many pictures in the largest class as in the smallest
FEW_PICTURES = 20  # of a class, to train
FEW_TO_VALIDATE = 5  # of a class
SIZE_STEP = 32  # pixels
SMALLEST_SIZE = 32
LEFT_OUT_SHARE = 0.05  # of the pictures of an epoch, since batches are full ones


def some(texts: Sequence[str]) -> str:
    """The first few of a list, and how many there are beside."""
    rest = len(texts) - LISTED
    return ", ".join(texts[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def paths_of(pictures: Sequence[Seen]) -> str:
    """The first few of some pictures by their paths."""
    return some([each.path for each in pictures])


def twins_of(survey: Survey, twins: Twins) -> str:
    """A group of pictures that are the same, by their paths."""
    return " = ".join(survey.seen[place].path for place in twins.pictures[: LISTED + 1])


def wrong_labels(survey: Survey) -> Finding | None:
    """The same picture in two classes."""
    found = [each for each in survey.twins if each.between_classes]
    if not found:
        return None
    return Finding(
        f"{plural(len(found), 'picture')} in two classes",
        f"{some([twins_of(survey, each) for each in found])}.",
        "At least one label of each is wrong: look at them below, and delete or move it.",
    )


def leaks(survey: Survey) -> Finding | None:
    """The same picture to train and to validate."""
    found = [each for each in survey.twins if each.between_parts]
    if not found:
        return None
    known = {
        place for each in found for place in each.pictures if survey.seen[place].part == VALIDATION
    }
    of_all = len(survey.of_part(VALIDATION))
    return Finding(
        f"{plural(len(known), 'validation picture')} known from training",
        f"{len(known)} of {of_all} ({percent(len(known) / of_all)}) are in training, too: "
        f"{some([twins_of(survey, each) for each in found])}. The accuracy will look better than "
        "it is.",
        "Keep each picture once: delete the copies.",
    )


def copies(survey: Survey) -> Finding | None:
    """The same picture twice in a class, in one part."""
    found = [each for each in survey.twins if not each.between_parts and not each.between_classes]
    if not found:
        return None
    exact = sum(each.exact for each in found)
    kinds = f"{exact or 'None'} of them to the pixel"
    where = "in its class" if len(found) == 1 else "in their classes"
    return Finding(
        f"{plural(len(found), 'picture')} more than once {where}",
        f"{kinds}: {some([twins_of(survey, each) for each in found])}.",
        "Copies count twice, and --val-share could put them on both sides: delete all but one.",
    )


def nothing_validates(survey: Survey) -> Finding | None:
    """No pictures to validate with."""
    if survey.of_part(VALIDATION):
        return None
    return Finding(
        "No pictures to validate with",
        "How good the model gets is measured with pictures that it was not trained on.",
        f"--val-share {VAL_SHARE:g} keeps a fifth of each class apart.",
    )


def imbalance(survey: Survey) -> Finding | None:
    """Classes with far fewer pictures than others."""
    rows = [row for row in survey.rows if row.train]
    if not rows or survey.imbalance < IMBALANCED:
        return None
    small, *_, large = sorted(rows, key=lambda row: row.train)
    return Finding(
        f"{survey.imbalance:.1f} times as many pictures of {large.name} as of {small.name}",
        f"{large.train} and {small.train} to train on. A model errs towards what it sees often.",
        "--class-weights balanced lets each class count alike; lower --lr if the loss jumps then. "
        "More pictures are better.",
    )


def few_pictures(survey: Survey) -> Finding | None:
    """Classes with so few pictures that little can be learnt, or measured."""
    rows = [row for row in survey.rows if row.train < FEW_PICTURES]
    if rows:
        names = some([f"{row.name} ({row.train})" for row in rows])
        return Finding(
            f"Few pictures of {plural(len(rows), 'class')}",
            f"Fewer than {FEW_PICTURES} to train on: {names}.",
            "Start from trained weights (--recipe finetune), and add pictures where you can.",
        )
    few = [row for row in survey.rows if 0 < row.validation < FEW_TO_VALIDATE]
    if few:
        names = some([f"{row.name} ({row.validation})" for row in few])
        return Finding(
            "Few pictures to validate with",
            f"Fewer than {FEW_TO_VALIDATE}: {names}. The accuracy of such a class is chance.",
            "Keep more of them apart, with a larger --val-share or in the folder val.",
        )
    return None


def broken_pictures(survey: Survey) -> Finding | None:
    """Files that cannot be read."""
    if not survey.broken:
        return None
    return Finding(
        f"{plural(len(survey.broken), 'broken picture')}",
        f"{paths_of(survey.broken)}.",
        "Training leaves out one in a thousand, and stops at more: delete them, or copy them anew.",
    )


def small_pictures(survey: Survey) -> Finding | None:
    """Pictures that are smaller than what the model gets to see."""
    if not survey.tiny:
        return None
    size = fitting_size(survey)
    smaller = f"--image-size {size} suits most of them and is quicker. " if size else ""
    return Finding(
        f"{plural(len(survey.tiny), 'picture')} enlarged more than twice",
        f"The model sees {survey.image_size} px; these have less than half of that: "
        f"{paths_of(survey.tiny)}.",
        f"{smaller}Larger ones, if you have them, show more.",
    )


def fitting_size(survey: Survey) -> int | None:
    """An image size for pictures most of which are smaller than a run's; else None."""
    if not survey.sides:
        return None
    usual = survey.sides[len(survey.sides) // 2]
    size = max(SMALLEST_SIZE, SIZE_STEP * round(usual / SIZE_STEP))
    return size if size < survey.image_size else None


def huge_pictures(survey: Survey) -> Finding | None:
    """Pictures that take long to decode."""
    if not survey.huge:
        return None
    return Finding(
        f"{plural(len(survey.huge), 'huge picture')}",
        f"More than 40 megapixels: {paths_of(survey.huge)}.",
        "Each takes a third of a second or more to decode, in every epoch: save them smaller.",
    )


def others_left_out(survey: Survey) -> Finding | None:
    """Files and folders that are no picture of a class."""
    if not survey.left_out:
        return None
    kinds: dict[str, list[str]] = {}
    for kind, path in survey.left_out:
        kinds.setdefault(kind, []).append(path)
    texts = [f"{plural(len(paths), kind)} ({paths[0]})" for kind, paths in kinds.items()]
    return Finding(
        f"{plural(len(survey.left_out), 'thing')} left out",
        f"{'; '.join(texts)}.",
        "If they are pictures, put each into its class's folder, as .jpg or .png.",
    )


def incomplete_batch(survey: Survey, settings: Settings) -> Finding | None:
    """Many pictures that each epoch leaves out, since its steps are full."""
    count = sum(bool(each.look) for each in survey.of_part(TRAIN))
    asked, better = (
        fitted_batch(settings, count),
        fitted_batch(dataclasses.replace(settings, fit_batch=True), count),
    )
    left, fewer = (count % size for size in (asked, better))
    if count < asked or left <= LEFT_OUT_SHARE * count or fewer >= left:
        return None
    return Finding(
        f"{left} of {count} pictures left out of each epoch",
        f"Batches have {asked} pictures; others are left over in each epoch.",
        f"-b {better} leaves out {fewer}.",
    )


def not_compared(survey: Survey) -> Finding | None:
    """Pictures of which only exact copies were looked for."""
    if not survey.not_compared:
        return None
    reason, to_do = "They are too even: a perceptual hash would be chance.", ""
    if not survey.can_compare:
        reason = "The package imagehash, which finds others, is not installed."
        to_do = "pip install imagehash"
    elif survey.not_compared > MOST_COMPARED:
        reason = f"More than {MOST_COMPARED} pictures take too long to compare with each other."
    return Finding(
        f"Only exact copies looked for of {plural(survey.not_compared, 'picture')}", reason, to_do
    )


def find(survey: Survey, settings: Settings) -> list[Finding]:
    """What there is to do first, then what is well."""
    found = [
        wrong_labels(survey),
        leaks(survey),
        copies(survey),
        broken_pictures(survey),
        nothing_validates(survey),
        imbalance(survey),
        few_pictures(survey),
        small_pictures(survey),
        huge_pictures(survey),
        others_left_out(survey),
        incomplete_batch(survey, settings),
        not_compared(survey),
    ]
    found = sorted(filter(None, found), key=lambda one: not one.to_do)
    if not any(one.to_do for one in found):
        checked = "No broken picture, none twice, enough of each class to train and to validate."
        found.insert(0, Finding("Ready to train", checked))
    return found


def advised(survey: Survey, asked: Settings) -> Settings:
    """The settings of the training that these pictures suggest, on top of those `asked` for."""
    changes: dict[str, Any] = {}
    if not survey.of_part(VALIDATION):
        changes["val_share"] = VAL_SHARE
    if imbalance(survey):
        changes["class_weights"] = BALANCED
    if 2 * len(survey.tiny) > len(survey.looks) and (size := fitting_size(survey)):
        changes["image_size"] = size
    return dataclasses.replace(asked, **changes)
