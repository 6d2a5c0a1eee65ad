"""Selection rules: a flat registry of scores with what must be known about each.

Reads and writes nothing; `selection` makes masks of them. Adding a rule takes `register_rule`, or
an entry point in the group `tip_analysis.rules` that points at a score or a `Rule`.

The rules of the package: `built_in_rules`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import polars as pl

from tip_analysis.analysis.built_in_rules import BUILT_IN
from tip_analysis.analysis.rule_kind import Rule
from tip_analysis.analysis.score_functions import ScoreFunction
from tip_analysis.core.errors import OptionError, UnknownNameError

ENTRY_POINT_GROUP = "tip_analysis.rules"

RULES: dict[str, Rule] = {rule.name: rule for rule in BUILT_IN}
"""Every rule by name; those of entry points join when `rule` or `rule_names` is first called."""


def register_rule(
    name: str,
    score: ScoreFunction | Callable[[Any], Any],
    *,
    values: bool = False,
    columns: Sequence[str] = (),
    needs_gradients: bool = False,
    sampled: bool = False,
    partial: bool = False,
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
        partial: A token whose score is null is no candidate, and is never selected.
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
        partial=partial,
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
