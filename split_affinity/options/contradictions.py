"""Options that contradict each other, whatever the machine and the data. Pure.

Options of cores are checked with the machine (check_core_options in machine/plan.py), those that a
saved run brings along with the others that are then in force.
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
    TrainingSettings,
    images_in_step,
    learning_rate,
)
from split_affinity.options.values import RESIZING_STEP
from split_affinity.text import as_option, plural


def contradictions(command: str, settings: Settings, ranks: int = 1) -> Iterator[str]:
    """What is wrong with options that contradict each other, a command, or the number of `ranks`
    that have been started, whatever the machine.
    """
    yield from typed_contradictions(command, settings, ranks)
    asked = f"--schedule {settings.schedule} has nothing to overlap with"
    if settings.split == "none" and settings.schedule != "sequential":
        remedy = "choose another --split, or --schedule sequential"
        yield f"{asked} --split none, which has one lane: {remedy}"
    if settings.schedule == "overlap" and settings.accumulate == 1:
        yield f"{asked} --accumulate 1: raise --accumulate to 2 or more, or use --schedule delayed"
    yield from resizing_contradictions(settings)
    yield from rate_contradictions(settings)
    yield from checkpoint_contradictions(settings)
    yield from teacher_contradictions(settings)
    yield from data_contradictions(settings)
    if settings.tensorboard and not settings.output_dir:
        yield "--tensorboard needs --output-dir, the folder for all that is written"
    for name in ("norm_weight_decay", "bias_weight_decay"):
        if settings.skip_decay_1d and getattr(settings, name) is not None:
            yield f"{as_option(name, getattr(settings, name))} and --skip-decay-1d: give one"
    for name in ("freeze", "epochs"):
        if settings.freeze_epochs and not getattr(settings, name):
            yield f"--freeze-epochs {settings.freeze_epochs} needs --{name}"
    if settings.early_stopping and not settings.epochs:
        yield f"--early-stopping {settings.early_stopping:g} needs --epochs"
    if settings.target_top1 and not settings.epochs:
        yield f"--target-top1 {settings.target_top1:g} needs --epochs"
    yield from command_contradictions(command, settings)


# Commands that are no work for several ranks, and why.
ALONE = {
    "compare": "starts the ranks that it measures itself",
    "predict": "answers in one process, on all cores",
}


def rank_contradictions(command: str, settings: Settings, started: int) -> Iterator[str]:
    """Why so many ranks are not to be had; `plan` alone draws more than have been started."""
    asked = settings.ranks
    if started > 1 and command in ALONE:
        yield f"{command} {ALONE[command]}: start it without torchrun"
    elif asked != started and (command != "plan" or started > 1):
        remedy = f"torchrun --nproc-per-node {asked} starts so many"
        yield f"--ranks {asked}: {plural(started, 'process')} started; {remedy}"


def data_contradictions(settings: Settings) -> Iterator[str]:
    """What the options on data lack, or synthetic images cannot be."""
    name = settings.dataset or "CIFAR-10"
    if settings.download and not settings.data_path:
        yield f"--download needs --data-path, the folder to put {name} into"
    if settings.dataset and not settings.data_path:
        yield f"--dataset {name} needs --data-path, the folder where it is"
    if settings.val_share and not settings.data_path:
        yield f"--val-share {settings.val_share:g} needs --data-path: synthetic images are made"
    if settings.download and name == "imagenet":
        remedy = f"put {IMAGENET_FILES}, into --data-path"
        yield f"--download: imagenet is given to those alone who ask for it: {remedy}"
    if settings.subset < 1 and not settings.data_path:
        yield f"--subset {settings.subset:g} needs --data-path: synthetic images are made"
    if settings.augment_confused and not settings.data_path:
        asked = as_option("augment_confused", settings.augment_confused)
        yield f"{asked} needs --data-path: synthetic images are not augmented"
    images = images_in_step(settings)
    if not settings.data_path and images > MOST_SYNTHETIC_IMAGES:
        asked = f"--batch-size {settings.batch_size} --accumulate {settings.accumulate}"
        allowed = f"at most {MOST_SYNTHETIC_IMAGES} synthetic ones are allowed"
        yield f"{asked}: a step of {images} images; {allowed}"


def resizing_contradictions(settings: DataSettings, native_size: int = 0) -> Iterator[str]:
    """Why a progressive resizing is no ramp; without an end of its own it goes up to the data's
    native size, which may not be known yet.
    """
    low, high, size = settings.min_res, settings.max_res, settings.image_size
    whole, known = settings.val_resize, high or size or native_size
    end = known or 224
    if whole and whole < known:
        yield f"--val-resize {whole}: at least the image size, {known}, is allowed"
    if (low is None) != (settings.end_ramp is None):
        yield "--min-res and --end-ramp belong together: give both"
    if high and not low:
        yield f"--max-res {high} needs --min-res, where the ramp begins"
    if low and (low % RESIZING_STEP or end % RESIZING_STEP or low > end):
        allowed = f"multiples of {RESIZING_STEP} are allowed, the smaller one first"
        yield f"--min-res {low} --max-res {end}: {allowed}"
    if high and size and high != size:
        yield f"--image-size {size} --max-res {high}: give one of them"


def rate_contradictions(settings: Settings) -> Iterator[str]:
    """Why a course of the learning rate cannot be."""
    warmup, epochs = settings.lr_warmup_epochs or 0, settings.epochs
    if warmup and not epochs:
        yield f"--lr-warmup-epochs {warmup} needs --epochs"
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


def checkpoint_contradictions(settings: Settings) -> Iterator[str]:
    """What checkpoint options lack, or contradict each other in."""
    needs_folder = {"--save-steps": settings.save_steps, "--mirror": settings.mirror}
    for flag, value in needs_folder.items():
        if value and not settings.output_dir:
            yield f"{flag} needs --output-dir, where checkpoints are"
    if settings.test_only and not (settings.resume or settings.weights):
        yield "--test-only needs --resume, the checkpoint to evaluate, or --weights NAME"


def is_name(weights: str) -> bool:
    """Whether weights are given by a name such as DEFAULT, and not by a file's path."""
    return re.fullmatch(r"\w+", weights) is not None


