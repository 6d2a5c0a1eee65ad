"""Optimizers of a training, and steps of a given length.

AdamW divides each coordinate's mean gradient by the root of its mean square, so that the length of
a step depends on how steady a gradient is, not on how large. SGD's step is as long as the gradient.
`match_update_norm` takes the length out of a comparison: every step keeps its direction and gets
the length that was asked for, times the schedule.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tip_analysis.core.names import OptimizerName
from tip_analysis.training.options import TrainingOptions


def build_optimizer(
    parameters: Sequence[nn.Parameter], options: TrainingOptions
) -> torch.optim.Optimizer:
    """The optimizer that the options name, over these parameters.

    AdamW has betas of (0.9, 0.999); its ε is added to the root of the second moment. SGD has the
    options' momentum, without dampening. Weight decay is decoupled in both.
    """
    if options.optimizer == OptimizerName.SGD:
        return torch.optim.SGD(parameters, lr=options.learning_rate, momentum=options.momentum)
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(0.9, 0.999),
        eps=options.adam_epsilon,
        weight_decay=options.weight_decay,
        fused=True,
    )


def descend(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    options: TrainingOptions,
    learning_rate: float,
) -> None:
    """One step of the optimizer at a learning rate; of the length that `match_update_norm` asks
    for, where it is set, times the learning rate over its peak."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if options.match_update_norm is None:
        _step(optimizer, parameters, options, learning_rate)
        return
    before = [parameter.detach().clone() for parameter in parameters]
    _step(optimizer, parameters, options, learning_rate)
    length = options.match_update_norm * learning_rate / options.learning_rate
    _rescale(parameters, before, length)


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    options: TrainingOptions,
    learning_rate: float,
) -> None:
    if options.optimizer == OptimizerName.SGD and options.weight_decay:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.0 - learning_rate * options.weight_decay)
    optimizer.step()


@torch.no_grad()
def _rescale(parameters: Sequence[nn.Parameter], before: Sequence[Tensor], length: float) -> None:
    """Give the change since `before` an L2 norm of `length`; no change stays none."""
    norm = update_norm(parameters, before)
    if norm == 0.0:
        return
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(old + (parameter - old) * (length / norm))


@torch.no_grad()
def update_norm(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> float:
    """L2 norm of the change of all parameters since `before`."""
    squares = [
        float((parameter - old).double().square().sum())
        for parameter, old in zip(parameters, before, strict=True)
    ]
    return math.sqrt(sum(squares))
