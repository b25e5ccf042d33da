"""The weights of classes in the loss, `--class-weights`: balanced or from a file, and in words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from split_affinity.data.classes import match_classes
from split_affinity.data.pictures import ImageData
from split_affinity.errors import UserError
from split_affinity.options.settings import BALANCED, Settings
from split_affinity.text import did_you_mean, plural, readable

LARGEST_FILE_BYTES = 2**24  # a million classes
LONGEST_NAME = 255  # of a folder
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
LONGEST_LIST = 60  # characters of a line that lists the weights of all classes


def find_class_weights(settings: Settings, data: ImageData) -> tuple[float, ...] | None:
    """The weight of each class that a model knows; None without `--class-weights`.

    Their mean over the images that are trained on is 1. Before they are scaled so, a class that the
    file does not name has 1. Raises UserError for a file of something else.
    """
    asked = settings.class_weights
    if asked is None or settings.test_only:
        return None
    targets = data.train.targets
    images = Counter(int(targets[index]) for index in data.chosen)
    if asked == BALANCED:
        found = balanced_weights(images)
    else:
        found = read_class_weights(asked, data.classes, f"--data-path {settings.data_path}")
        total = sum(count * found.get(number, 1.0) for number, count in images.items())
        scale = len(data.chosen) / total
        found = {number: scale * found.get(number, 1.0) for number in range(len(data.classes))}
    known = settings.num_classes or len(data.classes)
    return tuple(found.get(number, 1.0) for number in range(known))


def balanced_weights(images: Counter[int]) -> dict[int, float]:
    """Weights by which all classes count the same, by the images of each.

    As `compute_class_weight` of scikit-learn: n / (k * n_c) for n images of k classes.
    """
    total = sum(images.values())
    return {number: total / (len(images) * count) for number, count in images.items()}


def read_class_weights(asked: str, classes: Sequence[str], known_from: str) -> dict[int, float]:
    """The weights of a JSON file, {"class": weight, ...}, by the numbers of the classes.

    Names are matched as by `match_classes`. Raises UserError; `known_from` says whose the classes
    are.
    """
    flag = f"--class-weights {asked}"
    try:
        with Path(asked).open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        hint = did_you_mean(asked, [BALANCED])
        raise UserError(f"{flag}: cannot be read: {error.strerror}{hint}") from None
    if len(content) > LARGEST_FILE_BYTES:
        raise UserError(f"{flag}: larger than {LARGEST_FILE_BYTES} bytes, the most allowed")
    try:
        pairs = json.loads(content, object_pairs_hook=tuple)  # a dict would hide repeated names
    except (ValueError, RecursionError):
        pairs = None
    if type(pairs) is not tuple or not pairs:
        raise UserError(f'{flag}: not JSON of the form {{"class": weight, ...}}')
    names = [readable(name) for name, _ in pairs]
    names = [name if len(name) <= LONGEST_NAME else f"{name[:60]}..." for name in names]
    try:
        numbers = match_classes(names, classes, known_from)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if twice := [number for number, count in Counter(numbers).items() if count > 1]:
        raise UserError(f"{flag}: class {classes[twice[0]]} is there twice")
    found = dict(zip(numbers, (weight for _, weight in pairs), strict=True))
    for number, weight in found.items():
        if type(weight) not in (int, float) or not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            shown = f"{weight!r:.40}" if isinstance(weight, (str, int, float)) else "no number"
            allowed = f"numbers from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g} are allowed"
            raise UserError(f"{flag}: the weight of {classes[number]} is {shown}: {allowed}")
    return found


def weights_text(weights: Sequence[float], classes: Sequence[str]) -> str:
    """The weights of all classes, in words; of many the lowest and the highest one."""
    each = [
        f"{name} {weight:.3g}" for name, weight in zip(classes, weights, strict=False)
    ]  # a model may know more classes than the data
    if len(text := ", ".join(each)) <= LONGEST_LIST:
        return text
    order = sorted(range(len(classes)), key=weights.__getitem__)
    low, high = (f"{weights[number]:.3g} ({classes[number]})" for number in (order[0], order[-1]))
    return f"{low} to {high}, of {plural(len(classes), 'class')}"
