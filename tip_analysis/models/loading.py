"""Loading models and tokenizers: the one place that does.

A model is named by a hub id (`id@revision`), a local folder (a LoRA adapter's too), a `.gguf` file,
or a built-in name. Weights come from safetensors or GGUF only, never from pickles, and no code from
a repository is run.

A causal language model is used in two halves: the body, whose last hidden states are [B, T, D], and
the output head, which turns any [N, D] of them into logits [N, V]. The [B, T, V] tensor that the
whole model would make never exists. The head is checked against the model's own logits when a model
is loaded.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from tip_analysis.core.errors import (
    ModelError,
    OptionError,
    UnknownNameError,
    VocabularyMismatchError,
)
from tip_analysis.core.text import first_line
from tip_analysis.models.locating import DEVICE_TYPES, DTYPE_NAMES, locate
from tip_analysis.models.weights import LOADING_ERRORS, load_tokenizer_files, load_weights

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}

HEAD_TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.float32: 1e-4,
    torch.float64: 1e-9,
}
"""How far two ways to the same numbers may be apart, relative to their largest magnitude: a few
roundings."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer, and what a record says of them."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: "OutputHead"

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the output head, padding rows included."""
        return self.head.vocab_size

    @property
    def context_length(self) -> int | None:
        """The longest sequence that the model accepts, where its config says so."""
        config = self.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if longest is not None and rope.get("rope_type") == "dynamic":
            return int(longest * rope.get("factor", 1.0))  # it is the length before scaling
        return longest

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """The ids of the tokenizer's tokens; they may have gaps."""
        return frozenset(self.tokenizer.get_vocab().values())

    @cached_property
    def rows_without_token(self) -> Tensor | None:
        """Rows of the output head that are no token (padding, gaps in the ids): never sampled;
        None where there are none, or no tokenizer."""
        if self.tokenizer is None:
            return None
        rows = sorted(set(range(self.vocab_size)) - self.token_ids)
        return torch.tensor(rows) if rows else None

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a rollout: those of the generation config and the tokenizer's end of
        sequence."""
        configured: Any = getattr(self.model.generation_config, "eos_token_id", None)
        ends: Any = self.tokenizer.eos_token_id
        ids = [configured] if isinstance(configured, int) else list(configured or [])
        return frozenset(ids if ends is None else [*ids, ends])

    def describe(self) -> dict[str, Any]:
        """What `run.json` records: name, fingerprints, |V|, dtype, architecture."""
        return {
            "name": self.name,
            "architecture": type(causal_model(self.model)).__name__,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "weights_fingerprint": weights_fingerprint(self.model),
            "tokenizer_fingerprint": tokenizer_fingerprint(self.tokenizer),
            "vocab_size": self.vocab_size,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class OutputHead:
    """Hidden states [N, D] to logits [N, V], as the model itself does it: soft-capping and logit
    scale included.

    Raises:
        ModelError: the model has no output embedding, or `verify` cannot reproduce its logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = causal_model(model)
        linear = self._model.get_output_embeddings()
        if linear is None:
            raise ModelError(
                f"{type(self._model).__name__} has no output head: expected a causal language model"
            )
        self.linear: nn.Module = linear
        self.vocab_size = int(linear.weight.shape[0])  # pyright: ignore[reportArgumentType]
        self._finish = _logit_transform(self._model.config.get_text_config())
        self._body_output: ModelOutput | None = (
            None  # set where the model's own forward must be used
        )

    @property
    def device(self) -> torch.device:
        """Where hidden states go."""
        return self.linear.weight.device  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of last hidden states [N, D]."""
        if self._body_output is not None:
            return self._through_model(hidden, self._body_output)
        return self._finish(self.linear(hidden))

    def _through_model(self, hidden: Tensor, body_output: ModelOutput) -> Tensor:
        """The model's whole forward, its body replaced by one that answers `hidden`: slower, but
        always its own logits."""
        answer = copy.copy(body_output)
        answer["last_hidden_state"] = hidden.unsqueeze(0)
        body = model_body(self._model)
        body.forward = lambda *args, **kwargs: answer  # pyright: ignore[reportAttributeAccessIssue]
        try:
            tokens = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
            return self._model(input_ids=tokens, use_cache=False).logits[0]
        finally:
            del body.forward

    def _some_tokens(self) -> Tensor:
        """Eight tokens [1, 8], evenly spaced over the vocabulary."""
        weight: Tensor = self._model.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]
        size = min(self.vocab_size, weight.shape[0])
        tokens = torch.arange(8, device=weight.device).mul(max(1, size // 8))
        return tokens.remainder(size).unsqueeze(0)

    @torch.no_grad()
    def verify_causal(self) -> None:
        """Refuse a model whose output at a token changes with the tokens after it.

        Raises:
            ModelError: it does (bert and others of its kind).
        """
        tokens = self._some_tokens()
        # Two rows of one pass, which differ after the fourth token: the same kernels, so that even
        # in low precision hardly a rounding lies between them.
        rows = torch.cat([tokens, tokens[:, :4].repeat(1, 2)])
        output = model_body(self._model)(input_ids=rows, use_cache=False).last_hidden_state
        one, other = output[:, :4].float()
        # The median: one token sent to another expert by a rounding is no dependence on the future.
        change = (one - other).abs().amax(-1).median() / output.abs().max().clamp(min=1e-6)
        if change > HEAD_TOLERANCE[self._model.dtype] / 10:
            raise ModelError(
                f"{type(self._model).__name__} is no causal language model: what it says at a token"
                " depends on the tokens after it"
            )

    @torch.no_grad()
    def verify(self) -> None:
        """Compare with the model's own logits on a short input; where the plain head differs, use
        the model's own forward."""
        tokens = self._some_tokens()
        own = self._model(input_ids=tokens, use_cache=False).logits[0]
        body_output = model_body(self._model)(input_ids=tokens, use_cache=False)
        hidden = body_output.last_hidden_state[0]
        if _close(self(hidden), own):
            return
        self._body_output = body_output
        if not _close(self(hidden), own):
            raise ModelError(
                f"the logits of {type(self._model).__name__} cannot be rebuilt from its last hidden"
                " states"
            )
        logger.warning(
            "%s: logits go through the model's own forward, which is slower",
            type(self._model).__name__,
        )


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", attention: str | None = None
) -> LanguageModel:
    """Load a model and its tokenizer, in evaluation mode, without gradients.

    Args:
        name: hub id (`id@revision`), local folder, LoRA adapter folder, `.gguf` file, or one of
            `BUILT_IN`.
        dtype: `auto` (bfloat16 where the device computes in it natively, else float32) or a name of
            `DTYPES`.
        device: `auto` (one GPU; several GPUs share a model), `cpu`, `cuda`, `cuda:1`, `mps` …
        attention: attention implementation of transformers, such as `eager`; by default the
            library's choice.

    Raises:
        ModelError: there is no such model, or it cannot be loaded; the message says why.
        UnknownNameError: an unknown dtype.
    """
    folder, options = locate(name)
    placement = _placement(device)
    kwargs: dict[str, Any] = {
        "dtype": resolve_dtype(name, dtype, placement),
        "trust_remote_code": False,
    }
    if attention is not None:
        kwargs["attn_implementation"] = attention
    if placement == "several":
        kwargs["device_map"] = "auto"
    try:
        with _without_bars():
            model = load_weights(folder, options, kwargs)
        tokenizer = load_tokenizer_files(folder, options)
        if placement != "several":
            model = model.to(placement)  # pyright: ignore[reportArgumentType]
    except LOADING_ERRORS as error:
        raise ModelError(f"cannot load the model {name!r}: {first_line(error)}") from error
    model = model.eval().requires_grad_(False)
    avoid_grouped_kernels(model)
    head = OutputHead(model)
    head.verify()
    head.verify_causal()
    return LanguageModel(name, model, tokenizer, head)


