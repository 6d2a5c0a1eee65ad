"""Prompts: files of problems, and hub datasets, row by row.

Read: JSONL or Parquet with `problem`, `prompt` or `messages`, and optionally `id`, `answer` and
`solution` (also verl's prompt files, whose answer is `reward_model.ground_truth`), or a hub dataset
(`name`, `name:split`, `name:config:split`). What a model is shown of them: `rendering`.

Not covered: images and other parts of a message that are not text.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import InputError, OptionError, PromptFileError
from tip_analysis.core.names import UNNAMED_BENCHMARK, OnBadRow
from tip_analysis.core.optional import require
from tip_analysis.core.text import one_line
from tip_analysis.rollouts.bad_rows import BadRows, as_bad_rows
from tip_analysis.rollouts.row_files import (
    JSONL_SUFFIXES,
    PARQUET_SUFFIXES,
    Row,
    field_names,
    is_json,
    json_or_none,
    json_value,
    preview,
    read_rows,
    type_name,
)

Message = dict[str, Any]
"""A chat message: `role`, `content` (text), and whatever else the chat template reads
(`tool_calls`, `name` …)."""


PROBLEM_FIELDS = ("problem", "prompt", "messages")
"""Where a prompt's text is looked for, in this order."""

_HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:-]+))?"
)
_FILE_SUFFIXES = (
    *JSONL_SUFFIXES,
    *PARQUET_SUFFIXES,
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".gz",
    ".zst",
    ".arrow",
)


@dataclass(frozen=True)
class Prompt:
    """One problem as its file gives it: exactly one of `problem` and `messages` is set."""

    id: str
    """Unique in its file; where the file has none, its stem and the row's number from 0."""
    problem: str | None = None
    """The bare problem, which a template goes around."""
    messages: tuple[Message, ...] | None = None
    """A conversation that ends where the student is to write."""
    answer: str | None = None
    """Reference answer: what a grader compares with."""
    solution: str | None = None
    """Reference solution: what a teacher with privileged context is shown."""
    tools: tuple[Any, ...] | None = None
    """Definitions of the tools that the model may call, as chat templates take them."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of the row."""
    benchmark: str = UNNAMED_BENCHMARK
    """The evaluation set that it belongs to."""


def read_prompts(
    source: str | Path,
    *,
    limit: int | None = None,
    needs_answer: bool = False,
    on_bad_row: BadRows | OnBadRow | str = OnBadRow.FAIL,
) -> list[Prompt]:
    """Read a file of prompts, or a hub dataset.

    Args:
        source: A `.jsonl` or `.parquet` file, or a dataset's name.
        limit: Read the first `limit` prompts only; what comes after is not looked at.
        needs_answer: A row without an answer cannot be used.
        on_bad_row: `fail`, or `skip`: a row that cannot be used is left out, and a warning counts
            them; or what counts them.

    Raises:
        PromptFileError: a missing or empty file, an unknown extension, broken JSON, a missing
            field, a field of the wrong type, or an id that occurs twice; the message names the
            line.
        OptionError: `limit` is below 1.
    """
    bad_rows = as_bad_rows(on_bad_row)
    rows, stem = _source_rows(str(source), bad_rows)
    return usable_prompts(
        rows, str(source), stem=stem, limit=limit, needs_answer=needs_answer, on_bad_row=bad_rows
    )


