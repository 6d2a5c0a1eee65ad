"""How far a student has moved from the author of its rollouts: what offline training must be read
against."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tip_analysis.logits.blocks import Columns, in_blocks
from tip_analysis.logits.row_statistics import negative_logprob, reverse_kl, rows_per_block
from tip_analysis.models.loading import LanguageModel
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.trainer import Trainer


@dataclass(frozen=True)
class Drift:
    """The student now against the rollouts' author, on the author's rollouts."""

    reverse_kl: float
    """Mean over rollouts of the mean over tokens of KL(student ‖ author), nats, over the full
    vocabulary."""
    effective_sample_size: float | None
    """(Σ w)² / (B Σ w²) with w = P_student(rollout) / P_author(rollout), in (0, 1]: share of the B
    rollouts that importance weights would leave. From the author's own log-probabilities; None
    where these are not known."""


@torch.no_grad()
def measure_drift(trainer: Trainer, author: LanguageModel, rollouts: Sequence[Rollout]) -> Drift:
    """Compare the student as it is with the model that wrote `rollouts`.

    Args:
        trainer: holds the student.
        author: the model that wrote them, usually the student before training.
        rollouts: its rollouts; each has a token that the author wrote.
    """
    written = [rollout.written for rollout in rollouts]
    with trainer.precision():
        student = trainer.hidden(trainer.student, rollouts, written)
        theirs = trainer.hidden(author, rollouts, written)
        tokens = torch.from_numpy(np.concatenate([r.written_tokens for r in rollouts])).to(
            student.device
        )

        def block(rows: slice) -> Columns:
            logits = trainer.student.head(student[rows])
            teacher = author.head(theirs[rows]).to(logits.device)
            return {
                "reverse_kl": reverse_kl(student=logits, teacher=teacher),
                "logprob": -negative_logprob(logits, tokens[rows]),
            }

        step = rows_per_block(trainer.vocab_size, device=student.device)
        found = {
            name: values.double().cpu().numpy()
            for name, values in in_blocks(len(tokens), step, block).items()
        }
    index = np.repeat(np.arange(len(rollouts)), [int(mask.sum()) for mask in written])
    per_rollout = np.bincount(index, weights=found["reverse_kl"]) / np.bincount(index)
    known = [rollout.logprobs for rollout in rollouts]
    if any(logprobs is None for logprobs in known):
        return Drift(float(per_rollout.mean()), None)
    before = np.concatenate(
        [np.array(values)[mask] for values, mask in zip(known, written, strict=True)]
    )
    log_weights = np.bincount(index, weights=found["logprob"] - before)
    return Drift(float(per_rollout.mean()), effective_sample_size(log_weights))


def effective_sample_size(log_weights: np.ndarray) -> float:
    """(Σ w)² / (B Σ w²) of B importance weights given by their logarithms, in (0, 1]."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
