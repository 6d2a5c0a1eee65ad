"""What an environment is: three functions, one object for each rollout.

`reset` shows the task, `step` answers one turn of the student, `reward` judges the whole. Given
equal tasks and equal turns, an environment answers equally: whatever it draws, it draws from the
task's seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from tip_analysis.core.errors import InputError
from tip_analysis.core.names import Name
from tip_analysis.rollouts.prompts import Message, parse_messages


@dataclass(frozen=True)
class Task:
    """What a rollout is to do."""

    id: str
    """Of the prompt; its rollouts share it."""
    row: Mapping[str, Any]
    """The row of the file of prompts: `problem` or `messages`, `answer`, and every other field."""
    seed: int
    """What the environment draws from: the same for all rollouts of a task."""


class End(Name):
    """Why a trajectory ended."""

    DONE = "done"
    """The environment said so."""
    TURNS = "turns"
    """No turn is left."""
    LENGTH = "length"
    """No token is left, in a turn or for what the environment says."""


@dataclass(frozen=True)
class Trajectory:
    """A whole conversation."""

    task: Task
    messages: Sequence[Message]
    """From the first message of the task on; the student's turns with `reasoning_content` and
    `tool_calls` where it wrote any."""
    end: End
    """Why it ended."""


@dataclass(frozen=True)
class Reward:
    """What a trajectory was worth."""

    total: float
    """In [0, 1]."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What it is made of, by name."""


class Environment(Protocol):
    """One task at a time. A class that needs no arguments can be named on the command line; a
    static method `tasks()` that gives rows of prompts makes a file of them unnecessary."""

    def reset(self, task: Task) -> tuple[Sequence[Message], Sequence[Any] | None]:
        """Begin a task.

        Returns:
            The messages that the student is shown, and the tools (as chat templates take them).
        """
        ...

    def step(self, message: Message) -> tuple[Sequence[Message], bool]:
        """Answer one turn of the student.

        Args:
            message: `role` assistant, `content`, and `reasoning_content` and `tool_calls` (with
                `function.name` and `function.arguments`) where it wrote any.

        Returns:
            What is said to it, and whether the task is over.
        """
        ...

    def reward(self, trajectory: Trajectory) -> Reward | float:
        """What the whole was worth, in [0, 1]."""
        ...


def checked_reward(found: Any, where: str) -> Reward:
    """A reward, whatever form its environment gave it.

    Raises:
        InputError: it is no number in [0, 1], or a part is no finite number.
    """
    if isinstance(found, tuple) and len(found) == 2:
        found = Reward(*found)
    reward: Reward = found if isinstance(found, Reward) else Reward(cast(float, found))
    total = _number(reward.total)
    parts = {str(name): _number(value) for name, value in dict(reward.parts).items()}
    if total is None or not 0.0 <= total <= 1.0:
        raise InputError(f"{where}: expected a reward in [0, 1], found {reward.total!r:.80}")
    if strange := [name for name, value in parts.items() if value is None]:
        raise InputError(f"{where}: the part {strange[0]!r} of the reward is no finite number")
    return Reward(total, {name: value for name, value in parts.items() if value is not None})


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def checked_messages(found: Any, where: str) -> list[Message]:
    """What an environment says; none is allowed.

    Raises:
        InputError: it is no list of messages.
    """
    if isinstance(found, list | tuple) and not found:
        return []
    return list(parse_messages(found, where, error=InputError))
