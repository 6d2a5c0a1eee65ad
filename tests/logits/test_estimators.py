"""Estimator columns against draws: what 20,000 one-sample gradients have for mean and variance."""

import itertools
import math

import numpy as np
import pytest
import torch

from tip_analysis.logits import token_statistics

NUM_DRAWS = 20_000


def draws(student: np.ndarray, teacher: np.ndarray, baseline: float) -> np.ndarray:
    """(ρ_y − b)(e_y − P_S) of sampled y, [draws, V]."""
    p, q = (np.exp(row - np.logaddexp.reduce(row)) for row in (student, teacher))
    chosen = np.random.default_rng(0).choice(len(p), size=NUM_DRAWS, p=p)
    directions = np.eye(len(p))[chosen] - p
    return (np.log(p / q)[chosen] - baseline)[:, None] * directions


def exact_gradient(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    z = torch.tensor(student, requires_grad=True)
    log_p, log_q = z.log_softmax(-1), torch.tensor(teacher).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    assert z.grad is not None
    return z.grad.numpy()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_sample_gradients_have_the_mean_and_variance_that_the_columns_say(seed, centred):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 1.5, 30), rng.normal(0, 1.5, 30)
    columns = token_statistics(
        student=torch.tensor(student[None]), teacher=torch.tensor(teacher[None])
    )
    baseline = float(columns["reverse_kl"]) if centred else 0.0
    found = draws(student, teacher, baseline)
    mean, gradient = found.mean(0), exact_gradient(student, teacher)
    standard_error = found.std(0, ddof=1) / math.sqrt(NUM_DRAWS)
    # thirty coordinates: 3 standard errors for the norm of all, 4 for the worst of them
    assert np.linalg.norm(mean - gradient) < 3 * np.linalg.norm(standard_error)
    assert (np.abs(mean - gradient) < 4 * standard_error + 1e-12).all()
    squares = ((found - gradient) ** 2).sum(1)
    error = squares.std(ddof=1) / math.sqrt(NUM_DRAWS)
    variance = float(columns["k1_variance_centred" if centred else "k1_variance"])
    assert abs(squares.mean() - variance) < 3 * error


def test_no_baseline_beats_the_best_one():
    rng = np.random.default_rng(3)
    student, teacher = (torch.tensor(rng.normal(0, 2, (50, 40))) for _ in range(2))
    columns = token_statistics(student=student, teacher=teacher)
    square_mean = columns["reverse_kl_logit_grad_norm"] ** 2
    best = square_mean / columns["k1_snr"]
    assert bool((best <= columns["k1_variance"] * (1 + 1e-9)).all())
    assert bool((best <= columns["k1_variance_centred"] * (1 + 1e-9)).all())


def test_two_tokens_have_an_estimator_without_noise():
    """At the best baseline both samples give the same gradient: the ratio is not defined."""
    columns = token_statistics(
        student=torch.tensor([[1.0, 0.0]]), teacher=torch.tensor([[0.0, 0.5]])
    )
    assert math.isnan(float(columns["k1_snr"]))
    assert math.isnan(float(columns["ier"]))
    assert float(columns["k1_variance"]) > 0


def test_what_a_top_k_misses_shrinks_with_k_and_vanishes_with_all():
    rng = np.random.default_rng(4)
    student, teacher = (torch.tensor(rng.normal(0, 2, (20, 64))) for _ in range(2))
    biases = [
        token_statistics(student=student, teacher=teacher, support_k=k)["topk_bias"]
        for k in (1, 4, 16, 63, 64)
    ]
    for fewer, more in itertools.pairwise(biases):
        assert bool((more <= fewer + 1e-12).all())
    assert bool((biases[-1] == 0).all())
    assert bool((biases[-2] < 1e-9).all())  # one token left: its bucket is itself
