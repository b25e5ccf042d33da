"""Training runs inside this process. Run: python -m pytest tests/test_training.py"""

import dataclasses
import json
import os
import shutil
import signal
import statistics
import threading

import pytest
import torch
from conftest import needs_two_cpus

import train_split_affinity as tsa
from train_split_affinity import Settings

TINY = Settings(
    model="resnet18", image_size=32, batch_size=4, num_classes=5, workers=0, steps=3, lr=0.01
)


def train(**settings):
    chosen = dataclasses.replace(TINY, **settings)
    topology = tsa.read_topology()
    return tsa.train(chosen, topology, tsa.plan_cores(topology, chosen))


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "images", "steps"),
    [
        ({"steps": 7}, 100, 7),
        ({"steps": None}, 100, 50),
        ({"steps": None, "epochs": 3}, 100, 75),
        ({"steps": None, "epochs": 3}, 103, 75),
        ({"steps": None, "epochs": 1, "accumulate": 4}, 100, 6),
        ({"steps": None, "epochs": 2, "accumulate": 4}, 100, 12),
        ({"steps": None, "epochs": 1, "accumulate": 50}, 100, 1),
    ],
)
def test_how_many_steps(settings, images, steps):
    assert tsa.steps_to_train(dataclasses.replace(TINY, **settings), images) == steps


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
        losses = [line["loss"] for line in metrics(directory) if line["type"] == "step"]
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


