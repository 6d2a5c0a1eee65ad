"""Tools as functions: calls of the student in, tool messages out, whatever a tool does."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tip_analysis.core.text import one_line
from tip_analysis.rollouts.environments.time_limits import NoAnswerError, within
from tip_analysis.rollouts.prompts import Message

TOOL_TIMEOUT_S = 30.0
"""How long one call of a tool may take."""
LONGEST_ERROR = 300


class ToolBox:
    """The tools of an environment."""

    def __init__(
        self, functions: Mapping[str, Callable[..., Any]], *, timeout_s: float = TOOL_TIMEOUT_S
    ) -> None:
        self.functions = dict(functions)
        self.timeout_s = timeout_s

    def answer(self, message: Message) -> list[Message]:
        """One tool message for each call of a turn, in order; none without calls.

        A tool that raises, hangs, is not there or is passed what is no JSON object answers with a
        text that begins with `error:`.
        """
        return [self._answer(call) for call in message.get("tool_calls") or []]

    def _answer(self, call: Mapping[str, Any]) -> Message:
        function = call["function"]
        name, arguments = str(function["name"]), function["arguments"]
        said = {"role": "tool", "name": name, "content": self._content(name, arguments)}
        return said | ({"tool_call_id": call["id"]} if "id" in call else {})

    def _content(self, name: str, arguments: Any) -> str:
        if not name:
            return error_text("the call is no valid JSON with a name and arguments")
        if name not in self.functions:
            known = ", ".join(self.functions)
            return error_text(f"there is no tool {name!r}; there are {known}")
        if not isinstance(arguments, dict):
            return error_text("the arguments are no JSON object")
        try:
            return result_text(within(self.timeout_s, lambda: self.functions[name](**arguments)))
        except NoAnswerError as problem:
            return error_text(str(problem))
        except Exception as problem:  # a tool may fail in any way
            return error_text(f"{type(problem).__name__}: {problem}")


def error_text(reason: str) -> str:
    """What a tool that failed says."""
    return f"error: {one_line(reason, LONGEST_ERROR)}"


def result_text(result: Any) -> str:
    """What a tool found, as text: JSON unless it is text already."""
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def tool_schema(
    name: str, description: str, properties: Mapping[str, Any], required: Sequence[str] = ()
) -> dict[str, Any]:
    """The definition of a tool as OpenAI's protocol and chat templates have it."""
    parameters = {
        "type": "object",
        "properties": dict(properties),
        "required": list(required or properties),
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}
