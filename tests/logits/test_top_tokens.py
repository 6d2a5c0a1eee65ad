"""The most likely tokens, against a stable sort of whole rows."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_analysis.logits.top_tokens import largest


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([1, 5, 63, 64, 65, 640, 1000, 4096]),
    k=st.integers(1, 20),
    levels=st.sampled_from([1, 2, 7, 1000]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_ids_go_by_falling_value_and_the_lower_first_where_tied(
    seed: int, vocab_size: int, k: int, levels: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(0, levels, (3, vocab_size)) / levels - 0.5).to(dtype)
    logits[rng.random(logits.shape) < 0.05] = -torch.inf
    maxima, values, ids = largest(logits, k)
    for row, top, value, found in zip(logits, maxima, values, ids, strict=True):
        expected = reference.stable_order(row.double().numpy())[:k]
        assert found.tolist() == expected.tolist()
        assert value.tolist() == row[found].tolist()
        assert top.item() == row.max().item()


@pytest.mark.parametrize("vocab_size", [10, 3000])
def test_zeros_of_either_sign_are_one_value(vocab_size: int) -> None:
    row = torch.full((1, vocab_size), -1.0)
    row[0, [2, 7, 9]] = torch.tensor([-0.0, 0.0, -0.0])
    assert largest(row, 3)[2].tolist() == [[2, 7, 9]]


@pytest.mark.parametrize("vocab_size", [10, 3000])
def test_a_row_with_nan_says_so_in_its_maximum(vocab_size: int) -> None:
    row = torch.zeros(1, vocab_size)
    row[0, -1] = torch.nan
    assert largest(row, 2)[0].isnan().all()
