"""Parameter scopes: which of the student's parameters θ stands for when a gradient is measured.

A scope is a set of parameters, and a gradient is the total derivative over that set. A tied weight
is *one* parameter, used twice: it belongs to `head`, not to `body`, and its gradient is the sum
over both uses. So `all` is the disjoint union of `body` and `head`, and ‖g‖² of `all` is the sum of
the two, tied or not.

| scope    | parameters |
| -------- | ---------- |
| `all`    | every parameter of the student, whether it would be trained or not |
| `body`   | all but the head's weight and bias: blocks, norms, an untied input embedding |
| `head`   | the output head's weight and bias; a tied weight with both of its uses |
| `last:N` | the last N transformer blocks, without the final norm |
| `lora`   | the adapters of a PEFT model (parameters named `lora_…`) |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tip_analysis.core.errors import ModelError, OptionError, UnknownNameError
from tip_analysis.models.output_head import OutputHead, causal_model, model_body

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class ParameterScope:
    """The parameters of one scope, by the names that the model gives them, each once."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    body: Mapping[str, nn.Parameter]
    """Those that the body uses, a tied embedding included: what a derivative of the hidden states
    can see."""
    head_weight: str | None
    """Name of the output head's weight where the scope holds it."""
    head_bias: str | None

    @property
    def tied(self) -> bool:
        """Whether the head's weight is in the scope and is the input embedding too."""
        return self.head_weight is not None and self.head_weight in self.body

    @property
    def num_bytes(self) -> int:
        """Bytes of the scope's parameters."""
        return sum(
            parameter.numel() * parameter.element_size() for parameter in self.parameters.values()
        )


def parameter_scope(model: nn.Module, head: OutputHead, name: str) -> ParameterScope:
    """The parameters that `name` stands for in this model.

    Raises:
        UnknownNameError: no such scope.
        OptionError: `last:N` with N outside 1 … the number of blocks.
        ModelError: the scope is empty, or holds a parameter that is used neither by the body nor as
            the head's weight.
    """
    select = SCOPES.get(name.split(":", maxsplit=1)[0])
    if select is None or (":" in name) != (select is _last):
        raise UnknownNameError("parameter scope", name, ["all", "body", "head", "last:N", "lora"])
    chosen = select(model, head, name)
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no parameters in the scope {name!r}")
    if quantized := [key for key, parameter in chosen.items() if not parameter.is_floating_point()]:
        raise ModelError(
            f"the scope {name!r} holds quantized weights ({quantized[0]}), which have no gradient;"
            " try lora"
        )
    body_ids = {id(parameter) for parameter in model_body(model).parameters()}
    weight, bias = _head_names(chosen, head)
    body = {key: parameter for key, parameter in chosen.items() if id(parameter) in body_ids}
    if strange := [key for key in chosen if key not in body and key not in (weight, bias)]:
        raise ModelError(
            f"the scope {name!r} holds {strange[0]}, which neither the body nor the plain output"
            " head uses; adapters on the output head are not supported"
        )
    return ParameterScope(name, chosen, body, weight, bias)


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a decoder-only model.

    Raises:
        ModelError: the body holds no list of modules.
    """
    lists = [module for module in model_body(model).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__}: found no list of transformer blocks")
    return max(
        lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters())
    )


def _read_by_text(model: nn.Module) -> Parameters:
    """Every parameter but those of parts that text never reaches (a vision tower), whose gradient
    is 0."""
    causal, body = causal_model(model), model_body(model)
    inside = {id(parameter) for parameter in body.parameters()}
    other_parts = {
        id(parameter)
        for part in causal.modules()
        if any(child is body for child in part.children())
        for child in part.children()
        if child is not body and not _leads_to_logits(causal, child)
        for parameter in child.parameters()
    }
    return {
        key: parameter
        for key, parameter in model.named_parameters()
        if id(parameter) in inside or id(parameter) not in other_parts
    }


def _leads_to_logits(causal: nn.Module, part: nn.Module) -> bool:
    head = causal.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return any(module is head for module in part.modules())


def _all(model: nn.Module, head: OutputHead, name: str) -> Parameters:
    return _read_by_text(model)


def _body(model: nn.Module, head: OutputHead, name: str) -> Parameters:
    own = {id(parameter) for parameter in _head_parameters(head)}
    every = _read_by_text(model)
    return {key: parameter for key, parameter in every.items() if id(parameter) not in own}


def _head(model: nn.Module, head: OutputHead, name: str) -> Parameters:
    own = {id(parameter) for parameter in _head_parameters(head)}
    return {key: parameter for key, parameter in model.named_parameters() if id(parameter) in own}


def _last(model: nn.Module, head: OutputHead, name: str) -> Parameters:
    blocks = transformer_blocks(model)
    count = name.removeprefix("last:")
    if not count.isdigit() or not 1 <= int(count) <= len(blocks):
        raise OptionError(
            f"--params {name!r}: expected last:N with N from 1 to {len(blocks)}, the number of"
            " blocks"
        )
    last = {
        id(parameter) for block in list(blocks)[-int(count) :] for parameter in block.parameters()
    }
    return {key: parameter for key, parameter in model.named_parameters() if id(parameter) in last}


def _lora(model: nn.Module, head: OutputHead, name: str) -> Parameters:
    return {key: parameter for key, parameter in model.named_parameters() if "lora_" in key}


SCOPES: dict[str, Callable[[nn.Module, OutputHead, str], Parameters]] = {
    "all": _all,
    "body": _body,
    "head": _head,
    "last": _last,
    "lora": _lora,
}
"""What each scope (up to its colon) selects."""


def _head_parameters(head: OutputHead) -> list[torch.Tensor]:
    return [
        tensor
        for tensor in (head.linear.weight, getattr(head.linear, "bias", None))
        if isinstance(tensor, torch.Tensor)
    ]


def _head_names(chosen: Parameters, head: OutputHead) -> tuple[str | None, str | None]:
    names = {id(parameter): key for key, parameter in chosen.items()}
    return names.get(id(head.linear.weight)), names.get(id(getattr(head.linear, "bias", None)))
