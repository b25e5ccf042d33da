"""Parsers of single options. Run: python -m pytest tests/options/test_values.py"""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_affinity.errors import UserError
from split_affinity.options.commands import parse_arguments
from split_affinity.options.values import (
    BELOW_1,
    COUNT,
    MIXING,
    NOT_NEGATIVE,
    PART,
    PERCENT,
    SHARE,
    parse_cpu_list,
    parse_milestones,
    parse_split,
    whole_number,
)
from split_affinity.text import format_cpu_list


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
    assert parse_cpu_list(text) == cpus


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
        parse_cpu_list(text)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_formatting_a_core_list_can_be_undone(cpus):
    assert parse_cpu_list(format_cpu_list(cpus)) == tuple(sorted(cpus))


def test_formatting_uses_ranges():
    assert format_cpu_list([3, 0, 1, 8]) == "0-1,3,8"
    assert format_cpu_list([]) == "none"


@pytest.mark.parametrize("text", ["even", "auto", "none", "1:2", "10:1", "sweep"])
def test_splits(text):
    assert parse_split(text) == text


@pytest.mark.parametrize("text", ["0:1", "1:0", "2", "a:b", "1:2:3", "", "-1:2", "1.5:1", "EVEN"])
def test_what_is_no_split(text):
    with pytest.raises(argparse.ArgumentTypeError, match="even, auto, none|without cores"):
        parse_split(text)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "x", "", "nan", "99999999999999999999"])
def test_what_is_no_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole number from 1 to"):
        COUNT(text)


@pytest.mark.parametrize(("minimum", "text"), [(0, "0"), (1, "1"), (2, "2"), (2, "2147483647")])
def test_counts(minimum, text):
    assert whole_number(minimum)(text) == int(text)


@pytest.mark.parametrize(
    ("minimum", "text"), [(0, "-1"), (1, "0"), (2, "1"), (0, "2147483648"), (0, "1.0")]
)
def test_what_is_no_count_from_a_minimum(minimum, text):
    message = f"'{text}' is not a whole number from {minimum} to 2147483647"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        whole_number(minimum)(text)


def test_counts_up_to_a_maximum():
    assert whole_number(2, 9)("9") == 9
    with pytest.raises(argparse.ArgumentTypeError, match="'10' is not a whole number from 2 to 9"):
        whole_number(2, 9)("10")


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "x", ""])
def test_what_is_no_rate(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a number of 0 or more"):
        NOT_NEGATIVE(text)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (NOT_NEGATIVE, "0", 0.0),
        (NOT_NEGATIVE, "1e-6", 1e-6),
        (SHARE, "0", 0.0),
        (SHARE, "1", 1.0),
        (PART, "1", 1.0),
        (PART, "0.2", 0.2),
        (PERCENT, "100", 100.0),
        (PERCENT, "97.5", 97.5),
        (BELOW_1, "0", 0.0),
        (BELOW_1, "0.9999", 0.9999),
        (BELOW_1, "0.999999", 0.999999),
        (MIXING, "0", 0.0),
        (MIXING, "0.01", 0.01),
        (MIXING, "1e3", 1000.0),
    ],
)
def test_numbers(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "allowed"),
    [
        (SHARE, "-0.01", "a number from 0 to 1"),
        (SHARE, "1.01", "a number from 0 to 1"),
        (SHARE, "nan", "a number from 0 to 1"),
        (PART, "0", "above 0 and up to 1"),
        (PART, "1.01", "above 0 and up to 1"),
        (PART, "x", "above 0 and up to 1"),
        (PERCENT, "0", "above 0 and up to 100"),
        (PERCENT, "100.1", "above 0 and up to 100"),
        (PERCENT, "nan", "above 0 and up to 100"),
        (BELOW_1, "-0.1", "a number of 0 or more and below 1"),
        (BELOW_1, "1", "a number of 0 or more and below 1"),
        (BELOW_1, "nan", "a number of 0 or more and below 1"),
        (MIXING, "-0.2", "0, or from 0.01 to 1000"),
        (MIXING, "0.009", "0, or from 0.01 to 1000"),
        (MIXING, "1e-300", "0, or from 0.01 to 1000"),
        (MIXING, "1001", "0, or from 0.01 to 1000"),
        (MIXING, "1e308", "0, or from 0.01 to 1000"),
        (MIXING, "nan", "0, or from 0.01 to 1000"),
    ],
)
def test_what_is_no_such_number(parse, text, allowed):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not {allowed}"):
        parse(text)


@pytest.mark.parametrize(
    ("arguments", "mean", "std"),
    [
        ([], None, None),
        (["--mean", "0.485,0.456,0.406"], (0.485, 0.456, 0.406), None),
        (["--mean", "0,0,0", "--std", "1,1,1"], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        (["--std", "0.5, .5,5e-1"], None, (0.5, 0.5, 0.5)),
    ],
)
def test_mean_and_deviation_of_channels(arguments, mean, std):
    _, settings = parse_arguments(arguments)
    assert (settings.mean, settings.std) == (mean, std)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean", "0.5"], "'0.5' is not three numbers, such as 0.485,0.456,0.406"),
        (["--mean", "0.5,0.5,0.5,0.5"], "'0.5,0.5,0.5,0.5' is not three numbers"),
        (["--mean", "123.7,116.3,103.5"], "'123.7' is not a number from 0 to 1"),
        (["--mean", "0.5,0.5,"], "'' is not a number from 0 to 1"),
        (["--mean", "nan,0.5,0.5"], "'nan' is not a number from 0 to 1"),
        (["--std", "0.2,0,0.2"], "'0' is not from 0.001 to 1"),
        (["--std", "58.4,57.1,57.4"], "'58.4' is not from 0.001 to 1"),
    ],
)
def test_what_is_no_mean_or_deviation(arguments, message):
    with pytest.raises(UserError, match=f"argument {arguments[0]}: {message}"):
        parse_arguments(arguments)


@pytest.mark.parametrize(
    ("text", "epochs"), [("1", (1,)), ("30,60,80", (30, 60, 80)), ("102,154", (102, 154))]
)
def test_milestones(text, epochs):
    assert parse_milestones(text) == epochs


@given(st.sets(st.integers(1, 999_999), min_size=1))
def test_milestones_come_back_as_they_are_written(epochs):
    ascending = sorted(epochs)
    assert parse_milestones(",".join(map(str, ascending))) == tuple(ascending)


@pytest.mark.parametrize(
    "text", ["", "0", "0,5", "30,30", "60,30", "30,", ",30", "30;60", "a", "-1", "1.5", "٣", "1,,2"]
)
def test_what_are_no_milestones(text):
    with pytest.raises(argparse.ArgumentTypeError, match="list of ascending epochs such as"):
        parse_milestones(text)
