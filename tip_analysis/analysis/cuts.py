"""Cut-offs on student entropy and divergence: what they may be, and how they are measured.

Reads the token table; writes nothing. The paper gives no cut-offs, so a cut is a named choice per
axis that is measured once and recorded (`Cut`): `median`, `mean`, a quantile (`q0.8`), a number in
nats, `otsu` (the split with the largest between-class variance), or the joint preset `paper`. High
means strictly above the cut.

The preset `paper` looks for the pair of cuts whose shares lie in the ranges that the paper reports
over its pairs (`PAPER_RANGES`), as near as possible to 46.5 % of tokens uncertain and 9.5 % in Q3.
It makes the shares, so shares under it are no evidence that a pair is like the paper's;
`Cuts.paper_ranges_met` says whether the data allowed it.

A divergence of +inf is high whatever the cut, and takes no part in measuring one; it is counted
(`Cuts.num_infinite`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl

from tip_analysis.analysis.grids import ColumnGrid, exact_quantiles, is_large, measure_grids
from tip_analysis.analysis.scores import check_scope
from tip_analysis.core.errors import OptionError
from tip_analysis.core.lazy_display import notebook_html
from tip_analysis.core.names import Quadrant
from tip_analysis.core.schema import require_columns

Axis = Literal["entropy", "divergence"]

CutScope = Literal["batch", "run"]
"""Whose tokens a cut is measured on: those of one `batch_id`, or all."""

AXIS_COLUMNS: dict[Axis, str] = {"entropy": "student_entropy", "divergence": "reverse_kl"}
"""The column of each axis, both in nats."""

DEFAULT_CUTS: dict[Axis, str] = {"entropy": "median", "divergence": "mean"}

PAPER_RANGES: dict[str, tuple[float, float]] = {
    "Q4": (0.40, 0.47),
    "Q1+Q2": (0.40, 0.52),
    "Q3": (0.03, 0.15),
}
"""Shares that the paper reports over its pairs."""

PAPER_TARGET = (0.465, 0.095)
"""Share of uncertain tokens and share of Q3 that the preset `paper` aims at: the middles of the
ranges, made to sum to 1."""

CUT_FORMS = "median, mean, otsu, paper, a quantile such as q0.8, or a number in nats"

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class CutSpec:
    """A cut as it is asked for: its kind, and the quantile or the nats where the kind has one."""

    kind: Literal["median", "mean", "quantile", "nats", "otsu", "paper"]
    number: float | None = None

    def __str__(self) -> str:
        if self.kind == "quantile":
            return f"q{self.number:g}"
        return f"{self.number:g}" if self.kind == "nats" else self.kind


@dataclass(frozen=True)
class Cut:
    """A cut as it was measured: high is strictly above `value`."""

    axis: Axis
    spec: str
    scope: CutScope
    value: float | None
    """Nats; None under scope `batch`, or where no token can be measured."""
    batch_values: tuple[tuple[int, float], ...] = ()
    """(batch_id, nats) under scope `batch`."""

    def threshold(self) -> float:
        """The value under scope `run`, such that +inf is above it and, where nothing was measured,
        nothing finite is."""
        return np.finfo(np.float32).max.item() if self.value is None else self.value

    def is_high(self) -> pl.Expr:
        """Whether a token is strictly above the cut; +inf always is."""
        column = pl.col(AXIS_COLUMNS[self.axis]).cast(pl.Float64)
        if self.scope == "run":
            threshold = pl.lit(self.value, dtype=pl.Float64)
        else:
            batches = [batch for batch, _ in self.batch_values]
            values = [value for _, value in self.batch_values]
            threshold = pl.col("batch_id").replace_strict(
                pl.Series(batches, dtype=pl.Int32),
                pl.Series(values, dtype=pl.Float64),
                default=None,
                return_dtype=pl.Float64,
            )
        return pl.when(column.is_infinite()).then(True).otherwise(column > threshold)


@dataclass(frozen=True)
class Cuts:
    """Both cuts, with what is needed to judge them."""

    entropy: Cut
    divergence: Cut
    num_infinite: int
    """Tokens whose divergence is +inf: high, and left out of the cut."""
    paper_ranges_met: bool | None = None
    """Under the preset `paper`: whether all shares lie in the paper's ranges (in every batch). None
    under other cuts."""

    def quadrant(self) -> pl.Expr:
        """The quadrant of each token; null where a statistic is null."""
        high_entropy, high_divergence = self.entropy.is_high(), self.divergence.is_high()
        uncertain = pl.when(high_divergence).then(pl.lit("Q1")).otherwise(pl.lit("Q2"))
        confident = pl.when(high_divergence).then(pl.lit("Q3")).otherwise(pl.lit("Q4"))
        known = pl.col("student_entropy").is_not_null() & pl.col("reverse_kl").is_not_null()
        named = pl.when(known).then(pl.when(high_entropy).then(uncertain).otherwise(confident))
        return named.cast(pl.Enum(Quadrant)).alias("quadrant")

    def _repr_html_(self) -> str:
        return notebook_html(self)


def parse_cut(cut: str | float, axis: Axis = "entropy") -> CutSpec:
    """Read a cut: a name, `q` and a quantile, or a number in nats (as a number or as text).

    Raises:
        OptionError: it is none of these, or out of its range.
    """
    text = str(cut).strip()
    if text in ("median", "mean", "otsu", "paper"):
        return CutSpec(text)
    is_quantile = text.startswith("q")
    try:
        number = float(text.removeprefix("q"))
    except ValueError:
        raise OptionError(f"{axis} cut must be {CUT_FORMS}; found {text!r}") from None
    if is_quantile:
        if not 0.0 <= number <= 1.0:
            raise OptionError(f"{axis} cut: a quantile lies in [0, 1]; found {text!r}")
        return CutSpec("quantile", number)
    if not (math.isfinite(number) and number >= 0.0):
        raise OptionError(f"{axis} cut: nats are finite and not negative; found {text!r}")
    return CutSpec("nats", number)


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
    if spec.kind == "nats":
        return spec.number
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return None
    if spec.kind == "mean":
        return float(finite.mean())
    if spec.kind == "otsu":
        return otsu_cut(finite)
    quantile = 0.5 if spec.number is None else spec.number
    return float(np.quantile(finite, quantile))


def paper_range_distance(uncertain: float, q3: float) -> float:
    """How far shares lie outside `PAPER_RANGES`, summed over the three ranges; 0 where all hold (to
    1e-12)."""
    shares = {"Q1+Q2": uncertain, "Q3": q3, "Q4": 1.0 - uncertain - q3}
    excess = sum(
        max(low - shares[name], shares[name] - high, 0.0)
        for name, (low, high) in PAPER_RANGES.items()
    )
    return 0.0 if excess < 1e-12 else excess


def paper_cuts(entropy: Floats, divergence: Floats) -> tuple[float, float, bool]:
    """The joint preset: the pair of cuts whose shares come nearest to `PAPER_TARGET` inside
    `PAPER_RANGES`.

    A cut is one of the values seen (or 0), since only those change the shares. Entropy cuts: for
    every share of uncertain tokens in 0.400, 0.405 … 0.520, the value that comes nearest. For each,
    the divergence cuts: the two values around the target, and the two nearest to either end of what
    the ranges allow beside it. Of all pairs the one with the smallest (distance outside the ranges,
    squared distance to the target) is taken, the higher cuts among equals; a pair that misses the
    target by a token on each axis is taken at once.

    Args:
        entropy: [N] student entropy, nats.
        divergence: [N] divergence, nats; +inf is high whatever the cut.

    Returns:
        Both cuts, and whether all three shares lie in the ranges.
    """
    num_tokens = entropy.size
    ordered = np.sort(entropy)
    aims = [PAPER_TARGET[0], *np.round(np.arange(0.400, 0.5201, 0.005), 3)]
    best: tuple[float, float, float, float] = (math.inf, math.inf, 0.0, 0.0)
    seen: set[float] = set()
    for aim in aims:
        for cut in sorted(_values_around(ordered, aim * num_tokens) - seen):
            seen.add(cut)
            uncertain = float(num_tokens - np.searchsorted(ordered, cut, side="right")) / num_tokens
            confident = np.sort(divergence[entropy <= cut])
            for divergence_cut in _q3_candidates(confident, uncertain, num_tokens):
                q3 = (
                    float(confident.size - np.searchsorted(confident, divergence_cut, side="right"))
                    / num_tokens
                )
                distance = (uncertain - PAPER_TARGET[0]) ** 2 + (q3 - PAPER_TARGET[1]) ** 2
                best = min(
                    best, (paper_range_distance(uncertain, q3), distance, -cut, -divergence_cut)
                )
        if best[0] == 0.0 and best[1] <= 2.0 / num_tokens**2:
            break
    return -best[2] + 0.0, -best[3] + 0.0, best[0] == 0.0


def _values_around(ordered: Floats, num_above: float) -> set[float]:
    """The finite values of `ordered` that leave just under and just over `num_above` strictly above
    them; 0 counts as one."""
    finite = ordered[: np.searchsorted(ordered, math.inf)]
    index = int(np.clip(ordered.size - 1 - math.floor(num_above), 0, max(finite.size - 1, 0)))
    if finite.size == 0:
        return {0.0}
    under = float(finite[index])
    smaller = int(np.searchsorted(finite, under, side="left")) - 1
    return {under, float(finite[smaller]) if smaller >= 0 else 0.0}


def _q3_candidates(confident: Floats, uncertain: float, num_tokens: int) -> set[float]:
    low = max(PAPER_RANGES["Q3"][0], 1.0 - uncertain - PAPER_RANGES["Q4"][1])
    high = min(PAPER_RANGES["Q3"][1], 1.0 - uncertain - PAPER_RANGES["Q4"][0])
    aims = {PAPER_TARGET[1], low, high}
    return {
        value for aim in aims for value in _values_around(confident, max(aim, 0.0) * num_tokens)
    }


def resolve_cuts(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    entropy_cut: str | float = "median",
    divergence_cut: str | float = "mean",
    cut_scope: str = "run",
    grids: Mapping[str, ColumnGrid] | None = None,
) -> Cuts:
    """Measure both cuts on the tokens that the student wrote.

    Both columns are collected; above `grids.LARGE_TABLE_ROWS` rows, medians, means and quantiles of
    scope `run` are measured by passes over the table instead, with the same result.

    Args:
        tokens: Rows of the token table.
        entropy_cut: On `student_entropy`: `median`, `mean`, `q0.8`, `otsu`, `paper` or nats.
        divergence_cut: On `reverse_kl`, likewise. `paper` is a joint preset: named for one axis it
            holds for both, and the other axis may name nothing but `paper` or its default.
        cut_scope: `run`, or `batch` for one cut per `batch_id`.
        grids: Of both columns, where they have been measured already; used under scope `run`.

    Raises:
        OptionError: a cut or the scope is none of the valid forms, or `paper` meets another cut.
        SchemaError: a column is missing.
    """
    check_scope("cut_scope", cut_scope, get_args(CutScope))
    specs = joint_specs(entropy_cut, divergence_cut)
    tokens = tokens.lazy()
    require_columns(
        tokens, ["batch_id", "loss_mask", "student_entropy", "reverse_kl"], "assign_quadrants"
    )
    if (
        cut_scope == "run"
        and not {"otsu", "paper"} & {specs[0].kind, specs[1].kind}
        and (grids or is_large(tokens))
    ):
        return _streamed_cuts(
            tokens, specs, grids or measure_grids(tokens, list(AXIS_COLUMNS.values()))
        )
    written = tokens.filter(
        "loss_mask", pl.col("student_entropy").is_not_null(), pl.col("reverse_kl").is_not_null()
    )
    frame = written.select("batch_id", "student_entropy", "reverse_kl").collect(engine="streaming")
    num_infinite = int(frame["reverse_kl"].is_infinite().sum())
    if cut_scope == "run":
        entropy, divergence, met = _measure_pair(frame, specs)
        return Cuts(
            Cut("entropy", str(specs[0]), "run", entropy),
            Cut("divergence", str(specs[1]), "run", divergence),
            num_infinite,
            met,
        )
    measured = [(key, *_measure_pair(group, specs)) for key, group in _batches(frame)]
    entropies = tuple((key, math.inf if value is None else value) for key, value, _, _ in measured)
    divergences = tuple(
        (key, math.inf if value is None else value) for key, _, value, _ in measured
    )
    met = all(met for *_, met in measured) if specs[0].kind == "paper" else None
    return Cuts(
        Cut("entropy", str(specs[0]), "batch", None, entropies),
        Cut("divergence", str(specs[1]), "batch", None, divergences),
        num_infinite,
        met,
    )


def _streamed_cuts(
    tokens: pl.LazyFrame, specs: tuple[CutSpec, CutSpec], grids: Mapping[str, ColumnGrid]
) -> Cuts:
    """Medians, means and quantiles from histograms and one more pass."""
    quantile = {
        spec: 0.5 if spec.number is None else spec.number
        for spec in specs
        if spec.kind in ("median", "quantile")
    }
    named = dict(zip(AXIS_COLUMNS.values(), specs, strict=True))
    found = exact_quantiles(
        tokens, grids, {name: [quantile[spec]] for name, spec in named.items() if spec in quantile}
    )
    values = {
        name: (
            found[name][0]
            if name in found
            else spec.number
            if spec.kind == "nats"
            else grids[name].mean
        )
        for name, spec in named.items()
    }
    divergence = grids["reverse_kl"]
    return Cuts(
        Cut("entropy", str(specs[0]), "run", values["student_entropy"]),
        Cut("divergence", str(specs[1]), "run", values["reverse_kl"]),
        divergence.num_values - divergence.num_finite,
    )


def joint_specs(entropy_cut: str | float, divergence_cut: str | float) -> tuple[CutSpec, CutSpec]:
    """Both cuts read; `paper` on one axis means `paper` on both.

    Raises:
        OptionError: a cut has no valid form, or `paper` meets another cut than the default.
    """
    entropy, divergence = parse_cut(entropy_cut, "entropy"), parse_cut(divergence_cut, "divergence")
    if "paper" not in (entropy.kind, divergence.kind):
        return entropy, divergence
    if str(entropy) not in ("paper", DEFAULT_CUTS["entropy"]) or str(divergence) not in (
        "paper",
        DEFAULT_CUTS["divergence"],
    ):
        raise OptionError(
            f"`paper` chooses both cuts together; found entropy cut {str(entropy)!r} and divergence"
            f" cut {str(divergence)!r}: name it for both, or for neither"
        )
    return CutSpec("paper"), CutSpec("paper")


def _batches(frame: pl.DataFrame) -> Iterable[tuple[int, pl.DataFrame]]:
    parts = frame.partition_by("batch_id", as_dict=True)
    return ((int(key[0]), parts[key]) for key in sorted(parts))


def _measure_pair(
    frame: pl.DataFrame, specs: tuple[CutSpec, CutSpec]
) -> tuple[float | None, float | None, bool | None]:
    entropy = frame["student_entropy"].cast(pl.Float64).to_numpy()
    divergence = frame["reverse_kl"].cast(pl.Float64).to_numpy()
    if specs[0].kind != "paper":
        return measure_cut(entropy, specs[0]), measure_cut(divergence, specs[1]), None
    if entropy.size == 0:
        return None, None, False
    return paper_cuts(entropy, divergence)
