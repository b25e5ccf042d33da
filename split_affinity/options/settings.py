"""Every option once: its name, default, help, parser, and what becomes of it when a run is resumed.

Whoever adds an option begins here. Values that are derived live elsewhere (see CorePlan).
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
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
    channels,
    parse_cpu_list,
    parse_milestones,
    parse_split,
    whole_number,
)
from split_affinity.text import format_cpu_list, option_text, readable, without_login

MOST_CLASSES = 10**7
MOST_SYNTHETIC_IMAGES = 2**17  # in a step; more than any published training had
COMPARED_BATCHES = 4  # in a step, as in most recipes


def option(
    default: Any,
    help: str,
    *short: str,
    on_resume: str = "told",
    only: str = "",
    **argument: Any,
) -> Any:
    """A field of Settings: its default, its help, and what else argparse needs to know.

    The help of a switch that is on by default says what `--no-...` does. `short` are further flags,
    `on_resume` is what becomes of another value when a run is resumed, `only` the commands that
    take the option (without it, all do, and what Command.shows says is in their help), and
    `argument` goes to `add_argument` (type, choices, metavar).
    """
    argument = {"metavar": METAVARS.get(argument.get("type"), "X"), **argument}
    told = {"help": help, "short": short, "on_resume": on_resume, "only": only.split()}
    return field(default=default, metadata={**told, "argument": argument})


# What becomes of another value when a run is resumed: it is told, since the numbers will differ;
# free, since they will not; or fixed, and refused, since the saved state makes no sense with it. A
# rate is told too: the optimizer and the course of its learning rate are then made anew.
free, fixed, rate = (partial(option, on_resume=kind) for kind in ("free", "fixed", "rate"))

TITLES: dict[type, str] = {}  # of the groups in --help; a docstring would be gone under python -OO


def titled(title: str) -> Callable[[type], type]:
    """A decorator that gives a group of settings its title."""

    def entitle(group: type) -> type:
        TITLES[group] = title
        return group

    return entitle


# fmt: off
# Settings, in the groups of --help.
@titled("model and data")
@dataclass(frozen=True)
class DataSettings:
    model: str = fixed("resnet50", "torchvision classifier by name, or resnet20 or resnet56 (for "
        "small images), hybrid, hybrid-light, hybrid-heavy; timm/NAME: one of timm's, where that "
        "is installed", metavar="NAME")
    data_path: Path | None = free(None, "image folder, PATH/train/<class>/*.jpg and PATH/val "
        "(or valid, or validation), or PATH/<class>/*.jpg; or a folder with CIFAR-10's "
        "cifar-10-batches-py (default: synthetic images for timing, of the first 10 classes, "
        "with a noisy pattern for each)",
        type=Path)
    dataset: str | None = fixed(None, "data set by name, in --data-path: see --list-data-sets",
        type=parse_data_set, metavar="NAME")
    download: bool = free(False, "let torchvision fetch the --dataset (without one, CIFAR-10) "
        "into --data-path, and verify it")
    val_share: float | None = fixed(None, "part of the images of each class to keep apart and "
        "validate with, where the data has none for that (default: 0.2 of a --dataset, else none)",
        type=BELOW_1)
    num_classes: int | None = fixed(None, "number of classes (default: as many as the data has; "
        "1000 for synthetic images)", type=whole_number(2, MOST_CLASSES), metavar="N")
    image_size: int | None = option(None, "side of the square images in pixels (default: that of "
        "--weights or of the --dataset, else 224)", type=COUNT)
    val_resize: int | None = option(None, "pixels of the shorter side that a picture is resized "
        "to before its middle is cut out, to validate or to predict (default: in proportion to "
        "--image-size as with --weights or the --dataset, else as 256 to 224)", type=COUNT)
    interpolation: str | None = option(None, "how pictures are resized (default: as with "
        "--weights, else bilinear)", choices=("nearest", "bilinear", "bicubic"))
    mean: tuple[float, ...] | None = option(None, "mean of each channel, of values from 0 to 1 "
        "(default: that of --weights or of the --dataset, else ImageNet's)", type=channels(SHARE),
        metavar="R,G,B")
    std: tuple[float, ...] | None = option(None, "standard deviation of each channel, likewise",
        type=channels(DEVIATION), metavar="R,G,B")
    min_res: int | None = option(None, "progressive resizing: side of the training images in the "
        "first epoch; it grows to --max-res in steps of 32", type=COUNT)
    max_res: int | None = option(None, "side of the training images from --end-ramp on (default: "
        "--image-size)", type=COUNT)
    end_ramp: int | None = option(None, "epoch in which --max-res is reached", type=COUNT)
    subset: float = fixed(1.0, "part of the training images to use, the same of each class; the "
        "choice is kept in the output folder", type=PART)
    max_bad_images: int | None = free(None, "broken images to leave out before the run stops "
        "(default: one in a thousand images to train on, at least one); a batch without any whole "
        "image always stops it", type=COUNT_FROM_0)
    workers: int = free(2, "loader processes, as many again for validation; 0 loads in the main "
        "thread", "-j", type=COUNT_FROM_0)


@titled("augmentation")
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
    augment_confused: Path | None = free(None, "file that --test-only wrote, confused.json: images "
        "of the classes that were confused most (in pairs with at least half as many images as the "
        "worst) get a stronger RandAugment in training: the usual one if others get none, else 3 "
        "operations at --ra-magnitude + 5", type=Path)


@titled("training")
@dataclass(frozen=True)
class TrainingSettings:
    recipe: str | None = free(None, "a set of defaults, which every other option overrides: "
        + ", ".join(RECIPES), choices=tuple(RECIPES), metavar="NAME")
    batch_size: int = fixed(32, "images per batch", "-b", type=COUNT)
    accumulate: int = fixed(1, "batches per optimizer step", type=COUNT)
    steps: int | None = rate(None, "optimizer steps after which to stop (default: 50 without "
        "--epochs; find-lr 100, compare 7, more where they are short)", type=COUNT)
    epochs: int | None = rate(None, "passes over the data to train, with a validation after each",
        type=COUNT)
    opt: str = fixed("sgd", "optimizer", choices=("sgd", "adam", "adamw", "nadam", "rmsprop"))
    lr: float | None = rate(None, "learning rate, the highest one (default: SGD 0.1 and RMSprop "
        "0.016 for 256 images a step, and in proportion; Adam, AdamW and NAdam 0.001)",
        type=NOT_NEGATIVE)
    lr_body_factor: float = fixed(1.0, "the learning rate of all but the classifier, as a part of "
        "the classifier's, which is the one that is shown", type=PART)
    momentum: float = rate(0.9, "momentum of SGD and RMSprop", type=SHARE)
    weight_decay: float = rate(1e-4, "weight decay", type=NOT_NEGATIVE)
    norm_weight_decay: float | None = fixed(None, "weight decay of normalisation layers (default: "
        "--weight-decay)", type=NOT_NEGATIVE)
    bias_weight_decay: float | None = fixed(None, "weight decay of biases, in all layers (default: "
        "--weight-decay)", type=NOT_NEGATIVE)
    skip_decay_1d: bool = fixed(False, "no weight decay for parameters with one dimension, such "
        "as biases")
    lr_scheduler: str = fixed("constant", "course of the learning rate", choices=("constant",
        "cosine", "step", "multistep", "onecycle", "warm-restarts"))
    lr_warmup_epochs: float | None = rate(None, "epochs of linear warm-up from a hundredth of the "
        "rate (default: with --lr and for onecycle none, else a tenth of the run, at most 5)",
        type=COUNT_FROM_0)
    lr_step_epochs: int = rate(30, "step: epochs between two reductions", type=COUNT)
    lr_milestones: tuple[int, ...] = rate((30, 60, 80), "multistep: epochs with a reduction",
        type=parse_milestones, metavar="LIST")
    lr_gamma: float = rate(0.1, "step and multistep: factor of a reduction", type=PART)
    lr_restart_epochs: int = rate(10, "warm-restarts: epochs of the first cosine; each further "
        "one is twice as long", type=COUNT)
    min_lr: float = rate(0.0, "cosine and warm-restarts: lowest rate (of the "
        "classifier, with --lr-body-factor)", type=NOT_NEGATIVE)
    label_smoothing: float = option(0.0, "label smoothing", type=SHARE)
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
        "(distillation); it runs in the forward phase, on the same images (default: the one that "
        "--teacher-weights was made by, if that is a checkpoint)", metavar="NAME")
    teacher_weights: str | None = option(None, "the teacher's weights: torchvision's by name, such "
        "as DEFAULT, or a file as for --init-from", metavar="NAME|PATH")
    teacher_share: float = option(0.5, "the teacher's part of the target; the labels have the rest",
        type=SHARE)
    model_ema: bool = fixed(False, "keep an exponential moving average of the weights: best.pt "
        "and reasons to stop go by it, the raw weights are validated beside it")
    model_ema_decay: float = option(0.9999, "decay of that average per optimizer step; after t "
        "steps it is at most (1 + t) / (10 + t)", type=BELOW_1)
    early_stopping: int | None = free(None, "stop after so many epochs without a better top-1",
        type=COUNT, metavar="EPOCHS")
    target_top1: float | None = free(None, "stop once two validations in a row reach this top-1",
        type=PERCENT)
    seed: int = option(0, "seed of weights, data order and augmentation", type=COUNT_FROM_0)
    deterministic: bool = option(False, "refuse operations without a deterministic implementation")


@titled("checkpoints")
@dataclass(frozen=True)
class CheckpointSettings:
    resume: Path | None = free(None, "checkpoint to go on from, exactly, or to ask; the settings "
        "of its run are the defaults; auto: the newest good one in --output-dir, if any",
        only="train predict", type=Path, metavar="PATH|auto")
    weights: str | None = free(None, "trained weights by torchvision's name for them, such as "
        "DEFAULT or IMAGENET1K_V2, or timm's, such as a1_in1k, to start a new run from; with "
        "--resume auto they count if there is nothing to go on from", metavar="NAME")
    init_from: Path | None = free(None, "file to take the weights from, for a new run: a "
        "checkpoint, or a plain state dict (.pt, .pth, .safetensors); with --resume auto it counts "
        "if there is nothing to go on from", type=Path)
    test_only: bool = free(False, "evaluate the checkpoint of --resume, train nothing; or "
        "--weights, whose classes are found by the names of the folders")
    save_steps: int | None = free(None, "optimizer steps between two saves (default: after each "
        "epoch only)", type=COUNT)
    save_freq: int | None = free(None, "epochs between two checkpoints that are kept for good "
        "(default: none)", type=COUNT)
    keep_best: int = free(3, "checkpoints to keep, best top-1 first", type=COUNT)
    mirror: str | None = free(None, "address to copy checkpoints to, in the background: any that "
        "fsspec knows (s3:// with s3fs installed); a login in it is not shown, nor saved",
        metavar="URL")


@titled("cores")
@dataclass(frozen=True)
class CoreSettings:
    split: str = free("even", "how cores are divided: even, forward:backward such as 1:2, auto "
        "(measured, for the shortest step) or none (one lane over all cores); compare takes "
        "several, such as even,1:2", type=parse_split, metavar="even|F:B|auto|none")
    schedule: str = option("sequential", "how the phases of a step are laid over the lanes: "
        "sequential alternates strictly; overlap runs the forward pass of a step's next batch "
        "beside backward, with the same numbers (needs --accumulate 2 or more); delayed overlaps "
        "across steps too, with weights one update old",
        choices=("sequential", "overlap", "delayed"))
    forward_cores: tuple[int, ...] | None = free(None,
        "logical CPUs of the forward group, such as 0-3,8-11 or 0-15:2", type=parse_cpu_list)
    backward_cores: tuple[int, ...] | None = free(None, "logical CPUs of the backward group",
        type=parse_cpu_list)
    loader_cores: tuple[int, ...] | None = free(None, "logical CPUs of the main thread and the "
        "loader processes (default: those of the forward group)", type=parse_cpu_list)
    forward_threads: int | None = option(None,
        "threads of the forward lane (default: one per core)", type=COUNT)
    backward_threads: int | None = option(None,
        "threads of the backward lane (default: one per core)", type=COUNT)
    machine: Path | None = free(None, "divide the cores of another machine, given by a file of "
        "--record, or by a folder with its /sys/devices/system and /proc/cpuinfo", only="plan",
        type=Path)
    record: Path | None = free(None, "file to describe this machine in, for --machine elsewhere "
        "(default: not written)", only="plan", type=Path)


@titled("ranks: processes that train one model together")
@dataclass(frozen=True)
class RankSettings:
    ranks: int = free(1, "how many: torchrun starts those of a run (torchrun --nproc-per-node 4); "
        "plan draws so many of one machine without it", type=COUNT)
    timeout: float = free(300.0, "seconds that a rank may let the others wait before these give it "
        "up for lost", type=SECONDS)


@titled("speed")
@dataclass(frozen=True)
class SpeedSettings:
    precision: str = option("auto", "bf16: convolutions and matrix products in bfloat16 by "
        "autocast; auto: bf16 where the CPU computes it natively, else fp32",
        choices=("auto", "fp32", "bf16"))
    channels_last: bool = option(True, "keep images and weights in the default memory format, NCHW")
    fused: bool = rate(True, "update the weights tensor by tensor, not in a fused kernel (NAdam "
        "and RMSprop have none)")
    tuned_malloc: bool = free(True, "leave glibc's allocator as it is; by default it keeps the "
        "memory of a step for the next one")
    flush_denormals: bool = option(True, "compute with denormal numbers, not with 0 in their place")
    grads_to_none: bool = free(True, "set gradients to zero after an update, not to None")


@titled("compare")
@dataclass(frozen=True)
class ComparisonSettings:
    quick: bool = free(False, "one batch a step, of which overlap makes four parts; without it, a "
        f"step has {COMPARED_BATCHES} batches (--accumulate holds in any case, a recipe's too "
        "without --quick)", only="compare")
    preload: bool = free(False, "load the images of --data-path beforehand, so that loading and "
        "augmentation are not timed; synthetic images always are loaded so", only="compare")


@titled("predict")
@dataclass(frozen=True)
class PredictionSettings:
    pictures: tuple[str, ...] = free((), "files, folders (with all that lies below) and patterns "
        "such as 'new/*.jpg'", only="predict", nargs="*", metavar="PICTURE")


@titled("reports")
@dataclass(frozen=True)
class ReportSettings:
    log_file: Path = free(Path("logs.md"), "Markdown file that gets a section for each run",
        type=Path)
    output_dir: Path | None = free(None, "folder for checkpoints, metrics.jsonl and pictures "
        "(default: that of --resume, else not written)", type=Path)
    print_freq: int = free(10, "steps between two lines of figures", type=COUNT)
    tensorboard: bool = free(False, "write what is measured for TensorBoard too, into the folder "
        "tensorboard in --output-dir (pip install tensorboard)")
    json: Path | None = free(None, "file for the figures of compare, or for the answers of "
        "predict (default: not written)", only="compare predict", type=Path)


@dataclass(frozen=True)
class Settings(ReportSettings, PredictionSettings, ComparisonSettings, SpeedSettings, RankSettings,
               CoreSettings, CheckpointSettings, TrainingSettings, AugmentationSettings,
               DataSettings):
    """What the user can choose. Derived values live elsewhere (see CorePlan), never here.

    The groups stand in reverse, since a dataclass has the fields of its last base first.
    """
# fmt: on


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Settings as JSON types, without the logins of addresses: this is what is saved and shown."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return readable(str(value))
        return without_login(value) if isinstance(value, str) else value

    return {key: plain(value) for key, value in dataclasses.asdict(settings).items()}


def batches_in_step(settings: Settings) -> int:
    """Batches that go into an optimizer step, those of all ranks together."""
    return settings.accumulate * settings.ranks


def images_in_step(settings: Settings) -> int:
    """Images that go into an optimizer step, those of all ranks together."""
    return settings.batch_size * batches_in_step(settings)


def learning_rate(settings: Settings) -> float:
    """The highest learning rate: as asked, or by the optimizer and the images of a step."""
    if settings.lr is not None:
        return settings.lr
    of_256_images = {"sgd": 0.1, "rmsprop": 0.016}.get(settings.opt)
    return of_256_images * images_in_step(settings) / 256 if of_256_images else 1e-3


def settings_of(values: Values) -> Settings:
    """Settings from JSON types; values of other names are left out."""

    def typed(setting: dataclasses.Field) -> Any:
        value = values[setting.name]
        if isinstance(value, list):
            return tuple(value)
        is_path = setting.metadata["argument"].get("type") is Path
        return Path(value) if is_path and value is not None else value

    own = (each for each in dataclasses.fields(Settings) if each.name in values)
    return Settings(**{setting.name: typed(setting) for setting in own})


def as_options(settings: Settings) -> str:
    """What differs from the defaults, those of the recipe if there is one, as it is typed; ranks
    are started, not typed.
    """
    defaults = vars(Settings()) | (recipe_defaults(settings.recipe) if settings.recipe else {})
    if settings.dataset:
        defaults |= NAMED_DATA[settings.dataset].defaults
    if settings.data_path != defaults["data_path"]:
        defaults["dataset"] = None  # a recipe's gives way to a path, unless it is typed too
    words = []
    for name, value in vars(settings).items():
        if value is None or name == "ranks" or (name != "recipe" and value == defaults[name]):
            continue
        flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        text = format_cpu_list(value) if name.endswith("_cores") else option_text(value)
        words += [flag] if isinstance(value, bool) else [flag, shlex.quote(text)]
    return " ".join(words)
