"""What recipes set. Run: python -m pytest tests/options/test_recipes.py"""

import dataclasses
import shlex
from pathlib import Path

import pytest
from option_texts import OUT, with_recipe

from split_affinity.errors import UserError
from split_affinity.options.commands import parse_arguments
from split_affinity.options.recipes import FROM_CHECKPOINT, RECIPES, recipe_defaults
from split_affinity.options.settings import Settings, as_options, learning_rate

# Every setting that decides what is computed, where it is not that of the plain program.
IN_FORCE = {
    "digits": {
        "dataset": "digits",
        "model": "resnet56",
        "image_size": 32,
        "hflip": 0.0,
        "min_scale": 0.6,
        "epochs": 12,
        "lr": 0.05,
        "lr_warmup_epochs": 2,
        "lr_scheduler": "cosine",
    },
    "finetune": {
        "weights": "DEFAULT",
        "epochs": 10,
        "freeze": "body",
        "freeze_epochs": 1,
        "lr": 0.005,
        "lr_scheduler": "cosine",
        "auto_augment": "ra",
        "label_smoothing": 0.1,
        "val_share": 0.2,
        "fit_batch": True,
    },
    "scratch": {
        "model": "resnet18",
        "image_size": 64,
        "epochs": 60,
        "batch_size": 16,
        "lr": 0.05,
        "lr_warmup_epochs": 5,
        "lr_scheduler": "cosine",
        "auto_augment": "ta",
        "label_smoothing": 0.1,
        "val_share": 0.2,
        "fit_batch": True,
    },
    "imagenet": {
        "epochs": 90,
        "accumulate": 8,
        "lr_scheduler": "cosine",
        "lr_warmup_epochs": 5,
        "auto_augment": "ra",
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
        "label_smoothing": 0.1,
        "save_freq": 5,
    },
    "imagenet-subset": {
        "epochs": 30,
        "accumulate": 4,
        "subset": 0.2,
        "image_size": 128,
        "opt": "adam",
        "lr": 0.001,
        "lr_scheduler": "onecycle",
        "color_jitter": 0.4,
    },
    "imagenet-finetune": {
        "epochs": 30,
        "accumulate": 4,
        "min_res": 128,
        "max_res": 224,
        "end_ramp": 20,
        "lr": 0.01,
        "lr_scheduler": "cosine",
        "auto_augment": "ra",
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
        "init_from": Path("w.pt"),
    },
    "imagenet-full": {
        "epochs": 60,
        "accumulate": 4,
        "lr": 0.02,
        "lr_scheduler": "cosine",
        "lr_warmup_epochs": 2,
        "label_smoothing": 0.1,
        "clip_grad_norm": 1.0,
        "stochastic_depth": 0.1,
        "model_ema": True,
        "init_from": Path("w.pt"),
    },
    "cifar10": {
        "model": "resnet56",
        "epochs": 205,
        "batch_size": 128,
        "lr": 0.1,
        "lr_scheduler": "multistep",
        "lr_milestones": (102, 154),
    },
    "hybrid": {
        "model": "hybrid",
        "epochs": 70,
        "opt": "adamw",
        "lr": 0.0001,
        "weight_decay": 0.01,
        "lr_scheduler": "warm-restarts",
        "min_lr": 1e-6,
        "label_smoothing": 0.1,
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_sets(name):
    expected = Settings(
        recipe=name, data_path=Path("data"), output_dir=OUT / name, **IN_FORCE[name]
    )
    assert with_recipe(name) == expected


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], "DEFAULT"),
        (["--weights", "IMAGENET1K_V1"], "IMAGENET1K_V1"),
        (["--init-from", "a.pt"], None),
        (["--resume", "a.pt"], None),
        (["--resume", "auto"], "DEFAULT"),
        (["--resume", "auto", "--test-only"], None),
        (["--test-only"], "DEFAULT"),
    ],
)
def test_weights_of_a_recipe_give_way_to_those_of_a_file(options, weights):
    assert with_recipe("finetune", *options).weights == weights
    with pytest.raises(UserError, match="--init-from a.pt and --weights V1: give one"):
        with_recipe("finetune", "--init-from", "a.pt", "--weights", "V1")


