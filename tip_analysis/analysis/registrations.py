"""Hypotheses that were written down before a run, read from TOML and tested together.

```toml
run = "runs/mine"                   # optional: from the file's own folder
correction = "holm"                 # or "bonferroni"; holm by default
confidence = 0.95                   # of all claims together

[[claim]]
name = "overconfident tokens are enough"
arms = ["q3:0.1", "all"]            # A and B, arms of the run's ablation
figure = "accuracy"                 # accuracy, best_at_k, heldout_reverse_kl
direction = "≈"                     # ">", "<" or "≈": A against B
margin = 0.02
benchmark = "math500"               # optional: needed where there are several

[[claim]]
name = "errors are where the student is sure"
groups = ["incorrect", "correct"]   # A and B, groups of tokens
grouping = "correct"                # quadrant, or a name of `groupings.GROUPINGS`
figure = "reverse_kl"               # a number of every token: its mean over each group
direction = ">"
margin = 0.0
```

What the directions mean, and how claims are judged together: `hypotheses`.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.groupings import GROUPINGS
from tip_analysis.core.errors import OptionError, TipAnalysisError
from tip_analysis.core.names import Correction, Quadrant
from tip_analysis.core.text import first_line, one_line

DIRECTIONS = (">", "<", "≈")
ARM_FIGURES = ("accuracy", "best_at_k", "heldout_reverse_kl")
LARGEST_FILE = 1_000_000
MOST_CLAIMS = 1000
QUADRANT = "quadrant"


@dataclass(frozen=True)
class Hypothesis:
    """One claim: A against B in one figure."""

    name: str
    first: str
    second: str
    figure: str
    direction: str
    margin: float = 0.0
    grouping: str | None = None
    """What A and B are groups of; None for arms."""
    benchmark: str | None = None

    def words(self) -> str:
        """`accuracy: q3:0.1 ≈ all (margin 0.02)`."""
        where = "" if self.benchmark is None else f" on {self.benchmark}"
        margin = f" (margin {self.margin:g})" if self.margin else ""
        return f"{self.figure}{where}: {self.first} {self.direction} {self.second}{margin}"


@dataclass(frozen=True)
class Registration:
    """A file of hypotheses."""

    claims: tuple[Hypothesis, ...]
    correction: Correction = Correction.HOLM
    confidence: float = 0.95
    run: Path | None = None
    """The run folder that the file names."""


def read_hypotheses(path: str | Path) -> Registration:
    """The hypotheses of a TOML file.

    Raises:
        OptionError: it cannot be read, or something in it is not as it should be; one line that
            names the key, what was expected and what was found.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise OptionError(f"{path}: expected at most {LARGEST_FILE:,} bytes")
        found = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({first_line(error)})") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: no TOML ({first_line(error)})") from error
    reader = _Reader(str(path))
    return reader.registration(found)


