"""A teacher in the forward phase. Run: python -m pytest tests/training/test_teacher.py"""

import copy
import threading

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
    with_threads,
)
from small import needs_two_cpus
from torch import nn
from torchvision.transforms import v2

from split_affinity.lanes.lane import Lanes
from split_affinity.options.settings import Settings
from split_affinity.runs.starting_weights import renormalised
from split_affinity.training.network import Network, Teacher
from split_affinity.training.schedules import SCHEDULES

pytestmark = needs_two_cpus


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
    train_state = make_train_state(model, 2, **parts)
    train_state.network.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    train_state.network.teacher = teacher
    torch.manual_seed(3)
    with Lanes(plan, ()) as lanes:
        steps = list(SCHEDULES[schedule](lanes, train_state, make_stream(batches)))
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
    train_state = make_train_state(make_tiny_model().eval(), 1)
    batch = make_batches(1, side=16)[0]
    expected = train_state.evaluate(batch)
    train_state.network.teacher = make_teacher(0.5)
    monkeypatch.setattr(Teacher, "__call__", None)
    scores, predicted, _ = train_state.evaluate(batch)
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
