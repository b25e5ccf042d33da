"""Settings and their parsers. Run: python -m pytest tests/test_settings.py"""

import argparse
import ast
import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets.folder import IMG_EXTENSIONS

import split_affinity
from split_affinity.data.image_folder import VALIDATION_FOLDERS
from split_affinity.data.named import CIFAR10_FOLDER, SYNTHETIC_CLASSES, SYNTHETIC_IMAGES
from split_affinity.data.transforms import image_size_in
from split_affinity.errors import UserError
from split_affinity.machine.plan import plan_cores
from split_affinity.machine.topology import Core, Topology
from split_affinity.models.freezing import mostly_frozen
from split_affinity.models.pretrained import largest_size
from split_affinity.options.command_line import ALIASES, COMMANDS, build_parser, parse_arguments
from split_affinity.options.contradictions import contradictions
from split_affinity.options.data_sets import DATA_SETS
from split_affinity.options.recipes import FROM_CHECKPOINT, GIVE_WEIGHTS, RECIPES, recipe_defaults
from split_affinity.options.settings import (
    CoreSettings,
    DataSettings,
    Settings,
    TrainingSettings,
    learning_rate,
)
from split_affinity.options.values import (
    BELOW_1,
    COUNT,
    MIXING,
    NOT_NEGATIVE,
    PART,
    PERCENT,
    SHARE,
    parse_cpu_list,
    parse_milestones,
    parse_split,
    whole_number,
)
from split_affinity.text import format_cpu_list, readable


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", (0,)),
        ("0-3,8-11", (0, 1, 2, 3, 8, 9, 10, 11)),
        ("0-15:2", (0, 2, 4, 6, 8, 10, 12, 14)),
        ("5,1-2", (1, 2, 5)),
        (" 0 , 2 ", (0, 2)),
        ("3-3", (3,)),
    ],
)
def test_core_lists(text, cpus):
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a core list"),
        (" ", "not a core list"),
        ("a", "not a core list"),
        ("0-", "not a core list"),
        ("-1", "not a core list"),
        ("0,,1", "not a core list"),
        ("0-4:0", "not a core list"),
        ("0.5", "not a core list"),
        ("٣", "not a core list"),
        ("3-1", "runs backwards: write 1-3"),
        ("0,0", "names CPU 0 twice"),
        ("0-3,2", "names CPU 2 twice"),
        ("0-99999999999", "above 65535"),
    ],
)
def test_what_is_no_core_list(text, reason):
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        parse_cpu_list(text)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_formatting_a_core_list_can_be_undone(cpus):
    assert parse_cpu_list(format_cpu_list(cpus)) == tuple(sorted(cpus))


def test_formatting_uses_ranges():
    assert format_cpu_list([3, 0, 1, 8]) == "0-1,3,8"
    assert format_cpu_list([]) == "none"


@pytest.mark.parametrize("text", ["even", "auto", "none", "1:2", "10:1"])
def test_splits(text):
    assert parse_split(text) == text


@pytest.mark.parametrize("text", ["0:1", "1:0", "2", "a:b", "1:2:3", "", "-1:2", "1.5:1", "EVEN"])
def test_what_is_no_split(text):
    with pytest.raises(argparse.ArgumentTypeError, match="even, auto, none|without cores"):
        parse_split(text)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "x", "", "nan", "99999999999999999999"])
def test_what_is_no_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole number from 1 to"):
        COUNT(text)


@pytest.mark.parametrize(("minimum", "text"), [(0, "0"), (1, "1"), (2, "2"), (2, "2147483647")])
def test_counts(minimum, text):
    assert whole_number(minimum)(text) == int(text)


@pytest.mark.parametrize(
    ("minimum", "text"), [(0, "-1"), (1, "0"), (2, "1"), (0, "2147483648"), (0, "1.0")]
)
def test_what_is_no_count_from_a_minimum(minimum, text):
    message = f"'{text}' is not a whole number from {minimum} to 2147483647"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        whole_number(minimum)(text)


