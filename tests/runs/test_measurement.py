"""Measurement. Run: python -m pytest tests/runs/test_measurement.py"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import machines
import psutil
import pytest
import torch
from patching import set_everywhere
from small import as_loaded, needs_two_cpus

from split_affinity.data.loader import Batches, LoaderDied
from split_affinity.data.transforms import image_size_in
from split_affinity.errors import STOP_SIGNALS, RunError, Stopped, UserError
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import PhaseTimes
from split_affinity.machine.topology import read_topology
from split_affinity.options.recipes import RECIPES
from split_affinity.options.settings import Settings
from split_affinity.ranks.ranks import RankLost
from split_affinity.runs.measurement import (
    MeasuringProcess,
    core_counts,
    interpolate_times,
    measure_scaling,
    measured_settings,
    plan_for,
    send_to_all,
    split_bounds_s,
    time_groups,
    time_phases,
)
from split_affinity.runs.setup import build_train_state
from split_affinity.training.network import Network
from split_affinity.training.schedules import step_bound_s

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


def dying(signum):
    """Ends by a signal, or, without one, by itself."""
    yield 1
    if not signum:
        os._exit(9)
    os.kill(os.getpid(), signum)


def endless():
    yield from iter(lambda: __import__("time").sleep(60), 1)


@pytest.mark.slow
def test_an_iterator_elsewhere():
    with contextlib.closing(MeasuringProcess(never, squares, 3)) as results:
        values, processes = zip(*results, strict=True)
    assert values == (0, 1, 4)
    assert len(set(processes)) == 1
    assert processes[0] != os.getpid()


@pytest.mark.slow
def test_a_signal_does_not_reach_a_process_that_is_only_starting():
    with contextlib.closing(MeasuringProcess(never, squares, 3)) as results:
        for signum in STOP_SIGNALS:
            os.kill(results._process.pid, signum)
        assert next(results)[0] == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.slow
def test_an_error_elsewhere_arrives():
    with contextlib.closing(MeasuringProcess(never, broken, UserError("none such"))) as results:
        assert next(results) == 1
        with pytest.raises(UserError, match="none such"):
            next(results)


@pytest.mark.slow
def test_memory_that_is_missing_elsewhere_is_one_line():
    with contextlib.closing(MeasuringProcess(never, broken, MemoryError())) as results:
        assert next(results) == 1
        with pytest.raises(UserError, match="^not enough memory: MemoryError; lower --batch"):
            next(results)


def with_loader():
    """The pid of a process of its own, started as a run starts its loaders; then its death."""
    loader = multiprocessing.get_context().Process(target=signal.pause, daemon=True)
    loader.start()
    yield loader.pid, multiprocessing.get_start_method()
    raise LoaderDied(17, -9)


@pytest.mark.slow
def test_loaders_elsewhere_are_those_of_a_run_and_end_with_it():
    with contextlib.closing(MeasuringProcess(never, with_loader)) as results:
        pid, method = next(results)
        assert method == multiprocessing.get_start_method()
        assert psutil.pid_exists(pid)
        with pytest.raises(RunError, match=r"^a loader was killed.* \(LoaderDied: loader proc"):
            next(results)
    for _ in range(1000):  # the kernel may still be at it, or nobody have asked how it ended
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the loader lives on")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "message"),
    [
        (signal.SIGKILL, r"^a measuring process was killed \(out of memory\?\)$"),
        (signal.SIGABRT, "^a measuring process ended by itself, with SIGABRT$"),
        (None, "^a measuring process ended by itself, with exit code 9$"),
    ],
)
def test_a_process_that_dies_is_an_error(signum, message):
    """Only one that was killed may have had too little memory."""
    with contextlib.closing(MeasuringProcess(never, dying, signum)) as results:
        assert next(results) == 1
        for _ in range(2):  # asked once more, it is still the same
            with pytest.raises(RunError, match=message):
                next(results)


@pytest.mark.slow
def test_an_error_elsewhere_that_nobody_foresaw_is_told_in_its_own_words(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    error = ZeroDivisionError("division by zero\nin two lines")
    with contextlib.closing(MeasuringProcess(never, broken, error)) as results:
        assert next(results) == 1
        with pytest.raises(RunError) as told:
            next(results)
    reason, _, place = str(told.value).partition("; traceback in ")
    unforeseen = "an error that was not foreseen: ZeroDivisionError: division by zero"
    assert reason == f"a measuring process: {unforeseen}"
    assert "in broken\n    raise error\n" in Path(place).read_text()


def echo(delay_s):
    """Gives back what it is sent, after a while."""
    value = None
    while True:
        value = yield value
        time.sleep(delay_s)


def failing(errors):
    """Raises its error when sent one number, and dies when sent another."""
    number = yield
    if number == 9:
        os._exit(9)
    raise errors[number]


@contextlib.contextmanager
def elsewhere(*functions):
    """Several processes."""
    with contextlib.ExitStack() as stack:
        made = (MeasuringProcess(never, *each) for each in functions)
        yield [stack.enter_context(contextlib.closing(each)) for each in made]


def meeting(folder, rank):
    """Comes back once the other one, too, has begun."""
    value = yield
    (folder / f"{rank}").touch()
    while not (folder / f"{1 - rank}").exists():
        time.sleep(0.01)
    yield value, rank


@pytest.mark.slow
def test_several_go_on_at_the_same_time(tmp_path):
    with elsewhere((meeting, tmp_path, 0), (meeting, tmp_path, 1)) as processes:
        assert send_to_all(processes, None) == [None, None]
        assert send_to_all(processes, "x") == [("x", 0), ("x", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "error", "message"),
    [(0, UserError, "none such"), (1, RankLost, "gone"), (9, RunError, "ended by its")],
)
def test_one_that_fails_is_not_waited_for_by_others(number, error, message):
    """The other would take an hour."""
    errors = UserError("none such"), RankLost("gone")
    with elsewhere((echo, 3600.0), (failing, errors)) as processes:
        for process in processes:
            next(process)
        with pytest.raises(error, match=message):
            send_to_all(processes, number)


@pytest.mark.slow
def test_who_has_gone_tells_more_than_who_lost_it(monkeypatch):
    """Both have answered before anybody looks."""
    both = RankLost("gone"), RunError("a broken image")
    with elsewhere((failing, both), (failing, both[::-1])) as processes:
        for process in processes:
            next(process)
        monkeypatch.setattr(processes[0], "check_stop", lambda: time.sleep(2))
        with pytest.raises(RunError, match="a broken image"):
            send_to_all(processes, 0)


def test_waiting_for_a_result_can_be_stopped():
    checks = itertools.count()

    def check_stop():
        if next(checks) == 3:
            raise Stopped(2)

    with contextlib.closing(MeasuringProcess(check_stop, endless)) as results:
        with pytest.raises(Stopped):
            next(results)
        process = results._process
    assert process.exitcode == -9


# The split that suits a machine


@pytest.mark.parametrize(
    ("cores", "counts"),
    [(3, [1, 2]), (4, [1, 2, 3]), (5, [1, 2, 4]), (8, [2, 4, 6]), (16, [4, 8, 12])],
)
def test_group_sizes_to_measure(cores, counts):
    assert core_counts(cores) == counts


def perfect(count, work=(1.0, 2.0, 0.0, 0.0)):
    """Phase times that halve with twice the cores."""
    return PhaseTimes(*(seconds / count for seconds in work))


def test_phase_times_between_two_measurements():
    measured = {4: perfect(4), 12: perfect(12)}
    assert interpolate_times(measured, 4) == perfect(4)
    between = dataclasses.astuple(interpolate_times(measured, 6))
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
    bounds_s = split_bounds_s(schedule, 4, measured, 16)
    assert list(bounds_s) == list(range(4, 13))
    expected_s = {}
    for forward in bounds_s:
        ours, theirs = perfect(forward, work), perfect(16 - forward, work)
        times = PhaseTimes(ours.forward_s, theirs.backward_s, 0.0, 0.0)
        expected_s[forward] = step_bound_s(schedule, times, 4)
    assert bounds_s == pytest.approx(expected_s)
    assert bounds_s[best] == pytest.approx(min(bounds_s.values()))


def machine(tmp_path, rows, count):
    return read_topology(machines.write_machine(tmp_path, rows), frozenset(range(count)))


@pytest.mark.parametrize(("rows", "cores"), [(machines.TWO, 2), (machines.ONE, 1)])
def test_two_cores_leave_no_choice(tmp_path, rows, cores):
    topology = machine(tmp_path, rows, cores)
    plan = plan_for(Settings(split="auto"), topology)
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

    set_everywhere(monkeypatch, "measure_scaling", measure)
    plan = plan_for(Settings(split="auto", schedule="delayed"), topology)
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
    with pytest.raises(UserError, match="--split auto chooses the thread counts"):
        plan_for(Settings(split="auto", backward_threads=2), topology)


@pytest.mark.slow
@needs_two_cpus
def test_measuring_groups_of_this_machine():
    topology = read_topology()
    measured = measure_scaling(TINY, topology, [1])
    assert list(measured) == [1]
    check_times(measured[1])


def check_times(times):
    """Phase times of one process, which has nothing to reduce."""
    found = dataclasses.asdict(times)
    assert found.pop("reduce_s") == 0
    assert all(0 < seconds < 10 for seconds in found.values())


def test_measuring_meets_the_user_s_errors_first():
    with pytest.raises(UserError, match="--model resnet5"):
        measure_scaling(dataclasses.replace(TINY, model="resnet5"), read_topology(), [1])


@needs_two_cpus
def test_timing_the_phases_leaves_nothing_begun(split_plan):
    batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with Lanes(split_plan, ()) as lanes:
        train_state = build_train_state(dataclasses.replace(TINY, precision="fp32"), lanes)
        time_phases(lanes, train_state, Batches(as_loaded([batch]), 2), 2)
    assert train_state.end.weights is None


def test_what_measuring_decides(photos):
    topology = dataclasses.replace(read_topology(), bf16="")
    settings = Settings(data_path=photos, batch_size=4, min_res=32, max_res=64, end_ramp=3)
    chosen = measured_settings(settings, topology)
    assert (chosen.num_classes, chosen.image_size, chosen.precision) == (2, 64, "fp32")
    assert image_size_in(chosen, 1) == 64, "no ramp"
    chosen = measured_settings(Settings(data_path=photos, batch_size=4), topology)
    assert chosen.image_size == 224


def test_measuring_needs_no_trained_weights_but_the_size_of_their_images(torch_cache):
    """They are not even in the cache."""
    asked = Settings(model="efficientnet_b1", weights="DEFAULT", batch_size=4)
    chosen = measured_settings(asked, read_topology())
    assert (chosen.weights, chosen.image_size, chosen.val_resize) == (None, 240, 255)


@pytest.mark.parametrize(
    ("freeze_epochs", "frozen"), [(None, "body"), (9, "body"), (6, "body"), (5, None), (1, None)]
)
def test_what_is_measured_is_frozen_as_most_of_the_run_is(photos, freeze_epochs, frozen):
    settings = Settings(
        data_path=photos, batch_size=4, freeze="body", freeze_epochs=freeze_epochs, epochs=10
    )
    chosen = measured_settings(settings, read_topology())
    assert (chosen.freeze, chosen.freeze_epochs, chosen.epochs) == (frozen, None, None)


def test_phases_are_timed_with_what_is_frozen(one_lane_plan, monkeypatch):
    """With a frozen body nothing goes back but through the classifier."""
    seen, backward = [], Network.backward

    def watched(network, output):
        scores = backward(network, output)
        grads = {
            name for name, weight in network.model.named_parameters() if weight.grad is not None
        }
        seen.append((grads, network.model.training, network.model.layer4.training))
        return scores

    monkeypatch.setattr(Network, "backward", watched)
    settings = dataclasses.replace(TINY, freeze="body", precision="fp32", tuned_malloc=False)
    (times,) = time_groups(settings, (), [one_lane_plan.forward])
    assert times.forward_s > times.backward_s
    assert seen == [({"fc.weight", "fc.bias"}, True, False)] * 3


@pytest.mark.parametrize("recipe", ["imagenet", "imagenet-subset", "cifar10", "hybrid"])
def test_what_a_recipe_asks_for_can_be_measured(recipe, one_lane_plan):
    asked = {
        **RECIPES[recipe],
        "model": "squeezenet1_1",
        "image_size": 32,
        "batch_size": 2,
        "num_classes": 3,
        "precision": "fp32",
        "tuned_malloc": False,
    }
    (times,) = time_groups(Settings(**asked), (), [one_lane_plan.forward])
    check_times(times)
