"""Trainings of tiny models for tests: a pair, prompts, trainers on fresh or fixed rollouts."""

import numpy as np
import torch
from tiny_models import tiny_language_model

from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.models.batching import TokenBudget
from tip_analysis.rollouts.encoded import Rollout, encode_prompts
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.training.data import FixedRollouts, OnPolicyRollouts
from tip_analysis.training.options import TrainingOptions
from tip_analysis.training.students import prepare_student
from tip_analysis.training.trainer import Trainer, trained

BASE = TrainingOptions(
    rule="all",
    retention_ratio=1.0,
    num_steps=4,
    prompts_per_step=2,
    rollouts_per_prompt=4,
    learning_rate=1e-2,
    precision="float64",
)


def pair(architecture="qwen3", *, tied=True, dtype=torch.float64):
    student = tiny_language_model(
        architecture, tied=tied, dtype=dtype, sharpness=8.0, name="tiny-student"
    )
    teacher = tiny_language_model(
        architecture, seed=1, padding_rows=3, dtype=dtype, sharpness=8.0, name="tiny-teacher"
    )
    return student, teacher


def encoded(student, teacher, count=6, **options):
    rows = [
        Prompt(p["id"], problem=p["problem"], answer=p["answer"], solution="42")
        for p in problems(count, split="train")
    ]
    return encode_prompts(rows, student=student, teacher=teacher, **options)


def make_trainer(
    options=BASE, *, architecture="qwen3", tied=True, max_new_tokens=10, budget=10_000, **encoding
):
    student, teacher = pair(
        architecture,
        tied=tied,
        dtype=torch.float64 if options.precision == "float64" else torch.float32,
    )
    prompts = encoded(student, teacher, **encoding)
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=options.seed)
    source = OnPolicyRollouts(
        prompts,
        sampling,
        options.prompts_per_step,
        options.rollouts_per_prompt,
        budget=TokenBudget(budget),
    )
    return Trainer(
        student=prepare_student(student, options), teacher=teacher, source=source, options=options
    )


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.parameters.items()}


def run(trainer):
    return [record.loss for record in trained(trainer)]


def multi_turn_rollouts():
    """Ragged responses with tokens that the student did not write, and a teacher that sees another
    prompt."""
    rng = np.random.default_rng(0)
    rollouts = []
    for index, length in enumerate((1, 5, 9, 4)):
        written = np.ones(length, dtype=bool)
        written[1:3] = False
        rollouts.append(
            Rollout(
                rollout_id=f"p{index // 2}/{index % 2}",
                prompt_id=f"p{index // 2}",
                prompt=[1, 5, 6 + index],
                teacher_prompt=[1, 9, 9, 5, 6 + index],
                response=rng.integers(4, 50, size=length).tolist(),
                loss_mask=written.tolist(),
            )
        )
    return rollouts


def fixed(rollouts, masks, seed=0):
    by_prompt = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    return FixedRollouts(by_prompt, prompts_per_step=2, seed=seed, masks=masks)
