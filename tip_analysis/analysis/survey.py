"""Quadrants, shares and rank correlations of a whole table, of any size, in bounded memory.

Reads the token table as a lazy frame; writes nothing. Up to `grids.LARGE_TABLE_ROWS` rows the
columns are collected and ranks are exact. Above, three passes stream over the table (histograms;
quantiles; quadrants and ranks together): memory grows with the number of rollouts only, cuts and
shares stay exact, and rank correlations come from a grid with a bound on their error.
`Survey.method` says which. The cuts `otsu` and `paper` collect both axes at any size.

Deviation from the other tables: the intervals of the shares resample prompts with the cuts held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import (
    DEFAULT_RESAMPLES,
    Floats,
    bootstrap_interval,
    interval_frame,
)
from tip_analysis.analysis.correlations import correlation_matrix
from tip_analysis.analysis.cuts import Cuts
from tip_analysis.analysis.grids import ColumnGrid, bins_of, is_large, measure_grids, stream_batches
from tip_analysis.analysis.quadrant_rule import QUADRANTS, float32_threshold, quadrant_codes_float32
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, CutOptions, Taxonomy
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import Quadrant, Scope, SurveyMethod

AXES = ("student_entropy", "reverse_kl")
DEFAULT_COLUMNS = ("student_entropy", "reverse_kl", "forward_kl")
_COMPACT_ROWS = 1_000_000
_PROMPT_BUDGET = 10_000_000
"""Prompts times resamples of the shares' intervals, from 100 resamples up."""


@dataclass(frozen=True)
class Survey:
    """What `survey_tokens` found."""

    method: SurveyMethod
    cuts: Cuts
    shares: pl.DataFrame
    """quadrant, num_tokens, num_rollouts, num_prompts, share, share_low, share_high, share_se."""
    correlations: pl.DataFrame
    """column_a, column_b, spearman, spearman_error (it is no further off than this; 0 where exact),
    num_tokens."""


def survey_tokens(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    exact: bool | None = None,
    **cuts: Unpack[CutOptions],
) -> Survey:
    """Quadrant shares and the rank correlations of all pairs of columns, over the tokens that the
    student wrote.

    Args:
        tokens: Token table.
        taxonomy: Whose cuts are measured, with scope `run`.
        columns: Numeric columns to correlate; tokens where one is null are left out of everything.
        exact: Whether to collect the columns; None decides by the number of rows.
        cuts: `entropy_cut` and `divergence_cut` in place of the taxonomy's.

    Raises:
        SchemaError: a column is missing, or no token is left.
        OptionError: a cut is none of the valid forms, or is measured by batch.
    """
    taxonomy = taxonomy.changed(**cuts)
    if taxonomy.cut_scope is Scope.BATCH:
        raise OptionError("survey_tokens has one cut for the whole run; found cut_scope 'batch'")
    tokens = tokens.lazy()
    require_columns(
        tokens,
        ["rollout_id", "prompt_id", "batch_id", "loss_mask", *AXES, *columns],
        "survey_tokens",
    )
    names = list(dict.fromkeys([*AXES, *columns]))
    tokens = tokens.filter(pl.all_horizontal(pl.col(names).is_not_null()))
    collect = exact if exact is not None else not is_large(tokens)
    grids = {} if collect else measure_grids(tokens, names)
    found = taxonomy.measure(tokens, grids=grids or None)
    counted = _Counted(found)
    if collect:
        correlations = _collected_correlations(tokens, names, list(columns), counted)
    else:
        correlations = _grid_correlations(tokens, grids, list(columns), counted)
    return Survey(
        SurveyMethod.EXACT if collect else SurveyMethod.GRID, found, counted.shares(), correlations
    )


def _collected_correlations(
    tokens: pl.LazyFrame, names: list[str], columns: list[str], counted: "_Counted"
) -> pl.DataFrame:
    written = tokens.filter("loss_mask").select("rollout_id", "prompt_id", *names)
    frame = written.collect(engine="streaming")
    if frame.height:
        counted.add(frame)
    return _exact_correlations(frame, columns)