def teacher_contradictions(settings: TrainingSettings) -> Iterator[str]:
    """What the options of a teacher lack."""
    teacher, weights, share = settings.teacher, settings.teacher_weights, settings.teacher_share
    if teacher and not weights:
        yield f"--teacher {teacher} needs --teacher-weights, a name such as DEFAULT or a file"
    if weights and not teacher and is_name(weights):
        yield f"--teacher-weights {weights} needs --teacher, the model that they are of"
    if share != Settings.teacher_share and not weights:
        yield f"--teacher-share {share:g} needs --teacher and --teacher-weights"


def typed_contradictions(command: str, settings: Settings, ranks: int = 1) -> Iterator[str]:
    """What is wrong with options for another command, or for another number of ranks, and with
    those that say where weights are: the defaults that a saved run gives change nothing in that.
    """
    yield from rank_contradictions(command, settings, ranks)
    for setting in dataclasses.fields(settings):
        only, value = setting.metadata["only"], getattr(settings, setting.name)
        if only and command not in only and value != setting.default:
            takers = " and ".join(only)
            yield f"{as_option(setting.name, value)} is for {takers}, not for {command}"
    from_newest = settings.resume == Path("auto")
    if from_newest and not settings.output_dir:
        yield "--resume auto needs --output-dir, where checkpoints are"
    starts = "resume", "init_from", "weights"
    given = [as_option(name, value) for name in starts if (value := getattr(settings, name))]
    others = given[from_newest and not settings.test_only :]  # of which one counts if auto fails
    if len(others) > 1:
        yield f"{' and '.join(others)}: give one"
    if command == "predict":
        yield from prediction_contradictions(settings)


def prediction_contradictions(settings: Settings) -> Iterator[str]:
    """What `predict` lacks, or has twice."""
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


def command_contradictions(command: str, settings: Settings) -> Iterator[str]:
    """What a command lacks, and options that are for another one."""
    has_weights = settings.resume or settings.init_from or settings.weights
    if command == "train" and settings.recipe in FROM_CHECKPOINT and not has_weights:
        yield f"--recipe {settings.recipe} starts from trained weights: {GIVE_WEIGHTS}"
    if "," in settings.split and command != "compare":
        yield f"--split {settings.split}: several splits are for compare, {command} takes one"
    if settings.preload and not settings.data_path:
        yield "--preload needs --data-path: synthetic images are loaded beforehand in any case"
    if settings.machine and settings.split == "auto":
        remedy = f"not that of --machine {settings.machine}: give a ratio such as 1:2"
        yield f"--split auto measures the machine that it runs on, {remedy}"
