"""Recipe. Run: python -m pytest tests/training/test_optimizer.py"""

import dataclasses
import io
import math
import sys

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from small import small_model
from torch import nn

from split_affinity.lanes.lane import Lanes
from split_affinity.models.freezing import freeze, is_frozen, layer_groups, mostly_frozen
from split_affinity.models.registry import OWN_MODELS, build_model
from split_affinity.options.commands import parse_arguments
from split_affinity.options.recipes import FROM_CHECKPOINT, RECIPES
from split_affinity.options.settings import Settings, learning_rate
from split_affinity.runs import setup
from split_affinity.training.network import Network
from split_affinity.training.optimizer import build_lr_scheduler, build_optimizer, warmup_epochs
from split_affinity.training.update import (
    GradientNorms,
    MovingAverage,
    TrainState,
    gradient_warnings,
)

STEPS = 4  # optimizer steps of an epoch, in all tests here
SCHEDULERS = ("constant", "cosine", "step", "multistep", "onecycle", "warm-restarts")


def one_weight(value=1.0):
    """The smallest model: its weight is `value`."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def begin(settings, epoch_steps=STEPS, total_steps=None):
    """Optimizer and scheduler of a run."""
    optimizer = build_optimizer(one_weight(), settings)
    total_steps = total_steps or epoch_steps * settings.epochs
    return optimizer, build_lr_scheduler(optimizer, settings, epoch_steps, total_steps)


def take_rates(optimizer, scheduler, count):
    """The rates of the next `count` optimizer steps."""
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def recipe(name):
    """Its settings, with the least that each needs beside."""
    start = ["--init-from", "weights.pt"] if name in FROM_CHECKPOINT else []
    return parse_arguments(["--recipe", name, "--data-path", "data", *start])[1]


# By hand: the rate of an optimizer step, counted from 0, of 4 steps an epoch.
RECIPE_RATES = {
    "finetune": {0: 0.005, 10: 0.004267767, 20: 0.0025, 39: 7.706664e-6},  # half a cosine
    "imagenet": {  # 5 epochs up from a hundredth, then half a cosine over 85
        0: 0.001,
        1: 0.00595,
        10: 0.0505,
        19: 0.09505,
        20: 0.1,
        105: 0.08535534,
        190: 0.05,
        275: 0.01464466,
        359: 2.134415e-6,
    },
    "scratch": {  # 5 epochs up from a hundredth, then half a cosine over 55
        0: 0.0005,
        10: 0.02525,
        19: 0.047525,
        20: 0.05,
        130: 0.025,
        239: 2.548925e-06,
    },
    "digits": {  # 2 epochs up, then half a cosine over 10
        0: 0.0005,
        4: 0.02525,
        8: 0.05,
        18: 0.04267767,
        28: 0.025,
        47: 7.706675e-5,
    },
    "imagenet-subset": {  # 3 parts of 10 up from 1 / 25, then down to 1 / 250,000, by cosines
        0: 4e-5,
        7: 1.316718e-4,
        28: 9.083282e-4,
        35: 0.001,
        56: 8.535540e-4,
        77: 5.00002e-4,
        98: 1.4645e-4,
        119: 4e-9,
    },
    "imagenet-finetune": {  # half a cosine over 30 epochs
        0: 0.01,
        30: 0.008535534,
        40: 0.0075,
        60: 0.005,
        80: 0.0025,
        90: 0.001464466,
        119: 1.713375e-6,
    },
    "imagenet-full": {  # 2 epochs up, then half a cosine over 58
        0: 0.0002,
        4: 0.0101,
        7: 0.017525,
        8: 0.02,
        66: 0.01707107,
        124: 0.01,
        182: 0.002928932,
        239: 9.168265e-7,
    },
    "cifar10": {0: 0.1, 407: 0.1, 408: 0.01, 615: 0.01, 616: 0.001, 819: 0.001},
    "hybrid": {  # half cosines over 10, 20 and 40 epochs
        0: 1e-4,
        10: 8.550179e-5,
        20: 5.05e-5,
        39: 1.152592e-6,
        40: 1e-4,
        80: 5.05e-5,
        119: 1.038163e-6,
        120: 1e-4,
        200: 5.05e-5,
        279: 1.009542e-6,
    },
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_learning_rates_of_each_recipe(name):
    settings = recipe(name)
    rates = take_rates(*begin(settings), STEPS * settings.epochs)
    assert max(RECIPE_RATES[name]) == len(rates) - 1
    found = {step: rates[step] for step in RECIPE_RATES[name]}
    assert found == pytest.approx(RECIPE_RATES[name], rel=1e-5)
    assert max(rates) == pytest.approx(learning_rate(settings))


@pytest.mark.parametrize(
    ("scheduler", "settings", "rates"),  # of the first step of each of six epochs, by hand
    [
        ("constant", {}, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("constant", {"lr_warmup_epochs": 2}, [0.001, 0.0505, 0.1, 0.1, 0.1, 0.1]),
        ("cosine", {}, [0.1, 0.09330127, 0.075, 0.05, 0.025, 0.00669873]),
        ("cosine", {"min_lr": 0.02}, [0.1, 0.09464102, 0.08, 0.06, 0.04, 0.02535898]),
        (
            "cosine",
            {"lr_warmup_epochs": 2},
            [0.001, 0.0505, 0.1, 0.08535534, 0.05, 0.01464466],
        ),
        ("step", {"lr_step_epochs": 2}, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
        (  # counts from the end of the warm-up
            "step",
            {"lr_step_epochs": 2, "lr_gamma": 0.5, "lr_warmup_epochs": 1},
            [0.001, 0.1, 0.1, 0.05, 0.05, 0.025],
        ),
        ("multistep", {"lr_milestones": (2, 5)}, [0.1, 0.1, 0.01, 0.01, 0.01, 0.001]),
        (  # counts from the beginning
            "multistep",
            {"lr_milestones": (2, 5), "lr_warmup_epochs": 1},
            [0.001, 0.1, 0.01, 0.01, 0.01, 0.001],
        ),
        (
            "onecycle",
            {},
            [0.004, 0.07313892, 0.09719418, 0.07336354, 0.0370593, 0.007664159],
        ),
        (
            "warm-restarts",
            {"lr_restart_epochs": 2, "min_lr": 0.01},
            [0.1, 0.055, 0.1, 0.08681981, 0.055, 0.02318019],
        ),
        (
            "warm-restarts",
            {"lr_restart_epochs": 2, "lr_warmup_epochs": 1},
            [0.001, 0.1, 0.05, 0.1, 0.08535534, 0.05],
        ),
    ],
)
def test_the_learning_rates_of_each_scheduler(scheduler, settings, rates):
    chosen = Settings(lr=0.1, epochs=6, lr_scheduler=scheduler, **settings)
    assert take_rates(*begin(chosen), 24)[::STEPS] == pytest.approx(rates, rel=1e-6)


def test_milestones_by_default_are_those_of_imagenet():
    rates = take_rates(*begin(Settings(lr=0.1, epochs=90, lr_scheduler="multistep")), 360)
    found = [rates[step] for step in (0, 119, 120, 239, 240, 319, 320, 359)]
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4])


@pytest.mark.parametrize(
    ("settings", "epoch_steps", "all_steps", "steps"),  # of the warm-up
    [
        ({}, 40, 50, 5),
        ({}, 40, 9, 0),
        ({}, 40, 19, 1),
        ({}, 40, 10_000, 200),  # 5 epochs
        ({"opt": "adamw"}, 40, 50, 5),
        ({"lr_scheduler": "cosine"}, 40, 50, 5),
        ({"lr_scheduler": "onecycle"}, 40, 50, 0),
        ({"lr_scheduler": "multistep"}, 10, 900, 50),
        ({"lr_scheduler": "multistep", "lr_milestones": (3, 9)}, 10, 900, 20),
        ({"lr_scheduler": "multistep", "lr_milestones": (1, 9)}, 10, 900, 0),
        ({"lr": 0.0125}, 40, 50, 0),
        ({"lr_warmup_epochs": 0}, 40, 50, 0),
        ({"lr_warmup_epochs": 2}, 10, 50, 20),
        ({"lr_warmup_epochs": 2, "lr": 0.1}, 10, 50, 20),
    ],
)
def test_how_long_the_warm_up_is(settings, epoch_steps, all_steps, steps):
    epochs = warmup_epochs(Settings(**settings), epoch_steps, all_steps)
    assert epochs * epoch_steps == pytest.approx(steps)
    rates = take_rates(*begin(Settings(**settings), epoch_steps, all_steps), all_steps)
    if settings.get("lr_scheduler") != "onecycle":
        highest = learning_rate(Settings(**settings))
        rising = [highest * (0.01 + 0.99 * step / steps) for step in range(steps)]
        assert rates[:steps] == pytest.approx(rising)
        assert rates[min(steps, all_steps - 1)] == pytest.approx(highest)


@pytest.mark.parametrize(
    ("scheduler", "settings", "rates"),  # of every second of 40 steps, after 4 of warm-up, by hand
    [
        ("constant", {}, [0.01, 0.505] + 18 * [1]),
        (
            "cosine",
            {},
            [0.01, 0.505] + [(1 + math.cos(math.pi * step / 36)) / 2 for step in range(0, 36, 2)],
        ),
        ("step", {"lr_step_epochs": 4}, [0.01, 0.505] + 8 * [1] + 8 * [0.1] + 2 * [0.01]),
        ("multistep", {"lr_milestones": (4, 9)}, [0.01, 0.505] + 6 * [1] + 10 * [0.1] + 2 * [0.01]),
    ],
)
def test_the_default_rate_rises_over_the_first_tenth(scheduler, settings, rates):
    chosen = Settings(epochs=10, batch_size=256, lr_scheduler=scheduler, **settings)
    expected = [0.1 * rate for rate in rates]
    assert take_rates(*begin(chosen), 40)[::2] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "step", "multistep", "warm-restarts"])
def test_a_warm_up_is_linear_in_steps(scheduler):
    settings = Settings(lr=0.1, epochs=6, lr_scheduler=scheduler, lr_warmup_epochs=2)
    rates = [0.001, 0.013375, 0.02575, 0.038125, 0.0505, 0.062875, 0.07525, 0.087625, 0.1]
    assert take_rates(*begin(settings), 9) == pytest.approx(rates)


def test_all_groups_have_the_same_rate():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    settings = Settings(lr=0.1, epochs=3, lr_scheduler="cosine", skip_decay_1d=True)
    optimizer = build_optimizer(model, settings)
    scheduler = build_lr_scheduler(optimizer, settings, STEPS, 12)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


@given(
    st.sampled_from(SCHEDULERS),
    st.integers(0, 3),
    st.integers(1, 7),
    st.integers(4, 20),
    st.sampled_from(("sgd", "adam", "adamw", "nadam", "rmsprop")),
)
def test_rates_stay_between_nothing_and_the_highest(scheduler, warmup, epoch_steps, epochs, opt):
    settings = Settings(
        lr=0.1,
        opt=opt,
        epochs=epochs,
        lr_scheduler=scheduler,
        lr_warmup_epochs=0 if scheduler == "onecycle" else warmup,
    )
    count = epoch_steps * epochs
    rates = take_rates(*begin(settings, epoch_steps), count)
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("opt", "momentum"), [("sgd", 0.7), ("adam", 0.9), ("adamw", 0.9)])
def test_no_scheduler_touches_the_momentum(scheduler, opt, momentum):
    settings = Settings(lr=0.1, momentum=0.7, opt=opt, epochs=5, lr_scheduler=scheduler)
    optimizer, course = begin(settings)
    (group,) = optimizer.param_groups
    for _ in range(5 * STEPS):
        assert (group["momentum"] if opt == "sgd" else group["betas"][0]) == momentum
        take_rates(optimizer, course, 1)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_runs_of_a_few_steps(scheduler, total):
    settings = Settings(lr=0.1, lr_scheduler=scheduler)
    rates = take_rates(*begin(settings, 25, total), total)
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("scheduler", "warmup"),
    [
        (name, epochs)
        for name in SCHEDULERS
        for epochs in (0, 2, 7 / 4)
        if name != "onecycle" or not epochs
    ],
)
@pytest.mark.parametrize("steps", [1, 7, 8, 13])
def test_rates_go_on_from_a_saved_state(opt, scheduler, warmup, steps):
    settings = Settings(
        lr=0.1,
        opt=opt,
        epochs=6,
        lr_scheduler=scheduler,
        lr_warmup_epochs=warmup,
        lr_milestones=(3, 5),
        lr_restart_epochs=2,
        lr_step_epochs=2,
    )
    expected = take_rates(*begin(settings), 24)
    first = begin(settings)
    take_rates(*first, steps)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in first], file)
    file.seek(0)
    second = begin(settings)
    for each, state in zip(second, torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    assert take_rates(*second, 24 - steps) == expected[steps:]


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 0.0125),
        ({"batch_size": 256}, 0.1),
        ({"batch_size": 32, "accumulate": 8}, 0.1),
        ({"batch_size": 128, "accumulate": 4}, 0.2),
        ({"opt": "adam"}, 0.001),
        ({"opt": "adamw", "batch_size": 256}, 0.001),
        ({"lr": 0.3, "batch_size": 256}, 0.3),
        ({"lr": 0.3, "opt": "adam"}, 0.3),
        ({"lr": 0.0}, 0.0),
    ],
)
def test_the_highest_learning_rate(settings, rate):
    assert learning_rate(Settings(**settings)) == rate


def test_the_optimizer_takes_its_rates_from_the_settings():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    settings = Settings(lr=0.3, momentum=0.8, weight_decay=0.01)
    (group,) = build_optimizer(model, settings).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.01)
    assert [id(weight) for weight in group["params"]] == [id(w) for w in model.parameters()]


@pytest.mark.parametrize(
    ("opt", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
@pytest.mark.parametrize("fused", [True, False])
def test_the_kind_of_optimizer(opt, kind, fused):
    optimizer = build_optimizer(one_weight(), Settings(opt=opt, fused=fused))
    assert type(optimizer) is kind
    assert bool(optimizer.param_groups[0]["fused"]) is fused


@pytest.mark.parametrize(
    ("opt", "weights"),  # of 1, after each of two updates with a gradient of 1, by hand
    [
        ("sgd", [0.85, 0.5875]),
        ("adam", [0.9, 0.8001031]),
        ("adamw", [0.85, 0.7075]),
        ("nadam", [0.8943548, 0.8172429]),
        ("rmsprop", [0.7035231, 0.2591007]),
    ],
)
def test_what_an_update_does(opt, weights):
    model = one_weight()
    settings = Settings(opt=opt, lr=0.1, momentum=0.8, weight_decay=0.5)
    optimizer = build_optimizer(model, settings)
    for expected in weights:
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("opt", "kind"), [("nadam", torch.optim.NAdam), ("rmsprop", torch.optim.RMSprop)]
)
def test_optimizers_without_a_fused_kernel(opt, kind):
    optimizer = build_optimizer(one_weight(), Settings(opt=opt, momentum=0.8))
    assert type(optimizer) is kind
    assert "fused" not in optimizer.param_groups[0]


def test_rmsprop_is_that_of_torchvision_s_reference_training():
    group = build_optimizer(one_weight(), Settings(opt="rmsprop")).param_groups[0]
    assert [group[name] for name in ("momentum", "alpha", "eps")] == [0.9, 0.9, 0.0316]


@pytest.mark.parametrize(
    ("opt", "rates"),
    [
        ("sgd", (0.0125, 0.1)),
        ("rmsprop", (0.002, 0.016)),
        *((opt, (1e-3, 1e-3)) for opt in ("adam", "adamw", "nadam")),
    ],
)
def test_the_rate_that_an_optimizer_has_by_default(opt, rates):
    """Of 32 images a step, and of 256."""
    asked = [Settings(opt=opt), Settings(opt=opt, accumulate=8)]
    assert tuple(map(learning_rate, asked)) == pytest.approx(rates)


@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw"])
def test_parameters_with_one_dimension_can_be_left_out_of_decay(opt):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    names = {id(weight): name for name, weight in model.named_parameters()}
    settings = Settings(opt=opt, weight_decay=0.01, skip_decay_1d=True)
    groups = build_optimizer(model, settings).param_groups
    found = [(group["weight_decay"], [names[id(w)] for w in group["params"]]) for group in groups]
    assert found == [
        (0.01, ["0.weight", "3.weight"]),
        (0.0, ["0.bias", "1.weight", "1.bias", "3.bias"]),
    ]


class Layers(nn.Module):
    """One of each kind; `first` has a second name."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.batch, self.group, self.instance = (
            nn.BatchNorm2d(4),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4, affine=True),
        )
        self.layer, self.rms = nn.LayerNorm((4, 4)), nn.RMSNorm(4)
        self.bias_like = nn.Parameter(torch.ones(4))
        self.norm = nn.Linear(4, 4)  # which is none, whatever it is called
        self.attention = nn.MultiheadAttention(4, 2)
        self.frozen = nn.Linear(4, 2).requires_grad_(False)
        self.again = self.first


