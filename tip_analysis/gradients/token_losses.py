"""What each token's loss says about the hidden state that it is computed from, and about the output
head.

The loss ℓ_t depends on θ through the hidden state h_t [D] and the head's weight W [V, D]. With a_t
= ∂ℓ_t/∂(W h_t) [V], the gradient over W's use in the head is the outer product a_t h_tᵀ, whose
squared norm ‖a_t‖²‖h_t‖² needs no probe and no backward pass; ∂ℓ_t/∂h_t = Wᵀ a_t is all that the
body needs to know. A tied W is looked up by the input embedding too: there, only the rows of the
tokens in the sequence have a second term, and the closed form holds for all the others.

Logits exist for one block of tokens at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tip_analysis.core.names import Loss
from tip_analysis.gradients.directions import Direction
from tip_analysis.gradients.scopes import ParameterScope
from tip_analysis.logits.blocks import row_blocks
from tip_analysis.logits.row_statistics import LOSSES
from tip_analysis.models.output_head import OutputHead

BLOCK_ELEMENTS = 1 << 21
"""Tokens × |V| of the logits in a block, at most: in larger ones the C library keeps what a block
has freed."""

TeacherLogits = Callable[[slice], Tensor]
"""Rows of the teacher's logits [n, V] for a block of tokens."""


@dataclass(frozen=True)
class TokenLosses:
    """One loss at R tokens, and its derivatives; U is the number of distinct tokens in the sequence
    that the student reads."""

    value: Tensor
    """ℓ_t [R]."""
    hidden: Tensor
    """h_t [R, D]."""
    hidden_gradient: Tensor
    """∂ℓ_t/∂h_t [R, D]."""
    closed_form: Tensor
    """‖∇ℓ_t‖² [R], float64, over the head's rows that nothing but the head uses, and its bias; 0
    outside the scope."""
    shared_rows: Tensor | None
    """a_t [R, U] at the rows of a tied weight that the embedding looks up too; None if nothing is
    tied."""
    along_head: Tensor
    """Derivatives [n, R], float64, of ℓ_t along the parts of n directions that belong to the head's
    weight and bias."""

    def derivative(self, tangent: Tensor, shared: Tensor | None) -> Tensor:
        """dℓ_t [R], float64, for the tangent [R, D] of h_t and the tangent [U, D] of the shared
        rows of the head's weight."""
        change = (self.hidden_gradient * tangent.to(self.hidden_gradient.dtype)).sum(
            -1, dtype=torch.float64
        )
        if self.shared_rows is not None and shared is not None:
            change += (self.shared_rows * (self.hidden @ shared.T.to(self.hidden.dtype))).sum(
                -1, dtype=torch.float64
            )
        return change


def token_losses(
    head: OutputHead,
    hidden: Tensor,
    *,
    teacher: TeacherLogits | None,
    token_ids: Tensor,
    losses: Sequence[Loss | str],
    scope: ParameterScope,
    looked_up: Tensor,
    directions: Mapping[str, Sequence[Direction]] | None = None,
    vocab_size: int | None = None,
) -> dict[Loss, TokenLosses]:
    """Per-token losses and their derivatives with respect to hidden states and head.

    Args:
        head: the student's output head.
        hidden: [R, D], the hidden states that predict the tokens.
        teacher: gives the teacher's logits of a block; not needed for `negative_logprob`.
        token_ids: [R], the sampled tokens.
        losses: names of `divergence.LOSSES`.
        scope: what θ stands for.
        looked_up: [U], the distinct tokens that the student reads.
        directions: of each loss, the directions along which the head's part of the derivative is
            wanted.
        vocab_size: |V|, the number of logits that student and teacher share.
    """
    vocab_size = vocab_size or head.vocab_size
    block = max(1, BLOCK_ELEMENTS // head.vocab_size)
    parts: dict[Loss, list[TokenLosses]] = {Loss(loss): [] for loss in losses}
    for rows in row_blocks(hidden.shape[0], block):
        with torch.enable_grad():
            states = hidden[rows].detach().requires_grad_()
            linear, logits = _head_output(head, states)
            teacher_logits = None if teacher is None else teacher(rows)[:, :vocab_size]
            for loss in parts:
                value = token_loss(loss, logits[:, :vocab_size], teacher_logits, token_ids[rows])
                at_hidden, at_logits = torch.autograd.grad(
                    value.sum(), (states, linear), retain_graph=True
                )
                along = (directions or {}).get(loss, ())
                found = _assemble(
                    scope,
                    head,
                    value.detach(),
                    states.detach(),
                    at_hidden,
                    at_logits,
                    looked_up,
                    along,
                )
                parts[loss].append(found)
            del linear, logits, teacher_logits
    return {loss: _joined(blocks) for loss, blocks in parts.items()}


def token_loss(loss: Loss, student: Tensor, teacher: Tensor | None, token_ids: Tensor) -> Tensor:
    """ℓ_t [R] from logits [R, V], differentiable with respect to the student's."""
    return LOSSES[loss](student=student, teacher=teacher, token_ids=token_ids)


def _head_output(head: OutputHead, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The output of the head's linear layer and the logits made of it (capped or scaled), both [n,
    V]."""
    seen: list[Any] = []
    handle = head.linear.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        logits = head(hidden)
    finally:
        handle.remove()
    return seen[-1], logits


def _assemble(
    scope: ParameterScope,
    head: OutputHead,
    value: Tensor,
    hidden: Tensor,
    hidden_gradient: Tensor,
    logit_gradient: Tensor,
    looked_up: Tensor,
    directions: Sequence[Direction],
) -> TokenLosses:
    precise = torch.promote_types(hidden.dtype, torch.float32)
    a, h = logit_gradient.view(len(hidden), -1).to(precise), hidden.to(precise)
    total = _sum_of_squares(a)
    closed, shared = torch.zeros_like(total), None
    if scope.head_weight is not None:
        outside = total
        if scope.tied:
            shared = a[:, looked_up]
            outside = _sum_of_squares(a.index_fill(1, looked_up, 0.0))
        closed += outside * _sum_of_squares(h)
    if scope.head_bias is not None:
        closed += total
    along = total.new_zeros(len(directions), len(hidden))
    for index, direction in enumerate(directions):
        if scope.head_weight is not None:
            part = direction.tensor(scope.head_weight, head.linear.weight)  # pyright: ignore
            along[index] += (a * (hidden @ part.T)).sum(-1, dtype=torch.float64)
        if scope.head_bias is not None:
            part = direction.tensor(scope.head_bias, head.linear.bias)  # pyright: ignore
            along[index] += (a @ part.to(precise)).double()
    return TokenLosses(value, h, hidden_gradient.to(precise), closed, shared, along)


def _sum_of_squares(rows: Tensor) -> Tensor:
    """Σ x² of each row, in float64; scaled, so that the squares of a float32 row do not
    underflow."""
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return (rows / largest).square().sum(-1).double() * largest.squeeze(-1).double().square()


def _joined(blocks: Sequence[TokenLosses]) -> TokenLosses:
    shared = [block.shared_rows for block in blocks if block.shared_rows is not None]
    return TokenLosses(
        torch.cat([block.value for block in blocks]),
        torch.cat([block.hidden for block in blocks]),
        torch.cat([block.hidden_gradient for block in blocks]),
        torch.cat([block.closed_form for block in blocks]),
        torch.cat(shared) if shared else None,
        torch.cat([block.along_head for block in blocks], dim=1),
    )