class _Counted:
    """Tokens of each rollout by quadrant, from batches in any order; best where rollouts lie
    together."""

    def __init__(self, cuts: Cuts) -> None:
        self._cuts = (
            float32_threshold(cuts.entropy.threshold()),
            float32_threshold(cuts.divergence.threshold()),
        )
        self._parts: list[pl.DataFrame] = []
        self._rows = 0
        self.num_tokens = 0

    def add(self, batch: pl.DataFrame) -> None:
        entropy, divergence = (batch[name].to_numpy() for name in AXES)
        codes = quadrant_codes_float32(entropy, divergence, self._cuts)
        ids = batch["rollout_id"]
        runs = ids.rle_id().to_numpy().astype(np.int64)
        num_runs = int(runs[-1]) + 1
        counts = np.bincount(runs * 4 + codes, minlength=num_runs * 4).reshape(num_runs, 4)
        first = np.flatnonzero(np.diff(runs, prepend=-1))
        part = batch.select("rollout_id", "prompt_id")[first]
        self._parts.append(
            part.with_columns(pl.Series(str(code), counts[:, code]) for code in range(4))
        )
        self._rows += num_runs
        self.num_tokens += batch.height
        if self._rows > _COMPACT_ROWS:
            self._parts = [self._by_rollout()]
            self._rows = max(self._parts[0].height - _COMPACT_ROWS, 0)

    def _by_rollout(self) -> pl.DataFrame:
        return (
            pl.concat(self._parts)
            .group_by("rollout_id", "prompt_id")
            .agg(pl.col("0", "1", "2", "3").sum())
        )

    def shares(self) -> pl.DataFrame:
        if self.num_tokens == 0:
            raise SchemaError(
                "survey_tokens needs at least one token that the student wrote; the table has none"
            )
        by_rollout = self._by_rollout()
        by_prompt = (
            by_rollout.group_by("prompt_id").agg(pl.col("0", "1", "2", "3").sum()).sort("prompt_id")
        )
        counts = by_prompt.drop("prompt_id").to_numpy().astype(np.float64)
        resamples = max(100, min(DEFAULT_RESAMPLES, _PROMPT_BUDGET // counts.shape[0]))
        interval = bootstrap_interval(counts, counts.sum(1, keepdims=True), num_resamples=resamples)
        present = pl.col("0", "1", "2", "3") > 0
        numbers = {
            "num_tokens": by_rollout.select(pl.col("0", "1", "2", "3").sum()).row(0),
            "num_rollouts": by_rollout.select(present.sum()).row(0),
            "num_prompts": by_prompt.select(present.sum()).row(0),
        }
        table = pl.DataFrame({"quadrant": pl.Series([*QUADRANTS], dtype=pl.Enum(Quadrant))})
        table = table.with_columns(
            pl.Series(name, row, dtype=pl.Int64) for name, row in numbers.items()
        )
        return pl.concat([table, interval_frame(interval, ["share"])], how="horizontal")


def _exact_correlations(frame: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    if frame.height == 0:
        return _pairs(columns, np.full((len(columns),) * 2, np.nan), np.zeros(len(columns)), 0)
    weights = np.ones(frame.height)
    ranks = frame.select(pl.col(columns).rank("average")).to_numpy().T
    return _pairs(columns, correlation_matrix(ranks, weights), np.zeros(len(columns)), frame.height)


def _grid_correlations(
    tokens: pl.LazyFrame, grids: dict[str, ColumnGrid], columns: list[str], counted: _Counted
) -> pl.DataFrame:
    """The third pass: quadrants into `counted`, and products of ranks on the grid."""
    ranks_of_bins = [grids[name].standard_ranks() for name in columns]
    heavy = [{index: [np.inf, -np.inf] for index in grids[name].heavy_bins()} for name in columns]
    products = np.zeros((len(columns), len(columns)))
    names = list(dict.fromkeys([*AXES, *columns]))
    for batch in stream_batches(tokens, ["rollout_id", "prompt_id"], names):
        counted.add(batch)
        ranks = np.empty((len(columns), batch.height), dtype=np.float32)
        for row, name in enumerate(columns):
            values = batch[name].to_numpy()
            bins = bins_of(values)
            np.take(ranks_of_bins[row], bins, out=ranks[row])
            _widen(heavy[row], bins, values)
        products += ranks @ ranks.T
    scale = np.sqrt(np.diag(products))
    scale[scale == 0.0] = np.nan
    single = [frozenset(i for i, (low, high) in bins.items() if low == high) for bins in heavy]
    errors = [grids[name].rank_error(bins) for name, bins in zip(columns, single, strict=True)]
    matrix = products / np.outer(scale, scale)
    return _pairs(columns, matrix, np.asarray(errors), counted.num_tokens)


def _widen(heavy: dict[int, list[float]], bins: np.ndarray, values: np.ndarray) -> None:
    """Smallest and largest value seen in each heavy bin that may still hold one value only."""
    for index, ends in heavy.items():
        if ends[0] >= ends[1] or not np.isfinite(ends[0]):
            inside = values[bins == index]
            if inside.size:
                ends[:] = min(ends[0], float(inside.min())), max(ends[1], float(inside.max()))


def _pairs(columns: list[str], matrix: Floats, errors: Floats, num_tokens: int) -> pl.DataFrame:
    """True ranks are the grid's plus a part orthogonal to them of relative length e: ρ moves by at
    most e_a + e_b + e_a·e_b."""
    rows = [
        (
            a,
            b,
            float(matrix[i, j]),
            float(errors[i] + errors[j] + errors[i] * errors[j]),
            num_tokens,
        )
        for i, a in enumerate(columns)
        for j, b in enumerate(columns)
        if i < j
    ]
    names = {
        "column_a": pl.String,
        "column_b": pl.String,
        "spearman": pl.Float64,
        "spearman_error": pl.Float64,
    }
    schema = {**names, "num_tokens": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.col("spearman").fill_nan(None)
    )
