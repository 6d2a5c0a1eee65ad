"""Forward-mode derivatives of a student's hidden states along directions in parameter space.

One pass gives, for a whole sequence, ∂h/∂θ·v: the tangents [T, D] of the last hidden states along a
direction v. The tangent of every token's loss is then ⟨∂ℓ_t/∂h_t, ḣ_t⟩, so one pass serves all
tokens and all losses.

How it is made cheap, for any decoder-only model of transformers, through PyTorch's dual numbers:

- The primal pass runs once a rollout. What linear layers and attention give is kept (no more than
  one forward pass's activations), so that a further direction costs the tangents only: ẏ = ẋ Wᵀ + x
  V_Wᵀ.
- The part of a direction that belongs to a layer is made when the pass reaches the layer
  (`gradients.directions`).
- Several directions go as a batch, one row each.
- Attention runs in causal blocks, value and tangent together: the masked half is never computed, no
  [T, T] matrix is kept, and no fused kernel without a forward-mode rule is met. Where a model's
  attention is of another kind (the primal pass tells), its `eager` implementation is used instead;
  either way the model's own implementation is put back afterwards.
"""

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as dual
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tip_analysis.core.errors import ModelError
from tip_analysis.gradients.causal_attention import ScoreForm, attend, attend_tangent
from tip_analysis.gradients.directions import Direction
from tip_analysis.gradients.forward_rules import custom_functions, experts, set_experts
from tip_analysis.gradients.scopes import ParameterScope
from tip_analysis.models.hidden_states import last_hidden_states
from tip_analysis.models.output_head import causal_model, model_body

logger = logging.getLogger(__name__)

BLOCKWISE = "tip_analysis_blockwise"
"""Name under which transformers knows the attention of this module."""

SAME_HIDDEN_STATES = {
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
    torch.float32: 1e-3,
    torch.float64: 1e-5,
}
"""How far two attention implementations may be apart in the last hidden states, relative to the
largest of them."""


