"""Tiny pairs in float64, rollouts, and the whole gradient of every token: what tests of gradients
share."""

import types

import reference
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from tip_analysis.core.names import Loss
from tip_analysis.gradients.measuring import model_pair
from tip_analysis.gradients.scopes import parameter_scope
from tip_analysis.rollouts.encoded import Rollout

VOCABULARY = 23
LOSSES = [str(loss) for loss in Loss]


def precise_norms(model: PreTrainedModel) -> PreTrainedModel:
    """RMS norms in float64: those of transformers compute in float32, whatever the dtype of the
    model."""

    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        gain = 1 + self.weight if type(self).__name__ == "Gemma2RMSNorm" else self.weight
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model


def double_model(
    architecture: str = "qwen3", *, tied: bool = True, seed: int = 0
) -> PreTrainedModel:
    """A tiny float64 model whose every parameter is random."""
    model = tiny_model(
        architecture, vocab_size=VOCABULARY, seed=seed, tied=tied, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return precise_norms(model)


def some_rollouts() -> list[Rollout]:
    """Four prompts with two rollouts each, of unequal length; the teacher's prompt differs, rewards
    too, a token is masked."""
    rollouts = []
    for prompt in range(4):
        for sample in range(2):
            response = [
                (5 * prompt + 3 * sample + 7 * t) % VOCABULARY for t in range(2 + prompt + sample)
            ]
            mask = [t != 1 or prompt != 2 for t in range(len(response))]
            rollouts.append(
                Rollout(
                    rollout_id=f"p{prompt}/{sample}",
                    prompt_id=f"p{prompt}",
                    prompt=[4 + prompt, 0, 9][: 1 + prompt % 3],
                    response=response,
                    teacher_prompt=[8, 1, 4 + prompt] if prompt % 2 else None,
                    loss_mask=mask,
                    reward=float(sample == prompt % 2) + 0.25 * prompt,
                )
            )
    return rollouts


def oracle_gradients(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: list[Rollout],
    loss: str,
    scope: str = "all",
) -> list[tuple[Rollout, int, dict[str, torch.Tensor]]]:
    """Every token that counts, with its gradient."""
    parameters = dict(
        parameter_scope(student, model_pair(student, None).student.head, scope).parameters
    )
    rows = []
    for rollout in rollouts:
        prompt, response = list(rollout.prompt), list(rollout.response)
        theirs = None if rollout.teacher_prompt is None else list(rollout.teacher_prompt)
        gradients = reference.token_gradients(
            student, teacher, prompt, response, loss, parameters, theirs
        )
        rows += [(rollout, t, gradients[t]) for t in rollout.positions]
    return rows
