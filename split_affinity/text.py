"""Wording: counts, lists of cores, tables, hints about misspelt names. Pure, but for `tell`."""

from __future__ import annotations

import csv
import datetime
import difflib
import io
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def format_cpu_list(cpus: Iterable[int]) -> str:
    """The inverse of `parse_cpu_list`, in ranges: `0-3,8`; `none` for no CPUs."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def alike(name: str, known: Iterable[str], least: float = 0.72) -> list[str]:
    """Those known names that are most like an unknown one, from a ratio `least` on."""
    return difflib.get_close_matches(name, list(known), n=4, cutoff=least)


def nearest(name: str, known: Iterable[str], least: float = 0.72) -> str:
    """What to add to a message about an unknown name: those most alike, from a ratio `least` on."""
    near = alike(name, known, least)
    return f"; did you mean {', '.join(near)}?" if near else ""


def nearest_of_each(names: Collection[str], known: Mapping[str, str]) -> str:
    """What to add to a message about unknown names: what those most alike are called here, for each
    of several.
    """
    found = {name: dict.fromkeys(known[each] for each in alike(name, known)) for name in names}
    if len(names) == 1:
        (near,) = found.values()
        return f"; did you mean {', '.join(near)}?" if near else ""
    near = {name: " or ".join(those) for name, those in found.items()}
    hints = ", ".join(f"{found} for {name}" for name, found in near.items() if found)
    return f"; did you mean {hints}?" if hints else ""


def plural(count: int, noun: str) -> str:
    """`1 core`, `2 cores`, `2 loader processes`."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


# Where a chain of fsspec's, as simplecache::s3://bucket/run, has its next address.
CHAINED = re.compile(r"::(?=\w+(?:://|::|$))")
ACCOUNTS = ("abfs", "abfss", "wasb", "wasbs")  # container@account: a name by itself is no secret


def without_login(url: str) -> str:
    """An address without user and password, and without its query, where tokens and signatures
    stand; of a chain of addresses each. Other text stays as it is.
    """
    bare = []
    for part in CHAINED.split(url):
        scheme, separator, place = part.partition("://")
        login = re.match(r"[^/?#]*@", place)
        if not login and re.match(r"[^/?#@\[]*:(?!\d*(?:[/?#]|$))", place):
            login = re.match(r".*@", place)  # a password has characters that should be escaped
        if separator and login and (":" in login[0] or not scheme.endswith(ACCOUNTS)):
            place = place[login.end() :]
        bare.append(scheme + separator + (re.sub(r"\?.+", "?...", place) if separator else place))
    return "::".join(bare)


def without_logins(text: str) -> str:
    """Text such as an error's, whose addresses have lost what `without_login` takes from them."""
    return re.sub(r"[\w:+.-]+://\S+", lambda found: without_login(found[0]), text)


def option_text(value: Any) -> str:
    """A setting's value as it is written on the command line; addresses without a login."""
    return (
        ",".join(map(option_text, value)) if isinstance(value, tuple) else without_login(str(value))
    )


def as_option(name: str, value: Any) -> str:
    """A setting as it is given on the command line, as `--name value`, or `--name` for True."""
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {option_text(value)}"


# Compiled here: where memory has run out, and that is to be told, there is none to compile with.
LONE_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def readable(text: str) -> str:
    r"""Text that UTF-8 can hold: bytes of a file's name that Python could not decode, and has as
    lone surrogates, become the characters that they are in UTF-8, or else escapes such as \xe9.
    Other surrogates, which JSON can bring, are escaped.
    """
    text = LONE_SURROGATES.sub(lambda found: repr(found[0])[1:-1], text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# What steers a terminal or reorders a line and is not seen itself: control characters, format
# characters (bidirectional overrides, zero-width ones), separators of lines and paragraphs.
UNSEEN = ("Cc", "Cf", "Zl", "Zp")


def shown(text: str) -> str:
    r"""Foreign text, a file's or a class's name say, as one line that is safe on a terminal: what
    is not seen is escaped as in Python, \n, \x1b, \u202e. Twice is as once.
    """
    return "".join(
        repr(each)[1:-1] if unicodedata.category(each) in UNSEEN else each
        for each in readable(text)
    )


def shown_lines(text: str) -> str:
    """Text of several lines, each as `shown`."""
    return "\n".join(map(shown, text.split("\n")))


def in_markdown(text: str) -> str:
    """Foreign text as `shown`, to stand in a paragraph, a list's item, a heading or a table's cell
    of Markdown: nothing in it is a link, an image, HTML, code, a column, a heading or a quotation.
    Emphasis is left as it is, and so are addresses, which a reader sees.
    """
    # A backslash escapes what can make structure; one that is there already shall not.
    escape = r"(\\(?=[!-/:-@\[-`{-~]|$)|[\[\]<|`]|&(?=#?\w+;)|^[#>~])"
    return re.sub(escape, r"\\\1", shown(text))


def code_span(text: str) -> str:
    """Foreign text as code in a line of Markdown, between as many backticks as it takes."""
    text = shown(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, blank = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{blank}{text}{blank}{fence}"


def tell(text: str, stream: Any) -> None:
    """Print what a program ends with, as far as somebody takes it: a stream may be closed, the
    reader of a pipe have gone, a disk be full.
    """
    try:
        if stream:
            print(shown_lines(text), file=stream, flush=True)
    except OSError:  # nor shall the interpreter's own flush fail, when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as Markdown and on a terminal; first column left, others right. Cells
    can be foreign text.
    """
    header, rows = [*map(in_markdown, header)], [[*map(in_markdown, row)] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *rest in (header, rule, *rows):
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    return "\n".join(lines)


def utc_now() -> str:
    """The time of day, as in 2025-10-11T14:02:13Z."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # wide ones, too, in some languages


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as comma-separated values, which may be foreign text: that is as `shown`, and what
    spreadsheets would run as a formula has an apostrophe before it, by which they know a text.
    """
    text = io.StringIO()
    safe = ([in_cell(value) if isinstance(value, str) else value for value in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows(safe)
    return text.getvalue()


def in_cell(text: str) -> str:
    """Foreign text for a spreadsheet; see `csv_text`."""
    text = shown(text)
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def span_text(seconds: float) -> str:
    """A span of time in its two largest units: 9s, 1m05s, 23h59m, 66d02h."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest_s:02}s" if minutes else f"{rest_s}s"


def speed_text(images_per_s: float) -> str:
    """Images a second, in three digits or more."""
    return f"{images_per_s:.{2 if images_per_s < 9.995 else 1 if images_per_s < 99.95 else 0}f}"
