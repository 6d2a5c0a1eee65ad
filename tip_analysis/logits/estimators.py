"""How noisy an estimate from one sample, or from a few tokens, is of a token's reverse KL and of
its gradient: exact over the vocabulary.

The one-sample estimator of the reverse KL's gradient in the student's logits, by the score
function with a scalar baseline b, is g_y = (ρ_y − b) (e_y − P_S) for y ~ P_S, ρ_y = ln P_S(y) /
P_T(y). Its mean is μ = ∂KL(P_S ‖ P_T)/∂z whatever b; its variance is the trace of its covariance,
E‖g_y‖² − ‖μ‖², where ‖e_y − P_S‖² = 1 − 2 P_S(y) + Σ P_S².

Sums over the vocabulary come from the pass (`totals.RowTotals`), centred on b = δ; other baselines
follow from them. What concerns the student's most likely tokens only is computed here from their
logits, in float64.
"""

import math

import torch
from torch import Tensor

from tip_analysis.logits.probabilities import SCALE
from tip_analysis.logits.totals import RowTotals

_RESOLVED = 1e3
"""A difference counts where it is this many roundings of what it is taken from."""
_SERIES = [(-1.0) ** n / math.factorial(n) for n in range(2, 9)]


def estimator_columns(totals: RowTotals, dtype: torch.dtype) -> dict[str, Tensor]:
    """Variance and signal-to-noise of the one-sample estimator, [N] each.

    Args:
        totals: what the pass found.
        dtype: what it computed in; decides what is told from rounding.

    Returns:
        `k1_variance` (b = 0) and `k1_variance_centred` (b = δ), in squared nats; +inf where the
        divergence is. `k1_snr`, ‖μ‖² over the variance at the best scalar b; NaN where that
        variance is not told from rounding (of two tokens it is 0).
    """
    first = totals.first_estimator_moment.double() / math.sqrt(SCALE)
    second = totals.second_estimator_moment.double() / math.sqrt(SCALE)
    square_mean = totals.square_reverse_gradient.double() / SCALE
    delta = totals.reverse_kl.double()
    mean_distance = _rest_prob(totals) * (1 + totals.student_top_prob) - totals.rest_squares
    plain = second + 2 * delta * first + delta.square() * mean_distance
    best = second - torch.where(mean_distance > 0, first.square() / mean_distance, 0.0)
    noise = best - square_mean
    infinite = totals.reverse_is_infinite
    resolved = (noise > _RESOLVED * torch.finfo(dtype).eps * second) & ~infinite
    return {
        "k1_variance": (plain - square_mean).clamp(min=0.0).masked_fill(infinite, math.inf),
        "k1_variance_centred": (second - square_mean)
        .clamp(min=0.0)
        .masked_fill(infinite, math.inf),
        "k1_snr": torch.where(resolved, square_mean / noise, math.nan),
    }


def candidate_columns(
    student: Tensor, teacher: Tensor, ids: Tensor, totals: RowTotals
) -> dict[str, Tensor]:
    """What a loss over the student's most likely tokens alone sees, [N] each.

    Args:
        student: logits of P_S, [N, V].
        teacher: logits of P_T, [N, V].
        ids: the candidates, [N, k].
        totals: what the pass found.

    Returns:
        `ier`: the information-geometric ratio of arXiv 2609.24432 over the candidates,
        renormalised: Var[ρ] / (E[(ρ − b*)² L] − Var[ρ]), L = (1 − p) / p, b* = E[ρL] / E[L]; NaN
        for fewer than three candidates, or one that the teacher masks.
        `topk_bias`: δ less the reverse KL of the candidates and one bucket for all other tokens,
        nats, ≥ 0 (merging tokens loses divergence); `topk_bias_no_tail`: δ less Σ P_S ln P_S/P_T
        over the candidates, of either sign.
    """
    of_student, of_teacher = student.gather(1, ids).double(), teacher.gather(1, ids).double()
    ratio = _information_ratio(of_student, of_teacher)
    if ids.shape[1] == student.shape[1]:  # nothing is left out
        nothing = torch.zeros_like(ratio)
        return {"ier": ratio, "topk_bias": nothing, "topk_bias_no_tail": nothing}
    has_top = ids == totals.teacher_ids[:, :1]
    return {"ier": ratio} | _topk_bias(of_student, of_teacher, has_top, totals)


