"""The command compare. Run: python -m pytest tests/compare/test_command.py"""

import dataclasses
import errno
import json
import resource
import tempfile

import pytest
from odd_systems import SET_AFFINITY, run_oddly
from patching import set_everywhere
from places import SCRIPT
from rounds_made_up import make_round
from small import TINY, needs_two_cpus

from split_affinity.compare.command import image_flops
from split_affinity.machine.topology import read_topology
from split_affinity.models.cost import measure_model
from split_affinity.options.commands import parse_arguments
from split_affinity.options.settings import Settings
from split_affinity.runs.measurement import measured_settings
from split_affinity.training.schedules import SCHEDULES
from train_split_affinity import main


@needs_two_cpus
@pytest.mark.alone
def test_a_comparison(in_tmp, capfd, monkeypatch):
    rounds = 2
    set_everywhere(monkeypatch, "ROUNDS", rounds)
    set_everywhere(monkeypatch, "MOST_REPEATS", 0)
    arguments = "--model resnet18 --image-size 32 -b 2 --num-classes 5 --steps 1".split()
    arguments += ["--accumulate", "2"]
    places = ["--json", "c.json", "--output-dir", "out"]
    assert main(["compare", *arguments, *places]) == 0
    printed = capfd.readouterr().out
    figures = json.loads((in_tmp / "c.json").read_text())
    ways = [row["way"] for row in figures["ways"]]
    assert ways[0] == "plain"
    assert ways[1] in ("plain bf16", "plain nhwc")
    assert ways[2:] == ["none", *SCHEDULES, "ranks"]
    none = figures["ways"][2]
    for row in figures["ways"]:
        low, high = row["images_per_s_range"]
        assert 0 < low <= row["images_per_s"] <= high
        assert row["stray_s"] == 0
        assert row["peak_memory_bytes"] > 2**27
        ranks = row["way"] == "ranks"
        assert (row["bound_share"] is None) == (row["way"].startswith("plain") or ranks)
        assert row["way"] in printed
        batches = (2, "2 x 1 x 2") if ranks else (1, "2 x 2")
        assert (row["ranks"], row["batches"]) == batches
    assert none["to_none"] == 1
    assert set(none["matrix_share"]) == {"all"}
    assert set(figures["ways"][-2]["matrix_share"]) == {"forward", "backward"}
    assert set(figures["ways"][-1]["matrix_share"]) == {"rank 0", "rank 1"}
    assert [figures["plans"]["ranks"][key]["name"] for key in ("forward", "backward")] == [
        "rank 0",
        "rank 1",
    ]
    assert "; ranks: data parallelism, a process on each group of the split" in printed
    assert figures["verdict"] in printed
    assert printed.count("images/s: plain") == len(figures["rounds"]) == rounds
    assert sum(each["counts"] for each in figures["rounds"]) == rounds
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert max(map(len, tables)) <= 80
    assert (in_tmp / "out/timeline.png").stat().st_size > 10_000
    log = (in_tmp / "logs.md").read_text()
    assert log.count("\n## ") == 1
    assert f"\n{figures['verdict']}\n" in log
    assert "compare, resnet18, split even" in log


@pytest.fixture
def measured(monkeypatch):
    """A comparison whose rounds take no time, of all ways that are compared."""

    def round_of(way):
        lanes = [group.name for group in way.plan.groups]
        each = make_round(1.0, rates=dict.fromkeys(lanes, 1e9))
        records = [
            dataclasses.replace(record, lane=lane)
            for record, lane in zip(each.steps[0].records, (lanes[0], lanes[-1]), strict=True)
        ]
        steps = (dataclasses.replace(each.steps[0], records=tuple(records)),)
        return dataclasses.replace(each, steps=steps, busy=dict.fromkeys(lanes, 0.5))

    def rounds(ways, *others):
        return [{way.name: round_of(way) for way in ways}] * 7

    set_everywhere(monkeypatch, "run_rounds", rounds)
    return ["compare", *TINY, "--accumulate", "2"]


