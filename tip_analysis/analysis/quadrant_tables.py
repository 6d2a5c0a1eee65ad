"""What each quadrant carries, and what each selection keeps: tables with prompt-bootstrap
intervals.

Reads the token table, joined with gradients where φ or ‖g‖² is asked for; writes nothing. Every
table says on how many tokens, rollouts and prompts it stands, and gives the standard error and the
95 % interval of `bootstrap`: prompts are resampled with all their rollouts, cuts are measured again
in each resample. Masks are part of the rule and stay as they are.

`grad_norm_sq` is M = ‖g‖², `grad_dot_loss` φ = ⟨∇L, g⟩; φ/M is the oracle weight of Proposition 1
up to the unknown 1/(ηβ). M̂ from K probes is unbiased, so sums and shares of M need no correction.
The median of φ/M̂ is too large by 1/median(M̂/M) at most; its correction is the factor median(M̂/M)
= 1 + s·(median(χ²_K/K) − 1), s being the part of ΣM̂ that was probed and has no closed form: exact
where tokens share one φ/M and one s. Correlations: `correlations`. Position, frequency and kind of
token: `effects`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis.bootstrap import (
    Floats,
    Interval,
    group_index,
    interval_frame,
    ratio_interval,
    sums_by_group,
    with_counts,
)
from tip_analysis.analysis.correlations import correlation_table, probed_share
from tip_analysis.analysis.mask_tables import MASK_KEYS
from tip_analysis.analysis.quadrant_rule import QUADRANTS, Codes
from tip_analysis.analysis.resampling import Resampler, written_tokens
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, CutOptions, Taxonomy
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import Quadrant
from tip_analysis.core.schema import require_columns

ENTROPY_ONLY_RULES = ("entropy", "entropy_sampling")
"""Rules that look at the student's entropy alone: what Proposition 2 is about."""

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

_MASKS_AT_ONCE = 16

GRADIENT_COLUMNS = (
    "grad_norm_sq",
    "grad_norm_sq_se",
    "grad_dot_loss",
    "grad_dot_loss_plugin",
    "reward_alignment",
    "num_probes",
)


def join_gradients(
    tokens: pl.LazyFrame | pl.DataFrame,
    gradients: pl.LazyFrame | pl.DataFrame,
    *,
    loss: str = "reverse_kl",
    param_scope: str | None = None,
    method: str | None = None,
    num_probes: int | None = None,
    seed: int | None = None,
) -> pl.LazyFrame:
    """The tokens whose gradients were measured, with the columns of one measurement.

    Args:
        tokens: Token table.
        gradients: Gradient table; holds any number of measurements.
        loss: Which per-token loss.
        param_scope, method, num_probes, seed: Which measurement, where there are several.

    Returns:
        Inner join on (rollout_id, position), rows in the order of `tokens`.

    Raises:
        SchemaError: no measurement fits.
        OptionError: more than one fits; the message lists them.
    """
    wanted = {
        "loss": loss,
        "param_scope": param_scope,
        "method": method,
        "num_probes": num_probes,
        "seed": seed,
    }
    chosen = {name: value for name, value in wanted.items() if value is not None}
    gradients = gradients.lazy()
    require_columns(
        gradients,
        ["rollout_id", "position", *wanted, "grad_norm_sq", "grad_dot_loss"],
        "join_gradients",
    )
    texts = gradients.with_columns(pl.col("loss", "method").cast(pl.String))
    fitting = texts.filter([pl.col(name) == value for name, value in chosen.items()])
    keys = list(wanted)
    found = fitting.select(keys).unique().sort(keys).collect()
    if found.height == 0:
        there = texts.select(keys).unique().sort(keys).collect().rows()
        raise SchemaError(
            f"no gradients with {chosen}; the table has {', '.join(keys)} = {there or 'no rows'}"
        )
    if found.height > 1:
        raise OptionError(
            f"{found.height} measurements fit {chosen}; choose one of {', '.join(keys)} ="
            f" {found.rows()}"
        )
    present = gradients.collect_schema().names()
    columns = [name for name in GRADIENT_COLUMNS if name in present]
    narrow = fitting.select("rollout_id", "position", *columns)
    return tokens.lazy().join(
        narrow, on=["rollout_id", "position"], how="inner", maintain_order="left"
    )


@dataclass(frozen=True)
class _Sums:
    """Per-token values whose sums over a quadrant make every statistic but the median."""

    names: list[str]
    values: Floats
    """[N, S]; 0 where unknown."""
    known: Floats
    """[N, S] 1 where known and finite."""


def _sums(frame: pl.DataFrame, columns: list[str]) -> _Sums:
    raw = np.stack(
        [frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in columns], axis=1
    )
    known = np.isfinite(raw)
    return _Sums(columns, np.where(known, raw, 0.0), known.astype(np.float64))


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
    sums = _sums(frame, columns)
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


