"""Statistics of two rows of logits, against oracles in extended and in 80-digit precision."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import reference
import torch
from expected_statistics import (
    DIFFERENCES,
    DTYPES,
    FLOORS,
    assert_estimators,
    assert_statistics,
    oracle,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import LOGIT_KINDS, as_rows, logit_pair, logit_pairs

from tip_analysis.core.errors import LogitsError, OptionError
from tip_analysis.core.schema import TokenTable
from tip_analysis.logits import row_statistics as divergence
from tip_analysis.logits import torch_kernel
from tip_analysis.logits.row_statistics import token_statistics

VOCAB_SIZES = (11, 1000, 151936)


@pytest.fixture(scope="module", params=["processor", "tensors"], autouse=True)
def _way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything below holds of the compiled pass and of the pass on tensors (which float64
    takes either way)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(divergence.COMPILE_VARIABLE, "1" if request.param == "processor" else "0")
        yield request.param


# ------------------------------------------------------------------------------------------ oracles


@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_the_two_oracles_agree(kind: str) -> None:
    student, teacher = (row.astype(np.float32) for row in logit_pair(kind, 150, seed=4))
    exact, extended = (
        f(student, teacher, 3) for f in (reference.exact_statistics, reference.extended_statistics)
    )
    for name, value in exact.items():
        # the extended oracle takes what a top-k misses from δ
        atol = 1e-15 * exact["reverse_kl"] if name.startswith("topk_bias") else 1e-70
        np.testing.assert_allclose(extended[name], value, rtol=1e-6, atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_every_column_equals_the_oracle(kind: str, vocab_size: int, dtype: str) -> None:
    seeds = range(6) if vocab_size < 100_000 else [5]
    student, teacher = as_rows(
        [logit_pair(kind, vocab_size, seed) for seed in seeds], DTYPES[dtype]
    )
    token_ids = torch.arange(len(student)) % vocab_size
    columns = token_statistics(student=student, teacher=teacher, token_ids=token_ids)
    for row in range(len(student)):
        assert_statistics(columns, row, oracle(student[row], teacher[row], int(token_ids[row])))


@pytest.mark.parametrize("apart", [0.05, 0.4, 0.6, 3.0])
def test_float32_keeps_all_but_its_last_digits(apart: float) -> None:
    """Ordinary rows, whose log-ratios lie where series are used, where they end, and beyond:
    against the same in float64."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(20, 300, generator=generator)
    teacher = student + apart * (2 * torch.rand(20, 300, generator=generator) - 1)
    found = token_statistics(student=student, teacher=teacher)
    expected = token_statistics(student=student.double(), teacher=teacher.double())
    for name, values in expected.items():
        atol = (
            2e-6 if name.startswith("topk_bias") else 0
        )  # differences of δ and the candidates' part
        np.testing.assert_allclose(found[name].double(), values, rtol=2e-5, atol=atol, err_msg=name)


@given(logit_pairs(40), st.integers(0, 1))
@settings(deadline=None, max_examples=60)
def test_float64_is_kept(pair: tuple[np.ndarray, np.ndarray], token_id: int) -> None:
    student, teacher = as_rows([pair], torch.float64)
    columns = token_statistics(student=student, teacher=teacher, token_ids=torch.tensor([token_id]))
    expected = reference.exact_statistics(*pair, token_id)
    assert_estimators(columns, 0, expected, rounding=1e-11)
    for name, value in expected.items():
        if name.endswith(("ids", "agree")):
            assert columns[name][0].tolist() == value
        elif not (name == "w_local" and expected["logit_curvature"] < 1e-140):
            assert columns[name].dtype == torch.float64
            np.testing.assert_allclose(
                columns[name][0].tolist(), value, rtol=1e-9, atol=1e-70, err_msg=name
            )  # 80 digits have no more


