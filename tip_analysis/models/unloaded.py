"""A model without its weights: what prompts, engines and records need of one that another program
runs.

Read are tokenizer, config and generation config.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from tip_analysis.core.errors import ModelError
from tip_analysis.core.text import first_line
from tip_analysis.models.file_checks import check_stops
from tip_analysis.models.loading import (
    LanguageModel,
    config_context_length,
    stop_tokens,
    tokenizer_fingerprint,
)
from tip_analysis.models.locating import locate
from tip_analysis.models.token_model import TokenModel
from tip_analysis.models.weights import (
    LOADING_ERRORS,
    is_adapter,
    load_tokenizer_files,
    read_config,
)

_BLOCK, _BLOCKS = 256, 64


@dataclass(frozen=True)
class UnloadedModel:
    """A model whose weights another program holds."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context_length: int | None
    stop_token_ids: frozenset[int]
    record: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What `run.json` records: name, architecture, |V|, fingerprints of tokenizer and files."""
        return self.record

    @classmethod
    def of(cls, model: LanguageModel) -> "UnloadedModel":
        """A loaded model without its weights, which may then be let go."""
        return cls(
            model.name,
            model.tokenizer,
            model.vocab_size,
            model.context_length,
            model.stop_token_ids,
            model.describe(),
        )


def is_servable(name: str) -> bool:
    """Whether other programs can read a model where it lies: neither GGUF nor an adapter."""
    folder, options = locate(name)
    return "gguf_file" not in options and not is_adapter(folder)


def read_model(name: str) -> UnloadedModel:
    """Tokenizer, config and generation config of a model that is a folder or a hub id.

    Raises:
        ModelError: there is no such model, or its files cannot be read.
    """
    folder, options = locate(name)
    try:
        config = read_config(folder, options)
        tokenizer = load_tokenizer_files(folder, options)
        generation = _generation_config(folder, options, config)
        check_stops(generation)
    except LOADING_ERRORS as error:
        raise ModelError(f"cannot read the model {name!r}: {first_line(error)}") from error
    text = config.get_text_config()
    record = {
        "name": name,
        "architecture": next(iter(config.architectures or []), config.model_type),
        "files_fingerprint": _files_fingerprint(folder, config),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": int(text.vocab_size),
    }
    stops = stop_tokens(generation, tokenizer)
    return UnloadedModel(
        name, tokenizer, int(text.vocab_size), config_context_length(config), stops, record
    )


def rows_without_token(model: TokenModel) -> list[int]:
    """Rows of the output head that are no token (padding, gaps in the ids), rising."""
    known = model.tokenizer.get_vocab().values()
    return sorted(set(range(model.vocab_size)) - set(known))


def _generation_config(folder: str, options: dict[str, Any], config: PreTrainedConfig) -> Any:
    try:
        return GenerationConfig.from_pretrained(folder, **options)
    except OSError:  # a model need not have one
        return GenerationConfig.from_model_config(config)


def _files_fingerprint(folder: str, config: PreTrainedConfig) -> str:
    """Hash of some evenly spaced blocks of every weight file; of a model on the hub, its commit."""
    if not Path(folder).is_dir():
        return str(getattr(config, "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}{size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(1, size // _BLOCKS)):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
