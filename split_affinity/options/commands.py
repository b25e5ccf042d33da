"""The commands, their `--help`, and the way from a command line to Settings, without PyTorch."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_affinity import PROGRAM, __version__
from split_affinity.errors import UserError
from split_affinity.options.contradictions import contradictions, typed_contradictions
from split_affinity.options.data_sets import DATA_SETS, NAMED_DATA
from split_affinity.options.recipes import (
    adapt_recipe,
    list_recipes,
    recipe_defaults,
    survey_folder,
    usual_recipe,
)
from split_affinity.options.settings import (
    COMPARED_BATCHES,
    NO_WEIGHTS,
    TITLES,
    AugmentationSettings,
    CoreSettings,
    DataSettings,
    Settings,
    SpeedSettings,
    as_options,
)
from split_affinity.options.values import SWEEP, Values
from split_affinity.text import (
    as_option,
    did_you_mean,
    option_text,
    similar_names,
    try_print,
    without_login,
    without_logins,
)

# Names of the same options in torchvision's reference training (wd, lr-min, lr-step-size) and in
# timm's train.py (the rest), and the settings here.
ALIASES = {
    "--wd": "weight_decay",
    "--img-size": "image_size",
    "--val-resize-size": "val_resize",
    "--drop-path": "stochastic_depth",
    "--smoothing": "label_smoothing",
    "--aa": "auto_augment",
    "--mixup": "mixup_alpha",
    "--cutmix": "cutmix_alpha",
    "--reprob": "random_erase",
    "--sched": "lr_scheduler",
    "--warmup-epochs": "lr_warmup_epochs",
    "--lr-min": "min_lr",
    "--lr-step-size": "lr_step_epochs",
    "--grad-accum-steps": "accumulate",
    "--initial-checkpoint": "init_from",
    "--clip-grad": "clip_grad_norm",
    "--log-interval": "print_freq",
}

# Other names that people may try, and the options that a hint names.
HINTS = {
    "--optimizer": "--opt",
    "--learning-rate": "--lr",
    "--learning_rate": "--lr",
    "--scheduler": "--lr-scheduler",
    "--network": "--model",
    "--batch": "--batch-size",
    "--data": "--data-path",
    "--data-dir": "--data-path",
    "--num-workers": "--workers",
    "--pretrained": "--weights",
    "--checkpoint": "--resume",
    "--output": "--output-dir",
    "--max-steps": "--steps",
}


@dataclass(frozen=True)
class Command:
    """A command in `--help`: what it does, three examples, and the options that it shows.

    `shows` names groups and single settings. A command takes all other options of a run too: the
    arguments of a run serve to plan it.
    """

    help: str
    examples: dict[str, str]
    shows: Collection[type | str] = Settings.__bases__


ANSWERING = ("predict", "list-models")  # other programs may read what these print
# What makes a difference to the answers of a trained model, or to how long they take.
ASKED_WITH = """
    model image_size val_resize interpolation mean std full_decode workers batch_size deterministic
    precision channels_last fold_norm tuned_malloc flush_denormals""".split()
# What find-lr and compare have in common, beside groups.
TRAINED_WITH = """
    recipe batch_size accumulate steps opt label_smoothing class_weights clip_grad_norm freeze
    stochastic_depth teacher teacher_weights teacher_share seed deterministic output_dir
    open""".split()

# fmt: off
COMMANDS = {
    "train": Command("train a model (the default)", {
        "ResNet-50 on synthetic images, to see what the phases take": "-b 32 --steps 50",
        "a whole training, by a recipe": "--recipe cifar10 --data-path cifar --download",
        "your own pictures, with checkpoints": "--data-path photos --epochs 30 --output-dir out",
    }),
    "data": Command("look at your pictures first: broken ones, copies, wrong labels", {
        "a folder with a folder of pictures for each class": "data photos",
        "a data set by name": "data --dataset cifar10 --data-path cifar",
        "as another recipe shows them to the model": "data photos --recipe imagenet",
    }, (DataSettings, AugmentationSettings, *"recipe batch_size seed output_dir open".split())),
    "plan": Command("show the cores, how they would be divided, and the model", {
        "what a run without further options would use": "plan",
        "twice as many cores for backward as for forward": "plan --split 1:2",
        "four ranks, each with a part of the cores": "plan --ranks 4",
    }, (CoreSettings, *"""
        model data_path dataset download val_share num_classes image_size min_res max_res end_ramp
        workers recipe batch_size accumulate epochs freeze freeze_epochs weights teacher
        teacher_weights precision ranks""".split())),
    "find-lr": Command("try learning rates, from low to high, and suggest one", {
        "for your own pictures, with a plot": "find-lr --data-path photos --output-dir out",
        "for a recipe": "find-lr --recipe cifar10 --data-path cifar",
        "for AdamW, in more steps": "find-lr --data-path photos --opt adamw --steps 200",
    }, (DataSettings, AugmentationSettings, CoreSettings, SpeedSettings, *TRAINED_WITH, *"""
        lr_body_factor momentum weight_decay norm_weight_decay bias_weight_decay skip_decay_1d
        weights init_from""".split())),
    "compare": Command("train in all ways, in turn, and say which is fastest", {
        "ResNet-50: plain loops, one lane, and every schedule of the split": "compare",
        "all ratios of forward to backward cores, as a curve":
            "compare --split sweep --output-dir out",
        "your own pictures, loading included, and the figures in a file":
            "compare --data-path photos --json compare.json",
    }, (AugmentationSettings, SpeedSettings, *TRAINED_WITH, *"""
        model data_path dataset download num_classes image_size subset max_bad_images workers split
        forward_cores backward_cores loader_cores forward_threads backward_threads
        log_file""".split())),
    "predict": Command("ask a trained model what pictures show", {
        "a folder, with what a training has saved": "predict new --resume out/mine/best.pt",
        "a picture, and the answer in a file":
            "predict a.jpg --resume best.pt --json answers.json",
        "with trained weights of torchvision":
            "predict new/*.jpg --model resnet50 --weights DEFAULT",
    }, ("pictures", *ASKED_WITH, *"""
        weights output_dir split forward_cores backward_cores loader_cores
        forward_threads""".split())),
}
# fmt: on


def installed_version(package: str) -> str:
    """The version of a package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def version_line() -> str:
    """The versions to name in a report of trouble."""
    packages = ", ".join(f"{name} {installed_version(name)}" for name in ("torch", "torchvision"))
    return f"{PROGRAM} {__version__}, Python {platform.python_version()}, {packages}"


