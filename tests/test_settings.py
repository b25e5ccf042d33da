"""Settings and their parsers. Run: python -m pytest tests/test_settings.py"""

import argparse
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_split_affinity as tsa


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", (0,)),
        ("0-3,8-11", (0, 1, 2, 3, 8, 9, 10, 11)),
        ("0-15:2", (0, 2, 4, 6, 8, 10, 12, 14)),
        ("5,1-2", (1, 2, 5)),
        (" 0 , 2 ", (0, 2)),
        ("3-3", (3,)),
    ],
)
def test_core_lists(text, cpus):
    assert tsa.parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a core list"),
        (" ", "not a core list"),
        ("a", "not a core list"),
        ("0-", "not a core list"),
        ("-1", "not a core list"),
        ("0,,1", "not a core list"),
        ("0-4:0", "not a core list"),
        ("0.5", "not a core list"),
        ("٣", "not a core list"),
        ("3-1", "runs backwards: write 1-3"),
        ("0,0", "names CPU 0 twice"),
        ("0-3,2", "names CPU 2 twice"),
        ("0-99999999999", "above 65535"),
    ],
)
def test_what_is_no_core_list(text, reason):
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        tsa.parse_cpu_list(text)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_formatting_a_core_list_can_be_undone(cpus):
    assert tsa.parse_cpu_list(tsa.format_cpu_list(cpus)) == tuple(sorted(cpus))


def test_formatting_uses_ranges():
    assert tsa.format_cpu_list([3, 0, 1, 8]) == "0-1,3,8"
    assert tsa.format_cpu_list([]) == "none"


@pytest.mark.parametrize("text", ["even", "auto", "none", "1:2", "10:1"])
def test_splits(text):
    assert tsa.parse_split(text) == text


@pytest.mark.parametrize("text", ["0:1", "1:0", "2", "a:b", "1:2:3", "", "-1:2", "1.5:1", "EVEN"])
def test_what_is_no_split(text):
    with pytest.raises(argparse.ArgumentTypeError, match="even, auto, none|without cores"):
        tsa.parse_split(text)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "x", "", "nan", "99999999999999999999"])
def test_what_is_no_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole number from 1 to"):
        tsa.COUNT(text)


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "x", ""])
def test_what_is_no_rate(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a number of 0 or more"):
        tsa.not_negative(text)


def test_help_lists_every_option_with_its_default():
    text = " ".join(tsa.build_parser().format_help().split())
    for setting in dataclasses.fields(tsa.Settings):
        switched_off = "no-" if setting.default is True else ""
        assert f"--{switched_off}{setting.name.replace('_', '-')}" in text
        assert setting.metadata["help"] in text
    assert "(default: resnet50)" in text
    assert "(default: 0.0125)" in text


def test_the_parser_takes_its_defaults_from_settings():
    assert tsa.parse_arguments([]) == ("train", tsa.Settings())


def test_arguments_become_settings():
    command, settings = tsa.parse_arguments(
        "plan -b 8 --split 1:2 --loader-cores 0-1 -j 0 --deterministic --lr 1e-3".split()
    )
    assert command == "plan"
    assert settings == tsa.Settings(
        batch_size=8, split="1:2", loader_cores=(0, 1), workers=0, deterministic=True, lr=1e-3
    )
