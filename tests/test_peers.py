"""The measurement beside other trainers. Run: python -m pytest tests/test_peers.py"""

import json
import time

import peers
import pytest
from other_trainers.pace import PeerRound, timed_round

from split_affinity.compare.ways import Way
from split_affinity.errors import RunError
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import read_topology
from split_affinity.options.settings import Settings

SMALL = ["--model", "resnet18", "--image-size", "32", "--batch-size", "2", "--steps", "1"]


def made_round(first_step_s=None, disturbed=(), **speeds):
    """A round of ways with these images/s; the named ones were disturbed."""
    return {
        name.replace("_", "-"): PeerRound(speed, first_step_s, "by x" * (name in disturbed), 2**30)
        for name, speed in speeds.items()
    }


def test_ratios_are_to_the_faster_way_of_timm_and_the_first_round_is_left_out():
    done = [
        made_round(first_step_s=60.0, timm=99, timm_compile=1, ours=1),
        made_round(timm=10, timm_compile=12, ours=12),
        made_round(timm=10, timm_compile=10, ours=15, disturbed=("ours",)),
        made_round(timm=10, timm_compile=16, ours=16),
    ]
    rival, found = peers.summaries(done)
    assert rival == "timm-compile"
    assert found["ours"]["ratios"] == [1.0, 1.5, 1.0]
    assert found["timm"]["images_per_s"] == [10, 10, 10]
    assert found["ours"]["disturbed"] == {2: "by x"}
    assert found["timm-compile"]["first_step_s"] == 60.0
    cells = [cell.strip() for cell in peers.table_of(rival, found).splitlines()[-1].split("|")]
    assert cells[1:6] == ["ours", "15.00", "12.00-16.00", "1.00", "1.00 to 1.50"]
    assert "disturbed: by x (ours)" in peers.describe_round(2, done[2])


def test_without_timm_the_first_way_is_compared_with():
    rounds = [made_round(ours=3, lightning=2)] * 2
    assert peers.summaries(rounds)[0] == "ours"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "tim"], "'tim' is none of timm, timm-compile,"),
        (["--rounds", "0"], "argument --rounds: "),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--ours", "--split even", "--peers", "ours"], "--ours '--split even': only"),
        (["--ours=--stepz 3", "--peers", "ours"], "--stepz"),
        (["--ours='", "--peers", "ours"], "No closing quotation"),
        (["--model", "resnet51"], "resnet51"),
        (["--cores", "4999", "--peers", "ours"], "--cores 4999: CPU 4999 is "),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_errors_are_one_line(in_tmp, capsys, arguments, words):
    try:
        code = peers.main(arguments)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("peers.py: error: ")
    assert words in error
    assert not list(in_tmp.iterdir())


def test_a_peer_that_is_not_installed_is_named_and_left_out(capsys, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: name == "timm")
    asked = peers.parsed([*SMALL, "--ours=", "--ours=--no-fused"])
    ways = peers.chosen_ways(asked, read_topology())
    names = ["timm", "timm-compile", "torchvision", "ours", "ours --no-fused"]
    assert [way.name for way in ways] == names
    assert [way.settings.fused for way in ways if way.name.startswith("ours")] == [True, False]
    printed = capsys.readouterr().out
    assert "transformers is left out: transformers is not installed (pip install -r " in printed
    assert "lightning is left out: " in printed
    monkeypatch.setattr(peers, "find_spec", lambda name: False)
    assert peers.main(["--peers", "timm,lightning"]) == 2
    assert "--peers timm,lightning: none of them is installed" in capsys.readouterr().err


def test_a_round_leaves_its_first_step_out():
    topology, steps = read_topology(), []

    def loop(count, step_done):
        for _ in range(count):
            time.sleep(0.0 if steps else 0.5)
            steps.append(count)
            step_done()

    settings = Settings(batch_size=3, split="none")
    way = Way("fake", settings, plan_cores(topology, settings))
    done = timed_round(loop, way, topology.online, 2)
    assert steps == [3, 3, 3]
    assert done.first_step_s >= 0.5
    assert done.images_per_s > 3 / 0.5
    with pytest.raises(RunError, match="fake: it made 0 of 2 steps"):
        timed_round(lambda count, step_done: None, way, topology.online, 1)


@pytest.mark.slow
def test_peers_take_turns(in_tmp, capsys):
    given = ["--peers", "torchvision,ours", "--rounds", "1", "--json", "peers.json"]
    assert peers.main([*SMALL, *given]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((in_tmp / "peers.json").read_text())
    assert figures["compared_with"] == "torchvision"
    assert set(figures["ways"]) == {"torchvision", "ours"}
    for name, each in figures["ways"].items():
        assert len(each["images_per_s"]) == len(each["ratios"]) == 1
        assert f"| {name} " in printed
