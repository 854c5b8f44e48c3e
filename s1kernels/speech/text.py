"""What is done to a text before it is spoken: cleaned, split into parts, and bounded in time."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable

from s1kernels import extras

PART_SECONDS = 20
"""Usual seconds that are spoken in one part at most: some 280 letters or 80 Chinese characters."""

QUOTES = {"‘": "'", "’": "'"}
PICTOGRAMS = re.compile("[\U0001f1e0-\U0001f1ff\U0001f300-\U0001f64f\U0001f680-\U0001f6ff]+")
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")  # all but tab and line ends

CLAUSE_END = re.compile(r"(?<=[,;:])(?=\s)|(?<=[，、；：،؛])")
WORD_END = re.compile(r"(?<=\s)(?=\S)")

SLOWEST, PAUSES = 3, 5.0
"""A text may take so many times what it usually takes, and so many seconds more."""

LETTER, WIDE, SYMBOL = 0.07, 0.25, 0.4
"""Seconds that are usual for a letter, for a Chinese, Japanese or Korean character, and for a digit or a sign."""


def clean(text: str) -> str:
    """A text as upstream cleans those that it trains on, less what no voice can speak.

    Leaves out white space at both ends, flags, emoticons and pictograms, and repeated commas; makes typographic
    apostrophes plain ones. Beyond upstream: control characters and lone surrogates are left out, or made a space.

    Source: fish_speech/text/clean.py.

    >>> clean(" It’s good,,, \\U0001f600")
    "It's good, "
    """
    text = CONTROLS.sub(lambda found: " " if found[0].isspace() else "", text)
    text = text.encode("utf-8", "ignore").decode("utf-8").strip()
    for quote, plain in QUOTES.items():
        text = text.replace(quote, plain)
    return re.sub(",{2,}", ",", PICTOGRAMS.sub("", text))


def split(text: str, limit: float = PART_SECONDS) -> list[str]:
    """A text's parts, each of at most `limit` usual seconds (>= 1), without white space at their ends.

    Parts end where sentences do, in whatever script; a sentence that is too long is cut where a clause ends, else
    between words, else between characters. Joined, they are the text, but for white space.

    Raises:
        ModuleNotFoundError: the text is longer than one part, and sentencex or regex is not installed.

    >>> split("One. Two is longer.")
    ['One. Two is longer.']
    """
    parts = (part.strip() for part in _parts(text, limit, (_sentences, CLAUSE_END.split, WORD_END.split, _letters)))
    return [part for part in parts if part]


def usual_seconds(text: str) -> float:
    """Seconds that a text usually takes to speak, roughly."""
    return sum(map(_seconds, text))


def most_seconds(text: str) -> float:
    """Seconds after which a text cannot be what is spoken any more."""
    return SLOWEST * usual_seconds(text) + PAUSES


def _seconds(character: str) -> float:
    kind = unicodedata.category(character)[0]
    if kind == "L" and unicodedata.east_asian_width(character) in "WFH":
        return WIDE
    return {"L": LETTER, "M": LETTER, "Z": LETTER, "N": SYMBOL, "S": SYMBOL}.get(kind, LETTER)


def _parts(text: str, limit: float, ways: tuple[Callable[[str], Iterable[str]], ...]) -> list[str]:
    """Split in the first of the ways, what is still too long in the next ones, and join again what fits."""
    if usual_seconds(text) <= limit or not ways:
        return [text]
    joined, taken = [""], 0.0
    for piece in (part for long in ways[0](text) for part in _parts(long, limit, ways[1:])):
        seconds = usual_seconds(piece)
        if taken + seconds <= limit:
            joined[-1] += piece
            taken += seconds
        else:
            joined.append(piece)
            taken = seconds
    return joined


def _sentences(text: str) -> list[str]:
    sentencex = extras.load("speech", "sentencex")
    return sentencex.segment("en", text)  # English knows abbreviations; full stops of every script count


def _letters(text: str) -> list[str]:
    """Characters as readers see them, marks included; single ones of what has too many marks."""
    return [part for seen in extras.load("speech", "regex").findall(r"\X", text) for part in _parts(seen, 1, (list,))]
