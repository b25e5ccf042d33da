"""Wording, and foreign text made safe. Run: python -m pytest tests/test_text.py"""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rendered import page_of

from split_affinity.text import code_span, csv_text, in_markdown, markdown_table, shown


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "photos/maine_coon/0001 (copy) - 2.jpg: 3 * 4",
            "photos/maine_coon/0001 (copy) - 2.jpg: 3 * 4",
        ),
        (r"C:\new\data", r"C:\new\data"),
        ("a\nb\x1b", r"a\nb\x1b"),
        ("![x](h) <b> a|b `c` &lt; R&D", r"!\[x\](h) \<b> a\|b \`c\` \&lt; R&D"),
        ("# heading", r"\# heading"),
        ("~~~", r"\~~~"),
        ("> said", r"\> said"),
        (r"\[x](h)", r"\\\[x\](h)"),
        ("at the end\\", r"at the end\\"),
    ],
)
def test_foreign_text_in_markdown(text, expected):
    assert in_markdown(text) == expected


AWKWARD = st.text(st.one_of(st.sampled_from("![](){}<>/|`#~&;:\\\n\r\t -=+*_ab1"), st.characters()))


@given(AWKWARD)
def test_no_foreign_text_makes_structure_in_markdown(text):
    for before in ("", "warning: "):
        page = page_of(f"- {before}{in_markdown(text)}\n\n| a |\n| :- |\n| {in_markdown(text)} |\n")
        tags = [tag for tag in page.tags if tag not in ("em", "strong", "del")]
        if before:  # addresses are links on GitHub, as they are seen
            assert [
                tag for tag in tags if tag != "a"
            ] == "ul li table thead tr th tbody tr td".split()
        assert not {"img", "script", "b", "h1", "h2", "pre", "code", "blockquote"} & {*tags}


@given(AWKWARD)
def test_a_table_of_foreign_text_keeps_its_rows_and_columns(text):
    tags = page_of(markdown_table((text, "b"), [(text, "1"), ("c", text)])).tags
    assert (tags.count("tr"), tags.count("th"), tags.count("td")) == (3, 2, 4)


@given(AWKWARD)
def test_foreign_text_as_code_is_code_alone(text):
    tags = page_of(f"- settings: {code_span('--model ' + text)}\n").tags
    assert tags == ["ul", "li", "code"]


def test_options_as_code_are_as_they_were_without_backticks():
    assert code_span("--model x") == "`--model x`"
    assert code_span("--output-dir a`b``c") == "``` --output-dir a`b``c ```"


@pytest.mark.parametrize("start", "=+-@\uff1d")
def test_no_cell_of_a_spreadsheet_is_a_formula(start):
    """Numbers are written as they are."""
    text = csv_text([[f"{start}1+1", -5, 0.25, "a\nb"]])
    assert text == f"'{start}1+1,-5,0.25,a\\nb\n"
    assert next(csv.reader([text])) == [f"'{start}1+1", "-5", "0.25", "a\\nb"]
