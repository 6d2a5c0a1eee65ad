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
    assert_estimators(columns, row, expected)
    for name, value in expected.items():
        actual = columns[name][row].tolist()
        if name.endswith(("ids", "agree")):
            assert actual == value, name
        else:
            tolerance = TOLERANCE.get(name, 1e-3)
            np.testing.assert_allclose(
                actual, value, rtol=tolerance, atol=FLOORS[name], equal_nan=False, err_msg=name
            )


def assert_estimators(
    columns: dict[str, torch.Tensor], row: int, expected: dict, rounding: float = 3e-5
) -> None:
    """Take out of `expected`, and compare, what is a difference: exact to `rounding` of what it is
    taken from."""
    found = {name: float(columns[name][row]) for name in DIFFERENCES}
    wanted = {name: expected.pop(name) for name in DIFFERENCES}
    square_mean = expected["reverse_kl_logit_grad_norm"] ** 2
    rtol = 30 * rounding
    for name in ("k1_variance", "k1_variance_centred"):
        atol = rounding * square_mean + 1e-30 if math.isfinite(square_mean) else 0.0
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=atol, err_msg=name)
    noise = square_mean / wanted["k1_snr"] if wanted["k1_snr"] > 0 else 0.0
    minuend = wanted["k1_variance_centred"] + square_mean
    if math.isnan(found["k1_snr"]):  # not told from rounding, or too small for float32
        assert not noise > 100 * rounding * minuend or square_mean < 1e-27
    elif square_mean > 1e-25 and noise > 0:
        rtol_snr = rtol + rounding * minuend / noise
        np.testing.assert_allclose(found["k1_snr"], wanted["k1_snr"], rtol=rtol_snr)
    if math.isnan(found["ier"]):
        assert not wanted["ier"] < 1e8
    else:
        np.testing.assert_allclose(found["ier"], wanted["ier"], rtol=rtol, atol=1e-30)
    delta = min(expected["reverse_kl"], 1e6)
    for name in ("topk_bias", "topk_bias_no_tail"):
        atol = rounding * (delta + (name == "topk_bias_no_tail")) + 3e-6 * rounding
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=atol, err_msg=name)


DIFFERENCES = (
    "k1_variance",
    "k1_variance_centred",
    "k1_snr",
    "ier",
    "topk_bias",
    "topk_bias_no_tail",
)
"""Columns that are a small difference of larger numbers."""
