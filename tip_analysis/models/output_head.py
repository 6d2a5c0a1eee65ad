"""The two halves of a causal language model: its body, and the output head that makes logits.

The body ends in the last hidden states [B, T, D]; the head turns any [N, D] of them into logits
[N, V]. The [B, T, V] tensor that the whole model would make never exists. The head is checked
against the model's own logits when a model is loaded. Reads and writes no files.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from tip_analysis.core.errors import ModelError

logger = logging.getLogger(__name__)


HEAD_TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.float32: 1e-4,
    torch.float64: 1e-9,
}
"""How far two ways to the same numbers may be apart, relative to their largest magnitude: a few
roundings."""


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
        return self.linear.weight.device  # pyright: ignore

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
        weight: Tensor = self._model.get_input_embeddings().weight  # pyright: ignore
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


def logit_scale(config: Any) -> float:
    """What an architecture multiplies the output of its last linear layer by (text config)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, …, Falcon-H1
        if (scale := getattr(config, name, None)) is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


def logit_cap(config: Any) -> float | None:
    """The soft cap of an architecture's logits, c in c·tanh(z / c), after the scale; None for
    none (text config)."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return cap or getattr(config, "logits_soft_cap", None) or None  # RecurrentGemma


def _logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What an architecture does to the output of its last linear layer; `OutputHead.verify` checks
    the outcome."""
    scale, cap = logit_scale(config), logit_cap(config)

    def transform(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


def _close(logits: Tensor, expected: Tensor) -> bool:
    """Equal up to a few roundings; the top-level dtype sets how many."""
    if logits.shape != expected.shape:
        return False
    scale = expected.abs().max().clamp(min=1e-6)
    return bool(
        ((logits.to(expected.device) - expected).abs().max() / scale)
        <= HEAD_TOLERANCE[expected.dtype]
    )