def test_counts_up_to_a_maximum():
    assert whole_number(2, 9)("9") == 9
    with pytest.raises(argparse.ArgumentTypeError, match="'10' is not a whole number from 2 to 9"):
        whole_number(2, 9)("10")


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "x", ""])
def test_what_is_no_rate(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a number of 0 or more"):
        NOT_NEGATIVE(text)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (NOT_NEGATIVE, "0", 0.0),
        (NOT_NEGATIVE, "1e-6", 1e-6),
        (SHARE, "0", 0.0),
        (SHARE, "1", 1.0),
        (PART, "1", 1.0),
        (PART, "0.2", 0.2),
        (PERCENT, "100", 100.0),
        (PERCENT, "97.5", 97.5),
        (BELOW_1, "0", 0.0),
        (BELOW_1, "0.9999", 0.9999),
        (BELOW_1, "0.999999", 0.999999),
        (MIXING, "0", 0.0),
        (MIXING, "0.01", 0.01),
        (MIXING, "1e3", 1000.0),
    ],
)
def test_numbers(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "allowed"),
    [
        (SHARE, "-0.01", "a number from 0 to 1"),
        (SHARE, "1.01", "a number from 0 to 1"),
        (SHARE, "nan", "a number from 0 to 1"),
        (PART, "0", "above 0 and up to 1"),
        (PART, "1.01", "above 0 and up to 1"),
        (PART, "x", "above 0 and up to 1"),
        (PERCENT, "0", "above 0 and up to 100"),
        (PERCENT, "100.1", "above 0 and up to 100"),
        (PERCENT, "nan", "above 0 and up to 100"),
        (BELOW_1, "-0.1", "a number of 0 or more and below 1"),
        (BELOW_1, "1", "a number of 0 or more and below 1"),
        (BELOW_1, "nan", "a number of 0 or more and below 1"),
        (MIXING, "-0.2", "0, or from 0.01 to 1000"),
        (MIXING, "0.009", "0, or from 0.01 to 1000"),
        (MIXING, "1e-300", "0, or from 0.01 to 1000"),
        (MIXING, "1001", "0, or from 0.01 to 1000"),
        (MIXING, "1e308", "0, or from 0.01 to 1000"),
        (MIXING, "nan", "0, or from 0.01 to 1000"),
    ],
)
def test_what_is_no_such_number(parse, text, allowed):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not {allowed}"):
        parse(text)


@pytest.mark.parametrize(
    ("arguments", "mean", "std"),
    [
        ([], None, None),
        (["--mean", "0.485,0.456,0.406"], (0.485, 0.456, 0.406), None),
        (["--mean", "0,0,0", "--std", "1,1,1"], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        (["--std", "0.5, .5,5e-1"], None, (0.5, 0.5, 0.5)),
    ],
)
def test_mean_and_deviation_of_channels(arguments, mean, std):
    _, settings = parse_arguments(arguments)
    assert (settings.mean, settings.std) == (mean, std)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean", "0.5"], "'0.5' is not three numbers, such as 0.485,0.456,0.406"),
        (["--mean", "0.5,0.5,0.5,0.5"], "'0.5,0.5,0.5,0.5' is not three numbers"),
        (["--mean", "123.7,116.3,103.5"], "'123.7' is not a number from 0 to 1"),
        (["--mean", "0.5,0.5,"], "'' is not a number from 0 to 1"),
        (["--mean", "nan,0.5,0.5"], "'nan' is not a number from 0 to 1"),
        (["--std", "0.2,0,0.2"], "'0' is not above 0 and up to 1"),
        (["--std", "58.4,57.1,57.4"], "'58.4' is not above 0 and up to 1"),
    ],
)
def test_what_is_no_mean_or_deviation(arguments, message):
    with pytest.raises(UserError, match=f"argument {arguments[0]}: {message}"):
        parse_arguments(arguments)


@pytest.mark.parametrize(
    ("text", "epochs"), [("1", (1,)), ("30,60,80", (30, 60, 80)), ("102,154", (102, 154))]
)
def test_milestones(text, epochs):
    assert parse_milestones(text) == epochs


@given(st.sets(st.integers(1, 999_999), min_size=1))
def test_milestones_come_back_as_they_are_written(epochs):
    ascending = sorted(epochs)
    assert parse_milestones(",".join(map(str, ascending))) == tuple(ascending)


@pytest.mark.parametrize(
    "text", ["", "0", "0,5", "30,30", "60,30", "30,", ",30", "30;60", "a", "-1", "1.5", "٣", "1,,2"]
)
def test_what_are_no_milestones(text):
    with pytest.raises(argparse.ArgumentTypeError, match="list of ascending epochs such as"):
        parse_milestones(text)


# Groups of settings


