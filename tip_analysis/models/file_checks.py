"""A model's files, looked at before a library loops or allocates by what they say: counts and sizes
in `config.json` and `adapter_config.json`, names in an index, and what the config describes against
what the weights' headers hold."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from tip_analysis.core.errors import ModelError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"

MAX_COUNT = 10_000
"""Most layers, heads or experts of a model: libraries loop over them."""
MAX_SIZE = 2**31 - 1
"""Largest integer of a config."""
MAX_JSON_BYTES = 64 * 2**20
SPARE = 2**20
"""Parameters that a config may describe beyond its files: a tiny model's missing weights are
better named one by one, by the loader."""
MAX_BUFFER_BYTES = 2**29
"""Most memory for buffers such as causal masks, which are in no file."""

_COUNTS = re.compile(r"layers?$|heads?$|experts?$|blocks?$|depth$|stages?$", re.IGNORECASE)
_AT_LEAST_ONE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_RANKS = ("r", "init_r", "target_r", "num_virtual_tokens")


def model_file(folder: str, name: str, options: Mapping[str, Any]) -> str | None:
    """Where a file of a model lies, fetched if need be; None where there is none."""
    return cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **options)


def check_config_file(folder: str, options: Mapping[str, Any]) -> None:
    """Refuse a `config.json` that is no JSON object, or whose numbers no model has.

    Args:
        folder: folder or hub id.
        options: `revision`.

    Raises:
        ModelError: names the entry.
    """
    if (path := model_file(folder, CONFIG, options)) is None:
        return
    for name, value in _entries(read_object(Path(path))):
        key = name.rsplit(".", 1)[-1]
        if isinstance(value, int) and abs(value) > MAX_SIZE:
            raise ModelError(f"{CONFIG}: {name} is {value:.3g}, which no model has")
        if isinstance(value, int) and _COUNTS.search(key) and abs(value) > MAX_COUNT:
            raise ModelError(f"{CONFIG}: {name} is {value}; expected {MAX_COUNT} at most")
        if key.endswith("attn_implementation") and isinstance(value, str) and "/" in value:
            raise ModelError(f"{CONFIG}: {name} is {value!r}, code of a repository: not run")


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a config without layers, width, heads or tokens.

    Raises:
        ModelError: names the entry.
    """
    text = config.get_text_config()
    for name in _AT_LEAST_ONE:
        value = getattr(text, name, 1)
        if isinstance(value, bool) or (isinstance(value, int | float) and not value >= 1):
            raise ModelError(f"{CONFIG}: {name} is {value!r}; expected 1 at least")


def check_stops(generation: Any) -> None:
    """Refuse a generation config whose end of sequence is no token id, or list of them.

    Raises:
        ModelError: it is something else.
    """
    ends = getattr(generation, "eos_token_id", None)
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ModelError(
            f"its generation config has the eos_token_id {ends!r}; expected a token id or a list"
        )


def check_index(folder: str, options: Mapping[str, Any]) -> None:
    """Refuse an index of weights that leads out of the model's folder.

    Raises:
        ModelError: it does, or it is no index.
    """
    if (path := model_file(folder, INDEX, options)) is not None:
        weight_files(Path(path))


def weight_files(index: Path) -> dict[str, str]:
    """The file that each weight lies in, by an index.

    Raises:
        ModelError: the index is none, or names a file elsewhere.
    """
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{index.name} has no weight_map: expected the file of each weight")
    for weight, name in files.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII):
            raise ModelError(
                f"{index.name}: the file of {weight} is {name!r}; expected the name of a"
                " safetensors file beside it"
            )
    return files


def check_adapter_config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an adapter whose config asks for ranks that its weights do not have, for a module to
    be imported, for other adapters, or for layers without end.

    Raises:
        ModelError: names the entry.
    """
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    config = read_object(path)
    if config.get("megatron_config") is not None or config.get("peft_type") == "XLORA":
        raise ModelError(
            f"{path.name} asks for Megatron's layers or for a mixture of other adapters (XLORA),"
            " which are not loaded"
        )
    for name, value in _entries({"layer_replication": config.get("layer_replication")}):
        if isinstance(value, int) and value > MAX_COUNT:
            raise ModelError(f"{path.name}: {name} is {value}; expected {MAX_COUNT} at most")
    patterns = config.get("rank_pattern")
    ranks = {name: config.get(name) for name in _RANKS}
    ranks |= patterns if isinstance(patterns, dict) else {}
    for name, rank in ranks.items():
        if isinstance(rank, int | float) and not rank <= largest:
            raise ModelError(
                f"{path.name}: {name} is {rank!r}, but the largest size of its weights is {largest}"
            )


def check_sizes(loader: Any, config: PreTrainedConfig, stored: int) -> None:
    """Refuse a config that describes far more than the files hold: what is missing would be
    allocated before it is named.

    Args:
        loader: the class that makes the model of a config.
        config: the model's.
        stored: elements of all tensors in the files.

    Raises:
        ModelError: with both numbers of parameters.
    """
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=False)
    described = sum(parameter.numel() for parameter in model.parameters())
    packed = 16 if getattr(config, "quantization_config", None) else 2  # 2: tied weights
    if described > packed * stored + SPARE:
        raise ModelError(
            f"its config describes {described:,} parameters, but its files hold {stored:,}: weights"
            " are missing, or do not belong to it"
        )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if buffers > max(MAX_BUFFER_BYTES, 8 * stored):
        raise ModelError(
            f"its config describes buffers of {buffers:,} bytes beside {stored:,} parameters"
        )


def stored_elements(folder: Path) -> int:
    """Elements of all tensors of a folder, by the headers of its safetensors files."""
    index, single = folder / INDEX, folder / WEIGHTS
    if not single.is_file() and not index.is_file():
        return 0
    names = {WEIGHTS} if single.is_file() else set(weight_files(index).values())
    return sum(_elements(folder / name) for name in sorted(names))


def _elements(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(
            math.prod(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118 - not a dictionary
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: the file holds something else, or far too much.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path.name} has {path.stat().st_size:,} bytes: too many for its kind")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"{path.name} is broken JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds a {type(value).__name__}; expected a JSON object")
    return value


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All plain values in a JSON value, by their paths."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        path = f"{name}.{key}" if name else str(key)
        if isinstance(item, dict | list):
            yield from _entries(item, path)
        else:
            yield path, item