def avoid_grouped_kernels(model: nn.Module) -> None:
    """Let a float64 mixture of experts use its plain experts: grouped kernels are for less
    precision."""
    causal: Any = causal_model(model)
    if causal.dtype == torch.float64 and has_experts(causal):
        causal.set_experts_implementation("eager")


def has_experts(model: nn.Module) -> bool:
    """Whether a model has experts whose implementation can be chosen."""
    return any(type(module).__name__.endswith("Experts") for module in model.modules())


def overflow_hint(model: LanguageModel) -> str:
    """What to say beside NaN or infinite logits: the usual cause where weights are float16."""
    if model.dtype != torch.float16:
        return ""
    return (
        ": float16 ends at 65504, and activations of this model go beyond it; load it with --dtype"
        " bfloat16 or float32"
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone, without its weights.

    Raises:
        ModelError: there is no such model, or its tokenizer cannot be loaded.
    """
    folder, options = locate(name)
    try:
        return load_tokenizer_files(folder, options)
    except LOADING_ERRORS as error:
        raise ModelError(f"cannot load the tokenizer of {name!r}: {first_line(error)}") from error


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model under a PEFT wrapper (its adapters stay in place), or the model
    itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def model_body(model: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in the last hidden states; of a model of two
    parts (vision and text), the text's.

    Found by what it is, not by its name: the smallest part of the model that holds the input
    embedding and not the output head, and gives hidden states.

    Raises:
        ModelError: there is no such part.
    """
    causal = causal_model(model)
    body = _holding_text(causal)
    if body is None:
        raise ModelError(
            f"{type(causal).__name__}: found no part that turns tokens into hidden states"
        )
    return body


def _holding_text(causal: PreTrainedModel) -> nn.Module | None:
    """Go down from the whole model to the part that reads tokens, past its output head."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    part: Any = causal.base_model
    while part is causal or (head is not None and _holds(part, head)) or _has_parts(part):
        inside = [
            child
            for child in part.children()
            if isinstance(child, PreTrainedModel) and _holds(child, embedding)
        ]
        if not inside:
            return None if part is causal else part
        part = inside[0]
    return part


def _has_parts(module: nn.Module) -> bool:
    """Whether text is one part of several: the config then holds a config for it."""
    config = getattr(module, "config", None)
    return config is not None and config.get_text_config() is not config


def _holds(module: nn.Module, wanted: nn.Module) -> bool:
    return any(part is wanted for part in module.modules())


def shared_vocabulary(student: LanguageModel, teacher: LanguageModel) -> int:
    """|V|, the number of logit rows that student and teacher share; heads padded to different sizes
    are cut to it.

    Raises:
        VocabularyMismatchError: some token has another id; the message names the first.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        by_id, other = _inverse(ours), _inverse(theirs)
        token_id = min(
            index for index in by_id.keys() | other.keys() if by_id.get(index) != other.get(index)
        )
        raise VocabularyMismatchError(
            f"{student.name} and {teacher.name} do not share a vocabulary: token id {token_id} is"
            f" {by_id.get(token_id)!r} for the student and {other.get(token_id)!r} for the teacher"
            f" ({len(ours)} and {len(theirs)} tokens). Distillation on logits needs one"
            " token-to-id map"
        )
    shared = min(student.vocab_size, teacher.vocab_size)
    if shared <= max(ours.values()):
        raise VocabularyMismatchError(
            f"the tokenizer has ids up to {max(ours.values())}, but the smaller output head has"
            f" only {shared} rows"
        )
    return shared


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> dict[int, str]:
    """The text of each distinct token as it stands inside a response, spaces before it included.

    Each is decoded after an ordinary token, since some tokenizers strip the space from the first.
    Bytes that are no text on their own appear as U+FFFD.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # pyright: ignore[reportIndexIssue]
    before = str(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))

    def text(token_id: int) -> str:
        return str(
            tokenizer.decode([*anchor, token_id], clean_up_tokenization_spaces=False)
        ).removeprefix(before)

    return {token_id: text(token_id) for token_id in set(token_ids)}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the token-to-id map."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode()).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of the config's shape and of up to 256 evenly spaced values of every parameter: quick at
    any size."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def resolve_device(device: str) -> torch.device:
    """The device that `auto` stands for, or the named one.

    Raises:
        OptionError: there is no such device.
    """
    if device == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        return torch.device(name)
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise OptionError(
            f"--device {device!r}: expected auto, cpu, cuda, cuda:N or mps"
        ) from error
    if resolved.type not in DEVICE_TYPES:
        raise OptionError(f"--device {device!r}: expected auto, cpu, cuda, cuda:N or mps")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError("--device 'mps': not available on this machine")
    return resolved


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers: a line of ours says what is loaded."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    if shown:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _placement(device: str) -> torch.device | str:
    return (
        "several" if device == "auto" and torch.cuda.device_count() > 1 else resolve_device(device)
    )


def resolve_dtype(name: str, dtype: str, placement: torch.device | str) -> torch.dtype:
    """The dtype that `auto` stands for, or the named one."""
    if dtype == "auto":
        if name.startswith("arithmetic-"):
            return torch.float32  # tiny: nothing to gain from less
        return torch.bfloat16 if _native_bfloat16(placement) else torch.float32
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ["auto", *DTYPES])
    return DTYPES[dtype]


def _native_bfloat16(placement: torch.device | str) -> bool:
    if placement == "several" or torch.device(placement).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(placement).type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What an architecture does to the output of its last linear layer; `OutputHead.verify` checks
    the outcome."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    if cap := cap or getattr(config, "logits_soft_cap", None):  # RecurrentGemma
        return lambda logits: torch.tanh(logits / cap) * cap
    if scale := getattr(config, "logit_scale", None):  # Cohere
        return lambda logits: logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        return lambda logits: logits / divisor
    return lambda logits: logits


def _close(logits: Tensor, expected: Tensor) -> bool:
    """Equal up to a few roundings; the top-level dtype sets how many."""
    if logits.shape != expected.shape:
        return False
    scale = expected.abs().max().clamp(min=1e-6)
    return bool(
        ((logits.to(expected.device) - expected).abs().max() / scale)
        <= HEAD_TOLERANCE[expected.dtype]
    )


def _inverse(vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {index: token for token, index in vocabulary.items()}
