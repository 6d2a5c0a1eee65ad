"""Hidden states at the positions that predict a response: owns *the* next-token shift.

The output at position i predicts token i + 1, so a response of R tokens after a prompt of P tokens
is predicted by the R outputs from position P − 1 on. `predicting_positions` says so once; scoring,
gradients and training all ask it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tip_analysis.core.errors import ContextLengthError, OptionError
from tip_analysis.models.abilities import abilities
from tip_analysis.models.batching import pad_sequences
from tip_analysis.models.loading import device_of
from tip_analysis.models.token_model import TokenModel

Tokens = Sequence[int]


def predicting_positions(prompt_length: int, response_length: int) -> slice:
    """The positions whose outputs predict the response: the shift by one, here and nowhere else.

    Raises:
        OptionError: the prompt is empty, so that nothing predicts the first response token.
    """
    if prompt_length < 1:
        raise OptionError(
            "a prompt needs at least one token: nothing would predict the first token of the"
            " response"
        )
    return slice(prompt_length - 1, prompt_length - 1 + response_length)


def last_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Last hidden states [B, T, D] of the body, after its final norm: what the output head takes.

    Sequences of one call must be seen alike (`Abilities.frequencies`).
    """
    return abilities(model).run(input_ids, attention_mask, position_ids, **kwargs).last_hidden_state


def read_tokens(
    prompt: Tokens,
    response: Tokens,
    positions: Sequence[int] | np.ndarray,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """The tokens [T] that a model reads, and where [R] the outputs are that predict `positions` of
    the response."""
    first = predicting_positions(len(prompt), len(response)).start
    tokens = torch.tensor(_read(prompt, response), dtype=torch.long, device=device)
    return tokens, torch.as_tensor(positions, dtype=torch.long, device=device) + first


def _read(prompt: Tokens, response: Tokens) -> list[int]:
    """The tokens that a model reads: the last response token predicts nothing that counts and is
    not run."""
    return [*prompt, *response[:-1]]


def response_hidden_states(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    *,
    padding_side: str = "right",
    share_prompts: bool = False,
) -> list[Tensor]:
    """Last hidden states that predict each response: B tensors [R_b, D].

    Args:
        model: a causal language model; called in its present mode, with whatever autograd mode is
            in force.
        prompts: token ids of each prompt, at least one each.
        responses: token ids of each response.
        padding_side: where padding goes; it changes nothing beyond rounding.
        share_prompts: run each distinct prompt once and let its rollouts start from its key-value
            cache.
    """
    chosen = [range(len(response)) for response in responses]
    states = chosen_hidden_states(
        model, prompts, responses, chosen, padding_side=padding_side, share_prompts=share_prompts
    )
    return list(states.split([len(response) for response in responses]))


def chosen_hidden_states(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    chosen: Sequence[Sequence[int] | np.ndarray],
    *,
    padding_side: str = "right",
    share_prompts: bool = False,
) -> Tensor:
    """Last hidden states [N, D] that predict chosen response tokens, rollout after rollout.

    Args:
        model: as for `response_hidden_states`, as the arguments that are not named here.
        prompts: token ids of each prompt.
        responses: token ids of each response.
        chosen: positions in each response.
        padding_side: where padding goes.
        share_prompts: run each distinct prompt once.
    """

    def work(rows: list[int]) -> list[Tensor]:
        shown, written = [prompts[row] for row in rows], [responses[row] for row in rows]
        wanted = [chosen[row] for row in rows]
        if share_prompts and _can_share(model, shown, written):
            return _with_shared_prompts(model, shown, written, wanted)
        return _in_one_pass(model, shown, written, wanted, padding_side)

    lengths = [len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)]
    groups = _seen_alike(model, lengths)
    if len(groups) == 1:
        return torch.cat(work(groups[0]))
    states: dict[int, Tensor] = {}
    for rows in groups:
        states |= zip(rows, work(rows), strict=True)
    return torch.cat([states[row] for row in range(len(prompts))])


