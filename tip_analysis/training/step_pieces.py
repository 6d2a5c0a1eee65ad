"""A step's rollouts and tokens in pieces: micro-batches, their order, and values cut by rollout."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.processes import Processes


def shares_of(rollouts: Sequence[Rollout], processes: Processes) -> list[list[int]]:
    """Indices of the rollouts of each process, long and short ones evenly."""
    if processes.size == 1:
        return [list(range(len(rollouts)))]
    order = _longest_first(rollouts, range(len(rollouts)))
    return [sorted(processes.part(order, rank)) for rank in range(processes.size)]


def micro_batches_of(
    rollouts: Sequence[Rollout], size: int | None, share: Sequence[int]
) -> list[list[int]]:
    """The rollouts of each backward pass among some (by index), those of like length together."""
    if size is None or size >= len(share):
        return [list(share)] if share else []
    order = _longest_first(rollouts, share)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _longest_first(rollouts: Sequence[Rollout], indices: Iterable[int]) -> list[int]:
    return sorted(indices, key=lambda i: (-len(rollouts[i].prompt) - len(rollouts[i].response), i))


def token_order(rollouts: Sequence[Rollout], micro_batches: list[list[int]]) -> np.ndarray:
    """The index that puts tokens that come micro-batch by micro-batch into the order of
    rollouts."""
    order = [i for batch in micro_batches for i in batch]
    return restoring_order(order, [int(rollout.written.sum()) for rollout in rollouts])


def restoring_order(order: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """For groups of `counts[i]` rows that lie in the order `order`: the index that puts them in the
    order 0, 1, 2 …"""
    starts, total = {}, 0
    for i in order:
        starts[i] = total
        total += counts[i]
    return np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in range(len(counts))])


def per_rollout(values: np.ndarray, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """[N] values of the written tokens, cut into rollouts."""
    return np.split(values, np.cumsum([int(rollout.written.sum()) for rollout in rollouts])[:-1])


def tokens_of(rollouts: Sequence[Rollout], chosen: Sequence[np.ndarray]) -> Tensor:
    """[N] int64: the chosen tokens of some rollouts."""
    parts = [
        np.asarray(r.response, np.int64)[mask] for r, mask in zip(rollouts, chosen, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def scatter(written: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A mask over written tokens as one over all response tokens."""
    chosen = np.zeros_like(written)
    chosen[np.flatnonzero(written)[mask]] = True
    return chosen
