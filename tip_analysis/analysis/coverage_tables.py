"""What each selection keeps and what it misses: coverage of sums, and Proposition 2 on data.

Reads masks and the token table, joined with gradients where φ is asked for; writes nothing. Every
table says on how many tokens, rollouts and prompts it stands, with standard errors and 95 %
intervals of `bootstrap`. Masks are part of the rule and stay as they are in each resample; cuts are
measured again.
"""

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import (
    Floats,
    Interval,
    bootstrap_interval,
    group_index,
    interval_frame,
    summands,
    sums_by_group,
    with_counts,
)
from tip_analysis.analysis.mask_tables import MASK_KEYS
from tip_analysis.analysis.resampling import Resampler, written_tokens
from tip_analysis.analysis.rules import known_rules
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, CutOptions, Taxonomy
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Quadrant

_MASKS_AT_ONCE = 16


def coverage_curve(
    masks: pl.DataFrame,
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    columns: Sequence[str] = ("grad_dot_loss",),
    num_resamples: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """How much of ΣC each rule keeps at each ρ, for columns such as φ, M or δ; sampling rules are
    averaged over seeds.

    The rules `random` (≈ ρ) and `gradient_oracle` (the most that any rule can keep of Σφ), where
    their masks are among `masks`, are the bounds to read the others against.

    Returns:
        A `CoverageTable` for each column, with selection_scope, column, share_se, token_share,
        num_seeds, num_tokens, num_rollouts and num_prompts (of the table).

    Raises:
        SchemaError: a column is missing, or no mask is given.
    """
    frame = written_tokens(tokens, list(columns), "coverage_curve")
    if masks.height == 0:
        raise SchemaError("coverage_curve needs at least one mask; found none")
    prompts = group_index(frame["prompt_id"])
    size = int(prompts.max()) + 1
    values = np.column_stack([summands(frame, list(columns)).values, np.ones(frame.height)])
    totals = sums_by_group(values, prompts, size)
    keys = ["rule", "retention_ratio", "selection_scope"]
    by_rule = masks.with_columns(pl.col("selection_scope").cast(pl.String)).group_by(
        keys, maintain_order=True
    )
    rows = []
    for key, part in by_rule:
        num_seeds = part["seed"].n_unique()
        share_of_seeds = times_selected(part, frame) / num_seeds
        kept = sums_by_group(values * share_of_seeds[:, None], prompts, size)
        interval = bootstrap_interval(kept, totals, num_resamples=num_resamples, seed=seed)
        ends = np.stack([interval.value, interval.low, interval.high, interval.se], axis=1)
        rows += [
            (*key, name, *ends[index].tolist(), float(interval.value[-1]), num_seeds)
            for index, name in enumerate(columns)
        ]
    numbers = ["share", "share_low", "share_high", "share_se", "token_share", "num_seeds"]
    table = pl.DataFrame(rows, schema=[*keys, "column", *numbers], orient="row")
    return with_counts(table.fill_nan(None), frame)


def times_selected(mask: pl.DataFrame, frame: pl.DataFrame) -> Floats:
    """[N] how many of a mask's seeds select each token."""
    place = ["rollout_id", "position"]
    counted = frame.select(place).join(
        mask.group_by(place).len("times"), on=place, how="left", maintain_order="left"
    )
    return counted["times"].fill_null(0).to_numpy()


def proposition_2(
    masks: pl.DataFrame,
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    num_resamples: int | None = None,
    seed: int = 0,
    **cuts: Unpack[CutOptions],
) -> pl.DataFrame:
    """Proposition 2 on data: what each mask takes from Q3, and how much of Q3 it misses.

    Returns:
        The mask's keys, entropy_only (the rule looks at entropy alone), then q3_share (of the
        selection that falls in Q3), q3_missed (share of Q3's tokens not selected) and, with
        gradients, q3_alignment_missed (share of Σφ over Q3 not selected), each with `_low`,
        `_high`, `_se`, and num_tokens (selected), num_q3 (in the table), num_rollouts, num_prompts.
        A share of Σφ is null where that sum is 0.

    Raises:
        SchemaError: a column is missing, or no mask is given.
    """
    if masks.height == 0:
        raise SchemaError("proposition_2 needs at least one mask; found none")
    tokens = tokens.lazy()
    has_phi = "grad_dot_loss" in tokens.collect_schema().names()
    frame = written_tokens(tokens, ["grad_dot_loss"] if has_phi else [], "proposition_2")
    resampler = Resampler(
        frame, taxonomy=taxonomy.changed(**cuts), num_resamples=num_resamples, seed=seed
    )
    masks = masks.with_columns(pl.col("selection_scope").cast(pl.String))
    keys = masks.select(MASK_KEYS).unique(maintain_order=True)
    phi = summands(frame, ["grad_dot_loss"]).values[:, 0] if has_phi else None
    names = ["q3_share", "q3_missed", *(["q3_alignment_missed"] if has_phi else [])]
    parts, sizes = [], []
    for start in range(0, keys.height, _MASKS_AT_ONCE):
        selected = _mask_matrix(masks, keys[start : start + _MASKS_AT_ONCE], frame)
        sizes += selected.sum(1).astype(np.int64).tolist()
        parts.append(interval_frame(_q3_interval(resampler, selected, phi), names))
    known = known_rules(keys["rule"].unique())
    entropy_only = [name for name, rule in known.items() if rule.is_entropy_only]
    only = pl.col("rule").is_in(entropy_only).alias("entropy_only")
    table = pl.concat([keys.with_columns(only), pl.concat(parts)], how="horizontal")
    return with_counts(table, frame).with_columns(
        pl.Series("num_tokens", sizes, dtype=pl.Int64),
        pl.lit(int((resampler.whole()[1] == Quadrant.Q3.code).sum()), pl.Int64).alias("num_q3"),
    )


def _q3_interval(resampler: Resampler, selected: Floats, phi: Floats | None) -> Interval:
    """Share of each selection in Q3, share of Q3 missed, and share of Σφ in Q3 missed, one block
    after the other."""
    size = selected.shape[0]
    columns = [
        np.ones(selected.shape[1]),
        *selected,
        *([phi, *(selected * phi)] if phi is not None else []),
    ]

    def finish(sums: Floats) -> Floats:
        q3, whole = sums[Quadrant.Q3.code], sums[:, 1 : size + 1].sum(0)
        taken = q3[1 : size + 1]
        parts = [taken / whole, 1.0 - taken / q3[0]]
        if phi is not None:
            parts.append(1.0 - q3[size + 2 :] / q3[size + 1])
        return np.concatenate(parts)

    return resampler.measure_sums(np.column_stack(columns), finish)


def _mask_matrix(masks: pl.DataFrame, keys: pl.DataFrame, frame: pl.DataFrame) -> Floats:
    """[masks, N] 1 where a token is selected."""
    place = frame.select("rollout_id", "position").with_row_index("_row")
    numbered = masks.join(keys.with_row_index("_mask"), on=MASK_KEYS).join(
        place, on=["rollout_id", "position"]
    )
    selected = np.zeros((keys.height, frame.height))
    selected[numbered["_mask"].to_numpy(), numbered["_row"].to_numpy()] = 1.0
    return selected