NORM_WEIGHTS = "batch.weight group.weight instance.weight layer.weight rms.weight".split()
NORM_BIASES = "batch.bias group.bias instance.bias layer.bias".split()
OTHER_BIASES = "first.bias norm.bias attention.in_proj_bias attention.out_proj.bias".split()
WEIGHTS = "first.weight norm.weight attention.in_proj_weight attention.out_proj.weight".split()
OTHER_BIASES += ["frozen.bias"]  # what is frozen may be thawed: it has its place from the beginning
WEIGHTS += ["frozen.weight"]


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({}, {0.01: [*WEIGHTS, *NORM_WEIGHTS, *NORM_BIASES, *OTHER_BIASES, "bias_like"]}),
        (
            {"norm_weight_decay": 0.0},
            {
                0.01: [*WEIGHTS, *OTHER_BIASES, "bias_like"],
                0.0: [*NORM_WEIGHTS, *NORM_BIASES],
            },
        ),
        (
            {"bias_weight_decay": 0.0},
            {
                0.01: [*WEIGHTS, *NORM_WEIGHTS, "bias_like"],
                0.0: [*NORM_BIASES, *OTHER_BIASES],
            },
        ),
        (
            {"norm_weight_decay": 0.002, "bias_weight_decay": 0.3},
            {
                0.01: [*WEIGHTS, "bias_like"],
                0.002: NORM_WEIGHTS,
                0.3: [*NORM_BIASES, *OTHER_BIASES],
            },
        ),
    ],
)
@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw"])
def test_normalisation_layers_and_biases_have_a_decay_of_their_own(opt, settings, groups):
    model = Layers()
    names = {id(weight): name for name, weight in model.named_parameters()}
    settings = Settings(opt=opt, weight_decay=0.01, **settings)
    found = {
        group["weight_decay"]: [names[id(weight)] for weight in group["params"]]
        for group in build_optimizer(model, settings).param_groups
    }
    assert list(found) == list(groups), "in this order"
    assert {decay: sorted(each) for decay, each in found.items()} == {
        decay: sorted(each) for decay, each in groups.items()
    }


