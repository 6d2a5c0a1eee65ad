"""Rollouts and conversations that the user has: the native table, chat data, prompts with
responses, server responses."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import ImportFormatError, PromptFileError
from tip_analysis.core.names import FinishReason, IdsOrigin, TemplateOrigin
from tip_analysis.core.schema import RolloutTable
from tip_analysis.rollouts.importers.conversations import split_turns
from tip_analysis.rollouts.importers.drafts import (
    Draft,
    ImportOptions,
    ImportReport,
    TurnEnd,
    drafts_of,
    field_of,
    number,
    rows_of,
    text_or_messages,
    text_or_none,
    token_ids,
)
from tip_analysis.rollouts.prompts import (
    Message,
    Prompt,
    parse_messages,
    parse_tools,
    prompt_from_row,
)
from tip_analysis.rollouts.rendering import student_messages
from tip_analysis.rollouts.row_files import Row, field_names, json_value, preview

_NATIVE_ENDS = {reason.value: reason for reason in (FinishReason.STOP, FinishReason.LENGTH)}
"""Ends that a table says; any other is told from the response."""

_OWN_COLUMNS = (
    "messages",
    "tools",
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
    rows = rows_of(files, options, report)
    yield from drafts_of(rows, lambda row: [_native_draft(row)], options, report)


def _native_draft(row: Row) -> Draft:
    values = row.values
    prompt_id = values.get("prompt_id")
    if not isinstance(values.get("rollout_id", ""), str):
        found = preview(values["rollout_id"])
        raise ImportFormatError(f"{row.where}: rollout_id: expected a string, found {found}")
    return Draft(
        row.where,
        prompt=_native_messages(row),
        tools=parse_tools(values.get("tools"), f"{row.where}: tools", error=ImportFormatError),
        prompt_token_ids=_ids_at(field_of(row, "prompt_token_ids", list), row, "prompt_token_ids"),
        response_token_ids=_ids_at(
            field_of(row, "response_token_ids", list), row, "response_token_ids"
        ),
        loss_mask=_loss_mask(row),
        prompt_key=None if prompt_id is None else str(prompt_id),
        finish_reason=_NATIVE_ENDS.get(str(values.get("finish_reason"))),
        extras=_native_extras(row),
    )


def _native_messages(row: Row) -> tuple[Message, ...] | None:
    messages, where = row.values.get("messages"), f"{row.where}: messages"
    if isinstance(messages, str):
        messages = json_value(messages, where, error=ImportFormatError)
    if messages is None:
        return None
    return parse_messages(messages, where, error=ImportFormatError)


def _loss_mask(row: Row) -> list[bool] | None:
    mask = row.values.get("loss_mask")
    if mask is None:
        return None
    if not isinstance(mask, list) or not all(isinstance(item, bool | int) for item in mask):
        raise ImportFormatError(
            f"{row.where}: loss_mask: expected a list of true and false, found {preview(mask)}"
        )
    return [bool(item) for item in mask]


def _native_extras(row: Row) -> dict[str, Any]:
    """Columns of the rollout table that are taken over as they are."""
    kept = {
        name: row.values[name]
        for name in RolloutTable.column_names()
        if name in row.values and name not in _OWN_COLUMNS
    }
    for name, kind in (("ids_origin", IdsOrigin), ("template_origin", TemplateOrigin)):
        if row.values.get(name) is not None:
            kept[name] = _named(row, name, list(kind))
    if "reward" in kept:
        kept["reward"] = number(kept["reward"], f"{row.where}: reward")
    return kept


def _named(row: Row, name: str, valid: Sequence[str]) -> str:
    given = row.values[name]
    if given not in valid:
        raise ImportFormatError(
            f"{row.where}: {name}: expected one of {', '.join(valid)}, found {preview(given)}"
        )
    return str(given)


def read_text(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """Prompts with responses: a file of prompts whose rows have a `response` (or `completion`), a
    text or a list of texts.

    The prompt is shown as it would be for sampling: a chat model's template is applied.
    """
    rows = rows_of(files, options, report)
    yield from drafts_of(rows, partial(_text_drafts, options=options), options, report)


def _text_drafts(row: Row, options: ImportOptions) -> Iterator[Draft]:
    name = (
        "response" if "response" in row.values or "completion" not in row.values else "completion"
    )
    responses = field_of(row, name, (str, list))
    rest = {key: value for key, value in row.values.items() if key not in (name, "reward")}
    prompt = _prompt_beside(row, rest)
    texts = [responses] if isinstance(responses, str) else responses
    rewards = _reward_of_each(row, len(texts))
    for index, (text, reward) in enumerate(zip(texts, rewards, strict=True)):
        if not isinstance(text, str):
            raise ImportFormatError(
                f"{row.where}: {name}[{index}]: expected a string, found {preview(text)}"
            )
        yield Draft(
            row.where,
            prompt=tuple(student_messages(prompt, options.template)),
            response=text,
            tools=prompt.tools,
            prompt_key=prompt.id if "id" in rest else None,
            extras={"reward": reward, "ground_truth": prompt.answer, "solution": prompt.solution},
        )


def _prompt_beside(row: Row, rest: dict[str, Any]) -> Prompt:
    try:
        return prompt_from_row(Row(row.where, rest), default_id="-")
    except PromptFileError as problem:
        raise ImportFormatError(str(problem)) from problem


def _reward_of_each(row: Row, num_samples: int) -> list[float | None]:
    """One reward for each response: a list has one for each, a number is that of all."""
    where, given = f"{row.where}: reward", row.values.get("reward")
    if not isinstance(given, list) or (len(given) == 1 and num_samples != 1):
        return [number(given, where)] * num_samples
    if len(given) != num_samples:
        raise ImportFormatError(
            f"{where}: expected one for each of {num_samples} response(s), found {len(given)}"
        )
    return [number(reward, where) for reward in given]


def read_chat(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """Chat data: `messages`, or `prompt` and `completion`, each a text (taken as it stands) or a
    list of messages."""
    rows = rows_of(files, options, report)
    yield from drafts_of(rows, lambda row: [_chat_draft(row, options)], options, report)


def _chat_draft(row: Row, options: ImportOptions) -> Draft:
    prompt, response = _chat_parts(row, options)
    key = row.values.get("id")
    return Draft(
        row.where,
        prompt=prompt,
        response=response,
        tools=parse_tools(row.values.get("tools"), f"{row.where}: tools", error=ImportFormatError),
        prompt_key=None if key is None else str(key),
        extras={
            "ground_truth": text_or_none(row.values.get("answer")),
            "solution": row.values.get("solution"),
        },
    )


def _chat_parts(
    row: Row, options: ImportOptions
) -> tuple[str | tuple[Message, ...], str | tuple[Message, ...]]:
    """What the student was shown and what it wrote."""
    if "messages" not in row.values and "completion" not in row.values:
        raise ImportFormatError(
            f"{row.where}: expected the field messages, or prompt and completion; found"
            f" {field_names(row.values)}"
        )
    if "messages" not in row.values:
        prompt, response = (_text_or_messages(row, name) for name in ("prompt", "completion"))
        return prompt, response
    where, given = f"{row.where}: messages", row.values["messages"]
    if isinstance(given, str):
        given = json_value(given, where, error=ImportFormatError)
    messages = parse_messages(given, where, error=ImportFormatError)
    num_prompt = split_turns(messages, where, all_turns=options.all_turns)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:num_prompt], messages[num_prompt : last + 1]


def _text_or_messages(row: Row, name: str) -> str | tuple[Message, ...]:
    return text_or_messages(field_of(row, name, (str, list)), f"{row.where}: {name}")


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
    for row in rows_of(files, options, report):
        if isinstance(body := row.values.get("body"), dict) and "response" not in row.values:
            requests[str(row.values.get("custom_id"))] = body
            report.rows_read -= 1
        else:
            rows.append(row)
    make = partial(_response_drafts, requests=requests, options=options, report=report)
    yield from drafts_of(rows, make, options, report)


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
    ids = choice.get("token_ids")
    known = options.prompts.get(key) if key is not None else None
    prompt, prompt_ids = _request_prompt(row, request, choice)
    prompt_ids = body.get("prompt_token_ids") or choice.get("prompt_token_ids") or prompt_ids
    tools = parse_tools(request.get("tools"), f"{row.where}: tools", error=ImportFormatError)
    if prompt is None and known is not None:
        prompt, tools = tuple(student_messages(known, options.template)), tools or known.tools
    if prompt is None and prompt_ids is None:
        raise ImportFormatError(
            f"{row.where}: there is no prompt: ask vLLM for token ids (return_token_ids), put"
            " `messages` beside each response, or give the batch's request file or the file of"
            " prompts (joined by custom_id)"
        )
    answers = {"ground_truth": known and known.answer, "solution": known and known.solution}
    reason = _FINISH_REASONS.get(str(choice.get("finish_reason")))
    return Draft(
        row.where,
        prompt=prompt,
        response=_choice_response(row, choice, has_ids=ids is not None),
        prompt_token_ids=_ids_at(prompt_ids, row, "prompt_token_ids"),
        response_token_ids=_ids_at(ids, row, "token_ids"),
        tools=tools,
        prompt_key=key,
        finish_reason=reason,
        turn_end=_TURN_ENDS.get(reason, TurnEnd.OPEN),
        extras=_sampling_of(row, request) | answers | _logprobs_at(choice, ids),
    )


def _ids_at(ids: Any, row: Row, name: str) -> list[int] | None:
    return None if ids is None else token_ids(ids, f"{row.where}: {name}")


def _sampling_of(row: Row, request: Mapping[str, Any]) -> dict[str, Any]:
    """How the request asked to sample."""
    names = ("temperature", "top_p")
    asked = {name: number(request.get(name), f"{row.where}: {name}") for name in names}
    return asked | {"seed": request.get("seed")}


def _logprobs_at(choice: Mapping[str, Any], ids: Any) -> dict[str, Any]:
    """ln P of each sampled token, where the server was asked for it and for the ids."""
    found = choice.get("logprobs")
    found = found if isinstance(found, dict) and ids is not None else {}
    values, content = found.get("token_logprobs"), found.get("content")
    if values is None and isinstance(content, list):
        values = [one.get("logprob") for one in content if isinstance(one, dict)]
    if not isinstance(values, list):
        return {}
    known = [float(one) if isinstance(one, int | float) and one <= 0 else None for one in values]
    return {"sampled_logprobs": known}


_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "tool_calls": FinishReason.STOP,
    "function_call": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
}
"""What servers say about the end of a response."""
_TURN_ENDS: dict[FinishReason | None, TurnEnd] = {
    FinishReason.STOP: TurnEnd.CLOSED,
    FinishReason.LENGTH: TurnEnd.CUT,
}


def _request_prompt(
    row: Row, request: Mapping[str, Any], choice: Mapping[str, Any]
) -> tuple[str | tuple[Message, ...] | None, list[int] | None]:
    """The prompt of a request as text or messages, or as token ids.

    A completion's `prompt` may be a text, token ids, or a list of either: of `n` samples each, the
    choice's index says which is its own.
    """
    if request.get("messages") is not None:
        where = f"{row.where}: messages"
        return parse_messages(request["messages"], where, error=ImportFormatError), None
    given, where = request.get("prompt"), f"{row.where}: prompt"
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        index, per_prompt = choice.get("index", 0), request.get("n") or 1
        if type(index) is not int or type(per_prompt) is not int or per_prompt < 1:
            raise ImportFormatError(
                f"{where}: which of {len(given)} prompts is answered is not said"
            )
        if not 0 <= index // per_prompt < len(given):
            raise ImportFormatError(
                f"{where}: the choice of index {index} answers prompt {index // per_prompt}, of"
                f" which there are {len(given)}"
            )
        given = given[index // per_prompt]
    if isinstance(given, list):
        if given and isinstance(given[0], dict):
            return text_or_messages(given, where), None
        return None, token_ids(given, where)
    return (text_or_messages(given, where) if isinstance(given, str) else None), None


def _choice_response(
    row: Row, choice: Mapping[str, Any], *, has_ids: bool
) -> str | tuple[Message, ...] | None:
    message = choice.get("message")
    if not isinstance(message, dict):
        return choice.get("text")
    if has_ids:
        return None  # parsed text (reasoning, tool calls apart) says nothing about the ids
    if any(message.get(name) for name in ("reasoning", "reasoning_content", "tool_calls")):
        return parse_messages(
            [{"role": "assistant", **message}], f"{row.where}: message", error=ImportFormatError
        )
    content = message.get("content")
    if not isinstance(content, str):
        raise ImportFormatError(
            f"{row.where}: message: expected a text as content, found {preview(content)}"
        )
    return content
