"""The command plan. Run: python -m pytest tests/runs/test_plan.py"""

import json
import math
import os
import platform

import machines
import pytest
import torch
from places import ROOT
from small import TINY

from split_affinity import PROGRAM
from split_affinity.machine.description import read_machine
from split_affinity.machine.plan import this_host
from split_affinity.machine.topology import read_topology
from train_split_affinity import main


def test_plan_prints_and_writes_nothing(in_tmp, capsys):
    assert main(["plan", "--split", "even"]) == 0
    printed = capsys.readouterr().out
    assert "F forward, B backward" in printed
    assert "loader    cores" in printed
    assert printed.endswith(
        "model resnet50: 25,557,032 parameters for 1000 classes, 97.7 MiB; "
        "an image of 224 px takes 8.18 GFLOP forward, 16.12 backward\n"
        f"next: python {PROGRAM}\n"
    )
    assert not list(in_tmp.iterdir())


def test_plan_says_what_it_takes_for_data_that_is_not_there_yet(in_tmp, capsys):
    options = ["--model", "resnet56", "--num-classes", "7", "--data-path", "later"]
    assert main(["plan", *options]) == 0
    note, model = capsys.readouterr().out.splitlines()[-3:-1]
    assert note == "note: later does not exist yet: 7 classes, 224 px taken instead"
    assert "for 7 classes" in model


def test_plan_for_a_server_from_any_computer(in_tmp, capsys, monkeypatch):
    """It is recorded there, and planned for where this system cannot keep threads on cores."""
    machines.write_machine(in_tmp / "server", machines.SIXTEEN_CORES)
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert main(["plan", "--machine", "server", "--record", "server.json", *TINY]) == 0
    first = capsys.readouterr().out.splitlines()
    assert first.pop(-2) == "machine recorded in server.json"
    assert main(["plan", "--machine", "server.json", *TINY]) == 0
    precision = "precision fp32: the CPU of {} shows no native bfloat16 arithmetic "
    (line,) = (line for line in first if line.startswith(precision.format("server")))
    first[first.index(line)] = line.replace("server", "server.json")
    assert capsys.readouterr().out.splitlines() == first
    assert first[0].startswith("Example CPU @ 3.0GHz: 1 socket, 16 cores, 32 hardware threads; ")
    assert "forward   cores 0-7,16-23, 8 threads: forward pass" in first
    assert first[-2].startswith("model squeezenet1_1: ")


def test_the_machine_of_this_computer_is_recorded(in_tmp):
    assert main(["plan", "--record", "here.json", *TINY]) == 0
    assert read_machine(in_tmp / "here.json") == read_topology()
    assert platform.node() not in (in_tmp / "here.json").read_text()
    assert [path.name for path in in_tmp.iterdir()] == ["here.json"]


