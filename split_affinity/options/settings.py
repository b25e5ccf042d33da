"""Every option once: its name, default, help, parser, and what another value does on resume.

You add an option here; contradictions.py has what it contradicts, commands.py which commands show
it in their help. Derived values live elsewhere (see CorePlan).
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from split_affinity.options.data_sets import NAMED_DATA, parse_data_set
from split_affinity.options.recipes import RECIPES, recipe_defaults
from split_affinity.options.values import (
    BELOW_1,
    COUNT,
    COUNT_FROM_0,
    DEVIATION,
    JITTER,
    METAVARS,
    MIXING,
    NOT_NEGATIVE,
    PART,
    PERCENT,
    SECONDS,
    SHARE,
    Values,
    parse_cpu_list,
    parse_milestones,
    parse_split,
    three_numbers,
    whole_number,
)
from split_affinity.text import format_cpu_list, option_text, readable, without_login

MOST_CLASSES = 10**7
MOST_SYNTHETIC_IMAGES = 2**17  # in a step; more than any published training had
NO_WEIGHTS = "none"  # as typed for --weights
COMPARED_BATCHES = 4  # in a step, as in most recipes
BALANCED = "balanced"  # of --class-weights, which takes a file too


def option(
    default: Any,
    help: str,
    *short: str,
    on_resume: str = "differs",
    only: str = "",
    **argument: Any,
) -> Any:
    """A field of Settings; `argument` (type, choices, metavar) goes to argparse's `add_argument`.

    The help of a switch that is on by default says what `--no-...` does. `short` are short flags.
    `only` names the commands that take the option: without it all do.
    """
    argument = {"metavar": METAVARS.get(argument.get("type"), "X"), **argument}
    metadata = {"help": help, "short": short, "on_resume": on_resume, "only": only.split()}
    return field(default=default, metadata={**metadata, "argument": argument})


# What another value does when a run is resumed. `option`: the numbers differ, and the user is told.
# `free_option`: nothing. `fixed_option`: it is refused, since the saved state would make no sense.
# `rate_option`: the numbers differ, and optimizer and learning rate schedule are made anew.
free_option = partial(option, on_resume="free")
fixed_option = partial(option, on_resume="fixed")
rate_option = partial(option, on_resume="rate")


# fmt: off
# The groups of --help.
@dataclass(frozen=True)
class DataSettings:
    model: str = fixed_option("resnet50", "torchvision classifier by name, or resnet20 or resnet56 "
        "(for small images), hybrid, hybrid-light, hybrid-heavy; timm/NAME: one of timm's, if that "
        "is installed", metavar="NAME")
    data_path: Path | None = free_option(None, "image folder, PATH/train/<class>/*.jpg and "
        "PATH/val (or valid, or validation), or PATH/<class>/*.jpg; or a folder with CIFAR-10's "
        "cifar-10-batches-py (default: synthetic images for timing, of the first 10 classes, with "
        "a noisy pattern for each)", type=Path)
    dataset: str | None = fixed_option(None, "data set by name, in --data-path: see "
        "--list-data-sets", type=parse_data_set, metavar="NAME")
    download: bool = free_option(False, "let torchvision fetch the --dataset (without one, "
        "CIFAR-10) into --data-path, and verify it")
    val_share: float | None = fixed_option(None, "share of each class's images to keep for "
        "validation, if the data has none (default: 0.2 of a --dataset and with the recipes "
        "finetune and scratch, else none)", type=BELOW_1)
    num_classes: int | None = fixed_option(None, "number of classes (default: as many as the data "
        "has; 1000 for synthetic images)", type=whole_number(2, MOST_CLASSES), metavar="N")
    image_size: int | None = option(None, "side of the square images in pixels (default: that of "
        "--weights or of the --dataset, else 224)", type=COUNT)
    val_resize: int | None = option(None, "shorter side in pixels to which a picture is resized "
        "before its middle is cut out, to validate or to predict (default: in proportion to "
        "--image-size as with --weights or the --dataset, else as 256 to 224)", type=COUNT)
    interpolation: str | None = option(None, "how pictures are resized (default: as with "
        "--weights, else bilinear)", choices=("nearest", "bilinear", "bicubic"))
    mean: tuple[float, ...] | None = option(None, "mean of each channel, of values from 0 to 1 "
        "(default: that of --weights or of the --dataset, else ImageNet's)",
        type=three_numbers(SHARE), metavar="R,G,B")
    std: tuple[float, ...] | None = option(None, "standard deviation of each channel, likewise",
        type=three_numbers(DEVIATION), metavar="R,G,B")
    full_decode: bool = option(False, "decode JPEGs in full; by default at a half, a quarter or an "
        "eighth of their size if that is enough for the training crop, or twice --val-resize")
    min_res: int | None = option(None, "progressive resizing: side of the training images in the "
        "first epoch; it grows to --max-res in steps of 32", type=COUNT)
    max_res: int | None = option(None, "side of the training images from --end-ramp on (default: "
        "--image-size)", type=COUNT)
    end_ramp: int | None = option(None, "epoch in which --max-res is reached", type=COUNT)
    subset: float = fixed_option(1.0, "share of each class's training images to use; the choice is "
        "kept in the output folder", type=PART)
    max_bad_images: int | None = free_option(None, "broken images to skip before the run stops "
        "(default: one in a thousand training images, at least one); a batch of nothing but broken "
        "images always stops it", type=COUNT_FROM_0)
    workers: int | None = free_option(None, "loader processes, as many again for validation "
        "(default: one for each 8 cores of the run, at least 2, at most 16); 0 loads in the main "
        "thread", "-j", type=COUNT_FROM_0)


@dataclass(frozen=True)
class AugmentationSettings:
    min_scale: float = option(0.08, "smallest part of a picture's area that a training crop may "
        "show; not for CIFAR-10 and other pictures of one small size, which are padded by an "
        "eighth and cropped; 0.6 for gtsrb unless given", type=PART)
    hflip: float = option(0.5, "probability of a horizontal flip; 0 for svhn and gtsrb unless "
        "given", type=SHARE)
    color_jitter: float = option(0.0, "strength of random brightness, contrast and saturation",
        type=JITTER)
    auto_augment: str = option("none", "ra: RandAugment, ta: TrivialAugment, aa: AutoAugment",
        choices=("none", "ra", "ta", "aa"))
    ra_magnitude: int = option(9, "strength of RandAugment's operations, up to 30",
        type=whole_number(0, 30), metavar="N")
    random_erase: float = option(0.0, "probability of erasing a random rectangle", type=SHARE)
    mixup_alpha: float = option(0.0, "strength of mixup; 0: off", type=MIXING)
    cutmix_alpha: float = option(0.0, "strength of CutMix; 0: off; with both, one is drawn for "
        "each batch", type=MIXING)
    augment_confused: Path | None = free_option(None, "confused.json, written by --test-only: "
        "its most confused classes get a stronger RandAugment in training. A pair counts with half "
        "as many images as the worst, or more; stronger is the usual one if other classes get "
        "none, else 3 operations at --ra-magnitude + 5", type=Path)


@dataclass(frozen=True)
class TrainingSettings:
    recipe: str | None = free_option(None, "a set of defaults, which every other option overrides: "
        + ", ".join(RECIPES), choices=tuple(RECIPES), metavar="NAME")
    batch_size: int = fixed_option(32, "images per batch", "-b", type=COUNT)
    fit_batch: bool = option(False, "take a smaller --batch-size, half of it at the least, where "
        "that leaves fewer images out of each epoch (default: with the recipes finetune and "
        "scratch, unless you give -b)")
    accumulate: int = fixed_option(1, "batches per optimizer step", type=COUNT)
    steps: int | None = rate_option(None, "optimizer steps after which to stop (default: 50 "
        "without --epochs; find-lr 100, compare 7, more where they are short)", type=COUNT)
    epochs: int | None = rate_option(None, "passes over the data to train, with a validation after "
        "each", type=COUNT)
    opt: str = fixed_option("sgd", "optimizer",
        choices=("sgd", "adam", "adamw", "nadam", "rmsprop"))
    lr: float | None = rate_option(None, "learning rate, the highest one (default: SGD 0.1 and "
        "RMSprop 0.016 for 256 images a step, and in proportion; Adam, AdamW and NAdam 0.001)",
        type=NOT_NEGATIVE)
    lr_body_factor: float = fixed_option(1.0, "learning rate of all but the classifier, as a share "
        "of the classifier's (the printed one)", type=PART)
    momentum: float = rate_option(0.9, "momentum of SGD and RMSprop", type=SHARE)
    weight_decay: float = rate_option(1e-4, "weight decay", type=NOT_NEGATIVE)
    norm_weight_decay: float | None = fixed_option(None, "weight decay of normalisation layers "
        "(default: --weight-decay)", type=NOT_NEGATIVE)
    bias_weight_decay: float | None = fixed_option(None, "weight decay of biases, in all layers "
        "(default: --weight-decay)", type=NOT_NEGATIVE)
    skip_decay_1d: bool = fixed_option(False, "no weight decay for parameters with one dimension, "
        "such as biases")
    lr_scheduler: str = fixed_option("constant", "course of the learning rate",
        choices=("constant", "cosine", "step", "multistep", "onecycle", "warm-restarts"))
    lr_warmup_epochs: float | None = rate_option(None, "epochs of linear warm-up from a hundredth "
        "of the rate (default: with --lr and for onecycle none, else a tenth of the run, at most "
        "5)", type=COUNT_FROM_0)
    lr_step_epochs: int = rate_option(30, "step: epochs between two reductions", type=COUNT)
    lr_milestones: tuple[int, ...] = rate_option((30, 60, 80), "multistep: epochs with a reduction",
        type=parse_milestones, metavar="LIST")
    lr_gamma: float = rate_option(0.1, "step and multistep: factor of a reduction", type=PART)
    lr_restart_epochs: int = rate_option(10, "warm-restarts: epochs of the first cosine; each "
        "further one is twice as long", type=COUNT)
    min_lr: float = rate_option(0.0, "cosine and warm-restarts: lowest rate (of the classifier, "
        "with --lr-body-factor)", type=NOT_NEGATIVE)
    label_smoothing: float = option(0.0, "label smoothing", type=SHARE)
    class_weights: str | None = free_option(None, "weights of images in the loss, by their "
        "classes: balanced, for the same total of each class; or a JSON file, {\"class\": weight, "
        "...}, where a class that is not named counts 1. They are scaled to a mean of 1; the "
        "validation is not weighted", metavar=f"{BALANCED}|PATH")
    clip_grad_norm: float = option(0.0, "largest norm of all gradients; 0: not clipped",
        type=NOT_NEGATIVE)
    freeze: str | None = option(None, "leave weights as they are: body (all but the classifier), "
        "or layer groups such as conv1,bn1,layer1, as gradients.png names them", metavar="LIST")
    freeze_epochs: int | None = option(None, "epochs after which what --freeze names is trained "
        "too (default: it never is)", type=COUNT)
    stochastic_depth: float = option(0.0, "probability of leaving out the last residual block for "
        "an image, rising in proportion from the first; 0: what the model has by itself",
        type=BELOW_1)
    teacher: str | None = option(None, "model whose probabilities are part of the target "
        "(distillation); it runs in the forward phase, on the same images (default: that of "
        "--teacher-weights, if those are a checkpoint)", metavar="NAME")
    teacher_weights: str | None = option(None, "the teacher's weights: torchvision's by name, such "
        "as DEFAULT, or a file as for --init-from", metavar="NAME|PATH")
    teacher_share: float = option(0.5, "the teacher's part of the target; the labels have the rest",
        type=SHARE)
    model_ema: bool = fixed_option(False, "keep an exponential moving average of the weights: it "
        "decides on best.pt and on an early end; the raw weights are validated too")
    model_ema_decay: float = option(0.9999, "decay of that average per optimizer step; after t "
        "steps it is at most (1 + t) / (10 + t)", type=BELOW_1)
    early_stopping: int | None = free_option(None, "stop after this many epochs without a better "
        "top-1", type=COUNT, metavar="EPOCHS")
    target_top1: float | None = free_option(None, "stop once two validations in a row reach this "
        "top-1", type=PERCENT)
    seed: int = option(0, "seed of weights, data order and augmentation", type=COUNT_FROM_0)
    deterministic: bool = option(False, "refuse operations without a deterministic implementation")


@dataclass(frozen=True)
class CheckpointSettings:
    resume: Path | None = free_option(None, "checkpoint to go on from exactly, or to predict with; "
        "its run's settings are the defaults; auto: the newest good one in --output-dir, if any",
        only="train predict", type=Path, metavar="PATH|auto")
    weights: str | None = free_option(None, "trained weights to start a new run from: "
        "torchvision's by name, such as DEFAULT or IMAGENET1K_V2, or timm's, such as a1_in1k; "
        "none: new weights, whatever a recipe says; with --resume auto only if there is nothing "
        "to go on from", metavar="NAME")
    init_from: Path | None = free_option(None, "file with the weights to start a new run from: a "
        "checkpoint, or a plain state dict (.pt, .pth, .safetensors); with --resume auto only if "
        "there is nothing to go on from", type=Path)
    test_only: bool = free_option(False, "evaluate the checkpoint of --resume, or --weights "
        "(classes are matched by the names of folders), and train nothing")
    save_steps: int | None = free_option(None, "optimizer steps between two saves (default: after "
        "each epoch only)", type=COUNT)
    save_freq: int | None = free_option(None, "epochs between two checkpoints that are kept for "
        "good (default: none)", type=COUNT)
    keep_best: int = free_option(3, "checkpoints to keep, best top-1 first", type=COUNT)
    mirror: str | None = free_option(None, "address to copy checkpoints to, in the background: any "
        "that fsspec knows (s3:// with s3fs installed); a login in it is neither shown nor saved",
        metavar="URL")


@dataclass(frozen=True)
class CoreSettings:
    split: str = free_option("even", "how cores are divided: even, forward:backward such as 1:2, "
        "auto (measured, for the shortest step) or none (one lane over all cores); compare takes "
        "several, such as even,1:2, or sweep: all ratios of whole cores, one after the other (of "
        "more than eight some)", type=parse_split, metavar="even|F:B|auto|none")
    schedule: str = option("sequential", "how the phases of a step are laid over the lanes: "
        "sequential alternates strictly; overlap runs the forward pass of a step's next batch "
        "beside backward, with the same numbers (needs --accumulate 2 or more); delayed overlaps "
        "across steps too, with weights one update old",
        choices=("sequential", "overlap", "delayed"))
    forward_cores: tuple[int, ...] | None = free_option(None, "logical CPUs of the forward group, "
        "such as 0-3,8-11 or 0-15:2", type=parse_cpu_list)
    backward_cores: tuple[int, ...] | None = free_option(None, "logical CPUs of the backward group",
        type=parse_cpu_list)
    loader_cores: tuple[int, ...] | None = free_option(None, "logical CPUs of the main thread and "
        "the loader processes (default: those of the forward group)", type=parse_cpu_list)
    forward_threads: int | None = option(None, "threads of the forward lane (default: one per "
        "core)", type=COUNT)
    backward_threads: int | None = option(None, "threads of the backward lane (default: one per "
        "core)", type=COUNT)
    machine: Path | None = free_option(None, "divide the cores of another machine, given by a file "
        "of --record, or by a folder with its /sys/devices/system and /proc/cpuinfo", only="plan",
        type=Path)
    record: Path | None = free_option(None, "file to describe the machine in, for --machine "
        "elsewhere (default: not written)", only="plan", type=Path)


@dataclass(frozen=True)
class RankSettings:
    ranks: int = free_option(1, "number of ranks: torchrun starts those of a run (torchrun "
        "--nproc-per-node 4); plan shows as many on one machine without it", type=COUNT)
    timeout: float = free_option(300.0, "seconds that ranks wait for one of them before they give "
        "it up as lost", type=SECONDS)


@dataclass(frozen=True)
class SpeedSettings:
    precision: str = option("auto", "bf16: convolutions and matrix products in bfloat16 by "
        "autocast; auto: bf16 where the CPU computes it natively, else fp32",
        choices=("auto", "fp32", "bf16"))
    fused_norm: str = option("auto", "train with batch norm, and the addition and the ReLU behind "
        "it, as one operator, made by the C compiler of this machine; auto: on x86 alone, "
        "where it was measured to be faster", choices=("auto", "on", "off"))
    channels_last: bool = option(True, "keep images and weights in the default memory format, NCHW")
    fold_norm: bool = option(True, "compute batch norms by themselves; by default they are folded "
        "into the convolutions wherever nothing is trained: validation, predict, a teacher, and "
        "the part that --freeze leaves in front of all trained weights")
    fused: bool = rate_option(True, "update the weights tensor by tensor, not in a fused kernel "
        "(NAdam and RMSprop have none)")
    tuned_malloc: bool = free_option(True, "leave glibc's allocator as it is; by default it keeps "
        "the memory of a step for the next one")
    flush_denormals: bool = option(True, "compute with denormal numbers, not with 0 in their place")
    grads_to_none: bool = free_option(True, "set gradients to zero after an update, not to None")


@dataclass(frozen=True)
class ComparisonSettings:
    quick: bool = free_option(False, f"one batch a step, not {COMPARED_BATCHES}; overlap "
        "splits it into four. --accumulate, if you give it, always wins; a recipe's only without "
        "--quick", only="compare")
    preload: bool = free_option(False, "load the images of --data-path beforehand, so that loading "
        "and augmentation are not timed; synthetic images always are loaded so", only="compare")
    simulate: Path | None = free_option(None, "simulate the sweep of another machine, given as for "
        "plan --machine, from phases that are timed on one and on two cores of this one",
        only="compare", type=Path, metavar="MACHINE")


@dataclass(frozen=True)
class PredictionSettings:
    pictures: tuple[str, ...] = free_option((), "files, folders (with all that lies below) and "
        "patterns such as 'new/*.jpg'", only="predict", nargs="*", metavar="PICTURE")


@dataclass(frozen=True)
class ReportSettings:
    log_file: Path = free_option(Path("logs.md"), "Markdown file that gets a section for each run",
        type=Path)
    output_dir: Path | None = free_option(None, "folder for checkpoints, metrics.jsonl and "
        "pictures (default: that of --resume, else not written)", type=Path)
    print_freq: int = free_option(10, "steps between two lines of figures", type=COUNT)
    tensorboard: bool = free_option(False, "write what is measured for TensorBoard too, into the "
        "folder tensorboard in --output-dir (pip install tensorboard)")
    phases: bool = free_option(False, "write what each phase did, a row for each, into phases.csv "
        "in --output-dir (and phases.parquet, if pyarrow is installed): times, cores, CPU time by "
        "kinds of threads, context switches, page faults, migrations", only="train")
    counters: bool = free_option(False, "read what the machine counts in each phase, as far as it "
        "shows it: cycles, instructions, cache misses, memory traffic, energy, clocks; for the "
        "summary and, with --output-dir, for phases.csv", only="train")
    operators: bool = free_option(False, "profile three steps of a training: time by operator and "
        "by layer group, forward and backward, on each lane, and the memory that a phase touches; "
        "operators.csv in --output-dir has all of it", only="train")
    open: bool = free_option(False, "open the pictures that were drawn, or the page of data, at "
        "the end; without a screen a line says where they are", only="train find-lr compare data")
    json: Path | None = free_option(None, "file for the plan, for the figures of compare, or for "
        "the answers of predict (default: not written)", only="plan compare predict", type=Path)
    csv: Path | None = free_option(None, "file for a table: the answers of predict, a row for "
        "each picture, or the curve of compare --split sweep (default: not written)",
        only="compare predict", type=Path)


TITLES: dict[type, str] = {  # of the groups, in the order of --help
    DataSettings: "model and data",
    AugmentationSettings: "augmentation",
    TrainingSettings: "training",
    CheckpointSettings: "checkpoints",
    CoreSettings: "cores",
    RankSettings: "ranks: processes that train one model together",
    SpeedSettings: "speed",
    ComparisonSettings: "compare",
    PredictionSettings: "predict",
    ReportSettings: "reports",
}


# A dataclass has the fields of its last base first: so the groups stand in reverse.
@dataclass(frozen=True)
class Settings(ReportSettings, PredictionSettings, ComparisonSettings, SpeedSettings, RankSettings,
               CoreSettings, CheckpointSettings, TrainingSettings, AugmentationSettings,
               DataSettings):
    """What the user can choose."""
# fmt: on


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Settings as JSON types, without the logins of addresses, to be saved and shown."""
    values = dataclasses.asdict(settings)
    for name, value in values.items():
        if isinstance(value, Path):
            values[name] = readable(str(value))
        elif isinstance(value, str):
            values[name] = without_login(value)
    return values


