"""Two rows of logits as probabilities and log-ratios, exact to their own size: what statistics and losses are made of.

P_S and P_T are the temperature-1 distributions of student and teacher over all V tokens. Softmaxes are in float32, or in
float64 where a row of logits is.

The plain forms of these equations are wrong by several per cent, and often in sign, where the two rows are nearly equal or
nearly one-hot: which is where most tokens are. What is done instead:

- Logits enter as `x = z − max z`, with the rounding error of that difference carried along, and the log-ratio
  `d = ln P_S − ln P_T` as `r − L`, `r = x_S − x_T`, `L = ln Σ exp x_S − ln Σ exp x_T` from the summed *differences* of the
  exponentials. So d is exact to its own size, however small, and 0 where the rows differ by a constant.
- Where |d| < ½, `exp(d) − 1 − d` comes from its series, and `P_S − P_T`, both Kullback-Leibler summands and the
  Jensen-Shannon summand from that; elsewhere from P_S, P_T and d. Every summand is non-negative.
- Sums over all tokens but the first (ln Σ exp x = log1p(rest)) and moments about the top token keep nearly one-hot rows.
- Squares of gradients are summed in scaled form, so that they do not underflow before their root does.

A logit of −inf masks its token. So does one so far below the row's largest that the difference reaches a sixteenth of
what the dtype can hold (some models mask with the lowest finite number): a divergence from it would be as good as infinite.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SERIES_BELOW = 0.5
"""Log-ratios smaller than this go through series."""


class Row(NamedTuple):
    """A row of logits relative to its largest, [N, V]: z − max z = x + error."""

    x: Tensor
    error: Tensor


class Ratio(NamedTuple):
    """What every divergence of two rows is made of, [N, V]."""

    p: Tensor
    """P_S."""
    q: Tensor
    """P_T."""
    d: Tensor
    """ln P_S − ln P_T; finite also where a token is masked."""
    excess: Tensor
    """exp(d) − 1 − d, where |d| < ½."""
    excess_reversed: Tensor
    """exp(−d) − 1 + d, where |d| < ½."""
    near: Tensor
    """Whether |d| < ½."""
    difference: Tensor
    """P_S − P_T."""


def masked_level(dtype: torch.dtype) -> float:
    """What a masked logit counts as, relative to the row's largest: finite, so that no ∞ − ∞ arises, yet below all others."""
    return torch.finfo(dtype).min / 8


def relative_to_top(logits: Tensor, dtype: torch.dtype, top: Tensor | None = None) -> Row:
    """Logits relative to the row's largest, with the rounding error of the subtraction (Knuth's two-sum)."""
    z = logits.to(dtype)
    top = z.amax(-1, keepdim=True) if top is None else top
    level = masked_level(dtype)
    x = (z - top).clamp(min=level)
    back = x - z
    error = (z - (x - back)) - (top + back)
    return Row(x, torch.where(x > level / 2, error, 0.0))


