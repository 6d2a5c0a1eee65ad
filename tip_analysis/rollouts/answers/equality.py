"""Whether the answer of a response is the reference answer: spelling, choice, quantity, number,
then math-verify.

math-verify (Apache-2.0) does the mathematics: it reads LaTeX and simplifies. Around it stands what
it gets wrong for our purpose: it takes 1e-05 for 1·e − 5, ignores units and the case of letters,
rounds every number to 6 decimals however small it is, and reads an answer out of a box that was
never closed or a thought that was never ended.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from tip_analysis.rollouts.answers.choices import read_choice, same_choice, unwrap
from tip_analysis.rollouts.answers.notation import normalize_formula, normalize_numbers, readings
from tip_analysis.rollouts.answers.numerals import Value, read_number, same_number
from tip_analysis.rollouts.answers.quantities import (
    Quantity,
    magnitude,
    read_clock,
    read_quantity,
    unit_ratio,
)
from tip_analysis.rollouts.answers.reading import Answer, read_answer

_MATH_MARKS = ("$", "\\boxed", "\\[", "\\(")
_PERCENT = re.compile(r"\s*(?:\\?%|\bpercent\b|\bpct\b)\s*\.?$", re.IGNORECASE)
_DECIMAL = re.compile(r"\d\.\d|(?<!\d)\.\d")
_COMMAND = re.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_COUNTED = re.compile(
    r"(?P<number>[+-]?[\d,]*\.?\d+)"
    r"(?:(?:\s|\\[ ,]|~)+(?!squared|cubed|factorial|choose|mod)[A-Za-z]{3,})+\.?"
)
"""A number and words for what is counted; not those that make another number of it."""
_SHORT_WORDS = frozenset({"yes", "no", "odd", "one", "two", "six", "ten", "am", "pm", "red"})


def is_correct(response: str, answer: str) -> bool:
    """Whether the last answer that a response gives is the reference answer."""
    found = read_answer(response)
    if found is None:
        return False
    with contextlib.suppress(Exception):  # sympy and its LaTeX parser raise errors of every kind
        return _is_same(answer, found)
    return False


def _is_same(answer: str, found: Answer) -> bool:
    if found.text is not None:
        if same_text(answer, found.text):
            return True
        for reading in readings(found.text):
            verdicts = [_verdict(gold, reading) for gold in readings(_bare(answer))]
            if True in verdicts:
                return True
            if False not in verdicts and _is_same_formula(answer, reading, found):
                return True
        return False
    return _is_same_formula(answer, None, found)


def _bare(answer: str) -> str:
    """A reference answer that is one box is what is in it."""
    inner = re.fullmatch(r"\$*\\boxed\{(.*)\}\$*", answer.strip())
    return inner[1] if inner else answer


def same_text(answer: str, found: str) -> bool:
    """Whether two answers are one text; only words may differ in their case."""
    a, b = (" ".join(unwrap(text).removesuffix(".").split()) for text in (answer, found))
    return a == b or (a.casefold() == b.casefold() and _is_words(a) and _is_words(b))


def _is_words(text: str) -> bool:
    words = re.findall(r"[^\W\d_]+", text)
    is_plain = re.fullmatch(r"[\w\s.,'’:;!?()-]*", text) is not None
    return is_plain and any(_is_word(word) for word in words) and not re.search(r"[\d^=+*/]", text)


def _is_word(word: str) -> bool:
    return len(word) > 3 or word.lower() in _SHORT_WORDS or (len(word) == 3 and word.istitle())


def _verdict(gold: str, found: str) -> bool | None:
    """What choices, quantities and numbers say; None where they cannot tell."""
    if same_text(gold, found):
        return True
    for compare in (_compare_choices, _compare_quantities, _compare_numbers):
        if (verdict := compare(gold, found)) is not None:
            return verdict
    if {_bracket(gold), _bracket(found)} == {"set", "tuple"}:
        return False
    return False if _case_differs(gold, found) else None


def _bracket(text: str) -> str | None:
    """Whether a list is written as a set or as a tuple (or interval); None for anything else."""
    plain = text.replace(r"\left", "").replace(r"\right", "").strip()
    if plain.startswith(r"\{") and plain.endswith(r"\}"):
        return "set"
    return "tuple" if re.fullmatch(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]", plain) else None


def _compare_choices(gold: str, found: str) -> bool | None:
    choice, other = read_choice(gold), read_choice(found)
    if choice and other:
        return same_choice(choice, other)
    if choice and choice.rest:
        return _verdict(choice.rest, found)
    return None


def _compare_quantities(gold: str, found: str) -> bool | None:
    clocks = read_clock(gold), read_clock(found)
    if clocks[0] and clocks[1] and (clocks[0][1] or clocks[1][1]):
        cycle = 1440 if clocks[0][1] and clocks[1][1] else 720
        return (clocks[0][0] - clocks[1][0]) % cycle == 0
    a, b = read_quantity(gold), read_quantity(found)
    if (a is None) != (b is None):  # beside a unit, `5m` has one too
        a, b = (read_quantity(text, letters_are_units=True) for text in (gold, found))
    if a is None or b is None:
        return _compare_numbers_of(a, b, gold, found)
    try:
        ratio = unit_ratio(a, b)
    except ValueError:
        return _same_magnitude(a, b)
    if ratio is None:
        return False
    return _same_multiple(a.parts[0][0], b.parts[0][0], ratio)


def _compare_numbers_of(
    a: Quantity | None, b: Quantity | None, gold: str, found: str
) -> bool | None:
    """A unit on one side only says nothing: the numbers decide."""
    if (a is None) == (b is None) or any(one and len(one.parts) > 1 for one in (a, b)):
        return None
    return _compare_numbers(a.parts[0][0] if a else gold, b.parts[0][0] if b else found)


def _same_multiple(gold: str, found: str, ratio: float) -> bool | None:
    a, b = _value(gold), _value(found)
    if a is None or b is None:
        return None if ratio == 1.0 else False
    if ratio == 1.0:
        return same_number(a, b)
    size, other = _as_float(a) * ratio, _as_float(b)
    return abs(size - other) <= 1e-6 * max(abs(size), abs(other))


def _same_magnitude(a: Quantity, b: Quantity) -> bool | None:
    sizes = []
    for one in (a, b):
        values = [_value(text) for text, _ in one.parts]
        if any(value is None for value in values):
            return None
        sizes.append(magnitude([_as_float(value) for value in values if value], one, like=a))
    if None in sizes:
        return False
    return abs(sizes[0] - sizes[1]) <= 1e-6 * max(1e-300, abs(sizes[0]), abs(sizes[1]))


def _compare_numbers(gold: str, found: str) -> bool | None:
    """Two numbers, either perhaps in percent, or with the word for what is counted."""
    share, other = (_PERCENT.search(text) is not None for text in (gold, found))
    read = _value if share and other else read_number
    a, b = (read(unwrap(_PERCENT.sub("", text))) for text in (gold, found))
    if (a is None) != (b is None):
        a, b = a or _count(gold), b or _count(found)
    if a is None or b is None:
        return None
    if share == other:
        return same_number(a, b)
    if share:
        return same_number(a, b) or same_number(_hundredth(a), b)
    is_whole = a.decimals is None and b.decimals is None
    return same_number(a, _hundredth(b)) or (is_whole and same_number(a, b))


def _count(text: str) -> Value | None:
    """The number of `5000 people`; None where what follows is no plain word."""
    match = _COUNTED.fullmatch(unwrap(text))
    return read_number(match["number"]) if match else None


def _hundredth(value: Value) -> Value:
    return Value(value.number / 100, None if value.decimals is None else value.decimals + 2)


def _case_differs(gold: str, found: str) -> bool:
    """Whether a variable of one is the other's in another case only."""
    a, b = _variables(gold), _variables(found)
    return any(
        letter in a and letter.swapcase() not in a and letter not in b and letter.swapcase() in b
        for letter in a
    )