def test_an_equal_decay_keeps_its_group():
    """So that --weight-decay may change when a run is resumed."""
    settings = Settings(weight_decay=0.01, norm_weight_decay=0.01, bias_weight_decay=0.01)
    groups = build_optimizer(Layers(), settings).param_groups
    assert [len(group["params"]) for group in groups] == [6, 5, 9]


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "vit_b_16", "swin_t"])
def test_decay_of_normalisation_layers_is_torchvision_s(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=3)
    norms, others = torchvision.ops._utils.split_normalization_params(model)
    groups = build_optimizer(model, Settings(norm_weight_decay=0.0)).param_groups
    assert [{*map(id, group["params"])} for group in groups] == [
        {*map(id, others)},
        {*map(id, norms)},
    ]


KINDS = [("sgd", True), ("sgd", False), ("adam", True), ("adam", False), ("adamw", True)]
KINDS += [("adamw", False), ("nadam", False), ("rmsprop", False)]


def learn(model, optimizer, steps=2):
    """Some optimizer steps on a batch of random images, which are the same every time."""
    torch.manual_seed(4)
    for _ in range(steps):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def frozen(monkeypatch):
    """A model, its optimizer and its names of frozen weights, from settings."""

    def build(**settings):
        monkeypatch.setitem(OWN_MODELS, "small", small_model)
        settings = Settings(model="small", num_classes=3, image_size=8, lr=0.1, **settings)
        torch.manual_seed(5)
        model = small_model(3, 8)
        names = freeze(model, settings.freeze, "small", 3, 8)
        return model, build_optimizer(model, settings), names

    return build


