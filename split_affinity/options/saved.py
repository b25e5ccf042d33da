"""Which settings a checkpoint brings along, each checked as if it had been typed.

A checkpoint may be a stranger's. What it brings makes the same training and nothing else: it names
no file to write, no address, and no number of processes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from split_affinity.options.settings import MOST_CLASSES, Settings
from split_affinity.options.values import LARGEST_NUMBER, Values, number, whole_number

TAKEN = frozenset(
    """
    model dataset val_share num_classes image_size val_resize interpolation mean std min_res max_res
    end_ramp subset max_bad_images
    min_scale hflip color_jitter auto_augment ra_magnitude random_erase mixup_alpha cutmix_alpha
    recipe batch_size accumulate steps epochs opt lr lr_body_factor momentum weight_decay
    norm_weight_decay bias_weight_decay skip_decay_1d lr_scheduler lr_warmup_epochs lr_step_epochs
    lr_milestones lr_gamma lr_restart_epochs min_lr label_smoothing clip_grad_norm freeze
    freeze_epochs stochastic_depth teacher teacher_share model_ema model_ema_decay early_stopping
    target_top1 seed deterministic
    save_steps save_freq keep_best print_freq
    split schedule forward_cores backward_cores loader_cores forward_threads backward_threads
    precision channels_last fused tuned_malloc flush_denormals grads_to_none
    """.split()
)
# What a run reads: shown to the user, never opened unasked, but that the images of `data_path` are
# looked for where they were. The batches of a step were shared by so many `ranks`.
PATHS = frozenset("data_path augment_confused teacher_weights".split())
SHOWN = PATHS | {"ranks"}
# What has to be typed again. Of those in BEGUN a run that goes on has no use.
LEFT = frozenset("workers mirror log_file output_dir tensorboard timeout json".split())
BEGUN = frozenset(
    "resume weights init_from test_only download machine record quick preload pictures".split()
)

FIELDS = {setting.name: setting for setting in dataclasses.fields(Settings)}
LONGEST_TEXT = 4096
# What is in force can be more than what can be typed: a warm-up of half an epoch, say.
IN_FORCE: dict[str, Callable[[str], Any]] = {
    "lr_warmup_epochs": number("a number of epochs", lambda value: 0 <= value <= LARGEST_NUMBER),
    "num_classes": whole_number(1, MOST_CLASSES),
}


def printable(text: str) -> str:
    """A name as it may be typed, in one line. Raises ArgumentTypeError for other text."""
    if not text.isprintable() or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no text in one line")
    return text


def as_typed(value: Any) -> str:
    """A value of JSON's types as it would be typed. Raises ArgumentTypeError for any other."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    plain = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in numbers)
    if not isinstance(value, str) and not (plain and numbers and len(numbers) <= LONGEST_TEXT):
        raise argparse.ArgumentTypeError(f"a value of type {type(value).__name__} is not allowed")
    text = value if isinstance(value, str) else ",".join(map(str, numbers))
    if len(text) > LONGEST_TEXT:
        raise argparse.ArgumentTypeError(f"more than {LONGEST_TEXT} characters are not allowed")
    return text


def checked(name: str, value: Any) -> Any:
    """A setting's value from a checkpoint, as its parser has it. Raises ArgumentTypeError for what
    could not have been typed.
    """
    setting = FIELDS[name]
    if value is None and setting.default is None:
        return None
    if isinstance(setting.default, bool):
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError("only True and False are allowed")
        return value
    argument = setting.metadata["argument"]
    try:
        text = as_typed(value)
        known = argument.get("choices") or [text]
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        if name in PATHS:
            return text
        found = IN_FORCE.get(name, argument.get("type") or printable)(text)
        several = isinstance(value, (list, tuple))
        if not isinstance(value, str) and several != isinstance(found, tuple):
            raise argparse.ArgumentTypeError(f"{text!r} is of another type")
        return found
    except (ValueError, TypeError, OverflowError):  # of numbers with thousands of digits
        raise argparse.ArgumentTypeError("no such number is allowed") from None


def settings_brought(values: Values) -> Values:
    """What a checkpoint brings along of its settings (JSON types), checked. Raises
    ArgumentTypeError, the message led by the setting's name.
    """
    brought = {}
    for name in values.keys() & (TAKEN | SHOWN):
        try:
            brought[name] = checked(name, values[name])
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    return brought


def settings_left(values: Values) -> list[str]:
    """Which settings of a saved run have to be typed again, by name, but for the output folder,
    which is where the checkpoint is.
    """
    return [
        name
        for name in sorted(LEFT & values.keys() - {"output_dir"})
        if values[name] is not None and str(values[name]) != str(FIELDS[name].default)
    ]