def test_the_order_of_settings_in_help_and_in_files():
    names = """
    model data_path dataset download val_share num_classes image_size val_resize interpolation mean
    std min_res max_res end_ramp subset max_bad_images workers min_scale hflip color_jitter
    auto_augment ra_magnitude random_erase mixup_alpha cutmix_alpha augment_confused recipe
    batch_size accumulate steps epochs opt lr lr_body_factor momentum weight_decay
    norm_weight_decay bias_weight_decay skip_decay_1d lr_scheduler
    lr_warmup_epochs lr_step_epochs lr_milestones lr_gamma lr_restart_epochs min_lr label_smoothing
    clip_grad_norm freeze freeze_epochs stochastic_depth teacher teacher_weights teacher_share
    model_ema model_ema_decay early_stopping target_top1 seed deterministic resume weights
    init_from test_only save_steps save_freq keep_best mirror split schedule forward_cores
    backward_cores loader_cores forward_threads backward_threads machine record ranks timeout
    precision
    channels_last fused tuned_malloc flush_denormals grads_to_none quick preload pictures
    log_file output_dir print_freq tensorboard json
    """
    assert [setting.name for setting in dataclasses.fields(Settings)] == names.split()


def test_a_function_that_needs_one_group_takes_it_alone():
    cores = tuple(Core(0, 0, 0, cpu, (cpu,)) for cpu in range(3))
    machine = Topology("test", cores, frozenset(), frozenset(range(3)), None, True)
    plan = plan_cores(machine, CoreSettings(split="1:2"))
    assert (plan.forward.cpus, plan.backward.cpus) == ((0,), (1, 2))
    ramp = DataSettings(min_res=64, image_size=128, end_ramp=3)
    assert [image_size_in(ramp, epoch) for epoch in (1, 2, 3)] == [64, 96, 128]
    assert largest_size(DataSettings(), 32) == 32
    assert mostly_frozen(TrainingSettings(freeze="body")) == "body"


def test_a_function_that_takes_one_group_uses_no_other():
    """It reads settings of that group, and passes it on only to functions that take it too."""
    names_of = {
        group.__name__: {setting.name for setting in dataclasses.fields(group)}
        for group in Settings.__bases__
    }
    takers = {
        (function.name, ast.unparse(argument.annotation)): (function, argument.arg)
        for file in Path(split_affinity.__file__).parent.rglob("*.py")
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        for argument in function.args.args
        if argument.annotation and ast.unparse(argument.annotation) in names_of
    }
    assert {group for _, group in takers} >= {"DataSettings", "TrainingSettings", "CoreSettings"}
    for (name, group), (function, parameter) in takers.items():
        for node in ast.walk(function):
            for child in ast.iter_child_nodes(node):
                if not isinstance(child, ast.Name) or child.id != parameter:
                    continue
                if isinstance(node, ast.Call):
                    assert (ast.unparse(node.func), group) in takers, name
                else:
                    assert node.attr in names_of[group], name


# Options that contradict each other


