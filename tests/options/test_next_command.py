"""Which command comes after another. Run: python -m pytest tests/options/test_next_command.py"""

import dataclasses
import shlex
from pathlib import Path

import pytest

from split_affinity.options.commands import COMMANDS, parse_arguments
from split_affinity.options.next_command import Left, next_commands
from split_affinity.options.settings import Settings

START, REPORT = ".venv/bin/python 'my code/train.py'", ".venv/bin/python 'my code/deploy/report.py'"
LEFT = Left(start=START, torchrun="'my code/train.py'", report=REPORT)
BEST = {"checkpoint": Path("out/my run/best.pt"), "validated": True}
WAY = Settings(batch_size=32, accumulate=4, num_classes=5, split="even", schedule="delayed")
RANKS = dataclasses.replace(WAY, ranks=2, accumulate=2, schedule="sequential")
ONE_LANE = dataclasses.replace(WAY, split="none", schedule="sequential")


def after(typed, **left):
    """The next commands after one that was typed, without how the program is started.

    Each must be one that the program takes.
    """
    command, settings = parse_arguments(shlex.split(typed), lambda *what: {})
    found = next_commands(command, settings, dataclasses.replace(LEFT, **left))
    plain = []
    for each in found:
        words, ranks = shlex.split(each), 1
        assert shlex.join(words) == each
        if words[:2] == ["torchrun", "--nproc-per-node"]:
            ranks, options = int(words[2]), words[4:]
            assert words[3] == "my code/train.py"
        elif words[1] == "my code/deploy/report.py":
            plain.append("report " + shlex.join(words[2:]))
            continue
        else:
            assert words[:2] == shlex.split(START)
            options = words[2:]
        parse_arguments(options, lambda *what: {"output_dir": Path("out")}, ranks)
        plain.append(shlex.join(options) if ranks == 1 else f"{ranks} ranks {shlex.join(options)}")
    return plain


@pytest.mark.parametrize(
    ("typed", "left", "expected"),
    [
        ("--operators --accumulate 2", {}, ["compare --accumulate 2"]),
        ("--recipe digits", BEST, ["--test-only --resume 'out/my run/best.pt'"]),
        (
            "--recipe finetune --data-path photos -j 0",
            BEST,
            ["--test-only --resume 'out/my run/best.pt' --workers 0"],
        ),
        (
            "--data-path photos --epochs 2 --output-dir out",
            {"checkpoint": Path("out/last.pt")},
            ["predict PICTURES --resume out/last.pt"],
        ),
        (
            "--data-path a/photos --epochs 2 --lr 0.1",
            {},
            ["--data-path a/photos --epochs 2 --lr 0.1 --output-dir out/photos"],
        ),
        ("--data-path photos --steps 9", {}, ["--data-path photos --recipe finetune"]),
        ("-b 16 --steps 50", {}, ["compare --batch-size 16"]),
        (
            "--test-only --resume 'out/my run/best.pt'",
            BEST,
            ["predict PICTURES --resume 'out/my run/best.pt'", "report 'out/my run/best.pt'"],
        ),
        (
            "--test-only --weights DEFAULT --data-path photos --model resnet18",
            {},
            ["predict PICTURES --model resnet18 --weights DEFAULT"],
        ),
        ("predict new --resume out/a.pt", BEST, ["report 'out/my run/best.pt'"]),
        (
            "predict new --resume out/a.pt",
            {**BEST, "report": ""},
            ["--test-only --resume 'out/my run/best.pt'"],
        ),
        ("predict new --resume last.pt", {"checkpoint": Path("last.pt")}, []),
        (
            "predict new --weights DEFAULT --model resnet18",
            {},
            ["--model resnet18 --data-path PHOTOS --recipe finetune"],
        ),
        (
            "plan --recipe finetune --data-path 'my photos' --weights none --record m.json",
            {},
            ["--weights none --data-path 'my photos' --recipe finetune"],
        ),
        ("plan --ranks 4 --split 1:2", {}, ["4 ranks --split 1:2"]),
        (
            "plan --recipe imagenet-full --data-path i",
            {},
            ["--data-path i --recipe imagenet-full --weights DEFAULT"],
        ),
        (
            "find-lr --data-path p --steps 300 --output-dir out --open",
            {"lr": 0.012},
            ["--data-path p --lr 0.012 --output-dir out --open"],
        ),
        (
            "find-lr --data-path p --opt adamw",
            {},
            ["find-lr --data-path p --steps 300 --opt adamw"],
        ),
        (
            "compare --split 1:2,even --data-path p --preload --json a.json",
            {"way": WAY},
            ["--data-path p --accumulate 4 --schedule delayed"],
        ),
        (
            "compare --quick",
            {"way": dataclasses.replace(WAY, batch_size=8, schedule="overlap")},
            ["--batch-size 8 --accumulate 4 --schedule overlap"],
        ),
        (
            "compare --forward-cores 0 --backward-cores 1",
            {"way": ONE_LANE},
            ["--accumulate 4 --split none"],
        ),
        (
            "compare --recipe finetune --data-path p",
            {"way": RANKS},
            ["2 ranks --data-path p --recipe finetune --accumulate 2 --split none"],
        ),
        (
            "compare --split 1:2,even --steps 70",
            {},
            ["compare --steps 70 --accumulate 4 --split 1:2,even"],
        ),
        ("--list-models", {}, []),
    ],
)
def test_the_next_command(typed, left, expected):
    found, wanted = (
        [sorted(shlex.split(each)) for each in every] for every in (after(typed, **left), expected)
    )
    assert found == wanted


def test_each_command_has_one():
    typed = {"predict": "predict a.jpg --resume a.pt", "data": "data photos"}
    for command in COMMANDS:
        assert after(typed.get(command, command), **BEST, lr=0.1, way=WAY), command
