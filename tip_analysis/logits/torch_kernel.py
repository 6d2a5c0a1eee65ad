"""The pass over two rows of logits as operations on tensors: for accelerators, for float64, and
where there is no Numba.

It works on blocks of rows, in three stages that torch can compile: the top tokens, the normaliser,
the divergences.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tip_analysis.core.text import first_line
from tip_analysis.logits.probabilities import (
    CENTRE_ON_TOP_ABOVE,
    SCALE,
    Row,
    compute_dtype,
    difference_of_exponentials,
    forward_kl_summands,
    is_infinite,
    jsd_summands,
    log_ratio,
    log_ratio_of_sums,
    ratio_of,
    relative_to_top,
    rest_of_sum,
    reverse_kl_summands,
    square_hellinger_summands,
)
from tip_analysis.logits.top_tokens import largest
from tip_analysis.logits.totals import RowTotals

logger = logging.getLogger(__name__)

_LOGITS_IN_CACHE = 2**17
"""Rows times V of a block on a CPU: some twenty arrays of its size are in use at once, and
should stay in its cache."""
_LOGITS_ON_DEVICE = 2**27


def row_totals(
    student: Tensor, teacher: Tensor, top_k: int, support_k: int, *, compile: bool
) -> RowTotals:
    """`RowTotals` of logits [N, V], in float32, or in float64 for float64 logits."""
    num_rows, vocab_size = student.shape
    on_processor = student.device.type == "cpu"
    step = (
        max(1, _LOGITS_IN_CACHE // vocab_size)
        if on_processor
        else max(64, _LOGITS_ON_DEVICE // vocab_size)
    )
    passes, num_filled = (_compiled_passes, step) if compile else (_passes, 1)
    blocks = []
    for start in range(0, num_rows, step) or [0]:
        rows = slice(start, start + step)
        blocks.append(
            passes(
                _filled(student[rows], num_filled),
                _filled(teacher[rows], num_filled),
                top_k,
                support_k,
            )
        )
    return RowTotals.joined(blocks, num_rows)


def _filled(logits: Tensor, num_rows: int) -> Tensor:
    """Repeat the last row until there are `num_rows`: a compiled pass knows one shape only."""
    if logits.shape[0] >= num_rows:
        return logits
    if logits.shape[0] == 0:
        return logits.new_zeros(num_rows, logits.shape[1])
    return logits[torch.arange(num_rows, device=logits.device).clamp(max=logits.shape[0] - 1)]


# ------------------------------------------------------------------------------------------- passes


class _Tops(NamedTuple):
    """The most likely tokens of a block of rows, in the dtype that is computed in."""

    student_max: Tensor
    """Largest logit, [N, 1]; NaN or infinite in a row that is refused."""
    teacher_max: Tensor
    student_values: Tensor
    """Logits of the student's max(top_k, support_k) most likely tokens, [N, k]."""
    teacher_values: Tensor
    """Logits of the teacher's top_k most likely tokens, [N, k]."""
    student_ids: Tensor
    teacher_ids: Tensor
    support_x: Tensor
    """The teacher's x (`rows.Row`) at the student's support_k most likely tokens, [N, k]."""
    r_top: Tensor
    """Log-ratio r at the student's first token, [N, 1]."""


class _Normalised(NamedTuple):
    """What the first pass over a row finds, [N, 1] each."""

    student_top_prob: Tensor
    """P_S of its top token: what exp x_S is multiplied by."""
    teacher_top_prob: Tensor
    student_log_sum: Tensor
    teacher_log_sum: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_is_infinite: Tensor
    forward_is_infinite: Tensor
    log_sum_ratio: Tensor
    """r − d: what the log-ratio of the exponentials is above that of the probabilities."""
    mean_ratio: Tensor
    """E (r − r_top) under P_S."""
    top_gradient: Tensor
    """P_S − P_T at the student's top token, times `SCALE`."""
    centre: Tensor
    """What curvature is centred on, times `SCALE`: g of the top token or, where that is a small
    part, about E g."""
    rest_squares: Tensor
    """Σ P_S² over all but the top token."""
    rest_prob: Tensor
    """Σ P_S over all but the top token."""


