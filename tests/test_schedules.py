"""Schedules, and the numbers they compute. Run: python -m pytest tests/test_schedules.py"""

import copy
import dataclasses
import itertools
import threading
import weakref

import pytest
import torch
from conftest import as_loaded, needs_two_cpus
from torch import nn
from torchvision.transforms import v2

from split_affinity.data.loader import Batches
from split_affinity.errors import RunError
from split_affinity.lanes.lane import Lanes
from split_affinity.machine.plan import CorePlan, Group, PhaseTimes
from split_affinity.models.freezing import begin_training, freeze, trained
from split_affinity.models.registry import OWN_MODELS, build_model
from split_affinity.options.settings import Settings
from split_affinity.runs.starting_weights import renormalised
from split_affinity.training.network import Network, NonFiniteLoss, Scores, Teacher, score
from split_affinity.training.optimizer import build_optimizer
from split_affinity.training.schedules import SCHEDULES, delayed, step_bound_s
from split_affinity.training.update import GradientFlow, MovingAverage, Work

pytestmark = needs_two_cpus
LR = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
ALL_SCHEDULES = pytest.mark.parametrize("schedule", list(SCHEDULES))


def make_batches(count, side=32):
    torch.manual_seed(1)
    return [(torch.randn(4, 3, side, side), torch.randint(0, 10, (4,))) for _ in range(count)]


def make_model():
    torch.manual_seed(2)
    return build_model("resnet18", num_classes=10, image_size=32)


