"""Causal attention in blocks of queries, and its forward-mode tangent beside its value.

The masked half of the scores is never computed, and no [T, T] matrix is kept. Sequences come one at
a time, without padding.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class ScoreForm:
    """The form of the scores: scale, window and cap; and the blocks that queries come in."""

    def __init__(self, scaling: float, window: int | None, cap: float | None) -> None:
        self.scaling = scaling
        self.window = window
        self.cap = cap

    def blocks(self, length: int) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that any of them sees."""
        size = 128 if length <= 1024 else 256
        for start in range(0, length, size):
            stop = min(start + size, length)
            yield (
                slice(start, stop),
                slice(0 if self.window is None else max(0, start - self.window + 1), stop),
            )

    def mask(self, queries: slice, keys: slice, like: Tensor) -> Tensor:
        """0 where a query sees a key, −inf elsewhere: [queries, keys]."""
        query = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=like.device)[None]
        hidden = (
            key > query if self.window is None else (key > query) | (key <= query - self.window)
        )
        return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
            hidden, float("-inf")
        )

    def softmax(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Attention probabilities [..., G·b, t] of scores that are capped already, in float32 or
        better."""
        precise = torch.promote_types(scores.dtype, torch.float32)
        *lead, grouped, keys = scores.shape
        blocks = scores.to(precise).view(*lead, -1, mask.shape[0], keys) + mask.to(precise)
        return torch.softmax(blocks, -1).view(*lead, grouped, keys)


def _grouped(query: Tensor, num_key_heads: int, part: slice) -> Tensor:
    """Queries [B, H, T, D] of a block, those that share a key head side by side: [B, H_kv, G·b,
    D]."""
    batch, heads, _, width = query.shape
    return query.view(batch, num_key_heads, heads // num_key_heads, -1, width)[
        :, :, :, part
    ].flatten(2, 3)


def _ungrouped(output: Tensor, heads: int, length: int) -> Tensor:
    """[B, H_kv, G·b, D] to [B, b, H, D]."""
    return output.reshape(output.shape[0], heads, length, -1).transpose(1, 2)


def attend(form: ScoreForm, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [B, T, H, D_v] of queries [B, H, T, D_k] to keys and values [B, H_kv, T, …], where
    H_kv divides H."""
    heads, query = query.shape[1], query.contiguous() * form.scaling
    outputs = []
    for queries, keys in form.blocks(query.shape[2]):
        block = _grouped(query, key.shape[1], queries)
        scores = block @ key[:, :, keys].transpose(-1, -2)
        if form.cap is not None:
            scores = torch.tanh(scores / form.cap) * form.cap
        weights = form.softmax(scores, form.mask(queries, keys, scores)).to(value.dtype)
        outputs.append(_ungrouped(weights @ value[:, :, keys], heads, queries.stop - queries.start))
    return torch.cat(outputs, dim=1)


def attend_tangent(
    form: ScoreForm, primals: Sequence[Tensor], tangents: Sequence[Tensor | None], output: Tensor
) -> Tensor:
    """Tangents [c, T, H, D_v] of attention: with W = P∘Ṡ, ȯ = W v + P v̇ − (W 1)∘o.

    Args:
        form: of the scores S; P is their softmax.
        primals: query, key and value, [1, …] each.
        tangents: theirs, [c, …] each; None where it is zero.
        output: o [1, T, H, D_v], what `attend` gave.
    """
    query, key, value = primals
    heads, num_key_heads = query.shape[1], key.shape[1]
    query = query.contiguous() * form.scaling
    q_tangent, k_tangent, v_tangent = tangents
    if q_tangent is not None:
        q_tangent = q_tangent.contiguous() * form.scaling
    result = []
    for queries, keys in form.blocks(query.shape[2]):
        block, seen, length = (
            _grouped(query, num_key_heads, queries),
            key[:, :, keys],
            queries.stop - queries.start,
        )
        scores = block @ seen.transpose(-1, -2)
        change = torch.zeros_like(scores)
        if q_tangent is not None:
            change = _grouped(q_tangent, num_key_heads, queries) @ seen.transpose(-1, -2)
        if k_tangent is not None:
            change = change + block @ k_tangent[:, :, keys].transpose(-1, -2)
        if form.cap is not None:
            capped = torch.tanh(scores / form.cap)
            change, scores = change * (1 - capped.square()), capped * form.cap
        weights = form.softmax(scores, form.mask(queries, keys, scores))
        change = change.to(weights.dtype).mul_(weights)
        own = _grouped(output.transpose(1, 2).contiguous(), num_key_heads, queries)
        tangent = (
            change.to(value.dtype) @ value[:, :, keys]
            - change.sum(-1, keepdim=True).to(value.dtype) * own
        )
        if v_tangent is not None:
            tangent = tangent + weights.to(value.dtype) @ v_tangent[:, :, keys]
        result.append(_ungrouped(tangent, heads, length))
    return torch.cat(result, dim=1)
