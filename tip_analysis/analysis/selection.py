"""Selection: from a scored token table to a mask of k = max(1, ⌊ρ·m⌋) tokens (Sections 6 and 7,
Appendix B).

Reads the token table with the columns of `add_scores`; `to_masks` makes rows of
`tip_analysis.core.schema.MaskTable`. The rules: `rules`.

Tokens compete within a rollout (Eq. 8), a batch or the run; m counts those that the student wrote.
Ties go to the earlier position, then to the smaller `rollout_id` (as text). Sampling is Gumbel
top-k without replacement, from a counter-based generator keyed by (seed, rollout_id, position)
(`counter_random`): a mask is a pure function of table, rule, ρ, scope and seed, whatever the row
order, the process or the version of a library. For a given rule, scope and seed the mask of a
smaller ρ lies inside that of a larger one. ρ is stored as it was given and compared exactly.

A rule may leave tokens out whatever ρ (`Rule.partial`: those outside a quadrant, for one): they
count towards m and are never selected, so that its mask has min(k, candidates) tokens.
"""

from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from tip_analysis.analysis.counter_random import random_exponentials
from tip_analysis.analysis.retention import exact_ratio, within
from tip_analysis.analysis.rule_kind import Rule
from tip_analysis.analysis.rule_scores import score_tokens
from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.windows import window_order
from tip_analysis.core.contract_checks import require_columns, validate
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import SelectionScope
from tip_analysis.core.schema import MaskTable

SCOPE_COLUMNS: dict[SelectionScope, str | None] = {
    SelectionScope.ROLLOUT: "rollout_id",
    SelectionScope.BATCH: "batch_id",
    SelectionScope.RUN: None,
}
"""The column whose equal values compete."""


def rank_tokens(
    scored: pl.LazyFrame | pl.DataFrame,
    *,
    rule: str,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seed: int = 0,
) -> pl.LazyFrame:
    """Add `selection_rank` (from 0, the first to be selected; null where `loss_mask` is false) and
    `num_competing` (m).

    The mask at ρ is `selection_rank` < k, so one ranking serves every ρ.

    Raises:
        UnknownNameError: there is no such rule or scope.
        RuleError: a rule of the user's own fails.
        SchemaError: a column is missing, or a score.
    """
    chosen, scope = rule_of(rule), SelectionScope(selection_scope)
    return with_ranks(scored_by_rule(scored.lazy(), chosen, scope), chosen, scope, seed)


def scored_by_rule(scored: pl.LazyFrame, chosen: Rule, scope: SelectionScope) -> pl.LazyFrame:
    """The table with `_score`; the rule is called once."""
    group = SCOPE_COLUMNS[scope]
    needed = ["rollout_id", "position", "loss_mask", *([group] if group else [])]
    require_columns(scored, needed, f"rule {chosen.name!r}")
    return score_tokens(scored, chosen)


def with_ranks(
    frame: pl.LazyFrame,
    chosen: Rule,
    scope: SelectionScope,
    seed: int,
    *,
    keep_priority: bool = False,
) -> pl.LazyFrame:
    """`rank_tokens` of a table with `_score`; what is ranked by stays as `_priority` if asked."""
    frame = _with_priority(frame, chosen, seed).with_columns(
        (pl.col("loss_mask") & pl.col("_score").is_not_null()).alias("_candidate")
    )
    group = SCOPE_COLUMNS[scope]
    order = [-pl.col("_score"), pl.col("position"), pl.col("rollout_id")]
    groups = [group] if group else []
    rank = pl.int_range(pl.len(), dtype=pl.Int64).over(
        ["_candidate", *groups], order_by=order[: 2 if scope is SelectionScope.ROLLOUT else 3]
    )
    competing = pl.len().over(["loss_mask", *groups]).cast(pl.Int64)
    return frame.with_columns(
        pl.when("_candidate").then(rank).alias("selection_rank"),
        pl.when("loss_mask").then(competing).alias("num_competing"),
        *([pl.col("_score").alias("_priority")] if keep_priority else []),
    ).drop("_score", "_exponential", "_candidate", strict=False)


def _with_priority(frame: pl.LazyFrame, chosen: Rule, seed: int) -> pl.LazyFrame:
    """`_score` as what tokens are ranked by, largest first; null where a token is no candidate."""
    priority = _plain_score()
    if chosen.window:
        frame = frame.with_columns(_window(seed).alias("_score"))
        priority = -pl.col("_score")
    elif chosen.sampled:  # −E/weight with E ~ Exp(1): the k largest are k draws ∝ weight
        frame = frame.with_columns(_exponential(seed).alias("_exponential"))
        priority = -pl.col("_exponential") / priority  # −inf at weight 0
    return frame.with_columns(pl.when("loss_mask").then(priority).alias("_score"))


def _plain_score() -> pl.Expr:
    """−0 is 0, as a divisor too."""
    return pl.when(pl.col("_score") == 0.0).then(0.0).otherwise(pl.col("_score"))