def make_tiny_model():
    """BatchNorm's buffers and dropout's random numbers, in a model of some milliseconds."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, 10),
    )


def make_work(model, accumulate, **switches):
    optimizer = torch.optim.SGD(model.parameters(), **LR)
    parts = {name: switches.pop(name) for name in ("bf16", "channels_last") if name in switches}
    network = Network(model, nn.CrossEntropyLoss(), accumulate, **parts)
    return Work(network, optimizer, **switches)


def make_stream(batches):
    return Batches(as_loaded(batches), len(batches))


def train_through_lanes(plan, model, batches, accumulate, schedule="sequential", **switches):
    """The loss of each micro-batch."""
    work = make_work(model, accumulate, **switches)
    torch.manual_seed(3)
    with Lanes(plan, ()) as lanes:
        steps = list(SCHEDULES[schedule](lanes, work, make_stream(batches)))
    return [scores.loss for step in steps for scores in step]


def train_plainly(
    threads, model, batches, accumulate, update_age=0, epoch_steps=None, loss_of=None
):
    """A plain PyTorch loop, no lanes, with a given number of threads.

    With `update_age` 1 it simulates weights that are one update old: a step's gradients are those
    of the weights before the step before, and go to the weights of today. The first step of an
    epoch has no step before it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), **LR)
    parameters = list(model.parameters())
    history = [[parameter.detach().clone() for parameter in parameters]]
    losses = []
    loss_of = loss_of or (
        lambda images, targets: nn.functional.cross_entropy(model(images), targets)
    )
    stream = iter(batches)
    for step in range(len(batches) // accumulate):
        first = step - step % (epoch_steps or len(batches))
        set_values(parameters, history[max(first, step - update_age)])
        for _ in range(accumulate):
            images, targets = next(stream)
            loss = loss_of(images, targets)
            (loss / accumulate).backward()
            losses.append(loss.item())
        set_values(parameters, history[-1])
        optimizer.step()
        optimizer.zero_grad()
        history.append([parameter.detach().clone() for parameter in parameters])
    torch.set_num_threads(before)
    return losses


def set_values(parameters, values):
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def assert_same_state(model, other):
    """Weights and buffers, bit for bit."""
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    for (name, value), expected in pairs:
        assert torch.equal(value, expected), name


def with_threads(plan, threads):
    """The plan, with another number of threads in each group."""
    first, last = (
        Group(group.name, group.cpus, threads) for group in (plan.forward, plan.backward)
    )
    return CorePlan(plan.split, first, first if len(plan.groups) == 1 else last, plan.loader_cpus)


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


def test_an_epoch_begins_with_the_weights_of_today(split_plan):
    """The pipeline of `delayed` is empty at the end of an epoch."""
    batches = make_batches(6, side=16)
    model, reference = make_tiny_model(), make_tiny_model()
    expected = train_plainly(1, reference, batches, 1, update_age=1, epoch_steps=3)
    work = make_work(model, 1)
    torch.manual_seed(3)
    losses = []
    with Lanes(with_threads(split_plan, 1), ()) as lanes:
        for epoch in (batches[:3], batches[3:]):
            losses += [scores.loss for (scores,) in delayed(lanes, work, make_stream(epoch))]
            assert work.end.weights is None
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
    work = make_work(make_model(), accumulate)
    stream = make_stream(make_batches(steps * accumulate))
    with Lanes(plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, work, stream):
            pass
        return work, lanes.take_records()


# A teacher


def make_teacher(share, **parts):
    """Another model, with statistics of its own in BatchNorm, whose dropout would draw numbers."""
    torch.manual_seed(5)
    model = make_tiny_model()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model(torch.randn(8, 3, 16, 16))
    return Teacher(model.eval().requires_grad_(False), share, **parts)


def mixed(batches):
    """The batches with targets as mixup has them: probabilities of two classes."""
    return [
        (images, 0.3 * torch.eye(10)[targets] + 0.7 * torch.eye(10)[targets.flip(0)])
        for images, targets in batches
    ]


def one_target(model, teacher, smoothing):
    """A loss in plain PyTorch whose target itself is put together: the smoothed labels and the
    teacher's probabilities.
    """

    def loss_of(images, targets):
        labels = targets if targets.ndim == 2 else torch.eye(10)[targets]
        labels = (1 - smoothing) * labels + smoothing / 10
        with torch.no_grad():
            taught = torch.softmax(teacher.model(images), 1)
        target = (1 - teacher.share) * labels + teacher.share * taught
        return -(target * torch.log_softmax(model(images), 1)).sum(1).mean()

    return loss_of


def train_with_teacher(plan, model, teacher, batches, schedule, smoothing=0.0, **parts):
    """The losses through the lanes, two micro-batches a step."""
    work = make_work(model, 2, **parts)
    work.network.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    work.network.teacher = teacher
    torch.manual_seed(3)
    with Lanes(plan, ()) as lanes:
        steps = list(SCHEDULES[schedule](lanes, work, make_stream(batches)))
    return [scores.loss for step in steps for scores in step]


@ALL_SCHEDULES
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixing", [False, True])
def test_a_teacher_is_a_part_of_the_target(schedule, share, smoothing, mixing, split_plan):
    """Losses, and so weights after some steps, are those of a loop with the target put together."""
    batches = make_batches(6, side=16)
    batches = mixed(batches) if mixing else batches
    model, teacher = make_tiny_model(), make_teacher(share)
    reference, before = make_tiny_model(), copy.deepcopy(teacher.model)
    plan = with_threads(split_plan, 1)
    losses = train_with_teacher(plan, model, teacher, batches, schedule, smoothing)
    loss_of, age = one_target(reference, teacher, smoothing), int(schedule == "delayed")
    expected = train_plainly(1, reference, batches, 2, age, loss_of=loss_of)
    assert losses == pytest.approx(expected, rel=1e-6)
    for value, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    assert_same_state(teacher.model, before)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


@ALL_SCHEDULES
def test_the_loss_with_a_teacher_is_torchs_own_to_the_bit(schedule, split_plan):
    batches = make_batches(6, side=16)
    model, reference, teacher = make_tiny_model(), make_tiny_model(), make_teacher(0.7)
    plan = with_threads(split_plan, 1)

    def loss_of(images, targets):
        with torch.no_grad():
            taught = teacher.model(images).softmax(1)
        logits = reference(images)
        of_labels = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
        return (1 - 0.7) * of_labels + 0.7 * nn.functional.cross_entropy(logits, taught)

    losses = train_with_teacher(plan, model, teacher, batches, schedule, 0.1)
    age = int(schedule == "delayed")
    assert losses == train_plainly(1, reference, batches, 2, age, loss_of=loss_of)
    assert_same_state(model, reference)


@ALL_SCHEDULES
def test_a_teacher_without_a_share_changes_nothing(schedule, split_plan):
    """Nor does it draw random numbers."""
    batches = make_batches(6, side=16)
    model, reference = make_tiny_model(), make_tiny_model()
    losses = train_with_teacher(split_plan, model, make_teacher(0.0), batches, schedule)
    assert losses == train_with_teacher(split_plan, reference, None, batches, schedule)
    assert_same_state(model, reference)


@ALL_SCHEDULES
def test_a_teacher_runs_in_the_forward_phases_alone(schedule, split_plan, monkeypatch):
    names, teacher = [], make_teacher(0.5)
    real = Teacher.__call__

    def watched(self, images):
        assert not torch.is_grad_enabled() or not any(
            p.requires_grad for p in self.model.parameters()
        )
        names.append(threading.current_thread().name)
        taught = real(self, images)
        assert not taught.requires_grad
        return taught

    monkeypatch.setattr(Teacher, "__call__", watched)
    train_with_teacher(split_plan, make_tiny_model(), teacher, make_batches(4, 16), schedule)
    assert len(names) == 4
    assert len(set(names)) == 1
    assert "forward" in names[0]


def test_a_teacher_computes_as_the_student_does():
    """In bfloat16 and channels_last, but for the probabilities; before it, and on its images."""
    seen = []
    student, teacher = make_tiny_model(), make_teacher(0.5)
    for name, model in (("student", student), ("teacher", teacher.model)):
        model[0].register_forward_hook(
            lambda _, inputs, output, name=name: seen.append((name, inputs[0], output.dtype))
        )
    network = Network(
        student, nn.CrossEntropyLoss(), bf16=True, channels_last=True, teacher=teacher
    )
    logits, targets, taught = network.forward((torch.randn(2, 3, 16, 16), torch.tensor([1, 2])))
    assert [(name, kind) for name, _, kind in seen] == [
        ("teacher", torch.bfloat16),
        ("student", torch.bfloat16),
    ]
    assert torch.equal(seen[0][1], seen[1][1])
    assert all(each.is_contiguous(memory_format=torch.channels_last) for _, each, _ in seen)
    assert taught.dtype == logits.dtype == torch.float32
    assert taught.sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert network.backward((logits, targets, taught)).images == 2


def test_a_validation_asks_no_teacher(monkeypatch):
    work = make_work(make_tiny_model().eval(), 1)
    batch = make_batches(1, side=16)[0]
    expected = work.evaluate(batch)
    work.network.teacher = make_teacher(0.5)
    monkeypatch.setattr(Teacher, "__call__", None)
    scores, predicted = work.evaluate(batch)
    assert scores == expected[0]
    assert torch.equal(predicted, expected[1])


def test_a_teacher_sees_images_as_it_was_trained_with_them():
    """Normalised by its own mean and deviation, whatever those of the run are."""
    settings = Settings(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    theirs = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    pixels = torch.rand(2, 3, 16, 16)
    ours = v2.functional.normalize(pixels, settings.mean, settings.std)
    teacher = make_teacher(0.5)
    expected = teacher(v2.functional.normalize(pixels, **theirs))
    assert not torch.allclose(teacher(ours), expected, atol=1e-3)
    scale_and_shift = renormalised(settings, theirs)
    teacher = make_teacher(0.5, **dict(zip(("scale", "shift"), scale_and_shift, strict=True)))
    torch.testing.assert_close(teacher(ours), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [{}, {"mean": None, "std": None}, {"mean": [0.5, 0.4, 0.3]}])
def test_images_that_are_normalised_alike_stay_as_they_are(other):
    settings = Settings(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert renormalised(settings, other) == ()


def test_sequential_alternates_strictly(split_plan):
    work, records = records_of("sequential", split_plan, 2, 1)
    assert [(record.phase, record.lane) for record in records] == [
        ("forward", "forward"),
        ("backward", "backward"),
        ("forward", "forward"),
        ("backward", "backward"),
        ("update", "backward"),
    ]
    for earlier, later in zip(records, records[1:], strict=False):
        assert earlier.end_s <= later.start_s
    assert all(parameter.grad is None for parameter in work.network.model.parameters())


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


def test_overlap_runs_forward_beside_backward_inside_a_step(split_plan, monkeypatch):
    pairs = [(1, 0), (2, 1), (4, 3), (5, 4)]
    let_meet(monkeypatch, pairs)
    _, records = records_of("overlap", split_plan, 3, 2)
    assert both_at_once(records) == pairs, "these and no others"


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 4), (2, 2)])
def test_delayed_runs_forward_beside_backward_across_steps(
    accumulate, steps, split_plan, monkeypatch
):
    pairs = [(1, 0), (2, 1), (3, 2)]
    let_meet(monkeypatch, pairs)
    _, records = records_of("delayed", split_plan, accumulate, steps)
    assert both_at_once(records) == pairs, "these and no others"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_delayed_updates_beside_the_next_forward_phase(accumulate, split_plan, monkeypatch):
    """The forward lane may be the slower one: an update that waited for it would add its time."""
    barriers = [threading.Barrier(2, timeout=30) for _ in range(3)]
    forward, update = Network.forward, Work.update
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
    monkeypatch.setattr(Work, "update", meeting_update)
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
    work = make_work(make_tiny_model(), 1)
    batches = make_batches(3, side=16)
    before, losses = None, itertools.count()

    def loss(*output):
        if next(losses) == 1:
            raise ArithmeticError("inside the loss")
        return nn.functional.cross_entropy(*output)

    work.network.loss = loss
    with Lanes(split_plan, ()) as lanes, pytest.raises(ArithmeticError):
        for _ in delayed(lanes, work, make_stream(batches)):
            assert before is None, "one step"
            before, end = copy.deepcopy(work.values()), work.end
    assert work.end is end
    for name, value in work.values().items():
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
    whole, broken = (make_work(make_tiny_model(), accumulate) for _ in range(2))
    expected = []
    torch.manual_seed(3)
    with Lanes(split_plan, ()) as lanes:
        for _ in delayed(lanes, whole, make_stream(batches)):
            expected.append((copy.deepcopy(whole.values()), whole.end))
    torch.manual_seed(3)
    steps = 0
    with Lanes(split_plan, ()) as lanes, pytest.raises(RunError, match="no more images"):
        for _ in delayed(lanes, broken, Breaking(as_loaded(batches), len(batches))):
            steps += 1
    assert steps == 2
    values, end = expected[1]
    for name, value in broken.values().items():
        assert torch.equal(value, values[name]), name
    assert torch.equal(broken.end.random_state, end.random_state)
    assert not broken.updating


