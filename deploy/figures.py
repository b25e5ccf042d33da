"""How good a model is, from what it made of each validation image: shares with intervals, figures
by class, calibration, and the pictures worth looking at. Pure functions of tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from checkpoint import needed_packages

from split_affinity.errors import RunError
from split_affinity.reports.confusion import worst_pairs
from split_affinity.reports.tables import tells_top5
from split_affinity.training.network import Confusion

with needed_packages():
    from scipy import stats
    from torchmetrics.functional.classification import binary_calibration_error

LEVEL = 0.95  # of intervals
BINS = 15  # of the reliability curve, as in Guo et al. 2017 (arXiv 1706.04599)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Judged:
    """What a model made of images, a row for each, in tensors (n,): its number in the data set, its
    true and its predicted class, whether the true one is among the first five, the loss in nats,
    and the probabilities of the predicted and of the true class.
    """

    numbers: torch.Tensor
    true: torch.Tensor
    predicted: torch.Tensor
    in_top5: torch.Tensor
    loss: torch.Tensor
    p_predicted: torch.Tensor
    p_true: torch.Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def right(self) -> torch.Tensor:
        """Whether the predicted class is the true one, (n,)."""
        return self.true == self.predicted


def judge(logits: torch.Tensor, true: torch.Tensor, numbers: torch.Tensor) -> Judged:
    """What logits (n, classes) say of images of these true classes (n,)."""
    first = logits.topk(min(5, logits.shape[1])).indices  # as the trainer counts right answers
    loss = torch.nn.functional.cross_entropy(logits, true, reduction="none")
    shares = logits.softmax(1)
    p_predicted, p_true = (shares.gather(1, each[:, None])[:, 0] for each in (first[:, 0], true))
    in_top5 = (first == true[:, None]).any(1)
    return Judged(numbers, true, first[:, 0], in_top5, loss, p_predicted, p_true)


def combine_judged(parts: Sequence[Judged]) -> Judged:
    """The rows of several batches in one. Raises RunError if a loss is no finite number."""
    names = [each.name for each in dataclasses.fields(Judged)]
    judged = Judged(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
    if not judged.loss.isfinite().all():
        raise RunError("the model's answers are no finite numbers: its training diverged")
    return judged


@dataclass(frozen=True)
class Share:
    """`count` of `of` things, at least one of which there is."""

    count: int
    of: int

    @property
    def value(self) -> float:
        """The share itself, from 0 to 1."""
        return self.count / self.of

    def interval(self, level: float = LEVEL, method: str = "wilson") -> Interval:
        """An interval of the share in all that these were drawn from, Wilson's (1927) or another of
        scipy's.
        """
        found = stats.binomtest(self.count, self.of).proportion_ci(level, method)
        return float(found.low), float(found.high)

    @functools.cached_property
    def ends(self) -> Interval:
        """Wilson's interval of 95 %."""
        return self.interval()


@dataclass(frozen=True)
class Scores:
    """How good a model is over all: shares of right answers (no top-5 where it tells nothing), the
    mean loss in nats and its interval (None of a single image), and what guessing would get.
    """

    top1: Share
    top5: Share | None
    loss: float
    loss_ends: Interval | None
    chance: float


def mean_interval(values: torch.Tensor) -> Interval | None:
    """The normal interval of a mean of values (n,); None of a single one."""
    if len(values) < 2:
        return None
    error = values.double().std().item() / math.sqrt(len(values))
    mean, width = values.double().mean().item(), stats.norm.ppf((1 + LEVEL) / 2) * error
    return mean - width, mean + width


def scores_of(judged: Judged, classes: int) -> Scores:
    """The scores over all images."""
    top1, top5 = (Share(int(hits.sum()), len(judged)) for hits in (judged.right, judged.in_top5))
    loss, ends = judged.loss.double().mean().item(), mean_interval(judged.loss)
    ends = ends and (max(0.0, ends[0]), ends[1])  # no loss is below
    return Scores(top1, top5 if tells_top5(classes) else None, loss, ends, 1 / classes)


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class: of its images the share that were recognised, which is its accuracy and
    its recall; of the answers that named it the share that were right, its precision. None where
    there were no images, or no such answers.
    """

    index: int
    name: str
    recall: Share | None
    precision: Share | None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall."""
        if not self.recall or not self.precision:
            return None
        return 2 * self.recall.count / (self.recall.of + self.precision.of)


def class_figures(judged: Judged, classes: Sequence[str]) -> list[ClassFigures]:
    """Figures of each class, those with the lowest accuracy first, those without images last."""
    labels = judged.true[judged.right], judged.true, judged.predicted
    counts = (torch.bincount(each, minlength=len(classes)).tolist() for each in labels)
    found = []
    for index, (hits, images, answers) in enumerate(zip(*counts, strict=True)):
        recall, precision = (Share(hits, n) if n else None for n in (images, answers))
        found.append(ClassFigures(index, classes[index], recall, precision))
    return sorted(found, key=lambda one: one.recall.value if one.recall else math.inf)


@dataclass(frozen=True)
class Bin:
    """Images whose answer came with about the same confidence: its mean, and the right answers."""

    confidence: float
    right: Share


@dataclass(frozen=True)
class Calibration:
    """Whether a model's probabilities can be taken at their word: the reliability curve, the
    expected calibration error, and the mean confidence, all from 0 to 1.
    """

    bins: Sequence[Bin]
    error: float
    confidence: float


def calibration_of(judged: Judged) -> Calibration:
    """The calibration of the predicted classes' probabilities, in bins of equal width."""
    places = (judged.p_predicted * BINS).long().clamp(max=BINS - 1)
    bins = []
    for place in places.unique().tolist():
        here = places == place
        right = Share(int(judged.right[here].sum()), int(here.sum()))
        bins.append(Bin(judged.p_predicted[here].double().mean().item(), right))
    error = binary_calibration_error(judged.p_predicted, judged.right.long(), BINS, "l1").item()
    return Calibration(bins, error, judged.p_predicted.double().mean().item())


def confusion_of(judged: Judged) -> Confusion:
    """How many images of each class were taken for which."""
    return Confusion(zip(judged.true.tolist(), judged.predicted.tolist(), strict=True))


def readable_matrix(confusion: Confusion, count: int, most: int) -> list[int]:
    """The classes that a matrix of at most `most` of them shows: all, or those that were confused
    in the most images, in their own order.
    """
    if count <= most:
        return list(range(count))
    wrong: Counter[int] = Counter()
    for pair, images in worst_pairs(confusion):
        wrong.update(dict.fromkeys(pair, images))
    return sorted(index for index, _ in wrong.most_common(most))


def best_and_worst(judged: Judged, index: int, count: int) -> tuple[list[int], list[int]]:
    """The rows of a class's images with the highest and with the lowest probabilities of the class,
    up to `count` of each, none in both.
    """
    rows = (judged.true == index).nonzero()[:, 0]
    order = rows[judged.p_true[rows].argsort(descending=True, stable=True)].tolist()
    best = order[:count]
    return best, order[len(best) :][::-1][:count]


def confused_rows(judged: Judged, true: int, predicted: int, count: int) -> list[int]:
    """The rows of a class's images that were taken for another, the surest mistakes first."""
    rows = ((judged.true == true) & (judged.predicted == predicted)).nonzero()[:, 0]
    return rows[judged.p_predicted[rows].argsort(descending=True, stable=True)].tolist()[:count]
