"""Class names in a picture: short, in fonts that have their characters, else as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from split_affinity.text import shown

LONGEST_LABEL = 32  # characters
PLACEHOLDERS = ("Last Resort", "Adobe Blank")  # fonts that have a box, or nothing, for everything


@dataclass(frozen=True)
class Labels:
    """What stands for each of some names, the font families that draw all of it together, and the
    names, by their number from 1 on, for which `no. 1` stands.
    """

    texts: list[str]
    families: list[str]
    numbered: dict[int, str]


def labels_of(names: Sequence[str]) -> Labels:
    """Labels for a picture. Names that no font of this machine can draw, and those that are the
    same in short, become numbers.
    """
    texts = [*map(in_short, names)]
    families, missing = fonts_for("".join(texts))
    times = Counter(texts)
    numbered = {
        number: shown(name)
        for number, (name, text) in enumerate(zip(names, texts, strict=True), 1)
        if missing.intersection(text) or times[text] > 1
    }
    texts = [f"no. {n}" if n in numbered else text for n, text in enumerate(texts, 1)]
    return Labels(texts, families, numbered)


def in_short(name: str) -> str:
    """A foreign name as `shown`; of a long one, beginning and end."""
    name = shown(name)
    return name if len(name) <= LONGEST_LABEL else f"{name[:20]}...{name[-9:]}"


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """The font families that draw a text together, matplotlib's own first and others only where
    these are needed, and the characters that no font has.
    """
    from matplotlib import font_manager, rcParams

    families, missing = list(rcParams["font.family"]), {*text}
    missing -= characters_of(font_manager.findfont(font_manager.FontProperties()))
    files = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    for name, file in sorted(files.items()) if missing else ():
        if not name.startswith(PLACEHOLDERS) and (found := missing & characters_of(file)):
            families.append(name)
            missing -= found
    return families, missing


def characters_of(file: str) -> set[str]:
    """The characters that a font file has; none if it cannot be read."""
    from matplotlib import font_manager

    try:
        return {*map(chr, font_manager.get_font(file).get_charmap())}
    except (OSError, RuntimeError, ValueError):
        return set()
