"""Tables larger than memory: columns in chunks, histograms fine enough for ranks, and exact
quantiles in two passes.

Reads any token table as a lazy frame, by polars' streaming engine; writes nothing. A grid has a bin
for every value of the upper 20 bits of a float32, so bins keep the order of values and are 2⁻¹¹ of
their value wide (0.05 %). Ranks are taken from the grid with an error that `ColumnGrid.rank_error`
bounds; order statistics are exact, since a second pass gathers the values of their bins.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.core.errors import SchemaError

LARGE_TABLE_ROWS = 5_000_000
"""Above this many rows, bounds and cuts are measured in passes over the table instead of on
collected columns."""

CHUNK_ROWS = 131_072
"""Rows at a time: a float32 column of them fits a CPU's cache."""

_SHIFT = 12
_NUM_BINS = 1 << (32 - _SHIFT)
_HEAVY = 1e-4
"""Share of all values from which a bin is checked for holding one value only."""

Array = np.ndarray[Any, Any]


def is_large(tokens: pl.LazyFrame) -> bool:
    """Whether the table has more rows than `LARGE_TABLE_ROWS`."""
    return int(tokens.select(pl.len()).collect(engine="streaming").item()) > LARGE_TABLE_ROWS


def stream_batches(
    tokens: pl.LazyFrame, columns: Sequence[str], numbers: Sequence[str]
) -> Iterator[pl.DataFrame]:
    """The rows that the student wrote, in order and in batches; `numbers` as float32, rows with a
    null among them left out."""
    written = (
        tokens.filter("loss_mask")
        .select(*columns, pl.col(list(numbers)).cast(pl.Float32))
        .drop_nulls(list(numbers))
    )
    batches = written.collect_batches(
        chunk_size=CHUNK_ROWS, maintain_order=True, engine="streaming"
    )
    return (batch for batch in batches if batch.height)


def stream_columns(tokens: pl.LazyFrame, numbers: Sequence[str]) -> Iterator[list[Array]]:
    """The same as lists of float32 arrays, one per column of `numbers`."""
    for batch in stream_batches(tokens, [], numbers):
        yield [batch[name].to_numpy() for name in numbers]


