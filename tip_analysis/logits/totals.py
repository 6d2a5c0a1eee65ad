"""What a pass over two rows of logits finds of each row, whichever way it runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowTotals(NamedTuple):
    """Of N rows, [N] each but where said; x is a logit relative to its row's largest, `SCALE` that
    of `rows`."""

    student_max: Tensor
    """Largest logit; NaN or infinite in a row that is to be refused, of which nothing else is
    known."""
    teacher_max: Tensor
    student_values: Tensor
    """Logits of the student's most likely tokens, [N, k], by falling logit, then rising id."""
    student_ids: Tensor
    teacher_values: Tensor
    teacher_ids: Tensor
    teacher_mass_on_support: Tensor
    """Σ P_T over the student's most likely tokens."""
    student_top_prob: Tensor
    teacher_top_prob: Tensor
    student_log_sum: Tensor
    """ln Σ exp x_S."""
    teacher_log_sum: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_is_infinite: Tensor
    """Whether a token is masked for the teacher and not for the student, bool."""
    forward_is_infinite: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    jsd: Tensor
    square_hellinger: Tensor
    """Σ(√P_S − √P_T)², times `SCALE`."""
    square_reverse_gradient: Tensor
    """Σ P_S² (d − δ)², times `SCALE`."""
    square_difference: Tensor
    """‖g‖², g = P_S − P_T, times `SCALE`²."""
    curvature: Tensor
    """gᵀHg, times `SCALE`²."""
    log_sum_ratio: Tensor
    """ln Σ exp x_S − ln Σ exp x_T, exact to its own size: d = x_S − x_T less this."""
    rest_squares: Tensor
    """Σ P_S² over all but the top token."""
    first_estimator_moment: Tensor
    """Σ P_S c ‖e_y − P_S‖², c = d − δ, times √`SCALE`."""
    second_estimator_moment: Tensor
    """Σ P_S c² ‖e_y − P_S‖², times √`SCALE`."""

    @classmethod
    def empty(cls, num_rows: int, num_student: int, num_teacher: int) -> "RowTotals":
        """To be filled in: sums in float64 (NaN so far), `num_student` and `num_teacher` most
        likely tokens."""
        sums = torch.full((len(cls._fields), num_rows), torch.nan, dtype=torch.float64)
        return cls(*sums)._replace(
            student_values=torch.zeros(num_rows, num_student),
            student_ids=torch.zeros(num_rows, num_student, dtype=torch.int64),
            teacher_values=torch.zeros(num_rows, num_teacher),
            teacher_ids=torch.zeros(num_rows, num_teacher, dtype=torch.int64),
            reverse_is_infinite=torch.zeros(num_rows, dtype=torch.bool),
            forward_is_infinite=torch.zeros(num_rows, dtype=torch.bool),
        )

    @classmethod
    def joined(cls, blocks: Sequence["RowTotals"], num_rows: int) -> "RowTotals":
        """Blocks one below the other, without the rows that the last one was filled up with."""
        return cls(*(torch.cat(values)[:num_rows] for values in zip(*blocks, strict=True)))
