"""Schedules compute what a plain loop does, and overlap as they say.

Run: python -m pytest tests/training/test_schedules.py
"""

import copy
import dataclasses
import itertools
import threading
import weakref

import pytest
import torch
from lanes_and_plain import (
    ALL_SCHEDULES,
    assert_same_state,
    make_batches,
    make_stream,
    make_tiny_model,
    make_train_state,
    train_plainly,
    train_through_lanes,
    with_threads,
)
from small import as_loaded, needs_two_cpus
from torch import nn

from split_affinity.data.loader import Batches
from split_affinity.errors import RunError
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import PhaseTimes
from split_affinity.models.fusion import fuse_norms
from split_affinity.models.registry import build_model
from split_affinity.options.settings import Settings
from split_affinity.training.network import Network, NonFiniteLoss
from split_affinity.training.schedules import SCHEDULES, delayed, step_bound_s
from split_affinity.training.update import TrainState

pytestmark = needs_two_cpus


def make_model():
    torch.manual_seed(2)
    return build_model("resnet18", num_classes=10, image_size=32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("split", ["none", "even"])
def test_bitwise_equal_to_a_plain_loop(split, threads, accumulate, split_plan, one_lane_plan):
    plan = with_threads(one_lane_plan if split == "none" else split_plan, threads)
    model = make_model()
    reference = copy.deepcopy(model)
    batches = make_batches(2 * accumulate)
    losses = train_through_lanes(plan, model, batches, accumulate)
    assert losses == train_plainly(threads, reference, batches, accumulate)
    assert_same_state(model, reference)


@pytest.mark.parametrize("threads", [1, 2])
def test_overlap_is_bitwise_equal_to_sequential(threads, split_plan):
    plan = with_threads(split_plan, threads)
    model = make_model()
    reference = copy.deepcopy(model)
    batches = make_batches(8)
    losses = train_through_lanes(plan, model, batches, 4, "overlap")
    assert losses == train_through_lanes(plan, reference, batches, 4, "sequential")
    assert_same_state(model, reference)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_delayed_is_bitwise_equal_to_weights_one_update_old(accumulate, threads, split_plan):
    plan = with_threads(split_plan, threads)
    model = make_model()
    reference = copy.deepcopy(model)
    batches = make_batches(4 * accumulate)
    losses = train_through_lanes(plan, model, batches, accumulate, "delayed")
    assert losses == train_plainly(threads, reference, batches, accumulate, update_age=1)
    assert_same_state(model, reference)


@ALL_SCHEDULES
@pytest.mark.parametrize("threads", [1, 2])
def test_fused_norms_through_lanes_are_those_of_a_plain_loop(schedule, threads, split_plan):
    model, reference, batches = make_model(), make_model(), make_batches(6)
    fused, _ = fuse_norms(reference)
    expected = train_plainly(
        threads,
        reference,
        batches,
        2,
        update_age=schedule == "delayed",
        loss_of=lambda images, targets: nn.functional.cross_entropy(fused(images), targets),
    )
    plan = with_threads(split_plan, threads)
    assert train_through_lanes(plan, model, batches, 2, schedule, fused=True) == expected
    assert_same_state(model, reference)


def test_an_epoch_begins_with_the_weights_of_today(split_plan):
    """The pipeline of `delayed` is empty at the end of an epoch."""
    batches = make_batches(6, side=16)
    model, reference = make_tiny_model(), make_tiny_model()
    expected = train_plainly(1, reference, batches, 1, update_age=1, epoch_steps=3)
    train_state = make_train_state(model, 1)
    torch.manual_seed(3)
    losses = []
    with Lanes(with_threads(split_plan, 1), ()) as lanes:
        for epoch in (batches[:3], batches[3:]):
            losses += [scores.loss for (scores,) in delayed(lanes, train_state, make_stream(epoch))]
            assert train_state.end.weights is None
    assert losses == expected
    assert_same_state(model, reference)


def test_the_simulation_of_old_weights_differs_from_training_with_new_ones():
    batches = make_batches(4, side=16)
    first, second = (
        train_plainly(1, make_tiny_model(), batches, 1, update_age=age) for age in (0, 1)
    )
    assert first[:2] != second[:2], "the second step already takes the first weights again"
    assert first[0] == second[0]


@pytest.mark.parametrize(
    ("schedule", "accumulate", "update_age"),
    [("overlap", 4, 0), ("delayed", 1, 1), ("delayed", 4, 1)],
)
@pytest.mark.alone
def test_no_race_in_fifty_repetitions(schedule, accumulate, update_age, split_plan):
    plan = with_threads(split_plan, 1)
    batches = make_batches(3 * accumulate, side=16)
    reference = make_tiny_model()
    expected = train_plainly(1, reference, batches, accumulate, update_age)
    for _ in range(50):
        model = make_tiny_model()
        assert train_through_lanes(plan, model, batches, accumulate, schedule) == expected
        assert_same_state(model, reference)


@ALL_SCHEDULES
@pytest.mark.parametrize("switches", [{"channels_last": True}, {"bf16": True}])
def test_speed_levers_change_little(schedule, switches, split_plan):
    batches = make_batches(4, side=16)
    model, reference = make_tiny_model().eval(), make_tiny_model().eval()  # no dropout
    losses = train_through_lanes(split_plan, model, batches, 2, schedule, **switches)
    expected = train_through_lanes(split_plan, reference, batches, 2, schedule)
    assert losses == pytest.approx(expected, rel=0.03)


@ALL_SCHEDULES
def test_gradients_set_to_zero_are_worth_the_same_as_none(schedule, split_plan):
    batches = make_batches(6, side=16)
    model, reference = make_tiny_model(), make_tiny_model()
    losses = train_through_lanes(split_plan, model, batches, 2, schedule, grads_to_none=False)
    assert losses == train_through_lanes(split_plan, reference, batches, 2, schedule)
    assert_same_state(model, reference)
    assert all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters())


