"""How far the scorer's `student_logprob` is from what the engine said when it sampled.

Both are ln P of the sampled token at temperature 1, by the same weights: what is between them is
dtype, kernels, another chat template, other weights. A policy that is trained on rollouts of an
engine that disagrees with it is not on policy. The usual size with bfloat16 is about 0.01 nats.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from tip_analysis.core.run_folder import Run

logger = logging.getLogger(__name__)

WARN_FROM_NATS = 0.1
"""Median difference above which a warning is due."""


def logprob_gap(run: Run, but_for: Sequence[int] = ()) -> dict[str, Any]:
    """Median and largest |student_logprob − sampled_logprobs| of a run, in nats.

    Args:
        run: a run with rollouts and tokens.
        but_for: tokens to leave out: those whose probability was merged with others'.

    Returns:
        `logprob_gap_median`, `logprob_gap_max` and `num_logprobs_compared`; nothing where no
        rollout has log-probabilities of its engine.
    """
    said = run.rollouts().filter(pl.col("sampled_logprobs").is_not_null())
    said = said.select(
        "rollout_id",
        said="sampled_logprobs",
        position=pl.int_ranges(pl.col("sampled_logprobs").list.len(), dtype=pl.Int32),
    )
    said = said.filter(pl.col("position").list.len() > 0).explode("said", "position")
    scored = run.tokens().filter("loss_mask", ~pl.col("token_id").is_in(list(but_for)))
    gaps = scored.select("rollout_id", "position", "student_logprob").join(
        said.filter(pl.col("said").is_not_null()), on=["rollout_id", "position"]
    )
    gap = (pl.col("student_logprob").cast(pl.Float64) - pl.col("said")).abs()
    found = gaps.select(
        logprob_gap_median=gap.drop_nans().median(),
        logprob_gap_max=gap.drop_nans().max(),
        num_logprobs_compared=pl.len(),
    ).collect(engine="streaming")
    row = found.row(0, named=True)
    return row if row["num_logprobs_compared"] else {}


def warn_about_gap(gap: Mapping[str, Any]) -> None:
    """Say so where the scorer and the engine do not mean the same model."""
    if gap.get("logprob_gap_median", 0.0) > WARN_FROM_NATS:
        logger.warning("%s", gap_in_words(gap))


def gap_in_words(gap: Mapping[str, Any]) -> str:
    """The warning, for a log or a report."""
    return (
        "the scorer's log-probabilities of the sampled tokens differ from those of the engine that"
        f" sampled them by {gap['logprob_gap_median']:.3g} nats in the median"
        f" ({gap['logprob_gap_max']:.3g} at most): other weights, another dtype or another prompt;"
        " the rollouts are not the student's own"
    )
