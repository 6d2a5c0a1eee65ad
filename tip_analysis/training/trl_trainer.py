"""TIP in TRL: `TIPDistillationTrainer`, TRL's on-policy distillation on the tokens that a rule
selects.

    from tip_analysis.trl import TIPDistillationConfig, TIPDistillationTrainer

Everything but the choice of tokens is TRL's: sampling (vLLM too), models, optimizer, FSDP,
DeepSpeed, logging. In a step the trainer's own last hidden states give the statistics that the rule
reads, `select_step` selects as it does for our own trainer, and TRL's divergence kernel runs on
what was selected (Eq. 9). Logit scale, soft cap and temperature are TRL's; statistics are of the
distributions that the loss compares, those of temperature 1 by default.

The tokens of a step (all processes, all accumulated batches) share one normalisation and one
selection. Without gradient accumulation selection takes no pass of its own. With it, what the rule
reads of the whole step must be known before its first backward pass: the student reads the step
once more, without gradient; the teacher's states are kept on the host.

Two methods of TRL's that are its own are overridden, so its version is held to
`trl_parts.TRL_VERSION`, and their parameters are checked when this module is imported.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer  # pyright: ignore

from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.analysis.weightings import NO_WEIGHTING, weighting_of
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import LossAggregation, LossNormalizer, SelectionScope, StopTokens
from tip_analysis.logits.stop_tokens import merged_ids
from tip_analysis.models.output_head import logit_cap, logit_scale
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.masked_loss import scaled_weights
from tip_analysis.training.step_metrics import METRIC_COLUMNS, soft_or_overlap, step_metrics
from tip_analysis.training.step_selection import (
    needed_statistics,
    select_and_weigh,
    step_statistics,
    step_table,
    weighting_statistics,
)
from tip_analysis.training.tracker_callback import TrackerCallback
from tip_analysis.training.trl_parts import (
    Head,
    Model,
    check_trl,
    gathered_heads,
    head_weights,
    rollouts_of,
    rows_of,
    slices,
    text_config,
    written_tokens,
)

__all__ = ["TIPDistillationConfig", "TIPDistillationTrainer", "TrackerCallback"]

Statistics = dict[str, np.ndarray]
Models = tuple[Model, Model]
"""Student and teacher, without the wrappers of several processes."""

check_trl()


@dataclass
class TIPDistillationConfig(DistillationConfig):
    """TRL's `DistillationConfig` and which tokens carry loss."""

    token_rule: str = field(
        default="soft_or", metadata={"help": "Selection rule: a name of tip.rule_names()."}
    )
    retention_ratio: float = field(
        default=0.5, metadata={"help": "Share of the tokens that carry loss, in (0, 1]."}
    )
    selection_scope: str = field(
        default="rollout",
        metadata={
            "help": "Within what tokens compete: rollout, or batch (run): one optimizer step over "
            "all processes."
        },
    )
    weighting: str = field(
        default=NO_WEIGHTING,
        metadata={"help": "How much each selected token counts: none, or a weighting's name."},
    )
    stop_tokens: str = field(
        default="declared",
        metadata={
            "help": "merged: in the statistics that select, the stop tokens of both models count "
            "as one; the loss is TRL's either way."
        },
    )
    loss_aggregation: str = field(
        default="token",
        metadata={
            "help": "Mean over the selected tokens (token, as TRL has it) or mean of rollout means "
            "(rollout, Eq. 1)."
        },
    )
    divergence_clip: float | None = field(
        default=None,
        metadata={"help": "Quantile at which the divergence is clipped before its min-max."},
    )
    entropy_cut: str = field(
        default="median", metadata={"help": "Cut of the quadrants that are logged, on entropy."}
    )
    divergence_cut: str = field(
        default="mean", metadata={"help": "Cut of the quadrants that are logged, on divergence."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        needed_statistics(self.token_rule)
        weighting_statistics(self.weighting)
        if not 0.0 < self.retention_ratio <= 1.0:
            raise OptionError(f"retention_ratio must lie in (0, 1]; found {self.retention_ratio}")
        SelectionScope(self.selection_scope)
        StopTokens(self.stop_tokens)
        LossAggregation(self.loss_aggregation)
        self.taxonomy()

    def taxonomy(self) -> Taxonomy:
        """The cuts of the quadrants that are logged."""
        return Taxonomy(self.entropy_cut, self.divergence_cut, divergence_clip=self.divergence_clip)


class TIPDistillationTrainer(DistillationTrainer):
    """On-policy distillation on the tokens that a rule selects (Eq. 9).

    Used as TRL's `DistillationTrainer` is, with a `TIPDistillationConfig`. Logged beside TRL's own
    figures, once a step: `tip/share_q1` … and the rest of `step_metrics`, and
    `tip/soft_or_overlap`. In evaluation, loss and entropy are those of all tokens, as TRL has them.

    Raises:
        OptionError: no teacher model is given.
    """

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: TIPDistillationConfig | None = None,
        **options: Any,
    ) -> None:
        if teacher_model is None:
            raise OptionError("TIPDistillationTrainer needs a teacher_model: its logits select")
        args = args or TIPDistillationConfig("TIP-Distillation")
        if not isinstance(args, TIPDistillationConfig):
            raise OptionError(
                "TIPDistillationTrainer takes a TIPDistillationConfig; found a"
                f" {type(args).__name__}"
            )
        super().__init__(model=model, teacher_model=teacher_model, args=args, **options)
        self._columns = (
            needed_statistics(args.token_rule)
            | weighting_statistics(args.weighting)
            | METRIC_COLUMNS
        )
        self._stop_ids = self._stop_tokens()

    def _stop_tokens(self) -> Tensor:
        """The stop tokens of both models where they are to be merged, else none."""
        if StopTokens(self.args.stop_tokens) is StopTokens.DECLARED:
            return torch.empty(0, dtype=torch.long)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        theirs = teacher.generation_config.eos_token_id
        theirs = [theirs] if isinstance(theirs, int) else list(theirs or [])
        return torch.tensor(sorted({*self.eos_token_ids, *theirs}), dtype=torch.long)

    # ------------------------------------------------------------------ TRL's hooks

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's completions; each keeps its number in the step, through shuffling and splitting."""
        output = super()._generate_and_score_completions(inputs)
        count, device = output["completion_ids"].shape[0], output["completion_ids"].device
        first = self.accelerator.process_index * count
        output["tip_number"] = torch.arange(first, first + count, device=device)
        if self.model.training and self.args.gradient_accumulation_steps > 1:
            if "pixel_values" in output:
                raise OptionError(
                    "images with gradient_accumulation_steps above 1 are not supported: raise"
                    " per_device_train_batch_size instead"
                )
            output |= self._select_ahead(output)
        return output

    def _compute_loss(self, unwrapped_student: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        """Σ w_t ℓ_t over the selected tokens; w_t holds what the sum is divided by."""
        if not self.model.training:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        written = written_tokens(inputs)
        student = self._states(unwrapped_student, inputs)[written]
        teacher_model, teacher = self._teacher_states(inputs)
        teacher = teacher.to(student.device)[written]
        models = unwrapped_student, teacher_model
        if "tip_weights" in inputs:
            weights = inputs["tip_weights"][written]
        else:
            tokens = inputs["completion_ids"][written]
            statistics = self._statistics(models, student.detach(), teacher, tokens)
            ours = self._weights(rollouts_of(inputs, self.state.global_step), statistics)
            weights = torch.from_numpy(ours).to(student.device, torch.float32)
        chosen = weights != 0
        losses, entropies = self._divergence(models, student[chosen], teacher[chosen])
        # DDP and its kin average over processes what is a sum here
        loss = (weights[chosen] * losses).sum() * self.accelerator.num_processes
        return loss, entropies.sum().detach(), chosen.sum()

    # ------------------------------------------------------------------ states and statistics

    def _states(self, model: Model, inputs: Mapping[str, Any]) -> Tensor:
        """Last hidden states [B, C, D] that predict the completions, as TRL takes them."""
        named = inspect.signature(self._get_last_hidden_state).parameters
        return self._get_last_hidden_state(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **{name: value for name, value in inputs.items() if name in named},
        )

    @torch.no_grad()
    def _teacher_states(self, inputs: Mapping[str, Any]) -> tuple[Model, Tensor]:
        """The teacher without its wrapper, and its states [B, C, D_T]."""
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        if "tip_teacher" in inputs:
            return teacher, inputs["tip_teacher"]
        return teacher, self._forward_redirection(
            self.teacher_model, teacher, self._states, teacher, inputs
        )

    def _statistics(
        self, models: Models, student: Tensor, teacher: Tensor, tokens: Tensor
    ) -> Statistics:
        """What rule, weighting and log read of N tokens [N], from both models' states [N, D]."""
        heads = [Head(model, self.temperature, self._stop_ids) for model in models]
        with gathered_heads(*models):
            return step_statistics(
                self._columns,
                student_hidden=student,
                teacher_hidden=teacher,
                student_head=heads[0],
                teacher_head=heads[1],
                vocab_size=models[0].config.get_text_config().vocab_size,
                token_ids=merged_ids(tokens, self._stop_ids),
            )

    def _divergence(
        self, models: Models, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        """TRL's divergence of each of N tokens, and the student's entropy, nats."""
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore

        (own, own_bias), (other, other_bias) = (head_weights(model) for model in models)
        scales = [(logit_scale(config), logit_cap(config)) for config in map(text_config, models)]
        parts = (student, own, own_bias, teacher, other, other_bias)
        return ChunkedDivergenceFunction.apply(
            *parts, self.beta, self.temperature, *scales[0], *scales[1]
        )

    # ------------------------------------------------------------------ selection

    @torch.no_grad()
    def _select_ahead(self, output: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights [B, C] of a whole step before its first backward pass, and the teacher's
        states, kept on the host."""
        unwrapped = self.accelerator.unwrap_model(self.model_wrapped)
        written, parts, kept = written_tokens(output), [], []
        for rows in slices(written.shape[0], self.args.per_device_train_batch_size):
            part = rows_of(output, rows)
            with self.compute_loss_context_manager():
                statistics, teacher = self._forward_redirection(
                    self.model_wrapped, unwrapped, self._measure, unwrapped, part
                )
            parts.append(statistics)
            kept.append(teacher)
        statistics = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        ours = self._weights(rollouts_of(output, self.state.global_step), statistics)
        weights = torch.zeros(written.shape, device=written.device)
        weights[written] = torch.from_numpy(ours).to(weights)
        return {"tip_weights": weights, "tip_teacher": torch.cat(kept)}

    def _measure(self, student: Model, inputs: Mapping[str, Any]) -> tuple[Statistics, Tensor]:
        written = written_tokens(inputs)
        teacher_model, teacher = self._teacher_states(inputs)
        states = self._states(student, inputs)[written]
        models = student, teacher_model
        statistics = self._statistics(
            models, states, teacher.to(states.device)[written], inputs["completion_ids"][written]
        )
        return statistics, teacher.cpu()

    def _weights(self, rollouts: list[Rollout], statistics: Statistics) -> np.ndarray:
        """[N] weights of this process's written tokens, chosen among those of all processes."""
        parts = gather_object([(rollouts, statistics)])
        every = [rollout for part, _ in parts for rollout in part]
        together = {name: np.concatenate([p[name] for _, p in parts]) for name in statistics}
        counts = [rollout.num_tokens for rollout in every]
        if not sum(counts):
            return np.zeros(0)
        weights = self._chosen(every, together, np.repeat(np.arange(len(every)), counts))
        before = [r for part, _ in parts[: self.accelerator.process_index] for r in part]
        first = sum(rollout.num_tokens for rollout in before)
        return weights[first : first + sum(rollout.num_tokens for rollout in rollouts)]

    def _chosen(
        self, rollouts: list[Rollout], statistics: Statistics, rollout_of_token: np.ndarray
    ) -> np.ndarray:
        """[N] weights of a step's written tokens, by rule and weighting as our trainer does."""
        args = self.args
        table = step_table(
            rollouts,
            statistics,
            step=self.state.global_step,
            divergence_clip=args.divergence_clip,
            cuts={"entropy_cut": args.entropy_cut, "divergence_cut": args.divergence_cut},
        )
        selected, raw = select_and_weigh(
            table,
            weighting=args.weighting,
            rule=args.token_rule,
            retention_ratio=args.retention_ratio,
            selection_scope=args.selection_scope,
            seed=args.seed,
        )
        weights = scaled_weights(
            raw,
            selected,
            rollout_of_token,
            scale=weighting_of(args.weighting).scale,
            loss_normalizer=LossNormalizer.SELECTED,
            loss_aggregation=args.loss_aggregation,
        )
        self._note(table, weights != 0)
        return weights

    def _note(self, table: pl.LazyFrame, selected: np.ndarray) -> None:
        """Hand the step's figures to TRL's log."""
        args = self.args
        found = step_metrics(table, selected, args.taxonomy())
        found["soft_or_overlap"] = soft_or_overlap(
            table,
            selected,
            retention_ratio=rule_of(args.token_rule).retention(args.retention_ratio),
            selection_scope=args.selection_scope,
        )
        for name, value in found.items():
            self._metrics["train"][f"tip/{name}"].append(value)