def test_the_columns_are_those_of_the_token_table() -> None:
    student, teacher = as_rows([logit_pair("random", 20, 0)], torch.float32)
    names = TokenTable.column_names()
    statistics = names[names.index("student_entropy") : names.index("teacher_topk_logprobs") + 1]
    ids = torch.tensor([1])
    with_tokens = token_statistics(student=student, teacher=teacher, token_ids=ids, stop_ids=ids)
    assert sorted(with_tokens) == sorted(statistics)
    without = token_statistics(student=student, teacher=teacher)
    assert set(with_tokens) - set(without) == {
        "student_logprob",
        "teacher_logprob",
        "student_stop_mass",
        "teacher_stop_mass",
        "stop_mismatch",
    }


def test_two_tokens_by_hand() -> None:
    """P_S = (3/4, 1/4), P_T = (1/4, 3/4): all by symmetry, with ln 3 for the log-ratio."""
    student = torch.tensor([[math.log(3.0), 0.0]])
    columns = token_statistics(
        student=student, teacher=student.flip(1), token_ids=torch.tensor([1])
    )
    by_hand = {
        "student_entropy": math.log(4) - 0.75 * math.log(3),
        "reverse_kl": 0.5 * math.log(3),
        "forward_kl": 0.5 * math.log(3),
        "jsd": 0.75 * math.log(1.5) - 0.25 * math.log(2),
        "hellinger": math.sqrt(1 - math.sqrt(3) / 2),
        "student_logprob": math.log(1 / 4),
        "teacher_logprob": math.log(3 / 4),
        "student_top1_prob": 0.75,
        "reverse_kl_logit_grad_norm": math.sqrt(2) * 0.75 * 0.5 * math.log(3),
        "forward_kl_logit_grad_norm": math.sqrt(2) / 2,
        "logit_curvature": 3 / 16,
        "w_local": 8 / 3,
        "teacher_mass_on_student_topk": 1.0,
    }
    for name, value in by_hand.items():
        assert float(columns[name]) == pytest.approx(value, rel=1e-6), name
    assert columns["student_topk_ids"].tolist() == [[0, 1]]
    assert columns["teacher_topk_ids"].tolist() == [[1, 0]]
    assert columns["top1_agree"].tolist() == [False]


def test_a_confident_and_wrong_student_has_a_small_reverse_gradient() -> None:
    """Softmax saturation (Section 5): δ is 20 nats, and its logit gradient 1e-7 of that."""
    student, teacher = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 20.0]])
    columns = token_statistics(student=student, teacher=teacher)
    q = math.exp(-20) / (1 + math.exp(-20))
    assert float(columns["reverse_kl"]) == pytest.approx(20 * (1 - 2 * q), rel=1e-6)
    assert float(columns["reverse_kl_logit_grad_norm"]) == pytest.approx(
        math.sqrt(2) * q * (1 - q) * 40, rel=1e-5
    )


# --------------------------------------------------------------------------------------- properties