def message_for(**settings):
    """What is said first against some settings; nothing if they contradict nothing."""
    return next(contradictions("train", Settings(**settings)), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_res": 128}, "--min-res and --end-ramp belong together: give both"),
        ({"end_ramp": 5}, "--min-res and --end-ramp belong together: give both"),
        ({"max_res": 224}, "--max-res 224 needs --min-res, where the ramp begins"),
        (
            {"min_res": 100, "end_ramp": 5},
            "--min-res 100 --max-res 224: multiples of 32 are allowed, the smaller one first",
        ),
        (
            {"min_res": 128, "max_res": 200, "end_ramp": 5},
            "--min-res 128 --max-res 200: multiples of 32 are allowed, the smaller one first",
        ),
        (
            {"min_res": 224, "max_res": 128, "end_ramp": 5},
            "--min-res 224 --max-res 128: multiples of 32 are allowed, the smaller one first",
        ),
        (
            {"min_res": 128, "image_size": 96, "end_ramp": 5},
            "--min-res 128 --max-res 96: multiples of 32 are allowed, the smaller one first",
        ),
        (
            {"min_res": 128, "max_res": 192, "image_size": 224, "end_ramp": 5},
            "--image-size 224 --max-res 192: give one of them",
        ),
        ({"min_res": 128, "end_ramp": 5}, None),
        ({"min_res": 128, "max_res": 192, "end_ramp": 5}, None),
        ({"min_res": 224, "max_res": 224, "end_ramp": 1}, None),
        ({"min_res": 128, "max_res": 192, "image_size": 192, "end_ramp": 5}, None),
        ({"image_size": 100}, None),
        (
            {"val_resize": 95, "image_size": 96},
            "--val-resize 95: at least the image size, 96, is allowed",
        ),
        (
            {"val_resize": 160, "min_res": 128, "max_res": 192, "end_ramp": 5},
            "--val-resize 160: at least the image size, 192, is allowed",
        ),
        ({"val_resize": 96, "image_size": 96}, None),
        ({"val_resize": 40}, None),  # whether it is enough, the data say
    ],
)
def test_progressive_resizing_has_to_be_a_ramp(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_warmup_epochs": 5}, "--lr-warmup-epochs 5 needs --epochs"),
        (
            {"lr_warmup_epochs": 5, "epochs": 9, "lr_scheduler": "onecycle"},
            "--lr-warmup-epochs 5: onecycle has a warm-up of its own",
        ),
        (
            {"lr_warmup_epochs": 5, "epochs": 5},
            "--lr-warmup-epochs 5: fewer than --epochs 5 are allowed",
        ),
        (
            {
                "lr_warmup_epochs": 4,
                "epochs": 9,
                "lr_scheduler": "multistep",
                "lr_milestones": (4, 6),
            },
            "--lr-milestones 4,...: the first is within the warm-up of 4",
        ),
        (
            {"lr_scheduler": "cosine", "lr": 0.01, "min_lr": 0.5},
            "--min-lr 0.5 is above the learning rate, 0.01: lower it, or raise --lr",
        ),
        (
            {"lr_scheduler": "warm-restarts", "min_lr": 0.0126},
            "--min-lr 0.0126 is above the learning rate, 0.0125: lower it, or raise --lr",
        ),
        (
            {"lr_scheduler": "cosine", "opt": "adam", "min_lr": 0.002},
            "--min-lr 0.002 is above the learning rate, 0.001: lower it, or raise --lr",
        ),
        ({"lr_scheduler": "cosine", "accumulate": 2, "min_lr": 0.0126}, None),
        ({"lr_scheduler": "cosine", "lr": 0.5, "min_lr": 0.5}, None),
        ({"lr_scheduler": "step", "lr": 0.01, "min_lr": 0.5}, None),
        ({"lr_warmup_epochs": 5, "epochs": 6}, None),
        ({"epochs": 9, "lr_scheduler": "onecycle"}, None),
        ({"lr_warmup_epochs": 4, "epochs": 9, "lr_milestones": (4, 6)}, None),
        (
            {
                "lr_warmup_epochs": 3,
                "epochs": 9,
                "lr_scheduler": "multistep",
                "lr_milestones": (4, 6),
            },
            None,
        ),
    ],
)
def test_a_course_of_the_learning_rate_has_to_be_possible(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 2, "accumulate": 1_000_000},
            "--batch-size 2 --accumulate 1000000: a step of 2000000 images; at most 131072 "
            "synthetic ones are allowed",
        ),
        (
            {"batch_size": 131_073},
            "--batch-size 131073 --accumulate 1: a step of 131073 images; at most 131072 "
            "synthetic ones are allowed",
        ),
        ({"batch_size": 32, "accumulate": 4096}, None),
        ({"batch_size": 2, "accumulate": 1_000_000, "data_path": Path("data")}, None),
    ],
)
def test_steps_of_synthetic_images_have_an_end(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pictures": ()},
            "predict needs pictures: files, folders, or patterns such as 'new/*.jpg'",
        ),
        ({}, "predict needs a trained model: give --resume PATH, or --weights NAME and --model"),
        ({"resume": Path("a.pt"), "weights": "W"}, "--resume a.pt and --weights W: give one"),
        (
            {"init_from": Path("a.pt")},
            "--init-from a.pt: predict takes --resume PATH or --weights NAME",
        ),
        ({"resume": Path("auto")}, "--resume auto needs --output-dir, where checkpoints are"),
        (
            {"weights": "W", "split": "auto"},
            "--split auto is for training, not for predict: give even, a ratio or none",
        ),
        ({"weights": "W", "split": "none"}, None),
        ({"resume": Path("a.pt")}, None),
        ({"resume": Path("auto"), "output_dir": Path("out")}, None),
        ({"weights": "W", "json": Path("a.json")}, None),
    ],
)
def test_predict_needs_pictures_and_one_trained_model(settings, message):
    settings = Settings(**{"pictures": ("a.jpg",)} | settings)
    assert next(contradictions("predict", settings), None) == message


