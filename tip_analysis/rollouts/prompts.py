"""Prompts: files of problems, templates around them, and the token ids that a model is shown.

Read: JSONL or Parquet with `problem`, `prompt` or `messages`, and optionally `id`, `answer` and
`solution` (also verl's prompt files, whose answer is `reward_model.ground_truth`), or a hub dataset
(`name`, `name:split`, `name:config:split`). User text is only ever inserted, never formatted:
problems are full of braces.

Not covered: images and other parts of a message that are not text.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tip_analysis.core.errors import InputError, OptionError, PromptFileError, UnknownNameError
from tip_analysis.core.names import UNNAMED_BENCHMARK, OnBadRow
from tip_analysis.core.optional import require
from tip_analysis.core.text import one_line
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message = dict[str, Any]
"""A chat message: `role`, `content` (text), and whatever else the chat template reads
(`tool_calls`, `name` …)."""

TEMPLATES: dict[str, str] = {
    "plain": "{problem}",
    "boxed": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
}
"""What is put around a problem in the user's turn, by name."""

PROBLEM_FIELDS = ("problem", "prompt", "messages")
"""Where a prompt's text is looked for, in this order."""

_PLACEHOLDER = "{problem}"
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
_RESERVED_SWITCHES = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
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


@dataclass(frozen=True)
class RenderedPrompt:
    """What a model is shown."""

    text: str
    """Chat markers and a beginning-of-sequence token included."""
    token_ids: list[int]
    """Its token ids; the beginning-of-sequence token occurs at most once."""
    is_chat: bool
    """Whether a chat template made it; false for the bare text."""


def read_prompts(
    source: str | Path, *, limit: int | None = None, on_bad_row: OnBadRow | str = OnBadRow.FAIL
) -> list[Prompt]:
    """Read a file of prompts, or a hub dataset.

    Args:
        source: A `.jsonl` or `.parquet` file, or a dataset's name.
        limit: Read the first `limit` prompts only; what comes after is not looked at.
        on_bad_row: `fail`, or `skip`: a row that cannot be used is left out, and a warning counts
            them.

    Raises:
        PromptFileError: a missing or empty file, an unknown extension, broken JSON, a missing
            field, a field of the wrong type, or an id that occurs twice; the message names the
            line.
        OptionError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit: expected at least 1, found {limit}")
    bad_rows = _BadRows(OnBadRow(on_bad_row))
    rows, stem = _source_rows(str(source), bad_rows)
    prompts: dict[str, Prompt] = {}
    first_seen: dict[str, str] = {}
    for index, row in enumerate(rows):
        try:
            prompt = prompt_from_row(row, default_id=f"{stem}-{index}")
            if prompt.id in prompts:
                raise PromptFileError(
                    f"{row.where}: the id {prompt.id!r} occurs twice (first in"
                    f" {first_seen[prompt.id]})"
                )
        except PromptFileError as problem:
            bad_rows(problem)
            continue
        prompts[prompt.id] = prompt
        first_seen[prompt.id] = row.where
        if len(prompts) == limit:
            break
    if not prompts:
        raise bad_rows.first or PromptFileError(f"{source}: holds no prompt")
    bad_rows.report(str(source))
    return list(prompts.values())


class _BadRows:
    """Raises, or remembers, what is wrong with rows."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        self._skips = on_bad_row is OnBadRow.SKIP
        self._count = 0
        self.first: InputError | None = None

    def __call__(self, problem: InputError) -> None:
        if not self._skips:
            raise problem
        self._count += 1
        self.first = self.first or problem

    def report(self, source: str) -> None:
        if self._count:
            logger.warning(
                "%d row(s) of %s were left out; the first: %s", self._count, source, self.first
            )


def is_file(source: str) -> bool:
    """Whether a source of prompts means a file, there or not, rather than a hub dataset."""
    path = Path(source)
    return (
        path.suffix.lower() in _FILE_SUFFIXES
        or _HUB_NAME.fullmatch(source) is None
        or path.exists()
    )


def _source_rows(source: str, bad_rows: _BadRows) -> tuple[Iterable[Row], str]:
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


def with_tools(switches: Mapping[str, Any] | None, tools: Sequence[Any] | None) -> dict[str, Any]:
    """Switches of a chat template, with the tools of one conversation."""
    return dict(switches or {}) | ({"tools": list(tools)} if tools else {})


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