@pytest.mark.parametrize(("opt", "fused"), KINDS)
@pytest.mark.parametrize("grads_to_none", [True, False])
def test_frozen_weights_have_no_optimizer_state_and_do_not_decay(frozen, opt, fused, grads_to_none):
    model, optimizer, names = frozen(freeze="body", opt=opt, fused=fused, weight_decay=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        learn(model, optimizer, 1)
        optimizer.zero_grad(set_to_none=grads_to_none)
    saved = optimizer.state_dict()
    assert [len(group["params"]) for group in saved["param_groups"]] == [6], "frozen ones too"
    assert set(saved["state"]) == {4, 5}, "of the classifier"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("6.")), name
    assert names == ("0.weight", "0.bias", "1.weight", "1.bias")


@pytest.mark.parametrize(("opt", "fused"), KINDS)
def test_weights_begin_to_be_trained_as_with_an_optimizer_of_their_own(frozen, opt, fused):
    """Of plain PyTorch: one that has never seen them before, beside the classifier's."""
    options = {"opt": opt, "fused": fused, "weight_decay": 0.5}
    model, optimizer, names = frozen(freeze="body", **options)
    reference, ours, _ = frozen(freeze="body", **options)
    train_state = TrainState(Network(model, nn.CrossEntropyLoss(), frozen=names), optimizer)
    learn(model, optimizer)
    learn(reference, ours)
    train_state.thaw()
    learn(model, optimizer)
    reference.requires_grad_(True).train()
    body, (head,) = [*reference[:2].parameters()], ours.param_groups
    kept, options = head["params"][-2:], {key: head[key] for key in ours.defaults}
    if opt == "adamw":
        assert options.pop("decoupled_weight_decay")
    theirs = type(ours)(body, **options)
    head["params"] = kept
    torch.manual_seed(4)
    for _ in range(2):
        reference(torch.randn(4, 3, 8, 8)).square().mean().backward()
        ours.step()
        theirs.step()
        reference.zero_grad()
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert train_state.network.frozen == ()
    assert len(optimizer.state) == 6


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_moving_average_of_frozen_weights_stays_to_the_bit(frozen, opt):
    model, optimizer, names = frozen(freeze="body", opt=opt)
    average = MovingAverage(model, 0.9)
    before = {name: value.clone() for name, value in average.values.items()}
    for _ in range(5):
        learn(model, optimizer, 1)
        average.update(model.state_dict())
    changed = {name for name in before if not torch.equal(average.values[name], before[name])}
    assert changed == {"6.weight", "6.bias"}, "buffers of frozen layers neither"


