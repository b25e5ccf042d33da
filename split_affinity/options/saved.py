"""Which settings a run takes from a checkpoint, each checked as if you had typed it.

A checkpoint may be a stranger's. It brings what makes the same training and nothing else: no file
to write, no address, no number of processes.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from split_affinity.options.settings import MOST_CLASSES, Settings
from split_affinity.options.values import LARGEST_NUMBER, Values, number, whole_number

FIELDS = {setting.name: setting for setting in dataclasses.fields(Settings)}
# What a run reads: shown to the user, never opened unasked. Only the images of `data_path` are
# looked for in the same place. `ranks` processes have shared the batches of a step.
PATHS = frozenset("data_path augment_confused teacher_weights class_weights".split())
SHOWN = PATHS | {"ranks"}
# What you have to type again, and what a run that goes on does not need.
LEFT = frozenset(
    "workers mirror log_file output_dir tensorboard phases counters timeout json".split()
)
LOADERS_BEFORE = 2  # the default of earlier versions, which saved it as if it had been typed
BEGUN = frozenset(
    """
    resume weights init_from test_only download machine record quick preload simulate pictures open
    csv operators
    """.split()
)
# What is taken: all that changes the numbers, and these options.
TAKEN = (
    frozenset(
        """
    recipe max_bad_images early_stopping target_top1 save_steps save_freq keep_best print_freq
    split forward_cores backward_cores loader_cores tuned_malloc grads_to_none
    """.split()
    )
    | {name for name, each in FIELDS.items() if each.metadata["on_resume"] != "free"} - SHOWN
)
LONGEST_TEXT = 4096
# A run can have values that cannot be typed, such as a warm-up of half an epoch.
IN_FORCE = {
    "lr_warmup_epochs": number("a number of epochs", lambda value: 0 <= value <= LARGEST_NUMBER),
    "num_classes": whole_number(1, MOST_CLASSES),
}


def settings_brought(values: Values) -> Values:
    """What a checkpoint brings of its settings (JSON types), checked.

    Raises ArgumentTypeError, the message led by the setting's name.
    """
    brought = {}
    for name in values.keys() & (TAKEN | SHOWN):
        try:
            brought[name] = check_setting(name, values[name])
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    return brought


def check_setting(name: str, value: Any) -> Any:
    """A setting's value from a checkpoint; raises ArgumentTypeError if it cannot be typed."""
    default, argument = FIELDS[name].default, FIELDS[name].metadata["argument"]
    if value is None and default is None:
        return None
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError("only True and False are allowed")
        return value
    try:
        text = as_typed(value)
        choices = argument.get("choices") or [text]
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        if name in PATHS:
            return text
        parse = IN_FORCE.get(name) or argument.get("type") or printable
        found = parse(text)
    except (ValueError, TypeError, OverflowError):  # of numbers with thousands of digits
        raise argparse.ArgumentTypeError("no such number is allowed") from None
    if not isinstance(value, str) and isinstance(value, (list, tuple)) != isinstance(found, tuple):
        raise argparse.ArgumentTypeError(f"{text!r} is of another type")
    return found


def as_typed(value: Any) -> str:
    """Text, a number or a list of numbers, as typed; raises ArgumentTypeError for other values."""
    if isinstance(value, str):
        text = value
    else:
        numbers = value if isinstance(value, (list, tuple)) else [value]
        plain = all(type(each) in (int, float) for each in numbers)
        if not (plain and 0 < len(numbers) <= LONGEST_TEXT):
            message = f"a value of type {type(value).__name__} is not allowed"
            raise argparse.ArgumentTypeError(message)
        text = ",".join(map(str, numbers))
    if len(text) > LONGEST_TEXT:
        raise argparse.ArgumentTypeError(f"more than {LONGEST_TEXT} characters are not allowed")
    return text


def printable(text: str) -> str:
    """A parser of names in one line."""
    if not text.isprintable() or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no text in one line")
    return text


def settings_left(values: Values, asked: Values | None = None) -> list[str]:
    """Which settings of a saved run you have to type again, by name.

    Not the output folder, which is where the checkpoint is, and not what was left to the machine:
    then `asked` has None.
    """
    values = values | (asked or {})
    if values.get("workers") == LOADERS_BEFORE:
        values["workers"] = None
    return [
        name
        for name in sorted(LEFT & values.keys() - {"output_dir"})
        if values[name] is not None and str(values[name]) != str(FIELDS[name].default)
    ]