def _window(seed: int) -> pl.Expr:
    """When the window of its rollout takes in each token (`windows.window_order`)."""
    return pl.struct("rollout_id", "position", "loss_mask").map_batches(
        lambda keys: window_order(keys.struct.unnest(), seed), return_dtype=pl.Float64
    )


def _exponential(seed: int) -> pl.Expr:
    """E of each token. A column of its own: inside `when`, polars nulls what is not wanted."""

    def draw(keys: pl.Series) -> pl.Series:
        ids, positions = keys.struct.field("rollout_id"), keys.struct.field("position")
        return pl.Series(random_exponentials(ids, positions, seed))

    return pl.struct("rollout_id", "position").map_batches(
        draw, return_dtype=pl.Float64, is_elementwise=True
    )


def select_tokens(
    scored: pl.LazyFrame | pl.DataFrame,
    *,
    rule: str,
    retention_ratio: float,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seed: int = 0,
) -> pl.LazyFrame:
    """Add `selected`: whether a token is among the k = max(1, ⌊ρ·m⌋) that the rule chooses in its
    scope.

    Args:
        scored: The token table with the columns of `add_scores` (and `grad_dot_loss` for
            `gradient_oracle`).
        rule: Name of a rule (`rules.rule_names`).
        retention_ratio: ρ in (0, 1]; `all` selects everything whatever ρ.
        selection_scope: `rollout`, `batch` or `run`: whose tokens compete.
        seed: Of the sampling rules; others ignore it.

    Returns:
        The rows in their order with `selected`, false where `loss_mask` is false.

    Raises:
        UnknownNameError: there is no such rule or scope.
        OptionError: ρ is outside (0, 1].
        RuleError: a rule of the user's own fails.
        SchemaError: a column is missing, or a score.
    """
    exact_ratio(retention_ratio)
    ratio = exact_ratio(rule_of(rule).retention(retention_ratio))
    ranked = rank_tokens(scored, rule=rule, selection_scope=selection_scope, seed=seed)
    return ranked.with_columns(within(ratio).alias("selected")).drop(
        "selection_rank", "num_competing"
    )


def masks_by_part(
    parts: Iterable[pl.LazyFrame],
    *,
    rules: Sequence[str],
    retention_ratios: Sequence[float],
    seeds: Sequence[int] = (0,),
) -> Iterator[pl.DataFrame]:
    """`to_masks` in scope `rollout`, part by part: for tables larger than memory.

    Args:
        parts: Scored tokens of whole rollouts, such as the shards of a run, each with `add_scores`
            under one `Normalization` that was measured on all of them; of whole batches for a rule
            that reads its batch (`ta_opd`).
        rules, retention_ratios, seeds: As in `to_masks`.

    Yields:
        The mask rows of each part; together they are those of `to_masks`.
    """
    for part in parts:
        yield to_masks(part, rules=rules, retention_ratios=retention_ratios, seeds=seeds)


def to_masks(
    scored: pl.LazyFrame | pl.DataFrame,
    *,
    rules: Sequence[str],
    retention_ratios: Sequence[float],
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seeds: Sequence[int] = (0,),
) -> pl.DataFrame:
    """Rows of the mask table, one per selected token, for every rule, ratio and seed.

    A rule that does not sample gives one mask, under the first seed; `all` gives one, at ρ = 1.

    Raises:
        UnknownNameError, OptionError, RuleError, SchemaError: as `select_tokens`.
    """
    scope = SelectionScope(selection_scope)
    parts = [
        mask
        for name in rules
        for mask in _masks_of(scored.lazy(), rule_of(name), retention_ratios, scope, seeds)
    ]
    if not parts:
        raise OptionError("no mask was asked for; name at least one rule, retention ratio and seed")
    return validate(pl.concat(parts), MaskTable)


def _masks_of(
    scored: pl.LazyFrame,
    chosen: Rule,
    retention_ratios: Sequence[float],
    scope: SelectionScope,
    seeds: Sequence[int],
) -> Iterator[pl.DataFrame]:
    ratios = [1.0] if chosen.keeps_all else retention_ratios
    fractions = {float(ratio): exact_ratio(ratio) for ratio in ratios}
    frame = scored_by_rule(scored, chosen, scope)
    for seed in dict.fromkeys(seeds if chosen.has_seed else list(seeds)[:1]):
        ranked = with_ranks(frame, chosen, scope, seed).select(
            "rollout_id", "position", "selection_rank", "num_competing"
        )
        narrow = ranked.collect()
        for ratio, fraction in fractions.items():
            yield narrow.filter(within(fraction)).select(
                pl.lit(chosen.name).alias("rule"),
                pl.lit(ratio).alias("retention_ratio"),
                pl.lit(scope.value, pl.Enum(SelectionScope)).alias("selection_scope"),
                pl.lit(seed, pl.Int64).alias("seed"),
                "rollout_id",
                "position",
            )
