"""Norms of per-token gradients, ‖∇_θ ℓ_t‖², and where they point (Section 5.1, Proposition 1).

g_t = ∇_θ ℓ_t is the gradient of a token's *own* loss over the student's parameters
(`gradients.scopes`), L the aggregated loss: M_t = ‖g_t‖², φ_t = ⟨∇L, g_t⟩, and Proposition 1's
oracle weight is proportional to φ_t / M_t. The paper states this and never measures it. Both are
measured here at a cost that does not grow with the number of tokens:

- `probe`: ⟨v, g_t⟩ of every token of a sequence is one forward-mode pass along v (`forward_mode`).
  Over Gaussian v its square has the mean M_t and the relative variance 2, so K probes give M_t with
  the relative standard error √(2/K), and an interval from χ²_K (`norm_interval`). Directions are
  fresh for every rollout, keyed by (seed, rollout_id, probe); tokens of one rollout share them, so
  their errors are correlated.
- `exact`: one backward pass a token, several at once for small models.
- φ_t: one backward pass for ∇L (`gradients.loss_gradients`), then one forward-mode pass along it.
  Cross-fitted over prompts.
- The head's part has a closed form (`token_losses`) and is never probed: the standard error is that
  of the probed part.
- One forward-mode pass serves all losses, since they share the hidden states.

Reads rollouts; writes `gradients/*.parquet` (`schema.GradientTable`). Not covered: response tokens
outside `loss_mask`, which have no loss, and tokens of infinite loss, which are counted and left
out; parameters used outside the modules that own them (forward mode would not see them: the first
rollout is checked against a backward pass, and refused if they differ).
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from scipy.stats import chi2
from torch import Tensor
from transformers import PreTrainedModel

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import ModelError, OptionError
from tip_analysis.core.names import Loss, LossAggregation, Method
from tip_analysis.core.schema import GradientTable
from tip_analysis.gradients.loss_gradients import LossDirections, Pair, loss_directions
from tip_analysis.gradients.rollout_gradients import (
    RolloutMeter,
    TokenGradients,
    stratified_positions,
)
from tip_analysis.gradients.scopes import ParameterScope, parameter_scope, transformer_blocks
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.models.loading import LanguageModel, avoid_grouped_kernels
from tip_analysis.models.output_head import OutputHead
from tip_analysis.rollouts.encoded import Rollout

__all__ = [
    "GradientSettings",
    "TokenGradients",
    "model_pair",
    "norm_interval",
    "stratified_positions",
    "stream_gradients",
    "token_gradients",
]

logger = logging.getLogger(__name__)

MEASURES = (
    "grad_norm_sq",
    "grad_norm_sq_se",
    "grad_dot_loss",
    "grad_dot_loss_plugin",
    "reward_alignment",
)
"""The columns of a token that are measured."""


def token_gradients(
    *,
    student: LanguageModel | PreTrainedModel,
    teacher: LanguageModel | PreTrainedModel | None,
    rollouts: Sequence[Rollout],
    loss: Loss | str = Loss.REVERSE_KL,
    param_scope: str = "all",
    method: Method | str = Method.PROBE,
    num_probes: int = 32,
    seed: int = 0,
    loss_aggregation: LossAggregation | str = LossAggregation.ROLLOUT,
) -> dict[str, Tensor]:
    """Norm and alignment of every token's own gradient, for one batch of rollouts; L is the loss of
    this batch.

    Args:
        student: P_S, whose parameters θ are meant.
        teacher: P_T, held constant; None serves for `negative_logprob`.
        rollouts: token ids of prompts and responses, with teacher prompts, masks and rewards where
            there are any.
        loss: ℓ_t, a name of `divergence.LOSSES`.
        param_scope: what θ stands for: all, body, head, last:N, lora.
        method: `probe` (K forward-mode passes a rollout) or `exact` (a backward pass a token).
        num_probes: K.
        seed: of probes and folds.
        loss_aggregation: L over rollouts, `rollout` or `token`.

    Returns:
        Tensors [N], one entry per response token that counts: `rollout` (index into `rollouts`),
        `position`, and, in float64, the columns of `schema.GradientTable` from `grad_norm_sq` on;
        NaN where the table has null.

    Naive equivalent of `method="exact"`: `sum(g.square().sum() for g in
    torch.autograd.grad(loss[t], parameters))` for each t.
    """
    settings = GradientSettings((loss,), param_scope, method, num_probes, seed, loss_aggregation)
    parts: list[dict[str, Tensor]] = []
    for index, found in measure_rollouts(model_pair(student, teacher), rollouts, settings):
        for result in found.values():
            nothing = torch.full((len(result.positions),), math.nan, dtype=torch.float64)
            values = {column: getattr(result, column) for column in MEASURES}
            part = {name: nothing if v is None else v.cpu() for name, v in values.items()}
            position = torch.tensor(result.positions, dtype=torch.long)
            parts.append({"rollout": torch.full_like(position, index), "position": position} | part)
    if not parts:
        raise OptionError("token_gradients: no rollout has a response token that counts")
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def measure_rollouts(
    pair: Pair,
    rollouts: Sequence[Rollout],
    settings: GradientSettings,
    *,
    directions: LossDirections | None = None,
    folder: Path | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[tuple[int, dict[str, TokenGradients]]]:
    """Measure rollouts one by one; yields the index of each and, by loss, what was found.

    Args:
        pair: student and teacher, see `model_pair`.
        rollouts: the token set of L.
        settings: what is measured, and how.
        directions: ∇L and ∇J if they are there already.
        folder: where ∇L and ∇J are kept while they are needed; in memory by default.
        only: indices of the rollouts to measure; all by default.

    Raises:
        OptionError: a loss needs a teacher, and there is none.
        ModelError: forward mode does not see all parameters of the scope.
    """
    if pair.teacher is None and any(loss != Loss.NEGATIVE_LOGPROB for loss in settings.losses):
        raise OptionError(
            f"losses {', '.join(settings.losses)}: all but negative_logprob need a teacher"
        )
    scope = parameter_scope(pair.student.model, pair.student.head, settings.param_scope)
    _check_scope(pair, scope, settings, rollouts)
    if directions is None:
        directions = loss_directions(
            pair,
            scope,
            rollouts,
            losses=settings.losses,
            aggregation=settings.loss_aggregation,
            seed=settings.seed,
            folder=folder,
        )
    with RolloutMeter(pair, scope, settings, directions) as meter:
        for index in range(len(rollouts)) if only is None else only:
            yield index, meter.measure(rollouts[index])
    if meter.num_infinite:
        logger.warning("%d tokens have an infinite loss and are left out", meter.num_infinite)


def _check_scope(
    pair: Pair, scope: ParameterScope, settings: GradientSettings, rollouts: Sequence[Rollout]
) -> None:
    """Refuse a scope that forward mode cannot see, before ∇L is made; names the largest that it
    can."""
    first = next((rollout for rollout in rollouts if rollout.num_tokens), None)
    if first is None or settings.method is Method.EXACT:
        return
    problem = _problem(pair, scope, settings, first)
    if problem is None:
        return
    blocks = len(transformer_blocks(pair.student.model))
    smaller = ["body", *(f"last:{count}" for count in range(blocks - 1, 0, -1)), "head"]
    for name in smaller[smaller.index(scope.name) + 1 :] if scope.name in smaller else smaller:
        other = parameter_scope(pair.student.model, pair.student.head, name)
        if _problem(pair, other, settings, first) is None:
            raise ModelError(f"{problem}. The largest scope that works here is --params {name}")
    raise ModelError(problem)


def _problem(
    pair: Pair, scope: ParameterScope, settings: GradientSettings, rollout: Rollout
) -> str | None:
    nothing = LossDirections({}, {}, (0.0, 0.0), {})
    try:
        with RolloutMeter(pair, scope, settings, nothing) as meter:
            meter.verify(rollout)
    except ModelError as error:
        return str(error)
    return None


def stream_gradients(
    pair: Pair,
    rollouts: Sequence[Rollout],
    settings: GradientSettings,
    *,
    directions: LossDirections | None = None,
    folder: Path | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[pl.DataFrame]:
    """Rows of `schema.GradientTable`, one frame per rollout; arguments as of `measure_rollouts`."""
    found = measure_rollouts(
        pair, rollouts, settings, directions=directions, folder=folder, only=only
    )
    for index, by_loss in found:
        yield gradient_rows(rollouts[index].rollout_id, by_loss, settings)


def gradient_rows(
    rollout_id: str, found: dict[str, TokenGradients], settings: GradientSettings
) -> pl.DataFrame:
    """What was measured of one rollout, as rows of `schema.GradientTable`."""
    schema = polars_schema(GradientTable)
    frames = [pl.DataFrame(schema=schema)]
    for loss, result in found.items():
        columns: dict[str, Any] = {
            "rollout_id": rollout_id,
            "position": result.positions,
            "loss": str(loss),
            "param_scope": settings.param_scope,
            "method": settings.method,
            "num_probes": settings.num_probes if settings.method is Method.PROBE else 0,
            "seed": settings.seed,
        }
        for name in MEASURES:
            value = getattr(result, name)
            columns[name] = None if value is None else value.cpu().numpy()
        if result.positions:
            frames.append(pl.DataFrame(columns, schema=schema))
    return pl.concat(frames)


def norm_interval(
    grad_norm_sq: Any, grad_norm_sq_se: Any, num_probes: int, level: float = 0.95
) -> tuple[Any, Any]:
    """Interval of ‖g_t‖² that holds with probability `level`: the probed part over χ²_K / K, the
    closed form added.

    Args:
        grad_norm_sq: estimates, anything with arithmetic (array, tensor, series).
        grad_norm_sq_se: their standard errors, √(2/K) of the probed part.
        num_probes: K.
        level: in (0, 1).
    """
    probed = grad_norm_sq_se * math.sqrt(num_probes / 2)
    closed = grad_norm_sq - probed
    low, high = chi2.ppf([(1 - level) / 2, (1 + level) / 2], num_probes)
    return closed + probed * float(num_probes / high), closed + probed * float(num_probes / low)


def model_pair(
    student: LanguageModel | PreTrainedModel, teacher: LanguageModel | PreTrainedModel | None
) -> Pair:
    """Student and teacher for measuring; bare models of transformers get their output heads checked
    here."""
    first, second = _language_model(student), None if teacher is None else _language_model(teacher)
    return Pair(
        first,
        second,
        first.vocab_size if second is None else min(first.vocab_size, second.vocab_size),
    )


def _language_model(model: LanguageModel | PreTrainedModel) -> LanguageModel:
    if isinstance(model, LanguageModel):
        return model
    avoid_grouped_kernels(model)
    head, training = OutputHead(model), model.training
    model.eval()
    head.verify()
    model.train(training)
    return LanguageModel(type(model).__name__, model, None, head)  # pyright: ignore