def _seen_alike(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences that one pass may read: a number must not depend on what shares its
    batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(abilities(model).frequencies(length), []).append(row)
    return list(groups.values())


def _can_share(
    model: PreTrainedModel, prompts: Sequence[Tokens], responses: Sequence[Tokens]
) -> bool:
    """Whether responses may go on from their prompts' cache, several tokens at once."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) - 1
    return abilities(model).keeps_only_keys and abilities(model).reads_as_short(longest)


def _in_one_pass(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    chosen: Sequence[Sequence[int] | np.ndarray],
    padding_side: str,
) -> list[Tensor]:
    """Whole sequences as one padded batch: the chosen states of each."""
    device = device_of(model)
    sequences = [_read(*pair) for pair in zip(prompts, responses, strict=True)]
    batch = pad_sequences(sequences, padding_side=padding_side, device=device)
    hidden = last_hidden_states(model, batch.input_ids, batch.attention_mask, batch.position_ids)
    width = batch.input_ids.shape[1]
    rows = [
        row * width
        + batch.starts[row]
        + predicting_positions(len(prompts[row]), len(responses[row])).start
        + np.asarray(at, dtype=np.int64)
        for row, at in enumerate(chosen)
    ]
    states = hidden.flatten(0, 1).index_select(
        0, torch.from_numpy(np.concatenate(rows)).to(hidden.device)
    )
    return list(states.split([len(at) for at in chosen]))


def _with_shared_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    chosen: Sequence[Sequence[int] | np.ndarray],
) -> list[Tensor]:
    """One pass over the distinct prompts, then one over the responses, which continue from the
    prompts' caches."""
    device = device_of(model)
    body = abilities(model)
    distinct = {
        tuple(prompt): index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))
    }
    source = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
    # Left padding: each prompt ends in the last column, so that responses begin in the next one.
    shared = pad_sequences(list(distinct), padding_side="left", device=device)
    cache = body.new_cache()
    output = body.run(shared.input_ids, shared.attention_mask, shared.position_ids, cache)
    first = output.last_hidden_state[:, -1][source]
    rows = [row for row, response in enumerate(responses) if len(response) > 1]
    states = [first[row : row + 1][: len(responses[row])] for row in range(len(responses))]
    if rows:
        tail = pad_sequences([_read((), responses[row]) for row in rows], device=device)
        cache.batch_select_indices(source[rows])
        prompt_mask = shared.attention_mask[source[rows]]
        output = body.run(
            tail.input_ids,
            torch.cat([prompt_mask, tail.attention_mask], dim=1),
            tail.position_ids + prompt_mask.sum(-1, keepdim=True),
            cache,
        ).last_hidden_state
        for index, row in enumerate(rows):
            states[row] = torch.cat([states[row], output[index, : len(responses[row]) - 1]])
    return [
        each if len(each) == len(at) else each[torch.as_tensor(at, device=each.device)]
        for each, at in zip(states, chosen, strict=True)
    ]


class Continuation:
    """Sequences of one batch that are written on, token by token, from a cache.

    They must be `Abilities.together`, and are written on no further than
    `Abilities.goes_on_until` says.
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Tokens]) -> None:
        """Read the sequences so far, each distinct one once; `hidden` [B, D] predicts the next
        token of each."""
        self._body = abilities(model)
        device = device_of(model)
        distinct = {row: index for index, row in enumerate(dict.fromkeys(map(tuple, sequences)))}
        batch = pad_sequences(list(distinct), padding_side="left", device=device)
        padded = self._body.keeps_only_keys
        self._cache = self._body.new_cache() if self._body.can_continue else None
        self._mask = batch.attention_mask if padded else None
        hidden = self._body.run(
            batch.input_ids, self._mask, batch.position_ids, self._cache
        ).last_hidden_state[:, -1]
        source = torch.tensor([distinct[tuple(row)] for row in sequences], device=device)
        self.hidden = hidden[source]
        self._next_position = batch.attention_mask.sum(-1)
        self._select(source)

    def _select(self, rows: Tensor) -> None:
        if isinstance(self._cache, DynamicCache):
            if self._body.keeps_only_keys:
                self._cache.batch_select_indices(rows)
            else:
                self._cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]
        self._mask = None if self._mask is None else self._mask[rows]
        self._next_position = self._next_position[rows]

    def step(self, kept: Tensor, tokens: Tensor) -> Tensor:
        """Go on with some rows, and one more token [n] for each of them; returns [n, D]."""
        if len(kept) < len(self._next_position):
            self._select(kept)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(kept), 1)], dim=1)
        self.hidden = self._body.run(
            tokens[:, None], self._mask, self._next_position[:, None], self._cache
        ).last_hidden_state[:, -1]
        self._next_position = self._next_position + 1
        return self.hidden


def check_context(model: TokenModel, rollout_ids: Iterable[str], lengths: Iterable[int]) -> None:
    """Refuse sequences longer than a model's context.

    Raises:
        ContextLengthError: names the first such rollout.
    """
    limit = model.context_length
    for rollout_id, length in zip(rollout_ids, lengths, strict=True):
        if limit is not None and length > limit:
            raise ContextLengthError(
                f"rollout {rollout_id!r} takes {length} tokens, but the context of {model.name}"
                f" ends at {limit}: shorten the prompts or lower --max-new-tokens"
            )
