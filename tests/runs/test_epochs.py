"""Runs over epochs: validation, averages, freezing, reasons to end.

Run: python -m pytest tests/runs/test_epochs.py
"""

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
import statistics
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cifar import accept, make_cifar_digits
from patching import set_everywhere
from small import as_loaded, needs_two_cpus, read_metrics, small_model
from small_runs import ALL_SCHEDULES, TINY, state_of, train, with_plan
from torch import nn

import train_split_affinity as script
from split_affinity import process_cpus
from split_affinity.checkpoints.state import Progress, best_epoch, read_checkpoint
from split_affinity.data.dataset import open_data
from split_affinity.data.loader import Batches
from split_affinity.data.transforms import validation_transform
from split_affinity.errors import RunError, UserError
from split_affinity.lanes.contention import Contention, ContentionMonitor
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import Group, plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.models.registry import OWN_MODELS
from split_affinity.reports.tables import epoch_line
from split_affinity.runs import evaluation
from split_affinity.runs.evaluation import validate_batches
from split_affinity.runs.setup import build_train_state
from split_affinity.signals import StopRequest
from split_affinity.training.network import Confusion, Scores
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.steps import run_schedule
from split_affinity.training.update import MovingAverage, TrainState
from train_split_affinity import reason_to_end, set_up

# Epochs


def test_what_a_run_over_epochs_writes(in_tmp, epochs):
    train(**epochs, output_dir=in_tmp / "out")
    lines = read_metrics(in_tmp / "out")
    one_epoch = ["step", "step", "step", "epoch"]
    assert [line["type"] for line in lines] == ["run", *one_epoch, *one_epoch, "summary"]
    log = (in_tmp / "logs.md").read_text()
    rows = read_metrics(in_tmp / "out", "epoch")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert "\n".join(["```", *map(epoch_line, rows), "```\n"]) in log
    for row in rows:
        assert f"\n{epoch_line(row)}\n" in log
        assert set(row["gradient_norms"]) == {"0", "1", "6"}, "the parts that have weights"
        assert all(norm > 0 for norm in row["gradient_norms"].values())
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["timestamp"])
    assert lines[-1]["outcome"] == "finished after 6 of 6 steps"
    state = state_of(in_tmp / "out")
    history = [{"type": "epoch", **row} for row in state["progress"]["history"]]
    assert history == rows
    for picture in ("curves.png", "gradients.png", "timeline.png"):
        assert (in_tmp / "out" / picture).stat().st_size > 10_000


@pytest.mark.parametrize("schedule", ["sequential", "delayed"])
@pytest.mark.alone
def test_others_are_looked_for_between_steps_and_after_a_validation(
    in_tmp, monkeypatch, no_pictures, epochs, schedule
):
    """While no phase runs, and outside of what is timed; and at the end, when all is done."""
    take, looks, ended = Lanes.take_records, itertools.count(1), []
    monkeypatch.setattr(Lanes, "take_records", lambda lanes: (ended.append(1), take(lanes))[1])

    def look(monitor, least_s=1.0):
        assert ended or least_s < 1, "the records of a step, or of a validation, are taken before"
        ended.clear()
        number = next(looks)
        return Contention(number - 1.0, float(number), {"all": 0.0}, 0.0) if number % 2 else None

    monkeypatch.setattr(ContentionMonitor, "look", look)
    train(**epochs, output_dir=in_tmp, schedule=schedule, workers=0)
    steps = read_metrics(in_tmp, "step")
    found = [line["contention"]["end_s"] if "contention" in line else None for line in steps]
    assert found == [1, None, 3, 5, None, 7], "the fourth and the eighth are of validations"
    assert next(looks) == 10
    (summary,) = read_metrics(in_tmp, "summary")
    assert summary["contention"]["end_s"] == 9.0


def test_the_training_figures_of_an_epoch_are_those_of_its_steps(in_tmp, no_pictures, epochs):
    train(**epochs, output_dir=in_tmp)
    steps, rows = read_metrics(in_tmp, "step"), read_metrics(in_tmp, "epoch")
    for row, own in zip(rows, (steps[:3], steps[3:]), strict=True):
        assert row["train_loss"] == pytest.approx(statistics.fmean(one["loss"] for one in own))
        assert row["train_top1"] == pytest.approx(100 * sum(one["top1"] for one in own) / 12)
        assert row["train_top5"] == 100, "of two classes"