class PrintAndExit(argparse.Action):
    """An option that prints the text that `const` returns, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the text and exit."""
        try_print(self.const(), sys.stdout)
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserErrors of one line."""

    def error(self, message: str) -> None:
        raise UserError(without_logins(message))

    def print_help(self, file: Any = None) -> None:
        """Print the help; nobody has to read it to its end."""
        try_print(self.format_help().rstrip(), file or sys.stdout)

    def parse_args(self, *args: Any) -> argparse.Namespace:
        """Parse options that may stand among others; the error for an unknown one has a hint."""
        given, unknown = self.parse_known_intermixed_args(*args)
        if not unknown:
            return given
        hint = self._hint([text.partition("=")[0] for text in unknown if text.startswith("-")])
        if command := next((text for text in unknown if text in COMMANDS), None):
            rest = [text for text in args[0] if text != command]
            hint = f"; the command comes first: {shlex.join([command, *rest])}"
        return self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    def _hint(self, flags: Sequence[str]) -> str:
        """Options that are most like unknown ones."""
        known = {flag: flag for flag in self._option_string_actions} | HINTS
        hints = []
        for flag in flags:
            # Two names here can mean the same option.
            near = [*dict.fromkeys(known[name] for name in similar_names(flag, known))]
            if near and len(flags) == 1:
                hints = near
            elif near:
                hints.append(f"{' or '.join(near)} for {flag}")
        return f"; did you mean {', '.join(hints)}?" if hints else ""


def build_parser(command: str = "train") -> Parser:
    """The parser of a command, with all options and their defaults."""
    name = "[COMMAND]" if command == "train" else command
    name += {"predict": " PICTURE...", "data": " FOLDER"}.get(command, "")
    parser = Parser(
        prog=PROGRAM,
        usage=f"%(prog)s {name} [options]",
        description=describe_command(command),
        epilog=describe_use(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = {"action": PrintAndExit, "nargs": 0, "default": argparse.SUPPRESS}
    parser.add_argument("--version", help="show versions and exit", const=version_line, **text)
    parser.add_argument("--list-models", help="list what --model takes", action="store_true")
    places = {"help": "list what --dataset and --data-path take", "const": lambda: DATA_SETS}
    parser.add_argument("--list-data-sets", **places, **text)
    if command == "data":
        folder = "folder with a folder of pictures for each class; as --data-path"
        parser.add_argument("pictures", help=folder, nargs="*", metavar="FOLDER")
    shows = COMMANDS[command].shows
    for group, title in TITLES.items():
        help_group = parser.add_argument_group(title)
        for setting in dataclasses.fields(group):
            only = setting.metadata["only"]
            shown = command in only if only else group in shows or setting.name in shows
            add_option(help_group, setting, shown)
    return parser


def describe_command(command: str) -> str:
    """The text above the options of a command."""
    if command != "train":
        what = COMMANDS[command].help
        return f"{what[0].upper()}{what[1:]}.\nIt takes all other options of a run too."
    listed = "\n".join(f"  {name:8} {each.help}" for name, each in COMMANDS.items())
    about = "Train an image classifier on CPUs, forward and backward on their own cores."
    return f"{about}\n\ncommands, each with a --help of its own:\n{listed}"


def describe_use(command: str) -> str:
    """The text below the options of a command."""
    examples = COMMANDS[command].examples.items()
    shown = "\n".join(f"  {what}:\n    %(prog)s {arguments}" for what, arguments in examples)
    parts = [f"examples:\n{shown}"]
    if command == "train":
        some = ", ".join(list(ALIASES)[:2])
        parts += [
            "recipes (defaults that every option overrides; all with --output-dir out/NAME):\n"
            + list_recipes(),
            f"Names as in torchvision's and timm's scripts ({some}) work too.",
        ]
    return "\n\n".join(parts)


def add_option(help_group: Any, setting: dataclasses.Field, shown: bool) -> None:
    """Add a setting to its help group, and its aliases, which help never shows."""
    metadata = setting.metadata
    text, argument = metadata["help"], metadata["argument"]
    if setting.name == "pictures":  # the only one without dashes
        if shown:
            help_group.add_argument("pictures", help=text, **argument)
        return
    flag = as_option(setting.name, True)
    if setting.default is False:
        # Both ways, since a recipe may have switched it on.
        kind = {"action": argparse.BooleanOptionalAction, "default": False}
    elif setting.default is True:
        kind = {"action": "store_false"}
        flag = flag.replace("--", "--no-", 1)
    else:
        kind = {"default": setting.default, **argument}
        text += "" if setting.default is None else f" (default: {option_text(setting.default)})"
    kind |= {"dest": setting.name, "help": text if shown else argparse.SUPPRESS}
    help_group.add_argument(*metadata["short"], flag, **kind)
    kind |= {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for alias, name in ALIASES.items():
        if name == setting.name:
            help_group.add_argument(alias, **kind)


def split_arguments(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command, `train` if there is none, and its options."""
    command, *options = argv if argv and not argv[0].startswith("-") else ["train", *argv]
    return command, options


