"""One property over many architectures: numbers and samples are those of each sequence alone, read
in one pass without padding or cache by a fresh copy of the model."""

import copy

import pytest
import torch
from tiny_models import tiny_model
from zoo import SHORT, SWITCH, ZOO, zoo_language_model, zoo_model

from tip_analysis.models.abilities import abilities
from tip_analysis.models.hidden_states import response_hidden_states
from tip_analysis.models.output_head import OutputHead
from tip_analysis.rollouts.sampling import Sampling, generate

PROMPTS = [[5, 9, 14, 3], [5, 9, 14, 3], [7, 8], [11, 4, 22, 30, 6, 9, 1]]
RESPONSES = [
    [10, 20, 30, 2],
    [12, 6, 7, 8, 9, 10, 11, 12, 40, 41, 3, 9],
    [33],
    [15, 16, 17, 18, 19, 20],
]
"""Unequal lengths; the second goes beyond `SWITCH`, and with 14 sampled tokens so do all."""
NAMES = ["a/0", "a/1", "b/0", "c/0"]

everything = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in ZOO]
)


def logprobs_alone(model, sequence):
    """ln P of what follows each token: one pass of a copy that has read nothing before."""
    with torch.no_grad():
        output = copy.deepcopy(model)(input_ids=torch.tensor([sequence]), use_cache=False)
    return output.logits[0].log_softmax(-1)


def test_the_zoo_holds_all_kinds():
    assert len(ZOO) >= 24
    assert set(SHORT) <= ZOO.keys()
    assert any(len(p) + len(r) - 1 > SWITCH for p, r in zip(PROMPTS, RESPONSES, strict=True))
    assert any(len(p) + len(r) - 1 <= SWITCH for p, r in zip(PROMPTS, RESPONSES, strict=True))


@everything
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_scores_are_those_of_each_sequence_alone(name, order, share_prompts):
    model = zoo_model(name)
    fresh = copy.deepcopy(model)
    head = OutputHead(model)
    head.verify()
    prompts, responses = [PROMPTS[i] for i in order], [RESPONSES[i] for i in order]
    with torch.no_grad():
        states = response_hidden_states(model, prompts, responses, share_prompts=share_prompts)
        for prompt, response, state in zip(prompts, responses, states, strict=True):
            expected = logprobs_alone(fresh, [*prompt, *response[:-1]])[len(prompt) - 1 :]
            torch.testing.assert_close(head(state).log_softmax(-1), expected, atol=1e-5, rtol=0)


@everything
def test_samples_are_those_of_each_sequence_alone(name):
    model = zoo_language_model(name)
    fresh = copy.deepcopy(model.model)
    sampling = Sampling(max_new_tokens=14, seed=3)
    together = generate(model, PROMPTS, NAMES, sampling)
    assert max(len(g.token_ids) for g in together) == 14
    for prompt, rollout, found in zip(PROMPTS, NAMES, together, strict=True):
        alone = generate(model, [prompt], [rollout], sampling)[0]
        assert alone.token_ids == found.token_ids
        written = found.token_ids
        expected = [
            float(logprobs_alone(fresh, [*prompt, *written[:t]])[-1][token])
            for t, token in enumerate(written)
        ]
        torch.testing.assert_close(
            torch.tensor(found.logprobs), torch.tensor(expected), atol=1e-5, rtol=0
        )


def test_a_key_value_cache_is_shared_between_rollouts_and_others_are_not():
    assert abilities(tiny_model("qwen3")).keeps_only_keys
    assert abilities(tiny_model("gemma2")).keeps_only_keys
    for name in ("mamba", "qwen3_5", "falcon_h1", "rwkv", "xlstm"):
        assert not abilities(zoo_model(name)).keeps_only_keys
    assert abilities(zoo_model("qwen3_5")).can_continue
    for name in ("rwkv", "xlstm"):  # their caches are of classes of their own
        assert not abilities(zoo_model(name)).can_continue


def test_a_cache_that_does_not_step_as_one_pass_is_not_used(monkeypatch):
    model = zoo_language_model("qwen3_5")
    body = abilities(model.model)
    run = body.run

    def off(*args, cache=None, **kwargs):
        output = run(*args, cache=cache, **kwargs)
        if cache is not None:
            output.last_hidden_state = output.last_hidden_state * 1.1
        return output

    monkeypatch.setattr(body, "run", off)
    assert not body.can_continue
    monkeypatch.undo()
    sampling = Sampling(max_new_tokens=5)
    slow = generate(model, PROMPTS, NAMES, sampling)
    again = generate(zoo_language_model("qwen3_5"), PROMPTS, NAMES, sampling)
    assert [g.token_ids for g in slow] == [g.token_ids for g in again]


def test_frequencies_are_those_of_the_length_read_whatever_was_read_before():
    model = zoo_model("llama_dynamic")
    fresh = copy.deepcopy(model)
    for length in (30, 20, SWITCH, 25, 5):
        tokens = [1 + (3 * i) % 40 for i in range(length)]
        states = response_hidden_states(model, [tokens[:2]], [[*tokens[2:], 0]])[0]
        found = OutputHead(model)(states).log_softmax(-1)
        torch.testing.assert_close(found, logprobs_alone(fresh, tokens)[1:], atol=1e-5, rtol=0)
