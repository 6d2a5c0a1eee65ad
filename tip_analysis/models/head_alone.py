"""A model's output head without its body: all that the student's phase of a scoring in two needs of
the teacher.

The head's weights are read out of the safetensors files by name; the body stays without memory.
Where that cannot be done (GGUF, LoRA adapters, checkpoints with names or shapes of their own), the
whole model is loaded and its body let go at once.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tip_analysis.core.errors import ModelError
from tip_analysis.core.text import first_line
from tip_analysis.models.file_checks import model_file, weight_files
from tip_analysis.models.loading import DTYPES, LanguageModel, load_model, locate, resolve_device
from tip_analysis.models.output_head import OutputHead, model_body
from tip_analysis.models.weights import (
    LOADING_ERRORS,
    adapted_rows,
    base_of,
    is_adapter,
    load_tokenizer_files,
    read_config,
)

logger = logging.getLogger(__name__)


def load_head(name: str, *, dtype: str, device: str = "auto") -> LanguageModel:
    """A language model whose head, tokenizer and config are there, and whose body has no weights.

    Args:
        name: as `models.load_model` takes it.
        dtype: name of the dtype that the whole model was run in.
        device: where the head goes.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    folder, options = locate(name)
    if "gguf_file" not in options and not is_adapter(folder):
        try:
            model = _head_alone(folder, options, DTYPES[dtype])
            tokenizer = load_tokenizer_files(folder, options)
        except LOADING_ERRORS as error:
            raise ModelError(f"cannot load the head of {name!r}: {first_line(error)}") from error
        if model is not None:
            head = OutputHead(model)
            head.linear.to(resolve_device(device))
            return LanguageModel(name, model, tokenizer, head)
    logger.warning(
        "the head of %s cannot be read apart: the whole model is loaded, and its body let go", name
    )
    whole = load_model(name, dtype=dtype, device=device)
    kept = {id(parameter) for parameter in whole.head.linear.parameters()}
    for parameter in model_body(whole.model).parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.new_empty(0)
    return whole


def head_rows(name: str) -> int:
    """Rows of a model's output head, padding included, from its config alone.

    Raises:
        ModelError: there is no such model.
    """
    folder, options = locate(name)
    try:
        if is_adapter(folder):
            return adapted_rows(Path(folder)) or head_rows(base_of(Path(folder)))
        return int(read_config(folder, options).get_text_config().vocab_size)
    except LOADING_ERRORS as error:
        raise ModelError(f"cannot read the config of {name!r}: {first_line(error)}") from error


def _head_alone(folder: str, options: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel | None:
    """The model on the meta device but for its head; None where the head's weights are not found
    under a known name."""
    config = read_config(folder, options)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None  # of two parts, or of another kind: the whole model's loader knows
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model = model.eval().requires_grad_(False)
    linear = model.get_output_embeddings()
    if linear is None:
        return None
    file_of = _weight_files(folder, options)
    found = {}
    for part, parameter in linear.named_parameters():
        name = next((name for name in _names(model, parameter) if name in file_of), None)
        if name is None:
            return None
        with safe_open(model_file(folder, file_of[name], options), framework="pt") as file:
            tensor = file.get_tensor(name)
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            return None
        found[part] = nn.Parameter(tensor.to(dtype), requires_grad=False)
    for part, parameter in found.items():
        linear.register_parameter(part, parameter)
    return model


def _names(model: PreTrainedModel, wanted: nn.Parameter) -> list[str]:
    """Names that a parameter of the head may have in a checkpoint; those of tied weights, and with
    or without a prefix."""
    tied: Any = model.get_input_embeddings().weight
    config: Any = model.config.get_text_config()
    is_tied = wanted is tied or (bool(config.tie_word_embeddings) and wanted.shape == tied.shape)
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is wanted or (is_tied and parameter is tied)
    ]
    prefix = f"{model.base_model_prefix}."
    return [
        *names,
        *(name.removeprefix(prefix) for name in names),
        *(prefix + name for name in names),
    ]


def _weight_files(folder: str, options: dict[str, Any]) -> dict[str, str]:
    """The safetensors file that each weight of a checkpoint lies in, by its name in the
    checkpoint's folder."""
    if index := model_file(folder, "model.safetensors.index.json", options):
        return weight_files(Path(index))
    if single := model_file(folder, "model.safetensors", options):
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), "model.safetensors")
    return {}
