"""Gradients of every token: `gradients`."""

from dataclasses import dataclass, field

from tip_analysis.cli.option_groups import (
    Common,
    CommonOptions,
    Flag,
    ModelOptions,
    Models,
    RunFolder,
)
from tip_analysis.cli.ranges import Count, Seed, SomeCount
from tip_analysis.core.names import Loss, LossAggregation, Method


@dataclass(frozen=True)
class Gradients:
    """Measure the gradient norm of every token's own loss, and where it points (Proposition 1)."""

    run: RunFolder
    """Run folder with scored tokens; student, teacher and teacher context are those of `score`."""
    loss: tuple[Loss, ...] = (Loss.REVERSE_KL, Loss.FORWARD_KL)
    """Per-token losses."""
    method: Method = Method.PROBE
    """Random probes (a cost that does not grow with the number of tokens), or one backward pass a
    token."""
    num_probes: Count = 32
    """Probes a rollout: the relative standard error of a squared norm is √(2/K)."""
    params: str = "all"
    """Parameters that count: all, body, head, last:N, lora."""
    loss_aggregation: LossAggregation = LossAggregation.ROLLOUT
    """The loss L whose descent is meant: the mean of rollout means, or the mean over tokens."""
    seed: Seed = 0
    """Seed of the probes and of the two folds of prompts."""
    limit: SomeCount = None
    """Use the first N rollouts only."""
    overwrite: Flag = False
    """Measure again what this configuration has measured."""
    prefer: Flag = False
    """Take the numbers of this run from this measurement from now on; else from its first."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Measure gradient norms and alignment."""
        from tip_analysis.cli.console import show_summary
        from tip_analysis.gradients.door import measure_gradients

        found = measure_gradients(
            self.run,
            losses=self.loss,
            method=self.method,
            num_probes=self.num_probes,
            params=self.params,
            loss_aggregation=self.loss_aggregation,
            seed=self.seed,
            limit=self.limit,
            dtype=self.models.dtype,
            device=self.models.device,
            prefer=self.prefer,
            overwrite=self.overwrite,
        )
        for loss, summary in found.items():
            show_summary(f"{self.run}: gradients of {loss} over {self.params}", summary)
