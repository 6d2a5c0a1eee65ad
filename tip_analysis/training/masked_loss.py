"""The loss of masked distillation (Eq. 9): a weighted sum of divergences at selected positions,
with few logits at a time.

Hidden states are gathered before the output head, so that logits exist for selected tokens only;
head and loss then go in chunks, each of which leaves its gradient behind before the next one
begins. Of logits and their gradients there is never more than one chunk, [chunk, V]: that is where
the memory of Table 3 goes. The gradient of the head's weight adds up.

Which tokens the sum is divided by (`loss_normalizer`) and how rollouts of unequal length are
weighed (`loss_aggregation`) become one weight a token. Weights are set for the whole optimizer step
at once, so gradient accumulation is exact.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tip_analysis.core.errors import OptionError
from tip_analysis.core.loss_settings import DEFAULT_LOSS_SETTINGS, LossSettings
from tip_analysis.core.names import LossAggregation, LossNormalizer, TrainingLoss, WeightScale
from tip_analysis.logits.blocks import row_blocks
from tip_analysis.logits.training_losses import training_loss
from tip_analysis.models.output_head import OutputHead


def token_weights(
    selected: np.ndarray,
    rollout_of_token: np.ndarray,
    *,
    loss_normalizer: LossNormalizer | str,
    loss_aggregation: LossAggregation | str,
) -> np.ndarray:
    """What each token's divergence is multiplied by, so that the plain sum is the loss.

    With n_b tokens selected of the m_b that the student wrote in rollout b, and sums over the B
    rollouts with a token in the denominator's set:

    | normalizer | aggregation `rollout` | aggregation `token` |
    | ---------- | --------------------- | ------------------- |
    | `selected` | 1 / (B·n_b)           | 1 / Σ n_b           |
    | `all`      | 1 / (B·m_b)           | 1 / Σ m_b           |

    Args:
        selected: [N] bool, over all tokens that the student wrote in one optimizer step.
        rollout_of_token: [N] index of each token's rollout.
        loss_normalizer: `selected` or `all`.
        loss_aggregation: `rollout` or `token`.

    Returns:
        [N] float64, 0 where not selected; with `selected` they sum to 1, with `all` to the share
        that is selected.
    """
    of_selected = LossNormalizer(loss_normalizer) is LossNormalizer.SELECTED
    over_tokens = LossAggregation(loss_aggregation) is LossAggregation.TOKEN
    counted = selected if of_selected else np.ones_like(selected)
    if not selected.any():
        return np.zeros(len(selected))
    if over_tokens:
        return selected / counted.sum()
    per_rollout = np.bincount(rollout_of_token, weights=counted)
    denominators = per_rollout[rollout_of_token] * np.count_nonzero(per_rollout)
    return np.divide(selected, denominators, out=np.zeros(len(selected)), where=selected)


def scaled_weights(
    weights: np.ndarray,
    selected: np.ndarray,
    rollout_of_token: np.ndarray,
    *,
    scale: WeightScale,
    loss_normalizer: LossNormalizer | str,
    loss_aggregation: LossAggregation | str,
) -> np.ndarray:
    """What each token's loss is multiplied by where tokens are weighted, so that the plain sum is
    the loss.

    | scale | result |
    | ----- | ------ |
    | `none` | weight × `token_weights` |
    | `mean_one` | the same, with weights of mean 1 over all written tokens of the step |
    | `all_tokens` | weight × `token_weights` of normalizer `all` |
    | `its_sum` | weights of each rollout (or of all) over their sum, 1/B for each of B rollouts |

    Args:
        weights: [N] ≥ 0, of all tokens that the student wrote in one optimizer step.
        selected: [N] bool.
        rollout_of_token: [N] index of each token's rollout.
        scale: what the weights are divided by.
        loss_normalizer, loss_aggregation: as in `token_weights`.

    Returns:
        [N] float64, 0 where not selected.
    """
    if scale == WeightScale.ITS_SUM:
        return _over_their_sum(weights * selected, rollout_of_token, loss_aggregation)
    if scale == WeightScale.ALL_TOKENS:
        loss_normalizer = "all"
    plain = token_weights(
        selected,
        rollout_of_token,
        loss_normalizer=loss_normalizer,
        loss_aggregation=loss_aggregation,
    )
    if scale == WeightScale.MEAN_ONE:
        mean = weights.mean() if len(weights) else 0.0
        weights = weights / mean if mean > 0 else np.zeros(len(weights))
    return plain * weights


def _over_their_sum(
    weights: np.ndarray, rollout_of_token: np.ndarray, loss_aggregation: LossAggregation | str
) -> np.ndarray:
    if not weights.any():
        return np.zeros(len(weights))
    if loss_aggregation == "token":
        return weights / weights.sum()
    sums = np.bincount(rollout_of_token, weights=weights)
    denominators = sums[rollout_of_token] * np.count_nonzero(sums)
    return np.divide(weights, denominators, out=np.zeros(len(weights)), where=weights > 0)


def weighted_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weights: Tensor,
    *,
    student_head: OutputHead,
    teacher_head: OutputHead,
    vocab_size: int,
    loss: TrainingLoss | str = TrainingLoss.REVERSE_KL,
    settings: LossSettings = DEFAULT_LOSS_SETTINGS,
    token_ids: Tensor | None = None,
    chunk_size: int = 512,
) -> Tensor:
    """Σ_t w_t ℓ_t in nats, differentiable in the hidden states and in the trainable parameters of
    the student's head.

    Naive equivalent, with all logits at once:
    `(weights * training_loss(loss, student=student_head(hidden),
    teacher=teacher_head(teacher_hidden), token_ids=token_ids)).sum()`.

    Args:
        hidden: the student's last hidden states at the selected positions, [N, D].
        teacher_hidden: the teacher's, [N, D_T]; no gradient goes there.
        weights: w_t, [N].
        student_head: turns `hidden` into logits.
        teacher_head: turns `teacher_hidden` into logits.
        vocab_size: |V|, the tokens that both share; logits of others are cut off.
        loss: what each token is trained on.
        settings: what the losses leave open.
        token_ids: the sampled tokens, [N], which the estimators need.
        chunk_size: rows of logits at a time.
    """
    loss = TrainingLoss(loss)
    if chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1, found {chunk_size}")
    parameters = [own for own in student_head.linear.parameters() if own.requires_grad]

    def chunk_loss(rows: slice, states: Tensor) -> Tensor:
        student = student_head(states)[:, :vocab_size]
        with torch.no_grad():
            teacher = teacher_head(teacher_hidden[rows].to(_device(teacher_head)))[:, :vocab_size]
        ids = None if token_ids is None else token_ids[rows].to(student.device)
        teacher = teacher.to(student.device)
        losses = training_loss(
            loss, student=student, teacher=teacher, token_ids=ids, settings=settings
        )
        return (losses * weights[rows].to(losses)).sum()

    return _ChunkedLoss.apply(chunk_loss, chunk_size, hidden, *parameters)  # pyright: ignore


class _ChunkedLoss(torch.autograd.Function):
    """A sum over chunks of rows whose gradients are taken chunk by chunk in the forward pass; the
    backward pass scales them."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        chunk_loss: Callable[[slice, Tensor], Tensor],
        chunk_size: int,
        hidden: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        total = torch.zeros(
            (), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
        )
        hidden_grad = torch.empty_like(hidden)
        parameter_grads: Sequence[Tensor] = [
            torch.zeros_like(parameter) for parameter in parameters
        ]
        for rows in row_blocks(hidden.shape[0], chunk_size):
            with torch.enable_grad():
                states = hidden[rows].detach().requires_grad_()
                value = chunk_loss(rows, states)
            states_grad, *chunk_grads = torch.autograd.grad(value, [states, *parameters])
            hidden_grad[rows] = states_grad
            for accumulated, chunk_grad in zip(parameter_grads, chunk_grads, strict=True):
                accumulated.add_(chunk_grad)
            total += value.detach()
        ctx.save_for_backward(hidden_grad, *parameter_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        return None, None, *(_scaled(gradient, grad_outputs[0]) for gradient in ctx.saved_tensors)


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """The gradient times a scalar; itself where that is 1, as it is when the loss itself is
    differentiated."""
    return gradient if scale.item() == 1.0 else gradient * scale.to(gradient.dtype)


def _device(head: OutputHead) -> torch.device:
    return next(head.linear.parameters()).device
