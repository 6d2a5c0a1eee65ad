"""What a model's body can do, asked of its forward and its cache; nothing is assumed of a kind of
model.

- Which arguments its forward takes, and under which name a cache goes in.
- Whether its cache holds keys and values only. Then rows may be padded on the left, selected, and
  continued by several tokens. Any other cache (recurrent states, convolutions) is begun with
  sequences of one length and continued by one token at a time, once a comparison with a full pass
  has shown that this is right; otherwise there is no cache at all.
- From which length on its positions are seen through other frequencies (longrope, dynamic scaling).
  Sequences are read together only where they are seen alike, so that a number never depends on what
  shares its batch.
"""

import inspect
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import cache_utils as caches

from tip_analysis.models.output_head import causal_model, model_body

logger = logging.getLogger(__name__)

_KEPT = "_tip_analysis_abilities"
_CACHE_ARGUMENTS = ("past_key_values", "cache_params")
_OF_KEYS_AND_VALUES = tuple(
    getattr(caches, name)
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer")
    if hasattr(caches, name)
)
"""Layers of a cache of which nothing but keys and values are kept; a class derived from them may
keep more."""
_OTHER_CACHE = (
    *(AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError),
    *(IndexError, KeyError),
)
"""What bodies raise that expect another cache."""
_SAME = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-6}
"""How far a step from the cache may be from a full pass, relative to the largest hidden state."""


