"""Selection rules: a flat registry of scores with what must be known about each.

Reads and writes nothing; `selection` makes masks of them. Adding a rule takes `register_rule`, or
an entry point in the group `tip_analysis.rules` that points at a score or a `Rule`. What a rule
needs and gives is declared, never found out by calling it.

Deviations from the paper: `random` is a control that it lacks; `all` ignores ρ.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import polars as pl

from tip_analysis.analysis import scores as importance
from tip_analysis.analysis.scores import RecordedColumns, ScoreFunction, TokenColumns
from tip_analysis.core.atomic_files import first_line
from tip_analysis.core.errors import OptionError, RuleError, TipAnalysisError, UnknownNameError

ENTRY_POINT_GROUP = "tip_analysis.rules"

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
        """The seed that its mask is stored under: 0 for a rule that does not sample."""
        return seed if self.sampled else 0

    def apply(self, columns: Any) -> Any:
        """What the score gives on these columns.

        Raises:
            RuleError: it fails; the original error is the cause.
        """
        try:
            return self.score(columns)
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


def _uniform(columns: TokenColumns) -> pl.Expr:
    return pl.lit(1.0) + 0.0 * columns["position"]


def _soft_or_bottom(columns: TokenColumns) -> pl.Expr:
    return -importance.soft_or(columns)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("all", _uniform, keeps_all=True, description="every token, whatever ρ"),
        Rule(
            "random",
            _uniform,
            sampled=True,
            reference="lower reference",
            description="uniform without replacement: the control",
        ),
        Rule("entropy", importance.entropy, description="top-k of student entropy"),
        Rule(
            "entropy_sampling",
            importance.entropy,
            sampled=True,
            description="sampled in proportion to student entropy",
        ),
        Rule(
            "soft_or",
            importance.soft_or,
            description="top-k of Soft-OR of entropy and divergence (Eq. 8)",
        ),
        Rule(
            "soft_or_bottom",
            _soft_or_bottom,
            description="the lowest-scoring k of Soft-OR: the paper's control",
        ),
        Rule(
            "q3",
            importance.q3,
            description="top-k of forward KL × (1 − normalised entropy): overconfident and wrong",
        ),
        Rule("divergence", importance.divergence, description="top-k of reverse KL alone"),
        Rule("forward_kl", importance.forward_kl, description="top-k of forward KL alone"),
        Rule("jsd", importance.jsd, description="top-k of Jensen-Shannon divergence alone"),
        Rule("hellinger", importance.hellinger, description="top-k of Hellinger distance alone"),
        Rule(
            "entropy_jsd_sampling",
            importance.entropy_jsd,
            sampled=True,
            description="sampled in proportion to student entropy × Jensen-Shannon divergence",
        ),
        Rule(
            "teachability",
            importance.teachability,
            description="top-k of reverse KL × teacher's mass on the student's likeliest tokens",
            complete=False,
        ),
        Rule("position", importance.earliness, description="the first k tokens of the response"),
        Rule(
            "teacher_entropy",
            importance.teacher_entropy,
            description="top-k of teacher entropy",
            complete=False,
        ),
        Rule(
            "gradient_oracle",
            importance.descent_alignment,
            needs_gradients=True,
            reference="upper reference",
            reference_of="grad_dot_loss",
            description="top-k of φ = ⟨∇L, g⟩, where gradients were measured: an upper reference",
            complete=False,
        ),
    )
}
"""Every rule by name; those of entry points join when `rule` or `rule_names` is first called."""


def register_rule(
    name: str,
    score: ScoreFunction | Callable[[Any], Any],
    *,
    values: bool = False,
    columns: Sequence[str] = (),
    needs_gradients: bool = False,
    sampled: bool = False,
    description: str = "",
    overwrite: bool = False,
) -> Rule:
    """Add a selection rule.

    Args:
        name: What users call it; it may hold colons, as in `quadrant:Q3`, but no number between
            them, since `q3:0.1` is the rule `q3` at a ratio.
        score: From the columns of the scored table to one number a token: `lambda df: df["jsd"] *
            df["position"]`. It is given columns as polars expressions and gives an expression, so
            that large tables stream.
        values: `score` needs values instead (numpy, control flow): it is given the collected
            DataFrame and gives [N] numbers.
        columns: With `values`: the columns that it reads, so that a training step computes no
            others; by default all.
        needs_gradients: It reads what the gradients stage measures (`grad_dot_loss` …), and selects
            among the tokens that have it.
        sampled: Draw k tokens with probability ∝ score (a weight ≥ 0) instead of taking the k
            largest.
        description: One line for lists of rules.
        overwrite: Replace a rule of that name.

    Raises:
        OptionError: the name is empty or taken, or one that an arm's spelling would hide.
    """
    if not all(name.split(":")) or name != name.strip() or any(map(is_number, name.split(":"))):
        raise OptionError(
            "a rule needs a name without spaces around it, of which no part between colons is a"
            f" number or empty; found {name!r}"
        )
    if name in RULES and not overwrite:
        raise OptionError(
            f"there is a rule {name!r} already; choose another name, or pass overwrite=True"
        )
    RULES[name] = Rule(
        name,
        score,
        sampled,
        description or (score.__doc__ or "").strip().split("\n")[0],
        complete=False,
        values=values,
        columns=frozenset(columns),
        needs_gradients=needs_gradients,
    )
    return RULES[name]


def is_number(text: str) -> bool:
    """Whether a text reads as a number: a ratio after a rule's name, as in `q3:0.1`."""
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def columns_read(rule: Rule) -> frozenset[str]:
    """The columns that a rule's score is made of; empty where a rule of values does not say.

    Raises:
        RuleError: the rule fails.
    """
    if rule.values:
        return rule.columns
    recorded = RecordedColumns()
    rule.apply(recorded)
    return frozenset(recorded.seen)


@cache
def _load_entry_points() -> None:
    """Each entry point of the group names a rule and points at its score, or at a `Rule`."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in RULES:
            continue
        loaded = entry.load()
        if isinstance(loaded, Rule):
            RULES[entry.name] = loaded
        else:
            register_rule(entry.name, loaded)


def rule_names() -> list[str]:
    """Names of all rules, those of entry points included."""
    _load_entry_points()
    return list(RULES)


def rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UnknownNameError: there is none; the message lists the valid names.
    """
    _load_entry_points()
    if name not in RULES:
        raise UnknownNameError("selection rule", name, RULES)
    return RULES[name]


def known_rules(names: Iterable[str]) -> dict[str, Rule]:
    """Those of a table's names that are rules here: the table may come from elsewhere."""
    _load_entry_points()
    return {name: RULES[name] for name in names if name in RULES}


def keeps_all() -> pl.Expr:
    """Whether the rule named in the column `rule` keeps every token."""
    return pl.col("rule").is_in([name for name in rule_names() if RULES[name].keeps_all])
