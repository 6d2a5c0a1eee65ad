"""Numbers with units: `5\\text{ m}`, `90^\\circ`, `\\$5`, `60 miles per hour`, `5 ft 6 in`, `5 pm`.

What a unit is and how it converts, pint knows. A word that is no unit (`5 apples`) does not make a
quantity: the number alone is compared.
"""

import itertools
import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pint import UnitRegistry

_FONT = r"\\(?:text(?:bf|rm|it|sf)?|math(?:rm|bf|sf|it)|mbox|operatorname|rm|unit|si)"
_WRAPPED = re.compile(rf"{_FONT}\s*\{{([^{{}}]*)\}}|\\rm\b")
_DEGREE = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree\b")
_LETTERS = r"[A-Za-zµμΩ§%]++\.?+(?:\^\{?-?\d++\}?)?+"
_EXPRESSION = re.compile(  # possessive: nothing that fails is tried a second way
    r"(?:\d[\d,]*+(?:\.\d*+)?+|\.\d++|\\[dt]?frac(?:\{[^{}]*+\}\{[^{}]*+\}|\d\d)"
    r"|\\pi(?![A-Za-z])|\\sqrt(?:\[[^\]]*+\])?+\{[^{}]*+\}|\\cdot(?=\s*\d)|\\times"
    r"|\^\{-?\d++\}|\^-?\d++|[-+*/()](?!\s*[A-Za-z])|\s)++"
)
_UNIT = re.compile(
    rf"(?:{_LETTERS}|\s|/|\\cdot(?!\s*\d)|\*|\\,|\\ |~|\((?=[^()]*+\)))"
    rf"(?:{_LETTERS}|[\s/*()~]|\\cdot(?!\s*\d)|\\,|\\ )*+"
)
_WORD = re.compile(r"(?P<word>[A-Za-zµμΩ§]+)\.?(?:\^\{?(?P<power>-?\d+)\}?)?|(?P<mark>[/*()])")
_TEMPERATURE = re.compile(r"\bdegrees?\s+(celsius|fahrenheit)\b", re.IGNORECASE)
_TRAILING = re.compile(rf"(?P<number>.+?)(?P<unit>{_FONT}\s*\{{[^{{}}]*\}}(?:\^\{{?-?\d\}}?)?)")
_CURRENCIES = {
    r"\$": "dollar", "$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee",
}  # fmt: skip
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))?\s*(?:(?P<half>[ap])\.?\s*m\.?)?", re.IGNORECASE
)
_SPELLINGS = {
    "§": "degree", "§C": "degC", "§F": "degF", "mins": "minute", "sqft": "foot ** 2",
    "kph": "kilometer / hour", "rupees": "rupee",
}  # fmt: skip
_NO_UNITS = frozenset(
    {"a", "A", "am", "AM", "pm", "PM", "B", "c", "e", "i", "u", "x", "y", "z", "n", "k"}
    | {"unit", "units", "Unit", "Units", "point", "points", "mark", "marks", "count", "counts"}
    | {"hand", "hands", "stone", "turn", "turns", "sheet", "sheets", "bar", "bars", "at", "slug"}
    | {"slugs", "rod", "rods", "chain", "chains", "link", "links", "cup", "cups", "mil", "mils"}
    | {"pica", "dot", "dots", "pixel", "pixels"}
)
"""Words that pint takes for units and answers use for what is counted."""


class Quantity(NamedTuple):
    """A number and its unit."""

    parts: tuple[tuple[str, Any], ...]
    """Each number as it is written, with its unit of pint; they add up (`5 ft 6 in`)."""


def read_quantity(text: str, *, letters_are_units: bool = False) -> Quantity | None:
    """A number with a unit that is known; None for anything else.

    Args:
        text: The answer.
        letters_are_units: Whether the letter of `5m` is a unit; else it is a variable.
    """
    plain = _plain(text)
    for sign, currency in _CURRENCIES.items():
        bare = plain.removeprefix(sign) if plain.startswith(sign) else plain.removesuffix(sign)
        if bare != plain and _EXPRESSION.fullmatch(bare):
            return Quantity(((bare.strip(), _registry().Unit(currency)),))
    parts = tuple(_parts(plain, letters_are_units))
    if parts and all(unit is not None for _, unit in parts):
        return Quantity(parts)
    trailing = _TRAILING.fullmatch(text.strip())
    unit = _unit(_plain(trailing["unit"])) if trailing else None
    return Quantity(((trailing["number"], unit),)) if trailing and unit is not None else None


def read_clock(text: str) -> tuple[int, bool] | None:
    """A time of day in minutes and whether it says am or pm; None for anything else."""
    match = _CLOCK.fullmatch(_plain(text))
    if match is None or (match["minute"] is None and match["half"] is None):
        return None
    hour, minute = int(match["hour"]), int(match["minute"] or 0)
    if match["half"] is not None:
        hour = hour % 12 + (12 if match["half"].lower() == "p" else 0)
    return hour * 60 + minute, match["half"] is not None