def test_the_learning_rate_of_an_epoch_is_that_of_its_steps(in_tmp, no_pictures, epochs):
    settings = {"lr_scheduler": "multistep", "lr_milestones": (1,)}
    train(**epochs, **settings, output_dir=in_tmp)
    rates = [line["lr"] for line in read_metrics(in_tmp, "step")]
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 3)
    assert [row["lr"] for row in read_metrics(in_tmp, "epoch")] == [rates[2], rates[5]]


def test_a_step_of_batches_of_different_size(monkeypatch, one_lane_plan):
    """As when broken images are left out: an image counts, not a batch."""
    two = [Scores(1.0, 4, 3, 4), Scores(4.0, 2, 1, 2)]
    monkeypatch.setitem(SCHEDULES, "sequential", lambda lanes, train_state, batches: iter([two]))
    with Lanes(one_lane_plan, ()) as lanes:
        settings = dataclasses.replace(TINY, precision="fp32")
        train_state = build_train_state(settings, lanes)
        (result,) = run_schedule(settings, lanes, train_state, Batches([], 0), first_step=7)
    assert (result.step, result.loss, result.images) == (7, 2.0, 6)
    assert (result.top1, result.top5, result.lr) == (4, 6, 0.01)


def test_progress_adds_up_images():
    progress = Progress()
    progress.add_step(images=4, loss=1.0, top1=3, top5=4, batches=1)
    progress.add_step(images=2, loss=4.0, top1=1, top5=2, batches=1)
    assert (progress.step, progress.batches, progress.images) == (2, 2, 6)
    assert (progress.loss_sum, progress.top1, progress.top5) == (12.0, 4, 6)
    progress.begin_epoch()
    assert (progress.step, progress.epoch, progress.batches, progress.images) == (2, 1, 0, 0)
    assert (progress.loss_sum, progress.top1, progress.top5) == (0.0, 0, 0)


def test_the_best_epochs_come_first_and_early_ones_before_equals():
    progress = Progress()
    for top1 in (10.0, 30.0, 20.0, 30.0, None, 40.0):
        progress.end_epoch({"val_top1": top1}, keep_best=3)
    assert progress.best == [(40.0, 6), (30.0, 2), (30.0, 4)]
    assert len(progress.history) == 6


@pytest.mark.parametrize(
    ("top1", "losses", "best"),
    [
        ((30.0, 30.0, 30.0), (0.5, 0.2, 0.4), [2, 3, 1]),
        ((30.0, 30.0, 40.0), (0.5, 0.2, 9.0), [3, 2, 1]),  # top-1 goes first
        ((30.0, 30.0, 30.0), (0.2, 0.2, 0.1), [3, 1, 2]),
        ((30.0, 30.0, 30.0), (None, 5.0, None), [2, 1, 3]),  # a loss that was not finite
    ],
)
def test_of_epochs_with_equal_accuracy_that_with_the_lowest_loss_is_the_best(top1, losses, best):
    progress = Progress()
    for number, (value, loss) in enumerate(zip(top1, losses, strict=True), 1):
        progress.end_epoch({"epoch": number, "val_top1": value, "val_loss": loss}, keep_best=3)
    assert [epoch for _, epoch in progress.best] == best
    named = [best_epoch(progress.history, order) for order in ((), progress.best)]
    assert [row["epoch"] for row in named] == [best[0], best[0]]


def test_the_best_epoch_of_an_earlier_version_is_still_that_of_its_best_file():
    """It took the first of equals. The order is today's once an epoch more has been made."""
    rows = [
        {"epoch": number, "val_top1": 50.0, "val_loss": loss}
        for number, loss in enumerate((0.4, 0.2, 0.3), 1)
    ]
    progress = Progress(epoch=2, best=[(50.0, 1), (50.0, 2)], history=rows[:2])
    assert best_epoch(progress.history, progress.best) is rows[0]
    progress.end_epoch(rows[2], keep_best=2)
    assert progress.best == [(50.0, 2), (50.0, 3)]
    assert best_epoch(progress.history, progress.best) is rows[1]


