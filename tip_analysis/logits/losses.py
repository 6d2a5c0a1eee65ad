"""Losses of logits [N, V] to train on and to take gradients of, in nats, with written-out
gradients.

Equation numbers are those of TIP (arXiv 2604.14084); P_S, P_T are the temperature-1 distributions
of student and teacher, z the student's logits. Each loss has a gradient in every argument that
holds logits. A token masked with −inf gets a gradient of 0. NaN and +inf logits are not looked for
here: they give NaN.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tip_analysis.core.names import Loss
from tip_analysis.logits.probabilities import (
    Row,
    compare,
    compute_dtype,
    is_infinite,
    jsd_summands,
    log_ratio,
    masked_level,
    relative_to_top,
    rest_of_sum,
    reverse_kl_summands,
)


class Form(NamedTuple):
    """A function of rows [N, V] by its value [N] and its gradient [N, V] in each differentiable
    argument."""

    value: Callable[..., Tensor]
    gradients: tuple[Callable[..., Tensor], ...]


class _ClosedForm(torch.autograd.Function):
    """Differentiates a `Form` once, in reverse and forward mode and under `torch.func`.

    The gradients are written out because automatic ones cancel on nearly one-hot rows. Only the
    logits are kept for the backward pass, which makes the probabilities again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(form: Form, *inputs: Tensor) -> Tensor:  # pyright: ignore
        return form.value(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * (1 + len(inputs))
        for i, gradient in enumerate(ctx.form.gradients):
            if ctx.needs_input_grad[1 + i]:
                gradients[1 + i] = (gradient(*inputs) * grad_outputs[0].unsqueeze(-1)).to(
                    inputs[i].dtype
                )
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:  # pyright: ignore
        inputs = ctx.saved_tensors
        parts = [
            (gradient(*inputs) * tangent).sum(-1)
            for gradient, tangent in zip(ctx.form.gradients, tangents[1:], strict=False)
            if tangent is not None
        ]
        return functools.reduce(torch.add, parts)


def closed_form(form: Form, *inputs: Tensor) -> Tensor:
    """A form's value [N], differentiable once with the form's own gradients."""
    return _ClosedForm.apply(form, *inputs)  # pyright: ignore[reportReturnType]


def about_top(p: Tensor, value: Tensor, x: Tensor) -> Tensor:
    """P (f − E f) of f [N, V], with f taken relative to its value at the top token."""
    centred = value - value.gather(-1, x.argmax(-1, keepdim=True))
    return p * (centred - (p * centred).sum(-1, keepdim=True))


def _reverse_kl_value(student: Tensor, teacher: Tensor) -> Tensor:
    ratio, row_s, row_t = compare(student, teacher)
    r = log_ratio(row_s, row_t)
    infinite = is_infinite(r.amax(-1))
    return reverse_kl_summands(ratio).sum(-1).masked_fill(infinite, math.inf)


def _reverse_kl_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    ratio, row_s, row_t = compare(student, teacher)
    return about_top(ratio.p, log_ratio(row_s, row_t), row_s.x)


def _forward_kl_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    return compare(student, teacher)[0].difference


def _jsd_value(student: Tensor, teacher: Tensor) -> Tensor:
    return jsd_summands(compare(student, teacher)[0]).sum(-1).clamp(max=math.log(2))


def _jsd_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """½ P_S (w − E w), w = ln(P_S / m)."""
    ratio, row_s, _ = compare(student, teacher)
    u = ratio.difference / (ratio.p + ratio.q + torch.finfo(ratio.p.dtype).tiny)
    far = u.abs().log1p() + ratio.d.clamp(max=0.0)
    return 0.5 * about_top(
        ratio.p, torch.where(ratio.near, u.clamp(min=-0.5).log1p(), far), row_s.x
    )


def _swapped(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda student, teacher: function(teacher, student)


def _normalise(logits: Tensor) -> tuple[Row, Tensor, Tensor]:
    """A row relative to its largest logit, P, and Σ exp x − 1."""
    row = relative_to_top(logits, compute_dtype(logits))
    e = row.x.exp()
    rest = rest_of_sum(row.x, e)
    return row, e / (1 + rest), rest


def _entropy_value(logits: Tensor) -> Tensor:
    row, p, rest = _normalise(logits)
    return (rest.squeeze(-1).log1p() - (p * row.x).sum(-1)).clamp(max=math.log(logits.shape[-1]))


def _entropy_gradient(logits: Tensor) -> Tensor:
    row, p, _ = _normalise(logits)
    return -about_top(p, row.x, row.x)


def _negative_logprob_value(logits: Tensor, token_ids: Tensor) -> Tensor:
    row, _, rest = _normalise(logits)
    x = row.x.gather(-1, token_ids.unsqueeze(-1))
    x = x.masked_fill(x <= masked_level(x.dtype) / 2, -math.inf)
    return (rest.log1p() - x).squeeze(-1)


def negative_logprob_gradient(logits: Tensor, token_ids: Tensor) -> Tensor:
    """P − onehot; at the token itself, P − 1 as exp(ln P) − 1."""
    p = _normalise(logits)[1]
    index = token_ids.unsqueeze(-1)
    return p.scatter(
        -1, index, torch.expm1(-_negative_logprob_value(logits, token_ids).unsqueeze(-1))
    )


_REVERSE_KL = Form(_reverse_kl_value, (_reverse_kl_gradient, _swapped(_forward_kl_gradient)))
_FORWARD_KL = Form(
    _swapped(_reverse_kl_value), (_forward_kl_gradient, _swapped(_reverse_kl_gradient))
)
_JSD = Form(_jsd_value, (_jsd_gradient, _swapped(_jsd_gradient)))
_ENTROPY = Form(_entropy_value, (_entropy_gradient,))
_NEGATIVE_LOGPROB = Form(_negative_logprob_value, (negative_logprob_gradient,))


def reverse_kl(*, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P_S ‖ P_T) in nats (Eq. 3), of logits [N, V] each: [N], ≥ 0, +inf where the teacher masks
    what the student does not.

    Its gradient in z is P_S (ln P_S/P_T − δ). Differentiable once, by either mode; never NaN at
    logits of −inf. Naive equivalent: `(log_softmax(student) -
    log_softmax(teacher)).mul(softmax(student)).sum(-1)`.
    """
    return closed_form(_REVERSE_KL, student, teacher)


def forward_kl(*, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P_T ‖ P_S) in nats, of logits [N, V] each: [N]. Its gradient in z is P_S − P_T (Eq.
    12)."""
    return closed_form(_FORWARD_KL, student, teacher)


def jsd(*, student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence (β = ½) in nats, of logits [N, V] each: [N], in [0, ln 2]."""
    return closed_form(_JSD, student, teacher)


def entropy(logits: Tensor) -> Tensor:
    """H(P) in nats, of logits [N, V]: [N], in [0, ln V]; its gradient is −P (ln P + H)."""
    return closed_form(_ENTROPY, logits)


def negative_logprob(student: Tensor, token_ids: Tensor) -> Tensor:
    """−ln P_S(y) in nats of tokens [N], of logits [N, V]: [N], ≥ 0; its gradient in z is P_S −
    onehot(y)."""
    return closed_form(_NEGATIVE_LOGPROB, student, token_ids)


LOSSES: dict[Loss, Callable[..., Tensor]] = {
    Loss.REVERSE_KL: lambda *, student, teacher, token_ids=None: reverse_kl(
        student=student, teacher=teacher
    ),
    Loss.FORWARD_KL: lambda *, student, teacher, token_ids=None: forward_kl(
        student=student, teacher=teacher
    ),
    Loss.JSD: lambda *, student, teacher, token_ids=None: jsd(student=student, teacher=teacher),
    Loss.NEGATIVE_LOGPROB: lambda *, student, teacher=None, token_ids: negative_logprob(
        student, token_ids
    ),
}
"""Per-token losses [N] by name, all called as `loss(student=…, teacher=…, token_ids=…)`."""