def _excess(d: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(d) − 1 − d, exp(−d) − 1 + d) for |d| ≤ ½, to the precision of the dtype, however small d is.

    d² Σ (±d)ⁿ / (n + 2)!, even and odd powers apart, which serves both signs.
    """
    num_terms = 8 if d.dtype == torch.float32 else 16
    square = d * d
    even, odd = square / math.factorial(num_terms), square / math.factorial(num_terms + 1)
    for n in range(num_terms - 2, 0, -2):  # in place: uncompiled, new arrays are what costs
        even.add_(1 / math.factorial(n)).mul_(square)
        odd.add_(1 / math.factorial(n + 1)).mul_(square)
    odd.mul_(d)
    return even + odd, even - odd


def rest_of_sum(x: Tensor, e: Tensor) -> Tensor:
    """Σ exp x over all tokens but one of the largest, [N, 1]: what `Σ exp x = 1 + rest` would round away."""
    at_top = x == 0
    return torch.where(at_top, 0.0, e).sum(-1, keepdim=True) + (at_top.to(x.dtype).sum(-1, keepdim=True) - 1)


def log_ratio(student: Row, teacher: Row) -> Tensor:
    """r = x_S − x_T, [N, V]: the log-ratio of the probabilities up to a constant of the row."""
    return (student.x - teacher.x) + (student.error - teacher.error)


def difference_of_exponentials(r: Tensor, e_student: Tensor, e_teacher: Tensor) -> Tensor:
    """exp x_S − exp x_T, [N, V], exact to its own size where they are close."""
    clipped = r.clamp(-SERIES_BELOW, SERIES_BELOW)
    return torch.where(r.abs() < SERIES_BELOW, e_teacher * (clipped + _excess(clipped)[0]), e_student - e_teacher)


def log_ratio_of_sums(difference: Tensor, rest_student: Tensor, rest_teacher: Tensor) -> Tensor:
    """L = ln Σ exp x_S − ln Σ exp x_T, [N, 1], from Σ (exp x_S − exp x_T): exact to its own size where the rows are close."""
    relative = difference / (1 + rest_teacher)
    close = relative.abs() < SERIES_BELOW
    return torch.where(close, torch.where(close, relative, 0.0).log1p(), rest_student.log1p() - rest_teacher.log1p())


def ratio_of(p: Tensor, q: Tensor, d: Tensor) -> Ratio:
    """Complete P_S, P_T and their log-ratio by what cancels when taken from them."""
    near = d.abs() < SERIES_BELOW
    clipped = d.clamp(-SERIES_BELOW, SERIES_BELOW)
    excess, excess_reversed = _excess(clipped)
    difference = torch.where(near, q * (clipped + excess), p - q)
    return Ratio(p, q, d, excess, excess_reversed, near, difference)


def compare(student: Tensor, teacher: Tensor) -> tuple[Ratio, Row, Row]:
    """Two rows of logits [N, V] as probabilities and log-ratios; for the losses, which need no more sums."""
    dtype = compute_dtype(student, teacher)
    row_s, row_t = relative_to_top(student, dtype), relative_to_top(teacher, dtype)
    r = log_ratio(row_s, row_t)
    e_s, e_t = row_s.x.exp(), row_t.x.exp()
    rest_s, rest_t = rest_of_sum(row_s.x, e_s), rest_of_sum(row_t.x, e_t)
    difference = difference_of_exponentials(r, e_s, e_t).sum(-1, keepdim=True)
    d = r - log_ratio_of_sums(difference, rest_s, rest_t)
    return ratio_of(e_s / (1 + rest_s), e_t / (1 + rest_t), d), row_s, row_t


def compute_dtype(*logits: Tensor) -> torch.dtype:
    """float32, or float64 where any of the logits are."""
    return functools.reduce(torch.promote_types, (each.dtype for each in logits), torch.float32)


def reverse_kl_summands(ratio: Ratio) -> Tensor:
    """P_S d − P_S + P_T ≥ 0, which sums to KL(P_S ‖ P_T)."""
    p, q, d = ratio.p, ratio.q, ratio.d
    return torch.where(ratio.near, p * ratio.excess_reversed, p * d - p + q)


def forward_kl_summands(ratio: Ratio) -> Tensor:
    """−P_T d − P_T + P_S ≥ 0, which sums to KL(P_T ‖ P_S)."""
    p, q, d = ratio.p, ratio.q, ratio.d
    return torch.where(ratio.near, q * ratio.excess, p - q - q * d)


def jsd_summands(ratio: Ratio) -> Tensor:
    """½ m [(1 + u) ln(1 + u) + (1 − u) ln(1 − u)] ≥ 0, m = (P_S + P_T) / 2, u = (P_S − P_T) / (P_S + P_T) = tanh(d/2).

    The bracket is u d + ln(1 − u²), of which the second part is half the first where d is small, so that little cancels.
    Where |u| nears 1 it is 2 ln(1 + |u|) − (1 − |u|) |d|.
    """
    p, q, d = ratio.p, ratio.q, ratio.d
    total = p + q
    u = ratio.difference / (total + torch.finfo(d.dtype).tiny)
    logarithm = torch.where(ratio.near, -u * u, u.abs()).log1p()
    near = 0.5 * (ratio.difference * d + total * logarithm)
    return 0.5 * torch.where(ratio.near, near, total * logarithm - torch.minimum(p, q) * d.abs())


class Infinite(NamedTuple):
    """Whether a Kullback-Leibler divergence is infinite, [N, 1]."""

    reverse: Tensor
    forward: Tensor


def infinite_divergences(max_ratio: Tensor, min_ratio: Tensor) -> Infinite:
    """A token is masked in one model and not in the other: seen in the row's largest and smallest r, [N, 1]."""
    limit = -masked_level(max_ratio.dtype) / 2
    return Infinite(max_ratio > limit, min_ratio < -limit)