def bins_of(values: Array) -> Array:
    """[N] bin of each float32, in the order of the values; −0 and 0 share one."""
    bits = values.view(np.uint32)
    if values.min() >= 0:
        return (bits >> np.uint32(_SHIFT)) | np.uint32(_NUM_BINS // 2)
    ordered = np.where(values < 0, ~bits, bits | np.uint32(1 << 31))
    return ordered >> np.uint32(_SHIFT)


class ColumnGrid:
    """What one pass over a column of float32 leaves: a histogram, and count, sum and extremes of
    its finite values."""

    def __init__(self) -> None:
        self.counts = np.zeros(_NUM_BINS, dtype=np.int64)
        self.num_finite = 0
        self.total = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Array) -> None:
        """Count a chunk."""
        bins = bins_of(values)
        base = int(bins.min())
        counted = np.bincount(bins - np.uint32(base))
        self.counts[base : base + counted.size] += counted
        finite = (
            values
            if np.isfinite(values.max()) and np.isfinite(values.min())
            else values[np.isfinite(values)]
        )
        if finite.size:
            self.num_finite += finite.size
            self.total += float(finite.sum(dtype=np.float64))
            self.low, self.high = (
                min(self.low, float(finite.min())),
                max(self.high, float(finite.max())),
            )

    @property
    def num_values(self) -> int:
        """All values, +inf included."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float | None:
        """Mean of the finite values; None where there is none."""
        return self.total / self.num_finite if self.num_finite else None

    def bins_of_ranks(self, ranks: Array) -> Array:
        """The bin that holds each order statistic (from 0) of the finite values."""
        return np.searchsorted(np.cumsum(self.counts), ranks, side="right")

    def standard_ranks(self) -> Array:
        """[bins] float32: (midrank − mean rank) / N of each bin, in (−½, ½)."""
        before = np.cumsum(self.counts) - self.counts
        number = max(self.num_values, 1)
        return ((before + (self.counts - number) / 2.0) / number).astype(np.float32)

    def heavy_bins(self) -> list[int]:
        """Bins that hold so much that it matters for the error whether they hold one value or
        many."""
        return np.flatnonzero(self.counts > _HEAVY * self.num_values).tolist()

    def rank_error(self, tied: frozenset[int] = frozenset()) -> float:
        """Largest possible ‖rank − rank on the grid‖ / ‖rank‖, ranks centred; `tied` are bins that
        hold one value each.

        Within a bin of c values true ranks spread by at most (c² − 1)/12 in variance around the
        grid's.
        """
        counts = self.counts.astype(np.float64)
        spread = counts * (counts**2 - 1.0)
        spread[list(tied)] = 0.0
        number = float(self.num_values)
        return math.sqrt(spread.sum() / max(number * (number**2 - 1.0), 1.0))


def measure_grids(tokens: pl.LazyFrame, columns: Sequence[str]) -> dict[str, ColumnGrid]:
    """One pass: a grid of each column, over the rows that the student wrote."""
    grids = {name: ColumnGrid() for name in columns}
    for arrays in stream_columns(tokens, columns):
        for grid, values in zip(grids.values(), arrays, strict=True):
            grid.add(values)
    return grids


def exact_quantiles(
    tokens: pl.LazyFrame, grids: Mapping[str, ColumnGrid], quantiles: Mapping[str, Sequence[float]]
) -> dict[str, list[float | None]]:
    """Quantiles of the finite values by linear interpolation, exact, in one more pass over their
    columns.

    Args:
        tokens: The table that `grids` were measured on.
        grids: Of at least the columns asked for, none of which may be −inf.
        quantiles: In [0, 1], by column.

    Returns:
        By column, in order; None where a column has no finite value.

    Raises:
        SchemaError: the table changed between the passes.
    """
    places = {
        name: np.asarray(wanted) * (grids[name].num_finite - 1)
        for name, wanted in quantiles.items()
    }
    columns = [name for name in quantiles if grids[name].num_finite and len(quantiles[name])]
    ranks = {
        name: np.unique([np.floor(places[name]), np.ceil(places[name])]).astype(np.int64)
        for name in columns
    }
    bins = {name: np.unique(grids[name].bins_of_ranks(ranks[name])) for name in columns}
    gathered: dict[str, list[tuple[Array, Array]]] = {name: [] for name in columns}
    for arrays in stream_columns(tokens, columns) if columns else ():
        for name, values in zip(columns, arrays, strict=True):
            keys = bins_of(values)
            inside = (
                values[np.isin(keys, bins[name])]
                if bins[name].size > 1
                else values[keys == bins[name][0]]
            )
            gathered[name].append(np.unique(inside, return_counts=True))
    found: dict[str, list[float | None]] = {
        name: [None] * len(wanted) for name, wanted in quantiles.items()
    }
    for name in columns:
        order = _order_statistics(grids[name], bins[name], gathered[name], ranks[name])
        found[name] = [_interpolate(order, place) for place in places[name].tolist()]
    return found


def _interpolate(order: dict[int, float], place: float) -> float:
    low, high = order[math.floor(place)], order[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def _order_statistics(
    grid: ColumnGrid, bins: Array, parts: list[tuple[Array, Array]], ranks: Array
) -> dict[int, float]:
    values = np.concatenate([part[0] for part in parts])
    counts = np.concatenate([part[1] for part in parts])
    order = np.argsort(values, kind="stable")
    values, cumulative = values[order], np.cumsum(counts[order])
    if grid.counts[bins].sum() != counts.sum():
        raise SchemaError("the table changed while it was read; measure it again")
    before = np.cumsum(grid.counts) - grid.counts
    inside = np.cumsum(grid.counts[bins]) - grid.counts[bins]
    found = {}
    for rank in ranks.tolist():
        place = int(np.searchsorted(bins, grid.bins_of_ranks(np.array([rank]))[0]))
        offset = rank - int(before[bins[place]]) + int(inside[place])
        found[rank] = float(values[int(np.searchsorted(cumulative, offset, side="right"))])
    return found
