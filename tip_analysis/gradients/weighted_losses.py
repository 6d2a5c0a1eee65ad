"""Gradients of several weighted losses at once, and their products with every token's gradient.

A source is a loss with one weight a token: that of a quadrant, of a selection, of all, or −J.
Prompts are dealt to two folds, as for φ. For each source and fold one gradient is accumulated
(backward passes); then every token's gradient g_t is multiplied with the sources' gradients from
the *other* fold (one forward-mode pass a source and rollout). No token has a backward pass of its
own.

From these products follow, cross-fitted, all inner products of the sources' gradients:
⟨∇L_a, ∇L_b⟩ = Σ_t w_b,t ⟨∇L_a, g_t⟩, t in one fold and ∇L_a from the other.

A preconditioner multiplies the sources' gradients by 1/(√v̂ + ε) before the forward-mode passes, v̂
being the mean over optimizer steps of the squared gradient of their batches, as Adam's second
moment settles where the student stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tip_analysis.core.names import Loss
from tip_analysis.core.progress import track
from tip_analysis.gradients.directions import Direction, StoredDirection
from tip_analysis.gradients.loss_gradients import (
    LossDirections,
    Pair,
    accumulating,
    prompt_folds,
    through_head,
)
from tip_analysis.gradients.rollout_gradients import RolloutMeter
from tip_analysis.gradients.scopes import ParameterScope
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.gradients.token_losses import TeacherLogits
from tip_analysis.models.hidden_states import last_hidden_states, read_tokens
from tip_analysis.rollouts.encoded import Rollout

HELD_BYTES = 1 << 30
"""Gradients that are accumulated at once, at most, where one is smaller."""
ADAM_EPSILON = 1e-8

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A weighted loss Σ_t w_t ℓ_t."""

    name: str
    weights: Mapping[str, Tensor]
    """Of the counted tokens of each rollout, [R] float64 (`fold_weights` says of what scale)."""
    loss: Loss = Loss.REVERSE_KL


@dataclass(frozen=True)
class SourceGradients:
    """The gradient of each source from each fold of prompts."""

    folds: Mapping[str, int]
    """The fold, 0 or 1, of each prompt."""
    stored: Mapping[tuple[str, int], StoredDirection]
    """By source and fold; absent where a fold has no token of the source."""
    prompt_norms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """‖∇ of the source's loss over one prompt‖², by source and prompt, with the weights given."""

    def other(self, prompt_id: str) -> dict[str, Direction]:
        """The sources' gradients from the other fold than a prompt's."""
        wanted = 1 - self.folds[prompt_id]
        return {name: one for (name, fold), one in self.stored.items() if fold == wanted}


