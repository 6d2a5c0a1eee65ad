"""What a reader of single tokens sees: which rollouts, their rows, the rules that select each
token, and the ends of colour scales.

The report's token browser and the notebook's `show_rollout` word and lay out what is found here.
"""

import math
from collections.abc import Iterable, Sequence

import polars as pl

from tip_analysis.analysis import selection
from tip_analysis.analysis.densities import STRENGTH, strongest_tokens
from tip_analysis.analysis.run_view import GRADIENT_SCORES, RunView
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import RunError, SchemaError, UnknownNameError
from tip_analysis.core.names import Quadrant, SelectionScope
from tip_analysis.core.schema import MaskTable

DEFAULT_RULES = ("entropy", "soft_or", "q3", "divergence", "teachability")
"""Rules shown where a run has no masks: all without randomness and gradients."""
DEFAULT_RATIOS = (0.1, 0.2, 0.5)
MAX_ROLLOUT_TOKENS = 2000
"""Tokens of one rollout that are shown; the rest is counted."""
NUM_STRONG = 200
"""A Q3 token is strong if it is among this many of the run's strongest."""
_SMALLEST_ROLLOUT = 50
"""Tokens: with less than this left to show, no further rollout is looked for."""


def sample_rollouts(view: RunView, num_tokens: int) -> list[str]:
    """Rollout ids: those of the strongest Q3 and Q1 tokens, then an even draw by a hash of the id,
    while the budget of tokens lasts; at least one."""
    size = 2 * view.options.num_strong
    tables = (strongest_tokens(view.tokens, quadrant, size) for quadrant in ("Q3", "Q1"))
    strong = [name for table in tables for name in table["rollout_id"]]
    lengths = view.raw.select("rollout_id").group_by("rollout_id").len().collect(engine="streaming")
    drawn = lengths.with_columns(pl.col("rollout_id").hash(seed=0).alias("draw")).sort(
        "draw", "rollout_id"
    )
    wanted = dict.fromkeys([*strong, *drawn["rollout_id"]])
    return _within_budget(wanted, dict(lengths.iter_rows()), num_tokens)


def _within_budget(names: Iterable[str], length_of: dict[str, int], budget: int) -> list[str]:
    chosen: list[str] = []
    for name in names:
        length = min(length_of[name], MAX_ROLLOUT_TOKENS)
        if chosen and length > budget:
            if budget < _SMALLEST_ROLLOUT:
                break
            continue
        chosen.append(name)
        budget -= length
    return chosen


def strongest_rollout(view: RunView) -> str:
    """The rollout of the strongest Q3 token, or the first where Q3 is empty.

    Raises:
        SchemaError: the run has no token.
    """
    best = strongest_tokens(view.tokens, "Q3", 1)["rollout_id"]
    found = best if best.len() else view.raw.select("rollout_id").head(1).collect()["rollout_id"]
    if found.is_empty():
        raise SchemaError(f"{view.run.path} has no token to show")
    return str(found[0])


def rollout_rows(view: RunView, rollout_ids: Sequence[str]) -> pl.LazyFrame:
    """The tokens of rollouts with scores, quadrant and, where measured, gradients."""
    wanted = pl.LazyFrame({"rollout_id": list(rollout_ids)}, schema={"rollout_id": pl.String})
    return view.with_gradients(view.tokens.join(wanted, on="rollout_id", how="semi"))


def one_rollout(view: RunView, rollout_id: str) -> pl.DataFrame:
    """`rollout_rows` of one rollout, in order.

    Raises:
        UnknownNameError: there is no such rollout.
    """
    frame = rollout_rows(view, [rollout_id]).collect().sort("position")
    if frame.is_empty():
        names = view.raw.select("rollout_id").unique(maintain_order=True).head(8)
        raise UnknownNameError("rollout", rollout_id, [*names.collect()["rollout_id"], "…"])
    return frame


def listed_ids(rows: pl.DataFrame) -> pl.Series:
    """Ids of the tokens that either model listed among its likeliest, at any of these places."""
    lists = (rows[f"{model}_topk_ids"].explode() for model in ("student", "teacher"))
    return pl.concat(list(lists)).drop_nulls().unique()


def recorded_ratios(view: RunView, rollout_ids: Sequence[str]) -> pl.DataFrame:
    """The smallest ρ at which each rule of the run's masks selects each token: rule, rollout_id,
    position, retention_ratio; no row where the run has no masks."""
    if not view.run.has("masks"):
        return _smallest(pl.DataFrame(schema=polars_schema(MaskTable)))
    return _smallest(_of_rollouts(view.run.masks(), rollout_ids).collect())


def selection_ratios(view: RunView, rollout_ids: Sequence[str]) -> pl.DataFrame:
    """`recorded_ratios`, or where the run has no masks those of `DEFAULT_RULES` within each
    rollout; that scope needs no other rollout's tokens."""
    if view.run.has("masks"):
        return recorded_ratios(view, rollout_ids)
    scored = _of_rollouts(view.tokens, rollout_ids).collect()
    masks = [_mask(scored, rule, ratio) for rule in DEFAULT_RULES for ratio in DEFAULT_RATIOS]
    return _smallest(pl.concat(masks).collect())


def _of_rollouts(table: pl.LazyFrame, rollout_ids: Sequence[str]) -> pl.LazyFrame:
    return table.filter(pl.col("rollout_id").is_in(list(rollout_ids)))


def _mask(scored: pl.DataFrame, rule: str, ratio: float) -> pl.LazyFrame:
    chosen = selection.select_tokens(
        scored, rule=rule, retention_ratio=ratio, selection_scope=SelectionScope.ROLLOUT
    )
    kept = chosen.filter("selected").select("rollout_id", "position")
    return kept.with_columns(rule=pl.lit(rule), retention_ratio=pl.lit(ratio))


def _smallest(masks: pl.DataFrame) -> pl.DataFrame:
    keys = ["rule", "rollout_id", "position"]
    return masks.group_by(keys).agg(pl.col("retention_ratio").min()).sort(keys)


def strong_threshold(view: RunView) -> float:
    """The Q3 score from which a Q3 token counts as strong, nats; 0 where Q3 is empty."""
    in_q3 = view.tokens.filter(pl.col("quadrant") == Quadrant.Q3)
    best = in_q3.select(pl.col(STRENGTH["Q3"]).top_k(NUM_STRONG)).collect().to_series()
    lowest = best.drop_nulls().min()
    return float(lowest) if isinstance(lowest, float) and math.isfinite(lowest) else 0.0


def colour_scales(
    rows: pl.LazyFrame | pl.DataFrame, columns: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """The 1st and the 99th percentile of each column's finite values; a column without any is left
    out."""
    ends = {}
    for column in columns:
        value = pl.col(column).cast(pl.Float64)
        finite = value.filter(value.is_finite())
        low, high = (finite.quantile(share).alias(f"q{share}") for share in (0.01, 0.99))
        found = rows.lazy().select(low, high).collect().row(0)
        if None not in found:
            ends[column] = found
    return ends


def run_scale(view: RunView, column: str) -> tuple[float, float]:
    """The colour scale of one score over the whole run; (0, 0) where it has no finite value.

    Raises:
        RunError: it is a score of gradients, and none were measured.
    """
    table = view.gradients if column in GRADIENT_SCORES else view.tokens
    if table is None:
        raise RunError(
            f"{view.run.path} has no gradients of the reverse KL yet; `tip-analysis gradients"
            f" {view.run.path}` measures them"
        )
    return colour_scales(table, [column]).get(column, (0.0, 0.0))
