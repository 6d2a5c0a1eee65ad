"""Options of a training: how rollouts are made, which tokens carry loss, and how the optimizer
goes. No torch here."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from tip_analysis.analysis.cuts import DEFAULT_CUTS
from tip_analysis.analysis.taxonomy import CutOptions, Taxonomy
from tip_analysis.analysis.weightings import NO_WEIGHTING, weighting_of
from tip_analysis.core.errors import OptionError
from tip_analysis.core.loss_settings import DEFAULT_LOSS_SETTINGS, LossSettings
from tip_analysis.core.names import (
    Axis,
    LossAggregation,
    LossNormalizer,
    OptimizerName,
    Precision,
    Schedule,
    Scope,
    SelectionScope,
    TopKSource,
    TopKTail,
    TrainingLoss,
    set_names,
)

PIECES = (
    "micro_batch_size",
    "token_budget",
    "chunk_size",
    "gradient_checkpointing",
    "dynamics_every",
)
"""Options that change memory and speed, and numbers by rounding only."""

_NAMES = {
    "selection_scope": SelectionScope,
    "normalization_scope": Scope,
    "loss": TrainingLoss,
    "loss_normalizer": LossNormalizer,
    "loss_aggregation": LossAggregation,
    "loss_top_k_of": TopKSource,
    "loss_tail": TopKTail,
    "optimizer": OptimizerName,
    "schedule": Schedule,
    "precision": Precision,
}
"""Fields that are members of an enumeration."""
_LEAST = {
    "prompts_per_step": 1,
    "rollouts_per_prompt": 1,
    "token_budget": 1,
    "chunk_size": 1,
    "micro_batch_size": 1,
    "num_steps": 0,
    "dynamics_every": 0,
    "warmup_steps": 0,
    "lora_rank": 0,
}
"""The least that a field may be."""


@dataclass(frozen=True)
class TrainingOptions:
    """How a student is trained. Defaults are the paper's (Table 9) where it states them."""

    rule: str = "soft_or"
    """Selection rule."""
    retention_ratio: float = 0.5
    """ρ: share of the tokens that carry loss."""
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT
    """Within what tokens compete: rollout, batch or run (one step is both batch and run)."""
    normalization_scope: Scope | str = Scope.BATCH
    """Whose tokens share one min-max of entropy and divergence: those of a step."""
    divergence_clip: float | None = None
    """Quantile at which the divergence is clipped before its min-max; none by default."""
    entropy_cut: str | float = DEFAULT_CUTS[Axis.ENTROPY]
    """Cut on the student's entropy, for rules that read quadrants: measured on each step's
    tokens."""
    divergence_cut: str | float = DEFAULT_CUTS[Axis.DIVERGENCE]
    """Cut on the reverse KL: likewise."""
    weighting: str = NO_WEIGHTING
    """How much each selected token counts: none (all the same), or a weighting's name."""
    loss: TrainingLoss | str = TrainingLoss.REVERSE_KL
    """Per-token loss."""
    jsd_beta: float = DEFAULT_LOSS_SETTINGS.jsd_beta
    """Weight of the teacher in the mixture of jsd."""
    skew_alpha: float = DEFAULT_LOSS_SETTINGS.skew_alpha
    """Mixture of skew_kl and skew_reverse_kl."""
    loss_top_k: int = DEFAULT_LOSS_SETTINGS.loss_top_k
    """Tokens of topk_reverse_kl."""
    loss_top_k_of: TopKSource | str = DEFAULT_LOSS_SETTINGS.loss_top_k_of
    """Whose likeliest tokens topk_reverse_kl takes: student or teacher."""
    loss_tail: TopKTail | str = DEFAULT_LOSS_SETTINGS.loss_tail
    """What topk_reverse_kl makes of all others: bucket or renormalised."""
    entropy_gate: float = DEFAULT_LOSS_SETTINGS.entropy_gate
    """Teacher entropy, nats, above which entropy_gated adds the forward KL."""
    loss_normalizer: LossNormalizer | str = LossNormalizer.SELECTED
    """Tokens that the loss is divided by: selected, or all; this changes the effective learning
    rate between arms."""
    loss_aggregation: LossAggregation | str = LossAggregation.ROLLOUT
    """Mean of rollout means, or mean over tokens (`token`), in which long rollouts weigh more."""
    num_steps: int = 100
    """Optimizer steps."""
    prompts_per_step: int = 8
    """Prompts per step."""
    rollouts_per_prompt: int = 16
    """Rollouts of each prompt."""
    learning_rate: float = 1e-6
    """Peak of the schedule."""
    schedule: Schedule | str = Schedule.COSINE
    """Learning rate after the warm-up: cosine (to 0 at the last step) or constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    optimizer: OptimizerName | str = OptimizerName.ADAMW
    """What turns a gradient into a step: adamw, or sgd."""
    adam_epsilon: float = 1e-8
    """AdamW's ε: coordinates whose gradients are far below it move in proportion to them."""
    momentum: float = 0.0
    """SGD's momentum."""
    match_update_norm: float | None = None
    """L2 norm that every step is given at the peak learning rate, and less as the schedule falls;
    none leaves the length of a step to the optimizer."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; none to leave them as they are."""
    seed: int = 0
    """Seed of prompt order, sampling and selection: arms that share it see the same prompts and
    random numbers."""
    rescore_every: int = 0
    """Offline: make the masks again with the student as it is by then, every so many steps; 0
    keeps them as they were."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers but the head; 0 trains all weights."""
    lora_alpha: float = 32.0
    """LoRA's scale is alpha / rank."""
    precision: Precision | str = Precision.FLOAT32
    """float32, or bfloat16 (autocast; trainable weights stay in float32); float64 for checks."""
    micro_batch_size: int | None = None
    """Rollouts a backward pass; fewer take less memory and give the same numbers. By default all of
    a step at once."""
    token_budget: int = 65_536
    """Tokens a forward pass, padding included."""
    chunk_size: int = 512
    """Rows of logits that exist at a time."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    dynamics_every: int = 1
    """Steps between those at which entropies, divergences and shares of what the student wrote are
    recorded; 0 records none. It takes statistics of every token, also where the rule needs none."""

    def __post_init__(self) -> None:
        set_names(self, **_NAMES)
        for name, least in _LEAST.items():
            found = getattr(self, name)
            if found is not None and found < least:
                raise OptionError(f"{name}: expected at least {least}, found {found}")
        if not 0.0 < self.retention_ratio <= 1.0:
            raise OptionError(
                f"retention_ratio: expected a number in (0, 1], found {self.retention_ratio}"
            )
        if self.warmup_steps > self.num_steps:
            raise OptionError(
                f"warmup_steps: expected at most num_steps, {self.num_steps}, found"
                f" {self.warmup_steps}"
            )

        if not (self.adam_epsilon > 0 and 0 <= self.momentum < 1):
            raise OptionError(
                "expected adam_epsilon above 0 and momentum in [0, 1), found"
                f" {self.adam_epsilon} and {self.momentum}"
            )
        if self.match_update_norm is not None and not self.match_update_norm > 0:
            raise OptionError(
                f"match_update_norm: expected a number above 0, found {self.match_update_norm}"
            )
        weighting_of(self.weighting)
        Taxonomy(**self.cuts)
        self.loss_settings()

    @property
    def cuts(self) -> CutOptions:
        """Where the quadrants of a step lie."""
        return {"entropy_cut": self.entropy_cut, "divergence_cut": self.divergence_cut}

    def loss_settings(self) -> LossSettings:
        """What the loss leaves open."""
        return LossSettings(
            self.jsd_beta,
            self.skew_alpha,
            self.loss_top_k,
            TopKSource(self.loss_top_k_of),
            TopKTail(self.loss_tail),
            self.entropy_gate,
        )

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: all but how the work is cut into pieces."""
        return {name: value for name, value in asdict(self).items() if name not in PIECES}


def learning_rate_at(options: TrainingOptions, step: int) -> float:
    """Learning rate of a step, from 0: linear warm-up to the peak, then constant or half a cosine
    down to 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.schedule == Schedule.CONSTANT:
        return options.learning_rate
    progress = (step - options.warmup_steps) / max(1, options.num_steps - options.warmup_steps)
    return options.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
