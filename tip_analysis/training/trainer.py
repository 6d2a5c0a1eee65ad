"""Masked on-policy distillation: sample from the student, score, select, and descend on the
divergence of what was selected.

One step (Section 7): the student as it is writes `prompts_per_step × rollouts_per_prompt` rollouts;
both models' last hidden states at their tokens give the statistics that the rule reads; ρ of the
tokens are selected; the loss is the mean divergence over these only (Eq. 9), whatever the ranking
signal was. Offline, rollouts and masks are fixed and a step begins at the loss.

Precision: trainable weights, their gradients and the optimizer's moments are float32. With
`bfloat16`, forward passes run under autocast and frozen weights (the teacher, the base under LoRA)
are bfloat16, so that an update far below a weight's bfloat16 spacing (the usual case at 1e-6) is
not rounded away. Softmaxes and losses are in float32 in either case.

Dropout is off: the distribution that is trained is the one that was scored. Nothing in a step draws
from a generator with state, so a training that is resumed from a checkpoint ends with the weights
of an uninterrupted one.

Deviations from the paper: the cosine schedule ends at 0; weight decay is 0; neither is stated
there.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.weightings import NO_WEIGHTING, weighting_of
from tip_analysis.core.errors import LogitsError, OptionError
from tip_analysis.core.names import Precision
from tip_analysis.models.batching import plan_batches
from tip_analysis.models.hidden_states import chosen_hidden_states
from tip_analysis.models.loading import LanguageModel, shared_vocabulary
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.data import FixedRollouts, OnPolicyRollouts
from tip_analysis.training.masked_loss import scaled_weights, weighted_divergence
from tip_analysis.training.observing import OBSERVED_COLUMNS, observed
from tip_analysis.training.optimizers import build_optimizer, descend
from tip_analysis.training.options import TrainingOptions, learning_rate_at
from tip_analysis.training.processes import ALONE, Processes
from tip_analysis.training.step_pieces import (
    micro_batches_of,
    per_rollout,
    restoring_order,
    scatter,
    shares_of,
    token_order,
    tokens_of,
)
from tip_analysis.training.step_selection import (
    needed_statistics,
    select_and_weigh,
    step_statistics,
    step_table,
    weighting_statistics,
)

logger = logging.getLogger(__name__)

RESCORED_TOGETHER = 64
"""Rollouts whose hidden states are held at once when fixed rollouts are scored again."""


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did."""

    step: int
    loss: float
    """Mean divergence over the selected tokens in nats (as normalised); 0 where nothing was
    selected."""
    learning_rate: float
    grad_norm: float
    """Norm of the gradient before clipping."""
    num_rollouts: int
    tokens_seen: int
    """Tokens that the student wrote."""
    tokens_trained: int
    """Tokens that carried loss."""
    updated: bool
    """False where no token was selected: the weights are what they were."""
    time_s: float
    observed: dict[str, float | None] = field(default_factory=dict)
    """What the student wrote at that step (`Trainer.observe`); empty at steps that are not
    observed, and None for what is not known."""


