"""Comparison. Run: python -m pytest tests/test_comparison.py"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import signal
import statistics
from collections import Counter

import machines
import pytest
import torch
from conftest import needs_two_cpus, small_model
from matplotlib.text import Text
from patching import set_everywhere
from records import PLAN, record
from torch import distributed, nn

from split_affinity import ALLOWED_CPUS
from split_affinity.compare.command import image_flops
from split_affinity.compare.loops import LaneLoop, Order, PlainLoop, Round, rounds_of, supplied
from split_affinity.compare.report import (
    comparison_json,
    disturbance_lines,
    draw_comparison,
    split_lines,
    tables_of,
)
from split_affinity.compare.rounds import (
    Pace,
    choose_batches,
    choose_steps,
    find_pace,
    measure,
    round_of_ranks,
    rounds_used,
    run_rounds,
    start_ways,
    with_phases,
)
from split_affinity.compare.verdict import (
    Comparison,
    compared_way,
    judge_rounds,
    matrix_share,
    verdict,
)
from split_affinity.compare.ways import (
    ROUNDS,
    Way,
    all_ways,
    micro_batches,
    of_one_rank,
    plan_of_ranks,
    way_settings,
)
from split_affinity.data.loader import training_feed
from split_affinity.data.samples import EpochOrder
from split_affinity.errors import RunError, UserError
from split_affinity.lanes.contention import Company
from split_affinity.machine.plan import CorePlan, Group, PhaseTimes
from split_affinity.machine.topology import read_topology
from split_affinity.models.cost import measure_model
from split_affinity.models.freezing import trained
from split_affinity.models.own import SmallResNet
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.command_line import parse_arguments
from split_affinity.options.contradictions import contradictions
from split_affinity.options.settings import Settings, images_in_step
from split_affinity.reports.timeline import by_start
from split_affinity.runs.measurement import Elsewhere, measured_settings
from split_affinity.text import speed_text
from split_affinity.training.network import Teacher, in_turn
from split_affinity.training.optimizer import build_optimizer
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.steps import StepResult, StopRequest
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
    plans = [of_one_rank(way, rank).plan for rank in range(2)]
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
        ("", 8),
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


def of_photos(photos, **options):
    """Settings to compare with: twelve photographs, in steps of three batches of two."""
    return Settings(
        data_path=photos, num_classes=2, image_size=32, batch_size=2, accumulate=3, **options
    )


def test_the_images_of_a_comparison_may_be_mixed(photos):
    settings = of_photos(photos, mixup_alpha=0.2, cutmix_alpha=1.0, preload=True)
    with supplied(settings, ()) as supply:
        batches = list(supply(1, 9))
    assert [images.shape for images, _ in batches] == [(2, 3, 32, 32)] * 9
    for _, targets in batches:
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 2)
    assert batches[0] is batches[8], "eight batches have been loaded: they are taken again"


def test_loaders_have_nothing_left_to_do_after_a_round(photos, monkeypatch):
    """A round may have more batches than the data; each has others, the same for all ways."""
    feeds, make = [], training_feed
    set_everywhere(monkeypatch, "training_feed", lambda *a: feeds.append(make(*a)) or feeds[0])
    with supplied(of_photos(photos, workers=2), sorted(ALLOWED_CPUS)) as supply:
        first, second, again = (list(supply(number, 20)) for number in (1, 2, 1))
        assert feeds[0]._loader._iterator._tasks_outstanding == 0
    assert len(first) == 20
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("preload", [False, True])
def test_ranks_have_a_round_s_images_dealt_out(photos, preload, monkeypatch):
    """As many batches as were asked for each, which are those of one process in turn."""
    settings = of_photos(photos, workers=0, preload=preload, ranks=2)
    feeds, make = [], training_feed
    set_everywhere(monkeypatch, "training_feed", lambda *a: feeds.append(make(*a)) or feeds[-1])
    keys, dealt = [], []
    for rank in range(2):
        with supplied(settings, (), rank) as supply:
            dealt.append([images for images, _ in supply(1, 9)])
            feeds[-1]._order.begin(1, 0, 18)
            keys.append(list(feeds[-1]._order))
    order = EpochOrder(feeds[-1]._order._indices, 2, settings.seed)
    assert order.begin(1, 0, 18) == 18
    assert in_turn(keys) == list(order)
    assert [len(each) for each in dealt] == [9, 9]
    assert not torch.equal(dealt[0][0], dealt[1][0])


def make_round(step_s, forward_s=0.25, backward_s=0.5, rates=None):
    records = (record("forward", 0, forward_s), record("backward", 1, backward_s))
    steps = tuple(StepResult(n, 1.0, 8, step_s * n, records) for n in (1, 2, 3))
    rates = rates or {"forward": 100.0, "backward": 200.0}
    alone = PhaseTimes(forward_s, backward_s, 0.125, 0.0)
    return Round(steps, {"forward": 0.5, "backward": 0.9}, alone, rates, 2**30)


def make_round_of_ranks(step_s):
    """Steps in which rank 1 takes twice as long."""
    rounds = []
    for rank in range(2):
        each = make_round(step_s, 0.25 * (1 + rank), 0.5 * (1 + rank), rates={f"rank {rank}": 1e9})
        steps = [
            dataclasses.replace(
                step,
                records=tuple(dataclasses.replace(r, lane=f"rank {rank}") for r in step.records),
            )
            for step in each.steps
        ]
        rounds.append(dataclasses.replace(each, steps=tuple(steps), busy={f"rank {rank}": 0.5}))
    return round_of_ranks(rounds)


def make_way(name, settings=None):
    settings = settings or Settings(batch_size=4, accumulate=2)
    schedule = name if name in SCHEDULES else "sequential"
    split = "even" if name in (*SCHEDULES, "ranks") else "none"
    ranks = 2 if name == "ranks" else 1
    settings = dataclasses.replace(settings, schedule=schedule, split=split, ranks=ranks)
    return Way(name, settings, PLAN if ranks == 1 else plan_of_ranks(PLAN))


def test_a_part_of_a_step_tells_the_whole_one():
    """Two of eight batches, in 2.1 s of which the update took 0.1."""
    steps = (StepResult(1, 1.0, 64, 2.1, ()),)
    part = Round(steps, {}, None, {}, 2**30, update_s=0.1, share=0.25)
    assert part.step_s == pytest.approx(8.1)
    assert part.images_per_s == pytest.approx(256 / 8.1)


def test_the_figures_of_a_way():
    rounds = {
        "plain": [make_round(5.0), make_round(5.0), make_round(5.0)],
        "plain bf16": [make_round(4.0), make_round(4.0), make_round(4.0)],
        "none": [make_round(1.0), make_round(2.0), make_round(0.5)],
        "delayed": [make_round(2.0), make_round(2.0), make_round(2.0)],
    }
    flops = {"forward": 10.0, "backward": 30.0}
    row = compared_way(make_way("delayed"), rounds, flops)
    assert (row.cores, row.batches, row.timed_batches) == ("0 + 1-2", "2 x 4", 2)
    assert (row.split, row.schedule) == ("even", "delayed")
    assert row.images_per_s == pytest.approx(8 / 4), "the median of steps of 2, 4 and 6 s"
    assert row.to_none == pytest.approx(0.5)
    assert row.to_none_rounds == pytest.approx((0.5, 1.0, 0.25))
    assert row.to_plain == pytest.approx(2)
    assert row.bound_images_per_s == pytest.approx(8 / 1.125)
    assert row.bound_share == pytest.approx(1.125 / 4)
    assert row.gflops == pytest.approx(40 * 2 / 1e9)
    assert row.matrix_share["forward"] == pytest.approx(10 * 8 / 0.25 / 100)
    assert row.matrix_share["backward"] == pytest.approx(30 * 8 / 0.5 / 200)
    one_lane = {"none": [make_round(1.0, rates={"all": 1000.0})], "plain bf16": [make_round(2.0)]}
    row = compared_way(make_way("none"), one_lane, flops)
    assert row.matrix_share == pytest.approx({"all": 40 * 8 / 2 / 1000})


def test_a_part_of_a_step_counts_as_the_images_that_it_has():
    whole, part = make_round(1.0), dataclasses.replace(make_round(0.5), share=0.5)
    rounds = {"none": [whole, part], "plain bf16": [whole, whole]}
    row = compared_way(make_way("none"), rounds, {"forward": 10.0, "backward": 30.0})
    assert row.images_per_s_range == pytest.approx((8 / 2, 16 / 2))
    assert row.timed_batches == 1
    assert row.matrix_share["forward"] == pytest.approx(10 * 8 / 0.25 / 100)


def test_how_busy_the_plain_loop_is_by_physical_cores(tmp_path, monkeypatch):
    root = machines.write_machine(tmp_path, machines.SMT_FAR)
    topology = read_topology(root, frozenset(range(8)))
    settings = Settings(batch_size=2, num_classes=3, image_size=8, precision="fp32", split="1:2")
    plain = all_ways(settings, topology)[0]
    step = StepResult(0, 1.0, 2, step_s=0.5, records=(), main_thread_s=2.0)
    set_everywhere(monkeypatch, "build_model", lambda name, *shape: small_model(*shape[:2]))
    monkeypatch.setattr(PlainLoop, "step", lambda *args: (step, 0.125))
    set_everywhere(monkeypatch, "start_team", set)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with contextlib.closing(rounds_of(plain, topology.online)) as rounds:
        next(rounds)
        measured = rounds.send(Order(0, 1, 2, keep_memory=True))
    assert (measured.busy, measured.update_s, measured.share) == ({"all": 1.0}, 0.125, 1.0)


@pytest.mark.parametrize(("precision", "layout"), [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("share", [None, 0.3])
def test_a_plain_loop_is_the_textbook_one(monkeypatch, precision, layout, share):
    """Two batches, then one update: as the same lines written out; with a teacher too."""
    settings = Settings(
        model="small",
        batch_size=4,
        accumulate=2,
        num_classes=3,
        image_size=8,
        precision=precision,
        channels_last=layout,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        label_smoothing=0.1,
    )
    monkeypatch.setitem(OWN_MODELS, "small", small_model)
    set_everywhere(monkeypatch, "start_team", set)
    torch.manual_seed(1)
    teacher = small_model(3, 8).eval()
    made = None if share is None else Teacher(teacher, share)
    set_everywhere(monkeypatch, "build_teacher", lambda settings, classes: made)
    group = Group("all", tuple(sorted(ALLOWED_CPUS)), 1)
    way = Way("plain", settings, CorePlan("none", group, group, group.cpus))
    with contextlib.ExitStack() as stack:
        loop = PlainLoop(way, group.cpus, stack)
        reference = copy.deepcopy(loop._model)
        batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
        torch.manual_seed(2)
        step, update_s = loop.step(batches)
    assert (step.images, 0 < update_s < step.step_s) == (8, True)
    torch.manual_seed(2)
    for images, labels in batches:
        if layout:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = reference(images)
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
            if share:
                target = teacher(images).detach().float().softmax(1)
                loss = (1 - share) * loss + share * nn.functional.cross_entropy(logits, target)
        (loss / 2).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    pairs = zip(loop._model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@needs_two_cpus
def test_all_ways_freeze_alike(monkeypatch, split_plan, one_lane_plan):
    """Plain loops too, and blocks are left out in all of them."""
    monkeypatch.setitem(OWN_MODELS, "blocks", lambda classes, _: SmallResNet(classes, 1))
    set_everywhere(monkeypatch, "start_team", set)
    settings = Settings(
        model="blocks",
        num_classes=3,
        image_size=8,
        batch_size=4,
        precision="fp32",
        freeze="body",
        stochastic_depth=0.5,
        opt="rmsprop",
        lr=0.0,
        preload=True,
    )
    built, real = [], build_optimizer
    set_everywhere(
        monkeypatch, "build_optimizer", lambda model, *_: built.append(model) or real(model, *_)
    )
    for name, chosen in way_settings(settings).items():
        loop = PlainLoop if name.startswith("plain") else LaneLoop
        if chosen.ranks > 1:  # what one of them makes of it by itself
            chosen = dataclasses.replace(chosen, ranks=1, split="none")
        with contextlib.ExitStack() as stack:
            plan = one_lane_plan if chosen.split == "none" else split_plan
            loop(Way(name, chosen, plan), (), stack).round(Order(1, 1, 1, True))
    assert len(built) == 7
    begun = SmallResNet(3, blocks=1).state_dict()
    for model in built:
        assert list(trained(model)) == ["fc.weight", "fc.bias"]
        assert {name for name, each in model.named_modules() if each.training} == {"", "fc"}
        for name, value in model.named_buffers():
            assert torch.equal(value, begun[name]), name
        assert [len(block.bn2._forward_hooks) for block in (*model.stage1, *model.stage3)] == [1, 1]


def threads_of_plain_loops(ways):
    """For each way the threads of its loop: as PyTorch has them, and as OpenMP gave them."""
    yield
    for way in ways:
        with contextlib.ExitStack() as stack:
            loop = PlainLoop(way, way.plan.forward.cpus, stack)
            yield torch.get_num_threads(), loop._group.threads


@needs_two_cpus
def test_a_plain_loop_has_a_thread_for_each_core(photos):
    """In a process of its own, as no other work has started a team of threads there."""
    threads = torch.get_num_threads()
    group = Group("all", tuple(sorted(ALLOWED_CPUS)), threads)
    plan = CorePlan("none", group, group, group.cpus)
    settings = of_photos(photos, model="squeezenet1_1", precision="fp32", workers=1)
    settings = dataclasses.replace(settings, image_size=224)  # to transform these takes a team
    loading = Way("plain", settings, plan)
    preloaded = Way("plain", dataclasses.replace(settings, preload=True), plan)
    for way in (loading, preloaded):
        process = Elsewhere(lambda: None, threads_of_plain_loops, [way])
        with contextlib.closing(process):
            next(process)
            assert next(process) == (threads, threads)


def place_of_plain_loop(way):
    """The threads of a plain loop, and the CPUs that they may run on."""
    yield
    with contextlib.ExitStack() as stack:
        loop = PlainLoop(way, way.plan.forward.cpus, stack)
        yield loop._group.threads, os.sched_getaffinity(0)


@needs_two_cpus
def test_a_plain_loop_stays_on_listed_cores(photos):
    cpu = max(ALLOWED_CPUS)
    group = Group("all", (cpu,), 1)
    settings = of_photos(photos, model="squeezenet1_1", precision="fp32", workers=1)
    way = Way("plain", settings, CorePlan("none", group, group, group.cpus))
    process = Elsewhere(lambda: None, place_of_plain_loop, way)
    with contextlib.closing(process):
        next(process)
        assert next(process) == (1, {cpu})


@contextlib.contextmanager
def ranks_of(settings, plan):
    """A way in two ranks, a thread each, ready to begin: it, and its processes."""
    groups = (dataclasses.replace(group, threads=1) for group in plan.groups)
    plan = dataclasses.replace(plan, **{group.name: group for group in groups})
    way = Way("ranks", dataclasses.replace(settings, ranks=2), plan_of_ranks(plan))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        yield way, start_ways(stack, stop, [way], sorted(ALLOWED_CPUS))["ranks"]


RANKED = {"model": "resnet20", "precision": "fp32"}


@needs_two_cpus
@pytest.mark.parametrize(("preload", "workers"), [(True, 0), (False, 1)])
def test_a_round_of_ranks(photos, split_plan, preload, workers):
    """They add up their gradients once in a step, each within its own group."""
    settings = of_photos(photos, preload=preload, workers=workers, **RANKED)
    with ranks_of(settings, split_plan) as (way, processes):
        whole = measure(processes, Order(1, 3, 2, keep_memory=True))
        part = measure(processes, Order(2, 1, 1, keep_memory=False))
    lanes = {"rank 0": split_plan.forward.cpu_set, "rank 1": split_plan.backward.cpu_set}
    assert [step.images for step in whole.steps] == [12, 12]
    for step in whole.steps:
        phases = Counter((record.lane, record.phase) for record in step.records)
        counts = {"forward": 3, "backward": 3, "reduce": 1, "update": 1}
        assert phases == {(lane, phase): counts[phase] for lane in lanes for phase in counts}
        assert step.records == tuple(by_start(step.records))
        assert {record.lane: record.mask for record in step.records} == lanes
        assert step.total("stray_s") == 0
        ends = {each.lane: each.end_s for each in step.records if each.phase == "reduce"}
        starts = {each.lane: each.start_s for each in step.records if each.phase == "reduce"}
        assert max(starts.values()) < min(ends.values()), "one clock: nobody has the sum too early"
    assert (whole.share, part.share, part.steps[0].images) == (1.0, pytest.approx(1 / 3), 4)
    assert whole.alone is None
    assert 0 < whole.update_s < whole.step_s
    assert set(whole.busy) == set(whole.matrix_flops) == set(lanes)
    assert whole.peak_memory_bytes > 2**28, "two processes with torch"
    row = compared_way(way, {"ranks": [whole], "none": [part], "plain bf16": [part]}, {"x": 1})
    assert (row.ranks, row.batches, row.timed_batches) == (2, "2 x 3 x 2", 3)


@needs_two_cpus
@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_that_dies_ends_the_comparison(photos, split_plan, workers):
    settings = of_photos(photos, workers=workers, timeout=600.0, **RANKED)
    with ranks_of(settings, split_plan) as (_, processes):
        measure(processes, Order(1, 3, 1, keep_memory=True))
        os.kill(processes[1]._process.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="ended by itself|lost another one"):
            measure(processes, Order(2, 3, 1, keep_memory=True))
    assert [process._process.exitcode for process in processes] == [-9, -9]


def test_the_rounds_of_ranks_are_one():
    """What comes but once in a step is counted from when the last rank has its gradients."""
    rounds = []
    for rank, (backward_s, reduce_s) in enumerate([(0.5, 0.375), (0.75, 0.125)]):
        lane, reduced_s = f"rank {rank}", backward_s + reduce_s
        phases = (record("backward", 0, backward_s), record("reduce", backward_s, reduce_s))
        phases += (record("update", reduced_s, 0.25),)
        records = tuple(dataclasses.replace(each, lane=lane) for each in phases)
        company = Company(0.0, 1.0, {lane: 0.2 + rank / 10}, stolen=0.1 * rank)
        step = StepResult(1, 1.0, 64, 1.125, records, company=company)
        alone = PhaseTimes(0.0, 0.5, 0.25, 0.0)
        rounds.append(Round((step,), {lane: 0.5}, alone, {lane: 1e9}, 2**30, 0.0, 0.25))
    both = round_of_ranks(rounds)
    assert (both.peak_memory_bytes, both.update_s, both.alone) == (2**31, 0.375, None)
    assert both.step_s == pytest.approx(0.75 / 0.25 + 0.375)
    assert both.images_per_s == pytest.approx(64 / 0.25 / both.step_s)
    assert (both.busy, both.matrix_flops) == (
        {"rank 0": 0.5, "rank 1": 0.5},
        {"rank 0": 1e9, "rank 1": 1e9},
    )
    assert len(both.steps[0].records) == 6
    assert both.steps[0].company.stolen == pytest.approx(0.1)
    assert both.disturbance == (
        pytest.approx(0.3),
        "other processes took 30% of the rank 1 cores",
    )
    assert matrix_share("rank 1", both, {"forward": 1e6, "backward": 2e6}) == pytest.approx(
        3e6 * both.images_per_s / 2 / 1e9
    )
    assert round_of_ranks(rounds[:1]) is rounds[0]


@needs_two_cpus
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("preload", [False, True])
def test_a_round_on_lanes(photos, split_plan, monkeypatch, schedule, preload):
    set_everywhere(monkeypatch, "build_model", lambda name, *shape: small_model(*shape[:2]))
    set_everywhere(monkeypatch, "matrix_flops", lambda bf16: 1e9)
    options = {"precision": "fp32", "tuned_malloc": False, "workers": 0, "preload": preload}
    settings = of_photos(photos, split="even", schedule=schedule, **options)
    way = Way(schedule, settings, split_plan)
    with contextlib.closing(rounds_of(way, sorted(ALLOWED_CPUS))) as rounds:
        assert next(rounds) is None
        whole = rounds.send(Order(1, 3, 2, keep_memory=True))
        part = rounds.send(Order(2, 1, 1, keep_memory=False))
    assert [step.images for step in whole.steps] == [6, 6]
    for step in whole.steps:
        phases = Counter(record.phase for record in step.records)
        assert (phases["forward"], phases["backward"], phases["update"]) == (3, 3, 1)
        assert phases["refresh"] == (schedule == "delayed")
    assert (whole.share, part.share) == (1.0, pytest.approx(1 / 3))
    assert [step.images for step in part.steps] == [2]
    assert set(whole.matrix_flops) == {"forward", "backward"}


def make_pace(rest_s, step_s, strict=True):
    return Pace(rest_s, step_s, batches=8, strict=strict)


@pytest.mark.parametrize(
    ("round_s", "batches"),
    [
        (math.inf, (8, 8, 8, 8)),
        (58, (8, 8, 8, 8)),
        (57, (7, 8, 8, 8)),
        (44, (2, 5, 8, 8)),
        (32, (1, 1, 8, 8)),
        (1, (1, 1, 8, 8)),
    ],
)
def test_what_of_a_step_is_measured_in_limited_time(round_s, batches):
    """Only where batches come one after the other, a part of the step will do."""
    paces = {
        "plain": make_pace(1, 16.0),
        "none": make_pace(1, 8.0),
        "overlap": make_pace(3, 10.0, strict=False),
        "delayed": make_pace(3, 16.0, strict=False),
    }
    assert tuple(choose_batches(paces, 1, round_s).values()) == batches


@pytest.mark.parametrize(
    ("asked", "shortest_s", "steps"),
    [(None, 3.0, 1), (None, 0.5, 4), (None, 0.001, 32), (1, 0.001, 1), (8, 9.0, 2)],
)
def test_how_many_steps_a_round_has(asked, shortest_s, steps):
    assert choose_steps(asked, [make_pace(1, 9.0), make_pace(1, shortest_s)]) == steps


def test_every_way_leaves_a_batch_out():
    settings = Settings(batch_size=32, precision="bf16", num_classes=3, image_size=32)
    for accumulate, left_out in ((8, [1] * 7), (1, [1, 1, 1, 1, 2, 1, 1])):
        asked = dataclasses.replace(settings, accumulate=accumulate)
        assert [way.warmup for way in all_ways(asked, read_topology())] == left_out


def test_phases_without_company_are_those_of_sequential():
    alone = PhaseTimes(1.0, 2.0, 0.5, 0.0)
    others = {
        "sequential 1:2": dataclasses.replace(make_round(1.0), alone=alone),
        "sequential": make_round(1.0),
    }
    bare = dataclasses.replace(make_round(1.0), alone=None)
    steps = (StepResult(1, 1.0, 8, 1.0, (*bare.steps[0].records, record("refresh", 2, 0.25))),)
    way = dataclasses.replace(make_way("delayed"), name="delayed 1:2")
    found = with_phases(way, dataclasses.replace(bare, steps=steps), others)
    assert found.alone == PhaseTimes(1.0, 2.0, 0.5, 0.25)
    assert with_phases(make_way("plain bf16"), bare, others) is bare
    own = make_round(2.0)
    assert with_phases(make_way("overlap"), own, others) is own
    assert with_phases(make_way("ranks"), bare, others) is bare


def test_the_pace_of_a_way_by_its_first_round():
    part = {"update_s": 0.25, "share": 0.125}
    first = dataclasses.replace(make_round(0.5), steps=make_round(0.5).steps[:1], **part)
    settings = Settings(batch_size=8, accumulate=8)
    pace = find_pace(make_way("none", settings), first, turn_s=3.0)
    assert pace == Pace(2.5, 8 * 0.25 + 0.25, 8, strict=True)
    pace = find_pace(make_way("plain", settings), first, turn_s=3.0)
    assert pace.rest_s == 2.5, "a plain loop leaves a batch out, too"
    # Forward 0.25, backward 0.5, update 0.125: two batches take 1.375 s if overlapped, eight 4.375.
    first = dataclasses.replace(first, steps=make_round(2.75).steps[:1], share=0.25)
    pace = find_pace(make_way("overlap", settings), first, turn_s=7.5)
    assert pace == Pace(4.75, 2 * 4.375, 8, strict=False)


def disturbed(each, share, stolen=0.0):
    company = Company(0.0, 1.0, {"forward": share, "backward": 0.0}, stolen)
    steps = (dataclasses.replace(each.steps[0], company=company), *each.steps[1:])
    return dataclasses.replace(each, steps=steps)


class FakeWays:
    """Ways to train whose rounds are known; counts them."""

    def __init__(self, shares):
        self.orders, self.shares = [], [0.0, *shares]

    def __getitem__(self, way):
        return self

    def send(self, order):
        self.orders.append(order)
        each = dataclasses.replace(make_round(1.0), share=order.batches / 2)
        share = self.shares[order.number] if order.number < len(self.shares) else 0.0
        return disturbed(each, share)


@pytest.mark.parametrize(
    ("shares", "count", "used"),
    [
        ([], 7, (1, 2, 3, 4, 5, 6, 7)),
        ([0.09] * 7, 7, (1, 2, 3, 4, 5, 6, 7)),
        ([0, 0.1, 0, 0.4], 9, (1, 3, 5, 6, 7, 8, 9)),
        ([0.3] * 3, 10, (4, 5, 6, 7, 8, 9, 10)),
        ([0.3, 0.2, 0.5, 0.9], 10, (2, 5, 6, 7, 8, 9, 10)),
        ([0.5] * 6 + [0.4] * 4, 10, (1, 2, 3, 7, 8, 9, 10)),
    ],
)
def test_disturbed_rounds_are_repeated_and_left_out(shares, count, used, monkeypatch, capsys):
    fakes = FakeWays(shares)
    set_everywhere(monkeypatch, "start_ways", lambda *args: fakes)
    set_everywhere(monkeypatch, "measure", FakeWays.send)
    ways = [make_way(name, Settings(batch_size=4, accumulate=2)) for name in ("none", "overlap")]
    rounds = run_rounds(ways, (0, 1, 2), 0.0, drawn=False)
    assert {way: len(each) for way, each in rounds.items()} == {"none": count, "overlap": count}
    assert [index + 1 for index in rounds_used(rounds)] == list(used)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("disturbed: other processes took") == sum(share >= 0.1 for share in shares)
    assert printed.count(", a repetition, images/s: none ") == count - 7


def test_the_words_for_disturbed_rounds():
    clean = make_round(1.0)
    by_host = disturbed(clean, 0.2, stolen=0.3)
    rounds = {"none": [clean] * 9, "delayed": [*[clean] * 7, disturbed(clean, 0.25), by_host]}
    assert list(disturbance_lines(rounds)) == [
        "round 8 was disturbed: other processes took 25% of the forward cores (delayed); left out",
        "round 9 was disturbed: the hypervisor took 30% (delayed); left out",
    ]
    rounds = {way: each[3:] for way, each in rounds.items()}
    kept = "kept, for want of an undisturbed one"
    assert [line.rpartition("; ")[2] for line in disturbance_lines(rounds)] == [kept, kept]


def test_the_last_round_is_whole_for_the_picture(monkeypatch, capsys):
    fakes = FakeWays([])
    set_everywhere(monkeypatch, "start_ways", lambda *args: fakes)
    set_everywhere(monkeypatch, "measure", FakeWays.send)
    set_everywhere(monkeypatch, "TIME_LIMIT_S", 0)
    run_rounds([make_way(name) for name in ("plain", "none")], (0,), 0.0, drawn=True)
    assert [order.batches for order in fakes.orders] == [1, 1] * 7 + [1, 2]
    assert "a part is measured: plain 1 of 2, none 1 of 2 batches" in " ".join(
        capsys.readouterr().out.split()
    )


def make_comparison(split="even", **options):
    settings = Settings(
        batch_size=32, accumulate=8, num_classes=1000, image_size=224, precision="bf16", split=split
    )
    ways = [
        Way(name, each, PLAN if each.ranks == 1 else plan_of_ranks(PLAN))
        for name, each in way_settings(settings).items()
    ]
    rounds = {
        way.name: [make_round(1.0) if way.ranks == 1 else make_round_of_ranks(1.0)] * 7
        for way in ways
    }
    flops = {"forward": 1.0, "backward": 1.0}
    topology = read_topology()
    return Comparison(settings, settings, topology, ways, rounds | options, flops, 90.0)


@pytest.mark.parametrize("split", ["even", "even,auto,12:20"])
def test_tables_fit_eighty_columns(split):
    found = make_comparison(split)
    for table in tables_of(found):
        widths = {len(line) for line in table.splitlines()[1:]}
        assert len(widths) == 1
        assert max(widths) <= 80
    assert all(way.name in tables_of(found)[0] for way in found.ways)


@pytest.mark.parametrize(
    ("images_per_s", "text"),
    [
        (0.5, "0.50"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1234, "1234"),
    ],
)
def test_speeds_have_three_digits(images_per_s, text):
    assert speed_text(images_per_s) == text


def test_a_verdict_from_disturbed_rounds_says_so():
    rounds = [*[make_round(1.0)] * 5, *[disturbed(make_round(1.0), 0.5)] * 2]
    quiet, loud = make_comparison(), make_comparison(none=rounds)
    assert "disturbed" not in quiet.verdict
    assert loud.verdict.endswith(" But 2 of the 7 rounds were disturbed by others.")
    assert [each["counts"] for each in json.loads(comparison_json(loud))["rounds"]] == [True] * 7


def test_a_picture_has_a_whole_step_of_each_way_with_lanes(monkeypatch, tmp_path):
    figures = []
    set_everywhere(monkeypatch, "save_figure", lambda figure, path: figures.append(figure))
    long = make_round(9.0, forward_s=2.0, backward_s=6.0)
    draw_comparison(tmp_path / "x.png", make_comparison(delayed=[long] * 7))
    axes = figures[0].axes
    titles = [ax.get_title(loc="left").partition(":")[0] for ax in axes]
    assert titles == ["none", "sequential", "overlap", "delayed", "ranks", ""]
    assert [ax.get_xlim()[1] for ax in axes] == [pytest.approx(axes[0].get_xlim()[1])] * 6
    rows = [[label.get_text() for label in ax.get_yticklabels()] for ax in axes[-2:]]
    assert rows == [["rank 0 lane", "core 0"], ["rank 1 lane", "core 1", "core 2"]]
    assert axes[0].get_xlim()[1] >= 7.0, "delayed goes back from 1.0 s to 7.0 s"
    assert any("torch" in text.get_text() for text in figures[0].figure.findobj(Text))


def make_rows(splits=1, ranks=False):
    names = ["plain", "plain bf16", "none", *SCHEDULES, *["ranks"] * ranks]
    rounds = {name: [make_round(1.0)] for name in names}
    flops = {"forward": 1.0, "backward": 1.0}
    rows = [compared_way(make_way(name), rounds, flops) for name in names]
    return rows + rows[3:] * (splits - 1)


@pytest.mark.parametrize(
    ("ratios", "judgement"),
    [
        ((0.8, 0.9, 0.9, 0.9, 0.95, 0.97, 0.99), "the split costs speed"),
        ((0.8, 0.9, 0.9, 0.9, 0.95, 0.97, 1.02), "the split costs speed"),
        ((0.8, 0.9, 0.9, 0.9, 0.95, 0.97, 1.04), "no difference beyond the noise"),
        ((0.8, 0.9, 0.9, 0.9, 0.95, 1.001, 1.002), "no difference beyond the noise"),
        ((0.8, 0.99, 1.2, 1.2, 1.2, 1.3, 1.3), "no difference beyond the noise"),
        ((0.998, 0.999, 1.2, 1.2, 1.2, 1.3, 1.3), "no difference beyond the noise"),
        ((0.96, 1.03, 1.2, 1.2, 1.2, 1.3, 1.3), "no difference beyond the noise"),
        ((0.98, 1.03, 1.2, 1.2, 1.2, 1.3, 1.3), "the split pays"),
        ((1.01, 1.03, 1.2, 1.2, 1.2, 1.3, 1.3), "the split pays"),
    ],
)
def test_the_verdict(ratios, judgement):
    rows = make_rows()
    rows[3:5] = (dataclasses.replace(row, to_none=0.5) for row in rows[3:5])
    rows[5] = dataclasses.replace(rows[5], to_none=ratios[3], to_none_rounds=ratios[::-1])
    text = verdict(rows)
    assert text.startswith(f"Verdict: {judgement}. The fastest schedule of the split, delayed, ")
    assert f"at {ratios[3]:.2f} of the speed of one lane" in text
    assert f"({ratios[0]:.2f} to {ratios[-1]:.2f} in 7 rounds)" in text
    assert "at 1.00 of that of a plain PyTorch loop with the best flags, plain bf16." in text
    advice = {
        "the split costs speed": "For speed alone, train with --split none.",
        "the split pays": "For speed alone, train with --split even --schedule delayed.",
        "no difference beyond the noise": "For speed alone, either will do.",
    }
    assert f"{advice[judgement]} Delayed has weights one update old." in text


def test_the_verdict_on_listed_cores():
    rounds = {"to_none": 1.2, "to_none_rounds": (1.2,) * 7, "split": "lists"}
    text = verdict([dataclasses.replace(row, **rounds) for row in make_rows()])
    assert "at 1.20 of the speed of one lane over all of these cores (1.20 to 1.20 in 7 " in text
    assert "For speed alone, train on these cores with --schedule " in text


def test_the_best_of_many_schedules_needs_all_rounds():
    ratios = (0.99, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1)
    assert judge_rounds(ratios, candidates=9) == "the split pays"
    assert judge_rounds(ratios, candidates=12) == "no difference beyond the noise"
    assert judge_rounds((1.01, *ratios[1:]), candidates=12) == "the split pays"


@pytest.mark.parametrize(
    ("best", "ratios", "said", "advice"),
    [
        (0.75, (0.97, 0.99, 1.0, 1.0, 1.0, 1.01, 1.02), True, "train with --split none"),
        (0.75, (0.8,) * 7, True, "train with --split none"),
        (0.75, (0.7,) * 7, False, "train with --split none"),
        (1.2, (1.1,) * 7, True, "train with --split even --schedule sequential"),
        (1.2, (1.1, 1.3, 1.3, 1.3, 1.4, 1.4, 1.4), True, "train with --split even --schedule sequ"),
        (1.2, (1.3,) * 7, True, "train in two ranks (torchrun --nproc-per-node 2, --split none)"),
        (0.75, (1.1,) * 7, True, "train in two ranks (torchrun --nproc-per-node 2, --split none)"),
    ],
)
def test_the_verdict_on_ranks_is_one_of_a_rival(best, ratios, said, advice):
    """They are no schedule of the split, whatever their speed."""
    rows = [dataclasses.replace(row, to_none_rounds=(1.0,) * 7) for row in make_rows(ranks=True)]
    rounds = {"to_none": best, "to_none_rounds": (best,) * 7}
    rows[3:6] = (dataclasses.replace(row, **rounds) for row in rows[3:6])
    rows[6] = dataclasses.replace(rows[6], to_none=ratios[3], to_none_rounds=ratios)
    text = verdict(rows)
    assert "The fastest schedule of the split, sequential, trains at" in text
    sentence = (
        f" Data parallelism on the same groups, ranks, trains at {ratios[3]:.2f} of one lane's "
        f"speed ({ratios[0]:.2f} to {ratios[-1]:.2f}). For speed alone, "
    )
    assert (sentence in text) == said
    assert f" For speed alone, {advice}" in text


def simulate(speeds, noise, comparisons=2000):
    """The share of each judgement among simulated comparisons.

    `speeds` are the true ones of the schedules, three of each split, relative to one lane. Each
    way's time in each round has noise of its own; ratios are taken within a round, so that those of
    a round have one lane's noise in common; and the fastest schedule is chosen afterwards, by its
    median.
    """
    others, rows = make_rows()[:3], make_rows(len(speeds) // 3)[3:]
    dice, judged = random.Random(f"{speeds} {noise}"), Counter()
    for _ in range(comparisons):
        none_s = [dice.gauss(1, noise) for _ in range(ROUNDS)]
        simulated = []
        for row, speed in zip(rows, speeds, strict=True):
            ratios = [speed * time_s / dice.gauss(1, noise) for time_s in none_s]
            median = statistics.median(ratios)
            simulated.append(dataclasses.replace(row, to_none=median, to_none_rounds=tuple(ratios)))
        judged[verdict([*others, *simulated]).split(".")[0]] += 1
    return {text.removeprefix("Verdict: "): count / comparisons for text, count in judged.items()}


@pytest.mark.parametrize("noise", [0.03, 0.1])
@pytest.mark.parametrize(
    "speeds",
    [(0.5, 0.6, 1.0), (0.5, 1.0, 1.0), *((1.0, 1.0, 1.0) * splits for splits in (1, 2, 3, 4, 5))],
)
def test_a_difference_that_is_none_is_seldom_found(speeds, noise):
    """The fastest schedule is as fast as one lane: that the split pays is as wrong as that it
    costs speed.
    """
    judged = simulate(speeds, noise)
    assert 1 - judged["no difference beyond the noise"] <= 0.05, judged


@pytest.mark.parametrize(
    ("speeds", "judgement"),
    [
        ((0.5, 0.6, 1.1), "the split pays"),
        ((1.1, 1.1, 1.1), "the split pays"),
        ((0.5, 0.6, 0.9), "the split costs speed"),
        ((0.9, 0.9, 0.9), "the split costs speed"),
    ],
)
def test_a_difference_of_a_tenth_is_nearly_always_found(speeds, judgement):
    assert simulate(speeds, 0.03)[judgement] >= 0.97


@needs_two_cpus
def test_a_comparison(in_tmp, capfd, monkeypatch):
    set_everywhere(monkeypatch, "ROUNDS", 2)
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
        batches = (2, "2 x 1 x 2", 1) if ranks else (1, "2 x 2", 2)
        assert (row["ranks"], row["batches"], row["timed_batches"]) == batches
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
    assert printed.count("images/s: plain") == len(figures["rounds"]) == 2
    assert sum(each["counts"] for each in figures["rounds"]) == ROUNDS
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert max(map(len, tables)) <= 80
    assert (in_tmp / "out/timeline.png").stat().st_size > 10_000
    log = (in_tmp / "logs.md").read_text()
    assert log.count("\n## ") == 1
    assert f"\n{figures['verdict']}\n" in log
    assert "compare, resnet18, split even" in log


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


def test_a_recipe_can_be_compared(tmp_path):
    _, settings = parse_arguments(["compare", "--recipe", "cifar10", "--model", "resnet18"])
    measured = measured_settings(settings, read_topology())
    assert (measured.epochs, measured.num_classes, measured.image_size) == (None, 1000, 224)
