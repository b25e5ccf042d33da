"""Training runs inside this process. Run: python -m pytest tests/test_training.py"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cifar import accept, make_cifar_digits
from conftest import as_loaded, needs_two_cpus, read_metrics, small_model
from patching import set_everywhere
from torch import nn

import train_split_affinity as script
from split_affinity import ALLOWED_CPUS, __version__, process_cpus
from split_affinity.checkpoints.state import Progress, read_checkpoint
from split_affinity.data.dataset import open_data
from split_affinity.data.loader import Batches
from split_affinity.data.transforms import validation_transform
from split_affinity.errors import RunError, Stopped, UserError
from split_affinity.lanes.contention import Company, Lookout
from split_affinity.lanes.lane import Lanes, coordinating
from split_affinity.machine.plan import Group, plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.models.cost import check_memory, weight_copies
from split_affinity.models.own import Hybrid
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.recipes import FROM_CHECKPOINT, RECIPES
from split_affinity.options.settings import Settings
from split_affinity.reports.plots import RangeTest
from split_affinity.reports.tables import epoch_line
from split_affinity.runs import evaluation
from split_affinity.runs.evaluation import VALIDATED_AHEAD, validated
from split_affinity.runs.find_lr import find_lr as range_test
from split_affinity.runs.find_lr import judge_rates
from split_affinity.runs.setup import build_work, choose_precision
from split_affinity.training.network import Confusion, Network, NonFiniteLoss, Scores
from split_affinity.training.optimizer import total_steps
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.steps import StopRequest, run_schedule
from split_affinity.training.update import MovingAverage, Work
from train_split_affinity import main, prepared, reason_to_end

TINY = Settings(
    model="small", image_size=32, batch_size=4, num_classes=5, workers=0, steps=3, lr=0.01
)


ALL_SCHEDULES = pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=needs_two_cpus) for name in SCHEDULES]
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """`--model small`."""
    monkeypatch.setitem(OWN_MODELS, "small", small_model)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing them takes longer than a run."""
    for name in ("draw_timelines", "draw_curves", "draw_gradients"):
        set_everywhere(monkeypatch, name, lambda *args: None)


def with_plan(function, settings):
    topology = read_topology()
    return function(settings, topology, plan_cores(topology, settings))


def train(**settings):
    return with_plan(script.train, dataclasses.replace(TINY, **settings))


@pytest.fixture
def epochs(photos_with_val):
    """Settings of two epochs with three steps each, and a validation of twelve images."""
    return {
        "data_path": photos_with_val,
        "num_classes": None,
        "steps": None,
        "epochs": 2,
        "lr": 0.05,
        "split": "none",
        "precision": "fp32",
    }


@pytest.mark.parametrize(
    ("settings", "batches", "steps"),
    [
        ({"steps": 7}, 25, 7),
        ({"steps": None}, 25, 50),
        ({"steps": None, "epochs": 3}, 25, 75),
        ({"steps": None, "epochs": 1, "accumulate": 4}, 25, 6),
        ({"steps": None, "epochs": 2, "accumulate": 4}, 25, 12),
        ({"steps": None, "epochs": 1, "accumulate": 25}, 25, 1),
        ({"steps": 7, "epochs": 3}, 25, 7),
        ({"steps": 99, "epochs": 3}, 25, 75),
        ({"steps": 99, "epochs": None, "accumulate": 4}, 25, 99),
    ],
)
def test_how_many_steps(settings, batches, steps):
    chosen = dataclasses.replace(TINY, **settings)
    assert total_steps(chosen, batches) == steps


@needs_two_cpus
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["even", "none"])
def test_one_seed_gives_one_result(in_tmp, split, workers, photos):
    runs = []
    for number in range(2):
        torch.manual_seed(number)  # must not matter
        directory = in_tmp / f"run{number}"
        model = train(
            split=split, workers=workers, output_dir=directory, data_path=photos, num_classes=None
        )
        losses = [line["loss"] for line in read_metrics(directory) if line["type"] == "step"]
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


def test_the_loss_on_synthetic_images_falls(in_tmp):
    """With nothing said of the rate, which rises over the first tenth of the run."""
    train(split="none", lr=None, steps=40, batch_size=32, output_dir=in_tmp / "out")
    run, *steps, _ = read_metrics(in_tmp / "out")
    assert (run["settings"]["lr"], run["settings"]["lr_warmup_epochs"]) == (0.0125, 0.1)
    rates = [0.000125, 0.00321875, 0.0063125, 0.00940625, *(36 * [0.0125])]
    assert [step["lr"] for step in steps] == pytest.approx(rates)
    losses = [step["loss"] for step in steps]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"lr": 0.0125}, [0.0125] * 20),
        ({"lr": None, "lr_warmup_epochs": 0}, [0.0125] * 20),
        ({"lr": None}, [0.000125, 0.0063125] + [0.0125] * 18),
    ],
)
def test_a_rate_that_was_asked_for_does_not_rise(in_tmp, settings, rates):
    train(split="none", steps=20, batch_size=32, output_dir=in_tmp / "out", **settings)
    steps = read_metrics(in_tmp / "out", "step")
    assert [step["lr"] for step in steps] == pytest.approx(rates)


