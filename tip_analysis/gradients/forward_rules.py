"""Forward-mode rules for what lacks one: custom functions, and fused kernels of experts.

A custom function with a backward pass alone has its derivative along ẋ all the same: its backward
u ↦ Jᵀu is linear in u, so the derivative of ⟨Jᵀu, ẋ⟩ with respect to u is J ẋ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as dual
from torch import Tensor

from tip_analysis.models.loading import has_experts
from tip_analysis.models.output_head import causal_model


@contextmanager
def custom_functions() -> Iterator[None]:
    """Let custom functions without a forward-mode rule be differentiated by their backward pass."""
    own = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        ordinary = own.__get__(None, cls)
        if cls.jvp is not torch.autograd.Function.jvp or kwargs:
            return ordinary(*args, **kwargs)
        parts = [dual.unpack_dual(arg) if isinstance(arg, Tensor) else None for arg in args]
        if all(part is None or part.tangent is None for part in parts):
            return ordinary(*args)
        return _along(ordinary, args, parts)

    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore
    try:
        yield
    finally:
        torch.autograd.Function.apply = own


def _along(ordinary: Any, args: Any, parts: Any) -> Tensor:
    """The dual output of a function of one output: its value, and J ẋ through two backward
    passes."""
    moving = [i for i, part in enumerate(parts) if part is not None and part.tangent is not None]
    with torch.enable_grad():
        primals = [args[i] if part is None else part.primal for i, part in enumerate(parts)]
        for i in moving:
            primals[i] = primals[i].detach().requires_grad_()
        value = ordinary(*primals)
        cotangent = torch.zeros_like(value, requires_grad=True)
        pulled = torch.autograd.grad(
            value, [primals[i] for i in moving], cotangent, create_graph=True
        )
        products = [part * parts[i].tangent for part, i in zip(pulled, moving, strict=True)]
        along = torch.stack([product.sum() for product in products]).sum()
        (tangent,) = torch.autograd.grad(along, cotangent)
    return dual.make_dual(value.detach(), tangent)


def set_experts(model: Any, implementation: str | None) -> None:
    """Let a mixture of experts compute its experts by another implementation, where it has one."""
    causal = causal_model(model)
    if implementation is not None and has_experts(causal):
        causal.set_experts_implementation(implementation)


def experts(model: Any) -> str | None:
    """The implementation of a model's experts; None where it has none to choose."""
    causal = causal_model(model)
    return causal.config._experts_implementation if has_experts(causal) else None
