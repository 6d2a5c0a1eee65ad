"""Rank correlations of gradients with the axes and scores, partial ones, and what probe noise does
to them.

Reads the token table joined with gradients (`measurements.join_gradients`); writes nothing.

Spearman: Pearson's correlation of midranks. Partial: from the inverse of the rank correlation
matrix of both variables and the controls. Both are measured again, ranks included, in each resample
of prompts.

Probe noise: M̂ = closed form + P̂, the probed part being P̂ = P·χ²_K/K, weakens a rank correlation
with ‖g‖ or with φ/M. Its part κ of the variance is measured by adding as much again: a copy of M̂
whose P̂ is multiplied by factors χ²_K/K once more correlates with M̂ as 1/√(1 + κ). A correlation
without the noise is then the plain one over √(1 − κ), on the scale 2·sin(π·ρ/6) on which Spearman's
ρ is Pearson's for normal scores. For the partial correlation κ is measured with the same controls
held. This holds where ln M and the predictor are roughly normal after a monotone change of scale,
and is an approximation for φ/M. The interval goes through the same map, with κ taken as known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import polars.selectors as cs
from scipy import stats

from tip_analysis.analysis.bootstrap import (
    Floats,
    Interval,
    default_resamples,
    interval_frame,
    with_counts,
)
from tip_analysis.analysis.quadrant_rule import Codes
from tip_analysis.analysis.resampling import ResampledScores, Resampler, written_tokens
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.errors import SchemaError, UnknownNameError

PREDICTORS = ("student_entropy_norm", "reverse_kl", "forward_kl", "soft_or", "q3_score")
"""h, δ, δ^fwd, Soft-OR, Q3 score."""
TARGETS = ("grad_norm", "grad_dot_loss", "oracle_weight")
"""‖g‖, φ and w* = φ/M up to the unknown 1/(ηβ)."""
CONTROLS = ("position", "token_frequency")
_NO_CUTS = Taxonomy(0.0, 0.0)
"""For resamples whose quadrants nobody asks for: nothing to measure."""
CORRELATION_COST = 8
"""How many times the cost of a table of shares a resample of correlations has."""
NOISY_TARGETS = ("grad_norm", "oracle_weight")
_NOISE_REPEATS = 8
_LARGEST_NOISE_SHARE = 0.9


class RankedColumn:
    """A column whose weighted midranks take one pass: integer weights give the ranks of rows
    repeated that often."""

    def __init__(self, values: Floats) -> None:
        distinct, self.group = np.unique(values, return_inverse=True)
        self.num_groups = distinct.size

    def ranks(self, weights: Floats) -> Floats:
        """[N] midranks, from 1."""
        counts = np.bincount(self.group, weights=weights, minlength=self.num_groups)
        return (np.cumsum(counts) - counts + (counts + 1.0) / 2.0)[self.group]


def correlation_matrix(columns: Floats, weights: Floats) -> Floats:
    """[C, C] Pearson correlations of the rows of [C, N] under weights [N]; NaN where a column is
    constant."""
    centred = columns - (columns @ weights / weights.sum())[:, None]
    covariance = (centred * weights) @ centred.T
    scale = np.sqrt(np.diag(covariance))
    scale[scale <= 1e-9 * np.abs(columns).max(initial=1.0)] = np.nan
    return np.clip(covariance / np.outer(scale, scale), -1.0, 1.0)


def partial_correlations(matrix: Floats, controls: Sequence[int]) -> Floats:
    """[C, C] correlations of all columns with the controls held, from a [C, C] correlation matrix.

    R − R_c·R_cc⁻¹·R_cᵀ, rescaled to a unit diagonal; NaN where a column is constant or made of the
    controls alone. Controls that are constant or repeat others are left out. Naive equivalent:
    correlate the residuals of regressions on the controls.
    """
    kept: list[int] = []
    for index in controls:
        chosen = [*kept, index]
        part = matrix[np.ix_(chosen, chosen)]
        if np.isfinite(part).all() and np.linalg.det(part) > 1e-10:
            kept = chosen
    known = np.isfinite(np.diag(matrix))
    across = np.where(known[:, None], matrix[:, kept], 0.0)
    rest = (
        matrix - across @ np.linalg.solve(matrix[np.ix_(kept, kept)], across.T)
        if kept
        else matrix.copy()
    )
    scale = np.diag(rest).copy()
    scale[~(scale > 1e-10)] = np.nan
    return np.clip(rest / np.sqrt(np.outer(scale, scale)), -1.0, 1.0)


def auc(scores: Floats, positive: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting
    one half.

    Mann–Whitney's U of the positives over n₊·n₋. NaN without both classes.
    """
    positive = np.asarray(positive, dtype=bool)
    scores = np.asarray(scores, dtype=np.float64)
    if positive.all() or not positive.any():
        return float("nan")
    above, below = scores[positive], scores[~positive]
    u = stats.mannwhitneyu(above, below, method="asymptotic").statistic
    return float(u) / (above.size * below.size)


