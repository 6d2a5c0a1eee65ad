"""Numbers as words: one spelling for pages, terminals and notebooks.

What is not known reads "–"; minus signs are typographic. Texts from files: `core.text`.
"""

import math
from collections.abc import Sequence


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


def points(share: float | None) -> str:
    """A difference of shares in points, with its sign: 0.012 as +1.2."""
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def brief(value: int) -> str:
    """1234 as 1.2k."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)