@ALL_SCHEDULES
def test_frozen_weights_stay_and_have_no_copies(schedule, split_plan):
    model = make_tiny_model()
    for weight in (*model[0].parameters(), *model[1].parameters()):
        weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    settings = Settings(lr=0.1)
    work = Work(
        Network(model, nn.CrossEntropyLoss()),
        build_optimizer(model, settings),
        flow=GradientFlow(model),
    )
    frozen = {"0.weight", "0.bias", "1.weight", "1.bias"}
    with Lanes(split_plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, work, make_stream(make_batches(4, side=16))):
            copied = work.end.weights or {}
            assert not copied or copied.keys() == trained(model).keys()
    changed = {
        name for name, value in work.values().items() if not torch.equal(value, before[name])
    }
    assert changed.isdisjoint(frozen), "BatchNorm's statistics move, its weights do not"
    assert changed >= {"3.weight", "9.weight", "1.running_mean"}
    assert len(work.optimizer.state) == len(trained(model)) == 6
    assert all(norm > 0 for norm in work.flow.take().values()), "no warning of vanishing gradients"


@ALL_SCHEDULES
@pytest.mark.parametrize("switches", [{}, {"channels_last": True}, {"bf16": True}])
@pytest.mark.parametrize("grads_to_none", [True, False])
def test_what_is_frozen_stays_to_the_bit(
    schedule, switches, grads_to_none, split_plan, monkeypatch
):
    """Buffers of batch normalisation too, after steps with decay, clipping and an average."""
    monkeypatch.setitem(OWN_MODELS, "tiny", lambda num_classes, image_size: make_tiny_model())
    model = make_tiny_model()
    settings = Settings(opt="adam", lr=0.1, weight_decay=0.1)
    frozen = freeze(model, "0,1,3,4", "tiny", 10, 16)
    before = copy.deepcopy(model.state_dict())
    network = Network(model, nn.CrossEntropyLoss(), 2, frozen=frozen, **switches)
    work = Work(
        network,
        build_optimizer(model, settings),
        average=MovingAverage(model, 0.9),
        clip_grad_norm=0.1,
        grads_to_none=grads_to_none,
    )
    with Lanes(split_plan, ()) as lanes:
        list(SCHEDULES[schedule](lanes, work, make_stream(make_batches(6, side=16))))
    for values in (work.values(), work.average.values):
        changed = {name for name in before if not torch.equal(values[name], before[name])}
        assert changed == {"9.weight", "9.bias"}
    assert len(work.optimizer.state) == 2


