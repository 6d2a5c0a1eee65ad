"""What `trl_trainer` takes TRL's batches and models apart with, and the check of TRL's version."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import trl  # pyright: ignore
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from trl import DistillationTrainer  # pyright: ignore

from tip_analysis.core.errors import UnsupportedVersionError
from tip_analysis.logits.stop_tokens import merge_tokens
from tip_analysis.models.output_head import logit_cap, logit_scale
from tip_analysis.rollouts.encoded import Rollout

TRL_VERSION = (1, 16)
"""The minor version of TRL whose trainer this one goes on from."""

_OVERRIDDEN = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
    "_get_last_hidden_state": [
        "self",
        "unwrapped_model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
    ],
}
"""Methods of TRL's own that are overridden or called, and the parameters that are counted on."""

Model = Any
"""A model of transformers'."""


def check_trl() -> None:
    """Refuse a TRL whose trainer is not the one that this module goes on from.

    Raises:
        UnsupportedVersionError: its version is another, or its methods have other parameters.
    """
    expected = ".".join(map(str, TRL_VERSION))
    found = trl.__version__
    if found.split(".")[:2] != expected.split("."):
        raise UnsupportedVersionError(
            f"TIPDistillationTrainer goes with TRL {expected}, but {found} is installed;"
            f' pip install "trl=={expected}.*"'
        )
    for name, parameters in _OVERRIDDEN.items():
        method = getattr(DistillationTrainer, name, None)
        has = list(inspect.signature(method).parameters) if method else []
        if has[: len(parameters)] != parameters:
            raise UnsupportedVersionError(
                f"TRL {found} has another DistillationTrainer.{name} than TIPDistillationTrainer"
                f" goes on from: expected ({', '.join(parameters)}), found ({', '.join(has)});"
                f' pip install "trl=={expected}.*"'
            )


class Head:
    """Hidden states [n, D] to the logits [n, V] that TRL's loss compares: scale, soft cap,
    temperature; stop tokens as one where they are to be."""

    def __init__(self, model: Model, temperature: float, stop_ids: Tensor) -> None:
        self.model, self.temperature, self.stop_ids = model, temperature, stop_ids

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of last hidden states [n, D]."""
        weight, bias = head_weights(self.model)
        config = text_config(self.model)
        logits = linear(hidden, weight.to(hidden.dtype), bias) * logit_scale(config)
        if (cap := logit_cap(config)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return merge_tokens(logits / self.temperature, self.stop_ids)


def head_weights(model: Model) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] of the output layer, put together where they are sharded."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return _whole(head.weight), None if bias is None else _whole(bias)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered_heads(*models: Model) -> Any:
    """Inside, DeepSpeed's ZeRO-3 has the output layers whole."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx  # pyright: ignore

    heads = [model.get_output_embeddings() for model in models]
    return maybe_gather_lm_head_ctx(*(p for head in heads for p in head.parameters()))


def text_config(model: Model) -> Any:
    """The config of a model, or of its text part."""
    return model.config.get_text_config()


def written_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """[B, C] bool: the completion's tokens that the student wrote."""
    written = inputs["completion_mask"].bool()
    return written & inputs["tool_mask"].bool() if "tool_mask" in inputs else written


def rollouts_of(inputs: Mapping[str, Any], step: int) -> list[Rollout]:
    """The completions of a batch, named by their number in the step."""
    columns = (inputs["completion_ids"], inputs["completion_mask"].bool(), written_tokens(inputs))
    rows = zip(inputs["tip_number"].tolist(), *(column.cpu() for column in columns), strict=True)
    return [
        Rollout(
            rollout_id=f"{step}/{number}",
            prompt_id=f"{step}/{number}",
            prompt=(),
            response=tokens[there].tolist(),
            loss_mask=written[there].tolist(),
        )
        for number, tokens, there, written in rows
    ]


def slices(count: int, size: int) -> list[slice]:
    """Slices of `size` that cut `count` rows."""
    return [slice(start, start + size) for start in range(0, count, size)]


def rows_of(output: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Some rows of a batch of text; what counts for the whole of it is left as it is."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim else value
        for name, value in output.items()
    }
