"""How sure the student is of the tokens that a taxonomy calls confident and disagreeing (Q3).

Reads the token table; writes nothing. An entropy cut by rank calls a share of the tokens confident,
whatever their probabilities: where the student is rarely sure, Q3 then holds tokens that are
neither confident nor wrong. The paper's examples of Q3 have a top-1 probability of 0.91 to 0.998.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from tip_analysis.analysis.cuts import Cuts
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.words import count, percent

SURE_TOP1 = 0.8
"""Median top-1 probability from which a set of tokens is called confident."""
CANDIDATE_CUTS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0)
"""Entropy cuts in nats that are tried for a better one."""
FEW = 20
"""Below this number of tokens nothing is said, and no cut is named."""

_NEEDED = ["loss_mask", "student_entropy", "reverse_kl", "student_top1_prob"]


@dataclass(frozen=True)
class ConfidenceWarning:
    """A Q3 whose tokens the student is not sure of."""

    num_tokens: int
    """In Q3."""
    median_top1: float
    """Of the student's top-1 probability in Q3."""
    share_below_half: float
    """Q3 tokens whose top-1 probability is below ½."""
    better_cut: float | None
    """The largest of `CANDIDATE_CUTS` below the cut in use that makes a Q3 of at least `FEW` tokens
    with a median top-1 probability of at least `SURE_TOP1`; None where there is none."""
    message: str


def warn_about_confidence(
    tokens: pl.LazyFrame | pl.DataFrame, cuts: Cuts
) -> ConfidenceWarning | None:
    """A record of a Q3 that is not confident: its median top-1 probability is below `SURE_TOP1`;
    None for a confident one, or one of fewer than `FEW` tokens.

    Raises:
        SchemaError: a column is missing.
    """
    tokens = tokens.lazy()
    require_columns(tokens, _NEEDED, "warn_about_confidence")
    q3 = (
        tokens.filter("loss_mask", ~cuts.entropy.is_high(), cuts.divergence.is_high())
        .select("student_entropy", "student_top1_prob")
        .drop_nulls()
        .collect(engine="streaming")
    )
    top1 = q3["student_top1_prob"].cast(pl.Float64).to_numpy()
    if top1.size < FEW or np.median(top1) >= SURE_TOP1:
        return None
    better = _better_cut(q3["student_entropy"].cast(pl.Float64).to_numpy(), top1, cuts)
    below_half, middle = float((top1 < 0.5).mean()), float(np.median(top1))
    named = _named(better)
    message = (
        f"Q3 is not confident here: the median top-1 probability of its {count(top1.size)} tokens"
        f" is {middle:.2f}, and {percent(below_half)} of them are below 0.5. The entropy cut"
        f" {cuts.entropy.spec} ranks tokens and does not ask whether the student is sure{named}"
    )
    return ConfidenceWarning(top1.size, middle, below_half, better, message)


def _named(better: float | None) -> str:
    if better is None:
        return f"; no cut from {CANDIDATE_CUTS[0]:g} nats up makes a Q3 that is confident"
    return (
        f"; --entropy-cut {better:g} (nats) makes a Q3 whose median top-1 probability is at least"
        f" {SURE_TOP1:g}"
    )


def _better_cut(entropy: np.ndarray, top1: np.ndarray, cuts: Cuts) -> float | None:
    """Among the tokens of Q3: a lower entropy cut leaves those at or below it there."""
    highest = np.inf if cuts.entropy.value is None else cuts.entropy.value
    for cut in sorted(CANDIDATE_CUTS, reverse=True):
        kept = top1[entropy <= cut]
        if cut < highest and kept.size >= FEW and np.median(kept) >= SURE_TOP1:
            return cut
    return None
