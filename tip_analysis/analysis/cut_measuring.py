"""How cuts are measured on the tokens that the student wrote: on collected columns, or by passes
over a table larger than memory.

Reads the token table; writes nothing. What a cut may be: `cuts`. A divergence of +inf takes no part
in measuring one.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import polars as pl

from tip_analysis.analysis.cuts import AXIS_COLUMNS, Cut, Cuts, CutSpec
from tip_analysis.analysis.grids import ColumnGrid, exact_quantiles, is_large, measure_grids
from tip_analysis.analysis.paper_preset import Floats, paper_cuts
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.names import Axis, CutKind, Scope

CutPair = tuple[CutSpec, CutSpec]
"""On entropy and on divergence."""


def otsu_cut(values: Floats) -> float:
    """The value that splits `values` into two classes with the largest between-class variance (Otsu
    1979), exactly.

    The cut is the largest value of the lower class, so that strictly above it is the upper class;
    the first such split among equals. A constant column is its own cut: nothing lies above it.

    Naive equivalent: for every distinct value c but the largest, n₀·n₁·(mean of ≤ c − mean of >
    c)².
    """
    ordered = np.sort(values)
    return float(ordered[otsu_index(ordered, np.ones(ordered.size))])


def otsu_index(ordered: Floats, weights: Floats) -> int:
    """Where in sorted values with positive weights the lower class of Otsu's split ends."""
    ends = np.flatnonzero(ordered[1:] > ordered[:-1])
    if ends.size == 0:
        return ordered.size - 1
    counts, totals = np.cumsum(weights), np.cumsum(weights * ordered)
    below = counts[ends]
    above = counts[-1] - below
    difference = totals[ends] / below - (totals[-1] - totals[ends]) / above
    return int(ends[int(np.argmax(below * above * difference**2))])


def measure_cut(values: Floats, spec: CutSpec) -> float | None:
    """The cut in nats that `spec` means on these values; +inf is left out. None where no value is
    left.

    Args:
        values: [N] nats.
        spec: Any kind but `paper`, which is about both axes at once.
    """
    if spec.kind is CutKind.NATS:
        return spec.number
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return None
    if spec.kind is CutKind.MEAN:
        return float(finite.mean())
    if spec.kind is CutKind.OTSU:
        return otsu_cut(finite)
    return float(np.quantile(finite, spec.quantile))


def measure_cuts(
    tokens: pl.LazyFrame,
    specs: CutPair,
    scope: Scope,
    grids: Mapping[str, ColumnGrid] | None = None,
) -> Cuts:
    """Both cuts, as `taxonomy.Taxonomy.measure` explains."""
    needed = ["batch_id", "loss_mask", *AXIS_COLUMNS.values()]
    require_columns(tokens, needed, "assign_quadrants")
    streams = scope is Scope.RUN and not {CutKind.OTSU, CutKind.PAPER} & {s.kind for s in specs}
    if streams and (grids or is_large(tokens)):
        grids = grids or measure_grids(tokens, list(AXIS_COLUMNS.values()))
        return _streamed_cuts(tokens, specs, grids)
    known = [pl.col(name).is_not_null() for name in AXIS_COLUMNS.values()]
    written = tokens.filter("loss_mask", *known).select("batch_id", *AXIS_COLUMNS.values())
    frame = written.collect(engine="streaming")
    return _of_run(frame, specs) if scope is Scope.RUN else _of_batches(frame, specs)


def _of_run(frame: pl.DataFrame, specs: CutPair) -> Cuts:
    *values, met = _measure_pair(frame, specs)
    entropy, divergence = (
        Cut(axis, str(spec), Scope.RUN, value)
        for axis, spec, value in zip(Axis, specs, values, strict=True)
    )
    return Cuts(entropy, divergence, _num_infinite(frame), met)


def _of_batches(frame: pl.DataFrame, specs: CutPair) -> Cuts:
    measured = [(key, _measure_pair(group, specs)) for key, group in _batches(frame)]
    entropy, divergence = (
        Cut(axis, str(spec), Scope.BATCH, None, tuple((key, _or_inf(m[i])) for key, m in measured))
        for i, (axis, spec) in enumerate(zip(Axis, specs, strict=True))
    )
    is_preset = specs[0].kind is CutKind.PAPER
    met = all(found[2] for _, found in measured) if is_preset else None
    return Cuts(entropy, divergence, _num_infinite(frame), met)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _num_infinite(frame: pl.DataFrame) -> int:
    return int(frame[AXIS_COLUMNS[Axis.DIVERGENCE]].is_infinite().sum())


def _batches(frame: pl.DataFrame) -> Iterable[tuple[int, pl.DataFrame]]:
    parts = frame.partition_by("batch_id", as_dict=True)
    return ((int(key[0]), parts[key]) for key in sorted(parts))


def _measure_pair(
    frame: pl.DataFrame, specs: CutPair
) -> tuple[float | None, float | None, bool | None]:
    """Both cuts, and for the preset whether the paper's ranges are met."""
    entropy, divergence = (
        frame[name].cast(pl.Float64).to_numpy() for name in AXIS_COLUMNS.values()
    )
    if specs[0].kind is not CutKind.PAPER:
        return measure_cut(entropy, specs[0]), measure_cut(divergence, specs[1]), None
    if entropy.size == 0:
        return None, None, False
    return paper_cuts(entropy, divergence)


def _streamed_cuts(tokens: pl.LazyFrame, specs: CutPair, grids: Mapping[str, ColumnGrid]) -> Cuts:
    """Medians, means and quantiles from histograms and one more pass."""
    named = dict(zip(AXIS_COLUMNS.values(), specs, strict=True))
    wanted = {
        name: [spec.quantile]
        for name, spec in named.items()
        if spec.kind in (CutKind.MEDIAN, CutKind.QUANTILE)
    }
    found = exact_quantiles(tokens, grids, wanted)
    entropy, divergence = (
        Cut(axis, str(specs[i]), Scope.RUN, _streamed_cut(specs[i], found.get(name), grids[name]))
        for i, (axis, name) in enumerate(AXIS_COLUMNS.items())
    )
    grid = grids[AXIS_COLUMNS[Axis.DIVERGENCE]]
    return Cuts(entropy, divergence, grid.num_values - grid.num_finite)


def _streamed_cut(
    spec: CutSpec, found: list[float | None] | None, grid: ColumnGrid
) -> float | None:
    if found is not None:
        return found[0]
    return spec.number if spec.kind is CutKind.NATS else grid.mean
