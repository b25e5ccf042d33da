"""Steps under the profiler. Run: python -m pytest tests/training/test_profiled_steps.py"""

import contextlib
import copy
from collections import Counter, OrderedDict

import pytest
import torch
from lanes_and_plain import (
    assert_same_state,
    make_batches,
    make_stream,
    make_train_state,
    with_threads,
)
from records import record
from small import needs_two_cpus
from torch import nn
from torch.nn.modules import module as hooks

from split_affinity.errors import UserError
from split_affinity.kernels.fused_norm import before_fused_norm
from split_affinity.lanes.lane import Lanes
from split_affinity.options.settings import Settings
from split_affinity.training import profiling
from split_affinity.training.network import Teacher
from split_affinity.training.operators import OUTSIDE, Touched
from split_affinity.training.profiling import OperatorWatch, all_threads, touched_alone
from split_affinity.training.steps import run_schedule

LAYERS = ["conv1", "bn1", "relu", "conv2", "bn2", "pool", "flatten", "fc"]


def named_model():
    """Two norms that can be fused, in a model of some milliseconds."""
    torch.manual_seed(2)
    layers = {
        "conv1": nn.Conv2d(3, 16, 3),
        "bn1": nn.BatchNorm2d(16),
        "relu": nn.ReLU(),
        "conv2": nn.Conv2d(16, 16, 3, stride=2),
        "bn2": nn.BatchNorm2d(16),
        "pool": nn.AdaptiveAvgPool2d(2),
        "flatten": nn.Flatten(),
        "drop": nn.Dropout(0.3),
        "fc": nn.Linear(64, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def watched(plan, schedule, wanted=True, accumulate=1, counts=(7,), teacher=None, **switches):
    """The model, what was profiled, and the steps, of epochs with so many steps each."""
    model, steps = named_model(), []
    state = make_train_state(model, accumulate, channels_last=True, **switches)
    state.network.teacher = teacher
    torch.manual_seed(3)
    with Lanes(with_threads(plan, 1), ()) as lanes:
        watch = OperatorWatch(lanes, state.network, wanted)
        for count in counts:
            stream = make_stream(make_batches(count * accumulate, side=8))
            running = run_schedule(Settings(schedule=schedule), lanes, state, stream)
            steps += watch.steps(running)
        assert all(
            lane.around is contextlib.nullcontext for lane in (lanes.forward, lanes.backward)
        )
    assert not hooks._global_forward_pre_hooks
    assert not before_fused_norm
    return model, watch.times, steps


@needs_two_cpus
@pytest.mark.parametrize(
    ("schedule", "accumulate", "fused"),
    [("sequential", 1, True), ("overlap", 2, False), ("delayed", 1, True)],
)
def test_profiling_changes_no_number_and_explains_all_time(schedule, accumulate, fused, split_plan):
    given = {"accumulate": accumulate, "fused": fused}
    plain, nothing, _ = watched(split_plan, schedule, wanted=False, **given)
    model, times, steps = watched(split_plan, schedule, **given)
    assert nothing is None
    assert_same_state(model, plain)
    assert [step.profiled for step in steps] == [False, *5 * [True], False]
    # The profiler starts a thread, which may be seen for a moment before a lane has adopted it.
    assert sum(step.total("stray_s") for step in steps) < 1e-3
    assert (times.first, times.last) == (3, 5)
    audited = Counter()
    for step in steps[2:5]:
        for each in step.records:
            audited[each.lane, each.phase] += 1e3 * each.duration_s / 3
    added = Counter()
    for row in times.rows:
        added[row.lane, row.phase] += row.self_ms
    assert dict(added) == pytest.approx(dict(audited))
    for phase in ("forward", "backward"):
        rows = times.of_phase(phase)
        assert all(row.self_ms >= 0 for row in rows)
        (outside,) = (row for row in rows if row.kind == OUTSIDE)
        assert outside.calls == accumulate
        found = {row.layer_group for row in rows} - {"", "input", "loss", "drop"}
        layers = [each for each in LAYERS if not (fused and each == "relu")]
        assert found == {*layers}, phase
    for phase, begins, group in [
        ("forward", "aten::conv2d", "conv2"),
        ("forward", "FusedNorm" if fused else "aten::batch_norm", "bn1"),
        ("backward", "FusedNormBackward" if fused else "NativeBatchNormBackward0", "bn1"),
        ("backward", "ConvolutionBackward0", "conv1"),
        ("backward", "AddmmBackward0", "fc"),
        ("backward", "aten::topk", "loss"),
    ]:
        named = [row for row in times.of_phase(phase) if row.operator == begins]
        assert {row.calls for row in named if row.layer_group == group} == {accumulate}, begins
    update = {row.operator for row in times.of_phase("update")}
    assert "Optimizer.step#SGD.step" in update


def test_one_lane_with_a_teacher_over_short_epochs(one_lane_plan):
    teacher = Teacher(named_model().eval(), 0.5)
    _, times, steps = watched(one_lane_plan, "sequential", counts=(2, 3, 2), teacher=teacher)
    assert [step.profiled for step in steps] == [False, True, *3 * [True], True, False]
    assert (times.first, times.steps) == (2, 2)  # of the second epoch, which begins with step 1
    assert {row.lane for row in times.rows} == {"all"}
    forward = [row for row in times.of_phase("forward") if row.operator == "aten::conv2d"]
    assert {row.layer_group: row.calls for row in forward} == {"teacher": 2, "conv1": 1, "conv2": 1}


def test_a_run_that_ends_too_early_has_no_profile(one_lane_plan):
    for counts in [(2,), (1, 1, 1)]:
        assert watched(one_lane_plan, "sequential", counts=counts)[1] is None


@needs_two_cpus
def test_an_error_in_a_profiled_step_ends_the_profile(split_plan, monkeypatch):
    model = named_model()
    state = make_train_state(copy.deepcopy(model), 1)
    monkeypatch.setattr(state, "update", lambda *args: 1 / 0)
    with Lanes(split_plan, ()) as lanes:
        watch = OperatorWatch(lanes, state.network)
        watch._first = False
        running = run_schedule(Settings(), lanes, state, make_stream(make_batches(3, side=8)))
        with pytest.raises(ZeroDivisionError):
            list(watch.steps(running))
        assert lanes.forward.around is lanes.backward.around is contextlib.nullcontext
    assert (watch.times, before_fused_norm, {*hooks._global_forward_pre_hooks}) == (
        None,
        [],
        set(),
    )


def test_a_run_that_is_stopped_has_what_was_profiled_so_far(one_lane_plan):
    state = make_train_state(named_model(), 1)
    with Lanes(with_threads(one_lane_plan, 1), ()) as lanes:
        watch = OperatorWatch(lanes, state.network)
        stream = make_stream(make_batches(9, side=8))
        with pytest.raises(KeyboardInterrupt):
            for step in watch.steps(run_schedule(Settings(), lanes, state, stream)):
                if step.step == 4:
                    raise KeyboardInterrupt
    assert (watch.times.first, watch.times.last) == (3, 4)
    assert (watch.times.untouched, before_fused_norm) == ("no step was left to see it", [])


def test_what_a_phase_touches_is_known_if_it_ran_alone():
    found = [("forward", "forward", 1), ("backward", "backward", 2), ("backward", "update", 3)]
    records = [record("forward", 0, 2), record("backward", 1, 2), record("update", 3, 1)]
    assert sorted(touched_alone(found, records), key=str) == [
        Touched("backward", "backward", None),
        Touched("backward", "update", 3),
        Touched("forward", "forward", None),
    ]


def test_a_system_that_does_not_show_what_is_touched(one_lane_plan, monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "PAGES", tmp_path / "hidden")
    _, times, steps = watched(one_lane_plan, "sequential", counts=(6,))
    assert (times.touched, times.untouched) == ((), "the system does not show it")
    assert [step.profiled for step in steps].count(True) == 4


def test_a_torch_that_cannot_profile_lanes(monkeypatch):
    monkeypatch.delattr(torch.profiler, "_ExperimentalConfig")
    with pytest.raises(UserError, match=r"^--operators: torch \S+ cannot profile the threads of"):
        all_threads()
