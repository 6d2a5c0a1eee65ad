"""Weightings: how much each token's loss counts, in place of whether it counts.

Every rule is a weighting by its score (or by `Rule.weight`, where its score is no weight ≥ 0), not
cut; beside them:

- `iw_opd` (arXiv 2606.22600, as TRL implements it): 1 + γ(1 − Σ_{s<t}|A_s| / Σ_s|A_s|) within a
  rollout, A = ln P_T(y) − ln P_S(y) of the sampled tokens: early tokens more, those after a long
  disagreement less. Not normalised, as in its source.
- `horvitz_thompson` (Eq. 24): 1/π of a sampled selection, 0 elsewhere; π as in `inclusion`.
  `horvitz_thompson_normalised` divides by the sum of the weights instead of the number of tokens:
  a little bias for less variance.
- `oracle` (Proposition 1): φ/M floored at 0, where gradients were measured.

Reads the token table; writes nothing.
"""

from dataclasses import dataclass

import polars as pl

from tip_analysis.analysis.inclusion import inclusion_probabilities
from tip_analysis.analysis.rule_kind import columns_weighed
from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.rules import rule_names
from tip_analysis.analysis.score_functions import TokenColumns
from tip_analysis.core.errors import OptionError, SchemaError, UnknownNameError
from tip_analysis.core.names import SelectionScope, WeightScale

NO_WEIGHTING = "none"
"""Every selected token counts the same."""
IW_OPD_GAMMA = 0.5
"""γ of `iw_opd`, as in TRL."""
_SMALLEST_TOTAL = 1e-8


@dataclass(frozen=True)
class Weighting:
    """What must be known of a weighting."""

    name: str
    scale: WeightScale
    """What the weights of a step are divided by."""
    columns: frozenset[str] = frozenset()
    """Of the scored token table, that it reads."""
    needs_gradients: bool = False
    of_selection: bool = False
    """It depends on the selection, and is 0 outside it."""


_OWN = {
    weighting.name: weighting
    for weighting in (
        Weighting(NO_WEIGHTING, WeightScale.NONE),
        Weighting("iw_opd", WeightScale.NONE, frozenset({"student_logprob", "teacher_logprob"})),
        Weighting("horvitz_thompson", WeightScale.ALL_TOKENS, of_selection=True),
        Weighting("horvitz_thompson_normalised", WeightScale.ITS_SUM, of_selection=True),
        Weighting(
            "oracle",
            WeightScale.MEAN_ONE,
            frozenset({"grad_dot_loss", "grad_norm_sq"}),
            needs_gradients=True,
        ),
    )
}


def weighting_names() -> list[str]:
    """Names of all weightings: those of their own, and every rule that weighs tokens."""
    return [*_OWN, *(name for name in rule_names() if _weighs(name))]


def _weighs(name: str) -> bool:
    return not (rule_of(name).window or rule_of(name).keeps_all)


def weighting_of(name: str) -> Weighting:
    """The weighting of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name in _OWN:
        return _OWN[name]
    if name not in rule_names() or not _weighs(name):
        raise UnknownNameError("weighting", name, weighting_names())
    chosen = rule_of(name)
    return Weighting(
        name, WeightScale.MEAN_ONE, columns_weighed(chosen), needs_gradients=chosen.needs_gradients
    )


def weigh_tokens(
    scored: pl.LazyFrame | pl.DataFrame,
    *,
    weighting: str,
    rule: str = "all",
    retention_ratio: float = 1.0,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seed: int = 0,
) -> pl.LazyFrame:
    """Add `weight`, ≥ 0 and not normalised, of every written token; null elsewhere.

    Args:
        scored: the token table with what the weighting reads.
        weighting: a name of `weighting_names`.
        rule, retention_ratio, selection_scope, seed: the selection, for the weightings that are 1/π
            of it.

    Raises:
        UnknownNameError: there is no such weighting.
        OptionError: a weight is negative or infinite, or the selection has no probabilities.
        SchemaError: a column is missing, or a token has no weight.
    """
    table = scored.lazy()
    kind = weighting_of(weighting)
    if kind.of_selection:
        return _inverse_probabilities(
            table, rule=rule, ratio=retention_ratio, scope=selection_scope, seed=seed
        )
    weighed = table.with_columns(
        pl.when("loss_mask").then(_weight(table, weighting).cast(pl.Float64)).alias("weight")
    )
    return _checked(weighed.collect(), weighting).lazy()


def _weight(table: pl.LazyFrame, name: str) -> pl.Expr:
    columns = TokenColumns(table.collect_schema(), f"weighting {name!r}")
    if name == NO_WEIGHTING:
        return pl.lit(1.0)
    if name == "iw_opd":
        return _prefix_weight(columns, IW_OPD_GAMMA)
    if name == "oracle":
        aligned, norm = columns["grad_dot_loss"], columns["grad_norm_sq"]
        return pl.when(norm > 0.0).then((aligned / norm).clip(lower_bound=0.0)).otherwise(0.0)
    chosen = rule_of(name)
    if chosen.values:
        return pl.lit(pl.Series(chosen.weigh(table.collect())))
    return chosen.weigh(columns)


def _prefix_weight(columns: TokenColumns, gamma: float) -> pl.Expr:
    """1 + γ(1 − the share of its rollout's |A| that came before it)."""
    written = columns["loss_mask"]
    advantage = (columns["teacher_logprob"] - columns["student_logprob"]).abs()
    advantage = pl.when(written).then(advantage).otherwise(0.0)
    rollout = columns["rollout_id"]
    before = advantage.cum_sum().over(rollout, order_by=columns["position"]) - advantage
    total = advantage.sum().over(rollout).clip(lower_bound=_SMALLEST_TOTAL)
    return 1.0 + gamma * (1.0 - before / total)


def _inverse_probabilities(
    table: pl.LazyFrame, *, rule: str, ratio: float, scope: SelectionScope | str, seed: int
) -> pl.LazyFrame:
    found = inclusion_probabilities(
        table, rule=rule, retention_ratio=ratio, selection_scope=scope, seed=seed
    )
    weight = (1.0 / pl.col("inclusion_probability")).fill_null(0.0)
    return found.with_columns(pl.when("loss_mask").then(weight).alias("weight")).drop(
        "inclusion_probability"
    )


def _checked(weighed: pl.DataFrame, name: str) -> pl.DataFrame:
    weights = weighed.filter("loss_mask")["weight"].fill_nan(None)
    if missing := weights.null_count():
        raise SchemaError(
            f"weighting {name!r} needs a weight for every token that the student wrote; {missing}"
            f" of {len(weights)} have none"
        )
    if bad := int((weights.is_infinite() | (weights < 0)).sum()):
        raise OptionError(
            f"weighting {name!r} must give weights from 0 to below infinity; {bad} of"
            f" {len(weights)} are not"
        )
    return weighed
