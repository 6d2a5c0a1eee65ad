"""A prompt and a rollout in memory, as token ids: what sampling, scoring, gradients and training
hand to each other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.core.errors import OptionError, PromptFileError, VocabularyMismatchError
from tip_analysis.core.names import TeacherContext
from tip_analysis.models.loading import LanguageModel
from tip_analysis.rollouts.prompts import Message, Prompt
from tip_analysis.rollouts.rendering import (
    RenderedPrompt,
    render,
    student_messages,
    teacher_messages,
    with_tools,
)

"""What the teacher is shown besides the prompt."""

ROLLOUT_COLUMNS = (
    "rollout_id",
    "prompt_id",
    "prompt_token_ids",
    "response_token_ids",
    "teacher_prompt_token_ids",
    "loss_mask",
    "reward",
    "sampled_logprobs",
)
"""Columns of the rollout table that a `Rollout` is made of."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the student is shown it, and as the teacher is."""

    prompt: Prompt
    messages: list[Message]
    shown: RenderedPrompt
    shown_to_teacher: RenderedPrompt | None = None
    """Set where the teacher is shown more (privileged context)."""

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.prompt.id

    @property
    def answer(self) -> str | None:
        """Reference answer, for a grader."""
        return self.prompt.answer

    @property
    def token_ids(self) -> list[int]:
        """What the student reads."""
        return self.shown.token_ids

    @property
    def teacher_token_ids(self) -> list[int]:
        """What the teacher reads."""
        return (self.shown_to_teacher or self.shown).token_ids


@dataclass(frozen=True)
class Rollout:
    """One rollout: token ids, which response tokens its student wrote, and what it is worth."""

    rollout_id: str
    prompt_id: str
    prompt: Sequence[int]
    response: Sequence[int]
    teacher_prompt: Sequence[int] | None = None
    """The teacher's prompt where it differs from the student's."""
    loss_mask: Sequence[bool] | None = None
    """Which response tokens the student wrote (tool output, for one, is false): all by default."""
    reward: float | None = None
    logprobs: Sequence[float] | None = None
    """ln P of each response token as its author saw it; None where unknown."""

    @cached_property
    def written(self) -> np.ndarray:
        """[R] bool: the tokens that the student wrote."""
        if self.loss_mask is None:
            return np.ones(len(self.response), dtype=bool)
        return np.asarray(self.loss_mask, dtype=bool)

    @property
    def positions(self) -> list[int]:
        """Positions, in the response, of the tokens that the student wrote."""
        return np.flatnonzero(self.written).tolist()

    @property
    def num_tokens(self) -> int:
        """Tokens that the student wrote."""
        return int(self.written.sum())

    @property
    def written_tokens(self) -> np.ndarray:
        """[N] int64: the tokens that the student wrote."""
        return np.asarray(self.response, dtype=np.int64)[self.written]

    def prompt_of(self, *, teacher: bool) -> Sequence[int]:
        """The prompt that the student, or the teacher, reads."""
        return self.prompt if not teacher or self.teacher_prompt is None else self.teacher_prompt


def rollouts_in_memory(table: pl.DataFrame) -> list[Rollout]:
    """Rows of `schema.RolloutTable` as rollouts, in their order."""
    return [_rollout(row) for row in table.select(ROLLOUT_COLUMNS).iter_rows(named=True)]


def _rollout(row: Mapping[str, Any]) -> Rollout:
    logprobs = row["sampled_logprobs"]
    return Rollout(
        rollout_id=row["rollout_id"],
        prompt_id=row["prompt_id"],
        prompt=row["prompt_token_ids"],
        response=row["response_token_ids"],
        teacher_prompt=row["teacher_prompt_token_ids"],
        loss_mask=row["loss_mask"],
        reward=row["reward"],
        logprobs=None if logprobs is None or None in logprobs else logprobs,
    )


def encode_prompts(
    prompts: Iterable[Prompt],
    *,
    student: LanguageModel,
    teacher: LanguageModel | None = None,
    template: str = "plain",
    teacher_context: TeacherContext | str = TeacherContext.NONE,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[EncodedPrompt]:
    """Token ids of prompts, for student and teacher.

    Args:
        prompts: problems, as a file of prompts gives them.
        student: its chat template makes the student's prompt.
        teacher: its chat template makes the teacher's prompt where that differs; needed for
            `solution`.
        template: the text around a problem: a name of `rendering.TEMPLATES`, or a text with
            `{problem}`.
        teacher_context: `none`, or `solution`: the teacher is shown the reference solution.
        chat_template_kwargs: switches for the chat template.

    Raises:
        UnknownNameError: no such context.
        OptionError: no teacher to show a solution to.
        PromptFileError: a prompt lacks the solution that the teacher is to be shown.
        VocabularyMismatchError: a prompt holds a token that its model has no row for.
    """
    shows_solution = TeacherContext(teacher_context) is TeacherContext.SOLUTION
    if shows_solution and teacher is None:
        raise OptionError("teacher_context solution needs a teacher to show the solution to")
    encoded = []
    for prompt in prompts:
        messages = student_messages(prompt, template)
        switches = with_tools(chat_template_kwargs, prompt.tools)
        shown = render(student.tokenizer, messages, chat_template_kwargs=switches)
        _check_rows(prompt, shown.token_ids, student)
        to_teacher = None
        if shows_solution and teacher is not None:
            more = teacher_messages(messages, _solution(prompt))
            to_teacher = render(teacher.tokenizer, more, chat_template_kwargs=switches)
            _check_rows(prompt, to_teacher.token_ids, teacher)
        encoded.append(EncodedPrompt(prompt, messages, shown, to_teacher))
    return encoded


def _check_rows(prompt: Prompt, token_ids: Sequence[int], model: LanguageModel) -> None:
    """Refuse a prompt with a token of the tokenizer's that its model has no row for."""
    if max(token_ids) >= model.vocab_size:
        raise VocabularyMismatchError(
            f"prompt {prompt.id!r} holds the token id {max(token_ids)}, but {model.name} has only"
            f" {model.vocab_size:,} rows: tokenizer and weights do not belong together"
        )


def _solution(prompt: Prompt) -> str:
    if prompt.solution is None:
        raise PromptFileError(
            f"prompt {prompt.id!r} has no solution, which the teacher is to be shown"
        )
    return prompt.solution
