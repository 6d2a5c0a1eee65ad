"""Numbers as words, and token texts that may be shown anywhere.

A token can be half a character, markup, a line break, a control or a direction mark, or very long.
`visible` makes of each a short string without control characters, so that a page, a terminal or an
attribute can carry it; escaping is left to the template.
"""

import math
import unicodedata
from collections.abc import Sequence

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


def percent(share: float | None, decimals: int = 1) -> str:
    """0.123 as 12.3%; an en dash where there is none."""
    if share is None or math.isnan(share):
        return "–"
    text = f"{100 * share:.{decimals}f}%"
    return text.removeprefix("-") if float(text[:-1]) == 0 else text.replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent where that reads well; ∞ and – are
    themselves."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    magnitude = abs(value)
    text = (
        f"{value:.{digits - 1}e}"
        if magnitude < 1e-3 or magnitude >= 1e6
        else f"{value:,.{_decimals(magnitude, digits)}f}"
    )
    return text.replace("-", "−")


def count(value: int | None) -> str:
    """12,345."""
    return "–" if value is None else f"{value:,}"


def interval(low: float | None, high: float | None, as_share: bool = True) -> str:
    """`[11.0%, 13.9%]`, or nothing where no interval is known."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    show = percent if as_share else number
    return f"[{show(low)}, {show(high)}]"


def listed(parts: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    if len(parts) <= 1:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def plural(amount: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def duration(seconds: float | None) -> str:
    """8.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _decimals(magnitude: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(magnitude)))