class Abilities:
    """What one body can do."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = causal_model(model)
        self.body: Any = model_body(model)
        self.arguments = frozenset(inspect.signature(type(self.body).forward).parameters)
        self._ropes = [_Rope.of(module) for module in self.body.modules() if _Rope.depends(module)]

    @cached_property
    def cache_argument(self) -> str | None:
        """The name under which the body takes a cache of transformers; None where it has none."""
        return next((name for name in _CACHE_ARGUMENTS if name in self.arguments), None)

    def new_cache(self) -> DynamicCache:
        """An empty cache with the layers that the config asks for."""
        return DynamicCache(config=self._model.config)

    @cached_property
    def keeps_only_keys(self) -> bool:
        """Whether the cache holds keys and values and nothing else, and the body fills it."""
        if self.cache_argument is None:
            return False
        cache = self.new_cache()
        if not all(type(layer) in _OF_KEYS_AND_VALUES for layer in cache.layers):
            return False
        return self._fills(cache)

    @torch.no_grad()
    def _fills(self, cache: DynamicCache) -> bool:
        """Whether two tokens leave two keys; a body with a cache of a class of its own may fail."""
        tokens = torch.arange(2, device=self._device)[None]
        try:
            self.run(tokens, cache=cache)
            lengths: list[Any] = [getattr(layer, "get_seq_length", None) for layer in cache.layers]
            return any(length is not None and length() == 2 for length in lengths)
        except _OTHER_CACHE as error:
            self._says_no(error)
            return False

    @property
    def _device(self) -> Any:
        return self.body.get_input_embeddings().weight.device

    def _says_no(self, error: Exception) -> None:
        logger.debug("no use of the cache of %s: %s", type(self.body).__name__, error)

    @cached_property
    def can_continue(self) -> bool:
        """Whether one token at a time can be added to a cache."""
        if self.cache_argument is None:
            return False
        return self.keeps_only_keys or self._steps_as_a_whole_pass()

    @torch.no_grad()
    def _steps_as_a_whole_pass(self) -> bool:
        """Compare three steps from a cache, its rows reordered on the way, with a full pass."""
        weight: Any = self.body.get_input_embeddings().weight
        tokens = torch.arange(16, device=weight.device).mul(7).remainder(len(weight)).view(2, 8)
        whole = self.run(tokens).last_hidden_state
        try:
            cache = self.new_cache()
            steps = [self.run(tokens[:, :5], cache=cache).last_hidden_state]
            cache.reorder_cache(torch.tensor([1, 0], device=weight.device))  # pyright: ignore
            steps += [
                self.run(tokens.flip(0)[:, at : at + 1], cache=cache).last_hidden_state.flip(0)
                for at in range(5, 8)
            ]
        except _OTHER_CACHE as error:
            self._says_no(error)
            return False
        distance = (torch.cat(steps, 1) - whole).abs().max() / whole.abs().max().clamp(min=1e-12)
        right = bool(distance <= _SAME.get(whole.dtype, 1e-3))
        if not right:
            logger.warning(
                "%s does not continue from its cache as in one pass: sampling goes without a"
                " cache, which is slower",
                type(self._model).__name__,
            )
        return right

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The body's output; arguments that it does not take are left out."""
        for rope in self._ropes:
            rope.forget()
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        given = {name: value for name, value in given.items() if name in self.arguments}
        if cache is not None and self.cache_argument is not None:
            given[self.cache_argument] = cache
        return self.body(input_ids=input_ids, use_cache=cache is not None, **given)

    def frequencies(self, length: int) -> tuple[int, ...]:
        """By what frequencies the positions of a sequence of this length are seen: sequences with
        the same answer may be read together."""
        return tuple(rope.scale(length) for rope in self._ropes)

    def reads_as_short(self, length: int) -> bool:
        """Whether a sequence is seen as shorter ones are, so that it may start from one."""
        return self.frequencies(length) == self.frequencies(1)

    def together(self, length: int) -> tuple[int, ...]:
        """Sequences with the same answer may begin a batch that is written on."""
        own_length = () if self.keeps_only_keys else (length,)
        return self.frequencies(length) + own_length

    def goes_on_until(self, length: int) -> int | None:
        """The length up to which a sequence of this length can be written on from its cache; None
        for any."""
        if not self.can_continue:
            return length
        limits = [rope.until(length) for rope in self._ropes]
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class _Rope:
    """Rotary positions whose frequencies depend on the length of what is read."""

    module: Any
    switch: int
    """The longest sequence that is seen by the original frequencies."""
    grows: bool
    """Whether each length beyond it has frequencies of its own (dynamic), or all share theirs."""

    @staticmethod
    def kinds(module: nn.Module) -> list[tuple[str | None, str]]:
        """(layer type, kind) of a rotary embedding: one, or one for each type of layer."""
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            return list(kind.items())
        return [(None, kind)] if isinstance(kind, str) else []

    @classmethod
    def depends(cls, module: nn.Module) -> bool:
        """Whether a module is such an embedding."""
        return any("dynamic" in kind or kind == "longrope" for _, kind in cls.kinds(module))

    @classmethod
    def of(cls, module: Any) -> "_Rope":
        """The switch of a module for which `depends` holds."""
        switches = []
        for layer_type, kind in cls.kinds(module):
            parameters = module.config.rope_parameters
            own = parameters if layer_type is None else parameters[layer_type]
            if kind == "longrope":
                switches.append(int(own["original_max_position_embeddings"]))
            elif "dynamic" in kind:
                switches.append(int(module.original_max_seq_len))
        grows = any("dynamic" in kind for _, kind in cls.kinds(module))
        return cls(module, min(switches), grows)

    def scale(self, length: int) -> int:
        if length <= self.switch:
            return 0
        return length if self.grows else 1

    def until(self, length: int) -> int | None:
        if length <= self.switch:
            return self.switch
        return length if self.grows else None

    def forget(self) -> None:
        """Put back the frequencies that an earlier, longer sequence has left in a growing one."""
        if not self.grows:
            return
        module = self.module
        for layer_type, _ in self.kinds(module):
            prefix = "" if layer_type is None else f"{layer_type}_"
            current = getattr(module, f"{prefix}inv_freq")
            original = getattr(module, f"{prefix}original_inv_freq").to(current.device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def abilities(model: PreTrainedModel) -> Abilities:
    """What a model's body can do; asked once for each, and kept with it."""
    kept = model_body(model).__dict__
    if _KEPT not in kept:
        kept[_KEPT] = Abilities(model)
    return kept[_KEPT]
