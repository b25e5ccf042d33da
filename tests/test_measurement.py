"""Measurement. Run: python -m pytest tests/test_measurement.py"""

import contextlib
import dataclasses
import itertools
import json
import os

import machines
import pytest
from conftest import needs_two_cpus
from records import PLAN, record

import train_split_affinity as tsa
from train_split_affinity import PhaseTimes, Settings

TINY = Settings(
    model="resnet18", image_size=32, batch_size=4, num_classes=5, workers=0, steps=1, lr=0.01
)


def never():
    """A `check_stop` that lets everything go on."""


# A process of its own


def squares(count):
    for number in range(count):
        yield number**2, os.getpid()


def broken(error):
    yield 1
    raise error


def dying():
    yield 1
    os._exit(9)


def endless():
    yield from iter(lambda: __import__("time").sleep(60), 1)


def test_an_iterator_elsewhere():
    with contextlib.closing(tsa.Elsewhere(never, squares, 3)) as results:
        values, processes = zip(*results, strict=True)
    assert values == (0, 1, 4)
    assert len(set(processes)) == 1
    assert processes[0] != os.getpid()


def test_an_error_elsewhere_arrives():
    with contextlib.closing(tsa.Elsewhere(never, broken, tsa.UserError("none such"))) as results:
        assert next(results) == 1
        with pytest.raises(tsa.UserError, match="none such"):
            next(results)


def test_a_process_that_dies_is_an_error():
    with contextlib.closing(tsa.Elsewhere(never, dying)) as results:
        assert next(results) == 1
        with pytest.raises(tsa.RunError, match="ended by itself"):
            next(results)


def test_waiting_for_a_result_can_be_stopped():
    checks = itertools.count()

    def check_stop():
        if next(checks) == 3:
            raise tsa.Stopped(2)

    with contextlib.closing(tsa.Elsewhere(check_stop, endless)) as results:
        with pytest.raises(tsa.Stopped):
            next(results)
        process = results._process
    assert process.exitcode == -9


# The split that suits a machine


@pytest.mark.parametrize(
    ("cores", "counts"),
    [(3, [1, 2]), (4, [1, 2, 3]), (5, [1, 2, 4]), (8, [2, 4, 6]), (16, [4, 8, 12])],
)
def test_group_sizes_to_measure(cores, counts):
    assert tsa.core_counts(cores) == counts


def perfect(count, work=(1.0, 2.0, 0.0, 0.0)):
    """Phase times that halve with twice the cores."""
    return PhaseTimes(*(seconds / count for seconds in work))


def test_phase_times_between_two_measurements():
    measured = {4: perfect(4), 12: perfect(12)}
    assert tsa.times_on(measured, 4) == perfect(4)
    between = dataclasses.astuple(tsa.times_on(measured, 6))
    assert between == pytest.approx(dataclasses.astuple(perfect(6)))


@pytest.mark.parametrize(
    ("schedule", "work", "best"),
    [
        ("delayed", (1.0, 2.0, 0.0, 0.0), 5),  # 5:11 bounds at 0.2, 6:10 as well: the first
        ("delayed", (1.0, 3.0, 0.0, 0.0), 4),
        ("delayed", (1.0, 1.0, 0.0, 0.0), 8),
        ("delayed", (3.0, 1.0, 0.0, 0.0), 12),
        ("sequential", (1.0, 1.0, 0.0, 0.0), 8),
        ("overlap", (1.0, 2.0, 0.0, 0.0), 6),
    ],
)
def test_the_best_split_of_work_that_scales_perfectly(schedule, work, best):
    measured = {count: perfect(count, work) for count in (4, 8, 12)}
    bounds_s = tsa.split_bounds_s(schedule, 4, measured, 16)
    assert list(bounds_s) == list(range(4, 13))
    expected_s = {}
    for forward in bounds_s:
        ours, theirs = perfect(forward, work), perfect(16 - forward, work)
        times = PhaseTimes(ours.forward_s, theirs.backward_s, 0.0, 0.0)
        expected_s[forward] = tsa.step_bound_s(schedule, times, 4)
    assert bounds_s == pytest.approx(expected_s)
    assert bounds_s[best] == pytest.approx(min(bounds_s.values()))


def machine(tmp_path, rows, count):
    return tsa.read_topology(machines.write_machine(tmp_path, rows), frozenset(range(count)))


