"""Which way the pass over logits runs, and what is said where the quick way can't be had."""

import logging
import sys

import pytest
import torch
from expected_statistics import DTYPES, assert_statistics, oracle
from strategies import LOGIT_KINDS, as_rows, logit_pair

from tip_analysis.logits import row_statistics as divergence
from tip_analysis.logits import torch_kernel
from tip_analysis.logits.row_statistics import rows_per_block, token_statistics, worth_compiling


def test_compiling_is_chosen_by_device_size_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(divergence.COMPILE_VARIABLE, raising=False)
    assert [worth_compiling(n) for n in (1, 10**12)] == [True, True]
    assert [worth_compiling(n, "cuda") for n in (10**6, 10**12)] == [False, True]
    monkeypatch.setenv(divergence.COMPILE_VARIABLE, "0")
    assert not worth_compiling(10**12)
    monkeypatch.setenv(divergence.COMPILE_VARIABLE, "1")
    assert worth_compiling(1, "cuda")


def test_without_numba_the_pass_runs_on_tensors_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = as_rows([logit_pair("random", 50, 0)], torch.float32)
    divergence._processor.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setitem(sys.modules, "tip_analysis.logits.cpu_kernel", None)
        patch.delattr("tip_analysis.logits.cpu_kernel")
        columns = [
            token_statistics(student=student, teacher=teacher, compile=True) for _ in range(2)
        ]
    divergence._processor.cache_clear()
    assert len(caplog.records) == 1
    assert "Numba" in caplog.text
    uncompiled = token_statistics(student=student, teacher=teacher, compile=False)
    assert all(torch.equal(columns[1][name], values) for name, values in uncompiled.items())


def test_without_a_compiler_tensors_are_worked_on_uncompiled_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(
        torch_kernel,
        "_compiled_stages",
        lambda: torch_kernel._Stages(no_compiler, no_compiler, no_compiler, False),
    )
    monkeypatch.setattr(torch_kernel, "_compiler_failed", False)
    student, teacher = as_rows([logit_pair("random", 50, 0)], torch.float32)
    with caplog.at_level(logging.WARNING):
        totals = [torch_kernel.row_totals(student, teacher, 5, 16, compile=True) for _ in range(2)]
    assert len(caplog.records) == 1
    assert "no C++ compiler found" in caplog.text
    uncompiled = torch_kernel.row_totals(student, teacher, 5, 16, compile=False)
    assert all(torch.equal(one, other) for one, other in zip(totals[1], uncompiled, strict=True))


def test_blocks_shrink_as_the_vocabulary_grows() -> None:
    sizes = [rows_per_block(vocab_size) for vocab_size in (11, 49152, 151936, 10**7)]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [11, 1000, 151936])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_tensor_operations_equal_the_oracle(
    vocab_size: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they run on an accelerator."""
    student, teacher = as_rows(
        [logit_pair(kind, vocab_size, 5) for kind in LOGIT_KINDS], DTYPES[dtype]
    )
    token_ids = torch.arange(len(student)) % vocab_size
    monkeypatch.setattr(
        divergence,
        "_row_totals",
        lambda *arguments: torch_kernel.row_totals(*arguments[:4], compile=True),
    )
    columns = token_statistics(student=student, teacher=teacher, token_ids=token_ids)
    assert not torch_kernel._compiler_failed
    for row in range(len(student)):
        assert_statistics(columns, row, oracle(student[row], teacher[row], int(token_ids[row])))
