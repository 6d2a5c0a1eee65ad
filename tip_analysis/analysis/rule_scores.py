"""A rule's score on a table: by expression, or from values where the rule says so."""

from typing import Any

import polars as pl

from tip_analysis.analysis.rule_kind import Rule, columns_read
from tip_analysis.analysis.score_functions import TokenColumns
from tip_analysis.core.atomic_files import first_line
from tip_analysis.core.errors import OptionError, RuleError, SchemaError


def score_tokens(scored: pl.LazyFrame, chosen: Rule) -> pl.LazyFrame:
    """Add `_score`, the rule's score as Float64. The rule is called once.

    Raises:
        RuleError: the rule fails; the original error is the cause.
        SchemaError: a column that the rule needs is missing, a token that the student wrote has no
            score (null or NaN), or the rule gives something that is no column of numbers.
        OptionError: the weight of a sampling rule is negative.
    """
    frame = _from_values(scored, chosen) if chosen.values else _by_expression(scored, chosen)
    if not chosen.complete:
        _check_scores(frame, chosen)
    return frame


def _by_expression(scored: pl.LazyFrame, chosen: Rule) -> pl.LazyFrame:
    score = chosen.apply(TokenColumns(scored.collect_schema(), f"rule {chosen.name!r}"))
    if not isinstance(score, pl.Expr):
        raise SchemaError(
            f"rule {chosen.name!r} must give a polars expression; found {type(score).__name__}: a"
            " rule that gives values is registered with values=True"
        )
    return scored.with_columns(score.cast(pl.Float64).alias("_score"))


def _from_values(scored: pl.LazyFrame, chosen: Rule) -> pl.LazyFrame:
    table = scored.collect()
    score = _as_series(chosen.apply(table), chosen.name)
    if len(score) != table.height:
        raise SchemaError(
            f"rule {chosen.name!r} must give one score a token ({table.height}); found {len(score)}"
        )
    return table.lazy().with_columns(score.alias("_score"))


def _as_series(values: Any, name: str) -> pl.Series:
    try:
        return pl.Series(values).cast(pl.Float64)
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise SchemaError(
            f"rule {name!r} must give a column of numbers; found"
            f" {type(values).__name__}: {first_line(error)}"
        ) from error


def _check_scores(frame: pl.LazyFrame, chosen: Rule) -> None:
    counts = _counts(frame, chosen)
    if counts["missing"]:
        raise SchemaError(
            f"rule {chosen.name!r} needs a score for every token that the student wrote;"
            f" {counts['missing']} of {counts['tokens']}, in {counts['rollouts']} rollout(s), have"
            f" none: {_what_to_do(frame, chosen)}"
        )
    if chosen.sampled and counts["negative"]:
        raise OptionError(
            f"rule {chosen.name!r} samples, so its score is a weight ≥ 0; {counts['negative']} are"
            " negative"
        )


def _what_to_do(frame: pl.LazyFrame, chosen: Rule) -> str:
    """The way out, with the columns that an approximate teacher leaves empty."""
    schema = frame.collect_schema()
    if "approximation" in schema:
        read = sorted(columns_read(chosen) & set(schema.names()))
        facts = frame.filter("loss_mask").select(
            pl.col(read).null_count(), approximation=pl.col("approximation").drop_nulls().first()
        )
        row = facts.collect().row(0, named=True)
        if row["approximation"] and (empty := [name for name in read if row[name]]):
            return (
                f"the teacher is approximate ({row['approximation']}), which gives no"
                f" {', '.join(empty)}: choose another rule, or score with the teacher itself"
            )
    return "keep only the rollouts that have it, or score in full"


def _counts(frame: pl.LazyFrame, chosen: Rule) -> dict[str, int]:
    score = pl.col("_score")
    missing = score.is_nan() if chosen.partial else score.is_null() | score.is_nan()
    counted = frame.filter("loss_mask").select(
        missing.sum().alias("missing"),
        pl.len().alias("tokens"),
        pl.col("rollout_id").filter(missing).n_unique().alias("rollouts"),
        (score < 0).sum().alias("negative"),
    )
    try:
        return counted.collect(engine="streaming").row(0, named=True)
    except Exception as error:  # a function of the user's own may run inside
        raise RuleError(
            f"rule {chosen.name!r} failed: {type(error).__name__}: {first_line(error)}"
        ) from error
