"""Ranges of the numeric options: declared with each option, shown in `--help`, and checked once
before anything is loaded.

An option's type carries its range, as in `Annotated[int, COUNT, COUNT.parser()]`. What a user types
is kept as text where it is no number, so that `check_options` says the same of `0`, `nan` and
`many`: one line with the option, what it takes, and what was found.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from tip_analysis.core.errors import OptionError
from tip_analysis.core.text import one_line

Value = int | float | str


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, both ends included unless `above` or `below` says
    otherwise."""

    low: float
    high: float
    whole: bool = True
    above: bool = False
    """Whether `low` itself is left out."""
    below: bool = False
    """Whether `high` itself is left out."""
    names: tuple[str, ...] = ()
    """Texts that are taken beside numbers."""
    quantiles: bool = False
    """Whether `q0.8` is taken beside numbers."""

    def read(self, text: str) -> Value:
        """The number that a text is, or the text as it stands for `problem` to judge."""
        if text in self.names:
            return text
        try:
            return int(text) if self.whole else float(text)
        except ValueError:
            return text

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        read = self.read(value) if isinstance(value, str) else value
        if isinstance(read, str):
            fine = read in self.names or self._quantile(read)
        else:
            fine = self._holds(read)
        return None if fine else f"expected {self.words()}, found {one_line(repr(value), 40)}"

    def _holds(self, number: float) -> bool:
        if not math.isfinite(number):
            return False
        over = number > self.low if self.above else number >= self.low
        under = number < self.high if self.below else number <= self.high
        return over and under

    def _quantile(self, text: str) -> bool:
        if not (self.quantiles and text.startswith("q")):
            return False
        try:
            return 0.0 <= float(text[1:]) <= 1.0
        except ValueError:
            return False

    def words(self) -> str:
        """The range for a message: `a whole number from 1 to 10,000`."""
        number = "a whole number" if self.whole else "a number"
        low = f"above {_plain(self.low)}" if self.above else f"of at least {_plain(self.low)}"
        high = f"below {_plain(self.high)}" if self.below else f"at most {_plain(self.high)}"
        forms = [*self.names, *(["a quantile such as q0.8"] if self.quantiles else [])]
        return ", ".join([*forms, f"or {number}" if forms else number]) + f" {low} and {high}"

    def metavar(self) -> str:
        """The range for `--help`: `INT>=1`, `INT[1..10000]`, `NUMBER(0..1]`."""
        kind = "INT" if self.whole else "NUMBER"
        left, right = "(" if self.above else "[", ")" if self.below else "]"
        numbers = f"{kind}{left}{_plain(self.low, '')}..{_plain(self.high, '')}{right}"
        if self.high == MANY:
            numbers = f"{kind}>={_plain(self.low, '')}"
        return "|".join([*self.names, *(["q[0..1]"] if self.quantiles else []), numbers])

    def parser(self) -> PrimitiveConstructorSpec[Any]:
        """How tyro reads such an option."""
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=self.metavar(),
            instance_from_str=lambda texts: texts[0] if self.names else self.read(texts[0]),
            is_instance=lambda value: value is None or isinstance(value, int | float | str),
            str_from_instance=lambda value: [str(value)],
        )


def _plain(number: float, separator: str = ",") -> str:
    if number == int(number):
        return format(int(number), separator)
    return f"{number:g}"


def check_options(command: Any) -> None:
    """Check every option of a parsed command that has a range, and that every text is text.

    Raises:
        OptionError: the first that is out of its range; the message says what it takes.
    """
    for name, value, declared in _options(command):
        for item in value if isinstance(value, tuple) else (value,):
            problem = _problem(item, declared)
            if problem is not None:
                raise OptionError(f"{name}: {problem}")


def _problem(value: Any, declared: Range | None) -> str | None:
    if isinstance(value, str | Path) and any("\ud800" <= mark <= "\udfff" for mark in str(value)):
        return f"expected text in UTF-8, found {one_line(str(value), 80)}"
    if isinstance(value, str | Path) and "\0" in str(value):
        return f"expected text without null characters, found {one_line(str(value), 80)}"
    return None if declared is None or value is None else declared.problem(value)


def ranges_of(command: type) -> dict[str, Range]:
    """The options of a command that have a range, by the name that is typed."""
    found = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        group = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if is_dataclass(group):
            found |= ranges_of(group)  # pyright: ignore[reportArgumentType]
        elif (declared := _range_in(hint)) is not None:
            found[typed_name(name)] = declared
    return found


