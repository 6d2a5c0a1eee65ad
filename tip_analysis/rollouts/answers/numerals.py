"""Numbers, exact or rounded, compared relative to their size."""

import re
from fractions import Fraction
from typing import Any, NamedTuple

RELATIVE_TOLERANCE = 1e-7
"""Two numbers, one of them a decimal fraction, are equal within this share of the larger."""
INTEGER_TOLERANCE = 5e-7
"""A decimal fraction that stands for an integer is no farther from it."""
MIN_DECIMALS, MIN_DIGITS = 6, 5
"""A decimal fraction of so many decimals and significant digits may be a rounded number."""

_NUMBER = re.compile(r"(?P<sign>[+-]?)\s*(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<decimals>\d*))?")


class Value(NamedTuple):
    """A number and how it was written."""

    number: Any
    """Exact: a Fraction, or an expression of sympy."""
    decimals: int | None
    """Digits after the point; None for a number that is written exactly."""


def read_number(text: str) -> Value | None:
    """A number in digits (`-1,234.50`); None for anything else."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or not (match["whole"] or match["decimals"]):
        return None
    whole, decimals = match["whole"].replace(",", "") or "0", match["decimals"]
    number = Fraction(f"{match['sign']}{whole}.{decimals or 0}")
    return Value(number, None if decimals is None else len(decimals))


def same_number(a: Value, b: Value) -> bool:
    """Exact numbers are equal or not; a decimal fraction equals what is within 1e-7 of it, or what
    rounds to it at 6 decimals or more."""
    if isinstance(a.number, Fraction) and isinstance(b.number, Fraction):
        difference, size = abs(a.number - b.number), max(abs(a.number), abs(b.number))
    else:
        difference, size = _difference(a.number, b.number)
    if difference == 0:
        return True
    if a.decimals is None and b.decimals is None:
        is_rational = isinstance(a.number, Fraction) and isinstance(b.number, Fraction)
        return not is_rational and bool(difference <= size * 1e-30)
    limit = RELATIVE_TOLERANCE * size
    if any(_is_integer(value) for value in (a, b)):
        return bool(difference <= min(limit, INTEGER_TOLERANCE))
    return bool(difference <= limit) or any(_is_rounded(one, difference) for one in (a, b))


def _difference(a: Any, b: Any) -> tuple[Any, Any]:
    """|a − b| and the larger of |a| and |b|, to 60 digits."""
    from sympy import N, Rational

    x, y = (
        N(Rational(one.numerator, one.denominator) if isinstance(one, Fraction) else one, 60)
        for one in (a, b)
    )
    return abs(x - y), max(abs(x), abs(y))


def _is_integer(value: Value) -> bool:
    number = value.number
    is_whole = number.denominator == 1 if isinstance(number, Fraction) else number.is_integer
    return value.decimals is None and bool(is_whole)


def _is_rounded(value: Value, difference: Any) -> bool:
    if value.decimals is None or value.decimals < MIN_DECIMALS:
        return False
    unit = Fraction(1, 10**value.decimals)
    if not isinstance(value.number, Fraction) or abs(value.number) < unit * 10 ** (MIN_DIGITS - 1):
        return False
    return bool(difference <= float(unit) * 0.5 * (1 + 1e-9))
