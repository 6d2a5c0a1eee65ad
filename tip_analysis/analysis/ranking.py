"""Selection rules compared without training: what each keeps at equal budget, and in what order.

Reads the token table joined with one measurement of gradients; makes rows of
`instrument_tables.RankingTable`. Every figure of a rule at a retention ratio is measured again in
resamples of prompts, and the resamples are kept with it: they are one set for all rules, so that
two rules are compared by the differences within resamples (paired).

Ranks are intervals. Two rules are told apart where the simultaneous 95% interval of their
difference, over all pairs of one figure and ratio, lies on one side of 0 (Mogstad, Romano, Shaikh
and Wilhelm 2024: rank confidence sets from studentized maxima); `rank_low` to `rank_high` are the
ranks that a rule may then have.

A weighting counts every token by its weight, of mean 1: what it keeps is in units of the loss over
all tokens, and it stands beside `all` at ρ = 1.

Masks are part of a rule and stay as they are in each resample; rules that sample are averaged over
their seeds. φ of `gradient_oracle` is what it selects by: its own noise is part of what it keeps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import (
    Floats,
    expanded_interval,
    group_index,
    sums_by_group,
    weight_blocks,
)
from tip_analysis.analysis.coverage_tables import times_selected
from tip_analysis.analysis.selection import to_masks
from tip_analysis.analysis.weightings import weigh_tokens, weighting_of
from tip_analysis.core.contract_checks import polars_schema, require_columns
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.instrument_tables import RankingTable
from tip_analysis.core.names import RankFigure, SelectionScope, TokenUse

NUM_RESAMPLES = 400
GRADIENT_FIGURES = (RankFigure.COSINE_LOSS, RankFigure.COSINE_REWARD, RankFigure.SNR)
"""Figures that need the gradient of each selection's loss; the others are sums over tokens."""
SIGNED = (RankFigure.PHI, RankFigure.REWARD)
"""Sums of either sign: their total may be near 0, so it is held while prompts are resampled."""
_CONFIDENCE = 0.95
_RULE_KEYS = ("rule", "form", "retention_ratio")
_PLACE = ["rollout_id", "position"]


@dataclass(frozen=True)
class Selected:
    """What one rule selects at one ratio."""

    rule: str
    retention_ratio: float
    times: Floats
    """[N] share of the rule's mask seeds that select each token; of a weighting its weights, of
    mean 1."""
    form: TokenUse = TokenUse.SELECTION


def selections_of(
    scored: pl.DataFrame,
    rule: str,
    ratios: Sequence[float],
    *,
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    seeds: Sequence[int] = (0,),
) -> list[Selected]:
    """What a rule selects at each ratio, over the rows of `scored` (`add_scores`)."""
    masks = to_masks(
        scored, rules=[rule], retention_ratios=ratios, selection_scope=selection_scope, seeds=seeds
    )
    return [
        Selected(rule, ratio, times_selected(mask, scored) / mask["seed"].n_unique())
        for (ratio,), mask in masks.group_by("retention_ratio", maintain_order=True)
    ]  # pyright: ignore[reportReturnType]


def weighting_of_tokens(scored: pl.DataFrame, name: str) -> Selected:
    """A weighting over the rows of `scored`, at ρ = 1, with weights of mean 1.

    Raises:
        UnknownNameError: there is no such weighting.
        OptionError: it is of a selection, or weighs nothing.
    """
    if weighting_of(name).of_selection:
        raise OptionError(f"weighting {name!r} depends on a selection, and is not ranked by itself")
    weights = weigh_tokens(scored, weighting=name).collect()["weight"].cast(pl.Float64).to_numpy()
    if not weights.sum() > 0.0:
        raise OptionError(f"weighting {name!r} gives no token of this run a weight")
    return Selected(name, 1.0, weights / weights.mean(), TokenUse.WEIGHTING)


@dataclass(frozen=True)
class Replicated:
    """One figure, and what it is in each resample of prompts."""

    value: float
    replicates: Floats
    """[R]."""