@ALL_SCHEDULES
@pytest.mark.parametrize("fused", [True, False])
def test_a_thaw_is_that_of_a_plain_loop(schedule, fused, split_plan):
    """Two epochs of three steps; in the first one batch normalisation computes with the running
    statistics of its layers.
    """
    batches = make_batches(6, side=16)
    model, reference = make_tiny_model(), make_tiny_model()
    frozen = tuple(f"{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias"))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    begin_training(model)
    settings = Settings(**LR, fused=fused)
    work = Work(
        Network(model, nn.CrossEntropyLoss(), frozen=frozen),
        build_optimizer(model, settings),
    )
    torch.manual_seed(3)
    with Lanes(with_threads(split_plan, 1), ()) as lanes:
        losses = []
        for epoch in (batches[:3], batches[3:]):
            steps = SCHEDULES[schedule](lanes, work, make_stream(epoch))
            losses += [scores.loss for (scores,) in steps]
            work.thaw()
    age = int(schedule == "delayed")
    reference[:2].eval().requires_grad_(False)
    assert losses == train_thawing(reference, batches, age, fused)
    assert_same_state(model, reference)


def train_thawing(model, batches, update_age, fused):
    """A plain loop of three steps with the first two layers frozen, and three of the whole model,
    with gradients of weights that are some updates old.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    front, rest = list(model[:2].parameters()), list(model[2:].parameters())
    optimizers = [torch.optim.SGD(rest, **LR, fused=fused)]
    history, losses = [copy.deepcopy([*front, *rest])], []
    for step, (images, targets) in enumerate(batches):
        if step == 3:
            model[:2].train().requires_grad_(True)
            optimizers.append(torch.optim.SGD(front, **LR, fused=fused))
        set_values([*front, *rest], history[max(step - step % 3, step - update_age)])
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        losses.append(loss.item())
        set_values([*front, *rest], history[-1])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append(copy.deepcopy([*front, *rest]))
    torch.set_num_threads(before)
    return losses


@ALL_SCHEDULES
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

    def watch(self, *models):
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
        "begin update",
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
        "begin update",
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
    work = make_work(model, 2)
    with Lanes(split_plan, ()) as lanes, pytest.raises(NonFiniteLoss, match="nan|inf"):
        next(SCHEDULES[schedule](lanes, work, stream))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@ALL_SCHEDULES
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_loss_is_not_finite_either(bad, schedule, split_plan):
    """The loss itself, not images that may make it a NaN."""
    work = make_work(make_tiny_model(), 1)
    work.network.loss = lambda logits, targets: logits.sum() * 0 + bad
    before = copy.deepcopy(work.network.model)
    stream = make_stream(make_batches(2, side=16))
    with Lanes(split_plan, ()) as lanes, pytest.raises(NonFiniteLoss, match=f"^{bad}$"):
        next(SCHEDULES[schedule](lanes, work, stream))
    for parameter, value in zip(work.network.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


@ALL_SCHEDULES
@pytest.mark.parametrize("phase", ["forward", "backward", "update"])
def test_an_exception_comes_out_with_its_traceback(phase, schedule, split_plan, monkeypatch):
    calls = []
    kind = Work if phase == "update" else Network
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


# What a step consists of


def make_linear():
    """Two weights of 0, with gradients of 3 and 4: a norm of 5."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    return model