def probed_share(frame: pl.DataFrame) -> Floats:
    """[N] the part of each M̂ that comes from probes and carries their noise; the rest has a closed
    form.

    From `grad_norm_sq`, `grad_norm_sq_se` (√(2/K) of the probed part) and `num_probes`; 0 for exact
    norms.
    """
    norm, error, probes = (
        frame[name].cast(pl.Float64).to_numpy()
        for name in ("grad_norm_sq", "grad_norm_sq_se", "num_probes")
    )
    part = error * np.sqrt(probes / 2.0)
    return np.clip(np.divide(part, norm, out=np.zeros_like(part), where=norm > 0.0), 0.0, 1.0)


@dataclass(frozen=True)
class _Pair:
    target: str
    predictor: str


class _Correlations:
    """All columns of a correlation table, and its statistics under any weights."""

    def __init__(self, frame: pl.DataFrame, pairs: list[_Pair], controls: Sequence[str]) -> None:
        self.pairs, self.controls = pairs, list(controls)
        names = dict.fromkeys(
            [name for pair in pairs for name in (pair.target, pair.predictor)] + self.controls
        )
        self.names = list(names)
        self.columns = {name: _column(frame, name) for name in names}
        self._ranked = {name: RankedColumn(values) for name, values in self.columns.items()}
        self._scores = _resampled_scores(frame, self.columns)

    def statistic(self, weights: Floats, _codes: Codes | None = None) -> Floats:
        """[2·pairs]: Spearman, then partial rank correlations."""
        ranked = dict(self._ranked)
        if self._scores is not None and not (weights == 1.0).all():
            soft_or, q3_score = self._scores.soft_or_and_q3(weights)
            fresh = {"soft_or": soft_or, "q3_score": q3_score}
            ranked |= {
                name: RankedColumn(values) for name, values in fresh.items() if name in ranked
            }
        return self._measure(ranked, weights)

    def noise_share(
        self, pair: _Pair, probes: Floats, probed: Floats, generator: np.random.Generator
    ) -> tuple[float, float]:
        """κ of a target: the part of its variance that is probe noise, plain and with the controls
        of this pair held.

        Args:
            pair: target and predictor.
            probes: K of each token, 0 where its norm is exact, [N].
            probed: the probed part's share of M̂, [N].
            generator: of the noise that is added.
        """
        target, predictor = pair.target, pair.predictor
        held = [name for name in self.controls if name not in (target, predictor)]
        weights = np.ones(probes.size)
        ranks = np.stack([self._ranked[name].ranks(weights) for name in (target, target, *held)])
        agreement = []
        for _ in range(_NOISE_REPEATS):
            noise = generator.chisquare(np.maximum(probes, 1.0)) / np.maximum(probes, 1.0)
            factor = 1.0 + probed * (noise - 1.0)
            noisy = self.columns[target] * (
                np.sqrt(factor) if target == "grad_norm" else 1.0 / factor
            )
            ranks[1] = RankedColumn(noisy).ranks(weights)
            matrix = correlation_matrix(ranks, weights)
            agreement.append(
                (matrix[0, 1], partial_correlations(matrix, range(2, 2 + len(held)))[0, 1])
            )
        with np.errstate(divide="ignore"):
            share = 1.0 / _normal_scale(np.mean(agreement, axis=0)) ** 2 - 1.0
        plain, partial = np.clip(share, 0.0, _LARGEST_NOISE_SHARE)
        return float(plain), float(partial)

    def _measure(self, ranked: dict[str, RankedColumn], weights: Floats) -> Floats:
        matrix = correlation_matrix(
            np.stack([ranked[name].ranks(weights) for name in self.names]), weights
        )
        place = {name: index for index, name in enumerate(self.names)}
        indices = [(place[pair.target], place[pair.predictor]) for pair in self.pairs]
        partial = []
        by_controls: dict[tuple[int, ...], Floats] = {}
        for x, y in indices:
            held = tuple(place[name] for name in self.controls if place[name] not in (x, y))
            if held not in by_controls:
                by_controls[held] = partial_correlations(matrix, held)
            partial.append(by_controls[held][x, y])
        return np.array([*(matrix[pair] for pair in indices), *partial])


