"""Training losses: values and gradients against float64 autograd of their definitions, estimators
against the exact gradient over many draws, and against TRL where it has the same loss."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LOGIT_KINDS, as_rows, logit_pair, logit_pairs
from torch import Tensor
from torch.nn.functional import kl_div

from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.loss_settings import LossSettings
from tip_analysis.core.names import TrainingLoss
from tip_analysis.logits.row_statistics import token_statistics
from tip_analysis.logits.training_losses import training_loss

SETTINGS = {
    "reverse_kl": [LossSettings()],
    "forward_kl": [LossSettings()],
    "jsd": [LossSettings(jsd_beta=beta) for beta in (0.1, 0.5, 0.9)],
    "skew_kl": [LossSettings(skew_alpha=alpha) for alpha in (0.0, 0.1, 0.7)],
    "skew_reverse_kl": [LossSettings(skew_alpha=alpha) for alpha in (0.0, 0.1, 0.7)],
    "topk_reverse_kl": [
        LossSettings(loss_top_k=k, loss_top_k_of=whose, loss_tail=tail)
        for k in (1, 3, 500)
        for whose in ("student", "teacher")
        for tail in ("bucket", "renormalised")
    ],
    "entropy_gated": [LossSettings(entropy_gate=gate) for gate in (0.0, 0.8)],
    "k1": [LossSettings()],
    "k1_centred": [LossSettings()],
    "k2": [LossSettings()],
    "k3": [LossSettings()],
}
CASES = [(name, chosen) for name, many in SETTINGS.items() for chosen in many]
IDS = [f"{name}-{i}" for name, many in SETTINGS.items() for i in range(len(many))]
FINITE = ("random", "flat", "near_equal", "shifted", "tied", "peaked_apart", "peaked_together")


def definition(
    name: str, student: Tensor, teacher: Tensor, ids: Tensor, chosen: LossSettings
) -> Tensor:
    """Each loss as its equation stands, for autograd."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    def mixed(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
        return (weight * log_a.exp() + (1 - weight) * log_b.exp()).log()

    at = ids.unsqueeze(-1)
    log_p_y, log_q_y = log_p.gather(-1, at).squeeze(-1), log_q.gather(-1, at).squeeze(-1)
    rho = log_p_y - log_q_y
    if name == "reverse_kl":
        return kl(log_p, log_q)
    if name == "forward_kl":
        return kl(log_q, log_p)
    if name == "jsd":
        m = mixed(chosen.jsd_beta, log_q, log_p)
        return chosen.jsd_beta * kl(log_q, m) + (1 - chosen.jsd_beta) * kl(log_p, m)
    if name == "skew_kl":
        return kl(log_q, mixed(chosen.skew_alpha, log_q, log_p))
    if name == "skew_reverse_kl":
        return kl(log_p, mixed(chosen.skew_alpha, log_p, log_q))
    if name == "entropy_gated":
        uncertain = -(q * log_q).sum(-1) > chosen.entropy_gate
        return kl(log_p, log_q) + uncertain * kl(log_q, log_p)
    if name == "topk_reverse_kl":
        return topk(p, q, student, teacher, chosen)
    if name == "k1":
        return -log_p_y * (log_q_y - log_p_y).detach()
    if name == "k1_centred":
        return -log_p_y * (log_q_y - log_p_y + kl(log_p, log_q)).detach()
    if name == "k2":
        return 0.5 * rho**2
    return torch.exp(-rho) - 1 + rho


def topk(p: Tensor, q: Tensor, student: Tensor, teacher: Tensor, chosen: LossSettings) -> Tensor:
    k = min(chosen.loss_top_k, p.shape[-1])
    row = student if chosen.loss_top_k_of == "student" else teacher
    order = torch.argsort(-row.detach(), dim=-1, stable=True)
    top, rest = order[:, :k], order[:, k:]
    a, b = p.gather(-1, top), q.gather(-1, top)
    if chosen.loss_tail == "renormalised":
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    elif rest.shape[1]:
        a = torch.cat([a, p.gather(-1, rest).sum(-1, keepdim=True)], -1)
        b = torch.cat([b, q.gather(-1, rest).sum(-1, keepdim=True)], -1)
    return (a * (a.log() - b.log())).sum(-1)


