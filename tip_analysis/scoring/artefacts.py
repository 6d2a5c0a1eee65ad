"""Tokens that only look important: which class of artefact a scored token belongs to, if any.

Each class (`core.names.Artefact`) is a reason for which a divergence says nothing about what the
student knows. Single outliers concern a whole run, not a token: `analysis.screening` finds them.
"""

from collections.abc import Collection

import polars as pl
import torch
from torch import Tensor

from tip_analysis.core.names import Artefact, IdsOrigin, StopTokens

PADDED_MASS = "padded_mass"
"""Scratch column: probability of rows of the output head that are no shared token, the larger of
the two models'."""

STOP_NATS, STOP_PART = 0.1, 0.5
"""A divergence is one of stop tokens where merging them would take more than this, in nats and as a
part of it."""
PADDED_FROM = 0.01
"""Probability outside the shared vocabulary from which on renormalising changes a row."""


def mass_outside(logits: Tensor, vocab_size: int, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """Probability of the rows of a head beyond the shared vocabulary, [N] in [0, 1].

    Args:
        logits: all rows of the head, [N, V + padding].
        vocab_size: V.
        top_ids: the most likely shared token, [N].
        top_logprobs: its log-probability within the shared vocabulary, [N].
    """
    if logits.shape[1] == vocab_size:
        return torch.zeros(len(logits), device=logits.device)
    top = logits.gather(1, top_ids.unsqueeze(1)).squeeze(1).float()
    log_shared = top - top_logprobs.to(top)
    return torch.sigmoid(logits[:, vocab_size:].float().logsumexp(1) - log_shared)


def label_artefacts(
    tokens: pl.DataFrame,
    rollouts: pl.DataFrame,
    *,
    stop_ids: Collection[int],
    special_ids: Collection[int],
    stop_tokens: StopTokens = StopTokens.DECLARED,
) -> pl.DataFrame:
    """Fill in `artefact`; where several classes fit, the first of `Artefact` is meant.

    Args:
        tokens: rows of the token table in order, with `PADDED_MASS` where it was measured.
        rollouts: the rollouts that they come from.
        stop_ids: tokens with which either model ends a turn.
        special_ids: the tokenizer's special tokens.
        stop_tokens: how they were scored: merged, they cannot disagree.
    """
    origins = rollouts.select("rollout_id", "ids_origin")
    padded = pl.col(PADDED_MASS) if PADDED_MASS in tokens.columns else pl.lit(None, pl.Float32)
    placed = tokens.join(origins, on="rollout_id", how="left", maintain_order="left").with_columns(
        _stops=pl.col("token_id").is_in(list(stop_ids)),
        _segment=pl.col("loss_mask").rle_id().over("rollout_id"),
    )
    placed = placed.with_columns(
        _first=pl.col("position") == pl.col("position").min().over("rollout_id", "_segment"),
        _last=pl.col("position") == pl.col("position").max().over("rollout_id", "_segment"),
        _ended=(pl.col("_stops").cum_sum() - pl.col("_stops")).over("rollout_id", "_segment") > 0,
    )
    classes = {
        Artefact.AFTER_END: pl.col("_ended"),
        Artefact.PADDED_MASS: padded > PADDED_FROM,
        Artefact.STOP_TOKEN: pl.lit(stop_tokens is StopTokens.DECLARED)
        & (
            pl.col("stop_mismatch")
            > pl.max_horizontal(pl.lit(STOP_NATS), STOP_PART * pl.col("reverse_kl"))
        ),
        Artefact.SPECIAL_TOKEN: pl.col("token_id").is_in(list(special_ids))
        & ~(pl.col("_stops") & pl.col("_last")),
        Artefact.RETOKENIZED: (pl.col("ids_origin") == IdsOrigin.RETOKENIZED)
        & (pl.col("_first") | pl.col("_last")),
        Artefact.AFTER_TRUNCATION: pl.col("_first") & _was_cut(),
    }
    label = pl.coalesce(pl.when(fits).then(pl.lit(str(name))) for name, fits in classes.items())
    label = pl.when("loss_mask").then(label).cast(pl.Enum(Artefact))
    return placed.with_columns(artefact=label).select(
        name for name in tokens.columns if name != PADDED_MASS
    )


def _was_cut() -> pl.Expr:
    """Whether the segment that the student wrote before this one ended without a stop token."""
    ends_written = pl.col("loss_mask") & pl.col("_last")
    stopped = pl.when(ends_written).then(pl.col("_stops"))
    return ~stopped.shift(1).forward_fill().over("rollout_id").fill_null(True)