def records_of(schedule, plan, accumulate, steps):
    train_state = make_train_state(make_model(), accumulate)
    stream = make_stream(make_batches(steps * accumulate))
    with Lanes(plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, train_state, stream):
            pass
        return train_state, lanes.take_records()


def test_sequential_alternates_strictly(split_plan):
    train_state, records = records_of("sequential", split_plan, 2, 1)
    assert [(record.phase, record.lane) for record in records] == [
        ("forward", "forward"),
        ("backward", "backward"),
        ("forward", "forward"),
        ("backward", "backward"),
        ("update", "backward"),
    ]
    for earlier, later in zip(records, records[1:], strict=False):
        assert earlier.end_s <= later.start_s
    assert all(parameter.grad is None for parameter in train_state.network.model.parameters())


def both_at_once(records):
    """Pairs of a forward and a backward phase, by their numbers, that ran at the same time."""
    forwards, backwards = (
        [record for record in records if record.phase == phase] for phase in ("forward", "backward")
    )
    return [
        (first, second)
        for second, backward in enumerate(backwards)
        for first, forward in enumerate(forwards)
        if forward.start_s < backward.end_s and backward.start_s < forward.end_s
    ]


def let_meet(monkeypatch, pairs):
    """Have the phases of each pair wait for each other, inside: unless a schedule has both in
    flight at once, however fast they are, it fails.
    """
    barriers = [threading.Barrier(2, timeout=30) for _ in pairs]
    for phase, numbers in zip(("forward", "backward"), zip(*pairs, strict=True), strict=True):
        waits = dict(zip(numbers, barriers, strict=True))
        original, count = getattr(Network, phase), itertools.count()

        def meeting(self, *args, original=original, count=count, waits=waits):
            barrier = waits.get(next(count))
            if barrier:
                barrier.wait()
            return original(self, *args)

        monkeypatch.setattr(Network, phase, meeting)


