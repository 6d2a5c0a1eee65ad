"""TIP in verl: its policy-gradient distillation on the tokens that a rule selects.

    export VERL_USE_EXTERNAL_MODULES=tip_analysis.training.verl_losses
    python -m verl.trainer.main_ppo … \\
        distillation.distillation_loss.loss_mode=tip_soft_or \\
        distillation.distillation_loss.use_policy_gradient=true \\
        actor_rollout_ref.actor.calculate_entropy=true

Importing this module registers `tip_soft_or`, `tip_divergence` and `tip_entropy` as distillation
losses of verl (`register_distillation_loss`), each at the ρ of the environment variable
TIP_RETENTION_RATIO (0.5). Written against verl 0.10.0.dev (commit 1dda039), which does not run
here: the tests put stand-ins with its signatures in its place.

Deviations from the paper, all for what verl's actor sees: the divergence that selects is estimated
from the sampled token alone, by k3 = exp(r) − r − 1 with r = ln P_T(y) − ln P_S(y) (its expectation
is the reverse KL); so there is no rule `q3`, which reads the forward KL. Min-max and its clip are
those of a micro-batch. The signal is k1, verl's own for policy gradients; kept tokens are scaled by
m/k of their response, so that verl's mean over all tokens is one over the selected tokens.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.distillation import losses as distillation  # pyright: ignore
from verl.workers.utils.padding import no_padding_2_padding  # pyright: ignore

from tip_analysis.analysis.retention import exact_ratio
from tip_analysis.core.errors import OptionError
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.step_selection import select_rows, step_table

RULES = ("soft_or", "divergence", "entropy")
RATIO = "TIP_RETENTION_RATIO"

Loss = tuple[Tensor, dict[str, Any]]


def selected_tokens(
    log_ratio: Tensor, entropy: Tensor, written: Tensor, *, rule: str, retention_ratio: float
) -> Tensor:
    """[B, R] bool: the tokens that a rule selects within each response.

    Args:
        log_ratio: ln P_T(y) − ln P_S(y) of the sampled tokens, [B, R].
        entropy: the student's, nats, [B, R].
        written: `response_mask`, [B, R] bool.
        rule: one of `RULES`.
        retention_ratio: ρ.
    """
    selected = torch.zeros_like(written)
    if not written.any():
        return selected
    masks = written.cpu().numpy()
    rollouts = [
        Rollout(f"{row:09}", f"{row:09}", (), [0] * len(mask), loss_mask=mask.tolist())
        for row, mask in enumerate(masks)
    ]
    r = log_ratio.detach()[written].double().cpu().numpy()
    h = entropy.detach()[written].float().cpu().numpy()
    statistics = {
        "student_entropy": h,
        "student_entropy_norm": h,  # ln|V| cancels in the min-max
        "reverse_kl": np.expm1(r) - r,
        "forward_kl": np.full(len(r), np.nan),  # unknown
    }
    table = step_table(rollouts, statistics, step=0)
    chosen = select_rows(table, rule=rule, retention_ratio=retention_ratio)
    selected[written] = torch.from_numpy(chosen).to(selected.device)
    return selected


def _loss(rule: str) -> Callable[..., Loss]:
    def selected_k1(config: Any, distillation_config: Any, model_output: Any, data: Any) -> Loss:
        settings = distillation_config.distillation_loss
        if not settings.use_policy_gradient:
            raise OptionError(
                f"loss_mode=tip_{rule} is a signal for policy gradients: set"
                " distillation.distillation_loss.use_policy_gradient=true"
            )
        if model_output.get("entropy") is None:
            raise OptionError(
                f"loss_mode=tip_{rule} reads entropies: set"
                " actor_rollout_ref.actor.calculate_entropy=true"
            )
        student = no_padding_2_padding(model_output["log_probs"], data)
        entropy = no_padding_2_padding(model_output["entropy"], data)
        teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
        mask = data["response_mask"]
        written = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
        kept = selected_tokens(
            teacher - student, entropy, written, rule=rule, retention_ratio=retention_ratio()
        )
        counts = kept.sum(1, keepdim=True).clamp(min=1)
        scale = kept * (written.sum(1, keepdim=True) / counts)
        share = kept.sum().item() / max(1, int(written.sum()))
        return (student - teacher) * scale, {"distillation/tip_selected_share": share}

    return selected_k1


def retention_ratio() -> float:
    """ρ, as the environment says.

    Raises:
        OptionError: it is no number in (0, 1].
    """
    given = os.environ.get(RATIO, "0.5")
    try:
        ratio = float(given)
    except ValueError as error:
        raise OptionError(f"{RATIO}: expected a number in (0, 1], found {given!r}") from error
    exact_ratio(ratio)
    return ratio


for _rule in RULES:
    distillation.register_distillation_loss(
        distillation.DistillationLossSettings(names=[f"tip_{_rule}"], use_estimator=True)
    )(_loss(_rule))