def test_without_validation_images_there_are_no_validation_figures(
    in_tmp, no_pictures, epochs, photos
):
    train(**epochs | {"data_path": photos}, output_dir=in_tmp)
    for row in read_metrics(in_tmp, "epoch"):
        assert row["val_loss"] is row["val_top1"] is row["val_top5"] is None
        assert row["train_loss"] > 0
    assert "val_loss: -  val_top1: -  val_top5: -  timestamp: " in (in_tmp / "logs.md").read_text()
    assert not list(in_tmp.glob("best*"))


def validation_images(epochs):
    """All of them at once, as the program prepares them."""
    data = open_data(dataclasses.replace(TINY, **epochs))
    transform = validation_transform(data.native.overruled(TINY))
    pictures, targets = zip(*data.val, strict=True)
    return torch.stack([transform(picture) for picture in pictures]), torch.tensor(targets)


@ALL_SCHEDULES
def test_the_validation_is_of_the_weights_at_the_end_of_the_epoch(
    in_tmp, no_pictures, epochs, schedule, monkeypatch
):
    set_everywhere(monkeypatch, "LEAST_IMAGES", 12)
    asked = {"split": "even", "schedule": schedule, "accumulate": 2, "batch_size": 2}
    model = train(**epochs | asked, output_dir=in_tmp)
    assert model.training, "as it is left"
    images, targets = validation_images(epochs)
    with torch.inference_mode():
        logits = model.eval()(images)
    *_, row = read_metrics(in_tmp, "epoch")
    exponentials = [[*map(math.exp, each)] for each in logits.tolist()]
    expected = [max(each) / sum(each) for each in exponentials]
    assert row["unlike_threshold"] == pytest.approx(np.quantile(expected, 0.05), rel=1e-5)
    assert (row["unlike_score"], row["unlike_images"]) == ("msp", 12)
    assert row["val_loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    assert row["val_top1"] == pytest.approx(100 * (logits.argmax(1) == targets).sum().item() / 12)


def test_an_evaluation_weighs_images_and_not_batches(in_tmp, epochs):
    """Twelve images in batches of five: the last batch has two."""
    settings = dataclasses.replace(TINY, **epochs | {"batch_size": 5})
    images, targets = validation_images(epochs)
    with with_plan(set_up, settings) as run:
        confusion, likeness = Confusion(), []
        (result,) = evaluation.evaluate(run, confusion=confusion, likeness=likeness)
        with torch.inference_mode():
            logits = run.train_state.network.model.eval()(images)
        assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    exponentials = [[*map(math.exp, each)] for each in logits.tolist()]
    expected = [max(each) / sum(each) for each in exponentials]
    assert likeness == pytest.approx(expected, rel=1e-5)
    found = logits.argmax(1)
    assert (result.images, result.top5) == (12, 12)
    assert set(confusion) <= set(itertools.product((0, 1), (0, 1)))
    for true, guessed in itertools.product((0, 1), (0, 1)):
        count = ((targets == true) & (found == guessed)).sum()
        assert confusion[true, guessed] == count


def test_the_memory_of_a_validation_does_not_grow_with_the_square_of_the_classes(
    in_tmp, monkeypatch, epochs
):
    """A matrix of a million classes would take 8 TB."""

    def wide(num_classes, image_size):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))

    monkeypatch.setitem(OWN_MODELS, "wide", wide)
    settings = dataclasses.replace(TINY, **epochs | {"model": "wide", "num_classes": 10**6})
    with with_plan(set_up, settings) as run:
        confusion = Confusion()
        (result,) = evaluation.evaluate(run, confusion=confusion)
    assert result.images == confusion.total() == 12


