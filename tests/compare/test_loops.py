"""The plain loop, the loop on lanes, and that of ranks.

Run: python -m pytest tests/compare/test_loops.py
"""

import contextlib
import copy
import dataclasses
import os
import signal
from collections import Counter

import machines
import pytest
import torch
from patching import set_everywhere
from records import record
from rounds_made_up import by_round, make_round, make_way
from small import needs_two_cpus, small_model
from torch import nn

from split_affinity import ALLOWED_CPUS
from split_affinity.compare.loops import (
    LaneLoop,
    PlainLoop,
    RoundRequest,
    WayRound,
    batch_supply,
    rounds_of,
)
from split_affinity.compare.rounds import combine_ranks, measure_way, start_ways
from split_affinity.compare.verdict import compared_way, matrix_share
from split_affinity.compare.ways import Way, all_ways, plan_of_ranks, way_settings
from split_affinity.data.loader import training_loader
from split_affinity.data.samples import EpochOrder
from split_affinity.errors import RunError
from split_affinity.lanes.contention import Contention
from split_affinity.machine.plan import CorePlan, Group, PhaseTimes
from split_affinity.machine.topology import read_topology
from split_affinity.models.freezing import trainable_weights
from split_affinity.models.own import SmallResNet
from split_affinity.models.registry import OWN_MODELS
from split_affinity.options.settings import Settings
from split_affinity.reports.timeline import by_start
from split_affinity.runs.measurement import MeasuringProcess
from split_affinity.signals import StopRequest
from split_affinity.training.network import Teacher, interleave
from split_affinity.training.optimizer import build_optimizer
from split_affinity.training.schedules import SCHEDULES
from split_affinity.training.steps import StepResult


def of_photos(photos, **options):
    """Settings to compare with: twelve photographs, in steps of three batches of two."""
    return Settings(
        data_path=photos, num_classes=2, image_size=32, batch_size=2, accumulate=3, **options
    )


def test_the_images_of_a_comparison_may_be_mixed(photos):
    settings = of_photos(photos, mixup_alpha=0.2, cutmix_alpha=1.0, preload=True)
    with batch_supply(settings, ()) as supply:
        batches = list(supply(1, 9))
    assert [images.shape for images, _ in batches] == [(2, 3, 32, 32)] * 9
    for _, targets in batches:
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 2)
    assert batches[0] is batches[8], "eight batches have been loaded: they are taken again"


@pytest.mark.parametrize("preload", [False, True])
def test_a_comparison_has_the_weights_of_a_run_s_classes(photos, tmp_path, preload):
    path = tmp_path / "w.json"
    path.write_text('{"flower": 3}')
    settings = of_photos(photos, class_weights=str(path), preload=preload, workers=0)
    with batch_supply(settings, ()) as supply:
        assert list(supply.class_weights) == [1.5, 0.5]
        assert len(list(supply(1, 2))) == 2
    with batch_supply(of_photos(photos, workers=0), ()) as supply:
        assert supply.class_weights is None


def test_loaders_have_nothing_left_to_do_after_a_round(photos, monkeypatch):
    """A round may have more batches than the data; each has others, the same for all ways."""
    made, make = [], training_loader
    set_everywhere(monkeypatch, "training_loader", lambda *a: made.append(make(*a)) or made[0])
    with batch_supply(of_photos(photos, workers=2), sorted(ALLOWED_CPUS)) as supply:
        first, second, again = (list(supply(number, 20)) for number in (1, 2, 1))
        assert made[0]._loader._iterator._tasks_outstanding == 0
    assert len(first) == 20
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("preload", [False, True])
def test_ranks_have_a_round_s_images_dealt_out(photos, preload, monkeypatch):
    """As many batches as were asked for each, which are those of one process in turn."""
    settings = of_photos(photos, workers=0, preload=preload, ranks=2)
    made, make = [], training_loader
    set_everywhere(monkeypatch, "training_loader", lambda *a: made.append(make(*a)) or made[-1])
    keys, dealt = [], []
    for rank in range(2):
        with batch_supply(settings, (), rank) as supply:
            dealt.append([images for images, _ in supply(1, 9)])
            made[-1]._order.begin(1, 0, 18)
            keys.append(list(made[-1]._order))
    order = EpochOrder(made[-1]._order._indices, 2, settings.seed)
    assert order.begin(1, 0, 18) == 18
    assert interleave(keys) == list(order)
    assert [len(each) for each in dealt] == [9, 9]
    assert not torch.equal(dealt[0][0], dealt[1][0])