OUT = Path("out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_steps": 5}, "--save-steps needs --output-dir, where checkpoints are"),
        ({"mirror": "memory://x"}, "--mirror needs --output-dir, where checkpoints are"),
        ({"resume": Path("auto")}, "--resume auto needs --output-dir, where checkpoints are"),
        (
            {"resume": Path("a.pt"), "init_from": Path("b.pt")},
            "--resume a.pt and --init-from b.pt: give one",
        ),
        (
            {"resume": Path("a.pt"), "weights": "DEFAULT"},
            "--resume a.pt and --weights DEFAULT: give one",
        ),
        (
            {"init_from": Path("b.pt"), "weights": "DEFAULT"},
            "--init-from b.pt and --weights DEFAULT: give one",
        ),
        (
            {"resume": Path("auto"), "output_dir": OUT, "init_from": Path("b"), "weights": "V1"},
            "--init-from b and --weights V1: give one",
        ),
        (
            {"test_only": True, "resume": Path("auto"), "output_dir": OUT, "weights": "V1"},
            "--resume auto and --weights V1: give one",
        ),
        (
            {"test_only": True},
            "--test-only needs --resume, the checkpoint to evaluate, or --weights NAME",
        ),
        ({"resume": Path("auto"), "output_dir": OUT, "weights": "DEFAULT"}, None),
        ({"test_only": True, "weights": "DEFAULT"}, None),
        ({"weights": "DEFAULT"}, None),
        ({"save_steps": 5, "output_dir": OUT}, None),
        ({"mirror": "memory://x", "output_dir": OUT}, None),
        ({"resume": Path("auto"), "output_dir": OUT}, None),
        ({"resume": Path("a.pt")}, None),
        ({"resume": Path("auto"), "output_dir": OUT, "init_from": Path("b.pt")}, None),
        ({"test_only": True, "resume": Path("a.pt")}, None),
    ],
)
def test_checkpoint_options_need_each_other(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher": "resnet50"},
            "--teacher resnet50 needs --teacher-weights, a name such as DEFAULT or a file",
        ),
        (
            {"teacher_weights": "IMAGENET1K_V2"},
            "--teacher-weights IMAGENET1K_V2 needs --teacher, the model that they are of",
        ),
        (
            {"teacher_share": 0.7},
            "--teacher-share 0.7 needs --teacher and --teacher-weights",
        ),
        ({"teacher": "resnet50", "teacher_weights": "DEFAULT", "teacher_share": 0.7}, None),
        ({"teacher": "resnet50", "teacher_weights": "t.pth"}, None),
        ({"teacher_weights": "out/best.pt", "teacher_share": 1.0}, None),
        ({"teacher_weights": "./weights"}, None),
    ],
)
def test_the_options_of_a_teacher_need_each_other(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize("recipe", FROM_CHECKPOINT)
def test_some_recipes_start_from_trained_weights(recipe):
    message = f"--recipe {recipe} starts from trained weights: give --init-from PATH"
    with pytest.raises(UserError, match=message):
        parse_arguments(["--recipe", recipe])
    assert GIVE_WEIGHTS == "give --init-from PATH or --weights NAME"
    for option in ("--init-from", "--resume", "--weights"):
        parse_arguments(["--recipe", recipe, option, "a.pt"])
    assert parse_arguments(["plan", "--recipe", recipe])[0] == "plan", "which trains nothing"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"download": True}, "--download needs --data-path, the folder to put CIFAR-10 into"),
        ({"subset": 0.2}, "--subset 0.2 needs --data-path: synthetic images are made"),
        ({"early_stopping": 3}, "--early-stopping 3 needs --epochs"),
        (
            {"skip_decay_1d": True, "norm_weight_decay": 0.0},
            "--norm-weight-decay 0.0 and --skip-decay-1d: give one",
        ),
        (
            {"skip_decay_1d": True, "bias_weight_decay": 0.1},
            "--bias-weight-decay 0.1 and --skip-decay-1d: give one",
        ),
        ({"skip_decay_1d": True, "weight_decay": 0.1}, None),
        ({"norm_weight_decay": 0.0, "bias_weight_decay": 0.0}, None),
        ({"target_top1": 97.5}, "--target-top1 97.5 needs --epochs"),
        (
            {"augment_confused": Path("c.json")},
            "--augment-confused c.json needs --data-path: synthetic images are not augmented",
        ),
        ({"augment_confused": Path("c.json"), "data_path": Path("data")}, None),
        (
            {"tensorboard": True},
            "--tensorboard needs --output-dir, the folder for all that is written",
        ),
        ({"tensorboard": True, "output_dir": Path("out")}, None),
        ({"download": True, "data_path": Path("data")}, None),
        ({"subset": 0.2, "data_path": Path("data")}, None),
        ({"early_stopping": 3, "target_top1": 97.5, "epochs": 9}, None),
        ({"epochs": 9, "steps": 7}, None),
    ],
)
def test_options_that_need_data_or_epochs_or_exclude_each_other(settings, message):
    assert message_for(**settings) == message


@pytest.mark.parametrize("command", ["train", "find-lr", "compare"])
@pytest.mark.parametrize("name", ["machine", "record"])
def test_another_machine_is_planned_for_and_no_more(command, name):
    settings = Settings(**{name: Path("m.json")})
    message = f"--{name} m.json is for plan, not for {command}"
    assert list(contradictions(command, settings)) == [message]
    assert not list(contradictions("plan", settings))