@pytest.mark.parametrize(("rows", "cores"), [(machines.TWO, 2), (machines.ONE, 1)])
def test_two_cores_leave_no_choice(tmp_path, rows, cores):
    topology = machine(tmp_path, rows, cores)
    plan = tsa.plan_for(Settings(split="auto"), topology)
    assert plan.split == "auto, 1:1"
    assert plan.forward.cpus == (0,)
    assert plan.backward.cpus == (cores - 1,)
    assert "1:1 is the only choice" in plan.notes[-1]
    assert not plan.measured


def test_the_split_is_chosen_by_what_was_measured(tmp_path, monkeypatch):
    topology = machine(tmp_path, machines.SEVEN, 7)
    asked = []

    def measure(settings, topology, counts):
        asked.append(counts)
        return {count: perfect(count) for count in counts}

    monkeypatch.setattr(tsa, "measure_scaling", measure)
    plan = tsa.plan_for(Settings(split="auto", schedule="delayed"), topology)
    assert asked == [[2, 4, 5]]
    assert plan.split == "auto, 2:5"
    assert (plan.forward.cpus, plan.backward.cpus) == ((0, 1), (2, 3, 4, 5, 6))
    assert (
        "2:5 has the smallest bound of a delayed step, 0.500 s (3:4 has 0.500 s)"
        in (plan.notes[-1])
    )
    run = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert run["measured"]["4"]["forward_s"] == 0.25


def test_split_auto_contradicts_thread_counts(tmp_path):
    topology = machine(tmp_path, machines.SEVEN, 7)
    with pytest.raises(tsa.UserError, match="--split auto chooses the thread counts"):
        tsa.plan_for(Settings(split="auto", backward_threads=2), topology)


@needs_two_cpus
def test_measuring_groups_of_this_machine():
    topology = tsa.read_topology()
    measured = tsa.measure_scaling(TINY, topology, [1])
    assert list(measured) == [1]
    for seconds in dataclasses.astuple(measured[1]):
        assert 0 < seconds < 10


def test_measuring_meets_the_user_s_errors_first():
    with pytest.raises(tsa.UserError, match="--model resnet5"):
        tsa.measure_scaling(dataclasses.replace(TINY, model="resnet5"), tsa.read_topology(), [1])


# The comparison


@pytest.mark.parametrize(
    ("batch", "parts"), [(32, 4), (8, 4), (4, 2), (2, 2), (6, 2), (9, 3), (7, 7)]
)
def test_micro_batches(batch, parts):
    assert tsa.micro_batches(batch) == parts