def test_the_plain_program_has_the_other_rates_of_the_recipes():
    plain = Settings()
    assert (plain.model, plain.opt, plain.batch_size) == ("resnet50", "sgd", 32)
    assert (plain.momentum, plain.weight_decay, plain.lr_gamma) == (0.9, 1e-4, 0.1)
    assert plain.lr_restart_epochs == 10
    assert learning_rate(with_recipe("imagenet")) == pytest.approx(0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_of_settings_with_values_that_options_allow(name):
    """Written out as options, it is the same."""
    options = []
    for setting in dataclasses.fields(Settings):
        if setting.name in recipe_defaults(name):
            value = recipe_defaults(name)[setting.name]
            flag = "--" + setting.name.replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            options += [flag] if value is True else [flag, text]
    assert len(recipe_defaults(name)) == len([one for one in options if one[:2] == "--"])
    needs = ["--init-from", "w.pt"] if name in FROM_CHECKPOINT else []
    _, spelled_out = parse_arguments([*options, "--data-path", "data", *needs])
    assert spelled_out == dataclasses.replace(with_recipe(name), recipe=None)


OTHER_VALUES = {
    "dataset": (["--dataset", "cifar10"], "cifar10"),
    "output_dir": (["--output-dir", "elsewhere"], Path("elsewhere")),
    "model": (["--model", "resnet34"], "resnet34"),
    "epochs": (["--epochs", "33"], 33),
    "weights": (["--weights", "IMAGENET1K_V1"], "IMAGENET1K_V1"),
    "freeze": (["--freeze", "layer1"], "layer1"),
    "freeze_epochs": (["--freeze-epochs", "2"], 2),
    "batch_size": (["-b", "6"], 6),
    "fit_batch": (["--no-fit-batch"], False),
    "val_share": (["--val-share", "0.1"], 0.1),
    "accumulate": (["--accumulate", "3"], 3),
    "subset": (["--subset", "1"], 1.0),
    "image_size": (["--image-size", "96"], 96),
    "stochastic_depth": (["--stochastic-depth", "0.4"], 0.4),
    "hflip": (["--hflip", "0.25"], 0.25),
    "min_scale": (["--min-scale", "1"], 1.0),
    "min_res": (["--min-res", "64"], 64),
    "max_res": (["--max-res", "256"], 256),
    "end_ramp": (["--end-ramp", "7"], 7),
    "auto_augment": (["--auto-augment", "none"], "none"),
    "color_jitter": (["--color-jitter", "0"], 0.0),
    "mixup_alpha": (["--mixup-alpha", "0"], 0.0),
    "cutmix_alpha": (["--cutmix-alpha", "0"], 0.0),
    "opt": (["--opt", "adamw"], "adamw"),
    "lr": (["--lr", "0.3"], 0.3),
    "weight_decay": (["--weight-decay", "0"], 0.0),
    "lr_scheduler": (["--lr-scheduler", "step"], "step"),
    "lr_warmup_epochs": (["--lr-warmup-epochs", "0"], 0),
    "lr_milestones": (["--lr-milestones", "5,9"], (5, 9)),
    "min_lr": (["--min-lr", "0"], 0.0),
    "label_smoothing": (["--label-smoothing", "0"], 0.0),
    "clip_grad_norm": (["--clip-grad-norm", "9"], 9.0),
    "model_ema": (["--no-model-ema"], False),
    "save_freq": (["--save-freq", "1"], 1),
}


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [(name, setting) for name in RECIPES for setting in recipe_defaults(name)],
)
def test_any_option_overrides_a_recipe(recipe, setting):
    options, value = OTHER_VALUES[setting]
    if setting == "opt" and recipe == "hybrid":
        options, value = ["--opt", "sgd"], "sgd"
    before = with_recipe(recipe)
    assert getattr(before, setting) != value
    changed = {setting: value} | ({"fit_batch": False} if setting == "batch_size" else {})
    assert with_recipe(recipe, *options) == dataclasses.replace(before, **changed)


def test_an_option_overrides_a_recipe_that_comes_later():
    _, settings = parse_arguments("--no-model-ema --recipe imagenet-full --resume a.pt".split())
    assert settings.model_ema is False
    assert settings.epochs == 60


def test_a_value_that_is_the_program_s_own_default_overrides_a_recipe_too():
    assert with_recipe("cifar10", "-b", "32").batch_size == 32
    assert with_recipe("hybrid", "--model", "resnet50", "--opt", "sgd").model == "resnet50"


# Right by themselves: nothing that a recipe brings may contradict them.
TYPED = """
--epochs 1
--epochs 2
--epochs 3
-b 1
-b 2 --accumulate 1
--lr 1e-9
--lr 0
--lr-scheduler constant
--lr-scheduler cosine
--lr-scheduler step
--lr-scheduler multistep
--lr-scheduler onecycle
--lr-scheduler warm-restarts
--lr-scheduler multistep --lr-milestones 1,2
--epochs 3 --lr-scheduler multistep
--epochs 1 --lr-scheduler multistep --lr-milestones 1
--image-size 96
--image-size 100
--image-size 160
--image-size 224
--max-res 160 --min-res 64 --end-ramp 2
--min-res 32 --end-ramp 1
--max-res 224 --min-res 192 --end-ramp 1
--model vgg11
--model resnet20
--steps 3
--epochs 1 --steps 3
--schedule overlap --accumulate 2
--schedule delayed
--split none
--opt sgd
--opt adamw
--freeze conv1
--num-classes 3
--val-resize 256
--val-share 0
--weights none
--weights none --freeze body
--init-from a.pt --epochs 2
--test-only --weights DEFAULT
""".strip().splitlines()


