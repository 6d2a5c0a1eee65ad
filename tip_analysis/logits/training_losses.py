"""The losses that a student can be trained on, of logits [N, V], in nats: [N] each.

Beside the divergences of `losses`: mixtures of both models, divergences over the likeliest tokens,
and estimators from the sampled token y ~ P_S alone. With ρ = ln P_S(y)/P_T(y) and the rows' own
gradient e_y − P_S of ln P_S(y):

| loss | value | gradient in the student's logits | its mean over y is the gradient of |
| --- | --- | --- | --- |
| `k1` | ρ·ln P_S(y), ρ held constant | ρ (e_y − P_S) | KL(P_S ‖ P_T) |
| `k1_centred` | (ρ − δ)·ln P_S(y), the bracket held constant | (ρ − δ)(e_y − P_S) | KL(P_S ‖ P_T) |
| `k2` | ρ²/2 | ρ (e_y − P_S) | KL(P_S ‖ P_T) |
| `k3` | exp(−ρ) − 1 + ρ | (1 − exp(−ρ))(e_y − P_S) | KL(P_T ‖ P_S) |

So `k3`, whose value estimates the reverse KL, descends on the forward one. All hold for y drawn
from the student as it is, at temperature 1.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tip_analysis.core.errors import OptionError
from tip_analysis.core.loss_settings import DEFAULT_LOSS_SETTINGS, LossSettings
from tip_analysis.core.names import TopKSource, TopKTail, TrainingLoss
from tip_analysis.logits import losses
from tip_analysis.logits.losses import Form, closed_form
from tip_analysis.logits.probabilities import (
    Ratio,
    compare,
    is_infinite,
    log_ratio,
    ratio_of,
    reverse_kl_summands,
)
from tip_analysis.logits.top_tokens import largest

_SERIES_BELOW = 0.05
_SERIES = [(-1.0) ** n / n for n in range(2, 10)]


def training_loss(
    loss: TrainingLoss | str,
    *,
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor | None = None,
    settings: LossSettings = DEFAULT_LOSS_SETTINGS,
) -> Tensor:
    """A training loss of N tokens by its name, [N] nats, differentiable in the student's logits.

    Args:
        loss: which.
        student: logits of P_S, [N, V].
        teacher: logits of P_T, [N, V].
        token_ids: the sampled tokens, [N]; needed by the estimators.
        settings: what the losses leave open.

    Raises:
        OptionError: an estimator without its tokens.
        UnknownNameError: no such loss.
    """
    loss = TrainingLoss(loss)
    if loss in _SAMPLED:
        if token_ids is None:
            raise OptionError(f"the loss {loss} needs the tokens that were sampled")
        return closed_form(_SAMPLED[loss], student, teacher, token_ids)
    return _DIVERGENCES[loss](student, teacher, settings)


def _reverse_kl(student: Tensor, teacher: Tensor, settings: LossSettings) -> Tensor:
    return losses.reverse_kl(student=student, teacher=teacher)


def _forward_kl(student: Tensor, teacher: Tensor, settings: LossSettings) -> Tensor:
    return losses.forward_kl(student=student, teacher=teacher)


def _jsd(student: Tensor, teacher: Tensor, settings: LossSettings) -> Tensor:
    """β KL(P_T ‖ M) + (1 − β) KL(P_S ‖ M), M = β P_T + (1 − β) P_S (GKD, arXiv 2306.13649); its
    gradient is (1 − β) P_S (w − E w), w = ln P_S/M."""
    if settings.jsd_beta == 0.5:
        return losses.jsd(student=student, teacher=teacher)
    return closed_form(_jsd_form(settings.jsd_beta), student, teacher)


def _skew_kl(student: Tensor, teacher: Tensor, settings: LossSettings) -> Tensor:
    """KL(P_T ‖ α P_T + (1 − α) P_S) (DistiLLM, arXiv 2402.03898); its gradient is
    (1 − α)² P_S (w − E w), w = (P_S − P_T)/M."""
    return closed_form(_skew_form(settings.skew_alpha), student, teacher)


def _skew_reverse_kl(student: Tensor, teacher: Tensor, settings: LossSettings) -> Tensor:
    """KL(P_S ‖ α P_S + (1 − α) P_T) (DistiLLM); its gradient is P_S (w − E w),
    w = ln P_S/M − α P_S/M."""
    return closed_form(_skew_reverse_form(settings.skew_alpha), student, teacher)


def _entropy_gated(student: Tensor, teacher: Tensor, settings: LossSettings) -> Tensor:
    """KL(P_S ‖ P_T), and KL(P_T ‖ P_S) on top where H(P_T) is above the gate (arXiv
    2603.07079)."""
    with torch.no_grad():
        gate = (losses.entropy(teacher) > settings.entropy_gate).to(student.device)
    forward = losses.forward_kl(student=student, teacher=teacher)
    return losses.reverse_kl(student=student, teacher=teacher) + torch.where(gate, forward, 0.0)


def _topk_reverse_kl(student: Tensor, teacher: Tensor, settings: LossSettings) -> Tensor:
    """KL(P_S ‖ P_T) over the k most likely tokens of one model: renormalised, or with all others as
    one token more. Which tokens these are is held constant."""
    k = settings.loss_top_k
    if k >= student.shape[-1]:
        return losses.reverse_kl(student=student, teacher=teacher)
    of_student = settings.loss_top_k_of == TopKSource.STUDENT
    ids = largest((student if of_student else teacher).detach(), k)[2]
    if settings.loss_tail == TopKTail.BUCKET:
        return closed_form(_BUCKET, student, teacher, ids)
    return losses.reverse_kl(student=student.gather(-1, ids), teacher=teacher.gather(-1, ids))


class _Merged(NamedTuple):
    """Two rows in which all tokens but some are one."""

    ratio: Ratio
    inside: Tensor
    """[N, V] bool: the tokens that stay."""
    tail: Ratio
    """The bucket of all others, [N, 1] each."""
    top: Tensor
    """x of the student, [N, V]."""
    infinite: Tensor
    """[N] bool: the teacher has nothing where the student has something."""


def _merged(student: Tensor, teacher: Tensor, ids: Tensor) -> _Merged:
    ratio, row_s, row_t = compare(student, teacher)
    inside = torch.zeros_like(ratio.p, dtype=torch.bool).scatter(-1, ids, True)
    p, q, difference = (
        torch.where(inside, 0.0, values).sum(-1, keepdim=True)
        for values in (ratio.p, ratio.q, ratio.difference)
    )
    tiny = torch.finfo(p.dtype).tiny
    relative = difference / q.clamp(min=tiny)
    close = relative.abs() < 0.5
    apart = p.clamp(min=tiny).log() - q.clamp(min=tiny).log()
    d = torch.where(close, torch.where(close, relative, 0.0).log1p(), apart)
    masked = is_infinite(log_ratio(row_s, row_t).gather(-1, ids).amax(-1))
    infinite = masked | ((q == 0) & (p > 0)).squeeze(-1)
    return _Merged(ratio, inside, ratio_of(p, q, d), row_s.x, infinite)


def _bucket_value(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    found = _merged(student, teacher, ids)
    kept = torch.where(found.inside, reverse_kl_summands(found.ratio), 0.0).sum(-1)
    tail = reverse_kl_summands(found.tail).squeeze(-1).clamp(min=0.0)
    return (kept + tail).masked_fill(found.infinite, math.inf)


def _bucket_gradient(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """P_S (w − E w), w the log-ratio of a token, or of the bucket that it lies in."""
    found = _merged(student, teacher, ids)
    w = torch.where(found.inside, found.ratio.d, found.tail.d)
    return losses.about_top(found.ratio.p, w, found.top)


_BUCKET = Form(_bucket_value, (_bucket_gradient,))


def _mixture_summands(a: Tensor, difference: Tensor, log_ratio: Tensor) -> Tensor:
    """a ln(a/M) − a + M ≥ 0, which sums to KL(A ‖ M), from M − A and ln M/A, without cancelling
    where they are small."""
    relative = torch.expm1(log_ratio.clamp(max=_SERIES_BELOW))
    near = relative.abs() < _SERIES_BELOW
    small = torch.where(near, relative, 0.0)
    series = torch.zeros_like(small)
    for coefficient in reversed(_SERIES):
        series = series * small + coefficient
    return torch.where(near, a * series * small.square(), difference - a * log_ratio)


def _log_mixture(weight: float, d: Tensor) -> Tensor:
    """ln(1 − w + w exp d), exact to its own size where d is small."""
    near = d.abs() < 0.5
    small = torch.where(near, d, 0.0)
    own = d.new_tensor(math.log1p(-weight) if weight < 1.0 else -math.inf)
    far = torch.logaddexp(own, d + math.log(weight))
    return torch.where(near, torch.log1p(weight * torch.expm1(small)), far)


@functools.cache
def _jsd_form(beta: float) -> Form:
    def value(student: Tensor, teacher: Tensor) -> Tensor:
        ratio = compare(student, teacher)[0]
        of_teacher = _mixture_summands(
            ratio.q, (1 - beta) * ratio.difference, _log_mixture(1 - beta, ratio.d)
        )
        of_student = _mixture_summands(
            ratio.p, -beta * ratio.difference, _log_mixture(beta, -ratio.d)
        )
        return (beta * of_teacher + (1 - beta) * of_student).sum(-1)

    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        ratio, row, _ = compare(student, teacher)
        return (1 - beta) * losses.about_top(ratio.p, -_log_mixture(beta, -ratio.d), row.x)

    return Form(value, (gradient,))


@functools.cache
def _skew_form(alpha: float) -> Form:
    rest = 1 - alpha

    def value(student: Tensor, teacher: Tensor) -> Tensor:
        ratio, row_s, row_t = compare(student, teacher)
        summands = _mixture_summands(
            ratio.q, rest * ratio.difference, _log_mixture(rest, ratio.d)
        ).sum(-1)
        unsupported = is_infinite(-log_ratio(row_s, row_t).amin(-1))
        return summands.masked_fill(unsupported, math.inf) if alpha == 0.0 else summands

    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        ratio, row, _ = compare(student, teacher)
        return rest * losses.about_top(ratio.p, rest * _over_mixture(ratio, alpha), row.x)

    return Form(value, (gradient,))


def _over_mixture(ratio: Ratio, alpha: float) -> Tensor:
    """(P_S − P_T) / (α P_T + (1 − α) P_S), 0 where the mixture has nothing."""
    mixture = alpha * ratio.q + (1 - alpha) * ratio.p
    tiny = torch.finfo(mixture.dtype).tiny
    return torch.where(mixture > tiny, ratio.difference / mixture.clamp(min=tiny), 0.0)


@functools.cache
def _skew_reverse_form(alpha: float) -> Form:
    rest = 1 - alpha

    def value(student: Tensor, teacher: Tensor) -> Tensor:
        ratio, row_s, row_t = compare(student, teacher)
        summands = _mixture_summands(
            ratio.p, -rest * ratio.difference, _log_mixture(rest, -ratio.d)
        ).sum(-1)
        unsupported = is_infinite(log_ratio(row_s, row_t).amax(-1))
        return summands.masked_fill(unsupported, math.inf) if alpha == 0.0 else summands

    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        ratio, row, _ = compare(student, teacher)
        log_m_over_p = _log_mixture(rest, -ratio.d)
        # ln P_S/M − α P_S/M, less its value −α where the rows are equal
        w = -log_m_over_p - alpha * torch.expm1(-log_m_over_p)
        return losses.about_top(ratio.p, w, row.x)

    return Form(value, (gradient,))


def _sampled_ratio(student: Tensor, teacher: Tensor, token_ids: Tensor) -> tuple[Tensor, Ratio]:
    """ρ of each token, [N]; +inf where the teacher masks it."""
    ratio, row_s, row_t = compare(student, teacher)
    index = token_ids.unsqueeze(-1)
    rho = ratio.d.gather(-1, index).squeeze(-1)
    masked = is_infinite(log_ratio(row_s, row_t).gather(-1, index).squeeze(-1))
    return rho.masked_fill(masked, math.inf), ratio


def _delta(student: Tensor, teacher: Tensor) -> Tensor:
    return losses.reverse_kl(student=student, teacher=teacher)


def _k1(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
    return _sampled_ratio(student, teacher, token_ids)[0]


def _k1_centred(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
    return _k1(student, teacher, token_ids) - _delta(student, teacher)


def _k3_coefficient(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
    return -torch.expm1(-_k1(student, teacher, token_ids))


def _k2_value(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
    return 0.5 * _k1(student, teacher, token_ids).square()


def _k3_value(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
    rho, ratio = _sampled_ratio(student, teacher, token_ids)
    near = ratio.excess_reversed.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return torch.where(rho.abs() < 0.5, near, torch.expm1(-rho) + rho)


def _estimator(coefficient: Callable[..., Tensor], value: Callable[..., Tensor] | None) -> Form:
    """A loss whose gradient is `coefficient` (e_y − P_S); without a value of its own it is the
    coefficient times ln P_S(y)."""

    def surrogate(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
        scale = coefficient(student, teacher, token_ids)
        return -scale * losses.negative_logprob(student, token_ids)

    def gradient(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Tensor:
        scale = coefficient(student, teacher, token_ids).unsqueeze(-1)
        return -scale * losses.negative_logprob_gradient(student, token_ids)

    return Form(value or surrogate, (gradient,))


_DIVERGENCES: dict[TrainingLoss, Callable[[Tensor, Tensor, LossSettings], Tensor]] = {
    TrainingLoss.REVERSE_KL: _reverse_kl,
    TrainingLoss.FORWARD_KL: _forward_kl,
    TrainingLoss.JSD: _jsd,
    TrainingLoss.SKEW_KL: _skew_kl,
    TrainingLoss.SKEW_REVERSE_KL: _skew_reverse_kl,
    TrainingLoss.TOPK_REVERSE_KL: _topk_reverse_kl,
    TrainingLoss.ENTROPY_GATED: _entropy_gated,
}

_SAMPLED: dict[TrainingLoss, Form] = {
    TrainingLoss.K1: _estimator(_k1, None),
    TrainingLoss.K1_CENTRED: _estimator(_k1_centred, None),
    TrainingLoss.K2: _estimator(_k1, _k2_value),
    TrainingLoss.K3: _estimator(_k3_coefficient, _k3_value),
}
