"""What is measured of tokens' gradients, and how: checked when it is chosen."""

from dataclasses import dataclass

from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import Loss, LossAggregation, Method, set_names


@dataclass(frozen=True)
class GradientSettings:
    """What is measured, and how."""

    losses: tuple[Loss | str, ...] = (Loss.REVERSE_KL, Loss.FORWARD_KL)
    """Per-token losses."""
    param_scope: str = "all"
    """What θ stands for: all, body, head, last:N, lora."""
    method: Method | str = Method.PROBE
    """`probe` (K forward-mode passes a rollout) or `exact` (a backward pass a token)."""
    num_probes: int = 32
    """K, the probes of each rollout."""
    seed: int = 0
    """Of probes, folds and the sample of tokens."""
    loss_aggregation: LossAggregation | str = LossAggregation.ROLLOUT
    """L over rollouts: `rollout` (mean of rollout means) or `token`."""
    tokens_per_rollout: int | None = None
    """Measure only so many tokens of each rollout, one from each of as many equal stretches; all by
    default."""
    probes_together: int | None = None
    """Probes evaluated as one batch; by default what memory allows and short sequences gain
    from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(map(Loss, self.losses)))
        set_names(self, method=Method, loss_aggregation=LossAggregation)
        if (
            self.num_probes < 1
            or (self.tokens_per_rollout or 1) < 1
            or (self.probes_together or 1) < 1
        ):
            raise OptionError(
                "num_probes, tokens_per_rollout and probes_together must be at least 1"
            )
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise OptionError(
                "losses: expected one or more different names, found"
                f" {', '.join(self.losses) or 'none'}"
            )