class _Reader:
    """Turns what TOML holds into hypotheses, and names what is wrong by its place."""

    def __init__(self, path: str) -> None:
        self.path = path

    def registration(self, found: Mapping[str, Any]) -> Registration:
        self._only(found, {"claim", "correction", "confidence", "run", "title"}, "")
        listed = found.get("claim")
        if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_CLAIMS:
            raise self._error("claim", f"1 to {MOST_CLAIMS:,} tables [[claim]]", listed)
        claims = tuple(self._claim(entry, f"claim[{i}]") for i, entry in enumerate(listed))
        names = [claim.name for claim in claims]
        for index, name in enumerate(names):
            if name in names[:index]:
                self._wrong(f"claim[{index}].name", "a name of its own", name)
        correction = found.get("correction", Correction.HOLM.value)
        if correction not in list(Correction):
            self._wrong("correction", " or ".join(Correction), correction)
        confidence = self._number(found.get("confidence", 0.95), "confidence", 0.5, 0.9999)
        run = Path(self._text(found["run"], "run")) if "run" in found else None
        place = None if run is None else Path(self.path).parent / run
        return Registration(claims, Correction(correction), confidence, place)

    def _claim(self, entry: Any, at: str) -> Hypothesis:
        if not isinstance(entry, Mapping):
            self._wrong(at, "a table", entry)
        of_arms = "arms" in entry
        if of_arms == ("groups" in entry):
            self._wrong(at, "either arms or groups", sorted(map(str, entry)))
        sides, more = ("arms", {"benchmark"}) if of_arms else ("groups", {"grouping"})
        self._only(entry, {"name", sides, "figure", "direction", "margin"} | more, f"{at}.")
        first, second = self._pair(entry[sides], f"{at}.{sides}")
        direction = self._text(entry.get("direction"), f"{at}.direction")
        if direction not in DIRECTIONS:
            self._wrong(f"{at}.direction", " or ".join(DIRECTIONS), direction)
        margin = self._number(entry.get("margin", 0.0), f"{at}.margin", 0.0, 1e6)
        if direction == "≈" and margin == 0.0:
            self._wrong(f"{at}.margin", "a number above 0 for ≈", margin)
        claim = Hypothesis(
            name=self._text(entry.get("name"), f"{at}.name"),
            first=first,
            second=second,
            figure=self._text(entry.get("figure"), f"{at}.figure"),
            direction=direction,
            margin=margin,
            grouping=None if of_arms else self._grouping(entry, at),
            benchmark=self._text(entry["benchmark"], f"{at}.benchmark")
            if "benchmark" in entry
            else None,
        )
        self._check_sides(claim, f"{at}.{sides}")
        return claim

    def _grouping(self, entry: Mapping[str, Any], at: str) -> str:
        name = self._text(entry.get("grouping", QUADRANT), f"{at}.grouping")
        if name != QUADRANT and name not in GROUPINGS:
            self._wrong(f"{at}.grouping", ", ".join((QUADRANT, *GROUPINGS)), name)
        return name

    def _check_sides(self, claim: Hypothesis, at: str) -> None:
        if claim.first == claim.second:
            self._wrong(at, "two different ones", [claim.first, claim.second])
        if claim.grouping is None:
            if claim.figure not in ARM_FIGURES:
                self._wrong(at.replace(".arms", ".figure"), ", ".join(ARM_FIGURES), claim.figure)
            for index, side in enumerate((claim.first, claim.second)):
                try:
                    Arm.parse(side)
                except TipAnalysisError as error:
                    raise OptionError(f"{self.path}: {at}[{index}]: {first_line(error)}") from error
            return
        known = list(Quadrant) if claim.grouping == QUADRANT else GROUPINGS[claim.grouping].names
        for index, side in enumerate((claim.first, claim.second)):
            if side not in known:
                self._wrong(f"{at}[{index}]", f"a group of {claim.grouping!r}", side)

    def _pair(self, value: Any, at: str) -> tuple[str, str]:
        if not isinstance(value, list) or len(value) != 2:
            self._wrong(at, "two texts", value)
        return self._text(value[0], f"{at}[0]"), self._text(value[1], f"{at}[1]")

    def _text(self, value: Any, at: str) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > 500:
            self._wrong(at, "a text of 1 to 500 characters", value)
        return value

    def _number(self, value: Any, at: str, low: float, high: float) -> float:
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not math.isfinite(value) or not low <= value <= high:
            self._wrong(at, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def _only(self, found: Mapping[str, Any], known: set[str], prefix: str) -> None:
        for name in found:
            if name not in known:
                raise OptionError(
                    f"{self.path}: {prefix}{one_line(name, 60)}: there is no such key; expected"
                    f" {', '.join(sorted(known))}"
                )

    def _wrong(self, at: str, expected: str, found: Any) -> Any:
        raise self._error(at, expected, found)

    def _error(self, at: str, expected: str, found: Any) -> OptionError:
        shown = "nothing" if found is None else one_line(repr(found), 80)
        return OptionError(f"{self.path}: {at}: expected {expected}, found {shown}")