def test_the_figures_of_a_way():
    rounds = {
        "plain": [make_round(5.0), make_round(5.0), make_round(5.0)],
        "plain bf16": [make_round(4.0), make_round(4.0), make_round(4.0)],
        "none": [make_round(1.0), make_round(2.0), make_round(0.5)],
        "delayed": [make_round(2.0), make_round(2.0), make_round(2.0)],
    }
    flops = {"forward": 10.0, "backward": 30.0}
    row = compared_way(make_way("delayed"), by_round(rounds), flops)
    assert (row.cores, row.batches) == ("0 + 1-2", "2 x 4")
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
    row = compared_way(make_way("none"), by_round(one_lane), flops)
    assert row.matrix_share == pytest.approx({"all": 40 * 8 / 2 / 1000})


def test_how_busy_the_plain_loop_is_by_physical_cores(tmp_path, monkeypatch):
    root = machines.write_machine(tmp_path, machines.SMT_FAR)
    topology = read_topology(root, frozenset(range(8)))
    shape = {"batch_size": 2, "num_classes": 3, "image_size": 8, "workers": 2}
    settings = Settings(**shape, precision="fp32", split="1:2")
    plain = all_ways(settings, topology)[0]
    step = StepResult(0, 1.0, 2, step_s=0.5, records=(), main_thread_s=2.0)
    set_everywhere(monkeypatch, "build_model", lambda name, *shape: small_model(*shape[:2]))
    monkeypatch.setattr(PlainLoop, "step", lambda *args: step)
    set_everywhere(monkeypatch, "start_team", set)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with contextlib.closing(rounds_of(plain, topology.online)) as rounds:
        next(rounds)
        measured = rounds.send(RoundRequest(0, 2, keep_memory=True))
    assert (measured.busy, measured.step_s) == ({"all": 1.0}, 0.5)


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
        step = loop.step(batches)
    assert (step.images, step.main_thread_s > 0) == (8, True)
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