def settings_of(values: Values) -> Settings:
    """Settings from JSON types; unknown names are left out."""
    found: Values = {}
    for setting in dataclasses.fields(Settings):
        value = values.get(setting.name)
        if isinstance(value, list):
            value = tuple(value)
        elif value is not None and setting.metadata["argument"].get("type") is Path:
            value = Path(value)
        if setting.name in values:
            found[setting.name] = value
    return Settings(**found)


def batches_in_step(settings: Settings) -> int:
    """Batches in an optimizer step, of all ranks together."""
    return settings.accumulate * settings.ranks


def images_in_step(settings: Settings) -> int:
    """Images in an optimizer step, of all ranks together."""
    return settings.batch_size * batches_in_step(settings)


def learning_rate(settings: Settings) -> float:
    """The highest learning rate: `--lr`, or by the optimizer and the images in a step."""
    if settings.lr is not None:
        return settings.lr
    for_256_images = {"sgd": 0.1, "rmsprop": 0.016}.get(settings.opt)
    return for_256_images * images_in_step(settings) / 256 if for_256_images else 1e-3


def as_options(settings: Settings) -> str:
    """The options to type for these settings, where defaults (a recipe's too) do not give them."""
    defaults = vars(Settings()) | (recipe_defaults(settings.recipe) if settings.recipe else {})
    if settings.dataset:
        defaults |= NAMED_DATA[settings.dataset].defaults
    if settings.data_path != defaults["data_path"]:
        defaults["dataset"] = None  # a recipe's data set gives way to a path
    words = []
    begins_anew = settings.resume in (None, Path("auto")) and not settings.init_from
    if defaults["weights"] and settings.weights is None and begins_anew:
        words += ["--weights", NO_WEIGHTS]
        defaults |= {"freeze": None, "freeze_epochs": None}  # as adapt_recipe has them then
    for name, value in vars(settings).items():
        # A launcher starts ranks: nobody types them.
        if value is None or name == "ranks" or (name != "recipe" and value == defaults[name]):
            continue
        flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        text = format_cpu_list(value) if name.endswith("_cores") else option_text(value)
        words += [flag] if isinstance(value, bool) else [flag, shlex.quote(text)]
    return " ".join(words)
