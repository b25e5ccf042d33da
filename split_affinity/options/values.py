"""Parsers of single options: from the user's text to a checked value, or to what is allowed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESIZING_STEP = 32  # pixels
LARGEST_NUMBER = 2**31 - 1
LARGEST_CPU = 2**16 - 1
SWEEP = "sweep"  # the --split of compare that has all ratios


def number(
    allowed: str, is_allowed: Callable[[float], bool], kind: Callable[[str], float] = float
) -> Callable[[str], Any]:
    """A parser of the numbers that pass `is_allowed`; `allowed` describes them in messages."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if is_allowed(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")

    return parse


def whole_number(minimum: int, maximum: int = LARGEST_NUMBER) -> Callable[[str], int]:
    """A parser of whole numbers from `minimum` to `maximum`."""
    allowed = f"a whole number from {minimum} to {maximum}"
    return number(allowed, lambda value: minimum <= value <= maximum, int)


def parse_milestones(text: str) -> tuple[int, ...]:
    """Epochs in ascending order, such as 30,60,80."""
    if re.fullmatch(r"\d{1,6}(,\d{1,6})*", text, re.ASCII):
        epochs = tuple(map(int, text.split(",")))
        if epochs[0] > 0 and all(before < after for before, after in itertools.pairwise(epochs)):
            return epochs
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of ascending epochs such as 30,60,80")


def three_numbers(parse: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """A parser of a number for each channel, such as 0.485,0.456,0.406; `parse` takes each."""

    def parse_all(text: str) -> tuple[float, ...]:
        values = tuple(map(parse, text.split(",")))
        if len(values) == 3:
            return values
        message = f"{text!r} is not three numbers, such as 0.485,0.456,0.406"
        raise argparse.ArgumentTypeError(message)

    return parse_all


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Logical CPUs, ascending, of a list as in the kernel and taskset: `0-3,8-11`, `0-15:2`."""
    cpus: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::([1-9]\d*))?)?\s*", part, re.ASCII)
        if not match:
            message = f"{text!r} is not a core list such as 0-3,8-11 or 0-15:2"
            raise argparse.ArgumentTypeError(message)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"{part!r} runs backwards: write {last}-{first}")
        if last > LARGEST_CPU:
            raise argparse.ArgumentTypeError(f"{part!r} names a CPU above {LARGEST_CPU}")
        cpus += range(first, last + 1, int(match[3] or 1))
    if twice := [cpu for cpu, count in Counter(cpus).items() if count > 1]:
        raise argparse.ArgumentTypeError(f"{text!r} names CPU {twice[0]} twice")
    return tuple(sorted(cpus))


def parse_split(text: str) -> str:
    """A checked `--split`: even, auto, none, sweep, forward:backward, or several with commas.

    A sweep stands alone: it has all ratios.
    """
    if text == SWEEP:
        return text
    if "," in text:
        splits = [parse_split(part) for part in text.split(",")]
        if SWEEP in splits:
            raise argparse.ArgumentTypeError(f"{text!r}: {SWEEP} has all ratios, give it alone")
        if twice := [split for split, count in Counter(splits).items() if count > 1]:
            raise argparse.ArgumentTypeError(f"{text!r} names {twice[0]} twice")
        return text
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text, re.ASCII)
    if not match and text not in ("even", "auto", "none"):
        message = f"{text!r} is not even, auto, none, or forward:backward such as 1:2"
        raise argparse.ArgumentTypeError(message)
    if match and not (int(match[1]) and int(match[2])):
        message = f"{text!r} leaves a group without cores: both parts must be 1 or more"
        raise argparse.ArgumentTypeError(message)
    return text


COUNT, COUNT_FROM_0 = whole_number(1), whole_number(0)
NOT_NEGATIVE = number("a number of 0 or more", lambda value: 0 <= value < math.inf)
BELOW_1 = number("a number of 0 or more and below 1", lambda value: 0 <= value < 1)
SHARE = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
PART = number("above 0 and up to 1", lambda value: 0 < value <= 1)
PERCENT = number("above 0 and up to 100", lambda value: 0 < value <= 100)
# Pictures have 256 values from 0 to 1: a smaller deviation makes no sense.
DEVIATION = number("from 0.001 to 1", lambda value: 0.001 <= value <= 1)
JITTER = number("a number from 0 to 1000", lambda value: 0 <= value <= 1000)
SECONDS = number("above 0 and up to 1000000", lambda value: 0 < value <= 1e6)
# Below 0.01 torch draws the mean too often, since both of its gamma variates underflow to 0 (a
# quarter of all draws for 0.001). Above 1000 nearly all draws are the mean.
MIXING = number("0, or from 0.01 to 1000", lambda value: value == 0 or 0.01 <= value <= 1000)
# What --help calls the value of an option, by its type; else X.
METAVARS = {None: None, COUNT: "N", COUNT_FROM_0: "N", SHARE: "P", PERCENT: "PERCENT"}
METAVARS |= {parse_cpu_list: "LIST", Path: "PATH"}

Values = dict[str, Any]  # of settings, by name
