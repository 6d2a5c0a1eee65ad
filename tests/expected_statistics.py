"""What the columns of a token must be, within tolerances that a reason stands behind."""

import math

import numpy as np
import reference
import torch

TOLERANCE = {"logit_curvature": 5e-3, "w_local": 5e-3}
"""Relative; 1e-3 for all other columns."""

FLOORS = {
    # float32 has no number between 0 and 1.4e-45, and full precision from 1.2e-38 on: a probability
    # below that is 0, and so is
    # everything that is a sum of such probabilities, times logits of up to 2e4 in entropies and
    # divergences.
    "student_entropy": 1e-32,
    "student_entropy_norm": 1e-32,
    "teacher_entropy": 1e-32,
    "reverse_kl": 1e-32,
    "forward_kl": 1e-32,
    "jsd": 1e-32,
    "student_logprob": 1e-36,
    "teacher_logprob": 1e-36,
    "student_topk_logprobs": 1e-36,
    "teacher_topk_logprobs": 1e-36,
    "student_top1_prob": 0.0,  # at least 1/V
    "teacher_top1_prob": 0.0,
    "teacher_mass_on_student_topk": 1e-36,
    # Roots of sums of squares: scaled by 2^60, so that they reach as low as the summands do.
    "hellinger": 1e-36,
    "forward_kl_logit_grad_norm": 1e-36,
    # Scaled by 2^30 only, since the log-ratio in it may be 2e4: squares vanish below 1e-19 / 2^30.
    "reverse_kl_logit_grad_norm": 1e-28,
    "logit_curvature": 1e-37,  # a square itself: the smallest normal number, and what rounds to it
    "w_local": 0.0,  # compared where defined
}
"""Absolute floors per column, for float32 and bfloat16 logits."""

TINY = float(np.finfo(np.float32).tiny)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def oracle(student: torch.Tensor, teacher: torch.Tensor, token_id: int) -> dict:
    """80 digits where that is quick enough."""
    statistics = reference.exact_statistics if len(student) < 100 else reference.extended_statistics
    return statistics(student.double().numpy(), teacher.double().numpy(), token_id)


def assert_statistics(columns: dict[str, torch.Tensor], row: int, expected: dict) -> None:
    expected = dict(expected)
    square_norm = expected["forward_kl_logit_grad_norm"] ** 2
    if min(expected["logit_curvature"], square_norm) < 2 * TINY:
        w_local = float(columns["w_local"][row])
        assert math.isnan(w_local) or min(expected["logit_curvature"], square_norm) > TINY / 2
        expected.pop("w_local")
    for name, value in expected.items():
        actual = columns[name][row].tolist()
        if name.endswith(("ids", "agree")):
            assert actual == value, name
        else:
            tolerance = TOLERANCE.get(name, 1e-3)
            np.testing.assert_allclose(
                actual, value, rtol=tolerance, atol=FLOORS[name], equal_nan=False, err_msg=name
            )
