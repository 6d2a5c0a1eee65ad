"""Two rows of logits in, the numbers of a token out: entropies, divergences, logit gradients,
top-k, and losses to train on.

Nothing is read or written. Equation numbers are those of TIP (arXiv 2604.14084); P_S and P_T are
the temperature-1 distributions of student and teacher over all V tokens, z the student's logits;
everything is in nats. How the numbers stay exact on nearly equal and nearly one-hot rows is told in
`tip_analysis.logits.probabilities`; the losses live in `tip_analysis.logits.losses`.

On a CPU the pass is compiled (`tip_analysis.logits.cpu_kernel`); elsewhere, and in
float64, it is made of tensor operations (`tip_analysis.logits.torch_kernel`), compiled where that
pays and a compiler is there.
"""

import functools
import logging
import math
import os
from types import ModuleType

import torch
from torch import Tensor

from tip_analysis.core.errors import LogitsError, OptionError
from tip_analysis.logits import torch_kernel
from tip_analysis.logits.estimators import candidate_columns, estimator_columns
from tip_analysis.logits.losses import (
    LOSSES,
    entropy,
    forward_kl,
    jsd,
    negative_logprob,
    reverse_kl,
)
from tip_analysis.logits.probabilities import SCALE, compute_dtype
from tip_analysis.logits.stop_tokens import merge_tokens, merged_ids, stop_columns
from tip_analysis.logits.totals import RowTotals

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


# --------------------------------------------------------------------------------------- statistics


def token_statistics(
    *,
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor | None = None,
    top_k: int = 5,
    support_k: int = 16,
    stop_ids: Tensor | None = None,
    merge_stop_tokens: bool = False,
    compile: bool | None = None,
) -> dict[str, Tensor]:
    """Everything that a token row carries, off its two rows of logits, in one pass (natural
    logarithms, nats).

    Args:
        student: Logits of P_S, [N, V], of any floating dtype; any row stride.
        teacher: Logits of P_T, [N, V].
        token_ids: The sampled tokens, [N]; without them the two sampled-token log-probabilities are
            left out.
        top_k: How many of the most likely tokens of each model to return; at most V are.
        support_k: How many of the student's most likely tokens the teacher's mass is summed over,
            and are the candidates of `ier` and `topk_bias`.
        stop_ids: The tokens that end a response for either model, [k]; without them the three
            columns on stop tokens are left out.
        merge_stop_tokens: Whether all columns but these three are those of rows in which the stop
            tokens are one token, named by the smallest of `stop_ids`. V stays what it is in
            `student_entropy_norm`.
        compile: Whether the pass is compiled: on a CPU in seconds, once for a machine; on an
            accelerator in some tens of seconds, once for each V and dtype. None compiles where it
            is worth it, see `worth_compiling`. The two ways differ in rounding. float64 logits on a
            CPU are never compiled.

    Returns:
        The columns of `tip_analysis.core.schema.TokenTable` by name, each [N] (top-k: [N, k]), in
        float32 (float64 for float64 logits), ids in int64, `top1_agree` in bool. Top-k ids go by
        falling probability, the lower id first where tied. `w_local` is NaN where gᵀHg or ‖g‖² is
        below the smallest normal number of the dtype, `k1_snr` and `ier` where the variance that
        they divide by is not told from rounding, `ier` and `topk_bias` where the teacher masks a
        candidate; nothing else is ever NaN. A Kullback-Leibler
        divergence, and with it the norm of its gradient, is +inf where a masked token has
        probability under the other model.

    Raises:
        LogitsError: a row has NaN, +inf or no finite logit; `error.model` and `error.row` say
            which.
        OptionError: shapes that do not agree, token ids outside [0, V), or k below 1.
    """
    _check_arguments(student, teacher, token_ids, top_k, support_k)
    if compile is None:
        compile = worth_compiling(student.numel(), student.device)
    with torch.no_grad():
        declared = student, teacher
        if merge_stop_tokens and stop_ids is not None:
            student, teacher = merge_tokens(student, stop_ids), merge_tokens(teacher, stop_ids)
            token_ids = None if token_ids is None else merged_ids(token_ids, stop_ids)
        totals = _row_totals(student, teacher, top_k, support_k, compile)
        _check_maxima("student", totals.student_max)
        _check_maxima("teacher", totals.teacher_max)
        columns = _columns(student, teacher, token_ids, top_k, totals)
        columns |= estimator_columns(totals, compute_dtype(student, teacher))
        columns |= candidate_columns(student, teacher, totals.student_ids[:, :support_k], totals)
        if stop_ids is not None:
            columns |= stop_columns(*declared, stop_ids, totals)
    dtype = compute_dtype(student, teacher)
    return {
        name: values.to(dtype) if values.is_floating_point() else values
        for name, values in columns.items()
    }