def _options(command: Any) -> Iterator[tuple[str, Any, Range | None]]:
    declared = ranges_of(type(command))
    for field in fields(command):
        value = getattr(command, field.name)
        if is_dataclass(value):
            yield from _options(value)
        else:
            name = typed_name(field.name)
            yield _shown_name(command, field.name), value, declared.get(name)


def _range_in(hint: Any) -> Range | None:
    """The range in a type, also in that of a tuple's items."""
    if get_origin(hint) is Annotated:
        for extra in get_args(hint)[1:]:
            if isinstance(extra, Range):
                return extra
    return next((found for part in get_args(hint) if (found := _range_in(part))), None)


def _shown_name(command: Any, field: str) -> str:
    """An option as it is typed, or what stands for a positional argument in `--help`."""
    hint = get_type_hints(type(command), include_extras=True)[field]
    is_positional = get_origin(hint) is Annotated and Positional in get_args(hint)
    return field.upper().removesuffix("S") if is_positional else typed_name(field)


def typed_name(field: str) -> str:
    """A field as it is typed: `--num-rollouts`."""
    return f"--{field.strip('_').replace('_', '-')}"


MANY = 10**9
"""The largest count: token positions and step numbers are int32 in the tables."""

COUNT = Range(1, MANY)
COUNT_OR_NONE = Range(0, MANY)
FEW = Range(1, 10_000)
PROCESSES = Range(1, 1024)
SEED = Range(0, 2**32 - 1)
SHARE = Range(0, 1, whole=False, above=True)
PART = Range(0, 1, whole=False)
INNER = Range(0, 1, whole=False, above=True, below=True)
FRACTION = Range(0, 1, whole=False, below=True)
NATS = Range(0, 1e4, whole=False)
POSITIVE = Range(0, 1e6, whole=False, above=True)
SECONDS = Range(0, MANY, whole=False)
WAIT = Range(0, 86_400, whole=False, above=True)
TEMPERATURE = Range(0, 100, whole=False)
RATE = Range(0, 10, whole=False)
RANK = Range(0, 4096)
TOY_PROMPTS = Range(1, 50_000)
TOP_K = Range(1, 1000)
CUT = Range(0, 1e4, whole=False, names=("median", "mean", "otsu", "paper"), quantiles=True)

Count = Annotated[int, COUNT, COUNT.parser()]
CountOrNone = Annotated[int, COUNT_OR_NONE, COUNT_OR_NONE.parser()]
Few = Annotated[int, FEW, FEW.parser()]
Processes = Annotated[int, PROCESSES, PROCESSES.parser()]
Seed = Annotated[int, SEED, SEED.parser()]
Share = Annotated[float, SHARE, SHARE.parser()]
Part = Annotated[float, PART, PART.parser()]
Temperature = Annotated[float, TEMPERATURE, TEMPERATURE.parser()]
ToyPrompts = Annotated[int, TOY_PROMPTS, TOY_PROMPTS.parser()]
Wait = Annotated[float, WAIT, WAIT.parser()]
TopK = Annotated[int, TOP_K, TOP_K.parser()]
Cut = Annotated[str, CUT, CUT.parser()]
SomeSeconds = Annotated[float | None, SECONDS, SECONDS.parser()]
Ratios = Annotated[tuple[Share, ...], arg(metavar=f"{SHARE.metavar()} [...]")]
Seeds = Annotated[tuple[Seed, ...], arg(metavar=f"{SEED.metavar()} [...]")]

SomeCount = Annotated[int | None, COUNT, COUNT.parser()]
SomeCountOrNone = Annotated[int | None, COUNT_OR_NONE, COUNT_OR_NONE.parser()]
SomeFew = Annotated[int | None, FEW, FEW.parser()]
SomeProcesses = Annotated[int | None, PROCESSES, PROCESSES.parser()]
SomeRank = Annotated[int | None, RANK, RANK.parser()]
SomeShare = Annotated[float | None, SHARE, SHARE.parser()]
SomeInner = Annotated[float | None, INNER, INNER.parser()]
SomeFraction = Annotated[float | None, FRACTION, FRACTION.parser()]
SomeNats = Annotated[float | None, NATS, NATS.parser()]
SomeCut = Annotated[str | None, CUT, CUT.parser()]
SomePositive = Annotated[float | None, POSITIVE, POSITIVE.parser()]
SomeRate = Annotated[float | None, RATE, RATE.parser()]