class _Sums(NamedTuple):
    """What the second pass over a row finds, [N, 1] each: the fields of `RowTotals` of the same
    names."""

    reverse_kl: Tensor
    forward_kl: Tensor
    jsd: Tensor
    square_hellinger: Tensor
    square_reverse_gradient: Tensor
    square_difference: Tensor
    curvature: Tensor
    first_estimator_moment: Tensor
    second_estimator_moment: Tensor


class _Stages(NamedTuple):
    """The three steps of a block that touch whole rows. Apart, so that each compiles into one loop
    over a row."""

    tops: Callable[..., _Tops]
    first_pass: Callable[..., _Normalised]
    second_pass: Callable[..., _Sums]
    keeps_exponentials: bool


def _passes(
    student: Tensor, teacher: Tensor, top_k: int, support_k: int, stages: _Stages | None = None
) -> RowTotals:
    stages = stages or _UNCOMPILED
    tops = stages.tops(student, teacher, top_k, support_k)
    kept = _exponentials(student, teacher, tops) if stages.keeps_exponentials else None
    normalised = stages.first_pass(student, teacher, tops, kept)
    sums = stages.second_pass(student, teacher, tops, normalised, kept)
    of_rows = {
        "student_max": tops.student_max,
        "teacher_max": tops.teacher_max,
        "teacher_mass_on_support": (
            tops.support_x.exp().sum(-1, keepdim=True) * normalised.teacher_top_prob
        ),
        **{
            name: value for name, value in normalised._asdict().items() if name in RowTotals._fields
        },
        **sums._asdict(),
    }
    return RowTotals(
        student_values=tops.student_values,
        student_ids=tops.student_ids,
        teacher_values=tops.teacher_values,
        teacher_ids=tops.teacher_ids,
        **{name: value.squeeze(1) for name, value in of_rows.items()},
    )


def _tops(student: Tensor, teacher: Tensor, top_k: int, support_k: int) -> _Tops:
    dtype = compute_dtype(student, teacher)
    max_s, values_s, ids_s = largest(student, max(top_k, support_k))
    max_t, values_t, ids_t = largest(teacher, top_k)
    max_s, max_t = max_s.to(dtype), max_t.to(dtype)
    support = relative_to_top(teacher.gather(1, ids_s[:, :support_k]), dtype, max_t)
    r_top = log_ratio(Row(torch.zeros_like(support.x), None), support)[:, :1]
    return _Tops(
        max_s, max_t, values_s.to(dtype), values_t.to(dtype), ids_s, ids_t, support.x, r_top
    )


class _Exponentials(NamedTuple):
    """What both passes begin with, [N, V] each. A compiled pass makes it again, which is quicker
    than to read it."""

    student: Row
    teacher: Row
    e_student: Tensor
    e_teacher: Tensor
    r: Tensor


def _exponentials(student: Tensor, teacher: Tensor, tops: _Tops) -> _Exponentials:
    dtype = tops.r_top.dtype
    row_s, row_t = (
        relative_to_top(student, dtype, tops.student_max),
        relative_to_top(teacher, dtype, tops.teacher_max),
    )
    return _Exponentials(row_s, row_t, row_s.x.exp(), row_t.x.exp(), log_ratio(row_s, row_t))


def _first_pass(
    student: Tensor, teacher: Tensor, tops: _Tops, kept: _Exponentials | None = None
) -> _Normalised:
    row_s, row_t, e_s, e_t, r = kept or _exponentials(student, teacher, tops)
    rest_s, rest_t = rest_of_sum(row_s.x, e_s), rest_of_sum(row_t.x, e_t)
    top_s, top_t = 1 / (1 + rest_s), 1 / (1 + rest_t)
    log_sum_s, log_sum_t = rest_s.log1p(), rest_t.log1p()
    shift = log_ratio_of_sums(
        difference_of_exponentials(r, e_s, e_t).sum(-1, keepdim=True), rest_s, rest_t
    )
    at_top = ratio_of(top_s, tops.support_x[:, :1].exp() * top_t, tops.r_top - shift)
    top_gradient = at_top.difference * SCALE
    # E g = Σ P_S² − Σ P_S P_T
    mean = (
        ((e_s * e_s).sum(-1, keepdim=True) * top_s - (e_s * e_t).sum(-1, keepdim=True) * top_t)
        * top_s
        * SCALE
    )
    return _Normalised(
        student_top_prob=top_s,
        teacher_top_prob=top_t,
        student_log_sum=log_sum_s,
        teacher_log_sum=log_sum_t,
        student_entropy=log_sum_s - (e_s * row_s.x).sum(-1, keepdim=True) * top_s,
        teacher_entropy=log_sum_t - (e_t * row_t.x).sum(-1, keepdim=True) * top_t,
        reverse_is_infinite=is_infinite(r.amax(-1, keepdim=True)),
        forward_is_infinite=is_infinite(-r.amin(-1, keepdim=True)),
        log_sum_ratio=shift,
        mean_ratio=(e_s * (r - tops.r_top)).sum(-1, keepdim=True) * top_s,
        top_gradient=top_gradient,
        centre=torch.where(at_top.p > CENTRE_ON_TOP_ABOVE, top_gradient, mean),
        rest_squares=rest_of_sum(row_s.x, e_s * e_s) * top_s.square(),
        rest_prob=rest_s * top_s,
    )


