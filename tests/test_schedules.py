"""Schedules, and the numbers they compute. Run: python -m pytest tests/test_schedules.py"""

import copy
import dataclasses

import pytest
import torch
from conftest import needs_two_cpus

import train_split_affinity as tsa

pytestmark = needs_two_cpus
LR = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}


def make_batches(count):
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))) for _ in range(count)]


def make_model():
    torch.manual_seed(2)
    return tsa.build_model("resnet18", num_classes=10, image_size=32)


def make_work(model, accumulate):
    optimizer = torch.optim.SGD(model.parameters(), **LR)
    return tsa.Work(model, torch.nn.CrossEntropyLoss(), optimizer, accumulate)


def train_through_lanes(plan, model, batches, steps, accumulate):
    """The loss of each micro-batch."""
    work = make_work(model, accumulate)
    stream = tsa.Batches(batches, len(batches))
    with tsa.Lanes(plan, ()) as lanes:
        return [loss for _ in range(steps) for loss in tsa.sequential(lanes, work, stream)]


def train_plainly(threads, model, batches, steps, accumulate):
    """A textbook PyTorch loop, no lanes, with a given number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    optimizer = torch.optim.SGD(model.parameters(), **LR)
    losses = []
    stream = iter(batches)
    for _ in range(steps):
        for _ in range(accumulate):
            images, targets = next(stream)
            loss = torch.nn.functional.cross_entropy(model(images), targets)
            (loss / accumulate).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(before)
    return losses


def with_threads(plan, threads):
    """The plan, with another number of threads in each group."""
    first, last = (
        tsa.Group(group.name, group.cpus, threads) for group in (plan.forward, plan.backward)
    )
    return tsa.CorePlan(
        plan.split, first, first if len(plan.groups) == 1 else last, plan.loader_cpus
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("split", ["none", "even"])
def test_bitwise_equal_to_a_plain_loop(split, threads, accumulate, split_plan, one_lane_plan):
    plan = with_threads(one_lane_plan if split == "none" else split_plan, threads)
    model = make_model()
    reference = copy.deepcopy(model)
    batches = make_batches(2 * accumulate)
    losses = train_through_lanes(plan, model, batches, 2, accumulate)
    assert losses == train_plainly(threads, reference, batches, 2, accumulate)
    for (name, value), other in zip(
        model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_the_order_of_phases(split_plan):
    work = make_work(make_model(), 2)
    stream = tsa.Batches(make_batches(2), 2)
    with tsa.Lanes(split_plan, ()) as lanes:
        tsa.sequential(lanes, work, stream)
        records = lanes.take_records()
    assert [(record.phase, record.lane) for record in records] == [
        ("forward", "forward"),
        ("backward", "backward"),
        ("forward", "forward"),
        ("backward", "backward"),
        ("update", "backward"),
    ]
    for earlier, later in zip(records, records[1:], strict=False):
        assert earlier.end_s <= later.start_s, "strictly alternating"
    assert all(parameter.grad is None for parameter in work.model.parameters())


class Script:
    """Stands for lanes, work and batches, and writes down what a schedule asks of them."""

    def __init__(self, accumulate):
        self.accumulate = accumulate
        self.lines = []
        self.forward = self.backward = self.update = self

    def run(self, phase, function, *args):
        self.lines.append(f"run {phase} {args}")
        return f"output {len(self.lines)}"

    def submit(self, phase, function, *args):
        self.lines.append(f"submit {phase} {args}")
        return self

    def result(self):
        self.lines.append("wait")
        return 0.5

    def prefetch(self):
        self.lines.append("prefetch")

    def __next__(self):
        return "batch"


def test_the_next_batch_is_fetched_while_backward_runs():
    script = Script(accumulate=2)
    assert tsa.sequential(script, script, script) == [0.5, 0.5]
    assert script.lines == [
        "run forward ('batch',)",
        "submit backward ('output 1',)",
        "prefetch",
        "wait",
        "run forward ('batch',)",
        "submit backward ('output 5',)",
        "prefetch",
        "wait",
        "run update ()",
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_updates_nothing(bad, split_plan):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    images, targets = make_batches(1)[0]
    stream = tsa.Batches([(images * bad, targets)], 1)
    with tsa.Lanes(split_plan, ()) as lanes, pytest.raises(tsa.NonFiniteLoss, match="nan|inf"):
        tsa.sequential(lanes, make_work(model, 1), stream)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_an_exception_in_the_model_comes_out_with_its_traceback(split_plan):
    class Broken(torch.nn.Linear):
        def forward(self, images):
            raise ArithmeticError("inside the model")

    work = make_work(Broken(2, 2), 1)
    with pytest.raises(ArithmeticError, match="inside the model") as caught:  # noqa: SIM117
        with tsa.Lanes(split_plan, ()) as lanes:
            tsa.sequential(lanes, work, tsa.Batches(make_batches(1), 1))
    assert caught.traceback[-1].frame.code.name == "forward"


def test_settings_offer_the_schedules_that_exist():
    (setting,) = (field for field in dataclasses.fields(tsa.Settings) if field.name == "schedule")
    assert list(setting.metadata["argument"]["choices"]) == list(tsa.SCHEDULES)