def test_another_seed_gives_another_result(in_tmp):
    first, second = (train(split="none", steps=1, seed=seed) for seed in (0, 1))
    assert not torch.equal(first[6].weight, second[6].weight)


@needs_two_cpus
def test_what_a_run_writes(in_tmp, photos):
    train(data_path=photos, num_classes=None, output_dir=in_tmp / "out", accumulate=2)
    run, *steps, summary = read_metrics(in_tmp / "out")
    assert run["type"] == "run"
    assert run["settings"]["num_classes"] == 2
    assert run["settings"]["steps"] == 3
    assert run["plan"]["forward"]["cpus"] == sorted(ALLOWED_CPUS)[: len(ALLOWED_CPUS) // 2]
    names = ["python", "torch", "torchvision", "psutil", "system", "train_split_affinity"]
    assert list(run["versions"]) == names
    assert run["versions"]["train_split_affinity"] == __version__
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["images"] == 8
        phases_s = line["forward_s"] + line["backward_s"] + line["update_s"]
        assert 0 < phases_s <= line["step_s"]
        assert line["stray_s"] == 0
    assert summary["type"] == "summary"
    assert summary["outcome"] == "finished after 3 of 3 steps"
    assert summary["loss_last"] == steps[-1]["loss"]
    log = (in_tmp / "logs.md").read_text()
    assert log.startswith("# Training log\n")
    assert log.count("\n## ") == 1
    assert "- outcome: finished after 3 of 3 steps" in log


def test_a_run_that_goes_on_is_appended(in_tmp, no_pictures):
    train(split="none", steps=1, output_dir=in_tmp)
    train(split="none", steps=2, output_dir=in_tmp, resume=Path("auto"))
    log = (in_tmp / "logs.md").read_text()
    assert log.count("# Training log\n") == 1
    assert log.count("\n## ") == 2
    assert log.count(", split none, resumed after step 1\n") == 1
    assert [line["type"] for line in read_metrics(in_tmp)] == ["run", "step", "summary"] * 2
    assert [line["resumed_at_step"] for line in read_metrics(in_tmp, "run")] == [0, 1]
    assert [line["step"] for line in read_metrics(in_tmp, "step")] == [1, 2]


def test_a_new_run_does_not_take_the_place_of_an_earlier_one(in_tmp, no_pictures):
    train(split="none", steps=1, output_dir=in_tmp)
    before = {path.name: path.read_bytes() for path in in_tmp.iterdir()}
    with pytest.raises(UserError, match="has the checkpoints of an earlier run: go on with it"):
        train(split="none", steps=2, output_dir=in_tmp)
    assert {path.name: path.read_bytes() for path in in_tmp.iterdir()} == before


def test_the_loss_falls(in_tmp, photos):
    """The same 12 crops 20 times; medians, since a crop of mere sky can still raise the loss."""
    asked = {"model": "resnet18", "batch_size": 12, "steps": 20}
    train(data_path=photos, num_classes=None, output_dir=in_tmp, **asked)
    losses = [line["loss"] for line in read_metrics(in_tmp) if line["type"] == "step"]
    assert statistics.median(losses[-9:]) < 0.5 * statistics.median(losses[:3])


def test_a_loss_that_is_not_finite_stops_the_run(in_tmp):
    with pytest.raises(RunError, match=r"step [23]: the loss is (nan|inf)"):
        train(split="none", steps=9, lr=1e30, output_dir=in_tmp)
    *_, summary = read_metrics(in_tmp)
    assert summary["type"] == "summary"
    assert "the loss is" in summary["outcome"]
    assert "the loss is" in (in_tmp / "logs.md").read_text()


def test_a_broken_image_stops_the_run(in_tmp, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    broken = tmp_path / "copy/train/flower/0001.jpg"
    broken.write_bytes(b"no picture")
    message = rf"broken image {broken}: .* \(more than --max-bad-images 0\)$"
    with pytest.raises(RunError, match=message):
        train(split="none", steps=9, data_path=tmp_path / "copy", num_classes=None)
    assert f"broken image {broken}" in (in_tmp / "logs.md").read_text()


def interrupt(monkeypatch, method, call, signum=signal.SIGTERM):
    """Send this process one signal, in a call of a method of Work, counted from 1."""
    kind = Work if hasattr(Work, method) else Network
    original, count = getattr(kind, method), itertools.count(1)

    def interrupted(self, *args):
        if next(count) == call:
            os.kill(os.getpid(), signum)
        return original(self, *args)

    monkeypatch.setattr(kind, method, interrupted)


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@ALL_SCHEDULES
@pytest.mark.parametrize(
    ("method", "call", "steps"),
    [
        ("forward", 1, 1),
        ("backward", 1, 1),
        ("backward", 3, 1),
        ("backward", 4, 2),
        ("update", 2, 2),
    ],
)
def test_a_signal_lets_the_optimizer_step_finish(
    in_tmp, monkeypatch, no_pictures, schedule, method, call, steps
):
    """What is saved is what a run of so many steps, and not one more, leaves behind."""
    settings = {"schedule": schedule, "accumulate": 3}
    train(**settings, steps=steps, output_dir=in_tmp / "whole")
    interrupt(monkeypatch, method, call)
    with pytest.raises(Stopped):
        train(**settings, output_dir=in_tmp)
    *_, summary = read_metrics(in_tmp)
    assert [line["step"] for line in read_metrics(in_tmp, "step")] == [*range(1, steps + 1)]
    assert summary["outcome"] == f"stopped by SIGTERM after {steps} of 3 steps"
    expected = state_of(in_tmp / "whole")
    for name, value in state_of(in_tmp)["model"].items():
        assert torch.equal(value, expected["model"][name]), name
    assert not [thread for thread in threading.enumerate() if "lane" in thread.name]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_has_its_own_exit_code(in_tmp, monkeypatch, signum):
    interrupt(monkeypatch, "backward", 1, signum)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"stopped by {signum.name}") as caught:
        train(split="none")
    assert caught.value.exit_code == 128 + signum
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert f"- outcome: stopped by {signum.name} after 1 of 3 steps" in Path("logs.md").read_text()


def test_a_signal_ends_a_validation_between_two_batches(in_tmp, monkeypatch, no_pictures, epochs):
    interrupt(monkeypatch, "evaluate", 2)
    calls = []
    evaluate = Work.evaluate
    monkeypatch.setattr(
        Work, "evaluate", lambda self, batch: (calls.append(1), evaluate(self, batch))[1]
    )
    with pytest.raises(Stopped):
        train(**epochs | {"batch_size": 1, "accumulate": 4}, output_dir=in_tmp)
    assert 2 <= len(calls) <= 2 + VALIDATED_AHEAD + 1 < 12
    assert not read_metrics(in_tmp, "epoch")
    assert read_metrics(in_tmp)[-1]["outcome"] == "stopped by SIGTERM after 3 of 6 steps"


def test_an_unexpected_exception_ends_the_lanes(in_tmp, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Work, "update", fail)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        train(split="none")
    assert caught.traceback[-1].name == "fail"
    assert not [thread for thread in threading.enumerate() if "lane" in thread.name]


def test_deterministic_is_set_for_the_run_only(in_tmp, monkeypatch):
    seen = []
    update = Work.update
    monkeypatch.setattr(
        Work,
        "update",
        lambda self: (seen.append(torch.are_deterministic_algorithms_enabled()), update(self)),
    )
    train(split="none", steps=1, deterministic=True)
    train(split="none", steps=1)
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def denormals_left():
    """How many of 2**18 denormal numbers, on every thread of the team, survive a product."""
    return (torch.full((2**18,), 1e-39) * 1.0).count_nonzero().item()


@needs_two_cpus
@pytest.mark.parametrize(("flush", "left"), [(True, 0), (False, 2**18)])
def test_denormals_are_flushed_on_all_threads_of_both_lanes(split_plan, flush, left):
    settings = dataclasses.replace(TINY, flush_denormals=flush)
    with coordinating(settings, split_plan), Lanes(split_plan, ()) as lanes:
        assert lanes.forward.call(denormals_left) == left
        assert lanes.backward.call(denormals_left) == left
    assert denormals_left() == 2**18, "as before, in this thread"


def test_the_switches_reach_the_work(one_lane_plan):
    with Lanes(one_lane_plan, ()) as lanes:
        settings = dataclasses.replace(TINY, model="resnet18", precision="bf16")
        on = build_work(settings, lanes)
        switched_off = {"channels_last": False, "fused": False, "grads_to_none": False}
        off = build_work(dataclasses.replace(settings, precision="fp32", **switched_off), lanes)
    assert (on.network.bf16, on.network.channels_last, on.grads_to_none) == (True, True, True)
    assert (off.network.bf16, off.network.channels_last, off.grads_to_none) == (False, False, False)
    for work, last in ((on, True), (off, False)):
        weight = work.network.model.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
        assert bool(work.optimizer.param_groups[0]["fused"]) == last
    images = torch.randn(4, 3, 32, 32)
    seen = []
    for work in (on, off):
        work.network.model.conv1.register_forward_hook(
            lambda module, args, output: seen.append(
                (output.dtype, args[0].is_contiguous(memory_format=torch.channels_last))
            )
        )
        logits, _ = work.network.forward((images, None))
        assert logits.dtype == torch.float32
    assert seen == [(torch.bfloat16, True), (torch.float32, False)]


@pytest.mark.parametrize(
    ("asked", "bf16", "chosen", "reason"),
    [
        ("auto", "amx_bf16", "bf16", "the CPU computes bfloat16 natively (amx_bf16)"),
        ("auto", "", "fp32", "the CPU has no native bfloat16 arithmetic"),
        ("fp32", "amx_bf16", "fp32", "as asked; the CPU computes bfloat16 natively"),
        ("bf16", "", "bf16", "as asked; the CPU has no native bfloat16 arithmetic"),
    ],
)
def test_the_precision_and_its_reason(asked, bf16, chosen, reason):
    topology = dataclasses.replace(read_topology(), bf16=bf16)
    precision, why = choose_precision(dataclasses.replace(TINY, precision=asked), topology)
    assert precision == chosen
    assert why.startswith(reason)


def test_the_settings_in_force_are_listed(in_tmp, monkeypatch):
    set_everywhere(monkeypatch, "tune_allocator", lambda: "cannot be tuned here")
    train(split="none", steps=1, output_dir=in_tmp)
    settings = read_metrics(in_tmp)[0]["settings"]
    assert settings["precision"] == ("bf16" if read_topology().bf16 else "fp32")
    assert settings["tuned_malloc"] is False
    assert settings["channels_last"] is settings["fused"] is settings["grads_to_none"] is True
    log = (in_tmp / "logs.md").read_text()
    assert f"precision {settings['precision']}, channels_last True" in log
    assert "- warning: cannot be tuned here" in log


@needs_two_cpus
@pytest.mark.parametrize(
    "settings", [{"schedule": "overlap", "accumulate": 2}, {"schedule": "delayed"}]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_overlapping_runs_from_end_to_end(in_tmp, photos, settings, workers):
    train(data_path=photos, num_classes=None, workers=workers, output_dir=in_tmp, **settings)
    run, *steps, summary = read_metrics(in_tmp)
    assert summary["outcome"] == "finished after 3 of 3 steps"
    assert summary["stray_s"] == 0
    assert set(summary["busy"]) == {"forward", "backward"}
    assert run["settings"]["schedule"] == settings["schedule"]
    assert (steps[0]["refresh_s"] > 0) == (settings["schedule"] == "delayed")
    trace = json.loads((in_tmp / "trace.json").read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in trace if event["ph"] == "M"}
    loaders = {"loader 0", "loader 1"} if workers else {"main thread"}
    assert rows == {"forward lane", "backward lane", *loaders}
    batches = 3 * settings.get("accumulate", 1)
    for name in ("forward", "backward", "load"):
        assert sum(event.get("cat") == name for event in trace) == batches
    assert (in_tmp / "timeline.png").stat().st_size > 10_000


@needs_two_cpus
def test_dropout_and_loading_in_the_main_thread_do_not_race(in_tmp, photos):
    """Both draw from torch's global generator: overlap must give what sequential gives."""
    losses = {}
    for schedule in ("sequential", "overlap"):
        directory = in_tmp / schedule
        train(
            model="squeezenet1_1",  # has dropout
            schedule=schedule,
            accumulate=4,
            batch_size=2,
            data_path=photos,
            num_classes=None,
            output_dir=directory,
        )
        losses[schedule] = [
            line["loss"] for line in read_metrics(directory) if line["type"] == "step"
        ]
    assert losses["overlap"] == losses["sequential"]


@needs_two_cpus
def test_threads_that_stray_are_shown(in_tmp, monkeypatch, capsys):
    """The naive way inside the real program: lanes that share one thread, moved about."""
    forward = Network.forward

    def pull_out_of_group(self, batch):
        os.sched_setaffinity(0, ALLOWED_CPUS)  # inside the phase, after the mask was checked
        return forward(self, batch)

    monkeypatch.setattr(Network, "forward", pull_out_of_group)
    train(model="resnet18", output_dir=in_tmp)
    captured = capsys.readouterr()
    assert captured.err.count("warning: forward: ") == 1, "once, not at every step"
    assert "strayed from cores" in captured.err
    assert "could leave the phase's cores" in captured.out
    assert "warning: forward: " in (in_tmp / "logs.md").read_text()
    assert all(line["stray_s"] > 0 for line in read_metrics(in_tmp) if line["type"] == "step")


@needs_two_cpus
def test_the_main_thread_coordinates_on_the_loader_cores(in_tmp, monkeypatch):
    seen = []
    run = run_schedule
    set_everywhere(
        monkeypatch,
        "run_schedule",
        lambda *args: (seen.append(os.sched_getaffinity(0)), run(*args))[1],
    )
    last = max(ALLOWED_CPUS)
    train(steps=1)
    train(steps=1, loader_cores=(last,))
    plan = plan_cores(read_topology(), TINY)
    assert seen == [set(plan.forward.cpus), {last}]


# Memory


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({}, 3),  # weights, gradients, momentum
        ({"momentum": 0.0}, 2),
        ({"opt": "adam"}, 4),
        ({"opt": "adamw"}, 4),
        ({"model_ema": True}, 4),
        ({"schedule": "delayed"}, 5),
        ({"opt": "adam", "model_ema": True, "schedule": "delayed"}, 7),
        ({"opt": "adam", "test_only": True}, 1),
        ({"opt": "nadam"}, 4),
        ({"opt": "rmsprop"}, 4),
        ({"opt": "rmsprop", "momentum": 0.0}, 3),
    ],
)
def test_what_a_run_holds_of_the_size_of_the_weights(settings, copies):
    assert weight_copies(Settings(**settings)) == copies