def _second_pass(
    student: Tensor,
    teacher: Tensor,
    tops: _Tops,
    first: _Normalised,
    kept: _Exponentials | None = None,
) -> _Sums:
    row_s, _, e_s, e_t, r = kept or _exponentials(student, teacher, tops)
    ratio = ratio_of(
        e_s * first.student_top_prob, e_t * first.teacher_top_prob, r - first.log_sum_ratio
    )
    g = ratio.difference * SCALE
    # P_S (d − δ), from d relative to the top token's: nearly one-hot rows keep what is left of it
    # there
    relative = r - tops.r_top
    reverse_gradient = ratio.p * math.sqrt(SCALE) * (relative - first.mean_ratio)
    moment = reverse_gradient * _square_distance(row_s.x, ratio.p, first)
    # gᵀHg = Var(g) under P_S = E(g − a)² − (E g − a)²
    centred = torch.where((row_s.x == 0) & (relative == 0), first.top_gradient, g) - first.centre
    weighted = ratio.p * centred
    return _Sums(
        reverse_kl=reverse_kl_summands(ratio).sum(-1, keepdim=True),
        forward_kl=forward_kl_summands(ratio).sum(-1, keepdim=True),
        jsd=jsd_summands(ratio).sum(-1, keepdim=True),
        square_hellinger=square_hellinger_summands(ratio).sum(-1, keepdim=True),
        square_reverse_gradient=reverse_gradient.square().sum(-1, keepdim=True),
        square_difference=g.square().sum(-1, keepdim=True),
        curvature=(weighted * centred).sum(-1, keepdim=True)
        - weighted.sum(-1, keepdim=True).square(),
        first_estimator_moment=moment.sum(-1, keepdim=True),
        second_estimator_moment=(moment * (relative - first.mean_ratio)).sum(-1, keepdim=True),
    )


def _square_distance(x: Tensor, p: Tensor, first: _Normalised) -> Tensor:
    """‖e_y − P_S‖² of each token y, [N, V], written so that it does not cancel at the top."""
    at_top = first.rest_prob.square() + first.rest_squares
    elsewhere = 1 + first.student_top_prob.square() + first.rest_squares - 2 * p
    return torch.where(x == 0, at_top, elsewhere)


_UNCOMPILED = _Stages(_tops, _first_pass, _second_pass, keeps_exponentials=True)


# ----------------------------------------------------------------------------------------- compiler


@functools.cache
def _compiled_stages() -> _Stages:
    tops, first_pass, second_pass = (
        torch.compile(stage, dynamic=False) for stage in _UNCOMPILED[:3]
    )
    return _Stages(tops, first_pass, second_pass, keeps_exponentials=False)  # pyright: ignore


_compiler_failed = False


def _compiled_passes(student: Tensor, teacher: Tensor, top_k: int, support_k: int) -> RowTotals:
    """`_passes`, compiled; uncompiled for the rest of the process, which is said once, if compiling
    fails."""
    global _compiler_failed
    if not _compiler_failed:
        try:
            with torch._dynamo.config.patch(recompile_limit=64):
                return _passes(student, teacher, top_k, support_k, _compiled_stages())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            logger.warning(
                "logit statistics run uncompiled, several times slower: the compiler failed (%s)",
                first_line(error),
            )
            _compiler_failed = True
    return _passes(student, teacher, top_k, support_k)
