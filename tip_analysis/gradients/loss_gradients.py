"""Gradients of whole losses over the student's parameters: ∇L and ∇J, by fold of prompts.

φ_t = ⟨∇L, g_t⟩ with its own token inside L contains ‖g_t‖²/m and is positive by construction. So
prompts are dealt to two folds, and a token's φ_t takes ∇L from the other fold (cross-fitting); the
plug-in value, from all, is what the two folds sum up to.

∇J is a score-function estimate of the gradient of the expected reward: per prompt, the mean over
its n rollouts of (r_i − b_i) ∇ ln P_S(y_i), b_i being the mean reward of the *other* rollouts of
the prompt (so that it is unbiased); then the mean over prompts. A prompt with fewer than two graded
rollouts has no baseline and is left out. Rollouts count as samples of the student at temperature 1;
for others ∇J is off-policy.

A gradient is accumulated in float32 (float64 for a float64 model), parameter by parameter as the
backward pass makes it, and may be kept on disk: beside the model there is never more than one
gradient in memory, plus the largest single parameter's.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from tip_analysis.core.names import Loss, LossAggregation
from tip_analysis.core.progress import track
from tip_analysis.gradients.directions import Direction, StoredDirection, stable_hash
from tip_analysis.gradients.scopes import ParameterScope
from tip_analysis.gradients.token_losses import BLOCK_ELEMENTS, TeacherLogits, token_loss
from tip_analysis.logits.blocks import row_blocks
from tip_analysis.models.hidden_states import last_hidden_states, read_tokens
from tip_analysis.models.loading import LanguageModel
from tip_analysis.rollouts.encoded import Rollout

REWARD = "reward"
"""Where a loss is named: the expected reward J instead."""


@dataclass(frozen=True)
class Pair:
    """Student and teacher, and how many logits they share."""

    student: LanguageModel
    teacher: LanguageModel | None
    vocab_size: int

    @torch.no_grad()
    def teacher_logits(self, rollout: Rollout, positions: Sequence[int]) -> TeacherLogits | None:
        """The teacher's logits at these positions of a response, block by block; None without a
        teacher."""
        if self.teacher is None:
            return None
        teacher = self.teacher
        prompt = rollout.prompt_of(teacher=True)
        tokens, at = read_tokens(prompt, rollout.response, positions, teacher.device)
        hidden = last_hidden_states(teacher.model, tokens[None])[0, at]

        def logits(rows: slice) -> Tensor:
            with torch.no_grad():
                return teacher.head(hidden[rows])[:, : self.vocab_size].to(self.student.device)

        return logits


@dataclass(frozen=True)
class LossDirections:
    """∇L of each loss, and ∇J, from each fold of prompts."""

    folds: dict[str, int]
    """The fold, 0 or 1, of each prompt."""
    stored: dict[tuple[str, int], StoredDirection]
    """By loss (or `REWARD`) and fold; absent where a fold has no tokens, or no reward that differs
    within a prompt."""
    weights: tuple[float, float]
    """Share of each fold in the plug-in: of its rollouts, or of its tokens."""
    counts: dict[str, list[int]]
    """Prompts, rollouts and tokens in L, by fold: for the record."""

    def of(self, loss: str, prompt_id: str, *, own: bool = False) -> StoredDirection | None:
        """The gradient from the other fold than a prompt's, or from its own."""
        fold = self.folds[prompt_id]
        return self.stored.get((loss, fold if own else 1 - fold))


def prompt_folds(prompt_ids: Sequence[str], seed: int) -> dict[str, int]:
    """Deal prompts to two folds of equal size (the first has one more if need be), whatever their
    order."""
    order = sorted(
        set(prompt_ids), key=lambda prompt_id: (stable_hash("fold", seed, prompt_id), prompt_id)
    )
    half = (len(order) + 1) // 2
    return {prompt_id: int(index >= half) for index, prompt_id in enumerate(order)}