def kept_figures(
    measured: pl.DataFrame, times: Floats, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[RankFigure, Replicated]:
    """Shares of Σφ, Σφ⁺, ΣM and of the reward-aligned signal that a selection keeps.

    Args:
        measured: tokens with grad_dot_loss, grad_norm_sq, reward_alignment, prompt_id.
        times: [N] what each token counts for: 0 or 1, means over seeds, or weights.
        num_resamples, seed: of prompts.

    Returns:
        Each figure; NaN where nothing was measured, as the reward's without rewards.

    Raises:
        SchemaError: a column is missing.
    """
    needed = ["prompt_id", "grad_dot_loss", "grad_norm_sq", "reward_alignment"]
    require_columns(measured.lazy(), needed, "kept_figures")
    parts = _parts(measured)
    prompts = group_index(measured["prompt_id"])
    size = int(prompts.max()) + 1
    counted = np.column_stack([part for part, _ in parts.values()])
    whole = np.column_stack([total for _, total in parts.values()])
    kept = sums_by_group(counted * times[:, None], prompts, size)
    totals = sums_by_group(whole, prompts, size)
    held = np.array([figure in SIGNED for figure in parts])
    with np.errstate(divide="ignore", invalid="ignore"):
        value = kept.sum(0) / totals.sum(0)
        replicates = np.concatenate(
            [
                (weights @ kept) / np.where(held, totals.sum(0), weights @ totals)
                for weights in _weights(size, num_resamples, seed)
            ]
        )
    return {
        figure: Replicated(float(value[index]), replicates[:, index])
        for index, figure in enumerate(parts)
    }


def _weights(num_prompts: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    for block in weight_blocks(num_prompts, num_resamples, seed):
        yield block.astype(np.float64)


def _parts(measured: pl.DataFrame) -> dict[RankFigure, tuple[Floats, Floats]]:
    """Of each figure what a token adds to the sum that is kept, and to that of all tokens."""
    phi, norm, reward = (
        measured[name].cast(pl.Float64).fill_null(0.0).to_numpy()
        for name in ("grad_dot_loss", "grad_norm_sq", "reward_alignment")
    )
    gain = reward.clip(0.0)
    return {
        RankFigure.PHI: (phi, phi),
        RankFigure.PHI_POSITIVE: (phi.clip(0.0), phi.clip(0.0)),
        RankFigure.REWARD: (reward, gain),
        RankFigure.REWARD_POSITIVE: (gain, gain),
        RankFigure.GRAD_NORM_SQ: (norm, norm),
    }


def league_table(rankings: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """Rules in the order of each figure at each ratio, with the ranks that they may have.

    Args:
        rankings: rows of `RankingTable` of one measurement and selection scope.

    Returns:
        A `result_tables.LeagueTable`: value with low and high (95%, prompts), rank (by value, 1 is
        the largest), rank_low and rank_high.

    Raises:
        SchemaError: the rows are of several measurements or scopes.
    """
    table = rankings.lazy().collect()
    _check_one_setting(table)
    parts = [
        _ranked(part)
        for _, part in table.group_by("figure", "retention_ratio", maintain_order=True)
    ]
    if not parts:
        raise SchemaError("league_table needs at least one row; found none")
    order = {str(figure): place for place, figure in enumerate(RankFigure)}
    return pl.concat(parts).sort(
        pl.col("figure").cast(pl.String).replace_strict(order), "retention_ratio", "rank", "rule"
    )


def _check_one_setting(table: pl.DataFrame) -> None:
    keys = ["selection_scope", "param_scope", "method", "num_probes", "seed"]
    found = table.select(keys).unique()
    if found.height > 1:
        raise SchemaError(
            "a league table is of one measurement and selection scope; found"
            f" {found.height}: filter by {', '.join(keys)}"
        )


def _ranked(part: pl.DataFrame) -> pl.DataFrame:
    """One figure at one ratio: intervals, ranks, and the ranks that cannot be ruled out."""
    values = part["value"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    replicates = np.array(
        [row.to_list() for row in part["replicates"]], dtype=np.float64
    )  # [rules, R]
    num_prompts = max(part["num_prompts"].to_list())
    interval = expanded_interval(values, replicates.T, num_prompts)
    known = np.isfinite(values)
    above = _told_apart(values, replicates)
    count = int(known.sum())
    rank = np.array([1 + int((values[known] > value).sum()) for value in values])
    columns = {
        "low": interval.low,
        "high": interval.high,
        "rank": rank,
        "rank_low": 1 + above.sum(0),
        "rank_high": count - above.sum(1),
    }
    frame = part.select(*_RULE_KEYS, "figure", "value", "num_selected", "num_tokens", "num_prompts")
    frame = frame.with_columns(pl.Series(name, column) for name, column in columns.items())
    ranks = [
        pl.when(pl.col("value").is_finite()).then(pl.col(name).cast(pl.Int64))
        for name in ("rank", "rank_low", "rank_high")
    ]
    return frame.with_columns(*ranks).with_columns(
        pl.when(pl.col(name).is_finite()).then(pl.col(name)) for name in ("value", "low", "high")
    )


def _told_apart(values: Floats, replicates: Floats) -> np.ndarray:
    """[rules, rules] bool: whether the first is above the second, simultaneously over all pairs.

    A pair's difference is studentized by its standard deviation over resamples; the critical value
    is the 95% quantile of the largest |difference in a resample − difference| / sd of all pairs.
    """
    size = values.size
    first, second = np.triu_indices(size, 1)
    difference = values[first] - values[second]
    spread = replicates[first] - replicates[second]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.nanstd(spread, axis=1, ddof=1) if spread.size else np.zeros(0)
        usable = np.isfinite(difference) & np.isfinite(error)
        exact = usable & (error <= 1e-12 * np.maximum(np.abs(difference), 1e-300))
        tested = usable & ~exact
        distance = np.abs(spread[tested] - difference[tested][:, None]) / error[tested][:, None]
        largest = np.nanmax(distance, axis=0) if tested.any() else np.zeros(1)
        critical = float(np.nanquantile(largest, _CONFIDENCE))
        clear = (tested & (np.abs(difference) > critical * error)) | (exact & (difference != 0.0))
    above = np.zeros((size, size), dtype=bool)
    above[first, second] = clear & (difference > 0)
    above[second, first] = clear & (difference < 0)
    return above


def ranking_rows(
    chosen: Selected,
    figures: Mapping[RankFigure, Replicated],
    *,
    selection_scope: SelectionScope | str,
    setting: Mapping[str, object],
    num_tokens: int,
    num_prompts: int,
) -> pl.DataFrame:
    """Rows of `RankingTable` of one selection; `setting` names the measurement."""
    rows = [
        {
            "rule": chosen.rule,
            "form": str(chosen.form),
            "retention_ratio": chosen.retention_ratio,
            "selection_scope": str(SelectionScope(selection_scope)),
            "figure": str(figure),
            **setting,
            "value": _or_none(found.value),
            "replicates": [_or_none(value) for value in found.replicates.tolist()],
            "num_selected": float(chosen.times.sum()),
            "num_tokens": num_tokens,
            "num_prompts": num_prompts,
        }
        for figure, found in figures.items()
    ]
    return pl.DataFrame(rows, schema=polars_schema(RankingTable))


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