@pytest.mark.parametrize(
    ("settings", "copies"),
    [({}, 1), ({"opt": "adam", "schedule": "delayed"}, 1), ({"model_ema": True}, 2)],
)
def test_frozen_weights_are_held_without_what_updates_need(settings, copies):
    assert weight_copies(Settings(**settings), is_trained=False) == copies


@ALL_SCHEDULES
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.0},
        {"opt": "adam", "model_ema": True},
        {"opt": "nadam"},
        {"opt": "rmsprop"},
    ],
)
def test_a_run_holds_no_less_than_is_asked_of_the_machine(one_lane_plan, schedule, settings):
    """Counted in the tensors that a step leaves behind."""
    settings = dataclasses.replace(
        TINY, precision="fp32", schedule=schedule, grads_to_none=False, **settings
    )
    with Lanes(one_lane_plan, ()) as lanes:
        work = build_work(settings, lanes)
        copies = [work.network.copy() for _ in range(2 * (schedule == "delayed"))]
        work.network.backward(
            work.network.forward((torch.randn(4, 3, 32, 32), torch.zeros(4).long()))
        )
        work.update()
    weights = list(work.network.model.parameters())
    kept = [value for state in work.optimizer.state.values() for value in state.values()]
    average = list(work.average.values.values()) if work.average else []
    grads = [weight.grad for weight in weights]
    copied = [value for copy in copies for value in copy.parameters()]
    held = sum(each.nbytes for each in (*weights, *grads, *kept, *average, *copied) if each.ndim)
    needed = weight_copies(settings) * sum(weight.nbytes for weight in weights)
    assert needed <= held <= 1.1 * needed + 100


