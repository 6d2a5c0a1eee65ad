"""Losses of two rows of logits and their gradients, against closed forms in 80-digit precision and
against torch's checks."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from strategies import LOGIT_KINDS, as_rows, logit_pair, logit_pairs
from torch.func import grad, jvp, vmap

from tip_analysis.core.names import Loss
from tip_analysis.logits.row_statistics import LOSSES, entropy, reverse_kl, token_statistics

FINITE_KINDS = tuple(kind for kind in LOGIT_KINDS if kind != "masked_apart")
STATISTIC_OF_LOSS = {Loss.REVERSE_KL: "reverse_kl", Loss.FORWARD_KL: "forward_kl", Loss.JSD: "jsd"}


@pytest.mark.parametrize("loss", Loss)
@given(logit_pairs(60, kinds=FINITE_KINDS))
@settings(deadline=None, max_examples=40)
def test_losses_and_gradients_equal_the_closed_forms(
    loss: Loss, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    """Also of float32 rows: nearly one-hot ones have gradients far below the rounding of a
    probability."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        student, teacher = as_rows([pair], dtype)
        student.requires_grad_()
        token_ids = student.detach().argmin(-1)
        value = LOSSES[loss](student=student, teacher=teacher, token_ids=token_ids)
        value.sum().backward()
        z, y = (rows.detach()[0].double().numpy() for rows in (student, teacher))
        expected = np.array(reference.loss_gradient(loss.value, z, y, int(token_ids)))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            student.grad[0], expected, rtol=tolerance, atol=max(scale * tolerance * 1e-2, 1e-34)
        )
        columns = token_statistics(student=student.detach(), teacher=teacher, token_ids=token_ids)
        statistic = (
            -columns["student_logprob"]
            if loss == Loss.NEGATIVE_LOGPROB
            else columns[STATISTIC_OF_LOSS[loss]]
        )
        np.testing.assert_allclose(
            value.detach(), statistic, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-34
        )


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own forward mode
@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("shape", [(41, 401), (7, 3)])
def test_gradients_pass_gradcheck_in_both_modes(loss: Loss, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(shape, generator=generator, dtype=torch.float64)[:3] * 3 for _ in range(2)]
    token_ids = torch.tensor([0, 2, 1])
    arguments = [row.requires_grad_() for row in rows]

    def value(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return LOSSES[loss](student=student, teacher=teacher, token_ids=token_ids)

    if loss == Loss.NEGATIVE_LOGPROB:
        arguments[1] = arguments[1].detach()
    assert torch.autograd.gradcheck(
        value, arguments, check_forward_ad=True, fast_mode=shape[1] > 100
    )
    assert torch.autograd.gradcheck(
        entropy, arguments[:1], check_forward_ad=True, fast_mode=shape[1] > 100
    )


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own forward mode
@pytest.mark.parametrize("loss", Loss)
def test_losses_work_under_functional_transforms(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher, tangent = torch.randn(3, 6, 9, generator=generator).unbind(0)
    token_ids = torch.arange(6)

    def row_loss(z: torch.Tensor, y: torch.Tensor, token_id: torch.Tensor) -> torch.Tensor:
        return LOSSES[loss](student=z[None], teacher=y[None], token_ids=token_id[None])[0]

    per_row = vmap(grad(row_loss))(student, teacher, token_ids)
    leaf = student.clone().requires_grad_()
    LOSSES[loss](student=leaf, teacher=teacher, token_ids=token_ids).sum().backward()
    torch.testing.assert_close(per_row, leaf.grad)
    directional = jvp(
        lambda z: LOSSES[loss](student=z, teacher=teacher, token_ids=token_ids),
        (student,),
        (tangent,),
    )[1]
    torch.testing.assert_close(directional, (per_row * tangent).sum(-1))
    batched = vmap(
        lambda v: jvp(
            lambda z: LOSSES[loss](student=z, teacher=teacher, token_ids=token_ids),
            (student,),
            (v,),
        )[1]
    )
    torch.testing.assert_close(batched(torch.stack([tangent, 2 * tangent]))[1], 2 * directional)


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("kind", ["masked_together", "masked_apart"])
def test_gradients_at_masked_logits_are_no_nan(loss: Loss, kind: str) -> None:
    student, teacher = as_rows([logit_pair(kind, 30, seed) for seed in range(8)], torch.float32)
    student.requires_grad_()
    value = LOSSES[loss](student=student, teacher=teacher, token_ids=student.detach().argmax(-1))
    value[value.isfinite()].sum().backward()
    assert student.grad is not None
    assert not bool(value.isnan().any() | student.grad.isnan().any())
    assert bool((student.grad[student.isneginf() & teacher.isneginf()] == 0).all())


def test_half_precision_logits_get_half_precision_gradients() -> None:
    student, teacher = as_rows([logit_pair("random", 30, 0)], torch.bfloat16)
    student.requires_grad_()
    value = reverse_kl(student=student, teacher=teacher)
    value.sum().backward()
    assert (value.dtype, student.grad.dtype) == (torch.float32, torch.bfloat16)  # pyright: ignore


@given(logit_pairs(40))
@settings(deadline=None, max_examples=40)
def test_entropy_and_its_gradient(pair: tuple[np.ndarray, np.ndarray]) -> None:
    logits = torch.tensor(pair[0][None]).float().requires_grad_()
    entropy(logits).sum().backward()
    row = logits.detach()[0].double().numpy()
    expected = np.array(reference.loss_gradient("entropy", row, row, 0))
    np.testing.assert_allclose(
        logits.grad[0], expected, rtol=1e-3, atol=max(np.abs(expected).max() * 1e-5, 1e-34)
    )
