"""Validation after an epoch, and `--test-only`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import torch

from split_affinity.checkpoints.folder import Checkpoints
from split_affinity.checkpoints.resume import check_classes, find_resumed, fit_errors
from split_affinity.checkpoints.state import Progress, SavedState
from split_affinity.data.classes import named_classes
from split_affinity.errors import UserError
from split_affinity.files import append_text
from split_affinity.models.freezing import begin_training
from split_affinity.models.weights import versioned
from split_affinity.options.settings import Settings
from split_affinity.reports.confusion import class_lines, confusion_tables, write_confusion
from split_affinity.reports.contents import files_line
from split_affinity.reports.log import LOG_HEADER, picture_footer, tested_section, where_logged
from split_affinity.reports.run_report import RunReport
from split_affinity.reports.tables import EPOCH_FIELDS, PARTS, describe_run, tells_top5
from split_affinity.runs.known_images import warn_of_known_images
from split_affinity.runs.unlike import threshold_figures
from split_affinity.terminal import say, say_lines, warn
from split_affinity.text import plural, readable, utc_now
from split_affinity.training.network import Confusion, Scores, combine_scores, interleave
from split_affinity.training.steps import Run
from split_affinity.training.update import MovingAverage

VALIDATED_AHEAD = 3  # batches that are with the lanes, or wait there


def validate_batches(
    run: Run,
) -> Iterator[tuple[list[Scores], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The scores of each validation batch, the predicted classes, the likeness, the true classes.

    Each lane takes batches in proportion to its threads. Raises Stopped between two batches.
    """
    taken = dict.fromkeys((run.lanes.forward, run.lanes.backward), 0)
    waiting: deque[tuple[Future, torch.Tensor]] = deque()
    batches = run.val.batches(run.bad)
    run.stop.begin("this batch")
    try:
        while batches.left or waiting:
            run.stop.check()
            if batches.left and len(waiting) <= VALIDATED_AHEAD:
                batch = next(batches)
                lane = min(taken, key=lambda lane: (taken[lane] + 1) / lane.group.threads)
                taken[lane] += 1
                waiting.append((lane.submit("validate", run.train_state.evaluate, batch), batch[1]))
            else:
                future, targets = waiting.popleft()
                yield *future.result(), targets
    finally:  # no phase runs on, after an error either
        for future, _ in waiting:
            if not future.cancel():
                future.exception()  # waits


def evaluate(
    run: Run,
    report: RunReport | None = None,
    confusion: Confusion | None = None,
    likeness: list[float] | None = None,
) -> list[Scores]:
    """The validation scores of the moving average, if there is one, and of the model's own weights.

    The first of them fills `confusion`, and `likeness`, in any order. Ranks share the images.
    """
    scores: list[list[Scores]] = []
    run.train_state.network.model.eval()
    try:
        with (
            run.train_state.with_mean_buffers(),
            run.train_state.folded_norms(),
            run.ranks.together(),
            contextlib.closing(validate_batches(run)) as batches,
        ):
            for result, predicted, alike, targets in batches:
                scores.append(result)
                if likeness is not None:
                    likeness += alike.tolist()
                if confusion is not None:
                    confusion.update(zip(targets.tolist(), predicted.tolist(), strict=True))
    finally:
        begin_training(run.train_state.network.model)
        records = run.lanes.take_records()
    if report:
        report.check_placement(records)
    if confusion is not None:
        total = sum(run.ranks.gather_objects(confusion), Confusion())
        confusion.clear()
        confusion.update(total)
    if likeness is not None:
        likeness[:] = itertools.chain(*run.ranks.gather_objects(likeness))
    return [
        combine_scores(each)
        for each in zip(*interleave(run.ranks.gather_objects(scores)), strict=True)
    ]