@pytest.mark.parametrize(("name", "chosen"), CASES, ids=IDS)
@given(
    kind=st.sampled_from(("random", "flat", "near_equal", "shifted", "tied")),
    size=st.integers(2, 40),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=15)
def test_values_and_gradients_are_those_of_the_definition(
    name: str, chosen: LossSettings, kind: str, size: int, seed: int
) -> None:
    student, teacher = as_rows([logit_pair(kind, size, seed + i) for i in range(3)], torch.float64)
    ids = torch.tensor([0, size - 1, size // 2])
    theirs, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = definition(name, theirs, teacher, ids, chosen)
    expected.sum().backward()
    found = training_loss(name, student=ours, teacher=teacher, token_ids=ids, settings=chosen)
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(("name", "chosen"), CASES, ids=IDS)
def test_float32_is_as_good_as_float64(name: str, chosen: LossSettings) -> None:
    """Also where rows are nearly equal or nearly one-hot, where plain forms cancel."""
    pairs = [logit_pair(kind, 60, seed) for kind in FINITE for seed in range(6)]
    rows = as_rows(pairs, torch.float32)
    found = {}
    for dtype in (torch.float32, torch.float64):
        student, teacher = (row.to(dtype, copy=True) for row in rows)
        student.requires_grad_()
        ids = student.detach().argmax(-1)
        value = training_loss(
            name, student=student, teacher=teacher, token_ids=ids, settings=chosen
        )
        value.sum().backward()
        assert student.grad is not None
        found[dtype] = value.detach().double(), student.grad.double()
    (value, grad), (true_value, true_grad) = found.values()
    scale = true_grad.abs().amax(-1, keepdim=True)
    assert bool(((grad - true_grad).abs() <= 2e-3 * scale + 1e-30).all())
    torch.testing.assert_close(value, true_value, rtol=2e-3, atol=1e-30)


@given(logit_pairs(40), st.sampled_from(CASES))
@settings(deadline=None, max_examples=60)
def test_divergences_are_not_negative_and_no_gradient_is_nan(
    pair: tuple[np.ndarray, np.ndarray], case: tuple[str, LossSettings]
) -> None:
    name, chosen = case
    student, teacher = as_rows([pair], torch.float32)
    student.requires_grad_()
    ids = student.detach().argmax(-1)
    value = training_loss(name, student=student, teacher=teacher, token_ids=ids, settings=chosen)
    if name not in ("k1", "k1_centred"):
        assert bool((value >= 0).all())
    if bool(value.isfinite().all()):
        value.sum().backward()
        assert student.grad is not None
        assert not bool(student.grad.isnan().any())


@pytest.mark.parametrize(("name", "chosen"), CASES, ids=IDS)
def test_equal_models_have_no_loss_and_no_gradient(name: str, chosen: LossSettings) -> None:
    student = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(4)
    value = training_loss(
        name, student=student, teacher=student.detach() + 2.0, token_ids=ids, settings=chosen
    )
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros(4, 30), atol=1e-6, rtol=0)


DRAWS = 20_000


def drawn_gradients(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the estimator for tokens drawn from the student, [draws, V]; both rows."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 1.5 * torch.randn(2, 12, generator=generator, dtype=torch.float64)
    ids = torch.multinomial(student.softmax(-1), DRAWS, replacement=True, generator=generator)
    rows = student.expand(DRAWS, -1).clone().requires_grad_()
    value = training_loss(name, student=rows, teacher=teacher.expand(DRAWS, -1), token_ids=ids)
    value.sum().backward()
    assert rows.grad is not None
    return rows.grad, student, teacher


@pytest.mark.parametrize("name", ["k1", "k1_centred", "k2", "k3"])
@pytest.mark.parametrize("seed", [0, 1])
def test_estimators_have_the_exact_gradient_as_their_mean(name: str, seed: int) -> None:
    """k3's gradient is that of the forward KL, the others' of the reverse KL."""
    gradients, student, teacher = drawn_gradients(name, seed)
    row = student[None].clone().requires_grad_()
    exact = "forward_kl" if name == "k3" else "reverse_kl"
    training_loss(exact, student=row, teacher=teacher[None]).sum().backward()
    assert row.grad is not None
    error = gradients.std(0) / math.sqrt(DRAWS)
    assert bool(((gradients.mean(0) - row.grad[0]).abs() < 3 * error).all())


@pytest.mark.parametrize(
    ("name", "column"), [("k1", "k1_variance"), ("k1_centred", "k1_variance_centred")]
)
def test_the_variance_of_an_estimator_is_its_column(name: str, column: str) -> None:
    gradients, student, teacher = drawn_gradients(name, 2)
    columns = token_statistics(student=student[None], teacher=teacher[None])
    squares = (gradients - gradients.mean(0)).square().sum(-1)
    error = float(squares.std()) / math.sqrt(DRAWS)
    assert float(squares.mean()) == pytest.approx(float(columns[column][0]), abs=3 * error)


def test_losses_by_eye() -> None:
    student = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    rho = math.log(0.5 / 0.75)
    delta = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    expected = {
        "k1": rho * math.log(0.5),
        "k1_centred": (rho - delta) * math.log(0.5),
        "k2": rho**2 / 2,
        "k3": 1.5 - 1 + rho,
        "entropy_gated": delta,
    }
    for name, value in expected.items():
        found = training_loss(name, student=student, teacher=teacher, token_ids=torch.tensor([0]))
        assert float(found) == pytest.approx(value), name
    gated = training_loss(
        "entropy_gated", student=student, teacher=teacher, settings=LossSettings(entropy_gate=0.5)
    )
    assert float(gated) == pytest.approx(delta + 0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_a_token_that_the_teacher_masks_is_infinitely_wrong() -> None:
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    for name in ("k1", "k2", "k3"):
        value = training_loss(name, student=student, teacher=teacher, token_ids=torch.tensor([2]))
        assert bool(value.isinf().all())


def test_the_mixture_is_that_of_gkd() -> None:
    """TRL's GKD: F.kl_div against log-mixtures, summed over the vocabulary."""
    student, teacher = as_rows([logit_pair("random", 50, i) for i in range(5)], torch.float64)
    for beta in (0.1, 0.5, 0.9):
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        stacked = torch.stack([log_p + math.log1p(-beta), log_q + math.log(beta)])
        mixture = stacked.logsumexp(0)
        of_teacher = kl_div(mixture, log_q, reduction="none", log_target=True).sum(-1)
        of_student = kl_div(mixture, log_p, reduction="none", log_target=True).sum(-1)
        found = training_loss(
            "jsd", student=student, teacher=teacher, settings=LossSettings(jsd_beta=beta)
        )
        torch.testing.assert_close(found, beta * of_teacher + (1 - beta) * of_student)


@pytest.mark.parametrize(
    "bad",
    [
        {"jsd_beta": 0.0},
        {"jsd_beta": 1.0},
        {"skew_alpha": 1.0},
        {"loss_top_k": 0},
        {"entropy_gate": -1.0},
        {"entropy_gate": math.nan},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(OptionError):
        LossSettings(**bad)


def test_unknown_names_are_refused() -> None:
    rows = torch.zeros(1, 3)
    with pytest.raises(UnknownNameError, match="valid names"):
        training_loss("kl", student=rows, teacher=rows)
    with pytest.raises(UnknownNameError, match="valid names: bucket, renormalised"):
        LossSettings(loss_tail="dropped")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="needs the tokens"):
        training_loss(TrainingLoss.K2, student=rows, teacher=rows)
    assert set(SETTINGS) == set(TrainingLoss)
    assert len(LOGIT_KINDS) > len(FINITE)
