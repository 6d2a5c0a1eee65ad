"""The compiled pass over logits: what only it has. That its numbers are right is
tested in test_divergence."""

import numpy as np
import pytest
import torch
from expected_statistics import assert_statistics, oracle
from strategies import LOGIT_KINDS, as_rows, logit_pair

from tip_analysis.logits import cpu_kernel
from tip_analysis.logits.row_statistics import token_statistics


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = np.linspace(-87.3, 0, 200_001, dtype=np.float32)
    found = np.array([cpu_kernel._exp(each) for each in x], dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    assert (np.abs(found - expected) / np.spacing(expected.astype(np.float32))).max() <= 2
    assert cpu_kernel._exp(np.float32(0)) == 1
    assert cpu_kernel._exp(np.float32(-88)) == cpu_kernel._exp(np.float32(-1e30)) == 0


@pytest.mark.parametrize("threads", [1, 3, 40])
def test_threads_share_rows_out_and_change_nothing(threads: int) -> None:
    pairs = [logit_pair(kind, 5003, seed) for kind in LOGIT_KINDS for seed in (0, 5)]
    student, teacher = as_rows(pairs, torch.float32)
    before = torch.get_num_threads()
    expected = cpu_kernel.row_totals(student, teacher, 5, 16)
    torch.set_num_threads(threads)
    try:
        found = cpu_kernel.row_totals(student, teacher, 5, 16)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("of_student", "of_teacher"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]
)
def test_other_and_mixed_dtypes_equal_the_oracle(
    of_student: torch.dtype, of_teacher: torch.dtype
) -> None:
    kinds = [kind for kind in LOGIT_KINDS if kind != "huge"]
    pairs = [logit_pair(kind, 300, 5) for kind in kinds]
    student, teacher = as_rows(pairs, of_student)[0], as_rows(pairs, of_teacher)[1]
    columns = token_statistics(
        student=student, teacher=teacher, token_ids=torch.arange(len(pairs)), compile=True
    )
    for row in range(len(pairs)):
        assert_statistics(columns, row, oracle(student[row], teacher[row], row))


def test_any_layout_of_memory_gives_the_same_rows() -> None:
    student, teacher = as_rows([logit_pair(kind, 300, 5) for kind in LOGIT_KINDS], torch.bfloat16)
    expected = cpu_kernel.row_totals(student, teacher, 5, 16)
    transposed = student.T.contiguous().T
    repeated = teacher[:1].expand(len(student), -1)
    for one, other in zip(cpu_kernel.row_totals(transposed, teacher, 5, 16), expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    every_other = cpu_kernel.row_totals(student[::2], teacher[::2], 5, 16)
    for one, other in zip(every_other, expected, strict=True):
        assert torch.allclose(one, other[::2], rtol=0, atol=0, equal_nan=True)
    row = cpu_kernel.row_totals(student, repeated, 5, 16).reverse_kl
    assert torch.equal(row, cpu_kernel.row_totals(student, repeated.contiguous(), 5, 16).reverse_kl)


def test_more_top_tokens_than_columns() -> None:
    generator = np.random.default_rng(0)
    logits = torch.tensor(generator.normal(0, 3, (1, 3000))).bfloat16()  # many are tied
    k = cpu_kernel._COLUMNS + 500
    columns = token_statistics(student=logits, teacher=logits, top_k=k, compile=True)
    assert columns["student_topk_ids"].tolist() == [
        torch.sort(logits[0].double(), descending=True, stable=True)[1][:k].tolist()
    ]


def test_compiled_code_that_cannot_be_kept_on_disk_is_compiled_again() -> None:
    scope: dict = {}
    exec("def function(values):\n    values[0] = 7.0\n", scope)  # no file, no place beside it
    values = np.zeros(1)
    cpu_kernel._kept_on_disk(scope["function"])(values)
    assert values[0] == 7.0