def make_update(model, **parts):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Work(Network(model, nn.CrossEntropyLoss()), optimizer, **parts), optimizer


def test_an_update_measures_clips_steps_and_then_looks_ahead():
    model = make_linear()
    flow, average = GradientFlow(model), MovingAverage(model, 0.75)
    work, optimizer = make_update(model, flow=flow, average=average, clip_grad_norm=1.0)
    work.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    work.update()
    assert flow.take() == {"weight": 5.0}, "before clipping"
    moved = torch.tensor([[-0.6, -0.8]])
    torch.testing.assert_close(model.weight, moved, msg="clipped, and with the rate of this step")
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1), "the rate of the next one"
    torch.testing.assert_close(average.values["weight"], 0.9 * moved)
    assert model.weight.grad is None


def test_an_update_without_any_of_that():
    work, _ = make_update(make_linear())
    work.update()
    assert work.network.model.weight.tolist() == [[-3.0, -4.0]]


@pytest.mark.parametrize("grads_to_none", [True, False])
def test_an_update_with_the_gradients_of_a_copy(grads_to_none):
    work, _ = make_update(make_linear(), grads_to_none=grads_to_none)
    copied = work.network.copy()
    copied.weight.grad = torch.tensor([[1.0, 2.0]])
    work.update(copied)
    assert work.network.model.weight.tolist() == [[-1.0, -2.0]]
    assert copied.weight.tolist() == [[0.0, 0.0]]
    left = copied.weight.grad
    assert left is None if grads_to_none else left.tolist() == [[0.0, 0.0]]


