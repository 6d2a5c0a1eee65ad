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
from tip_analysis.models.batching import pad_sequences
from tip_analysis.models.loading import LanguageModel, model_body

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
    """Last hidden states [B, T, D] of the body, after its final norm: what the output head
    takes."""
    return model_body(model)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        **kwargs,
    ).last_hidden_state


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
    device = model.get_input_embeddings().weight.device
    if share_prompts:
        states = _with_shared_prompts(model, prompts, responses)
        return torch.cat(
            [
                each if len(each) == len(at) else each[torch.as_tensor(at, device=each.device)]
                for each, at in zip(states, chosen, strict=True)
            ]
        )
    sequences = [_read(*pair) for pair in zip(prompts, responses, strict=True)]
    batch = pad_sequences(sequences, padding_side=padding_side, device=device)  # pyright: ignore[reportArgumentType]
    hidden = last_hidden_states(model, batch.input_ids, batch.attention_mask, batch.position_ids)
    width = batch.input_ids.shape[1]
    rows = [
        row * width
        + batch.starts[row]
        + predicting_positions(len(prompts[row]), len(responses[row])).start
        + np.asarray(at, dtype=np.int64)
        for row, at in enumerate(chosen)
    ]
    return hidden.flatten(0, 1).index_select(
        0, torch.from_numpy(np.concatenate(rows)).to(hidden.device)
    )


def _with_shared_prompts(
    model: PreTrainedModel, prompts: Sequence[Tokens], responses: Sequence[Tokens]
) -> list[Tensor]:
    """One pass over the distinct prompts, then one over the responses, which continue from the
    prompts' caches."""
    device = model.get_input_embeddings().weight.device
    distinct = {
        tuple(prompt): index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))
    }
    source = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)  # pyright: ignore
    # Left padding: each prompt ends in the last column, so that responses begin in the next one.
    shared = pad_sequences(list(distinct), padding_side="left", device=device)  # pyright: ignore[reportArgumentType]
    cache = DynamicCache(config=model.config)
    output = model_body(model)(
        input_ids=shared.input_ids,
        attention_mask=shared.attention_mask,
        position_ids=shared.position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    first = output.last_hidden_state[:, -1][source]
    rows = [row for row, response in enumerate(responses) if len(response) > 1]
    states = [first[row : row + 1][: len(responses[row])] for row in range(len(responses))]
    if not rows:
        return states
    tail = pad_sequences([_read((), responses[row]) for row in rows], device=device)  # pyright: ignore[reportArgumentType]
    cache.batch_select_indices(source[rows])
    prompt_lengths = shared.attention_mask.sum(-1)[source[rows]]
    output = model_body(model)(
        input_ids=tail.input_ids,
        attention_mask=torch.cat([shared.attention_mask[source[rows]], tail.attention_mask], dim=1),
        position_ids=tail.position_ids + prompt_lengths[:, None],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    for index, row in enumerate(rows):
        states[row] = torch.cat([states[row], output[index, : len(responses[row]) - 1]])
    return states


def check_context(model: LanguageModel, rollout_ids: Iterable[str], lengths: Iterable[int]) -> None:
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