@pytest.mark.parametrize("command", ["train", "plan", "find-lr", "compare"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_way_to_what_is_typed(recipe, command):
    """With data and without. What is logged as the command is that run again."""
    for data in ("", "--data-path d"):
        for typed in TYPED:
            options = f"{command} --recipe {recipe} {typed} {data}".split()
            given = "--weights" in typed or "--init-from" in typed
            if command == "train" and recipe in FROM_CHECKPOINT and not given:
                options += ["--weights", "DEFAULT"]
            if "--weights none" in typed and recipe in FROM_CHECKPOINT:
                continue  # which has to have some
            _, settings = parse_arguments(options)
            again = parse_arguments([command, *shlex.split(as_options(settings))])
            assert again == (command, settings), options


@pytest.mark.parametrize(
    ("recipe", "typed", "adapted"),
    [
        ("digits", "--epochs 2", {"epochs": 2, "lr_warmup_epochs": 1}),
        ("digits", "--epochs 1", {"epochs": 1, "lr_warmup_epochs": 0}),
        ("imagenet", "--epochs 9", {"epochs": 9, "lr_warmup_epochs": 5}),
        (
            "imagenet",
            "--lr-scheduler onecycle",
            {"lr_scheduler": "onecycle", "lr_warmup_epochs": 0},
        ),
        (
            "digits",
            "--lr-scheduler multistep --lr-milestones 2,4",
            {"lr_scheduler": "multistep", "lr_milestones": (2, 4), "lr_warmup_epochs": 1},
        ),
        (
            "cifar10",
            "--lr-warmup-epochs 110",
            {"lr_warmup_epochs": 110, "lr_milestones": (154,)},
        ),
        ("hybrid", "--lr 1e-7", {"lr": 1e-7, "min_lr": 1e-7}),
        ("imagenet-finetune", "--image-size 160", {"image_size": 160, "max_res": None}),
        (
            "imagenet-finetune",
            "--image-size 96",
            {"image_size": 96, "min_res": None, "max_res": None, "end_ramp": None},
        ),
        ("imagenet-finetune", "--max-res 96", {"min_res": 96, "max_res": 96}),
        ("imagenet-finetune", "--min-res 256", {"min_res": 256, "max_res": 256}),
        (
            "imagenet-subset",
            "--min-res 64 --max-res 192 --end-ramp 3",
            {"min_res": 64, "max_res": 192, "end_ramp": 3, "image_size": None},
        ),
        ("imagenet-full", "--model vgg11", {"model": "vgg11", "stochastic_depth": 0.0}),
        ("finetune", "--weights none", {"weights": None, "freeze": None, "freeze_epochs": None}),
        (
            "finetune",
            "--weights NONE --freeze body --freeze-epochs 2",
            {"weights": None, "freeze_epochs": 2},
        ),
        ("finetune", "-b 32", {"fit_batch": False}),
        ("finetune", "-b 32 --fit-batch", {}),
        ("finetune", "--init-from a.pt", {"weights": None, "init_from": Path("a.pt")}),
        ("imagenet-full", "--model resnet18", {"model": "resnet18"}),
    ],
)
def test_how_a_recipe_gives_way(recipe, typed, adapted):
    asked = with_recipe(recipe, *typed.split())
    assert asked == dataclasses.replace(with_recipe(recipe), **adapted)


def test_images_that_are_made_have_no_part_to_use():
    assert parse_arguments(["--recipe", "imagenet-subset"])[1].subset == 1
    assert with_recipe("imagenet-subset").subset == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--recipe digits --lr-warmup-epochs 12", "--lr-warmup-epochs 12: fewer than --epochs 12"),
        ("--recipe hybrid --min-lr 1", "--min-lr 1 is above the learning rate, 0.0001"),
        ("--recipe imagenet-subset --subset 0.5", "--subset 0.5 needs --data-path"),
        ("--recipe imagenet --epochs 3 --lr-warmup-epochs 5", "--lr-warmup-epochs 5: fewer than"),
    ],
)
def test_what_is_typed_does_not_give_way(options, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(options.split())