def _variables(text: str) -> set[str]:
    runs = re.findall(r"[A-Za-z]+", _COMMAND.sub(" ", text))
    return {letter for run in runs if len(run) <= 2 for letter in run}


def _is_same_formula(answer: str, reading: str | None, found: Answer) -> bool:
    """What math-verify says, with numbers compared our way."""
    golds = _parse(answer if _is_marked(answer) else f"${normalize_formula(answer)}$")
    if found.is_boxed:
        targets = _parse(f"$\\boxed{{{reading}}}$")
    else:
        targets = _parse(normalize_numbers(found.response))
    if not golds or not targets:
        return False
    verdict = _compare_values(golds[0], targets[0], answer, reading or found.response)
    return _verify(golds, targets) if verdict is None else verdict


def _is_marked(answer: str) -> bool:
    return any(mark in answer for mark in _MATH_MARKS)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _verify(golds: Sequence[Any], targets: Sequence[Any]) -> bool:
    from math_verify import verify

    rounding = _rounding([*golds, *targets])
    return bool(verify(list(golds), list(targets), float_rounding=rounding, timeout_seconds=None))


def _compare_values(gold: Any, found: Any, gold_text: str, found_text: str) -> bool | None:
    """Numbers, and tuples, sets and intervals of numbers; None for anything else."""
    from sympy import FiniteSet, Interval, Tuple

    if (a := _scalar(gold, gold_text)) and (b := _scalar(found, found_text)):
        return same_number(a, b)
    if isinstance(gold, Interval) and isinstance(found, Interval):
        if (gold.left_open, gold.right_open) != (found.left_open, found.right_open):
            return False
        return _compare_all(gold.args[:2], found.args[:2], gold_text, found_text)
    if isinstance(gold, Tuple) and isinstance(found, Tuple):
        return _compare_all(gold.args, found.args, gold_text, found_text)
    if isinstance(gold, FiniteSet) and isinstance(found, FiniteSet):
        return _compare_all(_sorted(gold.args), _sorted(found.args), gold_text, found_text)
    return None


