"""Numbers that are spelt in other ways than plain digits: words, groups of three, repeating
decimals, mixed fractions, millions."""

import re
from decimal import Decimal
from fractions import Fraction

_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {word: str(value) for value, word in enumerate(_UNITS)} | {
    f"{ten}{joint}{unit}": str(10 * tens + ones)
    for tens, ten in enumerate(_TENS, start=2)
    for ones, unit in enumerate(["", *_UNITS[1:10]])
    for joint in (("-", " ") if ones else ("",))
}
"""Numbers below a hundred by their words."""

_PRINTED = re.compile(r"^\\(?:text(?:bf|rm|it)?|mathrm|mbox)\s*\{([^{}]*)\}$")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(
    r"(?<![\w.])(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?:\s|\\[ ,]|~)*"
    rf"(?:\\text\s*\{{\s*(?P<printed>{'|'.join(_SCALES)})\s*\}}|(?P<plain>{'|'.join(_SCALES)})\b)",
    re.IGNORECASE,
)
_GROUPED = re.compile(
    r"[+-]?\d{1,3}(?:(?: \d{3})+|(?:_\d{3})+|(?:'\d{3})+)(?![\d_'])(?=\.\d|\s*(?:$|[A-Za-z\\%^]))"
)
_REPEATING = re.compile(
    r"(?<![\d.])(?P<whole>\d*)\.(?P<fixed>\d*)"
    r"(?:\\(?:overline|bar|dot|overset\{-\})\s*(?:\{(?P<braced>\d+)\}|(?P<single>\d))"
    r"|\((?P<bracketed>\d+)\))(?!\d)"
)
_MIXED = re.compile(
    r"(?<![\w./^}\\])(?P<whole>\d+)"
    r"(?:\s*\\[dtc]?frac\s*(?:\{\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"
    r"|(?P<short>\d\d)(?!\d))"
    r"|\s+(?P<upper>\d+)\s*/\s*(?P<lower>\d+)(?![\w/.]))"
)
_EITHER_SIGN = re.compile(
    r"(?P<name>\s*[A-Za-z]\s*=)?(?P<left>[^,]*?)\\pm(?![A-Za-z])(?P<right>[^,]*)"
)


def spelled_out(text: str) -> str:
    """An answer that stands alone, with the numbers in it as LaTeX would write them: `seven` as 7,
    `12 345` as 12345, `0.\\overline{3}` as a third, `1 1/2` as three halves, `a \\pm b` as two
    numbers."""
    text = WORDS.get(" ".join(_PRINTED.sub(r"\1", text).lower().split()), text)
    text = _GROUPED.sub(lambda match: re.sub(r"[ _']", "", match[0]), text, count=1)
    text = _SCALED.sub(_times, text)
    text = _REPEATING.sub(_as_fraction, text)
    return _with_both_signs(_MIXED.sub(_as_one_fraction, text))


def _as_one_fraction(match: re.Match[str]) -> str:
    top, bottom = match["short"] or (
        match["top"] or match["upper"],
        match["bottom"] or match["lower"],
    )
    if int(top) >= int(bottom):  # no mixed number has such a part: a product, or a slip
        return match[0]
    return rf"\frac{{{int(match['whole']) * int(bottom) + int(top)}}}{{{bottom}}}"


def _with_both_signs(text: str) -> str:
    match = _EITHER_SIGN.fullmatch(text)
    if match is None or r"\pm" in match["left"] + match["right"] or r"\mp" in text:
        return text
    left, right = match["left"], match["right"]
    return f"{match['name'] or ''}{left}{'+' * bool(left.strip())}{right},{left}-{right}"


def _times(match: re.Match[str]) -> str:
    number = Decimal(match["number"].replace(",", ""))
    scale = match["printed"] or match["plain"]
    return f"{number.scaleb(_SCALES[scale.lower()]):f}"


def _as_fraction(match: re.Match[str]) -> str:
    whole, fixed = match["whole"], match["fixed"]
    period = match["braced"] or match["single"] or match["bracketed"]
    head = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    value = head + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