def _resampled_scores(frame: pl.DataFrame, columns: dict[str, Floats]) -> ResampledScores | None:
    """Scores to be measured again in each resample; None where the table's own came from other
    tokens, scope or clip."""
    names = {"soft_or", "q3_score"} & set(columns)
    if not names:
        return None
    scores = ResampledScores(frame)
    fresh: dict[str, Floats] = dict(
        zip(("soft_or", "q3_score"), scores.soft_or_and_q3(np.ones(frame.height)), strict=True)
    )
    return (
        scores
        if all(np.allclose(fresh[name], columns[name], rtol=1e-9, atol=1e-12) for name in names)
        else None
    )


def _column(frame: pl.DataFrame, name: str) -> Floats:
    if name == "grad_norm":
        return np.sqrt(frame["grad_norm_sq"].to_numpy())
    if name == "oracle_weight":
        return frame["grad_dot_loss"].to_numpy() / frame["grad_norm_sq"].to_numpy()
    return frame[name].cast(pl.Float64).to_numpy()


def _needed(name: str) -> list[str]:
    return {
        "grad_norm": ["grad_norm_sq", "grad_norm_sq_se", "num_probes"],
        "oracle_weight": ["grad_dot_loss", "grad_norm_sq", "grad_norm_sq_se", "num_probes"],
        "token_frequency": ["token_id"],
        "soft_or": ["soft_or", "student_entropy_norm", "forward_kl"],
        "q3_score": ["q3_score", "student_entropy_norm", "forward_kl"],
    }.get(name, [name])


