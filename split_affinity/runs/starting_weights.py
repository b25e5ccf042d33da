"""The weights that a run starts from (--weights, --init-from), and those of its teacher."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from split_affinity.checkpoints.resume import check_same_classes
from split_affinity.checkpoints.schema import fault_of_tensors
from split_affinity.checkpoints.state import (
    CHECKPOINT_FORMAT,
    BadCheckpoint,
    is_sealed,
    load_plain,
    read_checkpoint,
    saved_settings,
)
from split_affinity.data.classes import knows_classes
from split_affinity.data.transforms import image_size_in
from split_affinity.errors import UserError, one_line
from split_affinity.models.folding import fold
from split_affinity.models.pretrained import find_weights
from split_affinity.models.registry import build_model, check_input_shape, check_model_name
from split_affinity.models.weights import Weights, classifier_weights, take_weights
from split_affinity.options.contradictions import is_name
from split_affinity.options.settings import DataSettings, Settings, TrainingSettings
from split_affinity.training.network import Teacher

# The keys under which other programs keep weights; a moving average comes first, as in timm.
WEIGHTS_IN = ("model_ema", "state_dict_ema", "ema", "state_dict", "model", "model_state_dict")
# What DataParallel and torch.compile put before the names.
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


WITHOUT_NETWORK = (
    "or give a file with weights by --init-from, or train without any by --recipe scratch"
)


@dataclass(frozen=True)
class SavedWeights:
    """Weights from a file, by name, with the `classes` that they know, if the file has these.

    `settings` (JSON types) are those of the run that saved them, {} for a plain state dict; `part`
    is their key in the file, if it has several.
    """

    weights: Weights
    classes: tuple[str, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    part: str = ""


def read_weights(path: Path, flag: str = "--init-from") -> SavedWeights:
    """The weights of a file: of a checkpoint, verified, its moving average if there is one.

    Raises BadCheckpoint; the message begins with the flag.
    """
    try:
        if path.suffix == ".safetensors":
            return plain_weights(path, load_safetensors(path))
        if not is_sealed(path):
            return plain_weights(path, load_plain(path, argparse.Namespace))
        state = read_checkpoint(path)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{flag} {error}") from None
    except OSError as error:
        reason = error.strerror or one_line(error)  # safetensors raises one without a code
        raise BadCheckpoint(f"{flag} {path}: cannot be read: {reason}") from None
    classes = (state.get("data") or {}).get("classes")
    known, settings = classes and tuple(classes), saved_settings(state)
    if state["average"]:
        return SavedWeights(state["average"], known, settings, "moving average")
    return SavedWeights(state["model"], known, settings)


def load_safetensors(path: Path) -> Weights:
    """The tensors of a .safetensors file. Raises BadCheckpoint, OSError."""
    try:
        import safetensors.torch
    except ImportError:
        reason = "the package safetensors is needed: pip install safetensors"
        raise BadCheckpoint(f"{path}: {reason}") from None
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        reason = f"not a safetensors file, or cut short: {one_line(error)}"
        raise BadCheckpoint(f"{path}: cannot be read: {reason}") from None


def plain_weights(path: Path, content: Any) -> SavedWeights:
    """The tensors by name in the content of another program's file. Raises BadCheckpoint."""
    content = content if isinstance(content, dict) else {}
    if str(content.get("format")).startswith(CHECKPOINT_FORMAT.split()[0]):
        raise BadCheckpoint(f"{path}: damaged: it does not end with its SHA-256")
    part = next((name for name in WEIGHTS_IN if isinstance(content.get(name), dict)), "")
    content = content[part] if part else content
    tensors = {str(name): each for name, each in content.items() if torch.is_tensor(each)}
    weights = {WRAPPERS.sub("", name): value for name, value in tensors.items()}
    fault = fault_of_tensors(weights) if weights else "no state dict: it holds no tensors by name"
    if fault:
        raise BadCheckpoint(f"{path}: {fault}")
    return SavedWeights(weights, part=part)


def starting_model(settings: Settings, classes: Sequence[str]) -> tuple[nn.Module, str]:
    """The model that a run starts from, and where its weights come from, in words."""
    shape, note = (settings.num_classes, settings.image_size), ""
    model = build_model(settings.model, *shape, settings.stochastic_depth)
    for size in dict.fromkeys((image_size_in(settings, 1), settings.image_size)):
        check_input_shape(model, settings.model, settings.batch_size, size)
    if settings.weights:
        note = load_named_weights(model, settings, classes)
    if settings.init_from:
        note = load_weights_file(model, settings, classes)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    return model, note


def load_named_weights(model: nn.Module, settings: Settings, classes: Sequence[str]) -> str:
    """Load --weights into a new model; returns what was taken, in words.

    The classifier stays new if the weights know other classes than the data.
    """
    shape = settings.num_classes, settings.image_size
    known = find_weights(settings.model, settings.weights, image_size=settings.image_size)
    same = knows_classes(known, classes)
    left_out = () if same else classifier_weights(settings.model, *shape)
    try:
        loaded = known.load()
    except UserError as error:
        if settings.test_only or settings.pictures:  # nothing is trained
            raise
        raise UserError(f"{error}; {WITHOUT_NETWORK}") from None
    return f"weights from {known.title}: {take_weights(model, loaded, left_out)}"