@pytest.mark.alone
def test_overlap_runs_forward_beside_backward_inside_a_step(split_plan, monkeypatch):
    pairs = [(1, 0), (2, 1), (4, 3), (5, 4)]
    let_meet(monkeypatch, pairs)
    _, records = records_of("overlap", split_plan, 3, 2)
    assert both_at_once(records) == pairs, "these and no others"


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 4), (2, 2)])
@pytest.mark.alone
def test_delayed_runs_forward_beside_backward_across_steps(
    accumulate, steps, split_plan, monkeypatch
):
    pairs = [(1, 0), (2, 1), (3, 2)]
    let_meet(monkeypatch, pairs)
    _, records = records_of("delayed", split_plan, accumulate, steps)
    assert both_at_once(records) == pairs, "these and no others"


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.alone
def test_delayed_updates_beside_the_next_forward_phase(accumulate, split_plan, monkeypatch):
    """The forward lane may be the slower one: an update that waited for it would add its time."""
    barriers = [threading.Barrier(2, timeout=30) for _ in range(3)]
    forward, update = Network.forward, TrainState.update
    forwards, updates = itertools.count(), itertools.count()

    def meeting_forward(self, *args):
        step, micro_batch = divmod(next(forwards), accumulate)
        if step and not micro_batch:
            barriers[step - 1].wait()
        return forward(self, *args)

    def meeting_update(self, *args):
        if (step := next(updates)) < 3:
            barriers[step].wait()
        return update(self, *args)

    monkeypatch.setattr(Network, "forward", meeting_forward)
    monkeypatch.setattr(TrainState, "update", meeting_update)
    records_of("delayed", split_plan, accumulate, 4)
    assert next(updates) == 4


def test_delayed_never_updates_beside_a_refresh(split_plan):
    _, records = records_of("delayed", split_plan, 1, 6)
    refreshes, updates = (
        [record for record in records if record.phase == phase] for phase in ("refresh", "update")
    )
    assert (len(refreshes), len(updates)) == (5, 6)
    for refresh, update in itertools.product(refreshes, updates):
        assert refresh.end_s <= update.start_s or update.end_s <= refresh.start_s


def test_a_queued_update_does_nothing_after_a_backward_phase_that_failed(split_plan):
    train_state = make_train_state(make_tiny_model(), 1)
    batches = make_batches(3, side=16)
    before, losses = None, itertools.count()

    def loss(*output):
        if next(losses) == 1:
            raise ArithmeticError("inside the loss")
        return nn.functional.cross_entropy(*output)

    train_state.network.loss = loss
    with Lanes(split_plan, ()) as lanes, pytest.raises(ArithmeticError):
        for _ in delayed(lanes, train_state, make_stream(batches)):
            assert before is None, "one step"
            before, end = copy.deepcopy(train_state.model_state()), train_state.end
    assert train_state.end is end
    for name, value in train_state.model_state().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_of_delayed_is_given_out_before_an_error_of_the_next_one(accumulate, split_plan):
    """What stands then is what an unbroken run has after that step."""

    class Breaking(Batches):
        def __next__(self):
            if self.left == accumulate:
                raise RunError("no more images")
            return super().__next__()

    batches = make_batches(3 * accumulate, side=16)
    whole, broken = (make_train_state(make_tiny_model(), accumulate) for _ in range(2))
    expected = []
    torch.manual_seed(3)
    with Lanes(split_plan, ()) as lanes:
        for _ in delayed(lanes, whole, make_stream(batches)):
            expected.append((copy.deepcopy(whole.model_state()), whole.end))
    torch.manual_seed(3)
    steps = 0
    with Lanes(split_plan, ()) as lanes, pytest.raises(RunError, match="no more images"):
        for _ in delayed(lanes, broken, Breaking(as_loaded(batches), len(batches))):
            steps += 1
    assert steps == 2
    values, end = expected[1]
    for name, value in broken.model_state().items():
        assert torch.equal(value, values[name]), name
    assert torch.equal(broken.end.random_state, end.random_state)
    assert not broken.updating