def usable_prompts(
    rows: Iterable[Row | Prompt],
    source: str,
    *,
    stem: str,
    limit: int | None = None,
    needs_answer: bool = False,
    on_bad_row: BadRows | OnBadRow | str = OnBadRow.FAIL,
) -> list[Prompt]:
    """The first prompts that rows hold, each under an id of its own.

    Args:
        rows: rows of a file, or prompts as they are.
        source: what they are called in messages.
        stem: begins the ids of rows that have none.
        limit: how many.
        needs_answer: a row without an answer cannot be used.
        on_bad_row: as for `read_prompts`.

    Raises:
        PromptFileError: a row cannot be used, or there is none.
        OptionError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit: expected at least 1, found {limit}")
    bad_rows = as_bad_rows(on_bad_row)
    prompts: dict[str, Prompt] = {}
    first_seen: dict[str, str] = {}
    for index, row in enumerate(rows):
        where = row.where if isinstance(row, Row) else f"{source}, row {index}"
        try:
            prompt = (
                prompt_from_row(row, default_id=f"{stem}-{index}") if isinstance(row, Row) else row
            )
            _check_is_new(prompt, where, first_seen)
            if needs_answer:
                _check_answer(prompt, where)
        except PromptFileError as problem:
            bad_rows(problem)
            continue
        prompts[prompt.id], first_seen[prompt.id] = prompt, where
        if len(prompts) == limit:
            break
    if not prompts:
        raise bad_rows.first or PromptFileError(f"{source}: holds no prompt")
    bad_rows.report(source)
    return list(prompts.values())


def _check_is_new(prompt: Prompt, where: str, first_seen: Mapping[str, str]) -> None:
    if prompt.id in first_seen:
        raise PromptFileError(
            f"{where}: the id {prompt.id!r} occurs twice (first in {first_seen[prompt.id]})"
        )


def _check_answer(prompt: Prompt, where: str) -> None:
    if prompt.answer is None:
        raise PromptFileError(
            f"{where}: the problem {prompt.id!r} has no answer, which an evaluation needs"
        )


def is_file(source: str) -> bool:
    """Whether a source of prompts means a file, there or not, rather than a hub dataset."""
    path = Path(source)
    return (
        path.suffix.lower() in _FILE_SUFFIXES
        or _HUB_NAME.fullmatch(source) is None
        or path.exists()
    )


def _source_rows(source: str, bad_rows: BadRows) -> tuple[Iterable[Row], str]:
    path = Path(source)
    name = _HUB_NAME.fullmatch(source)
    if is_file(source) or name is None:
        return read_rows(path, error=PromptFileError, on_bad_row=bad_rows), path.stem
    config, split = name["config"], name["split"]
    if split is None:
        config, split = None, config
    return _hub_rows(source, name["name"], config, split), name["name"].rsplit("/", maxsplit=1)[-1]


def _hub_rows(source: str, name: str, config: str | None, split: str | None) -> Iterator[Row]:
    require("datasets", f"the hub dataset {source!r}")
    import datasets  # slow to import, and needed for hub datasets only

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as problem:  # the hub's client raises errors of many libraries
        reason = (str(problem).strip() or type(problem).__name__).split("\n", maxsplit=1)[0]
        raise PromptFileError(
            f"{source!r} is no file here and could not be loaded as a hub dataset: {reason}"
        ) from problem
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            raise PromptFileError(
                f"{source!r}: choose a split, as in {name}:{next(iter(loaded))}; it has"
                f" {', '.join(map(str, loaded))}"
            )
        loaded = next(iter(loaded.values()))
    for index, values in enumerate(loaded):
        present = {key: value for key, value in dict(values).items() if value is not None}
        yield Row(f"{source}, row {index}", present)


def prompt_from_row(row: Row, *, default_id: str) -> Prompt:
    """A prompt from one row of a file.

    Raises:
        PromptFileError: a field is missing or has the wrong type.
    """
    values = dict(row.values)
    found = [name for name in PROBLEM_FIELDS if name in values]
    if not found:
        raise PromptFileError(
            f"{row.where}: expected one of the fields {', '.join(PROBLEM_FIELDS)}; found"
            f" {field_names(values)}"
        )
    text = values.pop(found[0])
    if isinstance(text, str):
        text = messages_in_text(text) or text
    problem, messages = None, None
    if isinstance(text, str) and found[0] != "messages":
        problem = text
        if not problem.strip():
            raise PromptFileError(f"{row.where}: the field {found[0]!r} is blank")
    else:
        messages = parse_messages(text, f"{row.where}: {found[0]}")
        _check_ends_with_a_question(messages, row.where)
    answer = _scalar(values.pop("answer", None), f"{row.where}: answer")
    if answer is None and isinstance(reward_model := values.get("reward_model"), dict):
        answer = _scalar(
            reward_model.get("ground_truth"), f"{row.where}: reward_model.ground_truth"
        )
    return Prompt(
        id=_identifier(values.pop("id", default_id), row.where),
        problem=problem,
        messages=messages,
        answer=answer,
        solution=_solution(values.pop("solution", None), row.where),
        tools=parse_tools(values.pop("tools", None), f"{row.where}: tools"),
        metadata=values,
    )


def messages_in_text(text: str) -> list[Any] | None:
    """The chat messages that a text holds as JSON, as tables of one text column keep them; None for
    any other text."""
    value = json_or_none(text) if text.lstrip().startswith("[") else None
    is_chat = isinstance(value, list) and all(
        isinstance(item, dict) and "role" in item for item in value
    )
    return value if value and is_chat else None


def parse_tools(
    value: Any, where: str, *, error: type[InputError] = PromptFileError
) -> tuple[Any, ...] | None:
    """Tool definitions, a list or its JSON text; None where there are none.

    Raises:
        InputError: (as `error`) broken JSON, or no list of objects.
    """
    if isinstance(value, str):
        value = json_value(value, where, error=error) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
        raise error(f"{where}: expected a list of tool definitions, found {preview(value)}")
    return tuple(value)


def _identifier(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise PromptFileError(
            f"{where}: id: expected a string or an integer, found {preview(value)}"
        )
    return str(value)


def _solution(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise PromptFileError(f"{where}: solution: expected a string, found {type_name(value)}")
    return value


def _scalar(value: Any, where: str) -> str | None:
    """An answer as text; a list of one is that one, as some verl files have it."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise PromptFileError(f"{where}: expected a string or a number, found {type_name(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise PromptFileError(f"{where}: expected a string or a finite number, found {value}")
    return str(value) if str(value).strip() else None


def parse_messages(
    value: Any, where: str, *, error: type[InputError] = PromptFileError
) -> tuple[Message, ...]:
    """Chat messages with their content as one text: a list of text parts is joined, other keys are
    kept.

    Raises:
        InputError: (as `error`) not a list of {role, content}, an empty list, or a part that is not
            text.
    """
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if isinstance(value, list | tuple) else type_name(value)
        raise error(f"{where}: expected a list of messages {{role, content}}, found {found}")
    messages = []
    for index, message in enumerate(value):
        place = f"{where}[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role:
            raise error(f"{place}: expected a message {{role, content}}, found {preview(message)}")
        messages.append(_message(message, place, error))
    return tuple(messages)


def _message(message: Mapping[str, Any], place: str, error: type[InputError]) -> Message:
    kept = {key: item for key, item in message.items() if item is not None}
    if not is_json(kept):
        raise error(f"{place}: holds a value that JSON cannot: {preview(message)}")
    thought = kept.get("reasoning_content", kept.get("reasoning"))
    if thought and not isinstance(thought, str):
        raise error(f"{place}: reasoning: expected a string, found {type_name(thought)}")
    if "content" not in kept and not kept.get("tool_calls") and not thought:
        raise error(f"{place}: the message of the {one_line(message['role'], 40)} has no content")
    if thought:  # servers call it one or the other, and templates read the older name
        kept["reasoning_content"] = thought
    if kept.get("tool_calls"):
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], place, error)
    return {**kept, "content": _content_text(message.get("content"), place, error)}


