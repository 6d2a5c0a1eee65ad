"""Many conversations at once: in each round every open one is given its next turn, at whatever turn
it is, by one call of the engine.

The random numbers of a turn belong to (seed, rollout, position at which the turn begins), so that a
trajectory does not depend on which others are under way.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tip_analysis.core.errors import InputError, OptionError
from tip_analysis.core.names import FinishReason, OnRewrite, set_names
from tip_analysis.core.progress import Advance
from tip_analysis.core.text import one_line
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.encoded import EncodedPrompt, Rollout, encode_prompts
from tip_analysis.rollouts.engines.engine import Engine, Request, request_seed
from tip_analysis.rollouts.environments.conversation import REFUSALS, Conversation
from tip_analysis.rollouts.environments.protocol import (
    End,
    Environment,
    Reward,
    Task,
    Trajectory,
    checked_messages,
    checked_reward,
)
from tip_analysis.rollouts.environments.registry import EnvironmentSource
from tip_analysis.rollouts.environments.time_limits import NoAnswerError, within
from tip_analysis.rollouts.environments.tool_box import TOOL_TIMEOUT_S, error_text
from tip_analysis.rollouts.prompts import Message, Prompt
from tip_analysis.rollouts.rendering import with_tools
from tip_analysis.rollouts.sampling import Generation, Sampling


@dataclass(frozen=True)
class Limits:
    """How far a trajectory may go, beside the tokens of its sampling."""

    max_turns: int = 16
    """Turns of the student."""
    step_timeout_s: float = 2 * TOOL_TIMEOUT_S
    """How long an environment may take to answer one turn."""
    on_rewrite: OnRewrite = OnRewrite.REFUSE
    """What is done where the template shows earlier turns otherwise."""

    def __post_init__(self) -> None:
        set_names(self, on_rewrite=OnRewrite)
        if self.max_turns < 1 or not self.step_timeout_s > 0:
            raise OptionError("--max-turns must be at least 1, and a time limit above 0")

    def identity(self) -> dict[str, Any]:
        """What decides the tokens of a trajectory."""
        return {"max_turns": self.max_turns, "on_rewrite": self.on_rewrite}


@dataclass(frozen=True)
class Asked:
    """A task as an environment shows it, as token ids."""

    prompt: Prompt
    """As its file gives it."""
    task: Task
    shown: EncodedPrompt
    """What the environment makes of it."""

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.prompt.id


@dataclass(frozen=True)
class Episode:
    """A trajectory that is over."""

    name: str
    asked: Asked
    conversation: Conversation
    end: End
    reward: Reward
    finish_reason: FinishReason
    refused: str | None = None
    """Why it cannot be used."""

    @property
    def num_turns(self) -> int:
        """Turns of the student."""
        return len(self.conversation.turn_starts)

    def rollout(self) -> Rollout:
        """For scoring and training."""
        conversation, shown = self.conversation, self.asked.shown
        return Rollout(
            rollout_id=self.name,
            prompt_id=self.asked.id,
            prompt=shown.token_ids,
            teacher_prompt=shown.teacher_token_ids,
            response=conversation.response,
            loss_mask=conversation.loss_mask,
            reward=self.reward.total,
            truncated=self.finish_reason is FinishReason.LENGTH,
        )


def task_of(prompt: Prompt, seed: int) -> Task:
    """A prompt as the task that an environment is given."""
    row = {"problem": prompt.problem, "messages": prompt.messages, "answer": prompt.answer}
    row |= {"solution": prompt.solution, "tools": prompt.tools}
    known = {name: value for name, value in row.items() if value is not None}
    return Task(prompt.id, known | dict(prompt.metadata), request_seed(seed, prompt.id))


def ask(
    prompt: Prompt,
    source: EnvironmentSource,
    *,
    student: TokenModel,
    seed: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **how: Any,
) -> Asked:
    """A task as token ids.

    Args:
        prompt: the task.
        source: the environment.
        student: who reads it.
        seed: what the environment draws from, with the prompt's id.
        chat_template_kwargs: switches for the chat template.
        how: further options of `encode_prompts`.

    Raises:
        PromptFileError: the template refuses it.
        InputError: the environment cannot begin it.
    """
    task = task_of(prompt, seed)
    messages, tools = _reset(source.make(), task, source.name)
    shown = Prompt(
        prompt.id,
        messages=tuple(messages),
        answer=prompt.answer,
        solution=prompt.solution,
        tools=tools,
        metadata=prompt.metadata,
        benchmark=prompt.benchmark,
    )
    (encoded,) = encode_prompts(
        [shown], student=student, chat_template_kwargs=chat_template_kwargs, **how
    )
    return Asked(prompt, task, encoded)


def _reset(
    environment: Environment, task: Task, name: str
) -> tuple[list[Message], tuple[Any, ...] | None]:
    where = f"the environment {name}, task {task.id!r}"
    try:
        messages, tools = environment.reset(task)
    except InputError:
        raise
    except Exception as problem:  # a user's environment may fail in any way
        reason = one_line(f"{type(problem).__name__}: {problem}", 200)
        raise InputError(f"{where}: reset failed: {reason}") from problem
    found = checked_messages(messages, where)
    if not found:
        raise InputError(f"{where}: reset shows no message")
    return found, tuple(tools) if tools else None


def run_episodes(
    engine: Engine,
    source: EnvironmentSource,
    jobs: Sequence[tuple[str, Asked]],
    sampling: Sampling,
    limits: Limits,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    advance: Advance | None = None,
    at_once: int | None = None,
) -> list[Episode]:
    """One trajectory for each job, in their order.

    Args:
        engine: what the student writes with.
        source: makes an environment for each.
        jobs: names, to which random numbers belong, and tasks.
        sampling: temperature, nucleus and seed; `max_new_tokens` is the longest response, what the
            environment says included.
        limits: how far each may go.
        chat_template_kwargs: switches for the chat template.
        advance: told of progress, in trajectories.
        at_once: so many are under way together; by default all.

    Raises:
        InputError: an environment does not keep the protocol.
    """
    waiting = deque(enumerate(jobs))
    open_ones: list[tuple[int, _Open]] = []
    ended: dict[int, Episode] = {}
    begin = partial(_Open, engine, source, sampling, limits, dict(chat_template_kwargs or {}))
    while waiting or open_ones:
        while waiting and (at_once is None or len(open_ones) < at_once):
            index, (name, asked) = waiting.popleft()
            open_ones.append((index, begin(name, asked)))
        requests = [one.request() for _, one in open_ones]
        generations = engine.generate(requests, sampling)
        going_on = []
        for (index, one), generation in zip(open_ones, generations, strict=True):
            if (episode := one.take(generation)) is None:
                going_on.append((index, one))
                continue
            ended[index] = episode
            if advance is not None:
                advance(1, tokens=sum(episode.conversation.loss_mask))
        open_ones = going_on
    return [ended[index] for index in range(len(jobs))]


class _Open:
    """A trajectory that is under way."""

    def __init__(
        self,
        engine: Engine,
        source: EnvironmentSource,
        sampling: Sampling,
        limits: Limits,
        switches: Mapping[str, Any],
        name: str,
        asked: Asked,
    ) -> None:
        self.name, self.asked, self.sampling, self.limits = name, asked, sampling, limits
        self.where = f"the environment {source.name}, rollout {name!r}"
        self.environment = source.make()
        messages, tools = _reset(self.environment, asked.task, source.name)
        if messages != list(asked.shown.prompt.messages or ()) or tools != asked.shown.prompt.tools:
            raise InputError(
                f"{self.where}: reset shows another task than before; it must be a function of the"
                " task and its seed"
            )
        self.conversation = Conversation(
            engine.author.tokenizer,
            asked.shown,
            with_tools(switches, tools),
            name=f"rollout {name!r}",
            on_rewrite=limits.on_rewrite,
        )

    @property
    def room(self) -> int:
        """Tokens that are left."""
        return self.sampling.max_new_tokens - len(self.conversation.response)

    def request(self) -> Request:
        """What the engine is asked for."""
        position = len(self.conversation.response)
        name = self.name if position == 0 else f"{self.name}@{position}"
        return Request(name, self.conversation.token_ids, self.room)

    def take(self, generation: Generation) -> Episode | None:
        """Go on with what the student wrote; the episode, if it is over."""
        message = self.conversation.add_turn(generation)
        if generation.finish_reason is FinishReason.LENGTH:
            return self._end(End.LENGTH)
        messages, done = self._step(message)
        if done:
            self.conversation.said += messages  # nobody reads them, but the reward may
            return self._end(End.DONE)
        if len(self.conversation.turn_starts) == self.limits.max_turns:
            return self._end(End.TURNS)
        if not messages:
            raise InputError(f"{self.where}: step says neither anything nor that it is done")
        try:
            ids = self.conversation.answer(messages)
            if len(ids) >= self.room:
                return self._end(End.LENGTH)
            self.conversation.extend(messages, ids)
        except REFUSALS as problem:
            return self._end(End.DONE, refused=str(problem))
        return None

    def _step(self, message: Message) -> tuple[list[Message], bool]:
        """What the environment says; where it raises or hangs, a tool message says so."""
        try:
            found = within(self.limits.step_timeout_s, lambda: self.environment.step(dict(message)))
        except NoAnswerError as problem:  # it is still at work, and cannot be asked again
            return [{"role": "tool", "content": error_text(str(problem))}], True
        except Exception as problem:  # an environment may fail in any way
            reason = error_text(f"{type(problem).__name__}: {problem}")
            return [{"role": "tool", "content": reason}], False
        if not isinstance(found, tuple) or len(found) != 2:
            raise InputError(
                f"{self.where}: expected (messages, done) of step, found {found!r:.80}"
            )
        return checked_messages(found[0], f"{self.where}: step"), bool(found[1])

    def _end(self, end: End, refused: str | None = None) -> Episode:
        trajectory = Trajectory(self.asked.task, tuple(self.conversation.said), end)
        reward = Reward(0.0) if refused else self._reward(trajectory)
        finish = FinishReason.STOP if end is End.DONE else FinishReason.LENGTH
        return Episode(
            self.name, self.asked, self.conversation, end, reward, finish, refused=refused
        )

    def _reward(self, trajectory: Trajectory) -> Reward:
        try:
            found = self.environment.reward(trajectory)
        except InputError:
            raise
        except Exception as problem:
            reason = one_line(f"{type(problem).__name__}: {problem}", 200)
            raise InputError(f"{self.where}: reward failed: {reason}") from problem
        return checked_reward(found, self.where)