def test_another_seed_gives_another_result(in_tmp):
    first, second = (train(split="none", steps=1, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.fc.weight, second.fc.weight)


@needs_two_cpus
def test_what_a_run_writes(in_tmp, photos):
    train(data_path=photos, num_classes=None, output_dir=in_tmp / "out", accumulate=2)
    run, *steps, summary = metrics(in_tmp / "out")
    assert run["type"] == "run"
    assert run["settings"]["num_classes"] == 2
    assert run["settings"]["steps"] == 3
    assert run["plan"]["forward"]["cpus"] == sorted(tsa.ALLOWED_CPUS)[: len(tsa.ALLOWED_CPUS) // 2]
    assert set(run["versions"]) == {"python", "torch", "torchvision", "psutil", "system"}
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


def test_runs_are_appended(in_tmp):
    for _ in range(2):
        train(split="none", steps=1, output_dir=in_tmp)
    log = (in_tmp / "logs.md").read_text()
    assert log.count("# Training log\n") == 1
    assert log.count("\n## ") == 2
    assert [line["type"] for line in metrics(in_tmp)] == ["run", "step", "summary"] * 2


def test_the_loss_falls(in_tmp, photos):
    """The same 12 crops 20 times; medians, since a crop of mere sky can still raise the loss."""
    train(data_path=photos, num_classes=None, batch_size=12, steps=20, output_dir=in_tmp)
    losses = [line["loss"] for line in metrics(in_tmp) if line["type"] == "step"]
    assert statistics.median(losses[-9:]) < 0.5 * statistics.median(losses[:3])


def test_a_loss_that_is_not_finite_stops_the_run(in_tmp):
    with pytest.raises(tsa.RunError, match=r"step [23]: the loss is (nan|inf)"):
        train(split="none", steps=9, lr=1e30, output_dir=in_tmp)
    *_, summary = metrics(in_tmp)
    assert summary["type"] == "summary"
    assert "the loss is" in summary["outcome"]
    assert "the loss is" in (in_tmp / "logs.md").read_text()


def test_a_broken_image_stops_the_run(in_tmp, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    broken = tmp_path / "copy/train/flower/0001.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(tsa.RunError, match=f"broken image {broken}"):
        train(split="none", steps=9, data_path=tmp_path / "copy", num_classes=None)
    assert f"broken image {broken}" in (in_tmp / "logs.md").read_text()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_at_a_phase_boundary(in_tmp, monkeypatch, signum):
    backward = tsa.Work.backward

    def interrupted(self, output):
        os.kill(os.getpid(), signum)
        return backward(self, output)

    monkeypatch.setattr(tsa.Work, "backward", interrupted)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(tsa.Stopped) as caught:
        train(split="none", accumulate=2, output_dir=in_tmp)
    assert caught.value.exit_code == 128 + signum
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert metrics(in_tmp)[-1]["outcome"] == f"stopped by {signum.name} after 0 of 3 steps"


def test_an_unexpected_exception_ends_the_lanes(in_tmp, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(tsa.Work, "update", fail)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        train(split="none")
    assert caught.traceback[-1].name == "fail"
    assert not [thread for thread in threading.enumerate() if "lane" in thread.name]


def test_deterministic_is_set_for_the_run_only(in_tmp, monkeypatch):
    seen = []
    update = tsa.Work.update
    monkeypatch.setattr(
        tsa.Work,
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
    with tsa.coordinating(settings, split_plan), tsa.Lanes(split_plan, ()) as lanes:
        assert lanes.forward.call(denormals_left) == left
        assert lanes.backward.call(denormals_left) == left
    assert denormals_left() == 2**18, "as before, in this thread"


def test_the_switches_reach_the_work(one_lane_plan):
    with tsa.Lanes(one_lane_plan, ()) as lanes:
        on = tsa.build_work(dataclasses.replace(TINY, precision="bf16"), lanes)
        switched_off = {"channels_last": False, "fused": False, "grads_to_none": False}
        off = tsa.build_work(dataclasses.replace(TINY, precision="fp32", **switched_off), lanes)
    assert (on.bf16, on.channels_last, on.grads_to_none) == (True, True, True)
    assert (off.bf16, off.channels_last, off.grads_to_none) == (False, False, False)
    for work, last in ((on, True), (off, False)):
        weight = work.model.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
        assert bool(work.optimizer.param_groups[0]["fused"]) == last
    images = torch.randn(4, 3, 32, 32)
    seen = []
    for work in (on, off):
        work.model.conv1.register_forward_hook(
            lambda module, args, output: seen.append(
                (output.dtype, args[0].is_contiguous(memory_format=torch.channels_last))
            )
        )
        logits, _ = work.forward((images, None))
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
    topology = dataclasses.replace(tsa.read_topology(), bf16=bf16)
    precision, why = tsa.choose_precision(dataclasses.replace(TINY, precision=asked), topology)
    assert precision == chosen
    assert why.startswith(reason)


def test_the_settings_in_force_are_listed(in_tmp, monkeypatch):
    monkeypatch.setattr(tsa, "tune_allocator", lambda: "cannot be tuned here")
    train(split="none", steps=1, output_dir=in_tmp)
    settings = metrics(in_tmp)[0]["settings"]
    assert settings["precision"] == ("bf16" if tsa.read_topology().bf16 else "fp32")
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
    run, *steps, summary = metrics(in_tmp)
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
        assert sum(event["name"] == name for event in trace) == batches
    assert (in_tmp / "timeline.png").stat().st_size > 10_000


@needs_two_cpus
@pytest.mark.parametrize("schedule", ["overlap", "delayed"])
def test_a_signal_ends_an_overlapping_run(in_tmp, monkeypatch, schedule):
    backward = tsa.Work.backward

    def interrupted(self, output):
        os.kill(os.getpid(), signal.SIGINT)
        return backward(self, output)

    monkeypatch.setattr(tsa.Work, "backward", interrupted)
    with pytest.raises(tsa.Stopped):
        train(schedule=schedule, accumulate=3, output_dir=in_tmp)
    assert metrics(in_tmp)[-1]["outcome"] == "stopped by SIGINT after 0 of 3 steps"
    assert not [thread for thread in threading.enumerate() if "lane" in thread.name]


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
        losses[schedule] = [line["loss"] for line in metrics(directory) if line["type"] == "step"]
    assert losses["overlap"] == losses["sequential"]


@needs_two_cpus
def test_threads_that_stray_are_shown(in_tmp, monkeypatch, capsys):
    """The naive way inside the real program: lanes that share one thread, moved about."""
    forward = tsa.Work.forward

    def pull_out_of_group(self, batch):
        os.sched_setaffinity(0, tsa.ALLOWED_CPUS)  # inside the phase, after the mask was checked
        return forward(self, batch)

    monkeypatch.setattr(tsa.Work, "forward", pull_out_of_group)
    train(output_dir=in_tmp)
    captured = capsys.readouterr()
    assert captured.err.count("warning: forward: ") == 1, "once, not at every step"
    assert "strayed from cores" in captured.err
    assert "could leave the phase's cores" in captured.out
    assert "warning: forward: " in (in_tmp / "logs.md").read_text()
    assert all(line["stray_s"] > 0 for line in metrics(in_tmp) if line["type"] == "step")


@needs_two_cpus
def test_the_main_thread_coordinates_on_the_loader_cores(in_tmp, monkeypatch):
    seen = []
    run = tsa.run_schedule
    monkeypatch.setattr(
        tsa, "run_schedule", lambda *args: (seen.append(os.sched_getaffinity(0)), run(*args))[1]
    )
    last = max(tsa.ALLOWED_CPUS)
    train(steps=1)
    train(steps=1, loader_cores=(last,))
    plan = tsa.plan_cores(tsa.read_topology(), TINY)
    assert seen == [set(plan.forward.cpus), {last}]
