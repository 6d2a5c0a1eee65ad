"""The quadrant rule of Table 1, once for each engine: polars, float64 arrays, float32 arrays, and a
histogram over many cuts at once.

Reads and writes nothing. All say the same: high is strictly above the cut, a divergence of +inf is
high whatever the cut, and where a cut could not be measured nothing finite is above it. In arrays a
quadrant is its code (`Quadrant.code`).
"""

from typing import Any

import numpy as np
import polars as pl

from tip_analysis.core.names import Quadrant

Floats = np.ndarray[Any, np.dtype[np.float64]]
Codes = np.ndarray[Any, np.dtype[np.uint8]]

QUADRANTS = tuple(Quadrant)
"""Quadrant of each code."""


def is_high_expression(column: pl.Expr, threshold: pl.Expr) -> pl.Expr:
    """Whether a column is above its cut; null where the cut is null (nothing was measured)."""
    column = column.cast(pl.Float64)
    return pl.when(column.is_infinite()).then(True).otherwise(column > threshold)


def quadrant_expression(high_entropy: pl.Expr, high_divergence: pl.Expr) -> pl.Expr:
    """The quadrant as Enum; an axis that is null counts as low."""

    def beside(high: Quadrant, low: Quadrant) -> pl.Expr:
        return pl.when(high_divergence).then(pl.lit(high.value)).otherwise(pl.lit(low.value))

    uncertain, confident = beside(Quadrant.Q1, Quadrant.Q2), beside(Quadrant.Q3, Quadrant.Q4)
    return pl.when(high_entropy).then(uncertain).otherwise(confident).cast(pl.Enum(Quadrant))


def quadrant_codes(entropy: Floats, divergence: Floats, cuts: Any) -> Codes:
    """[N] codes of float64 columns [N] under the cuts (entropy, divergence); NaN is a cut that
    could not be measured."""
    uncertain = entropy > cuts[0]
    disagreeing = (divergence > cuts[1]) | np.isinf(divergence)
    return _codes(uncertain, disagreeing)


def quadrant_codes_float32(
    entropy: np.ndarray, divergence: np.ndarray, cuts: tuple[np.float32, np.float32]
) -> Codes:
    """[N] codes of float32 columns [N], without a copy in float64, under cuts of
    `float32_threshold`."""
    return _codes(entropy > cuts[0], divergence > cuts[1])


def float32_threshold(threshold: float) -> np.float32:
    """The largest finite float32 not above the threshold: a float32 lies above one where it lies
    above the other."""
    rounded = np.float32(min(threshold, float(np.finfo(np.float32).max)))
    return np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > threshold else rounded


def _codes(uncertain: np.ndarray, disagreeing: np.ndarray) -> Codes:
    return 2 * (~uncertain).view(np.uint8) + (~disagreeing).view(np.uint8)


def shares_by_cut(
    entropy: Floats, divergence: Floats, entropy_cuts: list[float], divergence_cuts: list[float]
) -> Floats:
    """[4, E, D] shares of Q1 … Q4 for every pair of cuts, from one joint histogram over the cells
    between cuts."""
    rows, columns = np.unique(entropy_cuts), np.unique(divergence_cuts)
    finite_columns = columns[np.isfinite(columns)]
    cell = np.searchsorted(rows, entropy, side="left") * (columns.size + 1)
    cell += np.where(
        np.isinf(divergence), columns.size, np.searchsorted(finite_columns, divergence, side="left")
    )
    counts = np.bincount(cell, minlength=(rows.size + 1) * (columns.size + 1)).reshape(
        rows.size + 1, columns.size + 1
    )
    above = counts[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1]
    i = np.searchsorted(rows, entropy_cuts) + 1
    j = np.searchsorted(columns, divergence_cuts) + 1
    both, high_entropy, high_divergence = (
        above[np.ix_(i, j)],
        above[i, 0][:, None],
        above[0, j][None, :],
    )
    total = entropy.size
    parts = [
        both,
        high_entropy - both,
        high_divergence - both,
        total - high_entropy - high_divergence + both,
    ]
    return np.stack(np.broadcast_arrays(*parts)) / total
