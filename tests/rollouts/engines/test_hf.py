from dataclasses import replace

import pytest
from tiny_models import tiny_language_model

from tip_analysis.core.errors import EngineError
from tip_analysis.core.names import FinishReason
from tip_analysis.models.batching import TokenBudget
from tip_analysis.rollouts.engines.engine import Request, check_generation, request_seed
from tip_analysis.rollouts.engines.hf import HFEngine
from tip_analysis.rollouts.sampling import Generation, Sampling, generate

SAMPLING = Sampling(max_new_tokens=12, seed=5)
PREFIXES = [[1, 4, 5, 6], [1, 9], [1, 12, 13, 14, 15, 16, 4, 4, 9]]


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


def requests(limits=(None, None, None)):
    return [
        Request(f"r/{row}", prefix, limit)
        for row, (prefix, limit) in enumerate(zip(PREFIXES, limits, strict=True))
    ]


def test_any_prefix_goes_on_as_the_sampler_alone_writes_it(model):
    engine = HFEngine(model, TokenBudget(1000))
    found = engine.generate(requests(), SAMPLING)
    for row, prefix in enumerate(PREFIXES):
        assert (
            found[row].token_ids == generate(model, [prefix], [f"r/{row}"], SAMPLING)[0].token_ids
        )


def test_each_request_may_have_its_own_limit(model):
    engine, told = HFEngine(model, TokenBudget(1000)), []
    found = engine.generate(
        requests((3, 12, 1)), SAMPLING, lambda items=1, *, tokens=0: told.append((items, tokens))
    )
    free = engine.generate(requests(), SAMPLING)
    for short, long, limit in zip(found, free, (3, 12, 1), strict=True):
        assert short.token_ids == long.token_ids[:limit]  # a limit takes no random number away
        cut_off = len(long.token_ids) > limit
        assert (short.finish_reason is FinishReason.LENGTH) or not cut_off
    assert sum(items for items, _ in told) == 3
    assert sum(tokens for _, tokens in told) == sum(len(g.token_ids) for g in found)


def test_it_writes_with_the_weights_that_it_was_given_last(model):
    engine, other = HFEngine(model, TokenBudget(1000)), tiny_language_model(seed=1)
    before = engine.generate(requests(), SAMPLING)
    engine.update(other)
    assert engine.author is other
    assert engine.generate(requests(), SAMPLING) != before


def test_seeds_belong_to_seed_and_name():
    seeds = {request_seed(seed, f"r/{row}") for seed in range(50) for row in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= one < 2**53 for one in seeds)
    assert request_seed(0, "r/0") == request_seed(0, "r/0")


SOUND = Generation([4, 5], [-0.5, -0.1], FinishReason.LENGTH)
TWO = Sampling(max_new_tokens=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [], "logprobs": []}, "0 tokens where 1 to 2"),
        ({"token_ids": [4] * 3, "logprobs": [-1.0] * 3}, "3 tokens where 1 to 2"),
        ({"logprobs": [-0.5]}, "2 tokens, but 1 log-prob"),
        ({"token_ids": [4, 10**6]}, "token id 1000000, outside the vocabulary of"),
        ({"token_ids": [-1, 4]}, "token id -1"),
        ({"logprobs": [-0.5, 0.5]}, "log-probability"),
        ({"logprobs": [-0.5, float("nan")]}, "log-probability"),
        ({"finish_reason": FinishReason.STOP}, "the end 5, which is none of the stop tokens"),
        ({"token_ids": [4], "logprobs": [-1.0]}, "1 of 2 tokens, and no stop token"),
    ],
)
def test_an_answer_that_is_no_continuation_is_refused(model, change, message):
    request = Request("r/0", [1])
    check_generation(request, SOUND, TWO, model)
    with pytest.raises(EngineError, match=f"'r/0'.*{message}"):
        check_generation(request, replace(SOUND, **change), TWO, model)