def _row_totals(
    student: Tensor, teacher: Tensor, top_k: int, support_k: int, compile: bool
) -> RowTotals:
    on_processor = student.device.type == teacher.device.type == "cpu"
    if not on_processor:
        return torch_kernel.row_totals(student, teacher, top_k, support_k, compile=compile)
    processor = (
        _processor() if compile and compute_dtype(student, teacher) == torch.float32 else None
    )
    if processor is None:
        return torch_kernel.row_totals(student, teacher, top_k, support_k, compile=False)
    return processor.row_totals(student, teacher, top_k, support_k)


@functools.cache
def _processor() -> ModuleType | None:
    """The compiled pass, or None where Numba is not available, which is said once."""
    try:
        from tip_analysis.logits import cpu_kernel
    except ImportError as error:
        logger.warning(
            "logit statistics run uncompiled, many times slower: Numba can't be used (%s)", error
        )
        return None
    return cpu_kernel


def _columns(
    student: Tensor, teacher: Tensor, token_ids: Tensor | None, top_k: int, totals: RowTotals
) -> dict[str, Tensor]:
    """The columns of the token table from what the pass found."""
    max_entropy = math.log(student.shape[1])
    entropy = totals.student_entropy.clamp(max=max_entropy)
    square_norm = totals.square_difference / SCALE / SCALE
    curvature = totals.curvature.clamp(min=0.0) / SCALE / SCALE
    smallest = torch.finfo(compute_dtype(student, teacher)).tiny
    resolved = (curvature >= smallest) & (square_norm >= smallest)
    reverse_gradient_norm = (totals.square_reverse_gradient.sqrt() / math.sqrt(SCALE)).masked_fill(
        totals.reverse_is_infinite, math.inf
    )
    columns = {
        "student_entropy": entropy,
        "student_entropy_norm": (
            entropy / max_entropy if max_entropy > 0 else torch.zeros_like(entropy)
        ),
        "teacher_entropy": totals.teacher_entropy.clamp(max=max_entropy),
        "reverse_kl": totals.reverse_kl.masked_fill(totals.reverse_is_infinite, math.inf),
        "forward_kl": totals.forward_kl.masked_fill(totals.forward_is_infinite, math.inf),
        "jsd": totals.jsd.clamp(max=math.log(2)),
        "hellinger": ((0.5 * totals.square_hellinger).sqrt() / math.sqrt(SCALE)).clamp(max=1.0),
        "student_top1_prob": totals.student_top_prob,
        "teacher_top1_prob": totals.teacher_top_prob,
        "top1_agree": totals.student_ids[:, 0] == totals.teacher_ids[:, 0],
        "teacher_mass_on_student_topk": totals.teacher_mass_on_support.clamp(max=1.0),
        "reverse_kl_logit_grad_norm": reverse_gradient_norm.masked_fill(
            totals.reverse_is_infinite, math.inf
        ),
        "forward_kl_logit_grad_norm": totals.square_difference.sqrt() / SCALE,
        "logit_curvature": curvature,
        "w_local": torch.where(resolved, totals.square_difference / totals.curvature, math.nan),
        **_most_likely(totals, top_k),
    }
    if token_ids is not None:
        columns |= _of_sampled(student, teacher, token_ids, totals)
    return columns