def unit_ratio(gold: Quantity, found: Quantity) -> float | None:
    """How many of the second's unit one of the first's is, for two single numbers on scales that
    begin at 0; None where they do not measure the same thing.

    Raises:
        ValueError: only `magnitude` can compare these.
    """
    (_, unit), *more = gold.parts
    (_, other), *others = found.parts
    if unit.dimensionality != other.dimensionality:
        return None
    if more or others or not (_is_plain(unit) and _is_plain(other)):
        raise ValueError("a sum of units, or degrees of temperature")
    return 1.0 if unit == other else float(_registry().Quantity(1.0, unit).to(other).magnitude)


def magnitude(numbers: list[float], quantity: Quantity, like: Quantity) -> float | None:
    """The size of a quantity in the first unit of another; None where it does not convert."""
    import pint

    target = like.parts[0][1]
    try:
        sizes = [
            float(_registry().Quantity(number, unit).to(target).magnitude)
            for number, (_, unit) in zip(numbers, quantity.parts, strict=True)
        ]
    except pint.PintError:
        return None
    return sum(sizes)


def _plain(text: str) -> str:
    """Without fonts, and with § for a degree."""
    text = _DEGREE.sub("§", text.replace("°", "§"))
    while (bare := _WRAPPED.sub(r" \1 ", text)) != text:
        text = bare
    text = re.sub(r"§\s+(?=[CF](?![A-Za-z]))", "§", text.replace("~", " ").replace("\\,", " "))
    text = re.sub(r"(?<!\\)\\ ", " ", text).replace("{}", "")
    return re.sub(r"\s*\^\s*", "^", text).strip().removesuffix(".")


def _parts(text: str, letters_are_units: bool) -> Iterator[tuple[str, Any]]:
    position = 0
    while position < len(text):
        number = _EXPRESSION.match(text, position)
        unit = _UNIT.match(text, number.end()) if number and number[0].strip() else None
        if number is None or unit is None:
            yield "", None
            return
        is_product = not number[0][-1].isspace() and re.fullmatch(r"[A-Za-z]\s*", unit[0])
        known = None if is_product and not letters_are_units else _unit(unit[0])
        yield number[0].strip(), known
        position = unit.end()


@cache
def _unit(text: str) -> Any:
    """The unit that a text names; None for one that is not known."""
    import pint

    words = _words(_TEMPERATURE.sub(r"\1", text))
    if words is None:
        return None
    try:
        return _registry().Unit(words)
    except (pint.PintError, ValueError, TypeError, SyntaxError, AttributeError, ZeroDivisionError):
        return None


def _words(text: str) -> str | None:
    """The text in pint's spelling: `square meters per second` is `meter ** 2 / second`."""
    terms: list[str] = []
    power = ""
    for match in _WORD.finditer(text):
        word, mark = match["word"], match["mark"]
        if mark or word.lower() == "per":
            terms.append(mark or "/")
        elif word.lower() in ("square", "sq", "squared", "cubic", "cubed"):
            exponent = "3" if word.lower().startswith("cub") else "2"
            if word.endswith("d") and terms:
                terms[-1] += f" ** {exponent}"
            else:
                power = f" ** {exponent}"
        elif (name := _name(word)) is None:
            return None
        else:
            exponent = f" ** {match['power']}" if match["power"] else power
            power = ""
            terms.append(f"{name}{exponent}")
    return _joined(terms) if terms else None


def _joined(terms: list[str]) -> str:
    joined = terms[0]
    for before, term in itertools.pairwise(terms):
        is_sign = term in "/*()" or before in "/*("
        joined += f" {term}" if is_sign else f" * {term}"
    return joined


def _name(word: str) -> str | None:
    if word in _SPELLINGS:
        return _SPELLINGS[word]
    for spelling in (word, word.lower()):
        if spelling in _NO_UNITS:
            return None
        if spelling in _SPELLINGS:
            return _SPELLINGS[spelling]
        if _is_unit(spelling):
            return spelling
    return None


def _is_unit(word: str) -> bool:
    """Whether pint knows a word, other than as an unlikely prefix before the plural of a symbol
    (`cats` are not centi-atmospheres)."""
    registry = _registry()
    found = registry.parse_unit_name(word)
    if not found:
        return False
    prefix, name, _ = found[0]
    if not prefix or word.startswith(prefix):
        return True
    return word.endswith(registry.get_symbol(name)) and registry.get_symbol(name) != name


def _is_plain(unit: Any) -> bool:
    return str(unit) not in ("degree_Celsius", "degree_Fahrenheit")


@cache
def _registry() -> "UnitRegistry":
    import pint

    registry = pint.UnitRegistry(on_redefinition="ignore")
    for line in (
        "dollar = [dollars] = _ = dollars = USD", "cent = 0.01 * dollar = _ = cents",
        "euro = [euros] = _ = euros = EUR", "sterling = [sterling] = _ = GBP",
        "yen = [yen] = _ = JPY", "rupee = [rupees] = _ = INR",
    ):  # fmt: skip
        registry.define(line)
    return registry