def test_clipping_leaves_short_gradients_alone():
    work, _ = make_update(make_linear(), clip_grad_norm=5.1)
    work.update()
    assert work.network.model.weight.tolist() == [[-3.0, -4.0]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_delayed_has_begun_is_told_apart_from_what_is_done(accumulate, split_plan):
    """After k steps, with step k + 1 begun, stands what a run of k steps leaves behind."""
    batches = make_batches(4 * accumulate, side=16)
    done = []
    for steps in range(5):
        model = make_tiny_model()
        if steps:
            some = batches[: steps * accumulate]
            train_through_lanes(split_plan, model, some, accumulate, "delayed")
        done.append((model, torch.get_rng_state()))
    work = make_work(make_tiny_model(), accumulate)
    torch.manual_seed(3)
    with Lanes(split_plan, ()) as lanes:
        for step, _ in enumerate(delayed(lanes, work, make_stream(batches)), start=1):
            model, random_state = done[step]
            for name, value in model.state_dict().items():
                assert torch.equal(work.values()[name], value), (step, name)
            assert (work.end.weights is None) == (step == 4), "the pipeline is drained"
            if work.end.weights:
                assert torch.equal(work.end.random_state, random_state)
                for name, weight in done[step - 1][0].named_parameters():
                    assert torch.equal(work.end.weights[name], weight), "one update old"
                running_mean = work.network.model.state_dict()["1.running_mean"]
                assert not torch.equal(running_mean, work.values()["1.running_mean"])


@ALL_SCHEDULES
def test_a_moving_average_takes_in_nothing_of_a_step_already_begun(schedule, split_plan):
    """One that forgets at once is the model after the step, buffers too."""
    work = make_work(make_tiny_model(), 2)
    work.average = MovingAverage(work.network.model, 0.0)
    with Lanes(split_plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, work, make_stream(make_batches(6, side=16))):
            for name, value in work.values().items():
                assert torch.equal(work.average.values[name], value), name
            running_mean = work.network.model.state_dict()["1.running_mean"]
            begun = not torch.equal(work.average.values["1.running_mean"], running_mean)
            assert begun == (work.end.weights is not None)


@pytest.mark.parametrize("schedule", ["sequential", "overlap"])
def test_other_schedules_begin_nothing(schedule, split_plan):
    work = make_work(make_tiny_model(), 2)
    with Lanes(split_plan, ()) as lanes:
        for _ in SCHEDULES[schedule](lanes, work, make_stream(make_batches(4, side=16))):
            assert work.end.weights is None
            for name, value in work.network.model.state_dict().items():
                assert torch.equal(work.values()[name], value)


# Scores


LOGITS = torch.tensor(
    [
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0],
        [4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        [0.0, 0.0, 0.0, 9.0, 0.0, -1.0],
    ]
)


@pytest.mark.parametrize(
    ("targets", "top1", "top5"),
    [
        ([0, 5, 3], 3, 3),
        ([4, 1, 3], 1, 3),
        ([5, 0, 5], 0, 0),
        ([0, 4, 5], 1, 2),
    ],
)
def test_right_answers(targets, top1, top5):
    assert score(0.5, LOGITS, torch.tensor(targets)) == Scores(0.5, 3, top1, top5)


def test_of_mixed_images_the_larger_share_is_right():
    targets = torch.tensor(
        [
            [0.7, 0.3, 0.0, 0.0, 0.0, 0.0],
            [0.4, 0.0, 0.0, 0.0, 0.0, 0.6],
            [0.9, 0.0, 0.0, 0.1, 0.0, 0.0],
        ]
    )
    assert score(0.5, LOGITS, targets) == Scores(0.5, 3, 2, 3)


def test_with_fewer_than_five_classes_all_are_among_the_first_five():
    targets = torch.tensor([1, 1, 2])
    assert score(0.5, LOGITS[:, :3], targets) == Scores(0.5, 3, 0, 3)


def test_scores_keep_no_graph():
    logits = LOGITS.clone().requires_grad_()
    scores = score(0.5, logits, torch.tensor([0, 5, 3]))
    assert all(type(value) in (int, float) for value in dataclasses.astuple(scores))


def test_the_figures_of_scores():
    assert Scores(0.5, 8, 1, 6).figures() == {"loss": 0.5, "top1": 12.5, "top5": 75.0}


def make_evaluated(**parts):
    """A model with all that an evaluation could change, and a batch."""
    work = make_work(make_tiny_model(), 1, **parts)
    work.network.model.eval()
    return work, make_batches(1, side=16)[0]


def test_an_evaluation_changes_nothing():
    work, (images, targets) = make_evaluated()
    before, random_state = copy.deepcopy(work.network.model), torch.get_rng_state()
    (scores,), predicted = work.evaluate((images, targets))
    assert_same_state(work.network.model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(weight.grad is None for weight in work.network.model.parameters())
    assert work.evaluate((images, targets))[0] == [scores]
    with torch.no_grad():
        logits = before(images)
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    assert predicted.tolist() == logits.argmax(1).tolist()
    assert scores.top1 == (predicted == targets).sum()


def test_an_evaluation_is_of_the_moving_average_if_there_is_one():
    """And of the model's own weights beside it."""
    work, batch = make_evaluated()
    (own,), _ = work.evaluate(batch)
    work.average = MovingAverage(work.network.model, 0.9)
    assert work.evaluate(batch)[0] == [own, own]
    work.average.values["9.weight"].zero_()
    work.average.values["9.bias"].copy_(torch.arange(10.0))
    before = copy.deepcopy(work.average.values)
    (scores, raw), predicted = work.evaluate(batch)
    assert predicted.tolist() == [9, 9, 9, 9]
    assert scores.loss != own.loss
    assert raw == own
    assert all(torch.equal(value, before[name]) for name, value in work.average.values.items())


def test_an_evaluation_uses_the_buffers_of_the_moving_average():
    work, batch = make_evaluated()
    (own,), _ = work.evaluate(batch)
    work.average = MovingAverage(work.network.model, 0.9)
    work.average.values["4.running_var"].fill_(100.0)
    (scores, raw), _ = work.evaluate(batch)
    assert scores.loss != own.loss
    assert raw == own


def test_an_evaluation_measures_plain_cross_entropy():
    """Not the loss that is trained, which may be smoothed."""
    work, batch = make_evaluated()
    plain, _ = work.evaluate(batch)
    work.network.loss = nn.CrossEntropyLoss(label_smoothing=0.5)
    assert work.evaluate(batch)[0] == plain


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
