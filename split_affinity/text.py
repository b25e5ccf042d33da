"""Wording: counts, lists of cores, tables, hints about misspelt names, foreign text made safe."""

from __future__ import annotations

import csv
import datetime
import difflib
import html
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
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


def similar_names(name: str, known: Iterable[str], least: float = 0.72) -> list[str]:
    """The known names that are most like an unknown one, from a ratio `least` on."""
    return difflib.get_close_matches(name, list(known), n=4, cutoff=least)


def did_you_mean(name: str, known: Iterable[str], least: float = 0.72) -> str:
    """What to add to a message about an unknown name: the known names most like it, if any."""
    near = similar_names(name, known, least)
    return f"; did you mean {', '.join(near)}?" if near else ""


def plural(count: int, noun: str) -> str:
    """`1 core`, `2 cores`, `2 loader processes`."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def percent(share: float) -> str:
    """A share in percent; only what is exactly none or all has no decimal."""
    return f"{share:.1%}".removesuffix("%").replace("100.0", "100") + "\u00a0%"


# Before the next address in a chain of fsspec's, such as simplecache::s3://bucket/run.
CHAINED = re.compile(r"::(?=\w+(?:://|::|$))")
ACCOUNTS = ("abfs", "abfss", "wasb", "wasbs")  # container@account: a name by itself is no secret


def without_login(url: str) -> str:
    """An address, or a chain of them, without user, password and query (tokens, signatures).

    Other text stays as it is.
    """
    bare = []
    for part in CHAINED.split(url):
        scheme, separator, place = part.partition("://")
        login = re.match(r"[^/?#]*@", place)
        if not login and re.match(r"[^/?#@\[]*:(?!\d*(?:[/?#]|$))", place):
            login = re.match(r".*@", place)  # the password has characters that need escapes
        if separator and login and (":" in login[0] or not scheme.endswith(ACCOUNTS)):
            place = place[login.end() :]
        bare.append(scheme + separator + (re.sub(r"\?.+", "?...", place) if separator else place))
    return "::".join(bare)


def without_logins(text: str) -> str:
    """Text, such as an error's, with `without_login` applied to each address in it."""
    return re.sub(r"[\w:+.-]+://\S+", lambda found: without_login(found[0]), text)


def option_text(value: Any) -> str:
    """A setting's value as it is written on the command line; addresses without a login."""
    if isinstance(value, tuple):
        return ",".join(map(option_text, value))
    return without_login(str(value))


def as_option(name: str, value: Any) -> str:
    """A setting on the command line: `--name value`, or `--name` for True."""
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {option_text(value)}"


# Compiled here: a message about too little memory must not need memory for it.
LONE_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def readable(text: str) -> str:
    r"""Text that UTF-8 can hold.

    Lone surrogates are bytes of a file's name that Python could not decode: they become the UTF-8
    characters that they are, or escapes such as \xe9. Others, as in JSON, are escaped.
    """
    text = LONE_SURROGATES.sub(lambda found: repr(found[0])[1:-1], text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# Categories of invisible characters that steer a terminal or reorder a line: control characters,
# format characters (bidirectional overrides, zero-width ones), separators of lines and paragraphs.
UNSEEN = ("Cc", "Cf", "Zl", "Zp")


def shown(text: str) -> str:
    r"""Foreign text, such as a file's name, as one line that is safe on a terminal.

    Invisible characters are escaped as in Python: \n, \x1b, \u202e. Twice gives the same as once.
    """
    return "".join(
        repr(each)[1:-1] if unicodedata.category(each) in UNSEEN else each
        for each in readable(text)
    )


def shown_lines(text: str) -> str:
    """Text of several lines, each `shown`."""
    return "\n".join(map(shown, text.split("\n")))


def in_markdown(text: str) -> str:
    """Foreign text for a paragraph, item, heading or cell of Markdown, without structure in it.

    Emphasis and addresses stay: a reader sees them as they are.
    """
    # A backslash escapes what makes structure, and a backslash that would escape something.
    escape = r"(\\(?=[!-/:-@\[-`{-~]|$)|[\[\]<|`]|&(?=#?\w+;)|^[#>~])"
    return re.sub(escape, r"\\\1", shown(text))


def code_span(text: str) -> str:
    """Foreign text as code in a line of Markdown, between as many backticks as it takes."""
    text = shown(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, blank = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{blank}{text}{blank}{fence}"


def try_print(text: str, stream: Any) -> None:
    """Print and ignore it if nobody reads: a closed stream, a broken pipe, a full disk."""
    try:
        if stream:
            encoding = stream.encoding or "utf-8"
            text = shown_lines(text).encode(encoding, "backslashreplace").decode(encoding)
            print(text, file=stream, flush=True)
    except OSError:
        # Else the interpreter's own flush fails at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for Markdown and terminals, its first column left-aligned, foreign text escaped."""
    header, rows = [*map(in_markdown, header)], [[*map(in_markdown, row)] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *rest in (header, rule, *rows):
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    return "\n".join(lines)


FOLD_END = "\n\n</details>"


def fold_start(title: str) -> str:
    """What begins Markdown that a reader opens by a click on its title, which is foreign text."""
    return f"<details><summary>{html.escape(shown(title))}</summary>\n\n"


def folded(title: str, markdown: str) -> str:
    """Markdown that a reader opens by a click on its title."""
    return f"{fold_start(title)}{markdown}{FOLD_END}"


def utc_now() -> str:
    """The time of day, as in 2025-10-11T14:02:13Z."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # wide ones in some languages


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as comma-separated values; foreign text is `shown`, and never a formula."""

    def safe(cell: Any) -> Any:
        if not isinstance(cell, str):
            return cell
        text = shown(cell)
        return f"'{text}" if text.startswith(FORMULA_STARTS) else text  # "'" means text

    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(map(safe, row) for row in rows)
    return file.getvalue()


def span_text(seconds: float) -> str:
    """A time span in its two largest units: 9s, 1m05s, 23h59m, 66d02h."""
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
    digits = 2 if images_per_s < 9.995 else 1 if images_per_s < 99.95 else 0
    return f"{images_per_s:.{digits}f}"
