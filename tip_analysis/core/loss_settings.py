"""What the losses of a training leave open: mixing weights, the number of tokens, a threshold."""

from dataclasses import dataclass

from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import TopKSource, TopKTail


@dataclass(frozen=True)
class LossSettings:
    """Parameters of the training losses; each is read by the loss that its description names."""

    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture of `jsd`, in (0, 1)."""
    skew_alpha: float = 0.1
    """Share of the first distribution in the mixture of `skew_kl` and `skew_reverse_kl`, in
    [0, 1)."""
    loss_top_k: int = 16
    """Tokens of `topk_reverse_kl`."""
    loss_top_k_of: TopKSource = TopKSource.STUDENT
    """Whose most likely tokens `topk_reverse_kl` takes."""
    loss_tail: TopKTail = TopKTail.BUCKET
    """What `topk_reverse_kl` makes of all other tokens: one bucket, or nothing."""
    entropy_gate: float = 0.8
    """Teacher entropy, nats, above which `entropy_gated` adds the forward KL."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_top_k_of", TopKSource(self.loss_top_k_of))
        object.__setattr__(self, "loss_tail", TopKTail(self.loss_tail))
        if not 0.0 < self.jsd_beta < 1.0:
            raise OptionError(
                f"jsd_beta must lie between 0 and 1; found {self.jsd_beta}: at its ends the loss is"
                " forward_kl or reverse_kl"
            )
        if not 0.0 <= self.skew_alpha < 1.0:
            raise OptionError(f"skew_alpha must lie in [0, 1); found {self.skew_alpha}")
        if self.loss_top_k < 1:
            raise OptionError(f"loss_top_k must be at least 1; found {self.loss_top_k}")
        if not self.entropy_gate >= 0.0:
            raise OptionError(f"entropy_gate must not be negative; found {self.entropy_gate}")


DEFAULT_LOSS_SETTINGS = LossSettings()
"""What each source takes, where it says."""