@pytest.mark.parametrize(
    ("settings", "epochs"),  # that are frozen, of four
    [
        ({}, []),
        ({"freeze": "body"}, [0, 1, 2, 3]),
        ({"freeze": "body", "freeze_epochs": 1}, [0]),
        ({"freeze": "body", "freeze_epochs": 3}, [0, 1, 2]),
        ({"freeze": "body", "freeze_epochs": 9}, [0, 1, 2, 3]),
    ],
)
def test_which_epochs_are_frozen(settings, epochs):
    asked = Settings(epochs=4, **settings)
    assert [epoch for epoch in range(4) if is_frozen(asked, epoch)] == epochs
    assert mostly_frozen(asked) == ("body" if len(epochs) > 2 else None)
    assert mostly_frozen(Settings(freeze="fc")) == "fc", "a run of steps"


BODY = ["0.weight", "0.bias", "1.weight", "1.bias"]
HEAD = ["6.weight", "6.bias"]


@pytest.mark.parametrize(
    ("settings", "groups"),  # rate, decay and names
    [
        ({}, [(0.1, 0.01, BODY + HEAD)]),
        ({"lr_body_factor": 1.0}, [(0.1, 0.01, BODY + HEAD)]),
        ({"lr_body_factor": 0.25}, [(0.1, 0.01, HEAD), (0.025, 0.01, BODY)]),
        (
            {"lr_body_factor": 0.25, "skip_decay_1d": True},
            [
                (0.1, 0.01, ["6.weight"]),
                (0.1, 0.0, ["6.bias"]),
                (0.025, 0.01, ["0.weight"]),
                (0.025, 0.0, ["0.bias", "1.weight", "1.bias"]),
            ],
        ),
        (
            {"lr_body_factor": 0.25, "norm_weight_decay": 0.0, "freeze": "0"},
            [
                (0.1, 0.01, HEAD),
                (0.025, 0.01, ["0.weight", "0.bias"]),
                (0.025, 0.0, ["1.weight", "1.bias"]),
            ],
        ),
        ({"lr_body_factor": 0.25, "lr": 0.0}, [(0.0, 0.01, HEAD), (0.0, 0.01, BODY)]),
    ],
)
def test_the_body_has_a_part_of_the_classifier_s_rate(monkeypatch, settings, groups):
    monkeypatch.setitem(OWN_MODELS, "small", small_model)
    model = small_model(3, 32)
    chosen = {"model": "small", "num_classes": 3, "image_size": 32, "lr": 0.1} | settings
    optimizer = build_optimizer(model, Settings(weight_decay=0.01, **chosen))
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert [
        (group["lr"], group["weight_decay"], [names[id(weight)] for weight in group["params"]])
        for group in optimizer.param_groups
    ] == [(pytest.approx(lr), decay, each) for lr, decay, each in groups]


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("min_lr", [0.0, 0.04])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_body_s_rate_keeps_its_part_in_every_course(monkeypatch, scheduler, min_lr, warmup):
    """Also of a lowest rate that is above the body's highest."""
    monkeypatch.setitem(OWN_MODELS, "small", small_model)
    settings = Settings(
        model="small",
        num_classes=3,
        image_size=32,
        lr=0.1,
        epochs=6,
        lr_scheduler=scheduler,
        lr_milestones=(3, 5),
        lr_step_epochs=2,
        lr_restart_epochs=2,
        min_lr=min_lr,
        lr_warmup_epochs=0 if scheduler == "onecycle" else warmup,
    )
    asked = dataclasses.replace(settings, lr_body_factor=0.25)
    optimizer = build_optimizer(small_model(3, 32), asked)
    course = build_lr_scheduler(optimizer, asked, STEPS, 24)
    expected = take_rates(*begin(settings), 24)
    for rate in expected:
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [rate, rate / 4], rel=1e-9
        )
        optimizer.step()
        course.step()