def _compare_all(
    golds: Sequence[Any], founds: Sequence[Any], gold_text: str, found_text: str
) -> bool | None:
    pairs = [
        (_scalar(gold, gold_text), _scalar(found, found_text))
        for gold, found in zip(golds, founds, strict=False)
    ]
    if not all(a and b for a, b in pairs):
        return None
    return len(golds) == len(founds) and all(same_number(a, b) for a, b in pairs if a and b)


def _sorted(numbers: Iterable[Any]) -> list[Any]:
    numbers = list(numbers)
    is_real = all(number.is_number and number.is_extended_real for number in numbers)
    return sorted(numbers, key=lambda number: number.evalf(30)) if is_real else numbers


def _scalar(expression: Any, text: str) -> Value | None:
    """A finite number of sympy; None for anything else."""
    from sympy import Basic, Expr, Float, Rational, UnevaluatedExpr

    if (plain := read_number(unwrap(text))) is not None:
        return plain
    if not isinstance(expression, Expr) or not expression.is_number:
        return None
    if expression.has(UnevaluatedExpr) or not expression.is_finite:  # a percentage, infinity
        return None
    if isinstance(expression, Float):
        decimals = str(expression).partition(".")[2].rstrip("0")
        return Value(Fraction(str(expression)), len(decimals))
    assert isinstance(expression, Basic)
    has_decimals = expression.has(Float) or _DECIMAL.search(text) is not None
    if isinstance(expression, Rational):
        return Value(Fraction(int(expression.p), int(expression.q)), 0 if has_decimals else None)
    return Value(expression, 0 if has_decimals else None)


def _value(text: str) -> Value | None:
    if (plain := read_number(text)) is not None:
        return plain
    parsed = _parse(f"${text}$")
    return _scalar(parsed[0], text) if parsed else None


def _as_float(value: Value) -> float:
    return float(value.number)


def _rounding(expressions: Iterable[Any]) -> int:
    """Decimals that math-verify rounds to: 6, and so many more that the smallest number keeps 6
    digits."""
    import math

    sizes = [size for expression in expressions for size in _sizes(expression)]
    return 6 + max(0, -math.floor(math.log10(min(sizes)))) if sizes else 6


def _sizes(expression: Any) -> Iterator[float]:
    from sympy import Basic, Expr, Integer, Number

    if not isinstance(expression, Basic):
        return
    parts = [expression, *expression.args, *expression.atoms(Number)]
    for part in parts:
        if isinstance(part, Expr) and part.is_number and not isinstance(part, Integer):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                size = abs(float(part))
                if 1e-300 < size < 1:
                    yield size
