"""Means within groups of tokens: entropy, divergence, and where they were measured the size and
direction of gradients, by turn, by part of the turn, before and after the first error.

Reads the token table; writes nothing. Intervals come from resampling prompts.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import Floats, interval_frame
from tip_analysis.analysis.groupings import available_grouping, with_group
from tip_analysis.analysis.resampling import Resampler, written_tokens

MEANS = ("student_entropy", "reverse_kl")
"""What every scored token has."""


def group_means(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    grouping: str,
    columns: Sequence[str] = MEANS,
    num_resamples: int | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """The mean of each column within each group of tokens.

    Args:
        tokens: token table, with further columns joined where they are asked for.
        grouping: a name of `groupings.GROUPINGS`.
        columns: what is averaged; tokens for which it is null or infinite are left out of it.
        num_resamples: of prompts; None for a number that suits the size of the table.
        seed: of the resamples.

    Returns:
        grouping, group, column, mean and share (of the column's sum over all groups; of a column
        of either sign it may lie outside [0, 1]), each with `_low`, `_high` and `_se`, and
        num_tokens that the mean is over. Null where there are none.

    Raises:
        UnknownNameError: there is no such grouping.
        SchemaError: a column is missing.
    """
    chosen = available_grouping(tokens, grouping)
    written = written_tokens(tokens, [*chosen.columns, *columns], "group_means")
    frame = with_group(written, grouping, "_group")
    present = set(frame["_group"].unique())
    names = [name for name in chosen.names if name in present]
    members = np.stack([(frame["_group"] == name).to_numpy() for name in names], axis=1)
    parts = [_counts_and_sums(frame[column], members) for column in columns]
    resampler = Resampler(frame, num_resamples=num_resamples, seed=seed)
    interval = resampler.measure_sums(
        np.concatenate(parts, axis=1), lambda sums: _means_and_shares(sums.sum(0), len(columns))
    )
    counts = np.concatenate([part[:, : len(names)].sum(0) for part in parts]).astype(np.int64)
    table = pl.DataFrame(
        {
            "grouping": [grouping] * len(counts),
            "group": names * len(columns),
            "column": [column for column in columns for _ in names],
            "num_tokens": counts,
        }
    )
    return pl.concat([table, interval_frame(interval, ("mean", "share"))], how="horizontal")


def _counts_and_sums(values: pl.Series, members: np.ndarray) -> Floats:
    """[N, 2G]: whether a token counts in each group, and its value there."""
    numbers = values.cast(pl.Float64).to_numpy()
    usable = np.isfinite(numbers)
    counted = members & usable[:, None]
    weighted = np.where(counted, np.where(usable, numbers, 0.0)[:, None], 0.0)
    return np.concatenate([counted.astype(np.float64), weighted], axis=1)


def _means_and_shares(sums: Floats, num_columns: int) -> Floats:
    """[2CG] the means of all columns and groups, then their shares."""
    counts, totals = sums.reshape(num_columns, 2, -1).transpose(1, 0, 2)
    means, shares = totals / counts, totals / totals.sum(1, keepdims=True)
    return np.concatenate([means.ravel(), shares.ravel()])