class ForwardMode:
    """A model prepared for forward-mode derivatives; a context manager that puts everything back at
    its end.

    Example:
        with ForwardMode(model, scope) as forward:
            hidden = forward.primal(tokens)             # [T, D]
            tangents = forward.tangents([v1, v2])       # [2, T, D]
    """

    def __init__(self, model: nn.Module, scope: ParameterScope) -> None:
        self.model = model
        self.scope = scope
        self.names = {id(parameter): name for name, parameter in scope.body.items()}
        self.directions: Sequence[Direction] = ()
        self.recording = False
        self.looked_up: dict[str, Tensor] = {}
        """The distinct rows that the last passes looked up in each embedding of the scope."""
        self._tokens = torch.empty(0, dtype=torch.long)
        self._kept: dict[int, list[Tensor]] = defaultdict(list)
        self._calls: dict[int, int] = defaultdict(int)
        self._patched: list[tuple[nn.Module, Any]] = []
        self._one_row = False
        self.whole = False
        """Whether every parameter has its tangent throughout a pass, one direction at a time: for
        models whose modules use the parameters of others. It needs memory for one direction."""

    def __enter__(self) -> "ForwardMode":
        _load_rules()
        self._was_training = self.model.training
        self.model.eval()
        self._attention = causal_model(self.model).config._attn_implementation
        self._experts = experts(self.model)
        self._checked = False
        set_attention(self.model, BLOCKWISE)
        set_experts(self.model, "eager")  # the others have no forward-mode rule
        for module in model_body(self.model).modules():
            if (tangent_forward := self._tangent_forward(module)) is not None:
                self._patch(module, tangent_forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for module, own in self._patched:
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._patched.clear()
        self._kept.clear()
        set_attention(self.model, self._attention)
        set_experts(self.model, self._experts)
        self.model.train(self._was_training)

    @torch.no_grad()
    def primal(self, tokens: Tensor) -> Tensor:
        """Run a sequence of token ids [T] and keep what its tangents need; returns the last hidden
        states [T, D]."""
        if not self._checked:
            self._check_attention(tokens)
        self._tokens = tokens
        self._kept.clear()
        self._calls.clear()
        self.recording = True
        with _running(self):
            hidden = self._hidden(1)
        self.recording = False
        return hidden[0]

    @torch.no_grad()
    def tangents(self, directions: Sequence[Direction]) -> Tensor:
        """Tangents [c, T, D] of the last hidden states of the last `primal` along c directions,
        without their `scale`."""
        if (self._one_row or self.whole) and len(directions) > 1:
            return torch.cat([self.tangents([direction]) for direction in directions])
        self.directions = directions
        if self.whole:
            return self._whole_tangent(directions[0])
        self._calls.clear()
        try:
            with _running(self), dual.dual_level(), custom_functions():
                return _tangent(self._hidden(len(directions)))
        except _NeedsOneRow:
            self._one_row = True
            return self.tangents(directions)

    def _whole_tangent(self, direction: Direction) -> Tensor:
        """The tangent [1, T, D] with all parameters as dual numbers at once; nothing stands in for
        a module's forward."""
        own: list[tuple[nn.Module, str, nn.Parameter]] = [
            (module, key, parameter)
            for module in model_body(self.model).modules()
            for key, parameter in module.named_parameters(recurse=False)
            if id(parameter) in self.names
        ]
        try:
            with dual.dual_level(), custom_functions():
                for module, key, parameter in own:
                    part = self._part(module, self.names[id(parameter)], parameter, direction)
                    made: Any = dual.make_dual(parameter.detach(), part)
                    module._parameters[key] = made
                return _tangent(self._hidden(1))
        finally:
            for module, key, parameter in own:
                module._parameters[key] = parameter

    def _part(
        self, module: nn.Module, name: str, parameter: Tensor, direction: Direction
    ) -> Tensor:
        """The part of a direction that belongs to a parameter; of the input embedding, the rows
        that the sequence looks up."""
        if module is not causal_model(self.model).get_input_embeddings():
            return direction.tensor(name, parameter)
        unique = torch.unique(self._tokens)
        self.looked_up[name] = unique
        rows = direction.rows(name, parameter, unique)
        if (padding := getattr(module, "padding_idx", None)) is not None:
            rows[unique == padding] = 0
        return torch.zeros_like(parameter).index_copy_(0, unique, rows)

    def _hidden(self, rows: int) -> Tensor:
        tokens = self._tokens.expand(rows, -1)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(rows, -1)
        return last_hidden_states(causal_model(self.model), tokens, None, positions)

    def _check_attention(self, tokens: Tensor) -> None:
        """Compare with the model's own attention on the first sequence; where they differ, fall
        back on `eager`."""
        self._tokens = tokens
        ours = self._hidden(1)
        set_attention(self.model, self._attention)
        own = self._hidden(1)
        set_attention(self.model, BLOCKWISE)
        distance = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-12))
        stand_in = BLOCKWISE if distance <= SAME_HIDDEN_STATES[own.dtype] else "eager"
        set_attention(self.model, stand_in)
        if self._attention not in (stand_in, "eager"):
            logger.info(
                "attention %r has no forward-mode rule: %r stands in for it",
                self._attention,
                stand_in,
            )
        self._checked = True

    def _tangent_forward(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """What stands in for the forward of a module that is linear or uses parameters of the
        scope."""
        if type(module) in (nn.Linear, Conv1D) and not _has_own_forward(module):
            return self._linear
        own = {
            key: self.names[id(p)]
            for key, p in module.named_parameters(recurse=False)
            if id(p) in self.names
        }
        if not own:
            return None
        if isinstance(module, nn.Embedding):
            return self._embedding
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not any(module.children()):
            return lambda module, original, inputs: self._norm(own, module, original, inputs)
        return lambda module, original, *args, **kwargs: self._any(
            own, module, original, *args, **kwargs
        )

    def _patch(self, module: nn.Module, tangent_forward: Callable[..., Any]) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if _active.get() is not self:
                return original(*args, **kwargs)
            return tangent_forward(module, original, *args, **kwargs)

        self._patched.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def keep(self, owner: nn.Module, value: Tensor) -> Tensor:
        """Keep the primal value of a module's next call."""
        self._kept[id(owner)].append(value)
        return value

    def kept(self, owner: nn.Module) -> Tensor:
        """The primal value of this call of a module."""
        value = self._kept[id(owner)][self._calls[id(owner)]]
        self._calls[id(owner)] += 1
        return value

    def _linear(self, module: nn.Module, original: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        """y = x Wᵀ + b and ẏ = ẋ Wᵀ + x V_Wᵀ + v_b, the first from the primal pass."""
        if self.recording:
            return self.keep(module, original(inputs))
        rows = len(self.directions)
        value = self.kept(module)
        if inputs.dim() != 3 or inputs.shape[0] != rows:
            own = {
                key: self.names[id(p)]
                for key, p in module.named_parameters(recurse=False)
                if id(p) in self.names
            }
            return self._any(own, module, original, inputs)
        x, x_tangent = dual.unpack_dual(inputs)
        names = [self.names.get(id(parameter)) for parameter in (module.weight, module.bias)]
        if x_tangent is None and names == [None, None]:
            return value.expand(rows, -1, -1)
        transposed = isinstance(module, Conv1D)
        weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
        if x_tangent is None:
            tangent = value.new_zeros(rows, *value.shape[1:])
        else:
            tangent = torch.matmul(x_tangent, weight if transposed else weight.T)
        for row, direction in enumerate(self.directions):
            if names[0] is not None:
                part = direction.tensor(names[0], weight)
                tangent[row].addmm_(x[row], part if transposed else part.T)
            if names[1] is not None:
                tangent[row] += direction.tensor(names[1], module.bias)  # pyright: ignore
        return dual.make_dual(_rows(value, rows), tangent)

    def _embedding(
        self,
        module: nn.Embedding,
        original: Callable[..., Tensor],
        ids: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Only the rows that the sequence looks up have a tangent: [c·U, D] of them stand in for
        the table [V, D]."""
        if args or kwargs:  # it finds the rows in a way of its own
            own = {"weight": self.names[id(module.weight)]}
            return self._any(own, module, original, ids, *args, **kwargs)
        if self.recording:
            return original(ids)
        rows = len(self.directions)
        unique, index = torch.unique(ids.expand(rows, *ids.shape[1:]), return_inverse=True)
        name = self.names[id(module.weight)]
        self.looked_up[name] = unique
        parts = torch.stack(
            [direction.rows(name, module.weight, unique) for direction in self.directions]
        )
        if (
            module.padding_idx is not None
        ):  # as in a backward pass: the padding row of an embedding gets no gradient
            parts[:, unique == module.padding_idx] = 0
        table = dual.make_dual(module.weight[unique].repeat(rows, 1), parts.flatten(0, 1))
        offset = (
            torch.arange(rows, device=ids.device).mul(len(unique)).view(-1, *[1] * (ids.dim() - 1))
        )
        padding, module.padding_idx = module.padding_idx, None
        try:
            with _replaced(module, {"weight": table}):
                return original(index + offset)
        finally:
            module.padding_idx = padding

    def _norm(
        self,
        own: dict[str, str],
        module: nn.Module,
        original: Callable[..., Tensor],
        inputs: Tensor,
    ) -> Tensor:
        """A norm over the last dimension: its gain and bias differ by row and are broadcast over
        the rest."""
        rows, width = len(self.directions), inputs.shape[-1:]
        by_width = all(p.shape == width for p in module.parameters(recurse=False))
        if self.recording or rows == 1 or inputs.shape[0] != rows or not by_width:
            return self._any(own, module, original, inputs)
        duals = {}
        for key, parameter in module.named_parameters(recurse=False):
            shape = (rows, *[1] * (inputs.dim() - 2), parameter.shape[-1])
            duals[key] = parameter.detach().expand(shape)
            if key in own:
                parts = torch.stack(
                    [direction.tensor(own[key], parameter) for direction in self.directions]
                )
                duals[key] = dual.make_dual(duals[key].contiguous(), parts.view(shape))
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):  # their fused kernels take no gain by row
            with _replaced(module, dict.fromkeys(duals)):
                normal = original(inputs)
            return normal * duals["weight"] + duals.get("bias", 0.0)
        with _replaced(module, duals):
            return original(inputs)

    def _any(
        self,
        own: dict[str, str],
        module: nn.Module,
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Any other module: its forward with dual parameters, direction by direction."""
        if self.recording:
            return original(*args, **kwargs)
        rows = len(self.directions)
        if rows > 1 and (any(module.children()) or not _batched(rows, [*args, *kwargs.values()])):
            raise _NeedsOneRow
        outputs = []
        for row, direction in enumerate(self.directions):
            tensors = {key: getattr(module, key) for key in own}
            duals = {
                key: dual.make_dual(tensors[key].detach(), direction.tensor(own[key], tensors[key]))
                for key in own
            }
            with _replaced(module, duals):
                given = {name: _row(value, row, rows) for name, value in kwargs.items()}
                outputs.append(original(*[_row(value, row, rows) for value in args], **given))
        if rows == 1:
            return outputs[0]
        if not isinstance(outputs[0], Tensor):
            raise _NeedsOneRow
        return torch.cat(outputs)


class _NeedsOneRow(Exception):  # noqa: N818
    """A module cannot take several directions as a batch."""


_active: ContextVar[ForwardMode | None] = ContextVar("active forward mode", default=None)


def set_attention(model: nn.Module, implementation: str | None) -> None:
    """Let a model compute its attention by another implementation, where it has a choice."""
    if implementation is not None and _chooses_attention(model):
        causal_model(model).set_attn_implementation(implementation)


def _chooses_attention(model: nn.Module) -> bool:
    """Whether any part of a model looks its attention up; asked of others, transformers warns."""
    return any(
        part._can_set_attn_implementation()
        for part in causal_model(model).modules()
        if isinstance(part, PreTrainedModel)
    )


@contextmanager
def attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Use another attention implementation for a while."""
    own = causal_model(model).config._attn_implementation
    set_attention(model, implementation)
    try:
        yield
    finally:
        set_attention(model, own)


def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of unpadded sequences in blocks of queries, as transformers calls it.

    Args:
        module: the attention module.
        query: [B, H, T, D_k]; `key` [B, H_kv, T, D_k] and `value` [B, H_kv, T, D_v], where H_kv
            divides H.
        attention_mask: none: sequences come without padding.
        scaling: of the scores, 1/√D_k by default.
        sliding_window: how many keys a query sees, itself included; all by default.
        softcap: scores s become c·tanh(s/c).
        kwargs: ignored; what matters among them shows in the comparison with the model's own
            attention.

    Returns:
        [B, T, H, D_v] and no attention weights.
    """
    if attention_mask is not None:
        raise ModelError(
            "block-wise attention takes no mask: run sequences one at a time, without padding"
        )
    form = ScoreForm(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap
    )
    forward = _active.get()
    if forward is None or forward.recording or not forward.directions:
        output = attend(form, query, key, value)
        return (
            forward.keep(module, output) if forward is not None and forward.recording else output
        ), None
    rows, output = query.shape[0], forward.kept(module)
    primals, tangents = zip(
        *(dual.unpack_dual(tensor) for tensor in (query, key, value)), strict=True
    )
    if tangents == (None, None, None):
        return output.expand(rows, -1, -1, -1), None
    tangent = attend_tangent(form, [primal[:1] for primal in primals], tangents, output)
    return dual.make_dual(_rows(output, rows), tangent), None


AttentionInterface.register(BLOCKWISE, blockwise_attention)


@contextmanager
def _running(forward: ForwardMode) -> Iterator[None]:
    """Let the patched modules work for `forward`."""
    token = _active.set(forward)
    try:
        yield
    finally:
        _active.reset(token)


@contextmanager
def _replaced(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Put other tensors in the place of a module's parameters."""
    own: dict[str, Any] = {key: module._parameters[key] for key in tensors}
    module._parameters.update(tensors)  # pyright: ignore[reportCallIssue, reportArgumentType]
    try:
        yield
    finally:
        module._parameters.update(own)


def _tangent(hidden: Tensor) -> Tensor:
    """The tangent of a dual number, 0 where it has none."""
    primal, tangent = dual.unpack_dual(hidden)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()


@cache
def _load_rules() -> None:
    """Let PyTorch load its forward-mode rules, as it does at the first dual number, without a
    warning not meant for users."""
    with warnings.catch_warnings(), dual.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        dual.make_dual(torch.zeros(1), torch.zeros(1))


def _rows(value: Tensor, rows: int) -> Tensor:
    """A primal value [1, …] once for each direction; a copy, because dual numbers need memory of
    their own."""
    return value if rows == 1 else value.expand(rows, *value.shape[1:]).contiguous()


def _row(value: Any, row: int, rows: int) -> Any:
    return (
        value[row : row + 1]
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
        else value
    )


def _batched(rows: int, args: Sequence[Any]) -> bool:
    return all(value.shape[:1] == (rows,) for value in args if isinstance(value, Tensor))


def _has_own_forward(module: nn.Module) -> bool:
    return "forward" in module.__dict__
