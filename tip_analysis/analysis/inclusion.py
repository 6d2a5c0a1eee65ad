"""Inclusion probabilities of sampled selections: what an unbiased estimate of a sum over all tokens
divides by (Eq. 24).

Sampling k of m tokens without replacement, each draw in proportion to the weights, does not include
a token with probability k·w/Σw. Its keys E/w, E ~ Exp(1), however are independent, and given the
keys of all others a token is among the k smallest exactly if its own is below their k-th smallest,
τ: with probability 1 − exp(−w·τ). For a selected token τ is the (k+1)-th smallest key of all, which
is known. Dividing by this conditional probability is unbiased token by token, whatever the weights
(rank conditioning, Cohen and Kaplan 2007).

Tokens of weight 0 are never drawn while others are left: an estimate is unbiased for the sum over
the tokens of positive weight.
"""

import numpy as np
import polars as pl

from tip_analysis.analysis.retention import exact_ratio, within
from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.selection import SCOPE_COLUMNS, scored_by_rule, with_ranks
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import SelectionScope


def inclusion_probabilities(
    scored: pl.LazyFrame | pl.DataFrame,
    *,
    rule: str,
    retention_ratio: float,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seed: int = 0,
) -> pl.LazyFrame:
    """Add `inclusion_probability` of each token that `select_tokens` selects under these options,
    in (0, 1], given the random numbers of all other tokens; null for every other token.

    Raises:
        OptionError: the rule does not sample token by token, so that tokens it leaves out have no
            chance at all.
        UnknownNameError, RuleError, SchemaError: as `select_tokens`.
    """
    chosen, scope = rule_of(rule), SelectionScope(selection_scope)
    if chosen.keeps_all:
        sure = pl.when("loss_mask").then(1.0)
        return scored.lazy().with_columns(sure.alias("inclusion_probability"))
    if not chosen.sampled:
        raise OptionError(
            f"inclusion probabilities need a rule that samples tokens; {rule!r} leaves out tokens"
            " that it can never select, and an estimate from the others is biased"
        )
    frame = scored_by_rule(scored.lazy(), chosen, scope).with_columns(_weight=pl.col("_score"))
    ranked = with_ranks(frame, chosen, scope, seed, keep_priority=True)
    ratio = exact_ratio(retention_ratio)
    group = SCOPE_COLUMNS[scope]
    k = pl.max_horizontal(
        pl.col("num_competing") * ratio.numerator // ratio.denominator, pl.lit(1, pl.Int64)
    )
    threshold = (-pl.col("_priority")).filter(pl.col("selection_rank") == k).max()
    threshold = (threshold.over(group) if group else threshold).fill_null(float("inf"))
    drawn = -_expm1(-pl.col("_weight") * threshold)
    probability = pl.when(threshold.is_infinite()).then(1.0).otherwise(drawn)
    return ranked.with_columns(
        pl.when(within(ratio)).then(probability).alias("inclusion_probability")
    ).drop("_weight", "_priority", "selection_rank", "num_competing")


def _expm1(exponent: pl.Expr) -> pl.Expr:
    """exp(x) − 1 to its own size, x ≤ 0."""
    return exponent.map_batches(
        lambda values: pl.Series(np.expm1(values.to_numpy())), return_dtype=pl.Float64
    )
