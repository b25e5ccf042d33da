"""Class names in a picture: short, in fonts that have their characters, else as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from split_affinity.text import shown

LONGEST_LABEL = 32  # characters
PLACEHOLDERS = ("Last Resort", "Adobe Blank")  # fonts that have a box, or nothing, for everything


def short_labels(names: Sequence[str]) -> tuple[list[str], list[str], dict[int, str]]:
    """A short label for each name, the font families that draw them all, the numbered names.

    A name is `no. 1`, `no. 2`, ... after its place if no font here can draw it, or if another one
    is the same in short.
    """
    texts = []
    for name in map(shown, names):
        texts.append(name if len(name) <= LONGEST_LABEL else f"{name[:20]}...{name[-9:]}")
    families, missing = fonts_for("".join(texts))
    times = Counter(texts)
    numbered = {}
    for number, text in enumerate(texts, 1):
        if missing.intersection(text) or times[text] > 1:
            numbered[number] = shown(names[number - 1])
            texts[number - 1] = f"no. {number}"
    return texts, families, numbered


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """The font families that a text needs, the usual one first; the characters that none has."""
    from matplotlib import font_manager, rcParams

    families, missing = list(rcParams["font.family"]), {*text}
    missing -= characters_of(font_manager.findfont(font_manager.FontProperties()))
    files = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    for name, file in sorted(files.items()):
        if missing and not name.startswith(PLACEHOLDERS):
            found = missing & characters_of(file)
            if found:
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
