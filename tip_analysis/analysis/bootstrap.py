"""The prompt bootstrap: intervals that respect what tokens and rollouts of one prompt share.

A resample draws prompts with replacement, each with all its rollouts; it is a vector of integer
weights, one per prompt, and no row is copied. What is measured on the data, such as cuts, is
measured again in each resample (`resampling`).

Intervals are expanded percentile intervals (Hesterberg 2015): the quantiles are widened as
Student's t widens the normal, and standard errors carry √(P/(P − 1)), so that few prompts do not
give intervals that are too narrow. One prompt gives none.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis.cut_measuring import otsu_index
from tip_analysis.analysis.cuts import CutSpec
from tip_analysis.core.names import CutKind

CONFIDENCE = 0.95
DEFAULT_RESAMPLES = 1000
TOKEN_BUDGET = 200_000_000
"""Tokens times resamples that a default number of resamples stays within, from 100 resamples up."""

_BLOCK_WEIGHTS = 1_000_000

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Interval:
    """Estimates with the standard error and the ends of the 95 % interval; NaN where they cannot be
    had."""

    value: Floats
    low: Floats
    high: Floats
    se: Floats


def default_resamples(num_tokens: int) -> int:
    """1000, or fewer on tables where that would take minutes, but at least 100."""
    return max(100, min(DEFAULT_RESAMPLES, TOKEN_BUDGET // max(num_tokens, 1)))


def prompt_weights(num_prompts: int, num_resamples: int, seed: int) -> np.ndarray:
    """[num_resamples, num_prompts] int64: how often each prompt is drawn; each row sums to the
    number of prompts."""
    return np.concatenate(list(weight_blocks(num_prompts, num_resamples, seed)))


def weight_blocks(num_prompts: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of `prompt_weights`, a block that fits in memory at a time."""
    generator = np.random.Generator(np.random.Philox(seed))
    block = max(1, _BLOCK_WEIGHTS // num_prompts)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        yield generator.multinomial(num_prompts, np.full(num_prompts, 1.0 / num_prompts), size=size)


def expanded_interval(value: Floats, replicates: Floats, num_prompts: int) -> Interval:
    """Standard error and expanded percentile interval of each statistic.

    Args:
        value: [S] estimates.
        replicates: [R, S] the same statistics in each resample; NaN where one had no token to
            measure.
        num_prompts: P. With P < 2, or where fewer than half of the resamples could be measured,
            there is no interval.
    """
    unknown = np.full(value.shape, math.nan)
    if num_prompts < 2:
        return Interval(value, unknown, unknown, unknown)
    stretch, tail = math.sqrt(num_prompts / (num_prompts - 1)), tail_probability(num_prompts)
    known = np.isfinite(replicates)
    usable = (known.mean(0) >= 0.5) & (known.sum(0) >= 2)
    kept = np.where(np.isfinite(replicates), replicates, math.nan)[:, usable]
    low, high, se = unknown.copy(), unknown.copy(), unknown.copy()
    if kept.size:
        low[usable], high[usable] = np.nanquantile(kept, [tail, 1.0 - tail], axis=0)
        se[usable] = np.nanstd(kept, axis=0, ddof=1) * stretch
    return Interval(value, low, high, se)


def tail_probability(num_prompts: int, confidence: float = CONFIDENCE) -> float:
    """The quantile of the resamples at which an expanded percentile interval of P ≥ 2 prompts
    ends."""
    stretch = math.sqrt(num_prompts / (num_prompts - 1))
    return float(stats.norm.cdf(stretch * stats.t.ppf(0.5 - confidence / 2.0, num_prompts - 1)))


def bootstrap_interval(
    numerator: Floats, denominator: Floats, *, num_resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> Interval:
    """Ratios of sums with intervals, from sums per prompt alone: [P, S] over [P, S] (or [P, 1]).

    A mean over items is the ratio of the sum per prompt to the number of items per prompt.
    """
    blocks = weight_blocks(numerator.shape[0], num_resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = numerator.sum(0) / denominator.sum(0)
        parts = [
            (weights @ numerator) / (weights @ denominator)
            for weights in (block.astype(np.float64) for block in blocks)
        ]
        replicates = np.concatenate(parts)
    return expanded_interval(value, replicates, numerator.shape[0])


class SortedColumn:
    """A column sorted once, from which weighted quantiles, means and Otsu cuts take one pass; +inf
    is left out.

    With integer weights each equals its plain form on rows repeated that often.
    """

    def __init__(self, values: Floats) -> None:
        finite = np.flatnonzero(np.isfinite(values))
        self.order = finite[np.argsort(values[finite], kind="stable")]
        self.values = values[self.order]

    def quantile(self, weights: Floats, quantile: float) -> float:
        """Linear interpolation between order statistics, as `numpy.quantile`; NaN where nothing has
        weight."""
        cumulative = np.cumsum(weights[self.order])
        total = cumulative[-1] if cumulative.size else 0.0
        if total < 1.0:
            return math.nan
        place = quantile * (total - 1.0)
        below = math.floor(place)
        first, second = np.searchsorted(
            cumulative, [below, min(below + 1, total - 1.0)], side="right"
        )
        low, high = self.values[first], self.values[second]
        return float(low + (place - below) * (high - low))

    def mean(self, weights: Floats) -> float:
        """Weighted mean; NaN where nothing has weight."""
        kept = weights[self.order]
        total = kept.sum()
        return float(kept @ self.values / total) if total > 0 else math.nan

    def extremes(self, weights: Floats) -> tuple[float, float]:
        """Smallest and largest value with weight; NaN where nothing has."""
        present = weights[self.order] > 0
        if not present.any():
            return math.nan, math.nan
        return float(self.values[int(present.argmax())]), float(
            self.values[present.size - 1 - int(present[::-1].argmax())]
        )

    def otsu(self, weights: Floats) -> float:
        """The value that splits with the largest between-class variance; NaN where nothing has
        weight."""
        kept = weights[self.order]
        present = kept > 0
        if not present.any():
            return math.nan
        values = self.values[present]
        return float(values[otsu_index(values, kept[present])])

    def cut(self, weights: Floats, spec: CutSpec) -> float:
        """The cut that `spec` (any but `paper`) means on the weighted values; NaN where nothing has
        weight."""
        if spec.kind is CutKind.NATS:
            return float(spec.number or 0.0)
        if spec.kind is CutKind.MEAN:
            return self.mean(weights)
        if spec.kind is CutKind.OTSU:
            return self.otsu(weights)
        return self.quantile(weights, spec.quantile)


def group_index(column: pl.Series) -> np.ndarray:
    """[N] int64: which of the distinct values, in sorted order, each row has."""
    return column.rank("dense").to_numpy().astype(np.int64) - 1


def with_counts(table: pl.DataFrame, frame: pl.DataFrame) -> pl.DataFrame:
    """A result table with num_tokens, num_rollouts and num_prompts of the frame that it was made
    from."""
    return table.with_columns(
        pl.lit(frame.height, pl.Int64).alias("num_tokens"),
        pl.lit(frame["rollout_id"].n_unique(), pl.Int64).alias("num_rollouts"),
        pl.lit(frame["prompt_id"].n_unique(), pl.Int64).alias("num_prompts"),
    )


def sums_by_group(values: Floats, groups: np.ndarray, num_groups: int) -> Floats:
    """[G, S] sums of the columns of [N, S] by group [N]."""
    sums = [
        np.bincount(groups, weights=column, minlength=num_groups).astype(np.float64)
        for column in values.T
    ]
    return np.stack(sums, axis=1)


def interval_frame(interval: Interval, names: Sequence[str] = ("value",)) -> pl.DataFrame:
    """Statistics that lie one block after the other, as columns NAME, NAME_low, NAME_high, NAME_se
    of each block.

    The single name `value` gives value, low, high, se. NaN becomes null.
    """
    ends = {"": interval.value, "_low": interval.low, "_high": interval.high, "_se": interval.se}
    blocks = {tail: np.split(part, len(names)) for tail, part in ends.items()}
    frame = pl.DataFrame(
        {name + tail: blocks[tail][index] for index, name in enumerate(names) for tail in ends}
    )
    if tuple(names) == ("value",):
        frame = frame.rename(lambda column: column.removeprefix("value_"))
    return frame.with_columns(pl.when(pl.all().is_finite()).then(pl.all()))


@dataclass(frozen=True)
class Summands:
    """Per-token values whose sums over a set of tokens make shares and means."""

    names: list[str]
    values: Floats
    """[N, S]; 0 where unknown."""
    known: Floats
    """[N, S] 1 where known and finite."""


def summands(frame: pl.DataFrame, columns: list[str]) -> Summands:
    """Numeric columns as what sums are made of."""
    raw = np.stack(
        [frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in columns], axis=1
    )
    known = np.isfinite(raw)
    return Summands(columns, np.where(known, raw, 0.0), known.astype(np.float64))
