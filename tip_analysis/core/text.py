"""Texts from files, made fit to be shown: on a page, in a terminal, in one line of an error.

A token can be half a character, markup, a line break, a control or a direction mark, or very long.
`visible` makes of each a short string without control characters, so that a page, a terminal or an
attribute can carry it; what is markup to a page or to a terminal's renderer is left to those.
"""

import unicodedata
from typing import Any

MAX_TOKEN = 48
"""Characters of a token that are shown; the rest is counted."""

_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINERS = {"\u200c", "\u200d"}
"""Zero-width (non-)joiners belong to Persian, Indic scripts and emoji; alone they are shown by
number."""
_MAX_MARKS = 4


def visible(text: str, limit: int = MAX_TOKEN) -> str:
    """The text with line breaks, controls and direction marks spelled out, cut at `limit`
    characters with their number."""
    kept = text if len(text) <= limit else text[:limit]
    shown, marks = [], 0
    for character in kept:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if character in _NAMED:
            shown.append(_NAMED[character])
        elif unicodedata.category(character) in _HIDDEN and not (
            character in _JOINERS and len(kept) > 1
        ):
            shown.append(f"⟨{ord(character):02X}⟩")
        elif marks <= _MAX_MARKS:
            shown.append(character)
    if len(text) > limit:
        shown.append(f"… ({len(text):,} characters)")
    return "".join(shown)


def visible_lines(text: str, limit: int = 4000) -> str:
    """Longer text (a prompt, an answer): as `visible`, but line breaks stay line breaks."""
    lines = text[:limit].splitlines() or [""]
    shown = "\n".join(visible(line, limit) for line in lines)
    return shown if len(text) <= limit else f"{shown}… ({len(text):,} characters)"


def without_controls(text: str) -> str:
    """Text for a terminal, line breaks kept: no character in it moves the cursor, changes colours
    or turns the writing direction."""
    return "".join(
        f"⟨{ord(character):02X}⟩" if _is_control(character) else character for character in text
    )


def one_line(text: str, limit: int = 600) -> str:
    """A message of any kind as one line without control characters, cut at `limit` characters."""
    line = without_controls(" ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its first, with the next where that only announces it; its
    kind where it says nothing."""
    lines = list(filter(None, (line.strip() for line in str(error).splitlines())))
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _is_control(character: str) -> bool:
    return (
        character not in _JOINERS
        and character not in "\n\t"
        and unicodedata.category(character) in _HIDDEN
    )


def shown(value: Any, digits: int = 4) -> str:
    """A value of a summary or of a result table, as people read it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:,.{digits}g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(item, digits)}" for name, item in value.items()) or "–"
    return str(value)
