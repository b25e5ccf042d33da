"""Training runs inside this process. Run: python -m pytest tests/runs/test_training.py"""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import statistics
import threading
from pathlib import Path

import pytest
import torch
from patching import set_everywhere
from small import needs_two_cpus, read_metrics
from small_runs import ALL_SCHEDULES, TINY, interrupt, state_of, train

import train_split_affinity as script
from split_affinity import ALLOWED_CPUS, __version__
from split_affinity.errors import RunError, Stopped, UserError
from split_affinity.lanes.lane import Lanes, coordinating
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.precision import choose_precision
from split_affinity.machine.topology import read_topology
from split_affinity.models.cost import check_memory, weight_copies
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.settings import Settings
from split_affinity.runs.evaluation import VALIDATED_AHEAD
from split_affinity.runs.setup import build_train_state
from split_affinity.training.network import Network
from split_affinity.training.optimizer import total_steps
from split_affinity.training.steps import run_schedule
from split_affinity.training.update import TrainState
from train_split_affinity import main


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


@pytest.mark.alone
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
    message = rf"broken image {broken}: .* \(more than --max-bad-images 0\); to leave out "
    with pytest.raises(RunError, match=message):
        asked = {"data_path": tmp_path / "copy", "num_classes": None, "max_bad_images": 0}
        train(split="none", steps=9, **asked)
    assert f"broken image {broken}" in (in_tmp / "logs.md").read_text()


def test_one_broken_image_does_not_end_a_run_and_two_have_a_command(
    in_tmp, photos, tmp_path, capsys
):
    shutil.copytree(photos, tmp_path / "my photos")
    first, second = (
        tmp_path / f"my photos/train/{name}.jpg" for name in ("flower/0001", "temple/0003")
    )
    first.write_bytes(b"no picture")
    options = ["--model", "resnet20", "--image-size", "32", "-b", "4", "-j", "0", "--epochs", "1"]
    options += ["--data-path", str(tmp_path / "my photos"), "--output-dir", "out"]
    assert main(options) == 0
    assert f"warning: broken image {first}: " in capsys.readouterr().err
    shutil.rmtree("out")
    second.write_bytes(b"no picture")
    assert main(options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        " (more than --max-bad-images 1); to leave out up to 10 of them: python train_sp" in error
    )
    command = shlex.split(error.rpartition("python train_split_affinity.py ")[2])
    assert {"--resume", "auto", "--data-path", "--output-dir"} < {*command}
    assert command[command.index("--max-bad-images") + 1] == "10"
    assert main(command) == 0
    assert "finished after 3 of 3 steps" in capsys.readouterr().out


def test_a_batch_of_which_one_image_is_whole_is_trained_on(in_tmp, photos, tmp_path, capsys):
    """BatchNorm learns nothing from one, and a run that goes on would meet it again."""
    shutil.copytree(photos, tmp_path / "copy")
    for path in [*tmp_path.glob("copy/train/*/*.jpg")][1:]:
        path.write_bytes(b"no picture")
    options = ["--model", "resnet18", "--image-size", "32", "-b", "12", "-j", "0", "--epochs", "1"]
    options += ["--data-path", str(tmp_path / "copy"), "--output-dir", "out"]
    assert main([*options, "--max-bad-images", "3"]) == 1
    assert main([*options, "--max-bad-images", "11", "--resume", "auto"]) == 0
    assert "finished after 1 of 1 step\n" in capsys.readouterr().out


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
    evaluate = TrainState.evaluate
    monkeypatch.setattr(
        TrainState, "evaluate", lambda self, batch: (calls.append(1), evaluate(self, batch))[1]
    )
    with pytest.raises(Stopped):
        train(**epochs | {"batch_size": 1, "accumulate": 4}, output_dir=in_tmp)
    assert 2 <= len(calls) <= 2 + VALIDATED_AHEAD + 1 < 12
    assert not read_metrics(in_tmp, "epoch")
    assert read_metrics(in_tmp)[-1]["outcome"] == "stopped by SIGTERM after 3 of 6 steps"


