"""Where the rollouts of a training step come from: the current student (`OnPolicyRollouts`) or a
run folder (`FixedRollouts`).

Which prompts a step takes, and every random number of their rollouts, is a pure function of (seed,
step, prompt, sample). Arms of an ablation that share a seed therefore see the same prompts and
common random numbers, and a resumed training goes on as an uninterrupted one would.

Reads `rollouts/*.parquet` and `masks/*.parquet` (or `tokens/*.parquet`, from which a mask is made
where none was stored).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import rule as rule_of
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.core.errors import (
    ModelError,
    OptionError,
    PromptFileError,
    RunError,
    VocabularyMismatchError,
)
from tip_analysis.core.run_folder import Run
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel, tokenizer_fingerprint
from tip_analysis.rollouts.prompts import Prompt, render, student_messages, teacher_messages
from tip_analysis.rollouts.sampling import Sampling, generate, uniforms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompt as token ids, for the student and for the teacher."""

    id: str
    token_ids: list[int]
    teacher_token_ids: list[int]
    """Differs from `token_ids` where the teacher is shown more (privileged context)."""
    answer: str | None = None
    """Reference answer, for a grader."""


@dataclass(frozen=True)
class TrainingRollout:
    """One rollout to train on."""

    rollout_id: str
    prompt_id: str
    prompt: list[int]
    teacher_prompt: list[int]
    response: list[int]
    written: np.ndarray
    """[R] bool: the tokens that the student wrote; tool output, for one, is false."""
    logprobs: list[float] | None = None
    """ln P of each token as its author saw it; None where unknown."""