@pytest.mark.parametrize("ranks", ["1", "4", "64"])
def test_the_plan_of_a_large_server_fits_a_screen(in_tmp, capsys, ranks):
    options = ["--machine", str(ROOT / "docs/machines/server-two-sockets.json"), "--ranks", ranks]
    assert main(["plan", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum(math.ceil(len(line) / 80) for line in printed) <= 38, "40, with a prompt and notes"
    told = [line for line in printed if line.startswith(("forward ", "rank "))]
    assert len(told) == {"1": 1, "4": 4, "64": 2}[ranks]
    assert ("62 more ranks: plan --json FILE has them all" in printed) == (ranks == "64")


def test_a_plan_for_programs(in_tmp, capsys):
    """docs/files.md has its fields."""
    machines.write_machine(in_tmp / "server", machines.TWO_SOCKETS)
    options = "plan --machine server --ranks 2 --split 1:3 -j 3 --json plan.json".split()
    assert main([*options, *TINY[:-2]]) == 0
    assert "plan written to plan.json\n" in capsys.readouterr().out
    text = (in_tmp / "plan.json").read_text()
    assert "/" not in text, "no paths"
    values = json.loads(text)
    (machine,), (first, second) = values.pop("machines"), values.pop("ranks")
    assert values == {
        "format": "train_split_affinity plan",
        "version": 1,
        "precision": "fp32",
        "precision_reason": "the CPU shows no native bfloat16 arithmetic (AMX, AVX512-BF16 or Arm "
        "BF16)",
    }
    assert len(machine.pop("topology")) == machine["cores"] == 8
    assert machine["cpu_model"] == "Example CPU @ 3.0GHz"
    forward, backward = first.pop("groups")
    assert first == {
        "rank": 0,
        "machine": 0,
        "split": "1:3",
        "loaders": 3,
        "loader_cpus": [0],
        "notes": [],
        "measured": {},
    }
    assert (forward["name"], forward["cpus"]) == ("forward", [0])
    assert backward == {
        "name": "backward",
        "cpus": [2, 4, 6],
        "threads": 3,
        "cores": 3,
        "cores_by_socket": {"0": 3},
        "cores_by_node": {"0": 3},
        "cores_by_l3": {"0": 1, "4": 2},
        "cores_by_capacity": {"1024": 3},
    }
    assert [group["cpus"] for group in second["groups"]] == [[1], [3, 5, 7]]


def test_core_lists_are_those_of_the_machine_planned_for(in_tmp, capsys):
    machines.write_machine(in_tmp / "server", machines.SIXTEEN_CORES)
    options = ["plan", "--machine", "server", *TINY, "--forward-cores", "30-31"]
    assert main([*options, "--backward-cores", "14-15"]) == 0
    assert "forward   cores 30-31, 2 threads: forward pass" in capsys.readouterr().out
    assert main([*options, "--backward-cores", "32"]) == 2
    message = "--backward-cores 32: CPU 32 is not in server (allowed: 0-31)\n"
    assert capsys.readouterr().err.endswith(message)


def test_this_machine_never_stands_for_a_recorded_one(in_tmp, capsys):
    """Whatever goes wrong, and however many ranks there are: its file has a name."""
    file = ROOT / "docs/machines/server-two-sockets.json"
    (in_tmp / "mac.json").write_text(
        file.read_text().replace('affinity": true', 'affinity": false')
    )
    (in_tmp / "part.json").write_text(file.read_text().replace('"0-255"', '"0-127"'))
    printed = []
    for machine, options, told in (
        (file, "--ranks 2", "rank 1 on server-two-sockets.json: forward"),
        (file, "--ranks 2", "precision bf16: the CPU of server-two-sockets.json computes"),
        (file, "--ranks 129", "129 ranks on server-two-sockets.json: more than its 128 cores"),
        ("mac.json", "", "--split even: the system of mac.json cannot keep threads on cores"),
        ("part.json", "--loader-cores 128", "CPU 128 is not allowed on part.json (allowed: 0-127)"),
    ):
        main(["plan", "--machine", str(machine), *options.split(), *TINY])
        printed += capsys.readouterr()
        assert told in "".join(printed[-2:])
    for words in ("this machine", "this process", platform.node()):
        assert words not in "".join(printed)
    topology = read_machine(file)
    assert this_host(topology).name == file.name, "of ranks under torchrun, too"


def test_plan_of_another_model(in_tmp, capsys):
    arguments = "--model resnet56 --num-classes 10 --image-size 32".split()
    assert main(["plan", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == (
        "model resnet56: 853,018 parameters for 10 classes, 3.3 MiB; "
        "an image of 32 px takes 0.25 GFLOP forward, 0.50 backward"
    )


def test_plan_shows_the_teacher(in_tmp, capsys):
    arguments = "--model resnet56 --num-classes 10 --image-size 32".split()
    arguments += "--teacher resnet18 --teacher-weights later.pth".split()
    torch.save({"conv1.weight": torch.zeros(1)}, "later.pth")
    assert main(["plan", *arguments]) == 0
    model, teacher = capsys.readouterr().out.splitlines()[-3:-1]
    assert model.startswith("model resnet56: 853,018 parameters for 10 classes")
    assert teacher == "teacher resnet18: 42.7 MiB; an image takes 0.07 GFLOP more forward"


@pytest.mark.parametrize(
    ("arguments", "work", "frozen"),
    [
        (
            [],
            "3.63 GFLOP forward, 0.00 backward",
            "frozen: 60 of 62 weights (body); forward has 99.97% of the work",
        ),
        (
            ["--epochs", "10", "--freeze-epochs", "1"],
            "3.63 GFLOP forward, 7.02 backward",
            "frozen: 60 of 62 weights (body) for 1 epoch; forward has 34.07% of the work in most "
            "epochs",
        ),
        (
            ["--epochs", "10", "--freeze-epochs", "9"],
            "3.63 GFLOP forward, 0.00 backward",
            "frozen: 60 of 62 weights (body) for 9 epochs; forward has 99.97% of the work in most "
            "epochs",
        ),
    ],
)
def test_plan_of_a_model_with_a_frozen_body(in_tmp, capsys, arguments, work, frozen):
    assert main(["plan", "--model", "resnet18", "--freeze", "body", *arguments]) == 0
    *_, model, last, _ = capsys.readouterr().out.splitlines()
    assert model.endswith(f"an image of 224 px takes {work}")
    assert last == frozen


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ([], 224),
        (["--image-size", "64"], 64),
        (["--min-res", "32", "--max-res", "96", "--end-ramp", "3"], 96),
        (["--recipe", "imagenet-subset"], 128),
    ],
)
def test_plan_counts_for_the_image_size_of_the_validation(in_tmp, capsys, arguments, size):
    place = ["--data-path", "data"] if "--recipe" in arguments else []
    assert main(["plan", "--model", "squeezenet1_1", *arguments, *place]) == 0
    assert f"an image of {size} px takes" in capsys.readouterr().out