def resolve_template(template: str) -> str:
    """The text of a named template, or a template text of the user's own, which contains
    `{problem}`.

    Raises:
        UnknownNameError: neither.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if _PLACEHOLDER in template:
        return template
    raise UnknownNameError(
        "prompt template", template, [*TEMPLATES, f"any text that contains {_PLACEHOLDER}"]
    )


def fill_template(template: str, problem: str) -> str:
    """Put a problem into a template; no other character of either is interpreted."""
    return resolve_template(template).replace(_PLACEHOLDER, problem)


def student_messages(prompt: Prompt, template: str = "plain") -> list[Message]:
    """The conversation that the student is shown.

    A bare problem becomes one user turn. In a given conversation the template goes around the last
    user turn, so that `plain` leaves it as it is.
    """
    if prompt.problem is not None:
        return [{"role": "user", "content": fill_template(template, prompt.problem)}]
    text = resolve_template(template)
    return _edit_last_user_turn(prompt.messages or (), lambda content: fill_template(text, content))


def teacher_messages(messages: Sequence[Message], solution: str) -> list[Message]:
    """The conversation for a teacher that sees the reference solution in the last user turn."""
    return _edit_last_user_turn(messages, lambda content: teacher_user_turn(content, solution))


def teacher_user_turn(problem_text: str, solution: str) -> str:
    """A user's turn, followed by the reference solution: the privileged context of on-policy
    self-distillation."""
    return (
        f"{problem_text}\n\nReference solution:\n{solution}\n\nNow solve the problem step by step"
        " in your own words."
    )


def _edit_last_user_turn(messages: Sequence[Message], edit: Callable[[str], str]) -> list[Message]:
    edited = list(messages)
    for index in reversed(range(len(edited))):
        if edited[index]["role"] == "user":
            edited[index] = {**edited[index], "content": edit(edited[index]["content"])}
            return edited
    raise PromptFileError(
        f"expected a conversation with a turn of the user, found the roles {roles_of(edited)}"
    )


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> RenderedPrompt:
    """The text and token ids that a model is shown: its chat template, or the bare text where it
    has none.

    Args:
        tokenizer: The model's own.
        messages: The conversation; the template opens the assistant's turn after it.
        chat_template_kwargs: Switches for the template, such as `enable_thinking`, passed through.

    Raises:
        PromptFileError: the template refuses the conversation, there is no template for more than
            one message, or no token is left.
    """
    if getattr(tokenizer, "chat_template", None):
        text = render_chat(tokenizer, messages, chat_template_kwargs=chat_template_kwargs)
        # The template writes its own special tokens: adding them once more would double the first
        # one.
        rendered = RenderedPrompt(text, encode(tokenizer, text), is_chat=True)
    elif (chat_template_kwargs or {}).get("tools"):
        raise PromptFileError("the model has no chat template, so tools cannot be shown to it")
    elif len(messages) == 1:
        rendered = render_bare(tokenizer, messages[0]["content"])
    else:
        raise PromptFileError(
            f"the model has no chat template, so a conversation ({roles_of(messages)}) cannot be"
            " shown to it; give each prompt as one `problem`, or choose a chat model"
        )
    if not rendered.token_ids:
        raise PromptFileError(f"the prompt {preview(messages[-1]['content'])} has no token")
    return rendered


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the text that the chat template makes of it.

    Raises:
        PromptFileError: the template refuses the conversation (alternating roles, no system turn
            …).
        OptionError: a switch that is not the template's but the renderer's.
    """
    switches = dict(chat_template_kwargs or {})
    if reserved := [name for name in _RESERVED_SWITCHES if name in switches]:
        raise OptionError(f"chat template switches: {', '.join(reserved)} cannot be set here")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **switches,
        )
    except Exception as problem:  # a template is a program of the model's author's
        raise PromptFileError(
            f"the chat template refuses the conversation ({roles_of(messages)}):"
            f" {one_line(str(problem), 200)}"
        ) from problem
    assert isinstance(text, str)
    return text


def roles_of(messages: Sequence[Message]) -> str:
    """The roles of a conversation for an error message."""
    return one_line(", ".join(message["role"] for message in messages), 160)


def render_bare(tokenizer: "PreTrainedTokenizerBase", text: str) -> RenderedPrompt:
    """A text without a template, opened as the tokenizer opens a sequence, and never closed.

    The tokenizer's beginning-of-sequence token is put in front unless the text begins with it; an
    end-of-sequence token that the tokenizer would append is not part of a prompt.
    """
    bare = encode(tokenizer, text)
    framed = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    opening = next(
        (
            framed[:i]
            for i in range(len(framed) - len(bare) + 1)
            if framed[i : i + len(bare)] == bare
        ),
        [],
    )
    if opening and bare[: len(opening)] == opening:
        opening = []
    marks = "".join(tokenizer.convert_ids_to_tokens(opening)) if opening else ""
    return RenderedPrompt(marks + text, opening + bare, is_chat=False)


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text, with no special token but those written in it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def unused_switches(
    tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: Iterable[str]
) -> list[str]:
    """Names of the switches that the chat template does not mention: setting them changes
    nothing."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return [
        name for name in chat_template_kwargs if not re.search(rf"\b{re.escape(name)}\b", template)
    ]