def load_weights_file(model: nn.Module, settings: Settings, classes: Sequence[str]) -> str:
    """Load --init-from into a new model; returns what was taken, in words.

    The classifier stays new if the file knows other classes than the data.
    """
    path, name = settings.init_from, settings.model
    saved = read_weights(path)
    differ = saved.classes is not None and list(saved.classes) != list(classes)
    classifier = classifier_weights(name, settings.num_classes, settings.image_size)
    try:
        taken = take_weights(model, saved.weights, classifier if differ else ())
    except UserError as error:
        maker = f"made by {saved.settings['model']}, " if saved.settings else ""
        raise UserError(f"--init-from {path}, {maker}for {name}: {error}") from None
    part = f" ({saved.part})" if saved.part else ""
    known = classifier & saved.weights.keys()
    own, reason = model.state_dict(), "; it knows other classes" if differ else ""
    fits = (own[each].shape == saved.weights[each].shape for each in known)
    if saved.classes is None and known and all(fits):
        reason = "; its classes, which it does not name, are taken to be those of the data"
    return f"weights from {path}{part}: {taken}{reason}"


def teacher_name(settings: Settings) -> str | None:
    """The name of the teacher's model: as you typed it, or as its checkpoint has it.

    Raises UserError if the name is unknown, or is not that of the checkpoint.
    """
    weights, asked = settings.teacher_weights, settings.teacher
    if weights is None or settings.test_only:
        return asked
    if asked:
        check_model_name(asked, "--teacher")
    if is_name(weights):
        return asked
    made_by = read_weights(Path(weights), "--teacher-weights").settings.get("model")
    if asked and made_by not in (None, asked):
        raise UserError(f"--teacher {asked}: {weights} was made by {made_by}")
    if not (asked or made_by):
        raise UserError(f"--teacher-weights {weights}: give --teacher too: it names no model")
    return asked or made_by


def check_teacher(settings: Settings, saved: SavedWeights, classes: Sequence[str]) -> None:
    """Raise UserError unless a teacher knows the classes of the data, in their order.

    Weights by name may call classes otherwise than the data: if no name is the same, their number
    alone counts.
    """
    where, name = f"--teacher-weights {settings.teacher_weights}", settings.teacher
    known, count = saved.classes or (), settings.num_classes
    if classes and (known if not is_name(settings.teacher_weights) else {*known} & {*classes}):
        check_same_classes(where, known, classes)
    heads = classifier_weights(name, count, settings.image_size) & saved.weights.keys()
    for head in sorted(heads):
        if len(saved.weights[head]) != count:
            raise UserError(
                f"{where}: {name} knows {len(saved.weights[head])} classes, not {count}"
            )


def teacher_lines(settings: TrainingSettings) -> Iterator[str]:
    """A line on the teacher of a run, if it has one."""
    if settings.teacher_weights:
        share = f"{settings.teacher_share:g} of the target"
        yield f"taught by {settings.teacher}, weights {settings.teacher_weights}: {share}"


def build_teacher(settings: Settings, classes: Sequence[str]) -> Teacher | None:
    """The teacher, or None. Raises UserError for weights with gaps, or with other classes."""
    weights, flag = settings.teacher_weights, "--teacher-weights"
    if not weights or settings.test_only:
        return None
    name, size = settings.teacher, settings.image_size
    if is_name(weights):
        found = find_weights(name, weights, flag)
        saved = SavedWeights(found.load(), found.classes, dataclasses.asdict(found.native))
    else:
        saved = read_weights(Path(weights), flag)
    check_teacher(settings, saved, classes)
    with torch.random.fork_rng(devices=()):  # the student draws what it would draw without it
        model = build_model(name, settings.num_classes, size).eval().requires_grad_(False)
        for each in dict.fromkeys((image_size_in(settings, 1), size)):
            check_input_shape(model, f"the teacher {name}", settings.batch_size, each)
    try:
        take_weights(model, saved.weights, least=1)
    except UserError as error:
        raise UserError(f"{flag} {weights}, {name}: {error}") from None
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.fold_norm:
        model = fold(model, settings.precision == "bf16")
    return Teacher(model, settings.teacher_share, *renormalised(settings, saved.settings))


def renormalised(
    settings: DataSettings, other: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor] | tuple[()]:
    """Scale and shift (3, 1, 1) that bring images, as normalised here, to the mean and deviation of
    `other` settings; () if these are the same.
    """
    here = settings.mean, settings.std
    there = other.get("mean") or here[0], other.get("std") or here[1]
    (mean, std), (mean_there, std_there) = (
        [torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in pair]
        for pair in (here, there)
    )
    if torch.equal(mean, mean_there) and torch.equal(std, std_there):
        return ()
    return (std / std_there).float(), ((mean - mean_there) / std_there).float()
