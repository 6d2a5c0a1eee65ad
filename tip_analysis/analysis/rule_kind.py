"""What must be known of a selection rule: its score, and how tokens are chosen by it.

Reads and writes nothing. What a rule needs and gives is declared, never found out by calling it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tip_analysis.analysis.score_functions import RecordedColumns
from tip_analysis.core.atomic_files import first_line
from tip_analysis.core.errors import RuleError, TipAnalysisError

ENTROPY_COLUMNS = frozenset({"student_entropy", "student_entropy_norm", "entropy_hat"})
"""Columns that say nothing but the student's entropy."""


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen: the k with the largest score, or k drawn with probability ∝ score."""

    name: str
    score: Callable[[Any], Any]
    """From the columns of the table to one number a token: a polars expression, or values."""
    sampled: bool = False
    """The score is a weight ≥ 0, and tokens are drawn without replacement: a mask has a seed."""
    description: str = ""
    complete: bool = True
    """Every token has this score by the table's contract; elsewhere it is checked."""
    values: bool = False
    """`score` takes the collected DataFrame and gives [N] numbers; else it takes columns as
    expressions and gives an expression."""
    columns: frozenset[str] = frozenset()
    """What a rule of values reads, where it is declared."""
    partial: bool = False
    """A token without a score is no candidate: it is never selected, and a mask may hold fewer than
    k tokens."""
    window: bool = False
    """Neighbouring tokens are taken, at a place that is drawn for each rollout: a mask has a seed,
    and the score is not read."""
    weight: Callable[[Any], Any] | None = None
    """What a token weighs where the rule is a weighting, ≥ 0; by default its score."""
    of_batch: bool = False
    """The score of a token depends on the other tokens of its batch."""
    keeps_all: bool = False
    """Every token is selected, whatever ρ: there is one mask, at ρ = 1."""
    needs_gradients: bool = False
    """It selects among the tokens whose gradients were measured, and no others."""
    reference: str = ""
    """What it is to read other rules against, such as `lower reference`; empty for a rule that is
    meant to be used."""
    reference_of: str = ""
    """The column whose sum it is a reference for; empty for any."""

    @property
    def has_seed(self) -> bool:
        """Whether another seed gives another mask."""
        return self.sampled or self.window

    @property
    def is_reference(self) -> bool:
        """Whether it is there to read other rules against."""
        return bool(self.reference)

    def reference_for(self, columns: Iterable[str]) -> str:
        """`reference` where the sum is of one of these columns, else nothing: top-k of φ bounds Σφ
        and no other sum."""
        return self.reference if self.reference_of in ("", *columns) else ""

    @property
    def is_entropy_only(self) -> bool:
        """Whether it looks at the student's entropy alone: what Proposition 2 is about."""
        read = columns_read(self)
        return bool(read) and read <= ENTROPY_COLUMNS

    def retention(self, retention_ratio: float) -> float:
        """The ρ that its mask is stored under."""
        return 1.0 if self.keeps_all else float(retention_ratio)

    def seed(self, seed: int) -> int:
        """The seed that its mask is stored under: 0 for a rule without randomness."""
        return seed if self.has_seed else 0

    def apply(self, columns: Any) -> Any:
        """What the score gives on these columns.

        Raises:
            RuleError: it fails; the original error is the cause.
        """
        return self._called(self.score, columns)

    def weigh(self, columns: Any) -> Any:
        """What its weight gives on these columns.

        Raises:
            RuleError: it fails; the original error is the cause.
        """
        return self._called(self.weight or self.score, columns)

    def _called(self, function: Callable[[Any], Any], columns: Any) -> Any:
        try:
            return function(columns)
        except TipAnalysisError:
            raise
        except Exception as error:
            raise RuleError(
                f"rule {self.name!r} failed: {type(error).__name__}:"
                f" {first_line(error)}{self._hint()}"
            ) from error

    def _hint(self) -> str:
        if self.values:
            return ""
        return (
            "; it was given columns as polars expressions: a rule that needs values (numpy, control"
            " flow) is registered with values=True"
        )


@cache
def columns_read(rule: Rule) -> frozenset[str]:
    """The columns that a rule's score is made of; empty where a rule of values does not say.

    Raises:
        RuleError: the rule fails.
    """
    return rule.columns if rule.values else _seen(rule.apply)


@cache
def columns_weighed(rule: Rule) -> frozenset[str]:
    """The columns that its weight is made of, likewise.

    Raises:
        RuleError: the rule fails.
    """
    return rule.columns if rule.values else _seen(rule.weigh)


def _seen(function: Callable[[Any], Any]) -> frozenset[str]:
    recorded = RecordedColumns()
    function(recorded)
    return frozenset(recorded.seen)
