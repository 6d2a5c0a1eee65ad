"""One spelling for what is written in many: digits, fractions, separators of thousands, numbers as
JSON writes them, functions without a backslash."""

import re
import unicodedata
from decimal import Decimal, InvalidOperation

from tip_analysis.rollouts.answers.spellings import spelled_out

_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "°": r"^\circ ", "\N{NO-BREAK SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": r"\,", "\N{THIN SPACE}": r"\,", "′": "'",
}  # fmt: skip
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|\\thinspace\s?|~)(?=\d{3}(?!\d))")
_JSON_NUMBER = re.compile(
    r"(?<![\w.\\])(?P<mantissa>\d+\.\d*|\.\d+|\d+)[eE](?P<exponent>[+-]?\d+)(?![\w.]*\w)"
)
_DOLLARS = re.compile(r"^\$+|(?<!\\)\$+$")
_FUNCTIONS = "exp|ln|log|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|min|max"
_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?=\s*\(|_\{{?\d)")
_NAME = re.compile(r"(?<![\\A-Za-z{])(pi|infty|theta|alpha|beta)(?![A-Za-z(])")
_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_ROOT = re.compile(r"(?<![A-Za-z])\\?sqrt\s*\(|√\s*\(?")
_RADICAND = re.compile(r"[A-Za-z]|\d+(?:\.\d+)?|\\[a-z]+")
MAX_EXPONENT = 400
"""Powers of ten beyond this are not written out."""


def normalize_numbers(text: str) -> str:
    """Digits of any width as 0-9, ½ as a fraction, ² as a power, `1\\,000` as 1000, and numbers as
    JSON and Python write them (1e-05, 6.02e+23) in full."""
    text = _without_forms(text)
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    return _JSON_NUMBER.sub(_in_full, _THOUSANDS.sub("", text))


def normalize_formula(text: str) -> str:
    """An answer that stands alone, in LaTeX: besides numbers, `sqrt(2)`, `pi/2`, `exp(16)`,
    `x**2`."""
    text = spelled_out(_TIMES.sub(r" \\times ", normalize_numbers(without_dollars(text))))
    text = text.replace("**", "^").replace(r"\varnothing", r"\emptyset")
    text = _FUNCTION.sub(lambda match: "\\" + match[1], _with_roots(text))
    return _NAME.sub(lambda match: f"\\{match[1]} ", text).strip()


def without_dollars(text: str) -> str:
    """What stands between dollar signs that open and close mathematics; `\\$` is money."""
    return _DOLLARS.sub("", text.strip()).strip()


def readings(text: str) -> list[str]:
    """A formula, and where `2e-1` may be 0.2 or 2·e − 1, both."""
    as_number = normalize_formula(text)
    if not any(_is_ambiguous(match) for match in _JSON_NUMBER.finditer(text)):
        return [as_number]
    return [as_number, normalize_formula(_JSON_NUMBER.sub(_with_eulers_number, text))]


def _is_ambiguous(match: re.Match[str]) -> bool:
    """Neither JSON nor Python writes an exponent of one digit or a bare integer before it."""
    return "." not in match["mantissa"] and len(match["exponent"].lstrip("+-")) == 1


def _with_eulers_number(match: re.Match[str]) -> str:
    return f"{match['mantissa']} e {match['exponent']}" if _is_ambiguous(match) else match[0]


def _in_full(match: re.Match[str]) -> str:
    try:
        value = Decimal(match[0])
    except InvalidOperation:
        return match[0]
    if abs(value.adjusted()) > MAX_EXPONENT:
        return rf"{match['mantissa']} \cdot 10^{{{int(match['exponent'])}}}"
    return f"{value:f}"


def _without_forms(text: str) -> str:
    pieces: list[str] = []
    for kind, run in _runs(text):
        if kind in ("<super>", "<sub>"):
            mark = "^" if kind == "<super>" else "_"
            pieces.append(f"{mark}{{{unicodedata.normalize('NFKC', run)}}}")
        elif kind == "<fraction>":
            pieces += [
                r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", one).split("⁄"))
                for one in run
            ]
        else:
            pieces.append(unicodedata.normalize("NFKC", run) if kind == "<wide>" else run)
    return "".join(pieces)


def _runs(text: str) -> list[tuple[str, str]]:
    """Pieces of a text by the form that Unicode gives their characters."""
    runs: list[tuple[str, str]] = []
    for character in text:
        kind = _form(character)
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + character)
        else:
            runs.append((kind, character))
    return runs


def _form(character: str) -> str:
    if character < "\x80":
        return ""
    form = unicodedata.decomposition(character).split(" ")[0]
    if form == "<fraction>" and not unicodedata.normalize("NFKC", character).endswith("⁄"):
        return form
    return form if form in ("<super>", "<sub>", "<wide>") else ""


def _with_roots(text: str) -> str:
    """`sqrt(x)`, `√(x)` and `√x` as `\\sqrt{x}`; a bracket that is not closed is left alone."""
    pieces: list[str] = []
    position = 0
    while match := _ROOT.search(text, position):
        pieces.append(text[position : match.start()])
        inner, position = _radicand(text, match)
        pieces.append(match[0] if inner is None else rf"\sqrt{{{inner}}}")
    return "".join([*pieces, text[position:]])


def _radicand(text: str, match: re.Match[str]) -> tuple[str | None, int]:
    start = match.end()
    if not match[0].endswith("("):
        single = _RADICAND.match(text, start)
        return (single[0], single.end()) if single else (None, start)
    depth = 1
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return _with_roots(text[start:index]), index + 1
    return None, start
