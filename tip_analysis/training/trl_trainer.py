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

Two methods of TRL's that are its own are overridden, so its version is held to `TRL_VERSIONS`, and
their parameters are checked when this module is imported.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import trl  # pyright: ignore
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from trl import DistillationConfig, DistillationTrainer  # pyright: ignore

from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.errors import OptionError, UnsupportedVersionError
from tip_analysis.core.names import SelectionScope, StopTokens
from tip_analysis.logits.stop_tokens import merge_tokens
from tip_analysis.models.output_head import logit_cap, logit_scale
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.masked_loss import token_weights
from tip_analysis.training.step_metrics import METRIC_COLUMNS, soft_or_overlap, step_metrics
from tip_analysis.training.step_selection import (
    needed_statistics,
    select_step,
    step_statistics,
    step_table,
)

__all__ = ["TIPDistillationConfig", "TIPDistillationTrainer"]

TRL_VERSION = (1, 16)
"""The minor version of TRL whose trainer this one goes on from."""

_OVERRIDDEN = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
    "_get_last_hidden_state": [
        "self",
        "unwrapped_model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
    ],
}
"""Methods of TRL's own that are overridden or called, and the parameters that are counted on."""

Statistics = dict[str, np.ndarray]
Model = Any
"""A model of transformers'."""
Models = tuple[Model, Model]
"""Student and teacher, without the wrappers of several processes."""


def _check_trl() -> None:
    """Refuse a TRL whose trainer is not the one that this module goes on from.

    Raises:
        UnsupportedVersionError: its version is another, or its methods have other parameters.
    """
    expected = ".".join(map(str, TRL_VERSION))
    found = trl.__version__
    if found.split(".")[:2] != expected.split("."):
        raise UnsupportedVersionError(
            f"TIPDistillationTrainer goes with TRL {expected}, but {found} is installed;"
            f' pip install "trl=={expected}.*"'
        )
    for name, parameters in _OVERRIDDEN.items():
        method = getattr(DistillationTrainer, name, None)
        has = list(inspect.signature(method).parameters) if method else []
        if has[: len(parameters)] != parameters:
            raise UnsupportedVersionError(
                f"TRL {found} has another DistillationTrainer.{name} than TIPDistillationTrainer"
                f" goes on from: expected ({', '.join(parameters)}), found ({', '.join(has)});"
                f' pip install "trl=={expected}.*"'
            )