@pytest.mark.parametrize(
    ("settings", "needed_bytes"),
    [  # the small model has 120 parameters, and 17 for each class
        ({}, 3 * 4 * 205 + 2 * 4 * 3 * 32 * 32 * 4),
        ({"image_size": 64}, 3 * 4 * 205 + 2 * 4 * 3 * 64 * 64 * 4),
        ({"image_size": 64, "min_res": 32}, 3 * 4 * 205 + 2 * 4 * 3 * 32 * 32 * 4),
        ({"num_classes": 105}, 3 * 4 * 1905 + 2 * 4 * 3 * 32 * 32 * 4),
        ({"freeze": "body"}, (120 + 3 * 85) * 4 + 2 * 4 * 3 * 32 * 32 * 4),
        ({"freeze": "body", "freeze_epochs": 1}, 3 * 4 * 205 + 2 * 4 * 3 * 32 * 32 * 4),
        ({"test_only": True}, 4 * 205),
        # the teacher's weights, and the 9 buffers of its BatchNorm, one of them in 64 bits
        ({"teacher": "small"}, 3 * 4 * 205 + 2 * 4 * 3 * 32 * 32 * 4 + 4 * 205 + 4 * 8 + 8),
        ({"teacher": "small", "test_only": True}, 4 * 205),
    ],
)
def test_a_machine_without_room_for_the_least_is_told_so(settings, needed_bytes):
    settings = dataclasses.replace(TINY, **settings)
    topology = dataclasses.replace(read_topology(), memory_bytes=needed_bytes)
    check_memory(settings, topology, settings.batch_size)
    topology = dataclasses.replace(topology, memory_bytes=needed_bytes - 1)
    with pytest.raises(UserError, match="4 images of .* px, small with .* classes: at least"):
        check_memory(settings, topology, settings.batch_size)


