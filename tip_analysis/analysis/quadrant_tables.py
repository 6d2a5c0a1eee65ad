"""What each quadrant carries: a table with prompt-bootstrap intervals.

Reads the token table, joined with gradients where φ or ‖g‖² is asked for; writes nothing. The table
says on how many tokens, rollouts and prompts it stands, and gives the standard error and the 95 %
interval of `bootstrap`: prompts are resampled with all their rollouts, cuts are measured again in
each resample.

`grad_norm_sq` is M = ‖g‖², `grad_dot_loss` φ = ⟨∇L, g⟩; φ/M is the oracle weight of Proposition 1
up to the unknown 1/(ηβ). M̂ from K probes is unbiased, so sums and shares of M need no correction.
The median of φ/M̂ is too large by 1/median(M̂/M) at most; its correction is the factor median(M̂/M)
= 1 + s·(median(χ²_K/K) − 1), s being the part of ΣM̂ that was probed and has no closed form: exact
where tokens share one φ/M and one s.
"""

from collections.abc import Callable
from typing import Unpack

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis.bootstrap import Floats, Interval, interval_frame, summands
from tip_analysis.analysis.correlations import probed_share
from tip_analysis.analysis.quadrant_rule import QUADRANTS, Codes
from tip_analysis.analysis.resampling import Resampler, written_tokens
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, CutOptions, Taxonomy
from tip_analysis.core.names import Quadrant

MEAN_COLUMNS = (
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "reverse_kl_logit_grad_norm",
    "forward_kl_logit_grad_norm",
    "grad_norm_sq",
    "grad_dot_loss",
    "reward_alignment",
)
"""Columns whose mean and share of the sum a quadrant table gives, where they are present."""


def quadrant_statistics(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    num_resamples: int | None = None,
    seed: int = 0,
    **cuts: Unpack[CutOptions],
) -> pl.DataFrame:
    """What each quadrant carries: tidy, one row per quadrant and statistic.

    Statistics: `share` (of tokens); `mean_C` and `share_C` (of ΣC) for each column C of
        `MEAN_COLUMNS` present, over the
    tokens where it is known and finite; with gradients also `sum_grad_dot_loss` (Σφ),
    `alignment_ratio` (Σφ/ΣM), `negative_alignment_share` (fraction with φ < 0),
    `median_oracle_weight` (median of φ/M), its `_deconvolved` form, and with rewards
    `positive_reward_alignment_share`. A share of Σφ may be negative or above 1, since φ has both
    signs.

    Args:
        tokens: Token table, or the result of `join_gradients`.
        taxonomy: Whose cuts are measured again in each resample.
        num_resamples: None for a number that suits the size of the table.
        seed: Of the resamples.
        cuts: `entropy_cut`, `divergence_cut`, `cut_scope` in place of the taxonomy's.

    Returns:
        quadrant, statistic, value, low, high, se, num_tokens, num_rollouts, num_prompts (of the
        quadrant), num_resamples.

    Raises:
        SchemaError: a column is missing, or no token was written by the student.
    """
    tokens = tokens.lazy()
    present = tokens.collect_schema().names()
    extra = [name for name in (*MEAN_COLUMNS, "grad_norm_sq_se", "num_probes") if name in present]
    frame = written_tokens(tokens, extra, "quadrant_statistics")
    resampler = Resampler(
        frame, taxonomy=taxonomy.changed(**cuts), num_resamples=num_resamples, seed=seed
    )
    columns = [name for name in MEAN_COLUMNS if name in present]
    names, values, finish = _quadrant_sums(frame, columns)
    interval = resampler.measure_sums(values, finish)
    if {"grad_norm_sq", "grad_dot_loss"} <= set(columns):
        median = _RatioMedian(frame)
        names += ["median_oracle_weight", "median_oracle_weight_deconvolved"]
        interval = _beside(interval, resampler.measure(median))
    _, codes = resampler.whole()
    counts = _counts_by_quadrant(frame, codes)
    table = interval_frame(interval).with_columns(
        pl.Series("quadrant", [name for name in QUADRANTS for _ in names], dtype=pl.Enum(Quadrant)),
        pl.Series("statistic", names * 4),
        pl.lit(resampler.num_resamples).alias("num_resamples"),
    )
    first = ["quadrant", "statistic", "value", "low", "high", "se"]
    joined = table.join(counts, on="quadrant", how="left", maintain_order="left")
    return joined.select(*first, "num_tokens", "num_rollouts", "num_prompts", "num_resamples")


