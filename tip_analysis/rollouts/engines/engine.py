"""What an engine is: token ids in, token ids out.

A request continues any prefix of token ids, be it a prompt or a conversation in its third turn;
requests of one call may be at different turns. An engine gives back the very ids that were sampled,
end of sequence included, ln P of each at temperature 1, and why the response ended. Nothing is
decoded and encoded again on the way.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tip_analysis.core.errors import EngineError
from tip_analysis.core.names import FinishReason, SamplingEngine
from tip_analysis.core.progress import Advance
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.token_model import TokenModel
from tip_analysis.models.unloaded import rows_without_token
from tip_analysis.rollouts.sampling import Generation, Sampling

LOGPROB_ROUNDING = 1e-3
"""How far above 0 rounding may take a log-probability."""

MOST_BIASED = 1024
"""Rows of a head that are no token, up to which each request names them."""


@dataclass(frozen=True)
class Request:
    """A prefix that is to be continued."""

    name: str
    """The random numbers of the continuation belong to it: unique within a seed, one for each turn
    of a conversation."""
    token_ids: Sequence[int]
    """Everything before the continuation."""
    max_new_tokens: int | None = None
    """Longest continuation; by default the sampling's."""

    def limit(self, sampling: Sampling) -> int:
        """Longest continuation, in tokens."""
        return sampling.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens


class Engine(Protocol):
    """Writes continuations."""

    @property
    def kind(self) -> SamplingEngine:
        """Its name on the command line and in tables."""
        ...

    @property
    def author(self) -> TokenModel:
        """The model that writes: its tokenizer, stop tokens and context."""
        ...

    @property
    def rollouts_per_shard(self) -> int:
        """Rollouts of a stage that it should be given at once: what is lost when it fails."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides, beside model and sampling, which tokens are written: part of a stage's
        configuration, so that a run is not continued by another engine."""
        ...

    def facts(self) -> dict[str, Any]:
        """What is recorded besides: version, how it was set up, how far a rerun gives the same."""
        ...

    def expect(self, longest: int) -> None:
        """Be told, before the first request, how long the longest sequence will be, continuation
        included; again where it will be longer."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Advance | None = None
    ) -> list[Generation]:
        """One continuation for each request, in their order.

        Args:
            requests: what to continue.
            sampling: temperature, nucleus, length limit and seed.
            advance: told of progress, in continuations.

        Raises:
            EngineError: it failed, or answered what is no continuation.
        """
        ...

    def update(self, student: LanguageModel) -> None:
        """Write with the weights that `student` has now.

        Raises:
            OptionError: this engine's weights cannot be changed.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds; it writes no more."""
        ...


def request_seed(seed: int, name: str) -> int:
    """A seed in [0, 2^53) that belongs to (seed, name): what engines with a seed for each request
    are given. JSON keeps it exactly."""
    digest = hashlib.sha256(f"{seed}\x00{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 11


def check_generation(
    request: Request, generation: Generation, sampling: Sampling, author: TokenModel
) -> None:
    """Refuse an answer that is no continuation by this model.

    Raises:
        EngineError: says what was expected and what came.
    """
    ids, logprobs, limit = generation.token_ids, generation.logprobs, request.limit(sampling)
    stops = generation.finish_reason is FinishReason.STOP
    if not ids or len(ids) > limit:
        problem = f"{len(ids)} tokens where 1 to {limit} were asked for"
    elif len(ids) != len(logprobs):
        problem = f"{len(ids)} tokens, but {len(logprobs)} log-probabilities"
    elif strange := [one for one in ids if not 0 <= one < author.vocab_size]:
        problem = (
            f"the token id {strange[0]}, outside the vocabulary of {author.vocab_size:,} tokens:"
            " is it the same model?"
        )
    elif not all(-math.inf <= one <= LOGPROB_ROUNDING for one in logprobs):
        problem = "a log-probability that is none"
    elif stops and ids[-1] not in author.stop_token_ids:
        problem = (
            f"the end {ids[-1]}, which is none of the stop tokens of {author.name}"
            f" ({', '.join(map(str, sorted(author.stop_token_ids)))}): is it the same model?"
        )
    elif not stops and len(ids) < limit:
        problem = f"{len(ids)} of {limit} tokens, and no stop token"
    else:
        return
    raise EngineError(f"the engine's answer to {request.name!r} has {problem}")


def stops_of(author: TokenModel) -> list[int]:
    """The tokens at which an engine is to stop, rising."""
    return sorted(author.stop_token_ids)


def head_bias(author: TokenModel) -> dict[int, float]:
    """What keeps an engine from sampling rows of the head that are no token, as far as one request
    can say so."""
    rows = rows_without_token(author)
    return dict.fromkeys(rows, -100.0) if len(rows) <= MOST_BIASED else {}
