"""The engine `server`: a model behind OpenAI's `/v1/completions`, such as `vllm serve`.

Prompts go out as token ids; the answer must hold the ids that were sampled (`return_token_ids`) and
the log-probability of each. Sampling defaults of the server's generation config are overridden one
by one. Text is never read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tip_analysis.core.errors import ContextLengthError, EngineError, OptionError
from tip_analysis.core.names import FinishReason, SamplingEngine
from tip_analysis.core.progress import Advance
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.engines.completions import CompletionsClient, in_parallel
from tip_analysis.rollouts.engines.engine import (
    Request,
    check_generation,
    head_bias,
    request_seed,
    stops_of,
)
from tip_analysis.rollouts.sampling import Generation, Sampling

REPRODUCIBLE = (
    "each rollout has a seed of its own; whether a rerun gives the same tokens is up to the"
    " server: its logits differ in their last bits with what else it is asked at the time"
)
"""What is put on record."""
_NO_DEFAULTS: Mapping[str, Any] = {
    "n": 1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "skip_special_tokens": False,
    "add_special_tokens": False,
    "logprobs": 1,
    "return_token_ids": True,
}


class ServerEngine:
    """A server that is there already; rollouts are asked for several at once."""

    kind = SamplingEngine.SERVER
    rollouts_per_shard = 128

    def __init__(self, author: TokenModel, client: CompletionsClient) -> None:
        self.author = author
        self.client = client
        self._bias = {str(row): bias for row, bias in head_bias(author).items()} or None

    def identity(self) -> dict[str, Any]:
        """The kind of engine, and the model as the server names it."""
        return {"engine": self.kind, "served_model": self.client.model}

    def facts(self) -> dict[str, Any]:
        """Where the server is, and how far a rerun gives the same."""
        return {"server": self.client.address, "reproducible": REPRODUCIBLE}

    def expect(self, longest: int) -> None:
        """Refuse what is longer than the server takes.

        Raises:
            ContextLengthError: it is.
        """
        limit = self.client.max_model_len
        if limit is not None and longest > limit:
            raise ContextLengthError(
                f"prompts and responses take up to {longest} tokens, but {self.client.address}"
                f" serves up to {limit}: start it with a larger --max-model-len, or lower"
                " --max-new-tokens"
            )

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Advance | None = None
    ) -> list[Generation]:
        """One continuation for each request, in their order.

        Raises:
            EngineError: the server fails for good, or answers what is no continuation.
        """
        made: dict[int, Generation] = {}
        found = in_parallel(
            range(len(requests)), lambda row: self._generate(requests[row], sampling), self.client
        )
        for row, generation in found:
            made[row] = generation
            if advance is not None:
                advance(1, tokens=len(generation.token_ids))
        return [made[row] for row in range(len(requests))]

    def _generate(self, request: Request, sampling: Sampling) -> Generation:
        payload = {
            "prompt": list(request.token_ids),
            "max_tokens": request.limit(sampling),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "seed": request_seed(sampling.seed, request.name),
            "stop_token_ids": stops_of(self.author),
            "logit_bias": self._bias,
            **_NO_DEFAULTS,
        }
        generation = self.client.complete(payload, lambda choice: self._read(choice, request))
        check_generation(request, generation, sampling, self.author)
        return generation

    def _read(self, choice: Mapping[str, Any], request: Request) -> Generation:
        ids, shown = choice.get("token_ids"), choice.get("prompt_token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None or logprobs is None:
            missing = "token ids" if ids is None else "log-probabilities"
            raise EngineError(
                f"{self.client.address} returns no {missing}: rollouts need the very tokens that"
                " were sampled. `vllm serve` returns them from 0.10.2 on (return_token_ids)"
            )
        if shown is not None and list(shown) != list(request.token_ids):
            raise EngineError(
                f"{self.client.address} read another prompt than it was given for"
                f" {request.name!r}: it must take token ids as they are"
            )
        if (reason := choice.get("finish_reason")) not in ("stop", "length"):
            raise EngineError(
                f"{self.client.address} ended {request.name!r} for the reason {reason!r}; expected"
                " stop or length"
            )
        return Generation(
            [int(one) for one in ids], [float(one) for one in logprobs], FinishReason(reason)
        )

    def update(self, student: LanguageModel) -> None:
        """Refused: the server has weights of its own.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            "--engine server cannot train: a server keeps the weights that it was started with; use"
            " --engine hf or vllm"
        )

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
