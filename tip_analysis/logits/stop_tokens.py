"""Stop tokens that mean the same: their mass in each model, and rows in which they are one.

Student and teacher may put the mass with which they stop on different tokens (arXiv 2609.20511):
the reverse KL at a rollout's end is then 10 to 25 nats of nothing.
"""

import math

import torch
from torch import Tensor

from tip_analysis.core.errors import OptionError
from tip_analysis.logits.totals import RowTotals


def merge_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits [N, V] in which the smallest of the tokens `ids` [k] has the mass of all, the others
    none.

    Args:
        logits: of any floating dtype; not changed.
        ids: distinct token ids; with fewer than two there is nothing to merge.
    """
    if len(ids) < 2:
        return logits
    ids = ids.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)  # the sum needs its digits
    merged = logits.to(dtype, copy=True)
    merged[:, ids] = -math.inf
    merged[:, ids.min()] = logits[:, ids].to(dtype).logsumexp(-1)
    return merged


def merged_ids(token_ids: Tensor, ids: Tensor) -> Tensor:
    """Sampled tokens [N], those among `ids` [k] by the smallest of them."""
    if len(ids) < 2:
        return token_ids
    ids = ids.to(token_ids.device, token_ids.dtype)
    return torch.where(torch.isin(token_ids, ids), ids.min(), token_ids)


def stop_columns(
    student: Tensor, teacher: Tensor, ids: Tensor, totals: RowTotals
) -> dict[str, Tensor]:
    """The mass of the stop tokens `ids` [k] in logits [N, V], and what they add to the divergence.

    Returns:
        `student_stop_mass`, `teacher_stop_mass`, in [0, 1]; `stop_mismatch`: the reverse KL less
        that of the same rows with the stop tokens as one, nats, ≥ 0: P_S(stop) times the reverse KL
        of which stop token it is.

    Raises:
        OptionError: an id outside the vocabulary.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < student.shape[1]:
        raise OptionError(f"stop tokens must lie in [0, {student.shape[1]}); found {ids.tolist()}")
    ids = ids.to(student.device)
    log_p = _logprobs(student, ids, totals.student_max, totals.student_log_sum)
    log_q = _logprobs(teacher, ids, totals.teacher_max, totals.teacher_log_sum)
    mass_s, mass_t = log_p.exp().sum(1), log_q.exp().sum(1)
    return {
        "student_stop_mass": mass_s.clamp(max=1.0),
        "teacher_stop_mass": mass_t.clamp(max=1.0),
        "stop_mismatch": mass_s * _divergence_within(log_p, log_q),
    }


def _divergence_within(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of the student's choice among k tokens from the teacher's, [N]; 0 without mass."""
    if log_p.shape[1] < 2:
        return log_p.new_zeros(log_p.shape[0])
    own, others = log_p.log_softmax(1), log_q.log_softmax(1)
    has_mass = log_p.isfinite()
    summands = torch.where(has_mass, own.exp() * (own - others), 0.0)
    all_masked = has_mass.any(1) & ~log_q.isfinite().any(1)
    return summands.sum(1).clamp(min=0.0).masked_fill(all_masked, 0.0).nan_to_num(0.0, math.inf)


def _logprobs(logits: Tensor, ids: Tensor, largest: Tensor, log_sum: Tensor) -> Tensor:
    chosen = logits[:, ids].double()
    return chosen - largest.double().unsqueeze(1) - log_sum.double().unsqueeze(1)
