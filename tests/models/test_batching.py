import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tip_analysis.core.errors import OptionError
from tip_analysis.models.batching import (
    TokenBudget,
    is_out_of_memory,
    pad_sequences,
    padding_waste,
    plan_batches,
)

lengths = st.lists(st.integers(1, 60), max_size=40)


@given(lengths, st.integers(1, 200), st.booleans())
def test_a_plan_holds_every_sequence_once_and_keeps_the_budget(lengths, budget, grouped):
    groups = [f"g{index // 3}" for index in range(len(lengths))] if grouped else None
    batches = plan_batches(lengths, budget, groups)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


@given(lengths, st.integers(1, 200))
def test_batches_go_from_long_to_short(lengths, budget):
    longest = [max(lengths[index] for index in batch) for batch in plan_batches(lengths, budget)]
    assert longest == sorted(longest, reverse=True)


def test_groups_stay_together():
    batches = plan_batches([9, 5, 9, 5, 9, 5], 27, groups=["a", "b", "b", "a", "c", "c"])
    assert [index for batch in batches for index in batch] == [0, 3, 2, 1, 4, 5]


def test_padding_waste_by_hand():
    assert padding_waste([4, 2, 1], [[0, 1], [2]]) == pytest.approx(1 - 7 / 9)
    assert padding_waste([], []) == 0.0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_hand(side):
    batch = pad_sequences([[5, 6, 7], [8]], padding_side=side, pad_id=9)
    expected = [[5, 6, 7], [9, 9, 8]] if side == "left" else [[5, 6, 7], [8, 9, 9]]
    assert batch.input_ids.tolist() == expected
    assert batch.attention_mask.tolist() == (
        [[1, 1, 1], [0, 0, 1]] if side == "left" else [[1, 1, 1], [1, 0, 0]]
    )
    assert batch.position_ids[0].tolist() == [0, 1, 2]
    assert batch.position_ids[1, batch.starts[1]] == 0


def test_a_budget_halves_until_it_fits_and_loses_nothing(caplog):
    sizes = [10] * 12
    seen = []

    def work(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.extend(batch)
        return len(batch)

    budget = TokenBudget(120)
    results = list(budget.run(sizes, work))
    assert sorted(seen) == list(range(12))
    assert sum(count for _, count in results) == 12
    assert budget.tokens == 30
    assert caplog.text.count("halved") == 2


def test_a_sequence_that_does_not_fit_alone_is_an_error():
    def work(batch):
        raise MemoryError

    with pytest.raises(MemoryError):
        list(TokenBudget(10).run([5], work))


def test_other_errors_are_not_taken_for_lack_of_memory():
    assert is_out_of_memory(
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
        )
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape"):
        list(
            TokenBudget(10).run(
                [5, 5], lambda batch: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
            )
        )


def test_options_out_of_range_are_refused():
    with pytest.raises(OptionError, match="token_budget"):
        plan_batches([1], 0)
    with pytest.raises(OptionError, match="--token-budget"):
        TokenBudget(0)
    with pytest.raises(OptionError, match="padding_side"):
        pad_sequences([[1]], padding_side="middle")