def _quadrant_sums(
    frame: pl.DataFrame, columns: list[str]
) -> tuple[list[str], Floats, Callable[[Floats], Floats]]:
    """Names of the statistics of one quadrant, what is summed [N, S], and the function from sums to
    all four quadrants."""
    sums = summands(frame, columns)
    place = {name: index for index, name in enumerate(columns)}
    has_gradients = {"grad_norm_sq", "grad_dot_loss"} <= set(columns)
    names = ["share", *(f"mean_{name}" for name in columns), *(f"share_{name}" for name in columns)]
    signs = []
    if has_gradients:
        names += ["sum_grad_dot_loss", "alignment_ratio", "negative_alignment_share"]
        signs.append((sums.values[:, place["grad_dot_loss"]] < 0).astype(np.float64))
    if "reward_alignment" in place:
        names.append("positive_reward_alignment_share")
        signs.append((sums.values[:, place["reward_alignment"]] > 0).astype(np.float64))
    stacked = np.column_stack([np.ones(frame.height), sums.values, sums.known, *signs])
    size = len(columns)

    def finish(totals: Floats) -> Floats:
        tokens, value, known = (
            totals[:, 0],
            totals[:, 1 : size + 1],
            totals[:, size + 1 : 2 * size + 1],
        )
        counted = list(totals[:, 2 * size + 1 :].T)
        parts = [tokens / tokens.sum(), *(value / known).T, *(value / value.sum(0)).T]
        if has_gradients:
            m, f = place["grad_norm_sq"], place["grad_dot_loss"]
            parts += [value[:, f], value[:, f] / value[:, m], counted.pop(0) / known[:, f]]
        if "reward_alignment" in place:
            parts.append(counted.pop(0) / known[:, place["reward_alignment"]])
        return np.stack(parts, axis=1).ravel()

    return names, stacked, finish


def _beside(first: Interval, second: Interval) -> Interval:
    """The statistics of each quadrant in both, one after the other."""
    pairs = zip(
        (first.value, first.low, first.high, first.se),
        (second.value, second.low, second.high, second.se),
        strict=True,
    )
    return Interval(
        *(np.concatenate([a.reshape(4, -1), b.reshape(4, -1)], axis=1).ravel() for a, b in pairs)
    )


class _RatioMedian:
    """Weighted median of φ/M per quadrant, over tokens with M > 0 and a known φ."""

    def __init__(self, frame: pl.DataFrame) -> None:
        norm = frame["grad_norm_sq"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        phi = frame["grad_dot_loss"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        rows = np.flatnonzero(np.isfinite(phi) & (norm > 0))
        ratio = phi[rows] / norm[rows]
        order = np.argsort(ratio, kind="stable")
        self.rows, self.ratio = rows[order], ratio[order]
        self.correction = _median_of_estimate(frame[rows])

    def __call__(self, weights: Floats, codes: Codes) -> Floats:
        """[4·2] the median and its deconvolved form, quadrant by quadrant."""
        kept, quadrant = weights[self.rows], codes[self.rows]
        medians = np.full(4, np.nan)
        for code in range(4):
            chosen = quadrant == code
            cumulative = np.cumsum(kept[chosen])
            if cumulative.size and cumulative[-1] > 0:
                place = 0.5 * (cumulative[-1] - 1.0)
                ends = np.searchsorted(cumulative, [np.floor(place), np.ceil(place)], side="right")
                medians[code] = self.ratio[chosen][ends].mean()
        return np.stack([medians, medians * self.correction], axis=1).ravel()


def _median_of_estimate(frame: pl.DataFrame) -> float:
    """Median of M̂/M under the noise of the probes; 1 where no norm was probed."""
    if not {"grad_norm_sq_se", "num_probes"} <= set(frame.columns):
        return 1.0
    probed = frame.filter(pl.col("num_probes") > 0)
    if probed.height == 0:
        return 1.0
    fewest = int(probed["num_probes"].min())  # pyright: ignore[reportArgumentType]
    share = float(np.average(probed_share(probed), weights=probed["grad_norm_sq"].to_numpy()))
    return 1.0 + share * (float(stats.chi2.median(fewest)) / fewest - 1.0)


def _counts_by_quadrant(frame: pl.DataFrame, codes: Codes) -> pl.DataFrame:
    named = frame.select("rollout_id", "prompt_id").with_columns(pl.Series("code", codes))
    counted = named.group_by("code").agg(
        pl.len().cast(pl.Int64).alias("num_tokens"),
        pl.col("rollout_id").n_unique().cast(pl.Int64).alias("num_rollouts"),
        pl.col("prompt_id").n_unique().cast(pl.Int64).alias("num_prompts"),
    )
    every = pl.DataFrame(
        {"code": range(4), "quadrant": QUADRANTS},
        schema={"code": pl.UInt8, "quadrant": pl.Enum(Quadrant)},
    )
    joined = every.join(counted, on="code", how="left", maintain_order="left").drop("code")
    return joined.with_columns(pl.exclude("quadrant").fill_null(0))


def widen(table: pl.DataFrame) -> pl.DataFrame:
    """A tidy quadrant table with one row per quadrant: `S`, `S_low`, `S_high`, `S_se` for each
    statistic S."""
    counts = ["num_tokens", "num_rollouts", "num_prompts"]
    wide = table.select("quadrant", *counts).unique(subset="quadrant", maintain_order=True)
    for name in table["statistic"].unique(maintain_order=True):
        part = table.filter(pl.col("statistic") == name).select(
            "quadrant",
            pl.col("value").alias(name),
            *(pl.col(end).alias(f"{name}_{end}") for end in ("low", "high", "se")),
        )
        wide = wide.join(part, on="quadrant", how="left", maintain_order="left")
    return wide
