"""Stop tokens against the definition in float64: merge the tokens by hand, take the divergence."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import as_rows, logit_pair, logit_pairs

from tip_analysis.core.errors import OptionError
from tip_analysis.logits import token_statistics
from tip_analysis.logits.stop_tokens import merge_tokens, merged_ids


def log_probabilities(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy() - logits.double().numpy().max()
    return x - math.log(math.fsum(np.exp(x)))


def merged_by_hand(log_p: np.ndarray, ids: list[int]) -> np.ndarray:
    return np.append(np.delete(log_p, ids), np.logaddexp.reduce(log_p[ids]))


def reverse_kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


@given(logit_pairs(30, kinds=("random", "peaked", "tied")), st.data())
@settings(deadline=None, max_examples=60)
def test_mismatch_is_what_merging_takes_from_the_divergence(pair, data) -> None:
    size = len(pair[0])
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True))
    student, teacher = as_rows([pair], torch.float64)
    rows = {"student": student, "teacher": teacher, "token_ids": torch.tensor([ids[-1]])}
    plain = token_statistics(**rows, stop_ids=torch.tensor(ids))
    merged = token_statistics(**rows, stop_ids=torch.tensor(ids), merge_stop_tokens=True)
    p, q = log_probabilities(student[0]), log_probabilities(teacher[0])
    whole, rest = reverse_kl(p, q), reverse_kl(merged_by_hand(p, ids), merged_by_hand(q, ids))
    near = {"rel": 1e-9, "abs": 1e-12 * max(1.0, whole)}
    mass = math.fsum(np.exp(p[ids]))
    assert float(plain["student_stop_mass"]) == pytest.approx(mass, rel=1e-9)
    assert float(plain["teacher_stop_mass"]) == pytest.approx(math.fsum(np.exp(q[ids])), rel=1e-9)
    assert float(plain["stop_mismatch"]) == pytest.approx(whole - rest, **near)
    assert float(merged["reverse_kl"]) == pytest.approx(rest, **near)
    assert float(merged["student_logprob"]) == pytest.approx(np.logaddexp.reduce(p[ids]), abs=1e-9)
    for name in ("student_stop_mass", "teacher_stop_mass", "stop_mismatch"):
        assert float(merged[name]) == pytest.approx(float(plain[name]), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_differ_in_their_stop_token_only_agree_once_merged(dtype) -> None:
    """The student stops with token 3, the teacher with token 7, both almost surely."""
    student = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    teacher = student.clone()
    student[0, 3], student[0, 7] = 20.0, 0.0
    teacher[0, 3], teacher[0, 7] = 0.0, 20.0
    rows = {"student": student.to(dtype), "teacher": teacher.to(dtype)}
    rows |= {"token_ids": torch.tensor([3]), "stop_ids": torch.tensor([7, 3])}
    plain, merged = token_statistics(**rows), token_statistics(**rows, merge_stop_tokens=True)
    assert float(plain["reverse_kl"]) > 15
    assert float(plain["stop_mismatch"]) == pytest.approx(float(plain["reverse_kl"]), rel=1e-3)
    assert float(merged["reverse_kl"]) < 1e-6
    assert float(merged["student_logprob"]) == pytest.approx(0.0, abs=1e-5)
    assert merged["student_topk_ids"][0, 0] == 3


def test_one_stop_token_changes_nothing() -> None:
    student, teacher = as_rows([logit_pair("random", 40, 1)], torch.float32)
    stop, token = torch.tensor([5]), torch.tensor([5])
    rows = {"student": student, "teacher": teacher, "token_ids": token, "stop_ids": stop}
    plain, merged = token_statistics(**rows), token_statistics(**rows, merge_stop_tokens=True)
    assert float(plain["stop_mismatch"]) == 0.0
    for name, values in plain.items():
        expected = values.double()
        assert torch.allclose(expected, merged[name].double(), rtol=0, atol=0, equal_nan=True), name


def test_merging_keeps_the_other_logits_and_the_given_ones() -> None:
    logits = torch.randn(3, 9)
    before = logits.clone()
    merged = merge_tokens(logits, torch.tensor([6, 2]))
    assert torch.equal(logits, before)
    others = [i for i in range(9) if i not in (2, 6)]
    assert torch.equal(merged[:, others], logits[:, others])
    assert torch.allclose(merged[:, 2], torch.logaddexp(logits[:, 2], logits[:, 6]))
    assert bool((merged[:, 6] == -math.inf).all())
    assert merged_ids(torch.tensor([6, 2, 4]), torch.tensor([6, 2])).tolist() == [2, 2, 4]


def test_a_stop_token_outside_the_vocabulary_is_refused() -> None:
    row = torch.zeros(1, 4)
    with pytest.raises(OptionError, match=r"\[0, 4\)"):
        token_statistics(student=row, teacher=row, stop_ids=torch.tensor([4]))
