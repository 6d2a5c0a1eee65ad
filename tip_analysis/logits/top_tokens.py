"""The most likely tokens of each row of logits, in one deterministic order."""

import torch
from torch import Tensor

_TOP_BLOCK = 64


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(max [N, 1], the k largest values [N, k], their ids [N, k]), by falling value, then rising
    id; max is NaN if any is.

    The k largest lie in the k blocks of 64 tokens that have the largest maxima, so most of the row
    is only ever maximised.
    """
    num_rows, vocab_size = logits.shape
    k = min(k, vocab_size)
    num_blocks = vocab_size // _TOP_BLOCK
    if num_blocks < 4 * k:
        ids = torch.arange(vocab_size, device=logits.device).expand(num_rows, -1)
        return logits.amax(-1, keepdim=True), *first_largest(logits, ids, k)
    within = torch.arange(_TOP_BLOCK, device=logits.device)
    body = logits[:, : num_blocks * _TOP_BLOCK].unflatten(1, (num_blocks, _TOP_BLOCK))
    tail = logits[:, num_blocks * _TOP_BLOCK :]
    maxima = body.amax(-1)
    numbers = torch.arange(num_blocks, device=logits.device).expand(num_rows, -1)
    blocks = first_largest(maxima, numbers, k)[1].sort(-1).values.unsqueeze(-1)
    ids = (blocks * _TOP_BLOCK + within).flatten(1)
    values = body.gather(1, blocks.expand(-1, -1, _TOP_BLOCK)).flatten(1)
    top = maxima.amax(-1, keepdim=True)
    if tail.shape[1]:
        tail_ids = torch.arange(num_blocks * _TOP_BLOCK, vocab_size, device=logits.device).expand(
            num_rows, -1
        )
        values, ids = torch.cat([values, tail], 1), torch.cat([ids, tail_ids], 1)
        top = torch.maximum(top, tail.amax(-1, keepdim=True))
    return top, *first_largest(values, ids, k)


def first_largest(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their ids, by falling value, then rising id; ids rise along the
    row and fit 32 bits."""
    if values.dtype == torch.float64:
        order = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]
    else:
        bits = (values.float() + 0.0).view(torch.int32)  # + 0.0: −0 and 0 are one value
        rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders as the floats do
        order = (
            ((rank.long() << 32) - ids).topk(k, sorted=True).indices
        )  # unique keys: no tie is left to topk
    return values.gather(1, order), ids.gather(1, order)
