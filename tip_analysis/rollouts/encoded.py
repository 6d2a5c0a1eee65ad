"""A prompt and a rollout in memory, as token ids: what sampling, scoring, gradients and training
hand to each other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.core.errors import (
    ContextLengthError,
    OptionError,
    PromptFileError,
    VocabularyMismatchError,
)
from tip_analysis.core.names import TeacherContext
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.bad_rows import BadRows
from tip_analysis.rollouts.prompts import Message, Prompt
from tip_analysis.rollouts.rendering import (
    RenderedPrompt,
    render,
    student_messages,
    teacher_messages,
    with_tools,
)

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
    truncated: bool | None = None
    """Whether the length limit cut it off; None where unknown."""

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


def encode_usable(
    prompts: Iterable[Prompt], bad_rows: BadRows, *, student: TokenModel, **how: Any
) -> list[EncodedPrompt]:
    """Token ids of prompts; what is done with those that cannot be shown, `bad_rows` decides.

    Args:
        prompts: problems, as a file of prompts gives them.
        bad_rows: told of each prompt that a template refuses.
        student: who reads them.
        how: further options of `encode_prompts`.

    Raises:
        PromptFileError: a prompt cannot be shown and is not to be skipped, or none can be shown.
    """
    encoded, problem = [], None
    for prompt in prompts:
        try:
            encoded += encode_prompts([prompt], student=student, **how)
        except PromptFileError as found:
            bad_rows(found)
            problem = problem or found
    if problem is not None and not encoded:
        raise problem
    return encoded


def with_room(
    prompts: Iterable[EncodedPrompt], bad_rows: BadRows, *, student: TokenModel, max_new_tokens: int
) -> list[EncodedPrompt]:
    """Prompts that leave room for a response in the model's context.

    Args:
        prompts: what the model reads.
        bad_rows: told of each prompt that is too long, and made to warn of all that were left out.
        student: the model.
        max_new_tokens: the longest response.

    Raises:
        ContextLengthError: a prompt is too long and is not to be skipped, or all are.
    """
    kept, problem = [], None
    for prompt in prompts:
        try:
            _check_room(prompt, student, max_new_tokens)
            kept.append(prompt)
        except ContextLengthError as found:
            bad_rows(found)
            problem = problem or found
    if problem is not None and not kept:
        raise problem
    bad_rows.report("the prompts")
    return kept


def _check_room(prompt: EncodedPrompt, student: TokenModel, max_new_tokens: int) -> None:
    limit, length = student.context_length, len(prompt.token_ids)
    if limit is not None and length + max_new_tokens > limit:
        raise ContextLengthError(
            f"prompt {prompt.id!r} has {length} tokens and responses may have {max_new_tokens}, but"
            f" the context of {student.name} ends at {limit}: shorten the prompts or lower"
            " --max-new-tokens"
        )


def encode_prompts(
    prompts: Iterable[Prompt],
    *,
    student: TokenModel,
    teacher: TokenModel | None = None,
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
    shown_to = teacher if shows_solution else None
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(_encode(prompt, student, shown_to, template, chat_template_kwargs))
        except PromptFileError as problem:
            raise PromptFileError(f"prompt {prompt.id!r}: {problem}") from problem
    return encoded


def _encode(
    prompt: Prompt,
    student: TokenModel,
    teacher: TokenModel | None,
    template: str,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> EncodedPrompt:
    """Token ids of one prompt; with a teacher, also with its solution as the teacher sees it."""
    messages = student_messages(prompt, template)
    switches = with_tools(chat_template_kwargs, prompt.tools)
    shown = render(student.tokenizer, messages, chat_template_kwargs=switches)
    _check_rows(prompt, shown.token_ids, student)
    to_teacher = None
    if teacher is not None:
        more = teacher_messages(messages, _solution(prompt))
        to_teacher = render(teacher.tokenizer, more, chat_template_kwargs=switches)
        _check_rows(prompt, to_teacher.token_ids, teacher)
    return EncodedPrompt(prompt, messages, shown, to_teacher)


def _check_rows(prompt: Prompt, token_ids: Sequence[int], model: TokenModel) -> None:
    """Refuse a prompt with a token of the tokenizer's that its model has no row for."""
    if max(token_ids) >= model.vocab_size:
        raise VocabularyMismatchError(
            f"prompt {prompt.id!r} holds the token id {max(token_ids)}, but {model.name} has only"
            f" {model.vocab_size:,} rows: tokenizer and weights do not belong together"
        )


def _solution(prompt: Prompt) -> str:
    if prompt.solution is None:
        raise PromptFileError("it has no solution, which the teacher is to be shown")
    return prompt.solution