_check_trl()


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
        default="none", metadata={"help": "Weight of each selected token's divergence."}
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
        if not 0.0 < self.retention_ratio <= 1.0:
            raise OptionError(f"retention_ratio must lie in (0, 1]; found {self.retention_ratio}")
        SelectionScope(self.selection_scope)
        StopTokens(self.stop_tokens)
        if self.loss_aggregation not in ("rollout", "token"):
            raise OptionError(
                f"loss_aggregation must be rollout or token; found {self.loss_aggregation!r}"
            )
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
        self._columns = needed_statistics(args.token_rule) | METRIC_COLUMNS
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
        written = _written(inputs)
        student = self._states(unwrapped_student, inputs)[written]
        teacher_model, teacher = self._teacher_states(inputs)
        teacher = teacher.to(student.device)[written]
        models = unwrapped_student, teacher_model
        if "tip_weights" in inputs:
            weights = inputs["tip_weights"][written]
        else:
            statistics = self._statistics(models, student.detach(), teacher)
            ours = self._weights(_rollouts(inputs, self.state.global_step), statistics)
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

    def _statistics(self, models: Models, student: Tensor, teacher: Tensor) -> Statistics:
        """What the rule and the log read of N tokens, from both models' states [N, D]."""
        heads = [_Head(model, self.temperature, self._stop_ids) for model in models]
        with _gathered(*models):
            return step_statistics(
                self._columns,
                student_hidden=student,
                teacher_hidden=teacher,
                student_head=heads[0],
                teacher_head=heads[1],
                vocab_size=models[0].get_output_embeddings().weight.shape[0],
            )

    def _divergence(
        self, models: Models, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        """TRL's divergence of each of N tokens, and the student's entropy, nats."""
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore

        (own, own_bias), (other, other_bias) = (_head_weights(model) for model in models)
        scales = [(logit_scale(config), logit_cap(config)) for config in map(_config, models)]
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
        written, parts, kept = _written(output), [], []
        for rows in _slices(written.shape[0], self.args.per_device_train_batch_size):
            part = _rows(output, rows)
            with self.compute_loss_context_manager():
                statistics, teacher = self._forward_redirection(
                    self.model_wrapped, unwrapped, self._measure, unwrapped, part
                )
            parts.append(statistics)
            kept.append(teacher)
        statistics = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        ours = self._weights(_rollouts(output, self.state.global_step), statistics)
        weights = torch.zeros(written.shape, device=written.device)
        weights[written] = torch.from_numpy(ours).to(weights)
        return {"tip_weights": weights, "tip_teacher": torch.cat(kept)}

    def _measure(self, student: Model, inputs: Mapping[str, Any]) -> tuple[Statistics, Tensor]:
        written = _written(inputs)
        teacher_model, teacher = self._teacher_states(inputs)
        states = self._states(student, inputs)[written]
        models = student, teacher_model
        return self._statistics(models, states, teacher.to(states.device)[written]), teacher.cpu()

    def _weights(self, rollouts: list[Rollout], statistics: Statistics) -> np.ndarray:
        """[N] weights of this process's written tokens, selected among those of all processes."""
        parts = gather_object([(rollouts, statistics)])
        every = [rollout for part, _ in parts for rollout in part]
        together = {name: np.concatenate([p[name] for _, p in parts]) for name in statistics}
        args, step = self.args, self.state.global_step
        selected = select_step(
            every,
            together,
            step=step,
            rule=args.token_rule,
            retention_ratio=args.retention_ratio,
            selection_scope=args.selection_scope,
            divergence_clip=args.divergence_clip,
            seed=args.seed,
        )
        counts = [rollout.num_tokens for rollout in every]
        weights = token_weights(
            selected,
            np.repeat(np.arange(len(every)), counts),
            loss_normalizer="selected",
            loss_aggregation=args.loss_aggregation,
        )
        if len(selected):
            self._note(every, together, selected)
        first = sum(
            r.num_tokens for part, _ in parts[: self.accelerator.process_index] for r in part
        )
        return weights[first : first + sum(rollout.num_tokens for rollout in rollouts)]

    def _note(self, rollouts: list[Rollout], statistics: Statistics, selected: np.ndarray) -> None:
        """Hand the step's figures to TRL's log."""
        args = self.args
        table = step_table(
            rollouts, statistics, step=self.state.global_step, divergence_clip=args.divergence_clip
        )
        found = step_metrics(table, selected, args.taxonomy())
        found["soft_or_overlap"] = soft_or_overlap(
            table,
            selected,
            retention_ratio=rule_of(args.token_rule).retention(args.retention_ratio),
            selection_scope=args.selection_scope,
        )
        for name, value in found.items():
            self._metrics["train"][f"tip/{name}"].append(value)


class _Head:
    """Hidden states [n, D] to the logits [n, V] that TRL's loss compares: scale, soft cap,
    temperature; stop tokens as one where they are to be."""

    def __init__(self, model: Model, temperature: float, stop_ids: Tensor) -> None:
        self.model, self.temperature, self.stop_ids = model, temperature, stop_ids

    def __call__(self, hidden: Tensor) -> Tensor:
        weight, bias = _head_weights(self.model)
        config = _config(self.model)
        logits = linear(hidden, weight.to(hidden.dtype), bias) * logit_scale(config)
        if (cap := logit_cap(config)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return merge_tokens(logits / self.temperature, self.stop_ids)


def _head_weights(model: Model) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] of the output layer, put together where they are sharded."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return _whole(head.weight), None if bias is None else _whole(bias)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _gathered(*models: Model) -> Any:
    """Inside, DeepSpeed's ZeRO-3 has the output layers whole."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx  # pyright: ignore

    heads = [model.get_output_embeddings() for model in models]
    return maybe_gather_lm_head_ctx(*(p for head in heads for p in head.parameters()))


def _config(model: Model) -> Any:
    return model.config.get_text_config()


def _written(inputs: Mapping[str, Any]) -> Tensor:
    """[B, C] bool: the completion's tokens that the student wrote."""
    written = inputs["completion_mask"].bool()
    return written & inputs["tool_mask"].bool() if "tool_mask" in inputs else written


def _rollouts(inputs: Mapping[str, Any], step: int) -> list[Rollout]:
    """The completions of a batch, named by their number in the step."""
    columns = (inputs["completion_ids"], inputs["completion_mask"].bool(), _written(inputs))
    rows = zip(inputs["tip_number"].tolist(), *(column.cpu() for column in columns), strict=True)
    return [
        Rollout(
            rollout_id=f"{step}/{number}",
            prompt_id=f"{step}/{number}",
            prompt=(),
            response=tokens[there].tolist(),
            loss_mask=written[there].tolist(),
        )
        for number, tokens, there, written in rows
    ]


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _rows(output: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Some rows of a batch of text; what counts for the whole of it is left as it is."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim else value
        for name, value in output.items()
    }
