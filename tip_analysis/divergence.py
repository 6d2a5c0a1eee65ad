"""Two rows of logits in, the numbers of a token out: entropies, divergences, logit gradients, top-k, and losses to train on.

Nothing is read or written. Equation numbers are those of TIP (arXiv 2604.14084); P_S and P_T are the temperature-1
distributions of student and teacher over all V tokens, z the student's logits; everything is in nats. How the numbers stay
exact on nearly equal and nearly one-hot rows is told in `tip_analysis.logit_rows`; the losses live in `tip_analysis.losses`.

The pass works on blocks of rows that stay in the processor's cache, compiled where that pays and a compiler is there.
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tip_analysis.errors import LogitsError, OptionError
from tip_analysis.logit_rows import (
    Row,
    compute_dtype,
    difference_of_exponentials,
    forward_kl_summands,
    infinite_divergences,
    jsd_summands,
    log_ratio,
    log_ratio_of_sums,
    ratio_of,
    relative_to_top,
    rest_of_sum,
    reverse_kl_summands,
)
from tip_analysis.losses import LOSSES, entropy, forward_kl, jsd, negative_logprob, reverse_kl
from tip_analysis.top_tokens import largest

__all__ = [
    "LOSSES",
    "entropy",
    "forward_kl",
    "jsd",
    "negative_logprob",
    "reverse_kl",
    "rows_per_block",
    "token_statistics",
    "worth_compiling",
]

logger = logging.getLogger(__name__)

COMPILE_VARIABLE = "TIP_ANALYSIS_COMPILE"
"""Environment variable: `0` never compiles, `1` compiles whatever the size of the work."""

_SCALE = 2.0**60
"""Differences of probabilities times this: their squares stay between float32's smallest and largest normal number."""
_CENTRE_ON_TOP_ABOVE = 1e-3
"""Curvature is a variance under P_S: about the top token it loses a factor 1/P_S(top) in precision, about the mean none."""


# -------------------------------------------------------------------------------------------------------------- statistics


