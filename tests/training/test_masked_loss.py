import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.names import Loss
from tip_analysis.models.output_head import OutputHead
from tip_analysis.training.masked_loss import token_weights, weighted_divergence


def weights_of(selected, rollouts, **options):
    return token_weights(np.array(selected, dtype=bool), np.array(rollouts), **options)


def test_weights_by_hand():
    # Rollout 0: 2 of 4 selected; rollout 1: 1 of 2.
    selected, rollouts = [1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]
    expected = {
        ("selected", "rollout"): [1 / 4, 1 / 4, 0, 0, 0, 1 / 2],
        ("all", "rollout"): [1 / 8, 1 / 8, 0, 0, 0, 1 / 4],
        ("selected", "token"): [1 / 3, 1 / 3, 0, 0, 0, 1 / 3],
        ("all", "token"): [1 / 6, 1 / 6, 0, 0, 0, 1 / 6],
    }
    for (normalizer, aggregation), weights in expected.items():
        found = weights_of(
            selected, rollouts, loss_normalizer=normalizer, loss_aggregation=aggregation
        )
        np.testing.assert_allclose(
            found, weights, rtol=1e-15, err_msg=f"{normalizer} {aggregation}"
        )


@given(
    data=st.data(),
    normalizer=st.sampled_from(["selected", "all"]),
    aggregation=st.sampled_from(["rollout", "token"]),
)
@settings(deadline=None, max_examples=60)
def test_weighted_sum_is_the_loss_of_the_equations(data, normalizer, aggregation):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    total = sum(lengths)
    selected = data.draw(st.lists(st.booleans(), min_size=total, max_size=total))
    losses = data.draw(st.lists(st.floats(0, 10), min_size=total, max_size=total))
    rollouts = [index for index, length in enumerate(lengths) for _ in range(length)]
    weights = weights_of(
        selected, rollouts, loss_normalizer=normalizer, loss_aggregation=aggregation
    )
    assert weights @ np.array(losses) == pytest.approx(
        reference.masked_loss(losses, selected, rollouts, normalizer, aggregation),
        rel=1e-12,
        abs=1e-12,
    )
    if normalizer == "selected" and any(selected):
        assert weights.sum() == pytest.approx(1.0)


def test_weights_refuse_unknown_names():
    with pytest.raises(UnknownNameError, match="loss normalizer 'kept'"):
        weights_of([1], [0], loss_normalizer="kept", loss_aggregation="token")
    with pytest.raises(UnknownNameError, match="loss aggregation 'batch'"):
        weights_of([1], [0], loss_normalizer="all", loss_aggregation="batch")


def heads(architecture, *, tied=True, teacher_rows=0, student_rows=0):
    # Gemma 2 needs float32 attention, but a head alone works in float64.
    student = tiny_model(architecture, vocab_size=61 + student_rows, tied=tied, dtype=torch.float64)
    teacher = tiny_model(architecture, vocab_size=61 + teacher_rows, seed=1, dtype=torch.float64)
    return OutputHead(student), OutputHead(teacher)


def naive(hidden, teacher_hidden, weights, student_head, teacher_head, vocab_size, loss):
    """All logits at once, plain formulas, automatic gradients."""
    p = student_head(hidden)[:, :vocab_size].log_softmax(-1)
    q = teacher_head(teacher_hidden)[:, :vocab_size].log_softmax(-1).detach()
    if loss == Loss.REVERSE_KL:
        values = (p.exp() * (p - q)).sum(-1)
    elif loss == Loss.FORWARD_KL:
        values = (q.exp() * (q - p)).sum(-1)
    else:
        m = (0.5 * (p.exp() + q.exp())).log()
        values = 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)
    return (weights * values).sum()


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2"])
@pytest.mark.parametrize("loss", [Loss.REVERSE_KL, Loss.FORWARD_KL, Loss.JSD])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_give_the_loss_and_gradients_of_all_logits_at_once(architecture, loss, chunk_size):
    student_head, teacher_head = heads(architecture, teacher_rows=3, student_rows=5)
    torch.manual_seed(0)
    hidden = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(7, 32, dtype=torch.float64)
    weights = torch.rand(7, dtype=torch.float64)
    weight = student_head.linear.weight
    expected = naive(hidden, teacher_hidden, weights, student_head, teacher_head, 61, loss)
    expected_grads = torch.autograd.grad(2.5 * expected, [hidden, weight])
    found = weighted_divergence(
        hidden,
        teacher_hidden,
        weights,
        student_head=student_head,
        teacher_head=teacher_head,
        vocab_size=61,
        loss=loss,
        chunk_size=chunk_size,
    )
    grads = torch.autograd.grad(2.5 * found, [hidden, weight])
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_no_more_logits_than_a_chunk_ever_exist(monkeypatch):
    student_head, teacher_head = heads("qwen3")
    rows = []
    original = OutputHead.__call__
    monkeypatch.setattr(
        OutputHead,
        "__call__",
        lambda self, hidden: rows.append(len(hidden)) or original(self, hidden),
    )
    hidden = torch.randn(50, 32, dtype=torch.float64, requires_grad=True)
    loss = weighted_divergence(
        hidden,
        hidden.detach(),
        torch.ones(50),
        student_head=student_head,
        teacher_head=teacher_head,
        vocab_size=61,
        chunk_size=8,
    )
    loss.backward()
    assert max(rows) == 8
    assert sum(rows) == 2 * 50, "each row goes through each head once, in the forward pass"
    assert hidden.grad is not None


def test_a_frozen_head_gets_no_gradient():
    student_head, teacher_head = heads("qwen3")
    student_head.linear.requires_grad_(False)
    hidden = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    weighted_divergence(
        hidden,
        hidden.detach(),
        torch.ones(5),
        student_head=student_head,
        teacher_head=teacher_head,
        vocab_size=61,
    ).backward()
    assert student_head.linear.weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_bad_options_are_refused():
    student_head, teacher_head = heads("qwen3")
    hidden = torch.randn(5, 32, dtype=torch.float64)
    options = {"student_head": student_head, "teacher_head": teacher_head, "vocab_size": 61}
    with pytest.raises(OptionError, match="chunk_size"):
        weighted_divergence(hidden, hidden, torch.ones(5), chunk_size=0, **options)
    with pytest.raises(UnknownNameError, match="valid names: reverse_kl, forward_kl, jsd"):
        weighted_divergence(hidden, hidden, torch.ones(5), loss=Loss.NEGATIVE_LOGPROB, **options)
    with pytest.raises(OptionError, match="k1 needs the tokens"):
        weighted_divergence(hidden, hidden, torch.ones(5), loss="k1", **options)