def loss_directions(
    pair: Pair,
    scope: ParameterScope,
    rollouts: Sequence[Rollout],
    *,
    losses: Sequence[Loss | str],
    aggregation: LossAggregation | str = LossAggregation.ROLLOUT,
    seed: int = 0,
    folder: Path | None = None,
) -> LossDirections:
    """∇L of every loss, and ∇J where there are rewards, from each of two folds of prompts.

    Args:
        pair: student and teacher.
        scope: what θ stands for.
        rollouts: the token set of L.
        losses: names of `divergence.LOSSES`.
        aggregation: of L over rollouts: `rollout` (mean of rollout means) or `token`.
        seed: of the folds.
        folder: where gradients are kept, and found again by a later call with the same arguments;
            in memory by default.

    Raises:
        UnknownNameError: no such loss or aggregation.
    """
    losses, aggregation = list(map(Loss, losses)), LossAggregation(aggregation)
    folds = prompt_folds([rollout.prompt_id for rollout in rollouts], seed)
    members = [
        [r for r in rollouts if r.num_tokens and folds[r.prompt_id] == fold] for fold in (0, 1)
    ]
    stored = {}
    for fold, inside in enumerate(members):
        for name in [*losses, REWARD]:
            if (weights := _token_weights(inside, name, aggregation)) is None:
                continue
            place = None if folder is None else folder / f"{name}-{fold}"
            loss = Loss.NEGATIVE_LOGPROB if name == REWARD else Loss(name)
            stored[name, fold] = _direction(pair, scope, inside, weights, loss, place)
    sizes = [
        len(inside) if aggregation is LossAggregation.ROLLOUT else sum(r.num_tokens for r in inside)
        for inside in members
    ]
    total = max(1, sum(sizes))
    counts = {
        "prompts": [len({r.prompt_id for r in inside}) for inside in members],
        "rollouts": [len(inside) for inside in members],
        "tokens": [sum(r.num_tokens for r in inside) for inside in members],
    }
    return LossDirections(folds, stored, (sizes[0] / total, sizes[1] / total), counts)


def _direction(
    pair: Pair,
    scope: ParameterScope,
    rollouts: Sequence[Rollout],
    weights: Sequence[float],
    loss: Loss,
    place: Path | None,
) -> StoredDirection:
    if place is not None and (place / "index.json").is_file():
        return StoredDirection.load(place)
    direction = StoredDirection.normalised(weighted_gradient(pair, scope, rollouts, weights, loss))
    return direction if place is None else direction.save(place)


def _token_weights(
    rollouts: Sequence[Rollout], name: str, aggregation: LossAggregation
) -> list[float] | None:
    """The weight of each token of each rollout in L or −J; None where there is nothing to weigh."""
    if name == REWARD:
        return reward_weights(rollouts)
    if not rollouts:
        return None
    if aggregation is LossAggregation.TOKEN:
        return [1 / sum(rollout.num_tokens for rollout in rollouts)] * len(rollouts)
    return [1 / (len(rollouts) * rollout.num_tokens) for rollout in rollouts]