def encode_prompts(
    prompts: Sequence[Prompt],
    *,
    student: LanguageModel,
    teacher: LanguageModel,
    template: str = "plain",
    teacher_context: str = "none",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[TrainingPrompt]:
    """Token ids of prompts, for student and teacher.

    Args:
        prompts: problems, as a file of prompts gives them.
        student: its chat template makes the student's prompt.
        teacher: its chat template makes the teacher's prompt where that differs.
        template: what stands around a problem.
        teacher_context: `none`, or `solution`: the teacher is shown the reference solution.
        chat_template_kwargs: switches for the chat template.

    Raises:
        OptionError: no such context.
        PromptFileError: a prompt lacks the solution that the teacher is to be shown.
    """
    if teacher_context not in ("none", "solution"):
        raise OptionError(f"teacher_context must be none or solution; found {teacher_context!r}")
    encoded = []
    for prompt in prompts:
        messages = student_messages(prompt, template)
        token_ids = render(
            student.tokenizer, messages, chat_template_kwargs=chat_template_kwargs
        ).token_ids
        teacher_ids = token_ids
        if teacher_context == "solution":
            if prompt.solution is None:
                raise PromptFileError(
                    f"prompt {prompt.id!r} has no solution, which the teacher is to be shown"
                )
            shown = teacher_messages(messages, prompt.solution)
            teacher_ids = render(
                teacher.tokenizer, shown, chat_template_kwargs=chat_template_kwargs
            ).token_ids
        encoded.append(TrainingPrompt(prompt.id, token_ids, teacher_ids, prompt.answer))
    return encoded


def prompts_of_step(
    prompt_ids: Sequence[str], step: int, prompts_per_step: int, seed: int
) -> list[int]:
    """Indices of the prompts that a step takes: each epoch is a new order, and a remainder that
    fills no step is left out.

    Raises:
        OptionError: there are fewer prompts than a step takes.
    """
    if len(prompt_ids) < prompts_per_step:
        raise OptionError(
            f"a step takes {prompts_per_step} prompts, but there are {len(prompt_ids)}: lower"
            " prompts_per_step"
        )
    steps_per_epoch = len(prompt_ids) // prompts_per_step
    epoch, index = divmod(step, steps_per_epoch)
    order = np.argsort(uniforms(seed, f"order of epoch {epoch}", len(prompt_ids)), kind="stable")
    return order[index * prompts_per_step : (index + 1) * prompts_per_step].tolist()


@dataclass(frozen=True)
class OnPolicyRollouts:
    """Fresh rollouts of the student as it is at each step."""

    prompts: Sequence[TrainingPrompt]
    sampling: Sampling
    prompts_per_step: int
    rollouts_per_prompt: int
    budget: TokenBudget
    """Tokens a batch of the sampler may hold, room for the response included."""

    def rollouts(self, step: int, student: LanguageModel) -> list[TrainingRollout]:
        """The rollouts of one step: prompts × samples, named `step/prompt_id/sample_index`."""
        chosen = prompts_of_step(
            [p.id for p in self.prompts], step, self.prompts_per_step, self.sampling.seed
        )
        jobs = [
            (self.prompts[index], sample)
            for index in chosen
            for sample in range(self.rollouts_per_prompt)
        ]
        names = [f"{step}/{prompt.id}/{sample}" for prompt, sample in jobs]
        lengths = [len(prompt.token_ids) + self.sampling.max_new_tokens for prompt, _ in jobs]
        made: dict[int, TrainingRollout] = {}
        for rows, generations in self.budget.run(
            lengths,
            lambda rows: generate(
                student,
                [jobs[r][0].token_ids for r in rows],
                [names[r] for r in rows],
                self.sampling,
            ),
        ):
            for row, generation in zip(rows, generations, strict=True):
                prompt = jobs[row][0]
                made[row] = TrainingRollout(
                    rollout_id=names[row],
                    prompt_id=prompt.id,
                    prompt=prompt.token_ids,
                    teacher_prompt=prompt.teacher_token_ids,
                    response=generation.token_ids,
                    written=np.ones(len(generation.token_ids), dtype=bool),
                    logprobs=generation.logprobs,
                )
        return [made[row] for row in range(len(jobs))]


@dataclass(frozen=True)
class FixedRollouts:
    """The rollouts of a run folder, the same ones epoch after epoch: off-policy from the second
    step on."""

    by_prompt: Mapping[str, list[TrainingRollout]]
    prompts_per_step: int
    seed: int
    masks: Mapping[str, np.ndarray]
    """Selected positions of each rollout, [R] bool; a rollout without an entry has none."""

    def rollouts(self, step: int, student: LanguageModel) -> list[TrainingRollout]:
        """The rollouts of `prompts_per_step` prompts (all of them, where there are fewer)."""
        names = list(self.by_prompt)
        chosen = prompts_of_step(names, step, min(self.prompts_per_step, len(names)), self.seed)
        return [rollout for index in chosen for rollout in self.by_prompt[names[index]]]

    def mask(self, rollout: TrainingRollout) -> np.ndarray:
        """Which tokens of a rollout carry loss, [R] bool."""
        return self.masks.get(rollout.rollout_id, np.zeros(len(rollout.response), dtype=bool))

    def all_rollouts(self) -> list[TrainingRollout]:
        """Every rollout, by prompt."""
        return [rollout for rollouts in self.by_prompt.values() for rollout in rollouts]

    def steps_per_epoch(self) -> int:
        """Optimizer steps that show each prompt once."""
        return max(1, len(self.by_prompt) // self.prompts_per_step)


def fixed_rollouts(
    run: Run,
    student: LanguageModel,
    *,
    rule: str,
    retention_ratio: float,
    selection_scope: str,
    mask_seed: int,
    prompts_per_step: int,
    seed: int,
    normalization_scope: str = "run",
    divergence_clip: float | None = None,
) -> FixedRollouts:
    """The rollouts of a run and one of its masks.

    The mask is that of `masks/` where the run has it, else made from `tokens/` by the same
    function. `all` needs neither.

    Raises:
        RunError: the run has no rollouts, or no tokens where a mask must be made.
        VocabularyMismatchError: the rollouts hold the token ids of another tokenizer.
    """
    table = run.rollouts().collect()
    ours = tokenizer_fingerprint(student.tokenizer)
    if foreign := table.filter(pl.col("tokenizer_fingerprint") != ours)["rollout_id"].to_list():
        raise VocabularyMismatchError(
            f"rollout {foreign[0]!r} holds token ids of another tokenizer than that of"
            f" {student.name}"
        )
    by_prompt: dict[str, list[TrainingRollout]] = {}
    for row in table.iter_rows(named=True):
        if any(row["loss_mask"]):
            by_prompt.setdefault(row["prompt_id"], []).append(_rollout(row))
    if not by_prompt:
        raise RunError(
            f"{run.path}: no rollout has a token that the student wrote; there is nothing to"
            " train on"
        )
    every = [rollout for rollouts in by_prompt.values() for rollout in rollouts]
    if rule == "all":
        masks = {rollout.rollout_id: rollout.written for rollout in every}
    else:
        key = {
            "rule": rule,
            "retention_ratio": retention_ratio,
            "selection_scope": selection_scope,
            "seed": mask_seed,
        }
        masks = _masks_by_rollout(
            _selected_positions(run, key, normalization_scope, divergence_clip), every
        )
    return FixedRollouts(by_prompt, prompts_per_step, seed, masks)


def _rollout(row: Mapping[str, Any]) -> TrainingRollout:
    logprobs = row["sampled_logprobs"]
    teacher_prompt = row["teacher_prompt_token_ids"]
    return TrainingRollout(
        rollout_id=row["rollout_id"],
        prompt_id=row["prompt_id"],
        prompt=row["prompt_token_ids"],
        teacher_prompt=row["prompt_token_ids"] if teacher_prompt is None else teacher_prompt,
        response=row["response_token_ids"],
        written=np.array(row["loss_mask"], dtype=bool),
        logprobs=None if logprobs is None or None in logprobs else logprobs,
    )


def _selected_positions(
    run: Run, key: Mapping[str, Any], normalization_scope: str, divergence_clip: float | None
) -> pl.DataFrame:
    """(rollout_id, position) of a mask: the stored one, else one made from the token table."""
    if run.has("masks"):
        names = [
            "rule",
            "selection_scope",
            *(["seed"] if rule_of(key["rule"]).sampled else []),
        ]  # others have one mask
        same = [pl.col(name).cast(pl.String) == str(key[name]) for name in names]
        close = (pl.col("retention_ratio") - key["retention_ratio"]).abs() < 1e-12
        stored = run.masks().filter(*same, close).select("rollout_id", "position").collect()
        if stored.height:
            return stored
    if not run.has("tokens"):
        raise RunError(
            f"{run.path} has neither the mask {json.dumps(dict(key))} nor a token table to make it"
            f" from: `tip-analysis score {run.path} …` makes one"
        )
    logger.info(
        "%s holds no mask %s: it is made from the token table", run.path, json.dumps(dict(key))
    )
    scored = add_scores(
        run.tokens(), normalization_scope=normalization_scope, divergence_clip=divergence_clip
    )
    return (
        select_tokens(scored, **key).filter("selected").select("rollout_id", "position").collect()
    )


def _masks_by_rollout(
    positions: pl.DataFrame, rollouts: Sequence[TrainingRollout]
) -> dict[str, np.ndarray]:
    lengths = {rollout.rollout_id: len(rollout.response) for rollout in rollouts}
    masks = {}
    for (rollout_id,), group in positions.group_by("rollout_id"):
        if rollout_id in lengths:
            mask = np.zeros(lengths[str(rollout_id)], dtype=bool)
            mask[group["position"].to_numpy()] = True
            masks[str(rollout_id)] = mask
    return masks


def check_trainable(
    student: LanguageModel, prompts: Sequence[TrainingPrompt], max_new_tokens: int
) -> None:
    """Refuse prompts that leave no room for a response.

    Raises:
        ModelError: names the first such prompt.
    """
    limit = student.context_length
    for prompt in prompts:
        if limit is not None and len(prompt.token_ids) + max_new_tokens > limit:
            raise ModelError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens and responses may have"
                f" {max_new_tokens}, but the context of {student.name} ends at {limit}: lower"
                " max_new_tokens or shorten the prompts"
            )