@pytest.mark.slow
@needs_two_cpus
def test_all_ways_freeze_alike(monkeypatch, split_plan, one_lane_plan):
    """Plain loops too, and blocks are left out in all of them."""
    monkeypatch.setitem(OWN_MODELS, "blocks", lambda classes, _: SmallResNet(classes, 1))
    set_everywhere(monkeypatch, "start_team", set)
    settings = Settings(
        workers=2,
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
            loop(Way(name, chosen, plan), (), stack).round(RoundRequest(1, 1, True))
    assert len(built) == 7
    begun = SmallResNet(3, blocks=1).state_dict()
    for model in built:
        assert list(trainable_weights(model)) == ["fc.weight", "fc.bias"]
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
@pytest.mark.alone
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
        process = MeasuringProcess(lambda: None, threads_of_plain_loops, [way])
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
@pytest.mark.alone
def test_a_plain_loop_stays_on_listed_cores(photos):
    cpu = max(ALLOWED_CPUS)
    group = Group("all", (cpu,), 1)
    settings = of_photos(photos, model="squeezenet1_1", precision="fp32", workers=1)
    way = Way("plain", settings, CorePlan("none", group, group, group.cpus))
    process = MeasuringProcess(lambda: None, place_of_plain_loop, way)
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
@pytest.mark.alone
def test_a_round_of_ranks(photos, split_plan, preload, workers):
    """They add up their gradients once in a step, each within its own group."""
    settings = of_photos(photos, preload=preload, workers=workers, **RANKED)
    with ranks_of(settings, split_plan) as (way, processes):
        two = measure_way(processes, RoundRequest(1, 2, keep_memory=True))
        one = measure_way(processes, RoundRequest(2, 1, keep_memory=False))
    lanes = {"rank 0": split_plan.forward.cpu_set, "rank 1": split_plan.backward.cpu_set}
    assert [step.images for step in (*two.steps, *one.steps)] == [12, 12, 12]
    for step in two.steps:
        phases = Counter((record.lane, record.phase) for record in step.records)
        counts = {"forward": 3, "backward": 3, "reduce": 1, "update": 1}
        assert phases == {(lane, phase): counts[phase] for lane in lanes for phase in counts}
        assert step.records == tuple(by_start(step.records))
        assert {record.lane: record.mask for record in step.records} == lanes
        assert step.total("stray_s") == 0
        ends = {each.lane: each.end_s for each in step.records if each.phase == "reduce"}
        starts = {each.lane: each.start_s for each in step.records if each.phase == "reduce"}
        assert max(starts.values()) < min(ends.values()), "one clock: nobody has the sum too early"
    assert two.phase_times_alone is None
    assert set(two.busy) == set(two.matrix_flops) == set(lanes)
    assert two.peak_memory_bytes > 2**28, "two processes with torch"
    row = compared_way(way, [{"ranks": two, "none": one, "plain bf16": one}], {"x": 1})
    assert (row.ranks, row.batches) == (2, "2 x 3 x 2")


@needs_two_cpus
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.alone
def test_a_rank_that_dies_ends_the_comparison(photos, split_plan, workers):
    settings = of_photos(photos, workers=workers, timeout=600.0, **RANKED)
    with ranks_of(settings, split_plan) as (_, processes):
        measure_way(processes, RoundRequest(1, 1, keep_memory=True))
        os.kill(processes[1]._process.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="was killed|lost another one"):
            measure_way(processes, RoundRequest(2, 1, keep_memory=True))
    assert [process._process.exitcode for process in processes] == [-9, -9]


def test_the_rounds_of_ranks_are_one():
    rounds = []
    for rank, (backward_s, reduce_s) in enumerate([(0.5, 0.375), (0.75, 0.125)]):
        lane, reduced_s = f"rank {rank}", backward_s + reduce_s
        phases = (record("backward", 0, backward_s), record("reduce", backward_s, reduce_s))
        phases += (record("update", reduced_s, 0.25),)
        records = tuple(dataclasses.replace(each, lane=lane) for each in phases)
        contention = Contention(0.0, 1.0, {lane: 0.2 + rank / 10}, stolen=0.1 * rank)
        step = StepResult(1, 1.0, 64, 1.125, records, contention=contention)
        alone = PhaseTimes(0.0, 0.5, 0.25, 0.0)
        rounds.append(WayRound((step,), {lane: 0.5}, alone, {lane: 1e9}, 2**30))
    both = combine_ranks(rounds)
    assert (both.peak_memory_bytes, both.step_s, both.phase_times_alone) == (2**31, 1.125, None)
    assert both.images_per_s == pytest.approx(64 / both.step_s)
    assert (both.busy, both.matrix_flops) == (
        {"rank 0": 0.5, "rank 1": 0.5},
        {"rank 0": 1e9, "rank 1": 1e9},
    )
    assert len(both.steps[0].records) == 6
    assert both.steps[0].contention.stolen == pytest.approx(0.1)
    assert both.disturbance == (
        pytest.approx(0.3),
        "other processes took 30% of the rank 1 cores",
    )
    assert matrix_share("rank 1", both, {"forward": 1e6, "backward": 2e6}) == pytest.approx(
        3e6 * both.images_per_s / 2 / 1e9
    )
    assert combine_ranks(rounds[:1]) is rounds[0]


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
        two = rounds.send(RoundRequest(1, 2, keep_memory=True))
        one = rounds.send(RoundRequest(2, 1, keep_memory=False))
    assert [step.images for step in (*two.steps, *one.steps)] == [6, 6, 6]
    for step in two.steps:
        phases = Counter(record.phase for record in step.records)
        assert (phases["forward"], phases["backward"], phases["update"]) == (3, 3, 1)
        assert phases["refresh"] == (schedule == "delayed")
    assert set(two.matrix_flops) == {"forward", "backward"}