@ALL_SCHEDULES
@pytest.mark.alone
def test_no_work_strays(schedule, split_plan):
    _, records = records_of(schedule, split_plan, 2, 2)
    lanes = {"forward": "forward", "refresh": "forward", "backward": "backward"}
    for record in records:
        assert record.stray_s == 0
        assert record.lane == lanes.get(record.phase, "backward")
        group = split_plan.forward if record.lane == "forward" else split_plan.backward
        assert record.mask == set(group.cpus)


class Script:
    """Stands for lanes, work and batches, and writes down what a schedule asks of them."""

    end = model = None

    def __init__(self, accumulate, left, reducer=None):
        self.accumulate, self.left, self.reducer = accumulate, left, reducer
        self.lines = []
        self.network = self.forward = self.backward = self.update = self.refresh = self
        self.reduce, self.watched = self, ()
        self.loaded = self.copies = 0

    def __str__(self):
        return "backward"  # the only phase that another is queued behind

    def copy(self, begun):
        assert begun is None
        self.copies += 1
        return "ab"[self.copies - 1]

    def call(self, function, *args):
        return function(*args)

    def attach_reducer(self, *models):
        assert not self.lines
        self.watched = models

    def run(self, phase, function, *args):
        self.lines.append(" ".join([phase, *map(str, args)]))
        made = "end before" if phase == "refresh" else "output of"
        return f"{made} {args[0]}" if args else None

    def submit(self, phase, function, *args):
        self.lines.append(" ".join(["begin", phase, *map(str, args)]))
        return self

    def result(self):
        self.lines.append("wait")
        return 0.5

    def prefetch(self):
        self.lines.append("prefetch")

    def __next__(self):
        self.left -= 1
        self.loaded += 1
        return f"batch {self.loaded}"


SCRIPTS = {
    "sequential": [
        "forward batch 1",
        "begin backward output of batch 1",
        "prefetch",
        "wait",
        "forward batch 2",
        "begin backward output of batch 2",
        "prefetch",
        "wait",
        "begin update None None None",
        "wait",
    ],
    "overlap": [
        "forward batch 1",
        "begin backward output of batch 1",
        "forward batch 2",
        "prefetch",
        "wait",
        "begin backward output of batch 2",
        "prefetch",
        "wait",
        "begin update None None None",
        "wait",
    ],
    "delayed": [
        "forward batch 1 a",
        "begin backward output of batch 1",
        "forward batch 2 a",
        "prefetch",
        "wait",
        "begin backward output of batch 2",
        "refresh b",
        "begin update a end before b backward",
        "forward batch 3 b",
        "prefetch",
        "wait",
        "wait",
    ],
}


@ALL_SCHEDULES
def test_what_a_schedule_does_in_which_order(schedule):
    script = Script(accumulate=2, left=8)
    steps = SCHEDULES[schedule](script, script, script)
    assert next(steps) == [0.5, 0.5]
    assert script.lines == SCRIPTS[schedule]


@ALL_SCHEDULES
def test_over_ranks_the_sum_of_the_gradients_comes_before_the_update(schedule):
    script = Script(accumulate=2, left=8, reducer="some")
    assert next(SCHEDULES[schedule](script, script, script)) == [0.5, 0.5]
    late = schedule == "delayed"
    ending = ["begin reduce a backward" if late else "begin reduce None None"]
    ending += [f"begin update {'a end before b' if late else 'None None'} backward"]
    place = [line.startswith("begin update") for line in SCRIPTS[schedule]].index(True)
    expected = [*SCRIPTS[schedule][:place], *ending, *SCRIPTS[schedule][place + 1 :]]
    assert script.lines == expected
    assert script.watched == (("a", "b") if late else (None,))


def test_delayed_ends_with_the_batches():
    script = Script(accumulate=1, left=3)
    assert list(delayed(script, script, script)) == [[0.5]] * 3
    assert [line for line in script.lines if line not in ("prefetch", "wait")] == [
        "forward batch 1 a",
        "begin backward output of batch 1",
        "refresh b",
        "begin update a end before b backward",
        "forward batch 2 b",
        "begin backward output of batch 2",
        "refresh a",
        "begin update b end before a backward",
        "forward batch 3 a",
        "begin backward output of batch 3",
        "begin update a None backward",
    ]


