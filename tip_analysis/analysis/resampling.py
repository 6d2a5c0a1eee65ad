"""Quadrants and scores in resamples of prompts: cuts and bounds measured again in each, exactly as
on the copied rows.

Reads the token table; writes nothing. `Resampler.measure` takes any statistic of (weights,
quadrants). `Resampler.measure_sums` takes sums by quadrant and is what large tables need: a
resample only moves the cuts a little, so tokens that no cut of any resample passes are summed once
per prompt, and only the others are looked at again.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import (
    Floats,
    Interval,
    SortedColumn,
    default_resamples,
    expanded_interval,
    group_index,
    sums_by_group,
    weight_blocks,
)
from tip_analysis.analysis.cuts import CutSpec
from tip_analysis.analysis.paper_preset import paper_cuts
from tip_analysis.analysis.quadrant_rule import Codes, quadrant_codes
from tip_analysis.analysis.scores import ENTROPY_CLIP
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import CutKind, Scope

_LARGEST_HISTOGRAM = 8_000_000
"""Prompts times bins of the histograms from which weighted quantiles start."""


class Resampler:
    """Weights and quadrants of the table itself and of its resamples.

    Args:
        frame: Tokens that the student wrote: prompt_id, batch_id, student_entropy, reverse_kl,
            without nulls.
        taxonomy: Whose cuts are measured again in each resample.
        num_resamples: None for `default_resamples`.
        seed: Of the resamples.
    """

    def __init__(
        self,
        frame: pl.DataFrame,
        *,
        taxonomy: Taxonomy = DEFAULT_TAXONOMY,
        num_resamples: int | None = None,
        seed: int = 0,
    ) -> None:
        if frame.height == 0:
            raise SchemaError(
                "statistics need at least one token that the student wrote; the table has none"
            )
        if num_resamples is not None and num_resamples < 2:
            raise OptionError(f"num_resamples must be at least 2; found {num_resamples}")
        self.frame = frame
        self.num_tokens = frame.height
        self.num_resamples = num_resamples or default_resamples(frame.height)
        self.prompts = group_index(frame["prompt_id"])
        self.num_prompts = int(self.prompts.max()) + 1
        self._seed = seed
        self._specs = taxonomy.specs
        self._entropy = frame["student_entropy"].cast(pl.Float64).to_numpy()
        self._divergence = frame["reverse_kl"].cast(pl.Float64).to_numpy()
        batches = (
            group_index(frame["batch_id"])
            if taxonomy.cut_scope is Scope.BATCH
            else np.zeros(frame.height, dtype=np.int64)
        )
        order = np.argsort(batches, kind="stable")
        self._groups = np.split(order, np.flatnonzero(np.diff(batches[order])) + 1)
        self._sorted = [
            (SortedColumn(self._entropy[rows]), SortedColumn(self._divergence[rows]))
            for rows in self._groups
        ]

    def whole(self) -> tuple[Floats, Codes]:
        """Weights of one, and the quadrants of the table itself."""
        weights = np.ones(self.num_tokens)
        return weights, self.codes(weights)

    def __iter__(self) -> Iterator[tuple[Floats, Codes]]:
        """Weights [N] and quadrant codes [N] of each resample."""
        for weights in self.weights():
            yield weights, self.codes(weights)

    def weights(self) -> Iterator[Floats]:
        """Weights [N] of each resample."""
        for block in weight_blocks(self.num_prompts, self.num_resamples, self._seed):
            for row in block:
                yield row.astype(np.float64)[self.prompts]

    def codes(self, weights: Floats) -> Codes:
        """[N] quadrant codes (`Quadrant.code`) under the cuts that these weights give."""
        codes = np.empty(self.num_tokens, dtype=np.uint8)
        for rows, columns in zip(self._groups, self._sorted, strict=True):
            everything = len(self._groups) == 1
            entropy, divergence, kept = (
                array if everything else array[rows]
                for array in (self._entropy, self._divergence, weights)
            )
            part = quadrant_codes(
                entropy, divergence, self._cuts(entropy, divergence, kept, columns)
            )
            codes[slice(None) if everything else rows] = part
        return codes

    def _cuts(
        self,
        entropy: Floats,
        divergence: Floats,
        weights: Floats,
        columns: tuple[SortedColumn, SortedColumn],
    ) -> Any:
        if self._specs[0].kind is not CutKind.PAPER:
            return columns[0].cut(weights, self._specs[0]), columns[1].cut(weights, self._specs[1])
        times = weights.astype(np.int64)
        if times.sum() == 0:
            return math.nan, math.nan
        return paper_cuts(np.repeat(entropy, times), np.repeat(divergence, times))[:2]

    def measure(self, statistic: Callable[[Floats, Codes], Floats]) -> Interval:
        """A vector of statistics of (weights, quadrant codes), with intervals.

        Args:
            statistic: (weights [N], codes [N]) -> [S]; NaN where a statistic has nothing to
                measure.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value = statistic(*self.whole())
            if self.num_prompts < 2:
                return expanded_interval(value, np.empty((0, value.size)), self.num_prompts)
            replicates = np.stack([statistic(weights, codes) for weights, codes in self])
        return expanded_interval(value, replicates, self.num_prompts)

    def measure_sums(self, values: Floats, finish: Callable[[Floats], Floats]) -> Interval:
        """Statistics of sums by quadrant, with intervals; the same as `measure` with these sums,
        and faster on many tokens.

        Args:
            values: [N, S] what is summed.
            finish: Weighted sums of each quadrant [4, S] -> [T] statistics; NaN where one has
                nothing to measure.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value = finish(
                _quadrant_sums(
                    values, self.codes(np.ones(self.num_tokens)), np.ones(self.num_tokens)
                )
            )
            if self.num_prompts < 2:
                return expanded_interval(value, np.empty((0, value.size)), self.num_prompts)
            cuts = self._cuts_of_resamples()
            if cuts is None or not np.isfinite(cuts).all():
                sums = (_quadrant_sums(values, codes, weights) for weights, codes in self)
            else:
                sums = self._sums_of_resamples(values, cuts)
            replicates = np.stack([finish(total) for total in sums])
        return expanded_interval(value, replicates, self.num_prompts)

    def _cuts_of_resamples(self) -> Floats | None:
        """[R, 2] both cuts in each resample; None where they cannot be had without going through
        all tokens."""
        kinds = {spec.kind for spec in self._specs}
        if len(self._groups) > 1 or kinds & {CutKind.OTSU, CutKind.PAPER}:
            return None
        columns = self._sorted[0]
        parts = [
            _PromptSums(column, self.prompts, self.num_prompts, spec)
            for column, spec in zip(columns, self._specs, strict=True)
        ]
        blocks = weight_blocks(self.num_prompts, self.num_resamples, self._seed)
        return np.concatenate(
            [
                np.stack([part.cuts(block.astype(np.float64)) for part in parts], axis=1)
                for block in blocks
            ]
        )

    def _sums_of_resamples(self, values: Floats, cuts: Floats) -> Iterator[Floats]:
        """[4, S] sums of each resample under its cuts."""
        low, high = cuts.min(0), cuts.max(0)
        finite = np.isfinite(self._divergence)
        moving = (self._entropy > low[0]) & (self._entropy <= high[0])
        moving |= finite & (self._divergence > low[1]) & (self._divergence <= high[1])
        settled, rows = np.flatnonzero(~moving), np.flatnonzero(moving)
        cells = self.prompts[settled] * 4 + quadrant_codes(
            self._entropy[settled], self._divergence[settled], high
        )
        by_prompt = sums_by_group(values[settled], cells, self.num_prompts * 4).reshape(
            self.num_prompts, -1
        )
        entropy, divergence = self._entropy[rows], self._divergence[rows]
        prompts, rest = self.prompts[rows], values[rows]
        resample = 0
        for block in weight_blocks(self.num_prompts, self.num_resamples, self._seed):
            for weights, base in zip(block, block @ by_prompt, strict=True):
                total = base.reshape(4, values.shape[1])
                if rows.size:
                    codes = quadrant_codes(entropy, divergence, cuts[resample])
                    total = total + _quadrant_sums(rest, codes, weights[prompts].astype(np.float64))
                resample += 1
                yield total


class _PromptSums:
    """A cut in every resample, from what each prompt adds: exact, without a pass over all tokens
    per resample."""

    def __init__(
        self, column: SortedColumn, prompts: np.ndarray, num_prompts: int, spec: CutSpec
    ) -> None:
        self._spec, self._values, self._prompts = spec, column.values, prompts[column.order]
        size = self._values.size
        num_bins = min(max(_LARGEST_HISTOGRAM // num_prompts, 16), 512, max(size, 1))
        self._edges = np.linspace(0, size, num_bins + 1).astype(np.int64)
        cells = self._prompts * num_bins + np.repeat(np.arange(num_bins), np.diff(self._edges))
        counts = np.bincount(cells, minlength=num_prompts * num_bins)
        self._counts = counts.reshape(num_prompts, num_bins).astype(np.float64)
        self._totals = np.bincount(self._prompts, weights=self._values, minlength=num_prompts)

    def cuts(self, weights: Floats) -> Floats:
        """[B] cuts under prompt weights [B, P]; NaN where nothing has weight."""
        if self._spec.kind is CutKind.NATS:
            return np.full(weights.shape[0], float(self._spec.number or 0.0))
        counts = weights @ self._counts
        if self._spec.kind is CutKind.MEAN:
            return (weights @ self._totals) / counts.sum(1)
        return np.array(
            [
                self._quantile(row, np.cumsum(count), self._spec.quantile)
                for row, count in zip(weights, counts, strict=True)
            ]
        )

    def _quantile(self, weights: Floats, cumulative: Floats, quantile: float) -> float:
        total = cumulative[-1]
        if total < 1.0:
            return math.nan
        place = quantile * (total - 1.0)
        below = math.floor(place)
        low, high = (
            self._order_statistic(weights, cumulative, rank)
            for rank in (below, min(below + 1, total - 1.0))
        )
        return low + (place - below) * (high - low)

    def _order_statistic(self, weights: Floats, cumulative: Floats, rank: float) -> float:
        index = int(np.searchsorted(cumulative, rank, side="right"))
        inside = slice(int(self._edges[index]), int(self._edges[index + 1]))
        before = cumulative[index - 1] if index else 0.0
        within = before + np.cumsum(weights[self._prompts[inside]])
        return float(self._values[inside][int(np.searchsorted(within, rank, side="right"))])


def _quadrant_sums(values: Floats, codes: Codes, weights: Floats) -> Floats:
    """[4, S] weighted sums of [N, S] by quadrant."""
    return ((codes[None, :] == np.arange(4, dtype=np.uint8)[:, None]) * weights) @ values


class ResampledScores:
    """ĥ, δ̂, Soft-OR and the Q3 score with the bounds that a resample gives (scope `run`, no clip
    of δ)."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self._h = frame["student_entropy_norm"].cast(pl.Float64).to_numpy()
        self._delta = frame["reverse_kl"].cast(pl.Float64).to_numpy()
        self._forward = frame["forward_kl"].cast(pl.Float64).to_numpy()
        self._sorted = SortedColumn(self._h), SortedColumn(self._delta)

    def soft_or_and_q3(self, weights: Floats) -> tuple[Floats, Floats]:
        """[N] Soft-OR and [N] Q3 score under the bounds of these weights."""
        entropy_hat = _min_max(
            self._h,
            self._sorted[0].extremes(weights)[0],
            self._sorted[0].quantile(weights, ENTROPY_CLIP),
        )
        divergence_hat = _min_max(self._delta, *self._sorted[1].extremes(weights))
        divergence_hat[np.isinf(self._delta)] = 1.0
        rest = 1.0 - entropy_hat
        with np.errstate(invalid="ignore"):
            return 1.0 - rest * (1.0 - divergence_hat), np.where(
                rest == 0.0, 0.0, self._forward * rest
            )


def _min_max(values: Floats, low: float, high: float) -> Floats:
    if not high > low:
        return np.zeros_like(values)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def written_tokens(
    tokens: pl.LazyFrame | pl.DataFrame, columns: list[str], purpose: str
) -> pl.DataFrame:
    """The rows that the student wrote, with `columns` and those that every statistic needs, sorted
    by rollout and position.

    Raises:
        SchemaError: a column is missing.
    """
    tokens = tokens.lazy()
    needed = ["rollout_id", "prompt_id", "position", "batch_id", "student_entropy", "reverse_kl"]
    names = list(dict.fromkeys([*needed, *columns]))
    require_columns(tokens, ["loss_mask", *names], purpose)
    return (
        tokens.filter("loss_mask")
        .select(names)
        .sort("rollout_id", "position")
        .collect(engine="streaming")
    )
