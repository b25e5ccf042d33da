"""Wording, and foreign text made safe. Run: python -m pytest tests/test_text.py"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_affinity.text import shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("photos/maine_coon/0001 (copy).jpg", "photos/maine_coon/0001 (copy).jpg"),
        (
            "Bl\u00fcte, \u732b, \U0001f408, a\u00a0b, C:\\new",
            "Bl\u00fcte, \u732b, \U0001f408, a\u00a0b, C:\\new",
        ),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x07\x7f\x9b", r"\x1b[31mred\x07\x7f\x9b"),
        ("gpj.\u202etac", r"gpj.\u202etac"),
        ("a\u2028b\u2029c\u200bd\u2066e\ufeff", r"a\u2028b\u2029c\u200bd\u2066e\ufeff"),
        ("\U000e0041", r"\U000e0041"),
        ("caf\udce9, \ud83d", r"caf\xe9, \ud83d"),
        ("caf\udcc3\udca9", "caf\u00e9"),
        ("\udcc2\udc9b", r"\x9b"),
    ],
)
def test_foreign_text_is_one_line_without_anything_that_steers_a_terminal(text, expected):
    assert shown(text) == expected
    assert shown(expected) == expected


@given(st.text(st.characters()))
def test_whatever_is_shown_is_one_line_that_utf_8_can_hold(text):
    text = shown(text)
    assert len(text.encode().decode().splitlines()) <= 1
    assert not any(ord(each) < 32 or 127 <= ord(each) < 160 for each in text)