def test_one_image_cannot_be_divided():
    with pytest.raises(tsa.UserError, match="--batch-size 1: overlap needs"):
        tsa.micro_batches(1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_ways_have_the_same_images_in_a_step(accumulate):
    settings = Settings(batch_size=32, accumulate=accumulate, split="1:2")
    chosen = {way: tsa.way_settings(settings, way) for way in tsa.WAYS}
    for way, each in chosen.items():
        assert each.batch_size * each.accumulate == 32 * accumulate
        assert each.split == ("none" if way in ("plain", "none") else "1:2")
        assert each.schedule == (way if way in tsa.SCHEDULES else "sequential")
        tsa.check_settings(each)
    assert chosen["overlap"].accumulate == (4 if accumulate == 1 else 3)


def test_operations_of_resnet50():
    """4.09 G multiply-adds forward (torchvision's own figure), two operations each; backward twice
    that, but for the gradient of the images, which nobody needs.
    """
    flops = tsa.count_flops(Settings(num_classes=1000))
    assert flops["forward"] == pytest.approx(2 * 4.09e9, rel=0.01)
    first_convolution = 2 * 3 * 64 * 7 * 7 * 112 * 112
    assert flops["backward"] == pytest.approx(2 * flops["forward"] - first_convolution, rel=1e-3)


def make_round(step_s, forward_s=0.25, backward_s=0.5, rates=None):
    records = (record("forward", 0, forward_s), record("backward", 1, backward_s))
    steps = tuple(tsa.StepResult(n, 1.0, 8, step_s * n, records) for n in (1, 2, 3))
    rates = rates or {"forward": 100.0, "backward": 200.0}
    alone = PhaseTimes(forward_s, backward_s, 0.125, 0.0)
    return tsa.Round(steps, {"forward": 0.5, "backward": 0.9}, alone, rates, 2**30)


def test_the_figures_of_a_way():
    rounds = {
        "plain": [make_round(4.0), make_round(4.0), make_round(4.0)],
        "none": [make_round(1.0), make_round(2.0), make_round(0.5)],
        "delayed": [make_round(2.0), make_round(2.0), make_round(2.0)],
    }
    settings = Settings(schedule="delayed", batch_size=4, accumulate=2)
    flops = {"forward": 10.0, "backward": 30.0}
    row = tsa.compared_way("delayed", rounds, settings, PLAN, flops)
    assert (row.cores, row.batches) == ("0 + 1-2", "2 x 4")
    assert row.images_per_s == pytest.approx(8 / 4), "the median of steps of 2, 4 and 6 s"
    assert row.to_none == pytest.approx(0.5)
    assert row.to_none_rounds == pytest.approx((0.5, 1.0, 0.25))
    assert row.to_plain == pytest.approx(2)
    assert row.bound_images_per_s == pytest.approx(8 / 1.125)
    assert row.bound_share == pytest.approx(1.125 / 4)
    assert row.gflops == pytest.approx(40 * 2 / 1e9)
    assert row.matrix_share["forward"] == pytest.approx(10 * 8 / 0.25 / 100)
    assert row.matrix_share["backward"] == pytest.approx(30 * 8 / 0.5 / 200)
    one_lane = {"none": [make_round(1.0, rates={"all": 1000.0})], "plain": [make_round(2.0)]}
    row = tsa.compared_way("none", one_lane, settings, PLAN, flops)
    assert row.matrix_share == pytest.approx({"all": 40 * 8 / 2 / 1000})


@pytest.mark.parametrize(
    ("ratios", "judgement"),
    [
        ((0.8, 0.9, 0.9, 0.99, 1.1), "the split costs speed"),
        ((0.8, 0.9, 0.9, 1.01, 1.1), "no difference beyond the noise"),
        ((0.8, 0.99, 1.2, 1.2, 1.3), "no difference beyond the noise"),
        ((0.8, 1.01, 1.2, 1.2, 1.3), "the split pays"),
    ],
)
def test_the_verdict(ratios, judgement):
    rounds = {way: [make_round(1.0)] for way in ("plain", "none", "sequential", "delayed")}
    settings, flops = Settings(batch_size=8), {"forward": 1.0, "backward": 1.0}
    rows = [tsa.compared_way(way, rounds, settings, PLAN, flops) for way in rounds]
    rows[-1] = dataclasses.replace(rows[-1], to_none=ratios[2], to_none_rounds=ratios[::-1])
    rows[-2] = dataclasses.replace(rows[-2], to_none=0.5)
    text = tsa.verdict(rows)
    assert text.startswith(f"Verdict: {judgement}. The fastest schedule of the split, delayed, ")
    assert f"at {ratios[2]:.2f} of the speed of one lane" in text
    assert f"({ratios[0]:.2f} to {ratios[-1]:.2f} in 5 rounds)" in text


@needs_two_cpus
def test_a_comparison(in_tmp, capfd, monkeypatch):
    monkeypatch.setattr(tsa, "ROUNDS", 2)
    arguments = "--model resnet18 --image-size 32 -b 4 --num-classes 5 --steps 1".split()
    places = ["--json", "c.json", "--output-dir", "out"]
    assert tsa.main(["compare", *arguments, *places]) == 0
    printed = capfd.readouterr().out
    figures = json.loads((in_tmp / "c.json").read_text())
    assert [row["way"] for row in figures["ways"]] == list(tsa.WAYS)
    none = figures["ways"][1]
    for row in figures["ways"]:
        low, high = row["images_per_s_range"]
        assert 0 < low <= row["images_per_s"] <= high
        assert row["stray_s"] == 0
        assert row["peak_memory_bytes"] > 2**27
        assert (row["bound_share"] is None) == (row["way"] == "plain")
        assert row["way"] in printed
    assert none["to_none"] == 1
    assert set(none["matrix_share"]) == {"all"}
    assert set(figures["ways"][-1]["matrix_share"]) == {"forward", "backward"}
    assert figures["verdict"] in printed
    assert printed.count("images/s: plain") == tsa.ROUNDS
    assert (in_tmp / "out/timeline.png").stat().st_size > 10_000
    assert not (in_tmp / "logs.md").exists()


@pytest.mark.parametrize("option", [["--split", "none"], ["--schedule", "delayed"]])
def test_compare_chooses_schedules_itself(in_tmp, capsys, option):
    assert tsa.main(["compare", *option]) == 2
    assert f"{' '.join(option)}: compare runs every schedule" in capsys.readouterr().err
