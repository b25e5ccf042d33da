"""Which ways to train are compared. Run: python -m pytest tests/compare/test_ways.py"""

import dataclasses

import machines
import pytest
from torch import distributed

from split_affinity.compare.report import split_lines
from split_affinity.compare.ways import all_ways, micro_batches, way_of_rank, way_settings
from split_affinity.errors import UserError
from split_affinity.machine.plan import Group
from split_affinity.machine.topology import read_topology
from split_affinity.options.commands import parse_arguments
from split_affinity.options.contradictions import contradictions
from split_affinity.options.settings import Settings, images_in_step
from split_affinity.training.schedules import SCHEDULES
from train_split_affinity import main


@pytest.mark.parametrize(
    ("batch", "parts"), [(32, 4), (8, 4), (4, 2), (2, 2), (6, 2), (9, 3), (7, 7)]
)
def test_micro_batches(batch, parts):
    assert micro_batches(batch) == parts


def test_one_image_cannot_be_divided():
    with pytest.raises(UserError, match="--batch-size 1: overlap needs"):
        micro_batches(1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_ways_have_the_same_images_in_a_step(accumulate):
    settings = Settings(batch_size=32, accumulate=accumulate, split="1:2", precision="bf16")
    ways = way_settings(settings)
    assert list(ways)[:3] == ["plain", "plain bf16", "none"]
    assert list(ways)[3:] == ["sequential", "overlap", "delayed", "ranks"]
    for way, each in ways.items():
        assert images_in_step(each) == 32 * accumulate
        assert each.ranks == (2 if way == "ranks" else 1)
        assert each.split == ("none" if list(ways).index(way) < 3 else "1:2")
        assert each.schedule == (way if way in SCHEDULES else "sequential")
        assert not list(contradictions("train", each, each.ranks))
    assert ways["overlap"].accumulate == (4 if accumulate == 1 else 3)


@pytest.mark.parametrize(
    ("batches", "of_each"),
    [
        ((8, 32), (4, 32)),
        ((2, 1), (1, 1)),
        ((1, 16), (1, 8)),
        ((3, 4), (3, 2)),
        ((3, 2), None),  # single images are too few for BatchNorm
        ((1, 7), None),
    ],
)
def test_two_ranks_have_a_step_between_them(batches, of_each):
    accumulate, batch_size = batches
    settings = Settings(accumulate=accumulate, batch_size=batch_size, precision="fp32")
    ways = way_settings(settings)
    found = ways.get("ranks")
    assert (found and (found.accumulate, found.batch_size)) == of_each


def test_why_there_are_no_ranks(tmp_path, monkeypatch):
    settings = Settings(batch_size=3, precision="bf16", num_classes=3)
    for name, rows, cpus in (("two", machines.TWO, 2), ("one", machines.ONE, 1)):
        root = machines.write_machine(tmp_path / name, rows)
        topology = read_topology(root, frozenset(range(cpus)))
        odd, even = (dataclasses.replace(settings, accumulate=count) for count in (3, 2))
        reason = "the 3 x 3 images of a step cannot be halved"
        reason = reason if name == "two" else "both groups are the same core"
        ways = all_ways(odd, topology)
        assert ways[-1].name == "delayed"
        assert f"note: no ranks beside split even: {reason}" in split_lines(ways)
        ways = all_ways(even, topology)
        assert ways[-1].name == ("ranks" if name == "two" else "delayed")
        notes = [line for line in split_lines(ways) if "no ranks" in line]
        assert len(notes) == (name == "one")
    monkeypatch.setattr(distributed, "is_gloo_available", lambda: False)
    root = machines.write_machine(tmp_path / "no gloo", machines.TWO)
    ways = all_ways(even, read_topology(root, frozenset(range(2))))
    assert ways[-1].name == "delayed"
    lines = list(split_lines(ways))
    assert lines[
        2
    ] == "note: no ranks beside split even: this build of torch has no gloo to conn" + ("ect them")


@pytest.mark.parametrize(("precision", "best"), [("bf16", "plain bf16"), ("fp32", "plain nhwc")])
def test_plain_loops_are_named_for_what_they_are(precision, best):
    ways = way_settings(Settings(precision=precision, channels_last=False, accumulate=2))
    flags = {way: (each.precision, each.channels_last) for way, each in ways.items()}
    assert {way for way, each in ways.items() if not each.fold_norm} == {"plain", best}
    assert flags == {
        "plain": ("fp32", False),
        best: (precision, True),
        **dict.fromkeys(("none", "sequential", "overlap", "delayed", "ranks"), (precision, False)),
    }


def test_several_splits_have_their_schedules_each():
    ways = way_settings(Settings(split="even,auto", accumulate=2))
    assert list(ways)[2:] == [
        "none",
        "sequential even",
        "overlap even",
        "delayed even",
        "ranks even",
        "sequential auto",
        "overlap auto",
        "delayed auto",
        "ranks auto",
    ]
    assert (ways["delayed auto"].split, ways["delayed auto"].schedule) == ("auto", "delayed")
    assert (ways["ranks even"].split, ways["ranks auto"].split) == ("even", "auto")


def ways_on_four_cores(tmp_path, **options):
    """The groups of each way to train, and the CPUs of its loaders, on four cores of two
    hardware threads each.
    """
    settings = Settings(batch_size=4, accumulate=2, precision="bf16", num_classes=3, **options)
    root = machines.write_machine(tmp_path, machines.SMT_FAR)
    ways = all_ways(settings, read_topology(root, frozenset(range(8))))
    return {
        way.name: ([(g.cpus, g.threads) for g in way.plan.groups], way.plan.loader_cpus)
        for way in ways
    }


def test_all_ways_have_the_cores_of_lists(tmp_path):
    ways = ways_on_four_cores(
        tmp_path,
        forward_cores=(1,),
        backward_cores=(2, 3),
        loader_cores=(0,),
        backward_threads=4,
    )
    one_lane, split = [((1, 2, 3), 3)], [((1,), 1), ((2, 3), 4)]
    assert ways == {
        **dict.fromkeys(("plain", "plain bf16", "none"), (one_lane, (0,))),
        **dict.fromkeys(("sequential", "overlap", "delayed", "ranks"), (split, (0,))),
    }


@pytest.mark.parametrize(
    ("loaders", "of_ranks"),
    [(None, [(1,), (2, 3)]), ((1, 2), [(1,), (2, 3)]), ((0, 1), [(0,), (0,)])],
)
def test_each_rank_has_a_lane_on_a_group_and_loaders_off_the_other(tmp_path, loaders, of_ranks):
    root = machines.write_machine(tmp_path, machines.SMT_FAR)
    settings = Settings(batch_size=4, accumulate=2, precision="bf16", num_classes=3)
    settings = dataclasses.replace(
        settings, forward_cores=(1,), backward_cores=(2, 3), loader_cores=loaders
    )
    way = all_ways(settings, read_topology(root, frozenset(range(8))))[-1]
    assert (way.name, way.ranks) == ("ranks", 2)
    plans = [way_of_rank(way, rank).plan for rank in range(2)]
    assert [plan.groups for plan in plans] == [
        (Group("rank 0", (1,), 1, 1),),
        (Group("rank 1", (2, 3), 2, 2),),
    ]
    assert [plan.loader_cpus for plan in plans] == of_ranks


def test_thread_counts_of_groups_leave_one_lane_all_its_threads(tmp_path):
    ways = ways_on_four_cores(tmp_path, forward_threads=1)
    assert ways["none"] == ways["plain"]
    assert ways["none"][0] == [(tuple(range(8)), 4)]
    assert [threads for _, threads in ways["delayed"][0]] == [1, 2]


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [
        ("", 4),
        ("--accumulate 1", 1),
        ("--accumulate 5 --quick", 5),
        ("--quick", 1),
        ("--recipe cifar10", 1),
        ("--recipe imagenet-full", 4),
        ("--recipe imagenet-full --quick", 1),
        ("--recipe imagenet-full --accumulate 2", 2),
    ],
)
def test_how_many_batches_a_compared_step_has(options, accumulate):
    assert parse_arguments(["compare", *options.split()])[1].accumulate == accumulate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "--quick is for compare, not for train"),
        (["plan", "--preload", "--data-path", "x"], "--preload is for compare, not for plan"),
        (["compare", "--preload"], "--preload needs --data-path"),
        (["--split", "even,1:2"], "--split even,1:2: several splits are for compare, train takes "),
        (["compare", "--split", "even,1:2,even"], "'even,1:2,even' names even twice"),
        (["compare", "--split", "even,half"], "'half' is not even, auto, none, or forward:backwar"),
        (["compare", "--split", "even,"], "'' is not even, auto, none, or forward:backward such "),
        (["compare", "--split", "1:1,none"], "--split 1:1,none: compare runs every schedule besi"),
    ],
)
def test_what_cannot_be_compared_is_one_line(in_tmp, capsys, arguments, message):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(in_tmp.iterdir())