def coverage_curve(
    masks: pl.DataFrame,
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    columns: Sequence[str] = ("grad_dot_loss",),
    num_resamples: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """How much of ΣC each rule keeps at each ρ, for columns such as φ, M or δ; sampling rules are
    averaged over seeds.

    The rules `random` (≈ ρ) and `gradient_oracle` (the most that any rule can keep of Σφ), where
    their masks are among `masks`, are the bounds to read the others against.

    Returns:
        rule, retention_ratio, selection_scope, column, share (kept / total), share_low, share_high,
        share_se, token_share, num_seeds, num_tokens, num_rollouts, num_prompts (of the table).

    Raises:
        SchemaError: a column is missing, or no mask is given.
    """
    frame = written_tokens(tokens, list(columns), "coverage_curve")
    if masks.height == 0:
        raise SchemaError("coverage_curve needs at least one mask; found none")
    prompts = group_index(frame["prompt_id"])
    sums = _sums(frame, list(columns))
    size = int(prompts.max()) + 1
    totals = sums_by_group(np.column_stack([sums.values, np.ones(frame.height)]), prompts, size)
    keys = ["rule", "retention_ratio", "selection_scope"]
    rows = []
    for key, part in masks.with_columns(pl.col("selection_scope").cast(pl.String)).group_by(
        keys, maintain_order=True
    ):
        chosen = frame.select("rollout_id", "position").join(
            part.group_by("rollout_id", "position").len("times"),
            on=["rollout_id", "position"],
            how="left",
            maintain_order="left",
        )
        num_seeds = part["seed"].n_unique()
        share_of_seeds = chosen["times"].fill_null(0).to_numpy() / num_seeds
        kept = sums_by_group(
            np.column_stack([sums.values, np.ones(frame.height)]) * share_of_seeds[:, None],
            prompts,
            size,
        )
        interval = ratio_interval(kept, totals, num_resamples=num_resamples, seed=seed)
        for index, name in enumerate(columns):
            ends = (
                interval.value[index],
                interval.low[index],
                interval.high[index],
                interval.se[index],
            )
            rows.append((*key, name, *ends, interval.value[-1], num_seeds))
    names = [
        *keys,
        "column",
        "share",
        "share_low",
        "share_high",
        "share_se",
        "token_share",
        "num_seeds",
    ]
    return with_counts(pl.DataFrame(rows, schema=names, orient="row").fill_nan(None), frame)


def proposition_2(
    masks: pl.DataFrame,
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    num_resamples: int | None = None,
    seed: int = 0,
    **cuts: Unpack[CutOptions],
) -> pl.DataFrame:
    """Proposition 2 on data: what each mask takes from Q3, and how much of Q3 it misses.

    Returns:
        The mask's keys, entropy_only (the rule looks at entropy alone), then q3_share (of the
        selection that falls in Q3), q3_missed (share of Q3's tokens not selected) and, with
        gradients, q3_alignment_missed (share of Σφ over Q3 not selected), each with `_low`,
        `_high`, `_se`, and num_tokens (selected), num_q3 (in the table), num_rollouts, num_prompts.
        A share of Σφ is null where that sum is 0.

    Raises:
        SchemaError: a column is missing, or no mask is given.
    """
    if masks.height == 0:
        raise SchemaError("proposition_2 needs at least one mask; found none")
    tokens = tokens.lazy()
    has_phi = "grad_dot_loss" in tokens.collect_schema().names()
    frame = written_tokens(tokens, ["grad_dot_loss"] if has_phi else [], "proposition_2")
    resampler = Resampler(
        frame, taxonomy=taxonomy.changed(**cuts), num_resamples=num_resamples, seed=seed
    )
    masks = masks.with_columns(pl.col("selection_scope").cast(pl.String))
    keys = masks.select(MASK_KEYS).unique(maintain_order=True)
    phi = _sums(frame, ["grad_dot_loss"]).values[:, 0] if has_phi else None
    names = ["q3_share", "q3_missed", *(["q3_alignment_missed"] if has_phi else [])]
    parts, sizes = [], []
    for start in range(0, keys.height, _MASKS_AT_ONCE):
        selected = _mask_matrix(masks, keys[start : start + _MASKS_AT_ONCE], frame)
        sizes += selected.sum(1).astype(np.int64).tolist()
        parts.append(interval_frame(_q3_interval(resampler, selected, phi), names))
    only = pl.col("rule").is_in(ENTROPY_ONLY_RULES).alias("entropy_only")
    table = pl.concat([keys.with_columns(only), pl.concat(parts)], how="horizontal")
    return with_counts(table, frame).with_columns(
        pl.Series("num_tokens", sizes, dtype=pl.Int64),
        pl.lit(int((resampler.whole()[1] == Quadrant.Q3.code).sum()), pl.Int64).alias("num_q3"),
    )


def _q3_interval(resampler: Resampler, selected: Floats, phi: Floats | None) -> Interval:
    """Share of each selection in Q3, share of Q3 missed, and share of Σφ in Q3 missed, one block
    after the other."""
    size = selected.shape[0]
    columns = [
        np.ones(selected.shape[1]),
        *selected,
        *([phi, *(selected * phi)] if phi is not None else []),
    ]

    def finish(sums: Floats) -> Floats:
        q3, whole = sums[Quadrant.Q3.code], sums[:, 1 : size + 1].sum(0)
        taken = q3[1 : size + 1]
        parts = [taken / whole, 1.0 - taken / q3[0]]
        if phi is not None:
            parts.append(1.0 - q3[size + 2 :] / q3[size + 1])
        return np.concatenate(parts)

    return resampler.measure_sums(np.column_stack(columns), finish)


def _mask_matrix(masks: pl.DataFrame, keys: pl.DataFrame, frame: pl.DataFrame) -> Floats:
    """[masks, N] 1 where a token is selected."""
    place = frame.select("rollout_id", "position").with_row_index("_row")
    numbered = masks.join(keys.with_row_index("_mask"), on=MASK_KEYS).join(
        place, on=["rollout_id", "position"]
    )
    selected = np.zeros((keys.height, frame.height))
    selected[numbered["_mask"].to_numpy(), numbered["_row"].to_numpy()] = 1.0
    return selected


def equation_6(
    tokens: pl.LazyFrame | pl.DataFrame, *, num_resamples: int | None = None, seed: int = 0
) -> pl.DataFrame:
    """Eq. 6 on data: rank correlation of the local weight ‖g‖²/gᵀHg over logits with the oracle
    weight φ/M.

    Returns:
        As `correlations.correlation_table`, one row: target `oracle_weight`, predictor `w_local`.

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