@given(logit_pairs(), st.sampled_from(sorted(DTYPES)))
@example(logit_pair("masked_apart", 3, 74), "bfloat16")
@settings(deadline=None, max_examples=150)
def test_ranges_and_symmetries(pair: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
    student, teacher = as_rows([pair], DTYPES[dtype])
    vocab_size = student.shape[1]
    there = token_statistics(student=student, teacher=teacher)
    back = token_statistics(student=teacher, teacher=student)
    for name in (
        "reverse_kl",
        "forward_kl",
        "jsd",
        "hellinger",
        "student_entropy",
        "logit_curvature",
    ):
        assert float(there[name]) >= 0, name
    assert float(there["jsd"]) <= math.log(2) + 1e-7
    assert float(there["hellinger"]) <= 1
    assert float(there["student_entropy"]) <= math.log(vocab_size) + 1e-6
    assert float(there["student_entropy_norm"]) <= 1 + 1e-6
    assert float(there["w_local"]) >= 1 or math.isnan(
        float(there["w_local"])
    )  # gᵀHg ≤ ‖g‖², as H ≤ ½
    for one, other in (("reverse_kl", "forward_kl"), ("jsd", "jsd"), ("hellinger", "hellinger")):
        np.testing.assert_allclose(there[one], back[other], rtol=1e-4, atol=FLOORS[one])
    assert torch.equal(there["student_topk_ids"], back["teacher_topk_ids"])
    for name in ("student_topk_logprobs", "teacher_topk_logprobs"):
        assert bool((there[name][:, 1:] <= there[name][:, :-1]).all())  # two may be -inf
        assert bool((there[name] <= 0).all())
    assert bool((there["student_topk_ids"] < vocab_size).all())
    may_be_nan = {"w_local", "k1_snr", "ier", "topk_bias", "topk_bias_no_tail"}
    assert not any(values.isnan().any() for name, values in there.items() if name not in may_be_nan)
    assert float(there["topk_bias"].nan_to_num()) >= 0


@given(logit_pairs(60), st.floats(-50, 50))
@settings(deadline=None, max_examples=60)
def test_divergences_vanish_only_between_rows_that_differ_by_a_constant(
    pair: tuple[np.ndarray, np.ndarray], shift: float
) -> None:
    student, teacher = as_rows([pair], torch.float32)
    coarse, shift = (
        (student * 64).round() / 64,
        round(shift * 64) / 64,
    )  # so that adding the constant is exact
    names = (
        "reverse_kl",
        "forward_kl",
        "jsd",
        "hellinger",
        "reverse_kl_logit_grad_norm",
        "forward_kl_logit_grad_norm",
    )
    same = token_statistics(student=coarse, teacher=coarse + shift)
    assert [float(same[name]) for name in names] == [0.0] * len(names)
    assert math.isnan(float(same["w_local"]))
    differ = token_statistics(student=student, teacher=teacher)
    expected = reference.exact_statistics(student[0].numpy(), teacher[0].numpy(), 0)
    for name in names:
        if expected[name] > 10 * FLOORS[name]:
            assert float(differ[name]) > 0, name


@given(
    logit_pairs(60, kinds=("random", "near_equal", "peaked", "tied")),
    st.integers(-64, 64),
    st.integers(-64, 64),
)
@settings(deadline=None, max_examples=40)
def test_constants_added_to_a_row_change_nothing(
    pair: tuple[np.ndarray, np.ndarray], first: int, second: int
) -> None:
    student, teacher = (
        torch.tensor(row[None]).float().mul(2**10).round().div(2**10) for row in pair
    )
    plain = token_statistics(student=student, teacher=teacher)
    shifted = token_statistics(student=student + first, teacher=teacher + second)
    for name in plain:
        atol = 2e-6 if name in DIFFERENCES else 0
        if name != "k1_snr":  # whether a variance is resolved may hang on the last bit
            assert torch.allclose(
                plain[name].double(), shifted[name].double(), rtol=1e-5, atol=atol, equal_nan=True
            ), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [11, 700, 5003])