@needs_two_cpus
@pytest.mark.parametrize("model_ema", [False, True])
def test_validation_runs_on_both_groups(in_tmp, monkeypatch, epochs, model_ema):
    """In one pass over the images, with and without a moving average, batch by batch in turn."""
    seen = []
    evaluate = TrainState.evaluate
    monkeypatch.setattr(
        TrainState,
        "evaluate",
        lambda self, batch: (seen.append(process_cpus()), evaluate(self, batch))[1],
    )
    train(**epochs | {"split": "even", "model_ema": model_ema})
    plan = plan_cores(read_topology(), TINY)
    forward, backward = (frozenset(group.cpus) for group in plan.groups)
    assert Counter(seen) == {forward: 4, backward: 2}, "three batches in each of two epochs"


class Recorder:
    """Stands for a lane that does at once what it is asked for, and writes down that it did."""

    def __init__(self, name, threads, done):
        self.name, self.done = name, done
        self.group = Group(name, (0,), threads)

    def submit(self, phase, function, *args):
        future = Future()
        future.set_result(function(*args))
        self.done.append(self.name)
        return future


@pytest.mark.parametrize(
    ("threads", "order"), [((1, 1), "fbfbfbfb"), ((1, 3), "bbfbbbfb"), ((2, 1), "ffbffbff")]
)
def test_groups_share_the_batches_of_a_validation_out_by_their_threads(threads, order):
    """Always in the same way, since the number of threads can change the last bits."""
    done = []
    forward, backward = (Recorder(name, n, done) for name, n in zip("fb", threads, strict=True))
    stand = SimpleNamespace
    batches = Batches(as_loaded([(None, number) for number in range(8)]), 8)
    run = stand(
        lanes=stand(forward=forward, backward=backward),
        val=stand(batches=lambda bad: batches),
        bad=None,
        stop=StopRequest(),
        train_state=stand(evaluate=lambda batch: (None, batch[1])),
    )
    results = list(validate_batches(run))
    assert results == [(None, number, number) for number in range(8)], "in order"
    assert "".join(done) == order


def test_a_validation_changes_nothing_of_what_is_trained(in_tmp, epochs, photos):
    """Not even the random numbers of dropout, although images are loaded in between."""
    with_val, without = (
        train(**epochs | {"data_path": path}) for path in (epochs["data_path"], photos)
    )
    for name, value in with_val.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name


# What is frozen


@ALL_SCHEDULES
@pytest.mark.parametrize("model_ema", [False, True])
def test_a_validation_leaves_what_is_frozen_in_evaluation_mode(
    in_tmp, no_pictures, epochs, schedule, model_ema
):
    """So that its buffers stay, and its dropout is off, in the second epoch too."""
    asked = epochs | {"split": "even", "schedule": schedule, "accumulate": 2, "batch_size": 2}
    model = train(**asked, freeze="body", model_ema=model_ema)
    torch.manual_seed(0)
    begun = small_model(2, 32).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, begun[name]) == (not name.startswith("6.")), name
    assert [module.training for module in model] == [False, False, *5 * [True]]


def test_a_run_says_what_is_frozen_and_when_that_ends(in_tmp, no_pictures, epochs, capsys):
    train(**epochs, freeze="0,1", freeze_epochs=1)
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("frozen: 4 of 6 weights (0,1) for 1 epoch")
    end = lines.index("thawed: epoch 2 trains all weights")
    assert begin < end
    assert sum(line.startswith("epoch: 1 ") for line in lines[begin:end]) == 1
    train(**epochs, freeze="0,1")
    printed = capsys.readouterr().out
    assert "\nfrozen: 4 of 6 weights (0,1)\n" in printed
    assert "thawed" not in printed


def test_gradient_norms_are_of_what_is_trained(in_tmp, no_pictures, epochs):
    train(**epochs, freeze="0,1", freeze_epochs=1, output_dir=in_tmp / "out")
    norms = [list(row["gradient_norms"]) for row in read_metrics(in_tmp / "out", "epoch")]
    assert norms == [["6"], ["0", "1", "6"]]