def test_another_machine_cannot_be_measured():
    settings = Settings(machine=Path("m.json"), split="auto")
    assert list(contradictions("plan", settings)) == [
        "--split auto measures the machine that it runs on, not that of --machine m.json: give a "
        "ratio such as 1:2"
    ]


# Recipes


def with_recipe(name, *options):
    """The settings of a recipe, with what it needs and further options."""
    needs = ["--init-from", "w.pt"] if name in FROM_CHECKPOINT else []
    return parse_arguments(["--recipe", name, "--data-path", "data", *needs, *options])[1]


# Every setting that decides what is computed, where it is not that of the plain program.
IN_FORCE = {
    "digits": {
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
    "output_dir": (["--output-dir", "elsewhere"], Path("elsewhere")),
    "model": (["--model", "resnet18"], "resnet18"),
    "epochs": (["--epochs", "33"], 33),
    "weights": (["--weights", "IMAGENET1K_V1"], "IMAGENET1K_V1"),
    "freeze": (["--freeze", "layer1"], "layer1"),
    "freeze_epochs": (["--freeze-epochs", "2"], 2),
    "batch_size": (["-b", "6"], 6),
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
    assert with_recipe(recipe, *options) == dataclasses.replace(before, **{setting: value})


def test_an_option_overrides_a_recipe_that_comes_later():
    _, settings = parse_arguments("--no-model-ema --recipe imagenet-full --resume a.pt".split())
    assert settings.model_ema is False
    assert settings.epochs == 60


def test_a_value_that_is_the_program_s_own_default_overrides_a_recipe_too():
    assert with_recipe("cifar10", "-b", "32").batch_size == 32
    assert with_recipe("hybrid", "--model", "resnet50", "--opt", "sgd").model == "resnet50"


# Help


def help_of(command):
    return build_parser(command).format_help()


def shown_in(command):
    """The options that a command's help shows, of Settings, by name."""
    given = re.findall(r"^  (?:-\w \S+, )?--(no-)?([\w-]+)", help_of(command), re.MULTILINE)
    names = [name.replace("-", "_") for _, name in given]
    return [name for name in names if name not in ("version", "list_models", "list_data_sets")]


# Options that one command alone takes, and its help shows.
ELSEWHERE = dict.fromkeys(("json", "quick", "preload"), "compare")
ELSEWHERE |= dict.fromkeys(("machine", "record"), "plan")
ELSEWHERE["pictures"] = "predict"


def test_help_lists_every_option_with_its_default():
    text = run = " ".join(help_of("train").split())
    for setting in dataclasses.fields(Settings):
        switched_off = "no-" if setting.default is True else ""
        if setting.name in ELSEWHERE:
            text = " ".join(help_of(ELSEWHERE[setting.name]).split())
        else:
            text = run
        flag = f"--{switched_off}{setting.name.replace('_', '-')}"
        assert ("PICTURE" if setting.name == "pictures" else flag) in text
        assert setting.metadata["help"] in text
    assert "(default: resnet50)" in run
    assert "(default: 0.9999)" in run
    assert "(default: 30,60,80)" in run


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("digits", "--model resnet56 --image-size 32 --hflip 0.0 --min-scale 0.6 --epochs 12"),
        ("imagenet", "--epochs 90 --batch-size 32 --accumulate 8"),
        ("imagenet-subset", "--subset 0.2 --image-size 128 --opt adam --lr 0.001"),
        ("imagenet-finetune", "--min-res 128 --max-res 224 --end-ramp 20 --lr 0.01"),
        ("imagenet-full", "--clip-grad-norm 1.0 --stochastic-depth 0.1 --model-ema"),
        ("cifar10", "--lr 0.1 --lr-scheduler multistep --lr-milestones 102,154"),
        ("hybrid", "--lr-scheduler warm-restarts --min-lr 1e-06 --label-smoothing 0.1"),
    ],
)
def test_help_lists_every_recipe(recipe, options):
    text = build_parser().format_help()
    _, heading, recipes = text.partition("\nrecipes (")
    assert recipes.startswith(
        "defaults that every option overrides; all with --output-dir out/NAME)"
    )
    _, _, below = recipes.partition(f"\n  {recipe}:\n")
    listed, _, _ = below.partition(":\n")
    assert options in " ".join(listed.split())


def test_help_lists_every_command():
    text = build_parser().format_help()
    for command in ("train", "plan", "find-lr", "compare", "predict"):
        assert f"\n  {command:8} " in text


