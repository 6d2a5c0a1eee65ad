"""Two rows of logits as probabilities and log-ratios, exact to their own size: what statistics and
losses are made of.

P_S and P_T are the temperature-1 distributions of student and teacher over all V tokens. Softmaxes
are in float32, or in float64 where a row of logits is.

The plain forms of these equations are wrong by several per cent, and often in sign, where the two
rows are nearly equal or nearly one-hot: which is where most tokens are. What is done instead:

- Logits enter as `x = z − max z`, with the rounding error of that difference carried along where it
  has one, and the log-ratio `d = ln P_S − ln P_T` as `r − L`, `r = x_S − x_T`, `L = ln Σ exp x_S −
  ln Σ exp x_T` from the summed *differences* of the exponentials. So d is exact to its own size,
  however small, and 0 where the rows differ by a constant.
- Where |d| < ½, `P_S − P_T` and the summands of all divergences come from series in d; elsewhere
  from P_S, P_T and d. Every summand is non-negative.
- Sums over all tokens but the first (ln Σ exp x = log1p(rest)) and moments about the top token keep
  nearly one-hot rows.
- Squares of gradients are summed in scaled form, so that they do not underflow before their root
  does.

A logit of −inf masks its token. So does one so far below the row's largest that the difference
reaches a sixteenth of what the dtype can hold (some models mask with the lowest finite number): a
divergence from it would be as good as infinite.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import scipy.special
import torch
from torch import Tensor

SERIES_BELOW = 0.5
"""Log-ratios smaller than this go through series."""
SCALE = 2.0**60
"""Differences of probabilities times this: their squares stay between float32's smallest and
largest normal number."""
CENTRE_ON_TOP_ABOVE = 1e-3
"""Curvature is a variance under P_S: about the top token it loses a factor 1/P_S(top) in precision,
about the mean none."""


class Row(NamedTuple):
    """A row of logits relative to its largest, [N, V]: z − max z = x + error."""

    x: Tensor
    error: Tensor | None
    """None where the logits come in fewer bits than are computed with: their differences are exact,
    but for logits below 2⁻¹⁶ (float16: 2⁻¹³) of the row's largest, which are off by less than a
    2²⁴th of that."""


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
    square: Tensor
    """d², where |d| < ½."""
    difference: Tensor
    """P_S − P_T."""


def masked_level(dtype: torch.dtype) -> float:
    """What a masked logit counts as, relative to the row's largest: finite, so that no ∞ − ∞
    arises, yet below all others."""
    return torch.finfo(dtype).min / 8


def relative_to_top(logits: Tensor, dtype: torch.dtype, top: Tensor | None = None) -> Row:
    """Logits relative to the row's largest, with the rounding error of the subtraction (Knuth's
    two-sum)."""
    z = logits.to(dtype)
    top = z.amax(-1, keepdim=True) if top is None else top
    level = masked_level(dtype)
    x = (z - top).clamp(min=level)
    if logits.dtype.itemsize < dtype.itemsize:
        return Row(x, None)
    back = x - z
    error = (z - (x - back)) - (top + back)
    return Row(x, torch.where(x > level / 2, error, 0.0))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Σ cₙ xⁿ by Horner's rule, c₀ first; at least two coefficients."""
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:  # in place: uncompiled, new arrays are what costs
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0]) if coefficients[0] else value


def _num_terms(x: Tensor, in_float32: int) -> int:
    """Terms of a series in float32, and twice as many in float64."""
    return in_float32 if x.dtype == torch.float32 else 2 * in_float32