def test_find_lr_tries_the_body_s_part_of_each_rate(in_tmp, photos, monkeypatch):
    seen, update = [], TrainState.update

    def watched(train_state, *args):
        seen.append([group["lr"] for group in train_state.optimizer.param_groups])
        return update(train_state, *args)

    monkeypatch.setattr(TrainState, "update", watched)
    asked = {"data_path": photos, "num_classes": None, "steps": 5, "lr_body_factor": 0.25}
    for lr in (0.01, 0.0):
        with_plan(script.find_lr, dataclasses.replace(TINY, **asked, lr=lr))
    assert len(seen) == 10
    for first, second in seen:
        assert second == pytest.approx(first * (0.25 if seen.index([first, second]) < 5 else 1))
    assert seen[0][0] == pytest.approx(1e-6)


# When a run is over


def history(*top1):
    return [{"val_top1": value} for value in top1]


@pytest.mark.parametrize(
    ("settings", "step", "top1", "reason"),
    [
        ({}, 0, (), None),
        ({}, 29, (50, 50), None),
        ({}, 30, (50, 50), "finished"),
        ({"steps": 7}, 6, (), None),
        ({"steps": 7}, 7, (), "finished"),
        ({"early_stopping": 2}, 9, (50, 50), None),
        ({"early_stopping": 2}, 9, (50, 50, 50), "no better top-1 in 2 epochs: stopped early"),
        ({"early_stopping": 2}, 9, (50, 40, 49.9), "no better top-1 in 2 epochs: stopped early"),
        ({"early_stopping": 2}, 9, (50, 40, 50.1), None),
        ({"early_stopping": 2}, 9, (50, 51, 40), None),
        ({"early_stopping": 2}, 9, (10, 50, 20, 30), "no better top-1 in 2 epochs: stopped early"),
        ({"early_stopping": 1}, 9, (50, 50), "no better top-1 in 1 epoch: stopped early"),
        ({"early_stopping": 1}, 9, (None, None, None), None),
        ({"target_top1": 97}, 9, (97,), None),
        ({"target_top1": 97}, 9, (98, 96.9), None),
        ({"target_top1": 97}, 9, (98, 96.9, 98), None),
        ({"target_top1": 97}, 9, (97, 97), "top-1 of 97 % reached in two validations"),
        ({"target_top1": 97.5}, 9, (10, 98, 99), "top-1 of 97.5 % reached in two validations"),
        ({"target_top1": 97}, 9, (None, None), None),
        ({"target_top1": 97}, 30, (98, 99), "finished"),
    ],
)
def test_why_a_run_ends(settings, step, top1, reason):
    """Ten epochs of three steps, unless told otherwise."""
    chosen = dataclasses.replace(TINY, **{"steps": None, "epochs": 10} | settings)
    progress = Progress(step=step, epoch_batches=3, history=history(*top1))
    assert reason_to_end(chosen, progress) == reason


def test_a_run_does_not_end_before_the_validation_of_its_last_epoch():
    chosen = dataclasses.replace(TINY, steps=None, epochs=1)
    progress = Progress(step=3, batches=3, epoch_batches=3)
    assert reason_to_end(chosen, progress) is None
    progress.begin_epoch()
    assert reason_to_end(chosen, progress) == "finished"


@pytest.fixture
def standstill(epochs, monkeypatch):
    """A run of nine epochs whose accuracy, 50 %, never changes."""

    def even(num_classes, image_size):
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        return model

    monkeypatch.setitem(OWN_MODELS, "even", even)
    return epochs | {"model": "even", "lr": 0.0, "epochs": 9}


@pytest.mark.parametrize(
    ("asked", "outcome"),
    [
        ({}, "finished after 27 of 27 steps"),
        ({"early_stopping": 3}, "no better top-1 in 3 epochs: stopped early after 12 of 27 steps"),
        ({"target_top1": 50}, "top-1 of 50 % reached in two validations after 6 of 27 steps"),
        ({"target_top1": 50.1}, "finished after 27 of 27 steps"),
        ({"steps": 5}, "finished after 5 of 5 steps"),
        ({"steps": 6}, "finished after 6 of 6 steps"),
    ],
)
def test_a_run_that_ends_early(in_tmp, no_pictures, standstill, asked, outcome):
    train(**standstill | asked, output_dir=in_tmp)
    *_, summary = read_metrics(in_tmp)
    assert summary["outcome"] == outcome
    assert f"- outcome: {outcome}\n" in (in_tmp / "logs.md").read_text()
    rows = read_metrics(in_tmp, "epoch")
    assert len(rows) == summary["steps"] // 3
    assert {row["val_top1"] for row in rows} == {50}