ALL = [setting.name for setting in dataclasses.fields(Settings)]
OF_CORES = """
    split schedule forward_cores backward_cores loader_cores forward_threads backward_threads
""".split()


def test_help_of_train_shows_what_belongs_to_no_other_command():
    assert shown_in("train") == [name for name in ALL if name not in ELSEWHERE]


def test_help_of_plan_shows_what_changes_a_plan():
    data = ["model", "data_path", "dataset", "download", "val_share", "num_classes", "image_size"]
    data += ["min_res", "max_res", "end_ramp", "workers"]
    training = "recipe batch_size accumulate epochs freeze freeze_epochs".split()
    training += ["teacher", "teacher_weights", "weights"]
    cores = [*OF_CORES, "machine", "record"]
    assert shown_in("plan") == [*data, *training, *cores, "ranks", "precision"]


@pytest.mark.parametrize(
    ("command", "some", "others"),
    [
        (
            "find-lr",
            "model workers min_scale mixup_alpha recipe batch_size steps momentum weight_decay "
            "norm_weight_decay bias_weight_decay skip_decay_1d ra_magnitude init_from schedule "
            "lr_body_factor freeze stochastic_depth weights teacher teacher_weights teacher_share "
            "precision grads_to_none output_dir",
            "epochs lr lr_scheduler min_lr model_ema early_stopping resume test_only save_freq "
            "log_file print_freq json",
        ),
        (
            "compare",
            "model workers hflip recipe batch_size accumulate steps opt seed split forward_cores "
            "freeze stochastic_depth teacher teacher_weights teacher_share precision fused "
            "output_dir json",
            "min_res epochs lr lr_scheduler model_ema target_top1 resume init_from schedule "
            "print_freq",
        ),
        (
            "predict",
            "model image_size val_resize interpolation mean std workers batch_size resume weights "
            "split forward_cores forward_threads precision channels_last json",
            "data_path num_classes min_res epochs lr seed init_from test_only schedule "
            "backward_threads fused log_file print_freq",
        ),
    ],
)
def test_help_of_other_commands_shows_what_makes_a_difference_to_them(command, some, others):
    shown = shown_in(command)
    assert shown == [name for name in ALL if name in shown], "in the usual order"
    assert not set(some.split()) - set(shown)
    assert not set(others.split()) & set(shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_shows_exists(command):
    groups = Settings.__bases__
    for each in COMMANDS[command].shows:
        assert each in groups or each in ALL, each


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_three_examples_that_work(command, monkeypatch):
    examples = re.findall(r"^    train_split_affinity.py (.*)$", help_of(command), re.MULTILINE)
    assert examples == list(COMMANDS[command].examples.values())
    assert len(examples) == 3
    for arguments in examples:
        assert parse_arguments(arguments.split())[0] == command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_of_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(command)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    assert max(map(len, DATA_SETS.splitlines())) <= 80
    assert f"usage: train_split_affinity.py {'[train|' if command == 'train' else command}" in text


def test_what_is_told_of_data_sets_is_so():
    synthetic = DATA_SETS.partition("synthetic\n")[2]
    assert f"images   {SYNTHETIC_IMAGES} to train" in synthetic
    assert f"classes  {SYNTHETIC_CLASSES}, or" in synthetic
    assert f"PATH/{CIFAR10_FOLDER}, " in DATA_SETS
    for name in VALIDATION_FOLDERS:
        assert re.search(rf"\b{name}\b", DATA_SETS.partition("cifar10")[0])
    told = re.findall(r"\.\w+", re.search(r"hold: (.*)", DATA_SETS)[1])
    assert set(told) <= set(IMG_EXTENSIONS)


# Names from other trainers


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--wd 0.05", "--weight-decay 0.05"),
        ("--img-size 96", "--image-size 96"),
        ("--smoothing 0.1", "--label-smoothing 0.1"),
        ("--aa ra", "--auto-augment ra"),
        ("--mixup 0.8", "--mixup-alpha 0.8"),
        ("--cutmix 1", "--cutmix-alpha 1"),
        ("--reprob 0.25", "--random-erase 0.25"),
        ("--sched cosine", "--lr-scheduler cosine"),
        ("--epochs 9 --warmup-epochs 5", "--epochs 9 --lr-warmup-epochs 5"),
        ("--lr-min 1e-6", "--min-lr 1e-6"),
        ("--lr-step-size 7", "--lr-step-epochs 7"),
        ("--grad-accum-steps 4", "--accumulate 4"),
        ("--initial-checkpoint a.pt", "--init-from a.pt"),
        ("--clip-grad 5", "--clip-grad-norm 5"),
        ("--log-interval 50", "--print-freq 50"),
    ],
)
def test_names_from_other_trainers(theirs, ours):
    expected = parse_arguments(ours.split())
    assert expected[1] != Settings()
    assert parse_arguments(theirs.split()) == expected
    flag, _, value = theirs.rpartition(" ")
    assert parse_arguments(f"{flag}={value}".split()) == expected


