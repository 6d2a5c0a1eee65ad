"""Rollouts and conversations that the user has: the native table, chat data, prompts with
responses, server responses."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import ImportFormatError, PromptFileError
from tip_analysis.core.schema import RolloutTable
from tip_analysis.rollouts.importers.conversations import split_turns
from tip_analysis.rollouts.importers.drafts import (
    Draft,
    ImportOptions,
    ImportReport,
    field_of,
    number,
    text_or_none,
    token_ids,
)
from tip_analysis.rollouts.prompts import Message, parse_messages, prompt_from_row, student_messages
from tip_analysis.rollouts.row_files import Row, field_names, json_value, preview, read_rows

_OWN_COLUMNS = (
    "messages",
    "prompt_token_ids",
    "response_token_ids",
    "loss_mask",
    "finish_reason",
    "ids_origin",
    "template_origin",
)


def read_native(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """Rows of the rollout table, whole or in part: `prompt_token_ids` and `response_token_ids` are
    needed."""
    columns = RolloutTable.column_names()
    for row in _rows(files, report):
        values = row.values
        messages = values.get("messages")
        if isinstance(messages, str):
            messages = json_value(messages, f"{row.where}: messages", error=ImportFormatError)
        mask = values.get("loss_mask")
        if mask is not None and not (
            isinstance(mask, list) and all(isinstance(item, bool | int) for item in mask)
        ):
            raise ImportFormatError(
                f"{row.where}: loss_mask: expected a list of true and false, found {preview(mask)}"
            )
        prompt_id = values.get("prompt_id")
        if not isinstance(values.get("rollout_id", ""), str):
            found = preview(values["rollout_id"])
            raise ImportFormatError(f"{row.where}: rollout_id: expected a string, found {found}")
        yield Draft(
            row.where,
            prompt=(
                None
                if messages is None
                else parse_messages(messages, f"{row.where}: messages", error=ImportFormatError)
            ),
            prompt_token_ids=token_ids(
                field_of(row, "prompt_token_ids", list), f"{row.where}: prompt_token_ids"
            ),
            response_token_ids=token_ids(
                field_of(row, "response_token_ids", list), f"{row.where}: response_token_ids"
            ),
            loss_mask=None if mask is None else [bool(item) for item in mask],
            prompt_key=None if prompt_id is None else str(prompt_id),
            finish_reason=values.get("finish_reason"),
            extras={
                name: values[name]
                for name in columns
                if name in values and name not in _OWN_COLUMNS
            }
            | {name: values[name] for name in ("ids_origin", "template_origin") if name in values},
        )


def read_text(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """Prompts with responses: a file of prompts whose rows have a `response` (or `completion`), a
    text or a list of texts.

    The prompt is shown as it would be for sampling: a chat model's template is applied.
    """
    for row in _rows(files, report):
        name = (
            "response"
            if "response" in row.values or "completion" not in row.values
            else "completion"
        )
        responses = field_of(row, name, (str, list))
        rewards = row.values.get("reward")
        texts = [responses] if isinstance(responses, str) else responses
        rest = {key: value for key, value in row.values.items() if key not in (name, "reward")}
        try:
            prompt = prompt_from_row(Row(row.where, rest), default_id="-")
        except PromptFileError as problem:
            raise ImportFormatError(str(problem)) from problem
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ImportFormatError(
                    f"{row.where}: {name}[{index}]: expected a string, found {preview(text)}"
                )
            reward = (
                rewards[index] if isinstance(rewards, list) and index < len(rewards) else rewards
            )
            yield Draft(
                row.where,
                prompt=tuple(student_messages(prompt, options.template)),
                response=text,
                prompt_key=prompt.id if "id" in rest else None,
                extras={
                    "reward": number(reward, f"{row.where}: reward"),
                    "ground_truth": prompt.answer,
                    "solution": prompt.solution,
                },
            )


def read_chat(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """Chat data: `messages`, or `prompt` and `completion`, each a text (taken as it stands) or a
    list of messages."""
    for row in _rows(files, report):
        prompt: str | tuple[Message, ...]
        response: str | tuple[Message, ...]
        if "messages" in row.values:
            messages = parse_messages(
                row.values["messages"], f"{row.where}: messages", error=ImportFormatError
            )
            num_prompt = split_turns(
                messages, f"{row.where}: messages", all_turns=options.all_turns
            )
            last = max(
                index for index, message in enumerate(messages) if message["role"] == "assistant"
            )
            prompt, response = messages[:num_prompt], messages[num_prompt : last + 1]
        elif "completion" in row.values:
            prompt, response = (_text_or_messages(row, name) for name in ("prompt", "completion"))
        else:
            raise ImportFormatError(
                f"{row.where}: expected the field messages, or prompt and completion; found"
                f" {field_names(row.values)}"
            )
        tools = row.values.get("tools")
        key = row.values.get("id")
        yield Draft(
            row.where,
            prompt=prompt,
            response=response,
            tools=_tools(tools, row.where),
            prompt_key=None if key is None else str(key),
            extras={
                "ground_truth": text_or_none(row.values.get("answer")),
                "solution": row.values.get("solution"),
            },
        )


def _text_or_messages(row: Row, name: str) -> str | tuple[Message, ...]:
    value = field_of(row, name, (str, list))
    return (
        value
        if isinstance(value, str)
        else parse_messages(value, f"{row.where}: {name}", error=ImportFormatError)
    )


def read_responses(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """Responses of vLLM and of servers that speak OpenAI's protocol, one a line: bare, in batch
    output, or beside `messages`.

    The prompt is `prompt_token_ids` (vLLM, when asked for), the `messages` or `prompt` of the row
    or of a batch's request file among `files`, or the prompt of that id in the file of prompts.
    """
    requests: dict[str, Mapping[str, Any]] = {}
    rows = []
    for row in _rows(files, report):
        if isinstance(body := row.values.get("body"), dict) and "response" not in row.values:
            requests[str(row.values.get("custom_id"))] = body
            report.rows_read -= 1
        else:
            rows.append(row)
    for row in rows:
        yield from _response_drafts(row, requests, options, report)


def _response_drafts(
    row: Row,
    requests: Mapping[str, Mapping[str, Any]],
    options: ImportOptions,
    report: ImportReport,
) -> Iterator[Draft]:
    response = row.values.get("response", row.values)
    if not isinstance(response, dict):
        raise ImportFormatError(
            f"{row.where}: response: expected an object, found {preview(response)}"
        )
    body = response.get("body", response)
    if not isinstance(body, dict):
        raise ImportFormatError(f"{row.where}: body: expected an object, found {preview(body)}")
    if row.values.get("error") or response.get("status_code", 200) != 200 or "error" in body:
        report.failed_requests += 1
        return
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ImportFormatError(
            f"{row.where}: expected a list of choices, found {field_names(body)}"
        )
    key = row.values.get("custom_id")
    key = None if key is None else str(key)
    request = row.values.get("request", requests.get(key or "", row.values))
    request = request.get("body", request) if isinstance(request, dict) else {}
    for choice in choices:
        yield _choice_draft(row, body, choice, request, key, options)


def _choice_draft(
    row: Row,
    body: Mapping[str, Any],
    choice: Any,
    request: Mapping[str, Any],
    key: str | None,
    options: ImportOptions,
) -> Draft:
    if not isinstance(choice, dict):
        raise ImportFormatError(f"{row.where}: choices: expected objects, found {preview(choice)}")
    prompt_ids = body.get("prompt_token_ids") or choice.get("prompt_token_ids")
    ids = choice.get("token_ids")
    known = options.prompts.get(key) if key is not None else None
    prompt: str | tuple[Message, ...] | None = None
    if request.get("messages") is not None:
        prompt = parse_messages(
            request["messages"], f"{row.where}: messages", error=ImportFormatError
        )
    elif isinstance(request.get("prompt"), str):
        prompt = request["prompt"]
    elif known is not None:
        prompt = tuple(student_messages(known, options.template))
    if prompt is None and prompt_ids is None:
        raise ImportFormatError(
            f"{row.where}: there is no prompt: ask vLLM for token ids (return_token_ids), put"
            " `messages` beside each response, or give the batch's request file or the file of"
            " prompts (joined by custom_id)"
        )
    sampling = {
        name: number(request.get(name), f"{row.where}: {name}") for name in ("temperature", "top_p")
    }
    return Draft(
        row.where,
        prompt=prompt,
        response=_choice_response(row, choice, has_ids=ids is not None),
        prompt_token_ids=(
            None if prompt_ids is None else token_ids(prompt_ids, f"{row.where}: prompt_token_ids")
        ),
        response_token_ids=None if ids is None else token_ids(ids, f"{row.where}: token_ids"),
        tools=_tools(request.get("tools"), row.where),
        prompt_key=key,
        finish_reason=choice.get("finish_reason"),
        extras=sampling
        | {
            "seed": request.get("seed"),
            "ground_truth": known and known.answer,
            "solution": known and known.solution,
        },
    )


def _choice_response(
    row: Row, choice: Mapping[str, Any], *, has_ids: bool
) -> str | tuple[Message, ...] | None:
    message = choice.get("message")
    if not isinstance(message, dict):
        return choice.get("text")
    if has_ids:
        return None  # parsed text (reasoning, tool calls apart) says nothing about the ids
    if message.get("reasoning_content") or message.get("tool_calls"):
        return parse_messages(
            [{"role": "assistant", **message}], f"{row.where}: message", error=ImportFormatError
        )
    content = message.get("content")
    if not isinstance(content, str):
        raise ImportFormatError(
            f"{row.where}: message: expected a text as content, found {preview(content)}"
        )
    return content


def _rows(files: Sequence[Path], report: ImportReport) -> Iterator[Row]:
    for path in files:
        for row in read_rows(path, error=ImportFormatError):
            report.rows_read += 1
            yield row


def _tools(value: Any, where: str) -> list[Any] | None:
    """Tool definitions, also as JSON text.

    Raises:
        ImportFormatError: they are no list.
    """
    where = f"{where}: tools"
    tools = json_value(value, where, error=ImportFormatError) if isinstance(value, str) else value
    if tools is not None and not isinstance(tools, list):
        raise ImportFormatError(f"{where}: expected a list, found {preview(tools)}")
    return tools