@pytest.mark.parametrize("asked", [{"early_stopping": 2}, {"target_top1": 50.0}])
def test_stopping_by_accuracy_needs_validation_images(in_tmp, no_pictures, epochs, photos, asked):
    (flag,) = (name.replace("_", "-") for name in asked)
    with pytest.raises(UserError, match=f"--{flag} .*validation images"):
        train(**epochs | asked | {"data_path": photos}, output_dir=in_tmp / "out")
    assert not list(in_tmp.iterdir())


def test_steps_cut_a_run_short_and_leave_the_course_of_the_rate(in_tmp, no_pictures, epochs):
    settings = epochs | {"lr_scheduler": "cosine"}
    train(**settings, output_dir=in_tmp / "whole")
    train(**settings | {"steps": 4}, output_dir=in_tmp / "cut")
    whole, cut = (read_metrics(in_tmp / name, "step") for name in ("whole", "cut"))
    assert [line["lr"] for line in cut] == [line["lr"] for line in whole[:4]]
    assert [line["loss"] for line in cut] == [line["loss"] for line in whole[:4]]
    assert len(read_metrics(in_tmp / "cut", "epoch")) == 1


# What is trained on


def test_the_subset_is_kept_and_checked_when_the_run_is_resumed(in_tmp, no_pictures, epochs):
    settings = epochs | {"subset": 0.7, "output_dir": in_tmp}
    train(**settings)
    kept = json.loads((in_tmp / "subset.json").read_text())
    assert (kept["subset"], kept["seed"]) == (0.7, 0)
    assert len(kept["indices"]) == 8
    assert [index // 6 for index in kept["indices"]] == [0] * 4 + [1] * 4, "four of each class"
    assert len(read_metrics(in_tmp, "step")) == 4
    before = (in_tmp / "metrics.jsonl").read_text()
    again = settings | {"resume": Path("auto"), "epochs": 3}
    with pytest.raises(UserError, match="subset.json: not the images that --subset 0.7 choose"):
        train(**again, seed=1)
    assert (in_tmp / "metrics.jsonl").read_text() == before
    assert json.loads((in_tmp / "subset.json").read_text()) == kept
    train(**again)
    assert read_metrics(in_tmp)[-1]["outcome"] == "finished after 6 of 6 steps"


def test_a_new_run_makes_its_own_subset(in_tmp, no_pictures, epochs):
    (in_tmp / "subset.json").write_text("left by a run that saved nothing else")
    train(**epochs, subset=0.5, seed=7, output_dir=in_tmp)
    kept = json.loads((in_tmp / "subset.json").read_text())
    assert (kept["seed"], len(kept["indices"])) == (7, 6)


def test_without_a_subset_nothing_is_kept_of_it(in_tmp, no_pictures, epochs):
    train(**epochs, output_dir=in_tmp)
    assert not (in_tmp / "subset.json").exists()


def watch_inputs(monkeypatch):
    """(side of the images, whether training) of each forward pass."""
    seen = []

    def build(num_classes, image_size):
        model = small_model(num_classes, image_size)
        model.register_forward_pre_hook(
            lambda module, args: (
                seen.append((args[0].shape[-1], module.training))
                if args[0].device.type == "cpu"
                else None
            )
        )
        return model

    monkeypatch.setitem(OWN_MODELS, "watched", build)
    return seen


@ALL_SCHEDULES
def test_images_grow_from_epoch_to_epoch(in_tmp, monkeypatch, epochs, schedule):
    seen = watch_inputs(monkeypatch)
    ramp = {"min_res": 32, "max_res": 96, "end_ramp": 3, "image_size": None, "epochs": 4}
    asked = {"model": "watched", "schedule": schedule, "accumulate": 2, "split": "even"}
    train(**epochs | ramp | asked | {"batch_size": 6})
    expected = []
    for side in (32, 64, 96, 96):
        expected += [(side, True), (side, True), (96, False), (96, False)]
    assert seen == expected


def test_a_ramp_cannot_begin_above_the_size_of_the_data(in_tmp, tmp_path, monkeypatch, epochs):
    data = accept(monkeypatch, make_cifar_digits(tmp_path / "cifar", 15))
    asked = {"data_path": data, "image_size": None, "min_res": 64, "end_ramp": 2}
    with pytest.raises(UserError, match="--min-res 64"):
        train(**epochs | asked)


@pytest.fixture
def breakable(photos_with_val, tmp_path):
    """A copy of the photographs, to be damaged."""
    return shutil.copytree(photos_with_val, tmp_path / "breakable")


def test_broken_images_are_left_out_warned_of_and_logged(
    in_tmp, no_pictures, epochs, breakable, capsys
):
    paths = [breakable / f"train/{name}.jpg" for name in ("flower/0001", "temple/0003")]
    for path in paths:
        path.write_bytes(b"no picture")
    train(**epochs | {"data_path": breakable, "batch_size": 6}, max_bad_images=2, output_dir=in_tmp)
    error, log = capsys.readouterr().err, (in_tmp / "logs.md").read_text()
    for path in paths:
        assert error.count(f"warning: broken image {path}: ") == 1, "not in each epoch"
        assert f"- warning: broken image {path}: " in log
    assert ": left out\n" in error
    steps = read_metrics(in_tmp, "step")
    assert [sum(line["images"] for line in steps[n : n + 2]) for n in (0, 2)] == [10, 10]
    for row, own in zip(read_metrics(in_tmp, "epoch"), (steps[:2], steps[2:]), strict=True):
        total = sum(line["loss"] * line["images"] for line in own)
        assert row["train_loss"] == pytest.approx(total / 10)


def test_a_broken_validation_image_is_warned_of(in_tmp, no_pictures, epochs, breakable, capsys):
    path = breakable / "val/flower/0001.jpg"
    path.write_bytes(b"no picture")
    asked = {"data_path": breakable, "epochs": 1}
    train(**epochs | asked, max_bad_images=1, output_dir=in_tmp)
    assert f"warning: broken image {path}: " in capsys.readouterr().err
    assert f"- warning: broken image {path}: " in (in_tmp / "logs.md").read_text()


@pytest.mark.parametrize("part", ["train", "val"])
def test_more_broken_images_than_allowed_end_the_run(in_tmp, no_pictures, epochs, breakable, part):
    paths = [breakable / f"{part}/{name}.jpg" for name in ("flower/0001", "temple/0003")]
    for path in paths:
        path.write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"broken image .* \(more than --max-bad-images 1\)"):
        train(**epochs | {"data_path": breakable}, max_bad_images=1, output_dir=in_tmp)
    outcome = read_metrics(in_tmp)[-1]["outcome"]
    assert (
        "(more than --max-bad-images 1); to leave out up to 10 of them: python train_spl" in outcome
    )
    assert any(str(path) in outcome for path in paths)


