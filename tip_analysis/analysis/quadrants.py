"""The quadrants Q1–Q4 that two cuts make (Table 1): which token lies in which, how many do, and how
that moves with the cuts.

Reads the token table; writes nothing. The cuts themselves, and how each is measured:
`cuts` and `taxonomy`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from tip_analysis.analysis.cut_measuring import measure_cut
from tip_analysis.analysis.cuts import DEFAULT_CUTS, Cut, Cuts, parse_cut
from tip_analysis.analysis.paper_preset import PAPER_RANGES, Floats
from tip_analysis.analysis.quadrant_rule import shares_by_cut
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import Axis, CutKind, Quadrant, Scope

CONFIDENT_TOP1 = 0.95
"""A token whose likeliest continuation has more than this is not uncertain by any reading."""


@dataclass(frozen=True)
class CutWarning:
    """An entropy cut that calls tokens uncertain whose top-1 probability is above
    `CONFIDENT_TOP1`."""

    num_tokens: int
    """Such tokens."""
    share_of_uncertain: float
    """Among all tokens above the entropy cut."""
    entropy_cut: str
    message: str


def assign_quadrants(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    entropy_cut: str | float = DEFAULT_CUTS[Axis.ENTROPY],
    divergence_cut: str | float = DEFAULT_CUTS[Axis.DIVERGENCE],
    cut_scope: Scope | str = Scope.RUN,
    cuts: Cuts | None = None,
) -> pl.LazyFrame:
    """Add `quadrant`: Q1 high entropy and high divergence, Q2 high and low, Q3 low and high, Q4 low
    and low.

    High is strictly above the cut. The cuts are measured when this is called (`Taxonomy`
    explains the options), or given as `cuts`; what is returned is lazy.

    Returns:
        The rows in their order with `quadrant` (Enum of `Quadrant`); null where `loss_mask` is
        false.

    Raises:
        OptionError: a cut is none of the valid forms.
        UnknownNameError: there is no such scope.
        SchemaError: a column is missing.
    """
    tokens = tokens.lazy()
    if cuts is None:
        cuts = Taxonomy(entropy_cut, divergence_cut, cut_scope).measure(tokens)
    return tokens.with_columns(pl.when("loss_mask").then(cuts.quadrant()).alias("quadrant"))


def quadrant_shares(quadrants: pl.LazyFrame | pl.DataFrame) -> pl.DataFrame:
    """How many tokens each quadrant has: one row per quadrant, empty ones included.

    Returns:
        quadrant, num_tokens, num_rollouts, num_prompts (with at least one such token), share (of
        all tokens that the student wrote, in [0, 1]; null where there is none).
    """
    quadrants = quadrants.lazy()
    require_columns(quadrants, ["quadrant", "rollout_id", "prompt_id"], "quadrant_shares")
    counted = (
        quadrants.filter(pl.col("quadrant").is_not_null())
        .group_by("quadrant")
        .agg(
            pl.len().cast(pl.Int64).alias("num_tokens"),
            pl.col("rollout_id").n_unique().cast(pl.Int64).alias("num_rollouts"),
            pl.col("prompt_id").n_unique().cast(pl.Int64).alias("num_prompts"),
        )
        .collect(engine="streaming")
    )
    every = pl.DataFrame({"quadrant": list(Quadrant)}, schema={"quadrant": pl.Enum(Quadrant)})
    filled = every.join(counted, on="quadrant", how="left", maintain_order="left").with_columns(
        pl.col("num_tokens", "num_rollouts", "num_prompts").fill_null(0)
    )
    total = int(filled["num_tokens"].sum())
    share = pl.col("num_tokens") / total if total else pl.lit(None, pl.Float64)
    return filled.with_columns(share.alias("share"))


def warn_about_cuts(tokens: pl.LazyFrame | pl.DataFrame, cuts: Cuts) -> CutWarning | None:
    """A record of the tokens that the entropy cut calls uncertain though their top-1 probability is
    above 0.95, or None.

    A quantile is about ranks, not confidence: where most tokens are nearly certain, so are many of
    the upper half.
    """
    tokens = tokens.lazy()
    require_columns(
        tokens, ["loss_mask", "student_entropy", "student_top1_prob"], "warn_about_cuts"
    )
    confident = pl.col("student_top1_prob") > CONFIDENT_TOP1
    counted = (
        tokens.filter("loss_mask", cuts.entropy.is_high())
        .select(pl.len().alias("uncertain"), confident.sum().alias("confident"))
        .collect(engine="streaming")
    )
    num_uncertain, num_confident = int(counted["uncertain"][0]), int(counted["confident"][0])
    if num_confident == 0:
        return None
    share = num_confident / num_uncertain
    named = (
        cuts.entropy.spec
        if cuts.entropy.value is None
        else f"{cuts.entropy.spec} ({cuts.entropy.value:.4g} nats)"
    )
    return CutWarning(
        num_confident,
        share,
        cuts.entropy.spec,
        f"the entropy cut {named} calls {num_confident} tokens uncertain ({share:.1%} of those"
        f" above it) whose most likely token has a probability above {CONFIDENT_TOP1}: a cut in"
        " nats, or `otsu`, separates by confidence and not by rank",
    )


DEFAULT_GRID = tuple(f"q{step / 20:g}" for step in range(1, 20))
"""Quantiles 0.05, 0.10 … 0.95."""


def cut_sensitivity(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    entropy_cuts: Sequence[str | float] = DEFAULT_GRID,
    divergence_cuts: Sequence[str | float] = DEFAULT_GRID,
    in_use: Cuts | None = None,
) -> pl.DataFrame:
    """How the shares move with both cuts (scope `run`), and where the paper's ranges hold.

    Args:
        tokens: Rows of the token table.
        entropy_cuts, divergence_cuts: The lines of the grid.
        in_use: The cuts that a run is looked at under: they are lines of the grid too, unless they
            are measured batch by batch.

    Returns:
        A `CutSensitivityTable`, one row per pair, with entropy_spec, divergence_spec (as asked
        for), num_tokens, q4_in_range, q1_q2_in_range and q3_in_range.

    Raises:
        OptionError: a cut has no valid form, or is `paper`, which is about both axes at once.
        SchemaError: a column is missing, or no token has statistics.
    """
    tokens = tokens.lazy()
    require_columns(tokens, ["loss_mask", "student_entropy", "reverse_kl"], "cut_sensitivity")
    frame = (
        tokens.filter("loss_mask")
        .select("student_entropy", "reverse_kl")
        .drop_nulls()
        .collect(engine="streaming")
    )
    if frame.height == 0:
        raise SchemaError(
            "cut_sensitivity needs at least one token that the student wrote; the table has none"
        )
    entropy = frame["student_entropy"].cast(pl.Float64).to_numpy()
    divergence = frame["reverse_kl"].cast(pl.Float64).to_numpy()
    entropy_axis = _measured_grid(entropy, entropy_cuts, Axis.ENTROPY)
    divergence_axis = _measured_grid(divergence, divergence_cuts, Axis.DIVERGENCE)
    if in_use is not None:
        _add_line(entropy_axis, in_use.entropy)
        _add_line(divergence_axis, in_use.divergence)
    above = shares_by_cut(
        entropy, divergence, [cut for _, cut in entropy_axis], [cut for _, cut in divergence_axis]
    )
    rows = [
        (entropy[0], divergence[0], entropy[1], divergence[1], *above[:, i, j])
        for i, entropy in enumerate(entropy_axis)
        for j, divergence in enumerate(divergence_axis)
    ]
    names = ["entropy_spec", "divergence_spec", "entropy_cut", "divergence_cut", *Quadrant]
    table = pl.DataFrame(rows, schema=names, orient="row")
    return _beside_paper(table.with_columns(pl.lit(frame.height).alias("num_tokens")))


def _add_line(axis: list[tuple[str, float]], cut: Cut) -> None:
    """The cut as one more line, unless the grid has it or it has no single value."""
    if cut.value is not None and cut.value not in [value for _, value in axis]:
        axis.append((cut.spec, cut.value))


def _beside_paper(table: pl.DataFrame) -> pl.DataFrame:
    """Which of the paper's ranges the shares Q1 … Q4 keep."""
    return table.with_columns(
        _in_range(pl.col("Q4"), "Q4").alias("q4_in_range"),
        _in_range(pl.col("Q1") + pl.col("Q2"), "Q1+Q2").alias("q1_q2_in_range"),
        _in_range(pl.col("Q3"), "Q3").alias("q3_in_range"),
    ).with_columns(
        pl.all_horizontal("q4_in_range", "q1_q2_in_range", "q3_in_range").alias("in_paper_ranges")
    )


def _in_range(share: pl.Expr, name: str) -> pl.Expr:
    low, high = PAPER_RANGES[name]
    return share.is_between(low - 1e-12, high + 1e-12)


def _measured_grid(
    values: Floats, cuts: Sequence[str | float], axis: Axis
) -> list[tuple[str, float]]:
    specs = [parse_cut(cut, axis) for cut in cuts]
    if any(spec.kind is CutKind.PAPER for spec in specs):
        raise OptionError("`paper` is about both axes at once and cannot be one point of a grid")
    ordered = np.sort(values)
    measured = ((str(spec), measure_cut(ordered, spec)) for spec in specs)
    return [(name, math.inf if cut is None else cut) for name, cut in measured]