def test_a_step_without_gradients_shows_the_decay():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    settings = Settings(lr=0.5, weight_decay=0.1, norm_weight_decay=0.4, bias_weight_decay=0.0)
    for weight in model.parameters():
        nn.init.ones_(weight)
        weight.grad = torch.zeros_like(weight)
    build_optimizer(model, settings).step()
    found = {name: weight.unique().item() for name, weight in model.named_parameters()}
    expected = {"0.weight": 0.95, "0.bias": 1.0, "1.weight": 0.8, "1.bias": 1.0}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0.9999, (0.9, 1.8, 1.95)),  # decays of 1/10, 2/11, 3/12
        (0.9, (0.9, 1.8, 1.95)),
        (0.15, (0.9, 1.835, 1.97525)),  # 1/10, 0.15, 0.15
        (0.05, (0.95, 1.9475, 1.997375)),
        (0.0, (1.0, 2.0, 2.0)),
    ],
)
def test_the_moving_average_of_a_weight(decay, expected):
    model = one_weight(0.0)
    average = MovingAverage(model, decay)
    for value, after in zip((1.0, 2.0, 2.0), expected, strict=True):
        nn.init.constant_(model.weight, value)
        average.update(model.state_dict())
        assert average.values["weight"].item() == pytest.approx(after)
    assert model.weight.item() == 2


