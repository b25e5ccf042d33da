"""What to do next, from figures alone. Each rule is a pure function that returns what it found,
with the figures that say so, or None where they say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from figures import LEVEL, Calibration, ClassFigures, Judged, Scores, Share

from split_affinity.checkpoints.state import best_epoch
from split_affinity.options.settings import Settings
from split_affinity.reports.confusion import images_by_class, worst_pairs
from split_affinity.reports.page import Finding
from split_affinity.text import as_option, percent, plural
from split_affinity.training.network import Confusion

LISTED = 5  # classes or pairs in a sentence
FEWEST_IMAGES = 3  # of a pair: one or two are chance
GAP_POINTS = 10  # of top-1, between training and validation
FITTED_TOP1 = 90.0  # percent
LOSS_RISE = 1.1
LEAST_MISCALIBRATION = 0.01
SURE = 0.99
WIDE_POINTS = 5

NO_SIGN = (
    f"The validation loss is less than {LOSS_RISE - 1:.0%} above its lowest, or the training loss "
    f"rose as well; training is not {GAP_POINTS} points ahead; and the two are not both below "
    f"{FITTED_TOP1:g} %."
)
# What is changed by advice, each with a usual value; and what values are when it is off.
AUGMENTATION = {"auto_augment": "ra", "mixup_alpha": 0.2, "random_erase": 0.25, "cutmix_alpha": 1.0}
SOFTENING = {"label_smoothing": 0.1, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}
OFF = (0, "none", None)
MORE_EPOCHS = "Train longer (--epochs)."

History = Sequence[dict[str, Any]]  # a row for each finished epoch, as in metrics.jsonl


def some(texts: Sequence[str]) -> str:
    """The first few of a list, and how many there are beside."""
    rest = len(texts) - LISTED
    return "; ".join(texts[:LISTED]) + (f"; and {rest} more" if rest > 0 else "")


def in_force(settings: Settings, names: Iterable[str]) -> list[str]:
    """Those of some settings that are on, as options with their values."""
    values = {name: getattr(settings, name) for name in names}
    return [as_option(name, value) for name, value in values.items() if value not in OFF]


def not_in_force(settings: Settings, usual: dict[str, Any]) -> list[str]:
    """Those of some settings that are off, as options with usual values."""
    return [as_option(name, usual[name]) for name in usual if getattr(settings, name) in OFF]


def more_variety(settings: Settings) -> str:
    """What helps against overfitting, of what was not done yet."""
    ways, decay = ["More training images"], settings.weight_decay
    if stronger := " or ".join(not_in_force(settings, AUGMENTATION)[:2]):
        ways.append(f"stronger augmentation ({stronger})")
    more_decay = f"more --weight-decay than {decay:g}" if decay else "--weight-decay 0.0001"
    best = "best.pt is from the epoch with the best top-1 already."
    return f"{', '.join(ways)} or {more_decay}; {best}"


def more_learning(settings: Settings) -> str:
    """What helps against underfitting, of what was not done yet."""
    ways = ["Train longer (--epochs)", "find a better learning rate (find-lr)"]
    if settings.freeze and not settings.freeze_epochs:
        ways.append(f"train all weights (without {as_option('freeze', settings.freeze)})")
    elif not settings.freeze:  # with it, they were trained before
        ways.append("begin with trained weights (--weights), if it did not")
    text = f"{', '.join(ways)}, or take a larger model"
    much = " and ".join(in_force(settings, ("color_jitter", *AUGMENTATION)))
    return f"{text}; or augment less than by {much}." if much else f"{text}."


def less_sure(settings: Settings) -> str:
    """What makes a model less sure, of what was not done yet."""
    softer = " or ".join(not_in_force(settings, SOFTENING)[:2])
    more = " or ".join(in_force(settings, SOFTENING))
    return f"Train with {softer or f'more than {more}'}, or believe it less."


def more_sure(settings: Settings) -> str:
    """What makes a model surer: less of what makes it unsure, if there was any."""
    less = " or ".join(in_force(settings, SOFTENING))
    return f"Train with less than {less}, or longer (--epochs)." if less else MORE_EPOCHS


def weak_classes(classes: Sequence[ClassFigures], scores: Scores) -> Finding | None:
    """Classes that are recognised less often than all images, by more than chance: even the upper
    end of their interval is below. It is the exact one (Clopper and Pearson 1934), as Wilson's is
    too short for a handful of images, and wider for more classes (Bonferroni), so that 95 of 100
    reports name none by chance.
    """
    known = [each for each in classes if each.recall]
    level = 1 - (1 - LEVEL) / max(1, len(known))
    texts = []
    for each in known:
        top = each.recall.interval(level, "exact")[1]
        if top < scores.top1.value:
            figures = f"{percent(each.recall.value)} of {plural(each.recall.of, 'image')}"
            texts.append(f"{each.name}: {figures}, at best {percent(top)}")
    if not texts:
        return None
    return Finding(
        f"{plural(len(texts), 'class')} below the average of {percent(scores.top1.value)}",
        f"{some(texts)}. Classes with so few images that it may be chance are not named.",
        "More, and more varied, training pictures of these classes help most; look at their worst "
        "predictions below for what they have in common.",
    )


def pairs_to_augment(
    confusion: Confusion,
    classes: Sequence[str],
    written: str | None = None,
    settings: Settings = Settings(),
) -> Finding | None:
    """The pairs that `--augment-confused` would take: those with at least half as many images as
    the worst; `written` is where confused.json is, if it was asked for.
    """
    pairs = worst_pairs(confusion)
    if not pairs or pairs[0][1] < FEWEST_IMAGES:
        return None
    totals, texts = images_by_class(confusion), []
    for (true, taken), images in pairs:
        if images >= pairs[0][1] / 2:
            share = Share(images, totals[true])
            texts.append(
                f"{classes[true]} taken for {classes[taken]} in {share.count} of {share.of} images "
                f"({percent(share.value)})"
            )
    title, figures = f"{plural(len(texts), 'pair')} of classes to augment", f"{some(texts)}."
    if settings.augment_confused:
        augmented = "It was trained with --augment-confused already: more pictures of them help."
        return Finding(title.replace("to augment", "that are confused"), figures, augmented)
    made = "" if written else "Have this report write the file (--confused confused.json), then "
    ready = f"{made}train with --augment-confused {written or 'confused.json'}"
    return Finding(
        title,
        figures,
        f"{ready[0].upper()}{ready[1:]}: images of these classes are then varied more strongly.",
    )


def rising_loss(lowest: dict[str, Any], last: dict[str, Any], settings: Settings) -> Finding | None:
    """Overfitting, by the losses of the epoch with the lowest validation loss and of the last."""
    rose = last["val_loss"] >= LOSS_RISE * lowest["val_loss"]
    if not rose or None in (lowest["train_loss"], last["train_loss"]):
        return None
    if last["train_loss"] >= lowest["train_loss"]:
        return None
    return Finding(
        "Overfitting: the validation loss rises",
        f"It was lowest in epoch {lowest['epoch']}, {lowest['val_loss']:.3g}, and is "
        f"{last['val_loss']:.3g} in epoch {last['epoch']}, {LOSS_RISE - 1:.0%} or more above it; "
        f"the training loss fell from {lowest['train_loss']:.3g} to {last['train_loss']:.3g}.",
        more_variety(settings),
    )


def judge_accuracies(train: float, val: float, told: str, settings: Settings) -> Finding | None:
    """Over- or underfitting, by top-1 in training and in validation, in percent."""
    if train - val >= GAP_POINTS:
        text = f"{told} The gap is {GAP_POINTS} points or more."
        return Finding("Overfitting: known images are easier", text, more_variety(settings))
    if max(train, val) < FITTED_TOP1 and abs(train - val) < GAP_POINTS:
        text = f"{told} Both are below {FITTED_TOP1:g} %, and less than {GAP_POINTS} points apart."
        return Finding("Underfitting", text, more_learning(settings))
    return None


def judge_fit(
    history: History, settings: Settings = Settings(), best: Sequence[tuple[float, int]] = ()
) -> Finding | None:
    """Over- or underfitting, by the curves. Where images are mixed in training (mixup, CutMix), its
    top-1 cannot be compared; `best` is as in Progress. None with fewer than two epochs.

    1. The validation loss is 10 % or more above its lowest, while the training loss fell: over.
    2. Training top-1 is 10 points or more above validation's: over.
    3. Both are below 90 %, and less than 10 points apart: under.
    4. The last epoch that was planned is the best: it was still learning.
    5. None of these.
    """
    rows = [row for row in history if None not in (row["val_top1"], row["val_loss"])]
    if len(rows) < 2:
        return None
    is_mixed, epochs = settings.mixup_alpha or settings.cutmix_alpha, settings.epochs
    last, lowest = rows[-1], min(rows, key=lambda row: row["val_loss"])
    train, val = last["train_top1"], last["val_top1"]
    shares = f"{val:.1f}\u00a0% of the validation images"
    shares += "" if is_mixed else f", {train:.1f}\u00a0% in training"
    told = f"Epoch {last['epoch']}, computed in {settings.precision}: right on {shares}."
    found = rising_loss(lowest, last, settings)
    if not found and not is_mixed:
        found = judge_accuracies(train, val, told, settings)
    if not found and last["epoch"] == epochs and last is best_epoch(history, best):
        text = f"{told} The last of {epochs} epochs was the best."
        found = Finding("Perhaps not at its end", text, MORE_EPOCHS)
    return found or Finding("Neither over- nor underfitting", f"{told} {NO_SIGN}")


def judge_calibration(
    found: Calibration, scores: Scores, settings: Settings = Settings()
) -> Finding:
    """Over- or under-confident: the mean confidence is beyond the interval of top-1, and a point or
    more from it.
    """
    low, high = scores.top1.ends
    beyond = found.confidence - scores.top1.value
    told = (
        f"Its mean confidence is {percent(found.confidence)}, and {percent(scores.top1.value)} of "
        f"its answers are right ({percent(low)} to {percent(high)}); the expected calibration "
        f"error is {percent(found.error)}."
    )
    if abs(beyond) < LEAST_MISCALIBRATION or low <= found.confidence <= high:
        return Finding("Its probabilities can be believed", told)
    if beyond > 0:
        return Finding("Over-confident", told, less_sure(settings))
    return Finding("Under-confident", told, more_sure(settings))


def sure_mistakes(judged: Judged) -> Finding | None:
    """Wrong answers of which the model is sure: the labels may be wrong."""
    wrong = ~judged.right
    sure = int((wrong & (judged.p_predicted >= SURE)).sum())
    if not sure:
        return None
    return Finding(
        "Sure, and wrong",
        f"{sure} of {plural(int(wrong.sum()), 'wrong answer')} came with a probability of "
        f"{SURE:.0%} or more.",
        "Look at these first: the picture may be in the wrong folder, or show two things.",
    )


def few_images(scores: Scores) -> Finding | None:
    """So few validation images that the next training can hardly be told from this one."""
    low, high = scores.top1.ends
    if 100 * (high - low) <= WIDE_POINTS:
        return None
    return Finding(
        "Few validation images",
        f"{plural(scores.top1.of, 'image')} leave top-1 between {percent(low)} and "
        f"{percent(high)}, more than {WIDE_POINTS} points.",
        "Smaller differences between two trainings are chance; four times as many images halve it.",
    )


def nothing_stands_out(scores: Scores, classes: Sequence[ClassFigures]) -> Finding:
    """That there is nothing to do, with the figures that say so."""
    low, high = scores.top1.ends
    text = (
        f"{scores.top1.count} of {plural(scores.top1.of, 'image')} are right "
        f"({percent(scores.top1.value)}; {percent(low)} to {percent(high)})"
    )
    known = [each for each in classes if each.recall]
    worst = min(known, key=lambda each: each.recall.value)
    if worst.recall.count < worst.recall.of:
        lowest = f"{worst.recall.count} of {plural(worst.recall.of, 'image')}"
        text += f", and of the class with the lowest accuracy, {worst.name}, {lowest}: not far less"
    return Finding(
        "Nothing stands out",
        f"{text}. No class is taken for another in {FEWEST_IMAGES} images or more, and no wrong "
        f"answer came with a probability of {SURE:.0%} or more.",
    )


def in_order(
    scores: Scores, classes: Sequence[ClassFigures], found: Sequence[Finding | None]
) -> list[Finding]:
    """What there is to do first, or that there is nothing; then what is well. That images are few
    says nothing of the model: it stands between.
    """
    known = [each for each in found if each]
    first = [each for each in known if each.to_do] or [nothing_stands_out(scores, classes)]
    between = filter(None, [few_images(scores)])
    return [*first, *between, *(each for each in known if not each.to_do)]