def test_an_unexpected_exception_ends_the_lanes(in_tmp, monkeypatch):
    def fail(self, *args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(TrainState, "update", fail)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        train(split="none")
    assert caught.traceback[-1].name == "fail"
    assert not [thread for thread in threading.enumerate() if "lane" in thread.name]


def test_deterministic_is_set_for_the_run_only(in_tmp, monkeypatch):
    seen = []
    update = TrainState.update
    monkeypatch.setattr(
        TrainState,
        "update",
        lambda self, *args: (
            seen.append(torch.are_deterministic_algorithms_enabled()),
            update(self, *args),
        ),
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
        on = build_train_state(settings, lanes)
        switched_off = {"channels_last": False, "fused": False, "grads_to_none": False}
        off = build_train_state(
            dataclasses.replace(settings, precision="fp32", **switched_off), lanes
        )
    assert (on.network.bf16, on.network.channels_last, on.grads_to_none) == (True, True, True)
    assert (off.network.bf16, off.network.channels_last, off.grads_to_none) == (False, False, False)
    for train_state, last in ((on, True), (off, False)):
        weight = train_state.network.model.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
        assert bool(train_state.optimizer.param_groups[0]["fused"]) == last
    images = torch.randn(4, 3, 32, 32)
    seen = []
    for train_state in (on, off):
        train_state.network.model.conv1.register_forward_hook(
            lambda module, args, output: seen.append(
                (output.dtype, args[0].is_contiguous(memory_format=torch.channels_last))
            )
        )
        logits, _ = train_state.network.forward((images, None))
        assert logits.dtype == torch.float32
    assert seen == [(torch.bfloat16, True), (torch.float32, False)]


@pytest.mark.parametrize(
    ("asked", "bf16", "chosen", "reason"),
    [
        ("auto", "amx_bf16", "bf16", "the CPU computes bfloat16 natively (amx_bf16)"),
        ("auto", "", "fp32", "the CPU shows no native bfloat16 arithmetic"),
        ("fp32", "amx_bf16", "fp32", "as asked; the CPU computes bfloat16 natively"),
        ("bf16", "", "bf16", "as asked; the CPU shows no native bfloat16 arithmetic"),
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
    chosen = f"precision {settings['precision']}, fused_norm {settings['fused_norm']}"
    assert settings["fused_norm"] in ("on", "off")
    assert f"{chosen}, channels_last True" in log
    assert "- warning: cannot be tuned here" in log


def test_a_profiled_run_tells_where_its_time_went(in_tmp, no_pictures, capsys):
    given = {"split": "none", "forward_threads": 1, "log_file": in_tmp / "l.md", "operators": True}
    train(output_dir=in_tmp / "profiled", steps=10, **given)
    printed = capsys.readouterr().out
    assert "timeline.png, trace.json, metrics.jsonl, operators.csv\n" in printed
    assert "2 warm-up steps and 4 profiled ones left out" in printed
    assert "\noperators of steps 3 to 5, under PyTorch's profiler: " in printed
    assert "| all of backward " in printed
    assert (in_tmp / "profiled/operators.csv").read_text().startswith("rank,lane,phase,layer_gr")
    assert "<summary>operators of steps 3 to 5" in (in_tmp / "l.md").read_text()
    marked = [
        step["step"] for step in read_metrics(in_tmp / "profiled", "step") if "profiled" in step
    ]
    assert marked == [2, 3, 4, 5, 6]
    train(steps=2, **given)
    assert "no operators: --operators begins with the third step" in capsys.readouterr().out


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
    rows = {event["args"]["name"] for event in trace if event["name"] == "thread_name"}
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
        train_state = build_train_state(settings, lanes)
        copies = [train_state.network.copy() for _ in range(2 * (schedule == "delayed"))]
        train_state.network.backward(
            train_state.network.forward((torch.randn(4, 3, 32, 32), torch.zeros(4).long()))
        )
        train_state.update()
    weights = list(train_state.network.model.parameters())
    kept = [value for state in train_state.optimizer.state.values() for value in state.values()]
    average = list(train_state.average.values.values()) if train_state.average else []
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