def test_a_row_does_not_depend_on_its_neighbours(
    vocab_size: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [logit_pair(kind, vocab_size, seed) for kind in LOGIT_KINDS for seed in (0, 5)]
    student, teacher = as_rows(pairs, DTYPES[dtype])
    token_ids = torch.arange(len(pairs)) % vocab_size
    whole = token_statistics(student=student, teacher=teacher, token_ids=token_ids)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    permuted = token_statistics(
        student=student[order], teacher=teacher[order], token_ids=token_ids[order]
    )
    wide = [
        torch.nn.functional.pad(logits, (0, 77), value=99.0)[:, :vocab_size]
        for logits in (student, teacher)
    ]
    strided = token_statistics(student=wide[0], teacher=wide[1], token_ids=token_ids)
    monkeypatch.setattr(torch_kernel, "_LOGITS_IN_CACHE", 3 * vocab_size)
    blocks = token_statistics(student=student, teacher=teacher, token_ids=token_ids)
    for name, values in whole.items():
        for other in (permuted[name], blocks[name][order], strided[name][order]):
            np.testing.assert_allclose(
                values[order].double(), other.double(), rtol=1e-5, atol=0, err_msg=name
            )


@given(st.integers(1, 400), st.integers(1, 20), st.integers(0, 2**32 - 1), st.booleans())
@settings(deadline=None, max_examples=80)
def test_top_k_is_the_stable_order(vocab_size: int, k: int, seed: int, tied: bool) -> None:
    """Long rows go by blocks; ties go to the lower id in either case."""
    vocab_size *= 37
    row = np.random.default_rng(seed).normal(0, 3, vocab_size)
    row = np.round(row) * 0.0 - np.round(row) if tied else row  # rounded, with −0 among the zeros
    logits = torch.tensor(row[None]).float()
    columns = token_statistics(student=logits, teacher=logits, top_k=k)
    expected = reference.stable_order(logits[0].numpy())[:k]
    assert columns["student_topk_ids"][0].tolist() == expected.tolist()
    assert columns["teacher_topk_ids"][0].tolist() == expected.tolist()


def test_a_masked_token_makes_a_divergence_infinite_even_where_its_probability_underflows() -> None:
    student = torch.tensor([[0.0, -300.0, -math.inf], [0.0, 0.0, -math.inf]])
    teacher = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, -1.0]])
    columns = token_statistics(student=student, teacher=teacher)
    assert columns["reverse_kl"].isinf().tolist() == [True, False]
    assert columns["reverse_kl_logit_grad_norm"].isinf().tolist() == [True, False]
    assert columns["forward_kl"].isinf().tolist() == [False, True]


def test_no_rows_give_no_rows() -> None:
    empty = torch.zeros(0, 7)
    columns = token_statistics(
        student=empty, teacher=empty, token_ids=torch.zeros(0, dtype=torch.long), top_k=3
    )
    assert columns["student_topk_ids"].shape == (0, 3)
    assert columns["reverse_kl"].shape == (0,)


def test_one_token_is_certain() -> None:
    columns = token_statistics(student=torch.tensor([[3.0]]), teacher=torch.tensor([[-5.0]]))
    assert (
        float(columns["student_entropy"])
        == float(columns["student_entropy_norm"])
        == float(columns["reverse_kl"])
        == 0.0
    )


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("vocab_size", [5, 4000])
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize(
    ("value", "found"),
    [(math.nan, "NaN"), (-math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "no finite")],
)
def test_unusable_rows_are_refused_by_name(
    value: float, found: str, model: str, vocab_size: int
) -> None:
    logits = {name: torch.zeros(4, vocab_size) for name in ("student", "teacher")}
    logits[model][2, slice(None) if value == -math.inf else 3] = value
    with pytest.raises(LogitsError, match=rf"{model} logits of row 2: .*{found}") as caught:
        token_statistics(**logits)
    assert (caught.value.model, caught.value.row) == (model, 2)


def test_arguments_that_do_not_fit_are_refused() -> None:
    rows = torch.zeros(2, 5)
    for teacher in (torch.zeros(2, 6), torch.zeros(3, 5), torch.zeros(2, 5, dtype=torch.int32)):
        with pytest.raises(OptionError):
            token_statistics(student=rows, teacher=teacher)
    for token_ids in (
        torch.tensor([0, 5]),
        torch.tensor([-1, 0]),
        torch.tensor([0]),
        torch.tensor([0.0, 1.0]),
    ):
        with pytest.raises(OptionError, match="token_ids"):
            token_statistics(student=rows, teacher=rows, token_ids=token_ids)
    with pytest.raises(OptionError, match="top_k"):
        token_statistics(student=rows, teacher=rows, top_k=0)
