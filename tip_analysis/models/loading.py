"""Loading models and tokenizers: the one place that does.

A model is named by a hub id (`id@revision`), a local folder (a LoRA adapter's too), a `.gguf` file,
or a built-in name. Weights come from safetensors or GGUF only, never from pickles, and no code from
a repository is run.

A model is used in two halves, body and head: `output_head`.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tip_analysis.core.errors import (
    ModelError,
    OptionError,
    UnknownNameError,
    VocabularyMismatchError,
)
from tip_analysis.core.text import first_line
from tip_analysis.models.locating import DEVICE_TYPES, DTYPE_NAMES, locate
from tip_analysis.models.output_head import OutputHead, causal_model
from tip_analysis.models.token_model import TokenModel
from tip_analysis.models.weights import LOADING_ERRORS, load_tokenizer_files, load_weights

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes token ids."""
    weight: Any = model.get_input_embeddings().weight
    return weight.device


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer, and what a record says of them."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: OutputHead

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self.model)

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
        return config_context_length(self.model.config)

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
        return stop_tokens(self.model.generation_config, self.tokenizer)

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


def stop_tokens(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a rollout: those of the generation config and the tokenizer's end of
    sequence."""
    configured: Any = getattr(generation_config, "eos_token_id", None)
    ends: Any = tokenizer.eos_token_id
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return frozenset(ids if ends is None else [*ids, ends])


def config_context_length(config: Any) -> int | None:
    """The longest sequence that a model of this config accepts, where it says so."""
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if longest is not None and rope.get("rope_type") == "dynamic":
        return int(longest * rope.get("factor", 1.0))  # it is the length before scaling
    return longest


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
        with _without_bars(gguf="gguf_file" in options):
            model = load_weights(folder, options, kwargs)
        tokenizer = load_tokenizer_files(folder, options)
        if placement != "several":
            model = model.to(placement)  # pyright: ignore[reportArgumentType]
    except LOADING_ERRORS as error:
        raise ModelError(f"cannot load the model {name!r}: {first_line(error)}") from error
    model = model.eval().requires_grad_(False)
    avoid_grouped_kernels(model)
    try:
        head = OutputHead(model)
        head.verify()
        head.verify_causal()
    except RuntimeError as error:
        raise ModelError(
            f"the model {name!r} fails on a short input: {first_line(error)}; another --dtype may"
            " help"
        ) from error
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


def shared_vocabulary(student: TokenModel, teacher: TokenModel) -> int:
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
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # pyright: ignore
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
def _without_bars(*, gguf: bool) -> Iterator[None]:
    """No progress bars of transformers: a line of ours says what is loaded. That of GGUF files
    knows no switch, and writes to stderr."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()) if gguf else nullcontext():
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


def default_dtype(name: str, dtype: str) -> str:
    """The name of the dtype that `auto` stands for on this machine, or the named one."""
    return str(resolve_dtype(name, dtype, _placement("auto"))).removeprefix("torch.")


def _native_bfloat16(placement: torch.device | str) -> bool:
    if placement == "several" or torch.device(placement).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(placement).type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _inverse(vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {index: token for token, index in vocabulary.items()}