PLACES = {"--json": "c.json", "--output-dir": "out", "--log-file": "logs.md"}


@pytest.fixture
def full_log(in_tmp):
    """A log that can take no more, beside files that can."""
    with (in_tmp / "full.md").open("wb") as file:
        file.truncate(2**24)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**24, before[1]))
    yield "full.md"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@needs_two_cpus
@pytest.mark.parametrize(
    ("full", "reasons", "written"),
    [
        (["--log-file"], ["full.md: cannot be written: File too large"], ["c.json", "out"]),
        (["--json"], ["/dev/full: cannot be written: No space left on device"], ["logs.md", "out"]),
        (
            ["--json", "--log-file"],
            [
                "/dev/full: cannot be written: No space left on device",
                "full.md: cannot be written: File too large",
            ],
            ["out"],
        ),
    ],
)
def test_a_full_disk_costs_no_more_than_what_it_does_not_take(
    in_tmp, capsys, measured, full_log, full, reasons, written
):
    """It took minutes to measure."""
    places = PLACES | {"--log-file": full_log} if "--log-file" in full else dict(PLACES)
    places |= {"--json": "/dev/full"} if "--json" in full else {}
    assert main([*measured, *(text for pair in places.items() for text in pair)]) == 1
    said = capsys.readouterr()
    assert said.err == f"train_split_affinity.py: error: {'; '.join(reasons)}\n"
    assert "Verdict: " in said.out
    assert {path.name for path in in_tmp.iterdir()} == {*written, "full.md"}
    assert (in_tmp / "out/timeline.png").stat().st_size > 10_000


@needs_two_cpus
def test_a_picture_that_cannot_be_drawn_costs_neither_figures_nor_log(
    in_tmp, capsys, measured, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(in_tmp))
    monkeypatch.setattr(tempfile, "tempdir", None)
    set_everywhere(monkeypatch, "draw_comparison", lambda *args: 1 / 0)
    assert main([*measured, *(text for pair in PLACES.items() for text in pair)]) == 1
    reason = "an error that was not foreseen: ZeroDivisionError: division by zero; traceback in "
    assert reason in capsys.readouterr().err
    assert (in_tmp / "c.json").stat().st_size
    assert "## " in (in_tmp / "logs.md").read_text()


def test_the_work_of_a_teacher_is_counted():
    settings = Settings(model="resnet56", num_classes=10, image_size=32)
    alone, teacher = (measure_model(name, 10, 32).flops for name in ("resnet56", "resnet18"))
    assert image_flops(settings) == alone
    taught = image_flops(dataclasses.replace(settings, teacher="resnet18"))
    assert taught["forward"] == alone["forward"] + teacher["forward"]
    assert taught["backward"] == alone["backward"]


@pytest.mark.parametrize("option", [["--split", "none"], ["--schedule", "delayed"]])
def test_compare_chooses_schedules_itself(in_tmp, capsys, option):
    assert main(["compare", *option]) == 2
    assert f"{' '.join(option)}: compare runs every schedule" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--split", "1:2"], ["--split", "none"]])
def test_without_affinity_there_is_no_split_to_compare(in_tmp, options):
    what = f"{SET_AFFINITY}={errno.EPERM}"
    done = run_oddly(what, SCRIPT, "compare", *TINY, *options)
    assert done.stderr == (
        "train_split_affinity.py: error: compare: the system keeps no thread on cores "
        "(sched_setaffinity: Operation not permitted); there is no split to compare, only train "
        "--split none works\n"
    )
    assert done.returncode == 2
    assert not list(in_tmp.iterdir())


def test_a_recipe_can_be_compared(tmp_path):
    _, settings = parse_arguments(["compare", "--recipe", "cifar10", "--model", "resnet18"])
    measured = measured_settings(settings, read_topology())
    assert (measured.epochs, measured.num_classes, measured.image_size) == (None, 1000, 224)