def test_names_from_other_trainers_override_a_recipe():
    given = with_recipe("imagenet", "--wd", "0.05", "--smoothing=0", "--mixup", "0")
    ours = with_recipe("imagenet", "--weight-decay=0.05", "--label-smoothing=0", "--mixup-alpha=0")
    assert given == ours != with_recipe("imagenet")


def test_help_mentions_that_there_are_names_from_other_trainers():
    text = help_of("train")
    assert text.endswith(
        "\nNames as in torchvision's and timm's scripts (--wd, --img-size) work too.\n"
    )
    for command in COMMANDS:
        for alias in ALIASES:
            assert not re.search(rf"^ .*{alias}\b(?!-)", help_of(command), re.MULTILINE)


def test_the_parser_takes_its_defaults_from_settings():
    assert parse_arguments([]) == ("train", Settings())


def test_pictures_stand_among_the_options_or_beside_them():
    for arguments in (
        "a.jpg b --weights W -b 8",
        "a.jpg --weights W -b 8 b",
        "-b 8 a.jpg b --weights=W",
    ):
        _, settings = parse_arguments(["predict", *arguments.split()])
        assert settings == Settings(pictures=("a.jpg", "b"), weights="W", batch_size=8)


def resumed(arguments, **saved):
    """The settings of a command with what a saved run has, and with what that is asked for."""
    asked = []

    def read(*what):
        asked.extend(what)
        return saved

    command, settings = parse_arguments(arguments.split(), read)
    assert asked[0] == command
    return settings, asked


def test_the_settings_of_a_saved_run_are_defaults():
    """Above the program's own and a recipe's, below what is typed, be it the program's default."""
    settings, asked = resumed("--resume a.pt -b 32", batch_size=8, lr=0.3, min_scale=0.5)
    assert settings == Settings(resume=Path("a.pt"), batch_size=32, lr=0.3, min_scale=0.5)
    assert asked[1:] == [
        Settings(resume=Path("a.pt"), batch_size=32),
        {"resume": Path("a.pt"), "batch_size": 32},
    ]
    settings, _ = resumed("--recipe digits --resume auto --no-model-ema", epochs=20, model_ema=True)
    assert (settings.model, settings.epochs, settings.model_ema) == ("resnet56", 20, False)
    assert settings.output_dir == Path("out/digits")


def test_contradictions_are_looked_for_among_what_is_in_force():
    with pytest.raises(UserError, match="overlap has nothing to overlap with --split none"):
        resumed("--resume a.pt --split none", schedule="overlap", accumulate=2)
    assert resumed("--resume a.pt --schedule overlap", accumulate=2)[0].accumulate == 2
    assert resumed("--resume a.pt --save-steps 5", output_dir=OUT)[0].save_steps == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--resume auto", "--resume auto needs --output-dir"),
        ("--resume a.pt --init-from b.pt", "--resume a.pt and --init-from b.pt: give one"),
        ("--resume a.pt --quick", "--quick is for compare, not for train"),
        ("plan --resume a.pt", "--resume a.pt is for train and predict, not for plan"),
        ("predict --resume a.pt", "predict needs pictures"),
        ("predict x.jpg --resume a.pt --weights W", "--resume a.pt and --weights W: give one"),
    ],
)
def test_what_no_saved_run_can_mend_is_said_before_it_is_read(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(arguments.split(), lambda *what: pytest.fail("read"))
    with pytest.raises(UserError, match=message):
        parse_arguments(arguments.split())


def test_arguments_become_settings():
    command, settings = parse_arguments(
        "plan -b 8 --split 1:2 --loader-cores 0-1 -j 0 --deterministic --lr 1e-3".split()
    )
    assert command == "plan"
    assert settings == Settings(
        batch_size=8, split="1:2", loader_cores=(0, 1), workers=0, deterministic=True, lr=1e-3
    )


# Text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain \\x41", r"plain \x41"),
        ("Blüte 中 😀".encode(), "Blüte 中 😀"),
        (b"caf\xe9", r"caf\xe9"),
        (b"\xc3\xbc \xc3", r"ü \xc3"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_in_any_locale_becomes_the_same_text(name, text, encoding):
    once = readable(name.decode(encoding, "surrogateescape"))
    assert once == readable(once) == text