class Trainer:
    """One training: a student, its teacher, where its rollouts come from, and the steps done so
    far."""

    def __init__(
        self,
        *,
        student: LanguageModel,
        teacher: LanguageModel,
        source: OnPolicyRollouts | FixedRollouts,
        options: TrainingOptions,
        processes: Processes = ALONE,
    ) -> None:
        """Begin a training.

        Args:
            student: as `prepare_student` gives it; trained in place.
            teacher: frozen.
            source: fresh rollouts, or fixed ones with their masks.
            options: how to train.
            processes: which share the work of each step; all of them train the same student.

        Raises:
            VocabularyMismatchError: the two models do not share a vocabulary.
            OptionError: the rule cannot be used in this mode.
        """
        self.student = student
        self.teacher = teacher
        self.source = source
        self.options = options
        self.processes = processes
        self.vocab_size = shared_vocabulary(student, teacher)
        self.step = 0
        self.history: list[StepRecord] = []
        self.settings = options.loss_settings()
        self.columns = self.needed_columns() if self.is_on_policy else frozenset()
        self.parameters = {
            name: value for name, value in student.model.named_parameters() if value.requires_grad
        }
        if not self.parameters:
            raise OptionError(
                "the student has no trainable parameter: prepare it with prepare_student"
            )
        self.optimizer = build_optimizer(list(self.parameters.values()), options)

    @property
    def is_on_policy(self) -> bool:
        """Whether each step's rollouts are fresh."""
        return isinstance(self.source, OnPolicyRollouts)

    def needed_columns(self) -> frozenset[str]:
        """Statistics that the rule and the weighting read."""
        options = self.options
        return needed_statistics(options.rule) | weighting_statistics(options.weighting)

    def train_step(self) -> StepRecord:
        """Do one optimizer step."""
        began = time.perf_counter()
        every = self.options.rescore_every
        keeps_all = rule_of(self.options.rule).keeps_all
        fixed = keeps_all and self.options.weighting == NO_WEIGHTING
        if every and self.step and self.step % every == 0 and not fixed:
            self.rescore()
        with self.precision():
            rollouts = self.source.rollouts(self.step, self.student)
        record = self.update_on([rollout for rollout in rollouts if rollout.written.any()])
        record = replace(record, num_rollouts=len(rollouts), time_s=time.perf_counter() - began)
        self.history.append(record)
        self.step += 1
        return record

    def update_on(self, rollouts: Sequence[Rollout]) -> StepRecord:
        """One optimizer step on given rollouts, each with a token that the student wrote."""
        options = self.options
        shares = [
            micro_batches_of(rollouts, options.micro_batch_size, share)
            for share in shares_of(rollouts, self.processes)
        ]
        micro_batches = shares[self.processes.rank]
        is_observed = self._is_observed()
        columns = self.columns | (OBSERVED_COLUMNS if is_observed else frozenset())
        kept = (
            self._score(rollouts, shares, columns)
            if columns and rollouts
            else _Scored({}, [None] * len(micro_batches))
        )
        selected, raw_weights = self.select(rollouts, kept.statistics)
        learning_rate = learning_rate_at(options, self.step)
        record = StepRecord(
            self.step,
            0.0,
            learning_rate,
            0.0,
            len(rollouts),
            len(selected),
            int(selected.sum()),
            False,
            0.0,
        )
        weights = self._scaled(rollouts, selected, raw_weights)
        record = replace(record, tokens_trained=int(np.count_nonzero(weights)))
        if is_observed and rollouts:
            found = self.observe(rollouts, kept.statistics, weights != 0.0)
            record = replace(record, observed=found)
        if not weights.any():
            logger.warning(
                "step %d: no token is selected, so nothing is trained and the weights stay as"
                " they are",
                self.step,
            )
            return record
        cut = per_rollout(weights, rollouts)
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum(
            self._backward([rollouts[i] for i in batch], [cut[i] for i in batch], states)
            for batch, states in zip(micro_batches, kept.states, strict=True)
        )
        loss = self.processes.sum(loss)
        self.processes.sum_gradients(self.parameters.values())
        if not math.isfinite(loss):
            raise LogitsError(
                f"the loss of step {self.step} is {loss}: training has diverged, or a model masks"
                " tokens by -inf"
            )
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), options.max_grad_norm or math.inf)
        descend(self.optimizer, list(self.parameters.values()), options, learning_rate)
        return replace(record, loss=loss, grad_norm=float(norm), updated=True)

    def _is_observed(self) -> bool:
        """Whether what this step's rollouts are like is recorded."""
        every = self.options.dynamics_every
        return every > 0 and (self.step % every == 0 or self.step + 1 == self.options.num_steps)

    def observe(
        self, rollouts: Sequence[Rollout], statistics: dict[str, np.ndarray], selected: np.ndarray
    ) -> dict[str, float | None]:
        """What the rollouts of a step are like, as `schema.DynamicsTable` has it (`observing`).

        Args:
            rollouts: those of the step.
            statistics: [N] each, of the written tokens, with `OBSERVED_COLUMNS`.
            selected: [N] bool, the tokens that carry loss.
        """
        table = self._table(rollouts, statistics)
        return observed(rollouts, table, selected, self.options)

    def _scaled(
        self, rollouts: Sequence[Rollout], selected: np.ndarray, raw_weights: np.ndarray
    ) -> np.ndarray:
        """What each written token's loss is multiplied by, [N]."""
        counts = [rollout.num_tokens for rollout in rollouts]
        return scaled_weights(
            raw_weights,
            selected,
            np.repeat(np.arange(len(rollouts)), counts),
            scale=weighting_of(self.options.weighting).scale,
            loss_normalizer=self.options.loss_normalizer,
            loss_aggregation=self.options.loss_aggregation,
        )

    def select(
        self, rollouts: Sequence[Rollout], statistics: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which of the tokens that the student wrote carry loss, [N] bool, and what each weighs,
        [N]: by rule and weighting, or as the fixed masks and weights say."""
        if isinstance(self.source, FixedRollouts):
            source = self.source
            none = np.zeros(0)
            selected = np.concatenate([source.mask(r)[r.written] for r in rollouts] or [none > 0])
            weights = np.concatenate([source.weight(r)[r.written] for r in rollouts] or [none])
            return selected, weights
        return self._by_rule(rollouts, statistics)

    def _by_rule(
        self, rollouts: Sequence[Rollout], statistics: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        options = self.options
        if rule_of(options.rule).keeps_all and options.weighting == NO_WEIGHTING:
            num_tokens = sum(rollout.num_tokens for rollout in rollouts)
            return np.ones(num_tokens, dtype=bool), np.ones(num_tokens)
        return select_and_weigh(
            self._table(rollouts, statistics),
            weighting=options.weighting,
            rule=options.rule,
            retention_ratio=options.retention_ratio,
            selection_scope=options.selection_scope,
            seed=options.seed,
        )

    def _table(
        self, rollouts: Sequence[Rollout], statistics: dict[str, np.ndarray]
    ) -> pl.LazyFrame:
        """The written tokens of a step as rows of the token table."""
        return step_table(
            rollouts,
            statistics,
            step=self.step,
            normalization_scope=self.options.normalization_scope,
            divergence_clip=self.options.divergence_clip,
            cuts=self.options.cuts,
        )

    def _score(
        self, rollouts: Sequence[Rollout], shares: list[list[list[int]]], columns: frozenset[str]
    ) -> "_Scored":
        """Statistics of every written token, and the hidden states that the loss can use again.

        The teacher's are kept, on the host where there are several micro-batches; the student's,
        with their graph, where there is one.

        Args:
            rollouts: those of the step.
            shares: the micro-batches of each process.
            columns: statistics that are wanted.
        """
        micro_batches = shares[self.processes.rank]
        single = len(micro_batches) == 1
        kept = _Scored({}, [])
        parts: dict[str, list[np.ndarray]] = {}
        for batch in micro_batches:
            statistics, student, teacher = self._statistics(
                [rollouts[i] for i in batch], columns, keep_graph=single
            )
            kept.states.append((student if single else None, teacher if single else teacher.cpu()))
            for name, values in statistics.items():
                parts.setdefault(name, []).append(values)
        order = token_order(rollouts, [batch for share in shares for batch in share])
        found = self.processes.gather({n: np.concatenate(values) for n, values in parts.items()})
        for name in dict.fromkeys(name for part in found for name in part):
            together = np.concatenate([part[name] for part in found if name in part])
            kept.statistics[name] = together[order]
        return kept

    def _statistics(
        self, rollouts: Sequence[Rollout], columns: frozenset[str], *, keep_graph: bool = False
    ) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
        """Statistics of the written tokens of some rollouts, and both models' hidden states that
        they come from."""
        written = [rollout.written for rollout in rollouts]
        with self.precision():
            with torch.set_grad_enabled(keep_graph):
                student = self.hidden(self.student, rollouts, written)
            with torch.no_grad():
                teacher = self.hidden(self.teacher, rollouts, written, teacher=True)
            statistics = step_statistics(
                columns,
                student_hidden=student.detach(),
                teacher_hidden=teacher,
                student_head=self.student.head,
                teacher_head=self.teacher.head,
                vocab_size=self.vocab_size,
                token_ids=tokens_of(rollouts, written),
            )
        return statistics, student, teacher

    def _backward(
        self,
        rollouts: list[Rollout],
        weights: list[np.ndarray],
        states: "tuple[Tensor | None, Tensor] | None",
    ) -> float:
        """Add the gradient of one micro-batch's share of the loss; returns that share."""
        carried = [weight != 0.0 for weight in weights]
        if not any(mask.any() for mask in carried):
            return 0.0
        chosen = [
            scatter(rollout.written, mask) for rollout, mask in zip(rollouts, carried, strict=True)
        ]
        rows = torch.from_numpy(np.flatnonzero(np.concatenate(carried)))
        student, teacher = states or (None, None)
        with self.precision():
            if student is None:
                student = self.hidden(self.student, rollouts, chosen)
            else:
                student = student.index_select(0, rows.to(student.device))
            if teacher is None:
                with torch.no_grad():
                    teacher = self.hidden(self.teacher, rollouts, chosen, teacher=True)
            else:
                teacher = teacher.index_select(0, rows.to(teacher.device))
            loss = weighted_divergence(
                student,
                teacher,
                torch.from_numpy(np.concatenate(weights)[rows.numpy()]).to(
                    student.device, torch.promote_types(student.dtype, torch.float32)
                ),
                student_head=self.student.head,
                teacher_head=self.teacher.head,
                vocab_size=self.vocab_size,
                loss=self.options.loss,
                settings=self.settings,
                token_ids=tokens_of(rollouts, chosen),
                chunk_size=self.options.chunk_size,
            )
        loss.backward()
        return float(loss.detach())

    def hidden(
        self,
        model: LanguageModel,
        rollouts: Sequence[Rollout],
        chosen: Sequence[np.ndarray],
        *,
        teacher: bool = False,
    ) -> Tensor:
        """Last hidden states that predict the chosen response tokens, [N, D], in the order of
        rollouts and positions.

        Args:
            model: student or teacher.
            rollouts: whole rollouts, which are all run.
            chosen: [R] bool for each rollout.
            teacher: whether the teacher's prompts are shown.
        """
        prompts = [rollout.prompt_of(teacher=teacher) for rollout in rollouts]
        lengths = [
            len(prompt) + len(r.response) - 1 for prompt, r in zip(prompts, rollouts, strict=True)
        ]
        checkpointed = (
            self.options.gradient_checkpointing and torch.is_grad_enabled() and not teacher
        )
        if checkpointed:
            model.model.train()  # transformers checkpoints in training mode only; dropout is off
        batches = plan_batches(lengths, self.options.token_budget)
        parts = [
            chosen_hidden_states(
                model.model,
                [prompts[i] for i in batch],
                [rollouts[i].response for i in batch],
                [np.flatnonzero(chosen[i]) for i in batch],
            )
            for batch in batches
        ]
        order = [i for batch in batches for i in batch]
        if checkpointed:
            model.model.eval()
        states = torch.cat(parts)
        if order == sorted(order):
            return states
        counts = [int(mask.sum()) for mask in chosen]
        return states.index_select(
            0, torch.from_numpy(restoring_order(order, counts)).to(states.device)
        )

    def precision(self) -> Any:
        """The context in which models run: autocast with `bfloat16`, none otherwise."""
        if self.options.precision != Precision.BFLOAT16:
            return nullcontext()
        return torch.autocast(self.student.device.type, dtype=torch.bfloat16)

    def rescore(self) -> None:
        """Offline: make the masks again from what both models now say of the fixed rollouts.

        Raises:
            OptionError: rollouts are not fixed.
        """
        if not isinstance(self.source, FixedRollouts):
            raise OptionError(
                "only fixed rollouts are scored again; on-policy rollouts are scored at every step"
            )
        rollouts = self.source.all_rollouts()
        columns = self.needed_columns()
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(rollouts) if columns else 0, RESCORED_TOGETHER):
            for name, values in self._statistics(
                rollouts[start : start + RESCORED_TOGETHER], columns
            )[0].items():
                parts.setdefault(name, []).append(values)
        selected, weights = self._by_rule(
            rollouts, {name: np.concatenate(values) for name, values in parts.items()}
        )
        self.source = self.source.changed(
            rollouts, per_rollout(selected, rollouts), per_rollout(weights, rollouts)
        )


@dataclass
class _Scored:
    """Statistics of a step's written tokens, and for each micro-batch the (student, teacher) hidden
    states that were kept."""

    statistics: dict[str, np.ndarray]
    states: "list[tuple[Tensor | None, Tensor] | None]"


def trained(trainer: Trainer, until: int | None = None) -> Iterator[StepRecord]:
    """Train up to `until` steps in all (by default the options' number), yielding each step's
    record."""
    while trainer.step < (trainer.options.num_steps if until is None else until):
        yield trainer.train_step()