def typed_options(command: str, options: Sequence[str]) -> Values:
    """The typed options, by the names of their settings; raises UserError if one is wrong."""
    nothing = argparse.Namespace(**{each.name: None for each in dataclasses.fields(Settings)})
    given = vars(build_parser(command).parse_args(options, nothing))
    given["pictures"] = tuple(given["pictures"] or ())
    if command == "data" and given["pictures"]:
        place, *more = given.pop("pictures")
        if more or given["data_path"]:
            both = shlex.join([place, *more, *map(str, filter(None, [given["data_path"]]))])
            raise UserError(f"data {both}: give one folder")
        given["data_path"] = Path(place)
    typed = {name: value for name, value in given.items() if value not in (None, ())}
    none_asked = typed.get("weights", "").lower() == NO_WEIGHTS
    return typed | ({"weights": None} if none_asked else {})


def command_defaults(command: str, typed: Values) -> Values:
    """Defaults in place of Settings' own: a recipe's, a data set's, and those of compare.

    What contradicts a typed option gives way. A recipe's weights give way to those of a file, its
    data set to a folder of images, both to a saved run that is resumed.
    """
    recipe, quick, resume = (typed.get(name) for name in ("recipe", "quick", "resume"))
    looks = command == "data"
    if looks and not recipe:
        recipe = usual_recipe(typed.get("dataset"))
    defaults = adapt_recipe(recipe_defaults(recipe), typed) if recipe else {}
    defaults |= {"recipe": recipe} if looks else {}
    resumes = resume and (typed.get("test_only") or resume != Path("auto"))
    if typed.get("data_path") or resumes:
        defaults.pop("dataset", None)
    if dataset := typed.get("dataset") or defaults.get("dataset"):
        defaults |= NAMED_DATA[dataset].defaults
    if not (typed.get("data_path") or defaults.get("data_path") or resumes):
        for part in ("subset", "val_share"):  # of synthetic images
            defaults.pop(part, None)
    if command == "compare" and (quick or not recipe):
        defaults["accumulate"] = 1 if quick else COMPARED_BATCHES
    if typed.get("simulate"):
        defaults["split"] = SWEEP
    if typed.get("init_from") or resumes:
        defaults.pop("weights", None)
    if looks:
        place = typed.get("data_path") or defaults.get("data_path") or dataset
        defaults["output_dir"] = survey_folder(Path(place or ""))
    return defaults


