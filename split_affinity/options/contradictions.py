"""Options that contradict each other, whatever the machine and the data. Pure.

`check_core_options` in machine/plan.py checks options of cores together with the machine.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from split_affinity.options.data_sets import IMAGENET_FILES
from split_affinity.options.recipes import FROM_CHECKPOINT, GIVE_WEIGHTS
from split_affinity.options.settings import (
    MOST_SYNTHETIC_IMAGES,
    DataSettings,
    Settings,
    images_in_step,
    learning_rate,
)
from split_affinity.options.values import RESIZING_STEP, SWEEP
from split_affinity.text import as_option, plural

# An option, another one that it needs, and what the message adds.
NEEDS = (
    ("download", "data_path", ", the folder to put {data} into"),
    ("dataset", "data_path", ", the folder where it is"),
    ("val_share", "data_path", ": synthetic images are made"),
    ("subset", "data_path", ": synthetic images are made"),
    ("augment_confused", "data_path", ": synthetic images are not augmented"),
    ("class_weights", "data_path", ": synthetic images are drawn from all classes alike"),
    ("preload", "data_path", ": synthetic images are loaded beforehand in any case"),
    ("max_res", "min_res", ", where the ramp begins"),
    ("lr_warmup_epochs", "epochs", ""),
    ("early_stopping", "epochs", ""),
    ("target_top1", "epochs", ""),
    ("freeze_epochs", "freeze", ""),
    ("freeze_epochs", "epochs", ""),
    ("save_steps", "output_dir", ", where checkpoints are"),
    ("mirror", "output_dir", ", where checkpoints are"),
    ("tensorboard", "output_dir", ", the folder for all that is written"),
    ("phases", "output_dir", ", the folder for phases.csv"),
    ("open", "output_dir", ", the folder for the pictures"),
    ("teacher", "teacher_weights", ", a name such as DEFAULT or a file"),
)
# Commands that do not run in several ranks, and why.
IN_ONE_PROCESS = {
    "compare": "starts the ranks that it measures itself",
    "predict": "answers in one process, on all cores",
    "data": "starts a process for each core itself",
}


def contradictions(command: str, settings: Settings, ranks: int = 1) -> Iterator[str]:
    """What is wrong with options, each alone or with another; `ranks` have been started."""
    yield from typed_contradictions(command, settings, ranks)
    for name, needed, why in NEEDS:
        value = getattr(settings, name)
        if value and value != getattr(Settings, name) and not getattr(settings, needed):
            value = f"{value:g}" if isinstance(value, float) else value
            why = why.format(data=settings.dataset or "CIFAR-10")
            yield f"{as_option(name, value)} needs {as_option(needed, True)}{why}"
    yield from step_contradictions(settings)
    yield from resizing_contradictions(settings)
    yield from rate_contradictions(settings)
    for name in ("norm_weight_decay", "bias_weight_decay"):
        if settings.skip_decay_1d and getattr(settings, name) is not None:
            yield f"{as_option(name, getattr(settings, name))} and --skip-decay-1d: give one"
    weights, share = settings.teacher_weights, settings.teacher_share
    if weights and not settings.teacher and is_name(weights):
        yield f"--teacher-weights {weights} needs --teacher, the model that they are of"
    if share != Settings.teacher_share and not weights:
        yield f"--teacher-share {share:g} needs --teacher and --teacher-weights"
    if settings.download and settings.dataset == "imagenet":
        remedy = f"put {IMAGENET_FILES}, into --data-path"
        yield f"--download: imagenet is only for those who ask for it: {remedy}"
    if settings.test_only and not (settings.resume or settings.weights):
        yield "--test-only needs --resume, the checkpoint to evaluate, or --weights NAME"
    if settings.test_only and settings.operators:
        yield "--operators profiles steps of a training, --test-only makes none: give one"
    has_weights = settings.resume or settings.init_from or settings.weights
    if command == "train" and settings.recipe in FROM_CHECKPOINT and not has_weights:
        yield f"--recipe {settings.recipe} starts from trained weights: {GIVE_WEIGHTS}"


def step_contradictions(settings: Settings) -> Iterator[str]:
    """What is wrong with the images of a step, the schedule, or a split to measure."""
    images = images_in_step(settings)
    if not settings.data_path and images > MOST_SYNTHETIC_IMAGES:
        asked = f"--batch-size {settings.batch_size} --accumulate {settings.accumulate}"
        allowed = f"at most {MOST_SYNTHETIC_IMAGES} synthetic ones are allowed"
        yield f"{asked}: a step of {images} images; {allowed}"
    asked = f"--schedule {settings.schedule} has nothing to overlap with"
    if settings.split == "none" and settings.schedule != "sequential":
        remedy = "choose another --split, or --schedule sequential"
        yield f"{asked} --split none, which has one lane: {remedy}"
    if settings.schedule == "overlap" and settings.accumulate == 1:
        yield f"{asked} --accumulate 1: raise --accumulate to 2 or more, or use --schedule delayed"
    if settings.machine and settings.split == "auto":
        remedy = f"not that of --machine {settings.machine}: give a ratio such as 1:2"
        yield f"--split auto measures the machine that it runs on, {remedy}"


def resizing_contradictions(settings: DataSettings, native_size: int = 0) -> Iterator[str]:
    """Why progressive resizing is not a ramp; by default it ends at `native_size`, if known."""
    low, high, size = settings.min_res, settings.max_res, settings.image_size
    known = high or size or native_size
    end = known or 224
    if settings.val_resize and settings.val_resize < known:
        yield f"--val-resize {settings.val_resize}: at least the image size, {known}, is allowed"
    if (low is None) != (settings.end_ramp is None):
        yield "--min-res and --end-ramp belong together: give both"
    if low and (low % RESIZING_STEP or end % RESIZING_STEP or low > end):
        allowed = f"multiples of {RESIZING_STEP} are allowed, the smaller one first"
        yield f"--min-res {low} --max-res {end}: {allowed}"
    if high and size and high != size:
        yield f"--image-size {size} --max-res {high}: give one of them"


def rate_contradictions(settings: Settings) -> Iterator[str]:
    """What is wrong with the course of the learning rate."""
    warmup, epochs = settings.lr_warmup_epochs or 0, settings.epochs
    if warmup and settings.lr_scheduler == "onecycle":
        yield f"--lr-warmup-epochs {warmup}: onecycle has a warm-up of its own"
    first = settings.lr_milestones[0]
    if settings.lr_scheduler == "multistep" and warmup >= first:
        yield f"--lr-milestones {first},...: the first is within the warm-up of {warmup}"
    if epochs and warmup >= epochs:
        yield f"--lr-warmup-epochs {warmup}: fewer than --epochs {epochs} are allowed"
    low, high = settings.min_lr, learning_rate(settings)
    if settings.lr_scheduler in ("cosine", "warm-restarts") and low > high:
        yield f"--min-lr {low:g} is above the learning rate, {high:g}: lower it, or raise --lr"


def is_name(weights: str) -> bool:
    """Whether weights are given by a name such as DEFAULT, not by a path."""
    return re.fullmatch(r"\w+", weights) is not None


def typed_contradictions(command: str, settings: Settings, ranks: int = 1) -> Iterator[str]:
    """What is wrong with options that no saved run can put right.

    They are for another command or number of ranks, or say where weights are.
    """
    yield from rank_contradictions(command, settings.ranks, ranks)
    for setting in dataclasses.fields(settings):
        only, value = setting.metadata["only"], getattr(settings, setting.name)
        if only and command not in only and value != setting.default:
            takers = " and ".join(filter(None, (", ".join(only[:-1]), only[-1])))
            yield f"{as_option(setting.name, value)} is for {takers}, not for {command}"
    if settings.split == SWEEP and command != "compare":
        yield f"--split {SWEEP} is for compare, not for {command}: give one ratio, such as 1:2"
    if settings.simulate and settings.split != SWEEP:
        yield f"--simulate {settings.simulate} is for --split {SWEEP}, not for {settings.split}"
    if command == "compare" and settings.csv and settings.split != SWEEP:
        yield f"--csv {settings.csv}: of compare only --split {SWEEP} makes such a table"
    if "," in settings.split and command != "compare":
        yield f"--split {settings.split}: several splits are for compare, {command} takes one"
    from_newest = settings.resume == Path("auto")
    if from_newest and not settings.output_dir:
        yield "--resume auto needs --output-dir, where checkpoints are"
    starts = "resume", "init_from", "weights"
    given = [as_option(name, value) for name in starts if (value := getattr(settings, name))]
    if from_newest and not settings.test_only:
        given.pop(0)  # the other one is for a new run
    if len(given) > 1:
        yield f"{' and '.join(given)}: give one"
    if command == "data":
        if not (settings.data_path or settings.dataset):
            yield "data needs your pictures: data FOLDER, or --dataset NAME --data-path DIR"
        if settings.resume:
            yield f"--resume {settings.resume} is for a trained model, data looks at pictures"
    if command == "predict":
        if not settings.pictures:
            yield "predict needs pictures: files, folders, or patterns such as 'new/*.jpg'"
        if settings.init_from:
            yield f"--init-from {settings.init_from}: predict takes --resume PATH or --weights NAME"
        if settings.resume and settings.weights:
            yield f"--resume {settings.resume} and --weights {settings.weights}: give one"
        if not (settings.resume or settings.weights):
            yield "predict needs a trained model: give --resume PATH, or --weights NAME and --model"
        if settings.split == "auto":
            yield "--split auto is for training, not for predict: give even, a ratio or none"


def rank_contradictions(command: str, asked: int, started: int) -> Iterator[str]:
    """Why there cannot be so many ranks; `plan` may show more than have been started."""
    if started > 1 and command in IN_ONE_PROCESS:
        yield f"{command} {IN_ONE_PROCESS[command]}: start it without torchrun"
    elif asked != started and (command != "plan" or started > 1):
        remedy = f"torchrun --nproc-per-node {asked} starts so many"
        yield f"--ranks {asked}: {plural(started, 'process')} started; {remedy}"