def finish_epoch(run: Run, progress: Progress, report: RunReport) -> None:
    """Validate, if there are images for that, and enter the figures of the epoch."""
    loss = progress.loss_sum / progress.images
    parts = {"train": Scores(loss, progress.images, progress.top1, progress.top5)}
    unlike = {}
    if run.val:
        likeness: list[float] = []
        parts |= zip(("val", "val_raw"), evaluate(run, report, likeness=likeness), strict=False)
        unlike = threshold_figures(likeness)
        report.contention(run.lanes.monitor.look())
    row = {
        "epoch": progress.epoch + 1,
        **dict.fromkeys(EPOCH_FIELDS),
        **{
            f"{part}_{name}": value
            for part, scores in parts.items()
            for name, value in scores.figures().items()
        },
        **unlike,
        "lr": progress.lr,
        "gradient_norms": run.train_state.gradient_norms.pop_means()
        if run.train_state.gradient_norms
        else {},
        "timestamp": utc_now(),
    }
    for part, scores in parts.items():
        if not math.isfinite(scores.loss):
            row[f"{part}_loss"] = None  # JSON has no such number
            text = f"epoch {row['epoch']}: the {PARTS[part]} loss is {scores.loss}"
            report.warn(f"{part}_loss", text)
    progress.end_epoch(row, run.settings.keep_best)
    report.bad_images(run.bad)
    report.epoch(row, progress.history)


def load_to_test(run: Run, path: Path, saved: SavedState) -> tuple[int, str]:
    """Load the weights of a checkpoint, and its moving average if it has one.

    Returns how many of the images it was trained on, and which checkpoint it is, in words.
    """
    for name in ("model", "num_classes"):
        ours, theirs = getattr(run.settings, name), saved["settings"].get(name)
        if ours != theirs:
            raise UserError(f"--{name.replace('_', '-')} {ours}: {path} has {theirs}")
    check_classes(path, saved, run.data.classes)
    with fit_errors(path, run.settings):
        model = run.train_state.network.model
        model.load_state_dict(versioned(saved["average"] or saved["model"], model))
        run.train_state.average = MovingAverage(model, 0.0) if saved["average"] else None
        model.load_state_dict(versioned(saved["model"], model))
    text = f"{path}: epoch {saved['progress']['epoch']}, step {saved['progress']['step']}"
    say_lines([text])
    return 0 if run.ranks.rank else warn_of_known_images(path, saved, run.data), text


def evaluate_and_report(run: Run, asked: Settings) -> None:
    """Evaluate the checkpoint of --resume, or --weights; print, write and log what it confuses."""
    settings, ranks = run.settings, run.ranks
    name, confusion, known = f"--weights {settings.weights}", Confusion(), 0
    tested = name  # in more words
    with contextlib.closing(Checkpoints(settings, warn, ranks=ranks)) as checkpoints:
        if found := ranks.on_rank_0(find_resumed, settings, checkpoints):
            known, tested = load_to_test(run, *found)
            name = readable(str(found[0]))
        elif settings.weights:
            say(run.train_state.network.note)
        else:
            raise UserError(f"--test-only: no checkpoint in {settings.output_dir}")
        scores = evaluate(run, confusion=confusion)
    if ranks.rank:
        return
    broken = [f"{text}: left out" for text in run.bad.messages]
    for text in broken:
        warn(text)
    classes = named_classes(run.data.classes, settings.num_classes)
    text = "loss {loss:.4f}, top-1 {top1:.2f} %"
    text += ", top-5 {top5:.2f} %" if tells_top5(len(classes)) else ""
    figures, *raw = (text.format_map(each.figures()) for each in scores)
    figures += f" ({known} of the images were trained on)" if known else ""
    lines = [f"{plural(scores[0].images, 'image')}: {figures}, computed in {settings.precision}"]
    lines += [f"raw, without the moving average: {each}" for each in raw]
    say("\n".join([*lines, "", *class_lines(confusion, classes), ""]))
    if settings.output_dir:
        title = f"{describe_run(settings)}: {figures}"
        footer = picture_footer(run.topology)
        files = write_confusion(settings.output_dir, title, confusion, classes, name, footer)
        say_lines([files_line(settings.output_dir, files)])
        lines.append(f"files: {', '.join(files)}")
    results = [f"tested: {tested}; {settings.image_size} px, {settings.precision}", *lines]
    section = tested_section(run, asked, results, broken, confusion_tables(confusion, classes))
    append_text(settings.log_file, section, LOG_HEADER)
    say_lines(where_logged(settings.log_file))
    if not settings.output_dir:
        say("note: no confusion matrix is drawn without --output-dir")