def _tool_calls(calls: Any, place: str, error: type[InputError]) -> list[Any]:
    """Tool calls with their arguments as an object: the protocol writes them as JSON text, chat
    templates take the object. Text that is no JSON object stays as the model wrote it."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise error(f"{place}: tool_calls: expected a list of objects, found {preview(calls)}")
    return [_with_object_arguments(call) for call in calls]


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _with_object_arguments(inner)}
    arguments = call.get("arguments")
    decoded = json_or_none(arguments) if isinstance(arguments, str) else None
    return {**call, "arguments": decoded} if isinstance(decoded, dict) else call


def _content_text(content: Any, where: str, error: type[InputError]) -> str:
    if content is None:  # a turn that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise error(
            f"{where}: content: expected a string or a list of parts, found {type_name(content)}"
        )
    texts = []
    for part in content:
        text = (
            part.get("text")
            if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text")
            else part
        )
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type_name(part)
            raise error(
                f"{where}: content: only text parts can be read, found a part of the type"
                f" {preview(kind)}"
            )
        texts.append(text)
    return "".join(texts)


def _check_ends_with_a_question(messages: Sequence[Message], where: str) -> None:
    if messages[-1]["role"] == "assistant":
        raise PromptFileError(
            f"{where}: the conversation ends with the assistant's turn, which leaves nothing to"
            " write; leave that turn out, or import the conversation as given text"
        )