def _information_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """IER of candidates' logits [N, k]; constants do not matter, so ρ is z_S − z_T."""
    known = student.isfinite()
    x = torch.where(known, student - student.amax(1, keepdim=True), -math.inf)
    rest = x[:, 1:].exp().sum(1, keepdim=True)  # candidates come by falling logit
    log_p = x - rest.log1p()
    p, others = log_p.exp(), torch.where(known, -torch.expm1(log_p), 0.0)
    ratio = student - teacher
    ratio = torch.where(known, ratio - ratio[:, :1], 0.0)  # a constant must not leave its rounding
    baseline = (ratio * others).sum(1, keepdim=True) / others.sum(1, keepdim=True)
    spread = ((ratio - baseline).square() * others).sum(1)
    variance = (p * (ratio - (p * ratio).sum(1, keepdim=True)).square()).sum(1)
    rest_of_spread = spread - variance
    resolved = rest_of_spread > _RESOLVED * torch.finfo(torch.float64).eps * spread
    return torch.where(resolved, variance / rest_of_spread, math.nan)


def _topk_bias(
    student: Tensor, teacher: Tensor, is_top_of_teacher: Tensor, totals: RowTotals
) -> dict[str, Tensor]:
    x_s = student - totals.student_max.double().unsqueeze(1)
    x_t = teacher - totals.teacher_max.double().unsqueeze(1)
    known = x_s.isfinite()
    d = torch.where(known, x_s - x_t - totals.log_sum_ratio.double().unsqueeze(1), 0.0)
    p = (x_s - totals.student_log_sum.double().unsqueeze(1)).exp()
    q = (x_t - totals.teacher_log_sum.double().unsqueeze(1)).exp()
    inside = torch.where(d.isinf(), math.inf, _summands(p, q, d)).sum(1)
    tail_s = (_rest_prob(totals) - p[:, 1:].sum(1)).clamp(min=0.0)
    rest_t = totals.teacher_log_sum.double().expm1() * totals.teacher_top_prob.double()
    others = torch.where(is_top_of_teacher, 0.0, q).sum(1)
    tail_t = (torch.where(is_top_of_teacher.any(1), rest_t, 1.0) - others).clamp(min=0.0)
    log_ratio = torch.where((tail_s > 0) & (tail_t > 0), (tail_s / tail_t).log(), 0.0)
    tail = torch.where(tail_t > 0, tail_s * log_ratio - tail_s + tail_t, 0.0)
    delta = totals.reverse_kl.double().masked_fill(totals.reverse_is_infinite, math.inf)
    lost = (delta - inside - tail.clamp(min=0.0)).clamp(min=0.0)
    plain = delta - torch.where(d.isinf(), math.inf, p * d).sum(1)
    unknown = delta.isinf() & d.isinf().any(1)
    return {
        "topk_bias": torch.where(unknown, math.nan, lost),
        "topk_bias_no_tail": torch.where(unknown, math.nan, plain),
    }


def _summands(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """P_S d − P_S + P_T ≥ 0, in float64, without cancelling where d is small."""
    near = d.abs() < 0.05
    small = torch.where(near, d, 0.0)
    series = torch.zeros_like(small)
    for coefficient in reversed(_SERIES):
        series = series * small + coefficient
    return torch.where(near, p * series * small.square(), p * d - p + q)


def _rest_prob(totals: RowTotals) -> Tensor:
    """1 − P_S(top), as small as it may be."""
    return totals.student_log_sum.double().expm1() * totals.student_top_prob.double()
