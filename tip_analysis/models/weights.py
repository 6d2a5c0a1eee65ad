"""Weights off the disk: models of one part and of two, GGUF files and adapters, and the loader's
report, without which missing weights would silently be random ones.

Refused by name: weights that are missing or have another shape than the config says, adapters that
do not fit their base, pickles, and configs of other kinds of model. Excepted are tied weights and
buffers, which need not be stored.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from tip_analysis.core.errors import ModelError
from tip_analysis.core.optional import require
from tip_analysis.core.text import first_line
from tip_analysis.models.adapter_patterns import check_patterns
from tip_analysis.models.file_checks import (
    check_adapter_config,
    check_config,
    check_config_file,
    check_index,
    check_sizes,
    check_stops,
    read_object,
    stored_elements,
)
from tip_analysis.models.gguf_files import check_gguf
from tip_analysis.models.locating import locate
from tip_analysis.models.panics import panics_named

logger = logging.getLogger(__name__)

LOADING_ERRORS = (Exception,)
"""What libraries raise at files that are no model: SafetensorError, IndexError, RecursionError,
OverflowError, MemoryError … there is no end to the list."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PREFIX_OF_ADAPTED = "base_model.model."


def load_weights(
    folder: str, options: Mapping[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The model that lies in a folder or on the hub.

    Args:
        folder: folder or hub id.
        options: `revision` or `gguf_file`.
        kwargs: what `from_pretrained` takes besides.

    Raises:
        ModelError: weights are missing or do not fit; the message names the first.
    """
    if is_adapter(folder):
        return _load_adapter(Path(folder), kwargs)
    if "gguf_file" in options:
        if hasattr(transformers, "GgufConfig"):  # releases before it always dequantize
            kwargs = kwargs | {"quantization_config": transformers.GgufConfig(dequantize=True)}
        loader: Any = AutoModelForCausalLM
        stored = check_gguf(Path(folder) / options["gguf_file"])
        check_sizes(loader, read_config(folder, options), stored)
    else:
        kwargs = kwargs | {"use_safetensors": True}
        loader = _loader(folder, options)
    with _without_table():
        model, report = loader.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options, **kwargs
        )
    _check(model, report)
    check_stops(model.generation_config)
    return model


@contextmanager
def _without_table() -> Iterator[None]:
    """Keep transformers from printing its report on weights, which `_check` puts in one line."""
    shown = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(shown)


def read_config(folder: str, options: Mapping[str, Any]) -> PreTrainedConfig:
    """A model's config, its counts and sizes checked.

    Raises:
        ModelError: no model has them.
    """
    if "gguf_file" not in options:
        check_config_file(folder, options)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    check_config(config)
    return config


def load_tokenizer_files(folder: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; an adapter without one of its own has its base's."""
    if is_adapter(folder) and not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        return load_tokenizer_files(*locate(base_of(Path(folder))))
    with panics_named():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The name of an adapter's base model.

    Raises:
        ModelError: the adapter's config names none.
    """
    name = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} names no base model: expected a hub id or a folder as"
            f" base_model_name_or_path, found {name!r}"
        )
    if Path(name).is_dir() and is_adapter(name):
        raise ModelError(f"{folder / ADAPTER_CONFIG} names as its base {name!r}, an adapter too")
    return name


def _loader(folder: str, options: Mapping[str, Any]) -> Any:
    """The class that loads this kind of model: causal, or of two parts of which text is one."""
    config = read_config(folder, options)
    check_index(folder, options)
    for mapping, loader in (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    ):
        if type(config) in mapping:
            if Path(folder).is_dir():
                check_sizes(loader, config, stored_elements(Path(folder)))
            return loader
    raise ModelError(
        f"its config is of the kind {config.model_type!r}, which is no causal language model"
    )


def _check(model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights the loader made up."""
    kind = type(model).__name__
    if different := sorted(report["mismatched_keys"]):
        name, stored, expected = different[0]
        raise ModelError(
            f"the weight {name} is {tuple(stored)} in the files, but {tuple(expected)} by the"
            f" config of {kind}{_others(different)}: weights and config.json do not belong together"
        )
    parameters = {name for name, _ in model.named_parameters()}
    if missing := sorted(parameters.intersection(report["missing_keys"])):
        raise ModelError(
            f"the files lack the weight {missing[0]} of {kind}{_others(missing)}; it would be"
            " random: complete the folder, or correct its config.json"
        )
    if report["error_msgs"]:
        raise ModelError(f"{kind}: {report['error_msgs'][0]}")
    if unused := sorted(report["unexpected_keys"]):
        logger.warning(
            "%s does not use the weight %s%s of the files", kind, unused[0], _others(unused)
        )


def _others(names: Iterable[Any]) -> str:
    count = len(list(names)) - 1
    return f" (and {count} more)" if count else ""


def adapted_rows(folder: Path) -> int | None:
    """Rows of the output head or embedding that an adapter stores whole; None where it stores
    none."""
    wanted = ("lm_head.weight", "embed_tokens.weight", "wte.weight")
    rows = [
        shape[0] for name, shape in adapter_shapes(folder).items() if _plain(name).endswith(wanted)
    ]
    return rows[0] if rows else None


def _plain(name: str) -> str:
    """The name that a module which an adapter stores whole has in the base model: one that is
    trained whole, or an embedding under an adapter of its own, which PEFT stores beside it."""
    for wrapper in (".modules_to_save.", ".original_module.", ".base_layer."):
        name = name.replace(wrapper, ".")
    return name


def _load_adapter(folder: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """An adapter on the base model that its config names."""
    require("peft", f"the LoRA adapter in {folder}")
    from peft import PeftModel  # slow to import, seldom needed

    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            f"{folder} has no {ADAPTER_WEIGHTS}"
            + (
                "; adapter_model.bin is a pickle, which could run any code and is not read: save"
                " the adapter again with safe_serialization=True"
                if pickled
                else ": an adapter's weights are expected there"
            )
        )
    base_name = base_of(folder)
    try:
        base = load_weights(*locate(base_name), kwargs)
    except LOADING_ERRORS as error:
        raise ModelError(f"its base model {base_name!r}: {first_line(error)}") from error
    config = folder / ADAPTER_CONFIG
    check_adapter_config(config, adapter_shapes(folder))
    names = {name for name, _ in [*base.named_modules(), *base.named_parameters()]}
    check_patterns(config.name, read_object(config), names)
    _resize(base, folder)
    places = {_PREFIX_OF_ADAPTED + name for name, _ in base.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of missing keys, which are refused below
        adapted: Any = PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
    _check_adapter(adapted, folder, places)
    return adapted


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an adapter, by its name."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return {
            name: tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118 - not a dictionary
        }


def _resize(base: PreTrainedModel, folder: Path) -> None:
    """Give the base as many embedding rows as the adapter's stored embeddings have: tokens were
    added before it was trained."""
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    names = {
        _PREFIX_OF_ADAPTED + f"{key}.weight"
        for key, module in base.named_modules()
        if any(module is embedding for embedding in embeddings)
    }
    rows = {shape[0] for name, shape in adapter_shapes(folder).items() if _plain(name) in names}
    if len(rows) > 1:
        raise ModelError(f"{folder}: its embeddings have {sorted(rows)} rows; expected one number")
    embedding: Any = base.get_input_embeddings()
    if rows and rows != {embedding.weight.shape[0]}:
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _check_adapter(adapted: Any, folder: Path, places: set[str]) -> None:
    """Refuse an adapter that leaves some of its own weights as they were made."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    stored = set(adapter_shapes(folder))
    if missing := sorted(expected - stored):
        raise ModelError(f"{folder} lacks the adapter's weight {missing[0]}{_others(missing)}")
    if strange := sorted(name for name in stored - expected if _plain(name) not in places):
        raise ModelError(
            f"{folder} holds the weight {strange[0]}{_others(strange)}, for which its base model"
            f" {base_of(folder)!r} has no place"
        )
