"""Tokens over the plane of both axes, in cells fine enough to move both cuts without the tokens.

Reads the token table in one pass, in chunks; writes nothing. Cells are closed on the right, as cuts
are: high is strictly above. So the number of tokens of each quadrant is exact for every pair of
edges, whatever the size of the table, and the cuts in use are among the edges.
"""

import math
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import polars as pl

from tip_analysis.analysis.cuts import AXIS_COLUMNS, Cuts
from tip_analysis.analysis.grids import Array, stream_columns

_SERIES = tuple(round(10 ** (1 + k / 24)) for k in range(24))
"""Two digits that divide a decade about evenly."""
_DECADES = range(-6, 3)
_ROUND = ((0.01, 30), (0.05, 40), (0.1, 50), (0.5, 60))
"""Step and number of round cuts, nats, which people type."""


@dataclass(frozen=True)
class JointGrid:
    """Counts of tokens, and their summed loss, per cell of the plane of entropy and divergence.

    A value lies in cell i where i edges are strictly below it; divergences of +inf lie in a last
    column of their own, above every edge, and are left out of the loss.
    """

    entropy_edges: Array
    """[E] increasing, nats."""
    divergence_edges: Array
    """[D] increasing, nats."""
    counts: Array
    """[E + 1, D + 2] int64."""
    loss: Array
    """[E + 1, D + 2] Σ reverse KL, nats."""

    def quadrant_counts(self, entropy_cut: float, divergence_cut: float) -> Array:
        """[4] tokens of Q1 … Q4 under two of the edges.

        Raises:
            ValueError: a cut is no edge.
        """
        places = []
        for edges, cut in (
            (self.entropy_edges, entropy_cut),
            (self.divergence_edges, divergence_cut),
        ):
            place = int(np.searchsorted(edges, cut))
            if place == edges.size or edges[place] != cut:
                raise ValueError(f"expected a cut among the grid's edges, found {cut}")
            places.append(place + 1)
        i, j = places
        cells = self.counts
        parts = cells[i:, j:], cells[i:, :j], cells[:i, j:], cells[:i, :j]
        return np.array([int(part.sum()) for part in parts])


def measure_joint_grid(tokens: pl.LazyFrame, cuts: Cuts) -> JointGrid:
    """Count the tokens that the student wrote, in one pass over the table.

    Args:
        tokens: Token table.
        cuts: Those in use; where there is one for each batch they are no edges.
    """
    names = list(AXIS_COLUMNS.values())
    highest = tokens.filter("loss_mask").select(
        pl.col(name).filter(pl.col(name).is_finite()).max() for name in names
    )
    tops = highest.collect(engine="streaming").row(0)
    edges = [
        cut_edges(top or 1.0, cut.value)
        for top, cut in zip(tops, (cuts.entropy, cuts.divergence), strict=True)
    ]
    return count_cells(tokens, *edges)


def cut_edges(highest: float, cut: float | None) -> Array:
    """Edges from 0 to the first at or above the highest value: 24 a decade, round numbers, and the
    cut in use."""
    series = {digits * 10.0**power / 10.0 for power in _DECADES for digits in _SERIES}
    rounded = {round(step * k, 2) for step, number in _ROUND for k in range(number + 1)}
    known = sorted({float(f"{edge:.3g}") for edge in series} | rounded)
    below = list(takewhile(lambda edge: edge < highest, known))
    edges = {*below, *known[len(below) : len(below) + 1]}
    if cut is not None and math.isfinite(cut):
        edges.add(float(cut))
    return np.array(sorted(edges))


def count_cells(tokens: pl.LazyFrame, entropy_edges: Array, divergence_edges: Array) -> JointGrid:
    """The grid on given edges."""
    shape = entropy_edges.size + 1, divergence_edges.size + 2
    size = shape[0] * shape[1]
    counts, loss = np.zeros(size, np.int64), np.zeros(size)
    for entropy, divergence in stream_columns(tokens, list(AXIS_COLUMNS.values())):
        infinite = np.isinf(divergence)
        column = np.searchsorted(divergence_edges, divergence, side="left")
        column[infinite] = divergence_edges.size + 1
        cell = np.searchsorted(entropy_edges, entropy, side="left") * shape[1] + column
        counts += np.bincount(cell, minlength=size)
        finite = np.where(infinite, 0.0, divergence).astype(np.float64)
        loss += np.bincount(cell, weights=finite, minlength=size)
    return JointGrid(entropy_edges, divergence_edges, counts.reshape(shape), loss.reshape(shape))