def correlation_table(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    targets: Sequence[str] = TARGETS,
    predictors: Sequence[str] = PREDICTORS,
    controls: Sequence[str] = CONTROLS,
    num_resamples: int | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Spearman and partial rank correlations of each target with each predictor, over tokens where
    all are known.

    Args:
        tokens: Token table with the columns of `add_scores` and, for the default targets, of
            `join_gradients`.
        targets: `grad_norm`, `grad_dot_loss`, `oracle_weight` (φ/M), or any numeric column.
        predictors: Any numeric columns.
        controls: Held in the partial correlation: `position`, `token_frequency` (how often the
            token occurs in the table, fixed over resamples), or any numeric column.
        num_resamples: None for a number that suits the size of the table.
        seed: Of the resamples and of the added noise.

    Returns:
        target, predictor, spearman, spearman_low, spearman_high, spearman_se, partial, partial_low,
        partial_high, partial_se, then the first three of each with the suffix `_deconvolved` (null
        where the target has no probe noise), controls, num_tokens, num_rollouts, num_prompts,
        num_resamples.

    Raises:
        SchemaError: a column is missing, or fewer than three tokens have all of them.
    """
    frame = _complete_frame(tokens, [*targets, *predictors, *controls])
    pairs = _pairs(targets, predictors)
    resampler = Resampler(
        frame,
        taxonomy=_NO_CUTS,
        num_resamples=num_resamples or default_resamples(frame.height * CORRELATION_COST),
        seed=seed,
    )
    columns = _Correlations(frame, pairs, controls)
    interval = resampler.measure(columns.statistic)
    deconvolved = _deconvolve(frame, columns, interval, seed)
    table = pl.DataFrame(
        {"target": [pair.target for pair in pairs], "predictor": [pair.predictor for pair in pairs]}
    )
    plain = interval_frame(interval, ("spearman", "partial"))
    without = interval_frame(deconvolved, ("spearman_deconvolved", "partial_deconvolved"))
    parts = [table, plain, without.select(~cs.ends_with("_se"))]
    named = pl.lit(", ".join(controls)).alias("controls")
    numbers = pl.concat(parts, how="horizontal").with_columns(named)
    return with_counts(numbers, frame).with_columns(
        pl.lit(resampler.num_resamples).alias("num_resamples")
    )


def _pairs(targets: Sequence[str], predictors: Sequence[str]) -> list[_Pair]:
    pairs = [_Pair(one, other) for one in targets for other in predictors if one != other]
    if not pairs:
        raise UnknownNameError(
            "pair of columns", "none", ["at least one target and one other predictor"]
        )
    return pairs


def _complete_frame(tokens: pl.LazyFrame | pl.DataFrame, names: list[str]) -> pl.DataFrame:
    needed = list(dict.fromkeys(column for name in names for column in _needed(name)))
    frame = written_tokens(tokens, needed, "correlation_table").with_columns(
        pl.len().over("token_id").cast(pl.Float64).alias("token_frequency")
        if "token_id" in needed
        else []
    )
    if "grad_norm_sq" in needed:
        frame = frame.filter(pl.col("grad_norm_sq") > 0.0)
    frame = frame.drop_nulls(needed)
    if frame.height < 3:
        raise SchemaError(
            f"correlation_table needs at least three tokens with {', '.join(names)}; found"
            f" {frame.height}"
        )
    return frame


def _deconvolve(
    frame: pl.DataFrame, columns: _Correlations, plain: Interval, seed: int
) -> Interval:
    """Each statistic without probe noise; NaN where its target has none."""
    factor = np.full(plain.value.size, np.nan)
    probes = (
        frame["num_probes"].cast(pl.Float64).to_numpy()
        if "num_probes" in frame.columns
        else np.zeros(frame.height)
    )
    if (probes > 0).any():
        probed = probed_share(frame)
        for index, pair in enumerate(columns.pairs):
            if pair.target in NOISY_TARGETS:
                generator = np.random.Generator(np.random.Philox(seed))
                shares = columns.noise_share(pair, probes, probed, generator)
                factor[[index, index + len(columns.pairs)]] = 1.0 / np.sqrt(
                    1.0 - np.asarray(shares)
                )
    value, low, high = (
        _rank_scale(np.clip(_normal_scale(part) * factor, -1.0, 1.0))
        for part in (plain.value, plain.low, plain.high)
    )
    return Interval(value, low, high, np.full(factor.size, np.nan))


def _normal_scale(spearman: Floats) -> Floats:
    return 2.0 * np.sin(np.pi / 6.0 * spearman)


def _rank_scale(pearson: Floats) -> Floats:
    return 6.0 / np.pi * np.arcsin(pearson / 2.0)


def equation_6(
    tokens: pl.LazyFrame | pl.DataFrame, *, num_resamples: int | None = None, seed: int = 0
) -> pl.DataFrame:
    """Eq. 6 on data: rank correlation of the local weight ‖g‖²/gᵀHg over logits with the oracle
    weight φ/M.

    Returns:
        As `correlation_table`, one row: target `oracle_weight`, predictor `w_local`.

    Raises:
        SchemaError: a column is missing, or fewer than three tokens have all of them.
    """
    return correlation_table(
        tokens,
        targets=["oracle_weight"],
        predictors=["w_local"],
        num_resamples=num_resamples,
        seed=seed,
    )