def test_broken_images_are_counted_over_the_whole_run(in_tmp, no_pictures, epochs, breakable):
    """One is left out before the run is resumed, another one after that is one too many."""
    first, second = (breakable / f"train/{name}.jpg" for name in ("flower/0001", "temple/0003"))
    whole = first.read_bytes()
    first.write_bytes(b"no picture")
    asked = epochs | {"data_path": breakable, "max_bad_images": 1, "output_dir": in_tmp}
    train(**asked | {"epochs": 1})
    (message,) = read_checkpoint(in_tmp / "last.pt")["progress"]["bad_images"]
    assert message.startswith(f"broken image {first}: ")
    first.write_bytes(whole)
    second.write_bytes(b"no picture")
    with pytest.raises(RunError, match=rf"{second}: .* \(more than --max-bad-images 1\)"):
        train(**asked, resume=Path("auto"))


# What is validated


RAW_FIGURES = {"val_raw_loss", "val_raw_top1", "val_raw_top5"}


def record_values(monkeypatch):
    """What a moving average begins with, and then takes in, as the list fills."""
    values, update = [], MovingAverage.update

    def recorded(self, taken):
        for each in (taken,) if values else (self.values, taken):
            values.append(copy.deepcopy(each))
        update(self, taken)

    monkeypatch.setattr(MovingAverage, "update", recorded)
    return values