def fold_weights(
    rollouts: Sequence[Rollout], folds: Mapping[str, int], shares: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights that make a fold's loss the mean over its rollouts of Σ_t share_t ℓ_t.

    Args:
        rollouts: the token set.
        folds: of the prompts.
        shares: of each rollout's counted tokens, [R]; for the mean over tokens 1/R each.
    """
    sizes = [0, 0]
    for rollout in rollouts:
        sizes[folds[rollout.prompt_id]] += 1
    return {
        rollout.rollout_id: shares[rollout.rollout_id] / sizes[folds[rollout.prompt_id]]
        for rollout in rollouts
    }


def source_gradients(
    pair: Pair,
    scope: ParameterScope,
    rollouts: Sequence[Rollout],
    sources: Sequence[Source],
    *,
    seed: int = 0,
    folder: Path | None = None,
    precondition: Gradient | None = None,
) -> SourceGradients:
    """The gradient of every source over each fold of prompts.

    Args:
        pair: student and teacher.
        scope: what θ stands for.
        rollouts: the token set; those of a prompt follow one another.
        sources: the weighted losses.
        seed: of the folds, as for φ.
        folder: where gradients are kept; in memory by default.
        precondition: by parameter, what the gradients are multiplied by (`adam_preconditioner`);
            norms by prompt are those of the plain gradients.
    """
    folds = prompt_folds([rollout.prompt_id for rollout in rollouts], seed)
    num_bytes = sum(p.numel() for p in scope.parameters.values()) * 8
    together = max(1, int(HELD_BYTES // (2 * max(1, num_bytes))))
    teacher = _TeacherLogits(pair)
    stored: dict[tuple[str, int], StoredDirection] = {}
    norms: dict[str, dict[str, float]] = {}
    with track("∇ of sources", total=2 * len(rollouts) * len(sources)) as advance:
        for start in range(0, len(sources), together):
            part = sources[start : start + together]
            for fold in (0, 1):
                inside = [r for r in rollouts if r.num_tokens and folds[r.prompt_id] == fold]
                totals, squares = _accumulate(pair, scope, inside, part, teacher)
                for source in part:
                    norms.setdefault(source.name, {}).update(squares[source.name])
                    if squares[source.name]:
                        direction = _direction(totals[source.name], precondition)
                        place = None if folder is None else folder / f"{len(stored):05d}"
                        key = source.name, fold
                        stored[key] = direction if place is None else direction.save(place)
                advance(len(inside) * len(part))
    return SourceGradients(folds, stored, norms)


def _direction(gradient: Gradient, precondition: Gradient | None) -> StoredDirection:
    for name, factor in (precondition or {}).items():
        gradient[name].mul_(factor.to(gradient[name]))
    return StoredDirection.normalised(gradient)


class _TeacherLogits:
    """The teacher's hidden states of each rollout, made once: they serve every source."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._made: dict[str, TeacherLogits | None] = {}

    def rows(self, rollout: Rollout, chosen: Tensor) -> TeacherLogits | None:
        """The logits of some of a rollout's counted tokens, by their index [n]."""
        if rollout.rollout_id not in self._made:
            self._made[rollout.rollout_id] = self._pair.teacher_logits(rollout, rollout.positions)
        every = self._made[rollout.rollout_id]
        return None if every is None else lambda rows: every(chosen[rows])  # pyright: ignore


def _accumulate(
    pair: Pair,
    scope: ParameterScope,
    rollouts: Sequence[Rollout],
    sources: Sequence[Source],
    teacher: _TeacherLogits,
) -> tuple[dict[str, Gradient], dict[str, dict[str, float]]]:
    """Of each source the gradient over these rollouts, and the squared norm of each prompt's."""
    totals = {source.name: _zeros(pair, scope) for source in sources}
    squares: dict[str, dict[str, float]] = {source.name: {} for source in sources}
    current = _zeros(pair, scope)
    for source in sources:
        with accumulating(pair.student.model, scope, current):
            for prompt_id, group in _by_prompt(rollouts).items():
                if _add(pair, group, source, teacher):
                    squares[source.name][prompt_id] = _move(current, totals[source.name])
    return totals, squares


def _zeros(pair: Pair, scope: ParameterScope) -> Gradient:
    precise = torch.promote_types(pair.student.dtype, torch.float32)
    return {
        name: torch.zeros_like(parameter, dtype=precise, requires_grad=False)
        for name, parameter in scope.parameters.items()
    }


def _by_prompt(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt_id, []).append(rollout)
    return groups


def _move(current: Gradient, total: Gradient) -> float:
    """Add a prompt's gradient to the total, and empty it; returns its squared norm."""
    square = 0.0
    for name, tensor in current.items():
        square += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        total[name] += tensor
        tensor.zero_()
    return square


def _add(pair: Pair, rollouts: Sequence[Rollout], source: Source, teacher: _TeacherLogits) -> bool:
    """Backward passes of one source over some rollouts; whether any token has weight."""
    any_weight = False
    for rollout in rollouts:
        weights = source.weights[rollout.rollout_id]
        chosen = weights.nonzero()[:, 0]
        if not len(chosen):
            continue
        any_weight = True
        positions = [rollout.positions[index] for index in chosen.tolist()]
        device = pair.student.device
        tokens, at = read_tokens(rollout.prompt, rollout.response, positions, device)
        hidden = last_hidden_states(pair.student.model, tokens[None])[0, at]
        targets = torch.tensor([rollout.response[t] for t in positions], device=device)
        logits = None if source.loss is Loss.NEGATIVE_LOGPROB else teacher.rows(rollout, chosen)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        share = weights[chosen].to(device, precise)
        gradient = through_head(pair, hidden, logits, targets, share, source.loss)
        if hidden.requires_grad:
            hidden.backward(gradient)
    return any_weight


def adam_preconditioner(
    pair: Pair,
    scope: ParameterScope,
    rollouts: Sequence[Rollout],
    source: Source,
    batch_of: Mapping[str, int],
    *,
    epsilon: float = ADAM_EPSILON,
) -> Gradient:
    """1 / (√v̂ + ε) of every parameter, v̂ the mean over batches of (∇ of the batch's loss)².

    Args:
        source: the full loss; each batch's is scaled to a loss of its own.
        batch_of: the optimizer step that each rollout belongs to.
        epsilon: Adam's ε.
    """
    teacher = _TeacherLogits(pair)
    batches: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        batches.setdefault(batch_of[rollout.rollout_id], []).append(rollout)
    mean, current = _zeros(pair, scope), _zeros(pair, scope)
    with accumulating(pair.student.model, scope, current), track("v̂", len(batches)) as advance:
        for group in batches.values():
            _add(pair, group, source, teacher)
            whole = sum(float(source.weights[r.rollout_id].sum()) for r in group) or 1.0
            for name, tensor in current.items():
                mean[name] += (tensor / whole).square() / len(batches)
                tensor.zero_()
            advance(1)
    return {name: 1.0 / (tensor.sqrt() + epsilon) for name, tensor in mean.items()}


def stream_products(
    pair: Pair,
    scope: ParameterScope,
    rollouts: Sequence[Rollout],
    gradients: SourceGradients,
    losses: Sequence[Loss] = (Loss.REVERSE_KL,),
) -> Iterator[tuple[Rollout, list[int], dict[Loss, dict[str, Tensor]]]]:
    """Of every rollout, positions [R] and ⟨∇source, g_t⟩ [R] by loss of g_t and source, the
    source's gradient from the other fold; NaN where the loss is infinite.

    Raises:
        ModelError: forward mode does not see all parameters of the scope.
    """
    settings = GradientSettings(losses=tuple(losses), param_scope=scope.name)
    nothing = LossDirections({}, {}, (0.0, 0.0), {})
    with RolloutMeter(pair, scope, settings, nothing) as meter:
        for rollout in rollouts:
            along = gradients.other(rollout.prompt_id)
            positions, found = meter.along(rollout, dict.fromkeys(losses, along))
            yield rollout, positions, found
