"""Help, and from a command line to settings.

Run: python -m pytest tests/options/test_commands.py
"""

import dataclasses
import re
from pathlib import Path

import pytest
from option_texts import OUT, with_recipe
from torchvision.datasets.folder import IMG_EXTENSIONS

from split_affinity.data.image_folder import VALIDATION_FOLDERS
from split_affinity.data.named import CIFAR10_FOLDER, SYNTHETIC_CLASSES, SYNTHETIC_IMAGES
from split_affinity.errors import UserError
from split_affinity.options.commands import ALIASES, COMMANDS, build_parser, parse_arguments
from split_affinity.options.data_sets import DATA_SETS
from split_affinity.options.settings import Settings

# Help


def help_of(command):
    return build_parser(command).format_help()


def shown_in(command):
    """The options that a command's help shows, of Settings, by name."""
    given = re.findall(r"^  (?:-\w \S+, )?--(no-)?([\w-]+)", help_of(command), re.MULTILINE)
    names = [name.replace("-", "_") for _, name in given]
    return [name for name in names if name not in ("version", "list_models", "list_data_sets")]


# Options that one command alone takes, and its help shows.
ELSEWHERE = {
    "json": "compare",
    "csv": "predict",
    "quick": "compare",
    "preload": "compare",
    "simulate": "compare",
    "machine": "plan",
    "record": "plan",
    "pictures": "predict",
}


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
    assert shown_in("plan") == [*data, *training, *cores, "ranks", "precision", "json"]


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
            "split forward_cores forward_threads precision channels_last fold_norm json",
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
    assert (
        f"usage: train_split_affinity.py {'[COMMAND]' if command == 'train' else command}" in text
    )


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