def test_the_decay_of_the_moving_average_rises_until_it_is_reached():
    """0.9 is reached after 80 updates: 81/90."""
    average, expected = MovingAverage(one_weight(0.0), 0.9), 0.0
    for t in range(120):
        average.update({"weight": torch.tensor([[math.sin(t)]])})
        decay = (1 + t) / (10 + t) if t < 80 else 0.9
        expected = decay * expected + (1 - decay) * math.sin(t)
        assert average.values["weight"].item() == pytest.approx(expected, abs=1e-6), t


def test_a_moving_average_of_few_steps_has_left_its_beginning():
    """What is left of it after 20 updates is the product of (1 + t) / (10 + t)."""
    average = MovingAverage(one_weight(0.0), 0.9999)
    for _ in range(20):
        average.update({"weight": torch.ones(1, 1)})
    assert 1 - average.values["weight"].item() == pytest.approx(1 / math.comb(29, 9), abs=1e-6)


def test_the_moving_average_of_buffers():
    """Running statistics are averaged; counts are taken as they are."""
    model = nn.BatchNorm1d(1)
    average = MovingAverage(model, 0.75)
    model.running_mean.fill_(8.0)
    model.num_batches_tracked.fill_(5)
    average.update(model.state_dict())
    assert average.values["running_mean"].item() == pytest.approx(7.2), "a decay of 1/10"
    assert average.values["num_batches_tracked"].item() == 5
    model.num_batches_tracked.fill_(6)
    assert average.values["num_batches_tracked"].item() == 5, "a copy"


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        ("resnet18", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]),
        ("resnet56", ["stem", "stage1", "stage2", "stage3", "fc"]),
        ("hybrid-light", ["stem", "stages", "attention", "embedding", "encoder", "head"]),
        (
            "vit_b_32",
            ["class_token", "conv_proj", "encoder"]
            + [f"encoder.layers.encoder_layer_{n}" for n in range(12)]
            + ["encoder.ln", "heads.head"],
        ),
        (
            "alexnet",
            [f"features.{n}" for n in (0, 3, 6, 8, 10)] + [f"classifier.{n}" for n in (1, 4, 6)],
        ),
    ],
)
def test_the_layer_groups_of_models(model, groups):
    with torch.device("meta"):
        names = [name for name, _ in build_model(model, 10, 224).named_parameters()]
    found = layer_groups(names)
    assert list(found) == groups
    assert sorted(name for group in found.values() for name in group) == sorted(names)


def test_layer_groups_of_small_models():
    assert layer_groups(["weight", "bias"]) == {"weight": ["weight"], "bias": ["bias"]}
    assert layer_groups(["a.0.weight", "a.0.bias", "a.1.b.weight", "c"]) == {
        "a.0": ["a.0.weight", "a.0.bias"],
        "a.1": ["a.1.b.weight"],
        "c": ["c"],
    }


def test_gradients_of_what_is_trained_alone_are_watched_by_the_usual_names():
    with torch.device("meta"):
        model = build_model("resnet18", 10, 32)
    freeze(model, "conv1,bn1,layer1,layer2,layer3", "resnet18", 10, 32)
    gradient_norms = GradientNorms(model)
    gradient_norms.add(gradient_norms.measure(dict(model.named_parameters())))
    assert list(gradient_norms.pop_means()) == ["layer4", "fc"]
    model.requires_grad_(True)
    gradient_norms.watch(model)
    gradient_norms.add(gradient_norms.measure(dict(model.named_parameters())))
    assert list(gradient_norms.pop_means()) == "conv1 bn1 layer1 layer2 layer3 layer4 fc".split()


def two_layers():
    return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))


def watch(gradient_norms, model, *gradients):
    """One step, with the gradients of the parameters in their order."""
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        weight.grad = None if gradient is None else torch.full_like(weight, gradient)
    gradient_norms.add(gradient_norms.measure(dict(model.named_parameters())))


def test_gradient_norms_of_each_layer_group():
    model = two_layers()
    gradient_norms = GradientNorms(model)
    assert gradient_norms.pop_means() == {}
    watch(gradient_norms, model, 3, 4, 5, -12)
    assert gradient_norms.pop_means() == {"0": 5, "1": 13}
    assert gradient_norms.pop_means() == {}


def test_gradient_norms_are_taken_every_tenth_step():
    model = two_layers()
    gradient_norms = GradientNorms(model)
    for step in range(1, 26):
        watch(gradient_norms, model, {1: 2, 11: 3, 21: 7}.get(step, 1000), 0, step, 0)
    assert gradient_norms.pop_means() == {"0": 4, "1": 11}
    watch(gradient_norms, model, 6, 8, 0, 0)
    assert gradient_norms.pop_means() == {"0": 10, "1": 0}, "the next step is a first one again"


def test_layers_without_gradients_have_a_norm_of_nothing():
    model = two_layers()
    gradient_norms = GradientNorms(model)
    watch(gradient_norms, model, None, 2, None, None)
    assert gradient_norms.pop_means() == {"0": 2, "1": 0}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_norms_that_are_not_finite(value):
    model = two_layers()
    gradient_norms = GradientNorms(model)
    watch(gradient_norms, model, value, 0, 1, 0)
    assert gradient_norms.pop_means() == {"0": 1e200, "1": 1}