def reward_weights(rollouts: Sequence[Rollout]) -> list[float] | None:
    """Weights on −ln P_S(y_t) that make ∇J: −(r_i − b_i) / (n·prompts), with the leave-one-out
    baseline b_i."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        if rollout.reward is not None:
            rewards[rollout.prompt_id].append(rollout.reward)
    usable = {prompt_id: values for prompt_id, values in rewards.items() if len(values) > 1}
    if not any(len(set(values)) > 1 for values in usable.values()):
        return None
    weights = []
    for rollout in rollouts:
        values = usable.get(rollout.prompt_id)
        if values is None or rollout.reward is None:
            weights.append(0.0)
            continue
        advantage = (rollout.reward - fmean(values)) * len(values) / (len(values) - 1)
        weights.append(-advantage / (len(values) * len(usable)))
    return weights


def weighted_gradient(
    pair: Pair,
    scope: ParameterScope,
    rollouts: Sequence[Rollout],
    weights: Sequence[float],
    loss: Loss,
) -> dict[str, Tensor]:
    """Σ over rollouts of weight · Σ_t ∇ℓ_t, by parameter name, in float32 or better.

    Tokens whose loss is infinite (the teacher rules out what the student allows) are left out: they
    count in the weights of their rollout as tokens without a gradient.
    """
    model = pair.student.model
    precise = torch.promote_types(pair.student.dtype, torch.float32)
    total = {
        name: torch.zeros_like(p, dtype=precise, requires_grad=False)
        for name, p in scope.parameters.items()
    }
    with accumulating(model, scope, total), track(f"∇ {loss}", total=len(rollouts)) as advance:
        for rollout, weight in zip(rollouts, weights, strict=True):
            if weight:
                positions = rollout.positions
                tokens, at = read_tokens(
                    rollout.prompt, rollout.response, positions, pair.student.device
                )
                targets = torch.tensor(
                    [rollout.response[t] for t in positions], device=tokens.device
                )
                teacher = pair.teacher_logits(rollout, positions)
                hidden = last_hidden_states(model, tokens[None])[0, at]
                gradient = through_head(pair, hidden, teacher, targets, weight, loss)
                if hidden.requires_grad:
                    hidden.backward(gradient)
            advance(tokens=rollout.num_tokens)
    return total


def through_head(
    pair: Pair,
    hidden: Tensor,
    teacher: TeacherLogits | None,
    targets: Tensor,
    weight: float | Tensor,
    loss: Loss,
) -> Tensor:
    """Backward through the head, block by block (its own parameters collect their gradients), of
    the losses at R tokens under one weight or one each [R]; returns ∂/∂h [R, D]."""
    head = pair.student.head
    gradients, block = [], max(1, BLOCK_ELEMENTS // head.vocab_size)
    for rows in row_blocks(hidden.shape[0], block):
        states = hidden[rows].detach().requires_grad_()
        logits = head(states)[:, : pair.vocab_size]
        value = token_loss(loss, logits, None if teacher is None else teacher(rows), targets[rows])
        keep = value.isfinite()
        if not keep.all():
            logits = head(states[keep])[:, : pair.vocab_size]
            value = token_loss(
                loss, logits, None if teacher is None else teacher(rows)[keep], targets[rows][keep]
            )
        if isinstance(weight, Tensor):
            (value * weight[rows][keep]).sum().backward()
        else:
            (value.sum() * weight).backward()
        gradients.append(torch.zeros_like(states) if states.grad is None else states.grad)
    return torch.cat(gradients)


@contextmanager
def trainable(model: nn.Module, scope: ParameterScope) -> Iterator[None]:
    """Let exactly the scope's parameters require gradients, in evaluation mode; both are put back
    afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training, inside = model.training, {id(parameter) for parameter in scope.parameters.values()}
    for parameter in flags:
        parameter.requires_grad_(id(parameter) in inside)
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)


@contextmanager
def accumulating(
    model: nn.Module, scope: ParameterScope, total: dict[str, Tensor]
) -> Iterator[None]:
    """Add every gradient that a backward pass makes to `total`, and keep none of them."""
    own = {name: parameter.grad for name, parameter in scope.parameters.items()}

    def collect(name: str) -> "torch.utils.hooks.RemovableHandle":
        def add(parameter: Tensor) -> None:
            total[name] += parameter.grad  # pyright: ignore[reportOperatorIssue]
            parameter.grad = None

        return scope.parameters[name].register_post_accumulate_grad_hook(add)

    with trainable(model, scope):
        for parameter in scope.parameters.values():
            parameter.grad = None
        handles = [collect(name) for name in scope.parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, parameter in scope.parameters.items():
                parameter.grad = own[name]


def inner_product(
    gradient: dict[str, Tensor],
    direction: Direction,
    scope: ParameterScope,
    looked_up: dict[str, Tensor],
) -> float:
    """⟨gradient, direction⟩, over only the rows `looked_up` of an embedding, which alone are not
    0."""
    total = 0.0
    for name, tensor in gradient.items():
        parameter = scope.parameters[name]
        if (ids := looked_up.get(name)) is not None:
            total += float(
                (tensor[ids].double() * direction.rows(name, parameter, ids).double()).sum()
            )
        else:
            total += float((tensor.double() * direction.tensor(name, parameter).double()).sum())
    return total