def token_statistics(
    *,
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor | None = None,
    top_k: int = 5,
    support_k: int = 16,
    compile: bool | None = None,
) -> dict[str, Tensor]:
    """Everything that a token row carries, off its two rows of logits, in one pass (natural logarithms, nats).

    Args:
        student: Logits of P_S, [N, V], of any floating dtype; any row stride.
        teacher: Logits of P_T, [N, V].
        token_ids: The sampled tokens, [N]; without them the two sampled-token log-probabilities are left out.
        top_k: How many of the most likely tokens of each model to return; at most V are.
        support_k: How many of the student's most likely tokens the teacher's mass is summed over.
        compile: Whether to compile the pass (some tens of seconds, once for each V and dtype, then several times faster).
            None compiles where these logits alone are worth it, see `worth_compiling`. The rounding of the two ways differs.

    Returns:
        The columns of `tip_analysis.schema.TokenTable` by name, each [N] (top-k: [N, k]), in float32 (float64 for float64
        logits), ids in int64, `top1_agree` in bool. Top-k ids go by falling probability, the lower id first where tied.
        `w_local` is NaN where gᵀHg or ‖g‖² is below the smallest normal number of the dtype; nothing else is ever NaN.
        A Kullback-Leibler divergence, and with it the norm of its gradient, is +inf where a masked token has probability
        under the other model.

    Raises:
        LogitsError: a row has NaN, +inf or no finite logit; `error.model` and `error.row` say which.
        OptionError: shapes that do not agree, token ids outside [0, V), or k below 1.
    """
    _check_arguments(student, teacher, token_ids, top_k, support_k)
    num_rows, vocab_size = student.shape
    if compile is None:
        compile = worth_compiling(student.numel())
    step = rows_per_block(vocab_size, device=student.device)
    if not compile and student.device.type == "cpu":
        step = min(step, max(1, _UNCOMPILED_LOGITS // vocab_size))
    blocks: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for start in range(0, num_rows, step) or [0]:
            rows = slice(start, start + step)
            ids = None if token_ids is None else token_ids[rows].to(student.device)
            filled = _fill(student[rows], teacher[rows], ids, step if compile else 1)
            blocks.append(
                _compiled_block(*filled, top_k, support_k) if compile else _block_statistics(*filled, top_k, support_k, _EAGER)
            )
    columns = {name: torch.cat([block[name] for block in blocks])[:num_rows] for name in blocks[0]}
    _check_maxima("student", columns.pop("student_max"))
    _check_maxima("teacher", columns.pop("teacher_max"))
    return columns


_UNCOMPILED_LOGITS = 2**17
"""Rows times V of a block that is not compiled: some twenty arrays of its size are in use at once."""


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
    """The teacher's x (`logit_rows.Row`) at the student's support_k most likely tokens, [N, k]."""
    r_top: Tensor
    """Log-ratio r at the student's first token, [N, 1]."""


class _FirstSums(NamedTuple):
    """What the second pass over a row needs to know of the whole row, [N, 1] each; e = exp x, Σ over tokens."""

    student_rest: Tensor
    """Σ e_S − 1."""
    teacher_rest: Tensor
    student_moment: Tensor
    """Σ e_S x_S."""
    teacher_moment: Tensor
    difference: Tensor
    """Σ (e_S − e_T)."""
    squares: Tensor
    """Σ e_S²."""
    products: Tensor
    """Σ e_S e_T."""
    centred_ratio: Tensor
    """Σ e_S (r − r_top)."""
    max_ratio: Tensor
    min_ratio: Tensor


class _SecondSums(NamedTuple):
    """Sums of what takes the normalised probabilities, [N, 1] each."""

    reverse_kl: Tensor
    forward_kl: Tensor
    jsd: Tensor
    square_hellinger: Tensor
    """Σ(√P_S − √P_T)², times `_SCALE`²."""
    square_reverse_gradient: Tensor
    """Σ P_S² (d − δ)², times `_SCALE`."""
    square_difference: Tensor
    """‖g‖², g = P_S − P_T, times `_SCALE`²."""
    curvature: Tensor
    """gᵀHg, times `_SCALE`²."""


def _block_statistics(
    student: Tensor, teacher: Tensor, token_ids: Tensor | None, top_k: int, support_k: int, stages: "_Stages"
) -> dict[str, Tensor]:
    """`token_statistics` of one block of rows, and each row's largest logits under `student_max` and `teacher_max`."""
    tops = stages.tops(student, teacher, top_k, support_k)
    kept = _exponentials(student, teacher, tops) if stages.keeps_exponentials else None
    first = stages.first_pass(student, teacher, tops, kept)
    second = stages.second_pass(student, teacher, tops, first, kept)
    return _columns(student, teacher, token_ids, top_k, tops, first, second)


def _tops(student: Tensor, teacher: Tensor, top_k: int, support_k: int) -> _Tops:
    dtype = compute_dtype(student, teacher)
    max_s, values_s, ids_s = largest(student, max(top_k, support_k))
    max_t, values_t, ids_t = largest(teacher, top_k)
    max_s, max_t = max_s.to(dtype), max_t.to(dtype)
    support = relative_to_top(teacher.gather(1, ids_s[:, :support_k]), dtype, max_t)
    r_top = -(support.x + support.error)[:, :1]
    return _Tops(max_s, max_t, values_s.to(dtype), values_t.to(dtype), ids_s, ids_t, support.x, r_top)


class _Exponentials(NamedTuple):
    """What both passes begin with, [N, V] each. A compiled pass makes it again, which is quicker than to read it."""

    student: Row
    teacher: Row
    e_student: Tensor
    e_teacher: Tensor
    r: Tensor


def _exponentials(student: Tensor, teacher: Tensor, tops: _Tops) -> _Exponentials:
    dtype = tops.r_top.dtype
    row_s, row_t = relative_to_top(student, dtype, tops.student_max), relative_to_top(teacher, dtype, tops.teacher_max)
    return _Exponentials(row_s, row_t, row_s.x.exp(), row_t.x.exp(), log_ratio(row_s, row_t))


def _first_pass(student: Tensor, teacher: Tensor, tops: _Tops, kept: _Exponentials | None = None) -> _FirstSums:
    row_s, row_t, e_s, e_t, r = kept or _exponentials(student, teacher, tops)
    return _FirstSums(
        student_rest=rest_of_sum(row_s.x, e_s),
        teacher_rest=rest_of_sum(row_t.x, e_t),
        student_moment=(e_s * row_s.x).sum(-1, keepdim=True),
        teacher_moment=(e_t * row_t.x).sum(-1, keepdim=True),
        difference=difference_of_exponentials(r, e_s, e_t).sum(-1, keepdim=True),
        squares=(e_s * e_s).sum(-1, keepdim=True),
        products=(e_s * e_t).sum(-1, keepdim=True),
        centred_ratio=(e_s * (r - tops.r_top)).sum(-1, keepdim=True),
        max_ratio=r.amax(-1, keepdim=True),
        min_ratio=r.amin(-1, keepdim=True),
    )


def _second_pass(
    student: Tensor, teacher: Tensor, tops: _Tops, first: _FirstSums, kept: _Exponentials | None = None
) -> _SecondSums:
    row_s, _, e_s, e_t, r = kept or _exponentials(student, teacher, tops)
    sum_s, sum_t = 1 + first.student_rest, 1 + first.teacher_rest
    log_sums = log_ratio_of_sums(first.difference, first.student_rest, first.teacher_rest)
    ratio = ratio_of(e_s * (1 / sum_s), e_t * (1 / sum_t), r - log_sums)
    at_top = ratio_of(1 / sum_s, tops.support_x[:, :1].exp() / sum_t, tops.r_top - log_sums)

    # √P_S − √P_T = (P_S − P_T) / (√P_S + √P_T)
    g = ratio.difference * _SCALE
    roots = ratio.p.sqrt() + ratio.q.sqrt() + torch.finfo(r.dtype).tiny
    # P_S (d − δ), from d relative to the top token's: nearly one-hot rows keep what is left of it there
    reverse_gradient = ratio.p * math.sqrt(_SCALE) * (r - tops.r_top - first.centred_ratio / sum_s)
    # gᵀHg = Var(g) under P_S = E(g − a)² − (E g − a)², a = g of the top token or, where that is a small part, about E g
    g_top = at_top.difference * _SCALE
    mean = (first.squares / sum_s - first.products / sum_t) / sum_s * _SCALE
    is_top = (row_s.x == 0) & (r == tops.r_top)
    centred = torch.where(is_top, g_top, g) - torch.where(at_top.p > _CENTRE_ON_TOP_ABOVE, g_top, mean)
    weighted = ratio.p * centred
    return _SecondSums(
        reverse_kl=reverse_kl_summands(ratio).sum(-1, keepdim=True),
        forward_kl=forward_kl_summands(ratio).sum(-1, keepdim=True),
        jsd=jsd_summands(ratio).sum(-1, keepdim=True),
        square_hellinger=(g / roots).square().sum(-1, keepdim=True),
        square_reverse_gradient=reverse_gradient.square().sum(-1, keepdim=True),
        square_difference=g.square().sum(-1, keepdim=True),
        curvature=(weighted * centred).sum(-1, keepdim=True) - weighted.sum(-1, keepdim=True).square(),
    )


def _columns(
    student: Tensor, teacher: Tensor, token_ids: Tensor | None, top_k: int, tops: _Tops, first: _FirstSums, second: _SecondSums
) -> dict[str, Tensor]:
    """The columns of the token table from the sums of both passes."""
    log_sum_s, log_sum_t = first.student_rest.log1p(), first.teacher_rest.log1p()
    sum_s, sum_t = 1 + first.student_rest, 1 + first.teacher_rest
    max_entropy = math.log(student.shape[1])
    entropy = (log_sum_s - first.student_moment / sum_s).clamp(max=max_entropy)
    infinite = infinite_divergences(first.max_ratio, first.min_ratio)
    curvature, square_norm = second.curvature.clamp(min=0.0), second.square_difference
    smallest = torch.finfo(curvature.dtype).tiny
    resolved = (curvature / _SCALE / _SCALE >= smallest) & (square_norm / _SCALE / _SCALE >= smallest)
    per_row = {
        "student_max": tops.student_max,
        "teacher_max": tops.teacher_max,
        "student_entropy": entropy,
        "student_entropy_norm": entropy / max_entropy if max_entropy > 0 else torch.zeros_like(entropy),
        "teacher_entropy": (log_sum_t - first.teacher_moment / sum_t).clamp(max=max_entropy),
        "reverse_kl": second.reverse_kl.masked_fill(infinite.reverse, math.inf),
        "forward_kl": second.forward_kl.masked_fill(infinite.forward, math.inf),
        "jsd": second.jsd.clamp(max=math.log(2)),
        "hellinger": ((0.5 * second.square_hellinger).sqrt() / _SCALE).clamp(max=1.0),
        "student_top1_prob": 1 / sum_s,
        "teacher_top1_prob": 1 / sum_t,
        "top1_agree": tops.student_ids[:, :1] == tops.teacher_ids[:, :1],
        "teacher_mass_on_student_topk": (tops.support_x.exp().sum(-1, keepdim=True) / sum_t).clamp(max=1.0),
        "reverse_kl_logit_grad_norm": (second.square_reverse_gradient.sqrt() / math.sqrt(_SCALE)).masked_fill(
            infinite.reverse, math.inf
        ),
        "forward_kl_logit_grad_norm": square_norm.sqrt() / _SCALE,
        "logit_curvature": curvature / _SCALE / _SCALE,
        "w_local": torch.where(resolved, square_norm / curvature, math.nan),
    }
    if token_ids is not None:
        ids = token_ids.long().unsqueeze(1)
        per_row["student_logprob"] = student.gather(1, ids).to(sum_s.dtype) - tops.student_max - log_sum_s
        per_row["teacher_logprob"] = teacher.gather(1, ids).to(sum_s.dtype) - tops.teacher_max - log_sum_t
    return {name: values.squeeze(1) for name, values in per_row.items()} | {
        "student_topk_ids": tops.student_ids[:, :top_k],
        "student_topk_logprobs": tops.student_values[:, :top_k] - tops.student_max - log_sum_s,
        "teacher_topk_ids": tops.teacher_ids,
        "teacher_topk_logprobs": tops.teacher_values - tops.teacher_max - log_sum_t,
    }


# ----------------------------------------------------------------------------------------------------- blocks and compiler


def rows_per_block(vocab_size: int, device: torch.device | str = "cpu") -> int:
    """How many rows of logits to work on at once, so that both models' logits of a block stay in the processor's cache.

    Callers that compute logits just before (an output head) do well to go by the same blocks.
    """
    if torch.device(device).type != "cpu":
        return max(64, 2**27 // vocab_size)
    return max(8, min(4096, 2**21 // vocab_size))


def worth_compiling(num_logits: int) -> bool:
    """Whether that many logits of each model (rows times V) take so long that compiling first is faster.

    The environment variable TIP_ANALYSIS_COMPILE decides where it is set: 0 never, 1 always.
    """
    choice = os.environ.get(COMPILE_VARIABLE, "").strip()
    if choice in ("0", "1"):
        return choice == "1"
    return num_logits >= 2**31


def _fill(student: Tensor, teacher: Tensor, token_ids: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Repeat the last row until there are `num_rows`: a compiled pass knows one shape only."""
    missing = num_rows - student.shape[0]
    if missing <= 0:
        return student, teacher, token_ids
    if student.shape[0] == 0:
        empty = student.new_zeros(num_rows, student.shape[1])
        return empty, empty.to(teacher.dtype), None if token_ids is None else token_ids.new_zeros(num_rows)
    rows = torch.arange(num_rows, device=student.device).clamp(max=student.shape[0] - 1)
    return student[rows], teacher[rows], None if token_ids is None else token_ids[rows]


class _Stages(NamedTuple):
    """The three steps of a block that touch whole rows. Apart, so that each compiles into one loop over a row.

    Compiled together, sums that one loop needs of another are put into a third, and what they share goes through memory.
    """

    tops: Callable[..., _Tops]
    first_pass: Callable[..., _FirstSums]
    second_pass: Callable[..., _SecondSums]
    keeps_exponentials: bool


_EAGER = _Stages(_tops, _first_pass, _second_pass, keeps_exponentials=True)


@functools.cache
def _compiled() -> _Stages:
    tops, first_pass, second_pass = (torch.compile(stage, dynamic=False) for stage in _EAGER[:3])
    return _Stages(tops, first_pass, second_pass, keeps_exponentials=False)  # pyright: ignore[reportArgumentType]


_compiler_failed = False


def _compiled_block(
    student: Tensor, teacher: Tensor, token_ids: Tensor | None, top_k: int, support_k: int
) -> dict[str, Tensor]:
    """`_block_statistics`, compiled; uncompiled for the rest of the process, which is said once, if compiling fails."""
    global _compiler_failed
    if not _compiler_failed:
        try:
            with torch._dynamo.config.patch(recompile_limit=64):
                return _block_statistics(student, teacher, token_ids, top_k, support_k, _compiled())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logger.warning("logit statistics run uncompiled, several times slower: the compiler failed (%s)", reason)
            _compiler_failed = True
    return _block_statistics(student, teacher, token_ids, top_k, support_k, _EAGER)


def _check_arguments(student: Tensor, teacher: Tensor, token_ids: Tensor | None, top_k: int, support_k: int) -> None:
    if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] == 0:
        raise OptionError(
            f"student and teacher logits must be [N, V] each, over one shared vocabulary; found {list(student.shape)} and "
            f"{list(teacher.shape)} (slice padded heads to the shared tokens)"
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        if not logits.is_floating_point():
            raise OptionError(f"{name} logits must be of a floating dtype; found {logits.dtype}")
    for name, k in (("top_k", top_k), ("support_k", support_k)):
        if k < 1:
            raise OptionError(f"{name} must be at least 1; found {k}")
    if token_ids is None:
        return
    if token_ids.shape != student.shape[:1] or token_ids.is_floating_point():
        raise OptionError(f"token_ids must be {student.shape[0]} integers; found {list(token_ids.shape)} of {token_ids.dtype}")
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < student.shape[1]:
        raise OptionError(
            f"token_ids must lie in [0, {student.shape[1]}); found {int(token_ids.min())} … {int(token_ids.max())}"
        )


def _check_maxima(model: str, maxima: Tensor) -> None:
    """Refuse a row by its largest logit, which is NaN where any is.

    Raises:
        LogitsError: with `model` and `row` (the first such row).
    """
    usable = maxima.isfinite()
    if bool(usable.all()):
        return
    row = int((~usable).nonzero()[0, 0])
    value = float(maxima[row])
    found = "no finite logit" if value == -math.inf else "NaN" if math.isnan(value) else "+inf"
    error = LogitsError(f"{model} logits of row {row}: expected finite values or -inf with at least one finite, found {found}")
    error.model, error.row = model, row
    raise error