def _of_sampled(
    student: Tensor, teacher: Tensor, token_ids: Tensor, totals: RowTotals
) -> dict[str, Tensor]:
    """Both models' log-probabilities of the sampled tokens."""
    ids = token_ids.to(student.device).long().unsqueeze(1)
    of_student, of_teacher = student.gather(1, ids), teacher.gather(1, ids)
    student_norm = totals.student_max, totals.student_log_sum
    teacher_norm = totals.teacher_max, totals.teacher_log_sum
    return {
        "student_logprob": _logprobs(of_student, *student_norm).squeeze(1),
        "teacher_logprob": _logprobs(of_teacher, *teacher_norm).squeeze(1),
    }


def _most_likely(totals: RowTotals, top_k: int) -> dict[str, Tensor]:
    """Each model's most likely tokens, with their log-probabilities."""
    student_norm = totals.student_max, totals.student_log_sum
    teacher_norm = totals.teacher_max, totals.teacher_log_sum
    return {
        "student_topk_ids": totals.student_ids[:, :top_k],
        "student_topk_logprobs": _logprobs(totals.student_values[:, :top_k], *student_norm),
        "teacher_topk_ids": totals.teacher_ids,
        "teacher_topk_logprobs": _logprobs(totals.teacher_values, *teacher_norm),
    }


def _logprobs(logits: Tensor, largest: Tensor, log_sum: Tensor) -> Tensor:
    """Log-probabilities [N, k] of logits [N, k], of rows by their largest logit and ln Σ exp x."""
    return logits.to(log_sum.dtype) - largest.unsqueeze(1) - log_sum.unsqueeze(1)


# ----------------------------------------------------------------------------- blocks and compiling


def rows_per_block(vocab_size: int, device: torch.device | str = "cpu") -> int:
    """How many rows of logits to make and use up at once.

    On a CPU some 16 MB of bfloat16 for each model: few enough to be no burden, and so many
    that the threads of the output heads, which look out for more work for a while, do not take
    turns with those of the statistics too often.
    """
    return (
        max(64, 2**27 // vocab_size)
        if torch.device(device).type != "cpu"
        else max(8, min(4096, 2**23 // vocab_size))
    )


def worth_compiling(num_logits: int, device: torch.device | str = "cpu") -> bool:
    """Whether to compile for that many logits of each model (rows times V): always on a CPU,
    where it takes seconds.

    The environment variable TIP_ANALYSIS_COMPILE decides where it is set: 0 never, 1 always.
    """
    choice = os.environ.get(COMPILE_VARIABLE, "").strip()
    if choice in ("0", "1"):
        return choice == "1"
    return torch.device(device).type == "cpu" or num_logits >= 2**31


def _check_arguments(
    student: Tensor, teacher: Tensor, token_ids: Tensor | None, top_k: int, support_k: int
) -> None:
    if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] == 0:
        raise OptionError(
            "student and teacher logits must be [N, V] each, over one shared vocabulary; found"
            f" {list(student.shape)} and {list(teacher.shape)} (slice padded heads to the shared"
            " tokens)"
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
        raise OptionError(
            f"token_ids must be {student.shape[0]} integers; found {list(token_ids.shape)} of"
            f" {token_ids.dtype}"
        )
    if (
        token_ids.numel()
        and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < student.shape[1]
    ):
        raise OptionError(
            f"token_ids must lie in [0, {student.shape[1]}); found {int(token_ids.min())} …"
            f" {int(token_ids.max())}"
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
    error = LogitsError(
        f"{model} logits of row {row}: expected finite values or -inf with at least one finite,"
        f" found {found}"
    )
    error.model, error.row = model, row
    raise error