@ALL_SCHEDULES
def test_no_more_than_two_micro_batches_of_activations(schedule, split_plan):
    """Outputs of the first convolution are kept alive by their graphs alone."""
    model, alive, most = make_tiny_model(), [], []

    def watch(module, args, output):
        most.append(1 + sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(output))

    model[0].register_forward_hook(watch)
    train_through_lanes(split_plan, model, make_batches(12, side=16), 4, schedule)
    assert len(most) == 12
    assert max(most) == (1 if schedule == "sequential" else 2)


@ALL_SCHEDULES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_updates_nothing(bad, schedule, split_plan):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    (images, targets), *good = make_batches(4)
    stream = make_stream([(images * bad, targets), *good])
    train_state = make_train_state(model, 2)
    with Lanes(split_plan, ()) as lanes, pytest.raises(NonFiniteLoss, match="nan|inf"):
        next(SCHEDULES[schedule](lanes, train_state, stream))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@ALL_SCHEDULES
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_loss_is_not_finite_either(bad, schedule, split_plan):
    """The loss itself, not images that may make it a NaN."""
    train_state = make_train_state(make_tiny_model(), 1)
    train_state.network.loss = lambda logits, targets: logits.sum() * 0 + bad
    before = copy.deepcopy(train_state.network.model)
    stream = make_stream(make_batches(2, side=16))
    with Lanes(split_plan, ()) as lanes, pytest.raises(NonFiniteLoss, match=f"^{bad}$"):
        next(SCHEDULES[schedule](lanes, train_state, stream))
    for parameter, value in zip(
        train_state.network.model.parameters(), before.parameters(), strict=True
    ):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


@ALL_SCHEDULES
@pytest.mark.parametrize("phase", ["forward", "backward", "update"])
def test_an_exception_comes_out_with_its_traceback(phase, schedule, split_plan, monkeypatch):
    calls = []
    kind = TrainState if phase == "update" else Network
    original = getattr(kind, phase)

    def broken(self, *args):
        calls.append(phase)
        if len(calls) == 2:
            raise ArithmeticError("inside the phase")
        return original(self, *args)

    monkeypatch.setattr(kind, phase, broken)
    with pytest.raises(ArithmeticError, match="inside the phase") as caught:
        train_through_lanes(split_plan, make_tiny_model(), make_batches(8), 2, schedule)
    assert caught.traceback[-1].frame.code.name == "broken"
    assert not [thread for thread in threading.enumerate() if "lane" in thread.name]


@pytest.mark.parametrize(
    ("schedule", "accumulate", "times", "bound_s"),
    [
        ("sequential", 1, (1.0, 2.0, 0.5, 0.1), 3.5),
        ("sequential", 4, (1.0, 2.0, 0.5, 0.1), 12.5),
        ("overlap", 1, (1.0, 2.0, 0.5, 0.1), 3.5),
        ("overlap", 4, (1.0, 2.0, 0.5, 0.1), 9.5),
        ("overlap", 4, (2.0, 1.0, 0.5, 0.1), 9.5),
        ("delayed", 1, (1.0, 2.0, 0.5, 0.1), 2.5),
        ("delayed", 4, (1.0, 2.0, 0.5, 0.1), 8.5),
        ("delayed", 4, (2.0, 1.0, 0.5, 0.1), 8.1),
    ],
)
def test_the_bound_of_a_step(schedule, accumulate, times, bound_s):
    assert step_bound_s(schedule, PhaseTimes(*times), accumulate) == pytest.approx(bound_s)


def test_settings_offer_the_schedules_that_exist():
    (setting,) = (field for field in dataclasses.fields(Settings) if field.name == "schedule")
    assert list(setting.metadata["argument"]["choices"]) == list(SCHEDULES)