@ALL_SCHEDULES
def test_the_moving_average_is_validated(in_tmp, monkeypatch, no_pictures, epochs, schedule):
    """By hand: after t updates the decay is (1 + t) / (10 + t). The raw weights stand beside it."""
    asked = {**epochs, "split": "even", "schedule": schedule}
    train(**asked, output_dir=in_tmp / "own")
    values = record_values(monkeypatch)
    model = train(**asked, model_ema=True, output_dir=in_tmp / "averaged").eval()
    (*_, own), (*_, row) = (read_metrics(in_tmp / name, "epoch") for name in ("own", "averaged"))
    assert own["train_loss"] == row["train_loss"], "the average trains nothing"
    average = values[0]
    for t, taken in enumerate(values[1:]):
        part = (1 + t) / (10 + t)
        average = {name: part * old + (1 - part) * taken[name] for name, old in average.items()}
    images, targets = validation_images(epochs)
    with torch.inference_mode():
        for weights, figure in ((None, "val_raw"), (average, "val")):
            model.load_state_dict(weights or model.state_dict())
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, targets).item()
            right = (logits.argmax(1) == targets).sum().item()
            assert row[f"{figure}_loss"] == pytest.approx(loss, rel=1e-5)
            assert row[f"{figure}_top1"] == pytest.approx(100 * right / 12)
    assert row["val_loss"] != pytest.approx(row["val_raw_loss"], rel=1e-3)
    assert own["val_loss"] == row["val_raw_loss"]
    assert (own.keys() & RAW_FIGURES, row.keys() & RAW_FIGURES) == (set(), RAW_FIGURES)


def say_validations(monkeypatch, *results):
    """Validations of twelve images that come to this."""
    left = iter(results)
    set_everywhere(monkeypatch, "evaluate", lambda *args, **options: next(left))


def test_the_best_epoch_is_that_of_the_moving_average(in_tmp, monkeypatch, no_pictures, epochs):
    say_validations(
        monkeypatch,
        [Scores(1.0, 12, 9, 12), Scores(2.0, 12, 3, 12)],
        [Scores(1.5, 12, 6, 12), Scores(0.5, 12, 12, 12)],
    )
    train(**epochs, model_ema=True, output_dir=in_tmp)
    rows = read_metrics(in_tmp, "epoch")
    assert [(row["val_top1"], row["val_raw_top1"]) for row in rows] == [(75, 25), (50, 100)]
    assert read_checkpoint(in_tmp / "best.pt")["progress"]["epoch"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("figure", "name"), [("val_loss", "validation"), ("val_raw_loss", "raw validation")]
)
def test_a_validation_loss_that_is_not_finite(
    in_tmp, monkeypatch, no_pictures, epochs, capsys, value, figure, name
):
    losses = {"val_loss": 1.0, "val_raw_loss": 2.0} | {figure: value}
    say_validations(monkeypatch, [Scores(loss, 12, 6, 12) for loss in losses.values()])
    train(**epochs | {"epochs": 1}, model_ema=True, output_dir=in_tmp)
    (row,) = read_metrics(in_tmp, "epoch")
    assert {each: row[each] for each in losses} == losses | {figure: None}
    assert f"warning: epoch 1: the {name} loss is {value}\n" in capsys.readouterr().err


def test_a_moving_average_that_forgets_at_once_is_the_model(in_tmp, no_pictures, epochs):
    train(**epochs, output_dir=in_tmp / "own")
    train(**epochs, model_ema=True, model_ema_decay=1e-12, output_dir=in_tmp / "averaged")
    own, averaged = (read_metrics(in_tmp / name, "epoch") for name in ("own", "averaged"))
    for ours, theirs in zip(own, averaged, strict=True):
        assert theirs["val_loss"] == pytest.approx(ours["val_loss"], rel=1e-5)
        assert theirs["val_raw_loss"] == ours["val_loss"]