@pytest.mark.parametrize("command", [script.train, script.find_lr])
def test_nothing_is_written_where_memory_is_missing(in_tmp, monkeypatch, command):
    settings = dataclasses.replace(TINY, output_dir=in_tmp / "out")
    topology = read_topology()
    plan = plan_cores(topology, settings)
    with pytest.raises(UserError, match="at least 0.0 GiB of memory are needed, 0.0 are there"):
        command(settings, dataclasses.replace(topology, memory_bytes=9), plan)

    def no_room(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(OWN_MODELS, "small", no_room)
    set_everywhere(monkeypatch, "check_memory", lambda *args: None)
    with pytest.raises(UserError, match="^not enough memory: can't allocate memory; lower"):
        command(settings, topology, plan)
    assert not list(in_tmp.iterdir())


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
def test_others_are_looked_for_between_steps_and_after_a_validation(
    in_tmp, monkeypatch, no_pictures, epochs, schedule
):
    """While no phase runs, and outside of what is timed; and at the end, when all is done."""
    take, looks, ended = Lanes.take_records, itertools.count(1), []
    monkeypatch.setattr(Lanes, "take_records", lambda lanes: (ended.append(1), take(lanes))[1])

    def look(lookout, least_s=1.0):
        assert ended or least_s < 1, "the records of a step, or of a validation, are taken before"
        ended.clear()
        number = next(looks)
        return Company(number - 1.0, float(number), {"all": 0.0}, 0.0) if number % 2 else None

    monkeypatch.setattr(Lookout, "look", look)
    train(**epochs, output_dir=in_tmp, schedule=schedule, workers=0)
    steps = read_metrics(in_tmp, "step")
    found = [line["company"]["end_s"] if "company" in line else None for line in steps]
    assert found == [1, None, 3, 5, None, 7], "the fourth and the eighth are of validations"
    assert next(looks) == 10
    (summary,) = read_metrics(in_tmp, "summary")
    assert summary["company"]["end_s"] == 9.0


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
    monkeypatch.setitem(SCHEDULES, "sequential", lambda lanes, work, batches: iter([two]))
    with Lanes(one_lane_plan, ()) as lanes:
        settings = dataclasses.replace(TINY, precision="fp32")
        work = build_work(settings, lanes)
        (result,) = run_schedule(settings, lanes, work, Batches([], 0), first_step=7)
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
    in_tmp, no_pictures, epochs, schedule
):
    asked = {"split": "even", "schedule": schedule, "accumulate": 2, "batch_size": 2}
    model = train(**epochs | asked, output_dir=in_tmp)
    assert model.training, "as it is left"
    images, targets = validation_images(epochs)
    with torch.inference_mode():
        logits = model.eval()(images)
    *_, row = read_metrics(in_tmp, "epoch")
    assert row["val_loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    assert row["val_top1"] == pytest.approx(100 * (logits.argmax(1) == targets).sum().item() / 12)


def test_an_evaluation_weighs_images_and_not_batches(in_tmp, epochs):
    """Twelve images in batches of five: the last batch has two."""
    settings = dataclasses.replace(TINY, **epochs | {"batch_size": 5})
    images, targets = validation_images(epochs)
    with with_plan(prepared, settings) as run:
        confusion = Confusion()
        (result,) = evaluation.evaluate(run, confusion=confusion)
        with torch.inference_mode():
            logits = run.work.network.model.eval()(images)
        assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
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
    with with_plan(prepared, settings) as run:
        confusion = Confusion()
        (result,) = evaluation.evaluate(run, confusion=confusion)
    assert result.images == confusion.total() == 12


@needs_two_cpus
@pytest.mark.parametrize("model_ema", [False, True])
def test_validation_runs_on_both_groups(in_tmp, monkeypatch, epochs, model_ema):
    """In one pass over the images, with and without a moving average, batch by batch in turn."""
    seen = []
    evaluate = Work.evaluate
    monkeypatch.setattr(
        Work,
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
        work=stand(evaluate=lambda batch: (None, batch[1])),
    )
    results = list(validated(run))
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
    seen, update = [], Work.update

    def watched(work, *args):
        seen.append([group["lr"] for group in work.optimizer.param_groups])
        return update(work, *args)

    monkeypatch.setattr(Work, "update", watched)
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
    assert "(more than --max-bad-images 1) after " in outcome
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
    set_everywhere(monkeypatch, "evaluate", lambda *args: next(left))


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


# The range test


@ALL_SCHEDULES
def test_a_range_test_leaves_the_model_and_the_disk_alone(in_tmp, epochs, schedule):
    asked = {"split": "even", "schedule": schedule, "accumulate": 2, "batch_size": 2, "steps": 8}
    settings = dataclasses.replace(TINY, **epochs | asked)
    with with_plan(prepared, settings) as run:
        before = copy.deepcopy(run.work.network.model)
        result = range_test(run)
        for name, value in run.work.network.model.state_dict().items():
            assert torch.equal(value, before.state_dict()[name]), name
    assert result.rates[:3] == pytest.approx((1e-6, 1e-5, 1e-4))
    assert len(result.losses) == len(result.rates) <= 8
    assert not list(in_tmp.iterdir())


def say_losses(monkeypatch, *losses):
    """Training steps with these losses, but for the last one, which is not finite."""

    def script(lanes, work, batches):
        for loss in losses:
            work.optimizer.step()
            work.scheduler.step()
            yield [Scores(loss, 4, 0, 0)]
        raise NonFiniteLoss("nan")

    monkeypatch.setitem(SCHEDULES, "sequential", script)


def find_lr(**settings):
    chosen = dataclasses.replace(TINY, **{"split": "none"} | settings)
    with with_plan(prepared, chosen) as run:
        return range_test(run)


def test_a_range_test_ends_once_the_loss_has_exploded(monkeypatch):
    """Four steps to a decade. The rate rises for good between 0.1 and 0.178."""
    fall = 2.0, 1.6, 1.2, 0.9, 0.7, 0.7, 0.7
    say_losses(monkeypatch, *[2.3] * 14, *fall, 3.0, 9.0, 30.0, 0.1, 0.1, 0.1)
    result = find_lr(steps=29)
    assert result.rates == pytest.approx([10 ** (step / 4 - 6) for step in range(23)])
    smoothed = *[2.3] * 14, 2.0, 1.6, 1.2, 0.9, 0.7, 0.7, 0.7, 3.0, 6.0
    assert result.losses == pytest.approx(smoothed), "medians of three"
    assert result.suggestion == pytest.approx(math.sqrt(0.01 * 0.0178), rel=1e-3)


def test_a_range_test_ends_where_the_loss_is_not_finite(monkeypatch):
    say_losses(monkeypatch, *[2.3] * 10, 2.0, 1.5, 1.0)
    result = find_lr(steps=29)
    assert result.losses[-4:] == pytest.approx((2.3, 2.0, 1.5, 1.25))
    assert result.rates[-1] == pytest.approx(1e-3)
    assert result.suggestion == pytest.approx(1e-4)


def test_a_range_test_has_a_hundred_steps_up_to_a_rate_of_10(monkeypatch):
    say_losses(monkeypatch, *[1.0] * 100)
    result = find_lr(steps=None)
    assert len(result.rates) == 100
    assert result.rates[-1] == pytest.approx(10)
    assert result.rates[33] == pytest.approx(2.1544e-4, rel=1e-3), "a third of the way, by powers"
    assert result.suggestion is None


# Courses of the loss: corners (power of ten of the rate, loss) with straight lines between them.
COURSES = {
    "valley": [(-6, 2.3), (-4, 2.3), (-2, 0.6), (-1.5, 0.5), (-1, 4), (1, 40)],
    "wide valley": [(-6, 2.3), (-4.5, 2.3), (-4, 0.5), (-1, 0.5), (-0.5, 6), (1, 9)],
    "second valley": [(-6, 2.3), (-4, 2.3), (-2.5, 1), (-1.5, 0.9), (-1.2, 7), (-0.7, 7)]
    + [(-0.3, 0.5), (0.4, 0.5), (0.7, 9), (1, 9)],
    "only falling": [(-6, 2.3), (-4, 2.2), (1, 0.3)],
    # ResNet-56 on the digits
    "small fall": [(-6, 2.75), (-5, 2.72), (-3.7, 2.33), (-2, 2.31), (-1.4, 3.1), (-1.1, 2.9)]
    + [(-0.3, 2.2), (0.1, 2.25), (0.7, 3.4), (1, 4)],
    "flat": [(-6, 2.3), (1, 2.3)],
    "flat, then exploding": [(-6, 2.3), (-1, 2.3), (0, 30), (1, 90)],
    "exploding at once": [(-6, 2.3), (-5.5, 5), (1, 90)],
    "a valley after an explosion": [(-6, 2.3), (-2, 2.3), (-1.7, 8), (-1, 8), (-0.7, 0.5)]
    + [(0.4, 0.5), (0.7, 9), (1, 9)],
}


def range_test_of(course, steps, noise=0.0, seed=0):
    """The rates and losses of a range test over a course, with noise relative to the loss."""
    dice = random.Random(f"{course} {steps} {noise} {seed}")
    rates, losses = [10 ** (7 * step / (steps - 1) - 6) for step in range(steps)], []
    for rate in rates:
        at = min(math.log10(rate), 1 - 1e-9)
        (x, y), (x_next, y_next) = next(
            pair for pair in itertools.pairwise(COURSES[course]) if at < pair[1][0]
        )
        loss = y + (y_next - y) * (at - x) / (x_next - x)
        losses.append(loss * dice.gauss(1, noise))
    return rates, losses


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("steps", [30, 100, 300])
@pytest.mark.parametrize(
    ("course", "suggestion"),
    [("valley", 0.004), ("wide valley", 0.012), ("second valley", 0.0036), ("only falling", 1.0)],
)
def test_a_suggestion_depends_neither_on_the_steps_nor_on_chance(course, suggestion, steps, noise):
    results = [judge_rates(*range_test_of(course, steps, noise, n)) for n in range(20)]
    found = [result.suggestion for result in results if result.suggestion]
    assert len(found) >= (15 if noise == 0.1 else 20), "with much noise it may be none"
    assert suggestion / 1.5 < min(found)
    assert max(found) < suggestion * 1.5


@pytest.mark.parametrize(
    ("steps", "noise", "tells"), [(30, 0.1, 0), (100, 0.03, 8), (300, 0.05, 8)]
)
def test_a_loss_that_hardly_falls_is_told_from_chance(steps, noise, tells):
    """And the second valley, which is lower than the first, is never taken."""
    results = [judge_rates(*range_test_of("small fall", steps, noise, n)) for n in range(8)]
    found = [result.suggestion for result in results if result.suggestion]
    assert len(found) == tells
    assert all(0.0016 / 1.5 < rate < 0.0016 * 1.5 for rate in found), found


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("steps", [30, 100, 300])
@pytest.mark.parametrize(
    "course", ["flat", "flat, then exploding", "exploding at once", "a valley after an explosion"]
)
def test_nothing_is_suggested_rather_than_guessed(course, steps, noise):
    results = [judge_rates(*range_test_of(course, steps, noise, n)) for n in range(20)]
    guessed = [result.suggestion for result in results if result.suggestion]
    assert len(guessed) <= (noise == 0.1), guessed
    assert {len(result.losses) for result in results} == {steps}


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_few_steps_tell_nothing(steps):
    losses = [2.3, 1.0, 0.5, 0.4, 0.4, 3.0, 9.0, 9.0][:steps]
    rates = [1e-6 * 10**step for step in range(steps)]
    assert judge_rates(rates, losses) == RangeTest(tuple(rates), tuple(losses), None)


@pytest.mark.parametrize("steps", [29, 85, 281])
def test_a_loss_is_smoothed_over_half_a_decade_of_rates(steps):
    """Whatever the steps: a spike of less than half of that is gone, an edge stays where it is."""
    rates = [10 ** (7 * step / (steps - 1) - 6) for step in range(steps)]
    spike, edge = rates[steps // 4], rates[steps // 2]
    losses = [50.0 if rate == spike else 2.0 if rate < edge else 1.0 for rate in rates]
    smoothed = judge_rates(rates, losses).losses
    assert smoothed == tuple(2.0 if rate < edge else 1.0 for rate in rates)
    narrow = [2.0 if abs(math.log10(rate / spike)) > 0.11 else 50.0 for rate in rates]
    assert set(judge_rates(rates, narrow).losses) == {2.0}
    wide = [2.0 if abs(math.log10(rate / spike)) > 0.26 else 50.0 for rate in rates]
    assert 50.0 in judge_rates(rates, wide).losses


def test_a_range_test_without_any_finite_loss(monkeypatch):
    say_losses(monkeypatch)
    with pytest.raises(RunError, match="find-lr: the loss is not finite even in the first"):
        find_lr(steps=8)


def test_a_signal_ends_a_range_test(in_tmp, monkeypatch, epochs):
    interrupt(monkeypatch, "backward", 2)
    with pytest.raises(Stopped):
        find_lr(**epochs)
    assert not list(in_tmp.iterdir())


# Recipes, from end to end


RECIPE_OPTIONS = {
    "digits": "--lr-warmup-epochs 1",
    "imagenet": "--lr-warmup-epochs 1 --save-freq 1 --image-size 32",
    "imagenet-subset": "--subset 0.7 --image-size 32",
    "imagenet-finetune": "--min-res 32 --max-res 64 --end-ramp 2",
    "imagenet-full": "--lr-warmup-epochs 1 --image-size 32",
    "finetune": "--image-size 32",
    "cifar10": "--lr-milestones 1",
    "hybrid": "--image-size 32 --lr-restart-epochs 1",
}


@pytest.fixture(scope="module")
def weights(photos_with_val, tmp_path_factory):
    """A checkpoint to start from, of a model with blocks that can be left out."""
    folder = tmp_path_factory.mktemp("weights")
    settings = Settings(
        model="resnet18",
        data_path=photos_with_val,
        image_size=32,
        batch_size=2,
        workers=0,
        steps=1,
        split="none",
        output_dir=folder,
        log_file=folder / "logs.md",
    )
    with_plan(script.train, settings)
    return folder / "last.pt"


@pytest.fixture
def recipe_data(photos_with_val, tmp_path, monkeypatch, torch_cache):
    """Small data for each recipe, and small models where the recipe's own are large."""
    torch_cache("squeezenet1_1")
    monkeypatch.setitem(
        OWN_MODELS,
        "hybrid",
        functools.partial(Hybrid, channels=(8, 16, 24, 32), width=32, blocks=1),
    )

    def arguments(recipe):
        if recipe == "cifar10":
            return ["--data-path", str(accept(monkeypatch, make_cifar_digits(tmp_path / "c", 15)))]
        name = "resnet18" if recipe in FROM_CHECKPOINT else "squeezenet1_1"
        large = recipe.startswith("imagenet") or recipe == "finetune"
        model = ["--model", name] if large else []
        return [*model, "--data-path", str(photos_with_val)]

    return arguments


@ALL_SCHEDULES
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_from_end_to_end(
    in_tmp, no_pictures, recipe_data, weights, capsys, recipe, schedule
):
    """Two epochs of two steps or more; everything that the options leave open is the recipe's."""
    options = ["--recipe", recipe, "-b", "2", "--accumulate", "2", "--epochs", "2", "-j", "0"]
    options += ["--schedule", schedule, *recipe_data(recipe), *RECIPE_OPTIONS[recipe].split()]
    if recipe in FROM_CHECKPOINT:
        options += ["--init-from", str(weights)]
    assert main(options) == 0, capsys.readouterr().err
    folder = in_tmp / "out" / recipe
    run, *_, summary = read_metrics(folder)
    steps, rows = read_metrics(folder, "step"), read_metrics(folder, "epoch")
    assert summary["outcome"] == f"finished after {len(steps)} of {len(steps)} steps"
    assert summary["stray_s"] == 0
    assert len(steps) == {"imagenet-subset": 4}.get(recipe, 6)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert all(0 <= row[name] <= 100 for name in ("train_top1", "val_top1", "val_top5"))
        assert row["train_loss"] > 0 and row["val_loss"] > 0
    for name, value in RECIPES[recipe].items():
        if f"--{name.replace('_', '-')}" not in options and name != "batch_size":
            assert run["settings"][name] == value, name
    state = state_of(folder)
    assert (state["progress"]["epoch"], state["progress"]["step"]) == (2, len(steps))
    assert (state["average"] is not None) == (recipe == "imagenet-full")
    assert (folder / "subset.json").exists() == (recipe == "imagenet-subset")
    assert (folder / "epoch-0001.pt").exists() == (recipe == "imagenet")
    assert (folder / "best.pt").exists()