def parse_arguments(
    argv: Sequence[str],
    saved: Callable[[str, Settings, Values], Values] | None = None,
    ranks: int = 1,
) -> tuple[str, Settings]:
    """The command and the settings; raises UserError if arguments make no sense.

    `saved` returns the defaults that `--resume` brings, from the command, the settings without them
    and the typed options. Without it nothing that depends on them is checked. `ranks` were started.
    """
    command, options = split_arguments(argv)
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        shown = without_login(command)
        raise UserError(f"unknown command {shown!r} (choose from {', '.join(COMMANDS)}){hint}")
    typed = typed_options(command, options)
    if typed.pop("list_models"):
        return "list-models", Settings()
    defaults = command_defaults(command, typed) | {"ranks": ranks}
    settings = Settings(**defaults | typed)
    if settings.resume:
        for message in typed_contradictions(command, settings, ranks):
            raise UserError(message)
        if not saved:
            return command, settings
        found = saved(command, settings, typed)
        begun = dict.fromkeys(("weights", "init_from")) if found else {}  # it has its weights
        settings = Settings(**defaults | found | typed | begun)
    for message in contradictions(command, settings, ranks):
        raise UserError(message)
    return command, settings


def start_words() -> list[str]:
    """What the running command began with: Python, its options, and the program."""
    started, name = Path(sys.argv[0]), Path(PROGRAM).stem
    ours = started.stem.replace("-", "_") == name or started.parent.name == "split_affinity"
    words = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    return words if ours else ["python", PROGRAM]


def command_again(settings: Settings) -> str:
    """After a colon, a command with these settings that starts as the running one did."""
    typed, start = shlex.join(start_words()), ""
    if settings.ranks > 1:
        typed, start = PROGRAM, ", with torchrun as before"
    mirror = settings.mirror or ""
    login = "" if mirror == without_login(mirror) else " (--mirror with its login)"
    return f"{start}: {typed} {as_options(settings)}{login}"


def how_to_go_on(settings: Settings) -> str:
    """The command that goes on with the run of these settings."""
    return f"to go on{command_again(dataclasses.replace(settings, resume=Path('auto')))}"
