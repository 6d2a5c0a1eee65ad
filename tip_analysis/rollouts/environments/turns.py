"""The text of one turn of a student as a message: thought, content and tool calls apart."""

import json
import re
from typing import Any

from tip_analysis.rollouts.prompts import Message
from tip_analysis.rollouts.row_files import json_or_none
from tip_analysis.rollouts.segments import Span, call_spans, thought_spans

_TAGS = re.compile(
    r"</?tool_call>|</?function_call>|\[TOOL_CALLS\]|<\|python_tag\|>|<\|tool_call\|>"
)
_THOUGHT_TAG = re.compile(
    r"\A(?:<[^<>\s]+>|\[THINK\]|◁think▷)|(?:</[^<>\s]+>|\[/THINK\]|◁/think▷)\Z"
)
_FUNCTION = re.compile(r"<function=(?P<name>[^>\s]+)>(?P<body>.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=(?P<name>[^>\s]+)>\n?(?P<value>.*?)\n?(?:</parameter>|\Z)", re.DOTALL
)
_DEEPSEEK = re.compile(
    r"<｜tool▁sep｜>(?P<name>\S+)\s*(?:```json)?\s*(?P<arguments>\{.*?\})\s*(?:```)?\s*"
    r"<｜tool▁call▁end｜>",
    re.DOTALL,
)


def parse_turn(text: str) -> Message:
    """A turn of the student as a message of OpenAI's form.

    A call that cannot be read has an empty name and its text as arguments, so that whoever answers
    it can say so.
    """
    thoughts = thought_spans(text)
    calls = call_spans(text, thoughts)
    message: Message = {"role": "assistant", "content": _outside(text, [*thoughts, *calls])}
    thought = "\n".join(_thought(text[start:end]) for start, end in thoughts)
    if thought:
        message["reasoning_content"] = thought
    read = [call for start, end in calls for call in _calls(text[start:end])]
    if read:
        message["tool_calls"] = [
            {"id": f"call_{index}", "type": "function", "function": call}
            for index, call in enumerate(read)
        ]
    return message


def _outside(text: str, spans: list[Span]) -> str:
    at, kept = 0, []
    for start, end in sorted(spans):
        kept.append(text[at:start])
        at = max(at, end)
    return "".join([*kept, text[at:]]).strip()


def _thought(text: str) -> str:
    return _THOUGHT_TAG.sub("", _THOUGHT_TAG.sub("", text.strip())).strip()


def _calls(text: str) -> list[dict[str, Any]]:
    """The calls that one span of text holds."""
    if functions := list(_FUNCTION.finditer(text)):
        return [_from_tags(found["name"], found["body"]) for found in functions]
    if found := list(_DEEPSEEK.finditer(text)):
        return [_call({"name": one["name"], "arguments": one["arguments"]}) for one in found]
    bare = _TAGS.sub("", text).strip()
    value = json_or_none(bare)
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in values):
        return [_call(one) for one in values]
    return [{"name": "", "arguments": bare}]


def _call(value: dict[str, Any]) -> dict[str, Any]:
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        decoded = json_or_none(arguments)
        arguments = decoded if isinstance(decoded, dict) else arguments
    return {"name": value["name"], "arguments": arguments}


def _from_tags(name: str, body: str) -> dict[str, Any]:
    arguments = {found["name"]: _value(found["value"]) for found in _PARAMETER.finditer(body)}
    return {"name": name, "arguments": arguments}


def _value(text: str) -> Any:
    """A parameter between tags: JSON where it is some, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