def _excess(d: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(d) − 1 − d, exp(−d) − 1 + d) for |d| ≤ ½, to the precision of the dtype, however small d
    is; `square` is d².

    d² Σ (±d)ⁿ / (n + 2)!, even and odd powers apart, which serves both signs.
    """
    powers = range(2, _num_terms(d, 8) + 1, 2)
    even = _polynomial(square, [0.0, *(1 / math.factorial(n) for n in powers)])
    odd = _polynomial(square, [0.0, *(1 / math.factorial(n + 1) for n in powers)]).mul_(d)
    return even + odd, even - odd


def rest_of_sum(x: Tensor, e: Tensor) -> Tensor:
    """Σ exp x over all tokens but one of the largest, [N, 1]: what `Σ exp x = 1 + rest` would round
    away."""
    at_top = x == 0
    return torch.where(at_top, 0.0, e).sum(-1, keepdim=True) + (
        at_top.to(x.dtype).sum(-1, keepdim=True) - 1
    )


def log_ratio(student: Row, teacher: Row) -> Tensor:
    """r = x_S − x_T, [N, V]: the log-ratio of the probabilities up to a constant of the row."""
    r = student.x - teacher.x
    if student.error is not None and teacher.error is not None:
        return r + (student.error - teacher.error)
    if student.error is not None:
        return r + student.error
    return r if teacher.error is None else r - teacher.error


def difference_of_exponentials(r: Tensor, e_student: Tensor, e_teacher: Tensor) -> Tensor:
    """exp x_S − exp x_T, [N, V], exact to its own size where they are close."""
    small = r.clamp(-SERIES_BELOW, SERIES_BELOW)
    expm1 = _polynomial(
        small, [0.0, *(1 / math.factorial(n) for n in range(1, _num_terms(r, 9) + 1))]
    )
    return torch.where(r.abs() < SERIES_BELOW, e_teacher * expm1, e_student - e_teacher)


def log_ratio_of_sums(difference: Tensor, rest_student: Tensor, rest_teacher: Tensor) -> Tensor:
    """L = ln Σ exp x_S − ln Σ exp x_T, [N, 1], from Σ (exp x_S − exp x_T): exact to its own size
    where the rows are close."""
    relative = difference / (1 + rest_teacher)
    close = relative.abs() < SERIES_BELOW
    return torch.where(
        close,
        torch.where(close, relative, 0.0).log1p(),
        rest_student.log1p() - rest_teacher.log1p(),
    )


def ratio_of(p: Tensor, q: Tensor, d: Tensor) -> Ratio:
    """Complete P_S, P_T and their log-ratio by what cancels when taken from them."""
    near = d.abs() < SERIES_BELOW
    small = d.clamp(-SERIES_BELOW, SERIES_BELOW)
    square = small * small
    excess, excess_reversed = _excess(small, square)
    difference = torch.where(near, q * (small + excess), p - q)
    return Ratio(p, q, d, excess, excess_reversed, near, square, difference)


def compare(student: Tensor, teacher: Tensor) -> tuple[Ratio, Row, Row]:
    """Two rows of logits [N, V] as probabilities and log-ratios; for the losses, which need no more
    sums."""
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


def _jsd_series(num_terms: int) -> list[float]:
    """Coefficients of ½ (y tanh y − ln cosh y), y = d/2, by powers of d².

    ln cosh y = Σ cₙ y²ⁿ with cₙ = 2²ⁿ (2²ⁿ − 1) B₂ₙ / (2n (2n)!), whose derivative is tanh y: the
    bracket is Σ (2n − 1) cₙ y²ⁿ.
    """
    bernoulli = scipy.special.bernoulli(2 * num_terms)[2::2].tolist()
    return [
        0.0,
        *(
            (2 * n - 1) * (4**n - 1) * b / (4 * n * math.factorial(2 * n))
            for n, b in enumerate(bernoulli, 1)
        ),
    ]


JSD_SERIES = _jsd_series(12)


def jsd_summands(ratio: Ratio) -> Tensor:
    """½ [P_S ln(P_S / m) + P_T ln(P_T / m)] ≥ 0, m = (P_S + P_T) / 2.

    With y = d/2 that is m (y tanh y − ln cosh y), a series in y² where d is small. Elsewhere, with
    a the larger and b the smaller probability, ½ [(a + b) ln(a / m) − b |d|], of which ln(a / m) =
    2 atanh w, w = (a − b) / (3 a + b) ≤ ⅓.
    """
    larger, smaller = torch.maximum(ratio.p, ratio.q), torch.minimum(ratio.p, ratio.q)
    total = larger + smaller
    w = (larger - smaller) / (3 * larger + smaller + torch.finfo(total.dtype).tiny)
    far = total * w.atanh() - 0.5 * smaller * ratio.d.abs()
    near = total * _polynomial(ratio.square, JSD_SERIES[: 1 + _num_terms(total, 6)])
    return torch.where(ratio.near, near, far)


def square_hellinger_summands(ratio: Ratio) -> Tensor:
    """(√P_S − √P_T)² times `SCALE`, which keeps the product of small probabilities above the
    smallest number.

    P_S + P_T − 2 √(P_S P_T), or 2 √(P_S P_T) (cosh(d/2) − 1) where d is small.
    """
    root = 2 * ((ratio.p * SCALE) * (ratio.q * SCALE)).sqrt()
    powers = range(1, _num_terms(root, 4) + 1)
    cosh = _polynomial(ratio.square, [0.0, *(0.25**n / math.factorial(2 * n) for n in powers)])
    return torch.where(ratio.near, root * cosh, (ratio.p + ratio.q) * SCALE - root)


def is_infinite(ratio: Tensor) -> Tensor:
    """Whether a log-ratio r is that of a token which is masked in the one model and not in the
    other."""
    return ratio > -masked_level(ratio.dtype) / 2
