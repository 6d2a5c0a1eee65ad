"""The environment of the agent pair: a look-up of prices and a calculator."""

from collections.abc import Mapping
from typing import Any

from tip_analysis.core.errors import InputError
from tip_analysis.demo.agent.language import (
    ADD,
    LOOKUP,
    NONE,
    added,
    extract_answer,
    judge,
    parse_problem,
    tool_answer,
)
from tip_analysis.rollouts.environments.protocol import Reward, Task, Trajectory
from tip_analysis.rollouts.environments.tool_box import ToolBox, tool_schema
from tip_analysis.rollouts.prompts import Message

TEXT = {"type": "string"}
TOOLS = (
    tool_schema(LOOKUP, "The price of an item.", {"item": TEXT}),
    tool_schema(ADD, "The sum of amounts such as 12+fig47.", {"amounts": TEXT}),
)
WEIGHTS = {"answer": 0.6, "lookups": 0.2, "amounts": 0.2}
"""What each part counts for in the reward."""


class AgentEnvironment:
    """One task: it is over with the first turn that calls no tool."""

    def __init__(self) -> None:
        self._problem = ""
        self._calls: list[Mapping[str, Any]] = []
        self._tools = ToolBox({LOOKUP: self._lookup, ADD: self._add})

    def reset(self, task: Task) -> tuple[list[Message], list[dict[str, Any]]]:
        """Show a task.

        Raises:
            InputError: it is none of this language.
        """
        self._problem, self._calls = str(task.row.get("problem", "")), []
        if parse_problem(self._problem) is None:
            raise InputError(
                f"task {task.id!r}: expected a problem such as 12+fig+kiwi=, found"
                f" {self._problem!r:.60}"
            )
        return [{"role": "user", "content": self._problem}], list(TOOLS)

    def step(self, message: Message) -> tuple[list[Message], bool]:
        """Let the tools answer."""
        answers = self._tools.answer(message)
        return answers, not answers

    def reward(self, trajectory: Trajectory) -> Reward:
        """The weighted parts of `language.judge`."""
        last = trajectory.messages[-1]
        answer = extract_answer(str(last["content"])) if last["role"] == "assistant" else None
        parts = judge(self._problem, self._calls, answer)
        return Reward(sum(WEIGHTS[name] * value for name, value in parts.items()), parts)

    def _lookup(self, item: str) -> str:
        self._calls.append({"name": LOOKUP, "arguments": {"item": item}})
        return "".join(tool_answer(self._problem, LOOKUP, [item]))

    def _add(self, amounts: str) -> str:
        self._calls.append({"name": ADD, "arguments": {"amounts": amounts}})
        return added(amounts) or NONE