@pytest.mark.parametrize("steps", [0, 1, 5, 10, 11])
def test_gradient_norms_go_on_from_a_saved_state(steps):
    model = two_layers()
    gradient_norms = GradientNorms(model)
    for step in range(steps):
        watch(gradient_norms, model, step, 0, 0, 1)
    file = io.BytesIO()
    torch.save(gradient_norms.state(), file)
    file.seek(0)
    restored = GradientNorms(model)
    restored.restore(torch.load(file, weights_only=True))
    for step in range(steps, 21):
        watch(restored, model, step, 0, 0, 1)
    assert restored.pop_means() == {"0": 10, "1": 1}, "the mean of 0, 10 and 20"


def test_warnings_about_gradients():
    norms = {"stem": 9e-8, "a": 1e-7, "b": 1.0, "c": 1000.0, "fc": 1001.0, "d": sys.float_info.max}
    assert list(gradient_warnings(norms)) == [
        "gradients vanish in stem: norm 9.0e-08, below 1e-07",
        "gradients explode in fc: norm 1.0e+03, above 1000",
        "gradients explode in d: norm 1.8e+308, above 1000",
    ]
    assert list(gradient_warnings({})) == []


@pytest.fixture
def build_train_state(one_lane_plan):
    """Builds the work of a run from settings."""

    def build(**settings):
        chosen = {
            "model": "squeezenet1_1",
            "image_size": 32,
            "num_classes": 3,
            "batch_size": 2,
            "lr": 1.0,
            "momentum": 0.0,
            "weight_decay": 0.0,
        }
        with Lanes(one_lane_plan, ()) as lanes:
            return setup.build_train_state(Settings(**(chosen | settings)), lanes, 1, 4)

    return build


def update(train_state):
    """One update with a gradient of norm 5; how the two weights that have one change."""
    for weight in train_state.network.model.parameters():
        weight.grad = torch.zeros_like(weight)
    bias = train_state.network.model.classifier[1].bias
    bias.grad[:2] = torch.tensor([3.0, 4.0])
    before = bias.detach().clone()
    train_state.update()
    return (bias.detach() - before)[:2].tolist()


@pytest.mark.parametrize(
    ("smoothing", "loss", "gradient"),  # by hand, of the logits 2, 0 and 0
    [
        (0.0, 0.239545, [-0.213014, 0.106507, 0.106507]),
        (0.3, 0.639545, [-0.013014, 0.006507, 0.006507]),
    ],
)
def test_label_smoothing_reaches_the_gradients(build_train_state, smoothing, loss, gradient):
    logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    scores = build_train_state(label_smoothing=smoothing).network.backward(
        (logits, torch.tensor([0]))
    )
    assert scores.loss == pytest.approx(loss, abs=1e-5)
    assert logits.grad[0].tolist() == pytest.approx(gradient, abs=1e-5)


@pytest.mark.parametrize(
    ("largest", "change"), [(None, [-3, -4]), (10.0, [-3, -4]), (1.0, [-0.6, -0.8])]
)
def test_clipping_reaches_the_update(build_train_state, largest, change):
    assert update(build_train_state(clip_grad_norm=largest)) == pytest.approx(change, abs=1e-4)


def test_gradients_are_watched_as_they_are_before_clipping(build_train_state):
    train_state = build_train_state(clip_grad_norm=1.0, epochs=4)
    update(train_state)
    norms = train_state.gradient_norms.pop_means()
    assert norms.pop("classifier.1") == 5
    assert set(norms.values()) == {0}


def test_the_learning_rate_changes_after_the_update(build_train_state):
    train_state = build_train_state(lr_scheduler="cosine")
    assert update(train_state) == pytest.approx([-3, -4])
    assert update(train_state) == pytest.approx([-2.56066, -3.414214], abs=1e-4)


def test_the_moving_average_follows_the_update(build_train_state):
    train_state = build_train_state(model_ema=True, model_ema_decay=0.9)
    before = train_state.average.values["classifier.1.bias"].clone()
    update(train_state)
    change = train_state.average.values["classifier.1.bias"] - before
    assert change.tolist() == pytest.approx([-2.7, -3.6, 0], abs=1e-5), "a decay of 1/10"
    before += change
    update(train_state)
    change = train_state.average.values["classifier.1.bias"] - before
    moved = [9 / 11 * (step - so_far) for step, so_far in ((-6, -2.7), (-8, -3.6), (0, 0))]
    assert change.tolist() == pytest.approx(moved, abs=1e-5), "a decay of 2/11"


def test_what_a_run_does_without(build_train_state):
    train_state = build_train_state()
    assert train_state.average is None
    assert train_state.gradient_norms is None, "norms are figures of an epoch"
