"""The `find-lr` command: a range test of the learning rate."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from torch.optim import lr_scheduler

from split_affinity.errors import RunError
from split_affinity.models.freezing import mostly_frozen
from split_affinity.models.weights import versioned
from split_affinity.options.settings import Settings, batches_in_step
from split_affinity.reports.log import picture_footer
from split_affinity.reports.plots import RangeTest, draw_range_test
from split_affinity.reports.tables import RANGE_PLOT, describe_run
from split_affinity.terminal import say, warn
from split_affinity.training.optimizer import steps_in_epoch
from split_affinity.training.steps import (
    Diverged,
    Run,
    StepResult,
    check_between_steps,
    run_schedule,
)

RANGE, RANGE_STEPS = (1e-6, 10.0), 100


def quarter_decade(rates: Sequence[float]) -> int:
    """In how many steps rates that rise by the same factor rise by a quarter of a decade."""
    return int(0.25 / math.log10(rates[1] / rates[0]) + 1e-6) if len(rates) > 1 else 0


def judge_rates(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """The smoothed losses, and a tenth of the rate at which they rise for good, if clear."""
    near = quarter_decade(rates)
    # Each loss becomes the median of those up to a quarter of a decade away, in however many steps.
    windows = [losses[max(0, i - near) : i + near + 1] for i in range(len(losses))]
    smoothed = tuple(map(statistics.median, windows))
    # A clear difference is a tenth of the first loss, and more than chance: five times the usual
    # change from one step to the next, less with more losses in a median (2.6 times in 100 steps).
    changes = [abs(b - a) / (max(a, b) or 1.0) for a, b in itertools.pairwise(losses)]
    chance = 5 * statistics.median(changes or [1.0]) / (2 * near + 1) ** (1 / 3)
    clear = smoothed[0] * max(0.1, chance)
    end = len(rates)
    for i, low in enumerate(itertools.accumulate(smoothed, min)):
        if min(smoothed[i : i + near + 1]) > low + clear:  # for a quarter of a decade
            end = i
            break  # a second valley counts for nothing
    if min(smoothed[:end]) > smoothed[0] - clear:  # the loss has not fallen before
        return RangeTest(tuple(rates), smoothed, None)
    edge = math.sqrt(rates[end - 1] * rates[min(end, len(rates) - 1)])
    return RangeTest(tuple(rates), smoothed, edge / 10)


def range_test(run: Run) -> RangeTest:
    """Learning rate range test (Smith, arXiv 1506.01186); leaves the model as it was.

    The rate rises from 1e-6 to 10, by the same factor after each of `steps` steps (100). The test
    ends early when the median loss of half a decade is four times the lowest such median.
    """
    settings, train_state = run.settings, run.train_state
    model, optimizer = train_state.network.model, train_state.optimizer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count = settings.steps or RANGE_STEPS
    low, high = RANGE
    highest = optimizer.param_groups[0]["initial_lr"]
    for group in optimizer.param_groups:
        # The body's rate stays a part of the classifier's.
        part = group["initial_lr"] / highest if highest else 1.0
        group["lr"] = group["initial_lr"] = part * low
    factor = (high / low) ** (1 / max(1, count - 1))
    train_state.scheduler = lr_scheduler.ExponentialLR(optimizer, factor)
    rates, losses, medians = [], [], []
    with contextlib.suppress(Diverged):  # the test is looking for that
        for result in itertools.islice(endless_steps(run), count):
            check_between_steps(run)
            run.stop.begin("this step", result.step_s)
            rates.append(result.lr)
            losses.append(result.loss)
            medians.append(statistics.median(losses[-2 * quarter_decade(rates) - 1 :]))
            say(f"lr {result.lr:.2e}: loss {result.loss:.4f}, smoothed {medians[-1]:.4f}")
            if medians[-1] > 4 * min(medians):
                break
    model.load_state_dict(versioned(before, model))
    if not losses:
        raise RunError("find-lr: the loss is not finite even in the first step")
    return judge_rates(rates, losses)


def endless_steps(run: Run) -> Iterator[StepResult]:
    """Optimizer steps over epoch after epoch."""
    for epoch in itertools.count(1):
        whole = steps_in_epoch(run.settings, len(run.train)) * batches_in_step(run.settings)
        batches = run.train.batches(run.bad, epoch, 0, whole)
        yield from run_schedule(run.settings, run.lanes, run.train_state, batches)


def range_test_settings(settings: Settings) -> Settings:
    """The settings of a run to try out learning rates: no epochs, frozen as most of the run."""
    others = {"freeze": mostly_frozen(settings), "freeze_epochs": None}
    others |= {"epochs": None, "lr_warmup_epochs": 0, "model_ema": False}
    return dataclasses.replace(settings, **others)


def find_lr_and_report(run: Run) -> RangeTest:
    """The `find-lr` command in a run that is set up: the test, its suggestion, and the plot."""
    result = range_test(run)
    if run.ranks.rank:
        return result
    for text in run.bad.messages:
        warn(f"{text}: left out")
    if result.suggestion:
        rate = f"--lr {result.suggestion:.2g}"
        say(f"suggestion: {rate}, a tenth of the rate up to which the loss stays low")
    else:
        say("no suggestion: the loss did not fall clearly before it rose; try more --steps")
    if folder := run.settings.output_dir:
        folder.mkdir(parents=True, exist_ok=True)
        title, footer = describe_run(run.settings), picture_footer(run.topology)
        draw_range_test(folder / RANGE_PLOT, title, result, footer)
    return result
