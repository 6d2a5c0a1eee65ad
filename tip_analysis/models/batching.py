"""Batches of sequences of unequal length: grouped by length under a token budget, padded, halved
when memory runs out."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tip_analysis.core.errors import OptionError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences as one rectangle: `input_ids`, `attention_mask` and `position_ids`, each int64 [B,
    T].

    `starts` holds the column at which each sequence begins: 0 with right padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    starts: tuple[int, ...]


def pad_sequences(
    sequences: Sequence[Sequence[int]],
    *,
    padding_side: str = "right",
    pad_id: int = 0,
    device: torch.device | str = "cpu",
) -> PaddedBatch:
    """Pad B token sequences to [B, T]; position ids count from 0 at each sequence's own first
    token."""
    if padding_side not in ("left", "right"):
        raise OptionError(f"padding_side must be 'left' or 'right', found {padding_side!r}")
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    input_ids = pad_sequence(rows, True, pad_id, padding_side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side)
    starts = tuple(input_ids.shape[1] - len(row) if padding_side == "left" else 0 for row in rows)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    return PaddedBatch(input_ids.to(device), mask.to(device), position_ids.to(device), starts)


def plan_batches(
    lengths: Sequence[int], token_budget: int, groups: Sequence[str] | None = None
) -> list[list[int]]:
    """Group sequences of similar length so that each padded batch holds at most `token_budget`
    tokens.

    Args:
        lengths: tokens of each sequence.
        token_budget: B·T at most, padding included; a longer sequence makes a batch of its own.
        groups: a name for each sequence; sequences of one group (the rollouts of a prompt) stay
            next to each other.

    Returns:
        Batches of indices into `lengths`, longest first (so that memory runs out at once if it
        does), each index once.
    """
    if token_budget < 1:
        raise OptionError(f"token_budget must be at least 1, found {token_budget}")
    names = groups if groups is not None else [str(index) for index in range(len(lengths))]
    longest_of: dict[str, int] = {}
    for name, length in zip(names, lengths, strict=True):
        longest_of[name] = max(length, longest_of.get(name, 0))
    order = sorted(
        range(len(lengths)),
        key=lambda i: (-longest_of[names[i]], names[i] if groups else "", -lengths[i], i),
    )
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if batches and (len(batches[-1]) + 1) * longest <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches


def padding_waste(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of a plan's positions that is padding, in [0, 1)."""
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches if batch)
    return (
        1.0 - sum(lengths[index] for batch in batches for index in batch) / padded
        if padded
        else 0.0
    )


class TokenBudget:
    """How many tokens a batch may hold; halved for good when memory runs out."""

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise OptionError(f"--token-budget must be at least 1, found {tokens}")
        self.tokens = tokens

    def run(
        self,
        lengths: Sequence[int],
        work: Callable[[list[int]], Result],
        groups: Sequence[str] | None = None,
    ) -> Iterator[tuple[list[int], Result]]:
        """Call `work` on batches of indices into `lengths` (see `plan_batches`); yields each batch
        with its result.

        When memory runs out the budget is halved, said once for each halving, and what is left is
        planned again.

        Raises:
            MemoryError, torch.OutOfMemoryError: a single sequence does not fit.
        """
        pending = list(range(len(lengths)))
        while pending:
            names = None if groups is None else [groups[index] for index in pending]
            batch = [
                pending[index]
                for index in plan_batches(
                    [lengths[index] for index in pending], self.tokens, names
                )[0]
            ]
            try:
                result = work(batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                self.tokens = max(1, min(self.tokens, sum(lengths[index] for index in batch)) // 2)
                logger.warning(
                    "memory ran out with %d sequences a batch: token budget halved to %d",
                    len(batch),
                    self.tokens,
                )
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            done = set(batch)
            pending = [index for index in pending if index not in done]
            yield batch, result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(
        error
    )
