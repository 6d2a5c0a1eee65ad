"""Responses that evaluation tools write down: lighteval's details and lm-evaluation-harness's
samples."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import ImportFormatError, UnknownNameError
from tip_analysis.rollouts.importers.drafts import (
    Draft,
    ImportOptions,
    ImportReport,
    drafts_of,
    handle_bad_row,
    integer,
    list_at,
    number,
    pick_reward,
    rows_of,
    text_or_messages,
    text_or_none,
    token_ids,
)
from tip_analysis.rollouts.prompts import Message
from tip_analysis.rollouts.row_files import Row, field_names, json_or_none, preview

_LM_EVAL_FILE = re.compile(r"samples_(?P<task>.+?)_\d{4}-\d\d-\d\dT.*")


def read_lighteval(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """lighteval's `details_{task}_{date}.parquet`: `doc`, `metric`, `model_response` (or `__doc__`
    …), samples in lists."""

    def drafts(row: Row) -> Iterator[Draft]:
        doc, metric, response = (
            _lighteval_field(row, name) for name in ("doc", "metric", "model_response")
        )
        return _lighteval_drafts(row, doc, metric, response, options, report)

    yield from drafts_of(rows_of(files, options, report), drafts, options, report)


def _lighteval_field(row: Row, name: str) -> dict[str, Any]:
    value = row.values.get(name, row.values.get(f"__{name}__"))
    if isinstance(value, str):
        value = json_or_none(value)
    if value is None and name == "metric":
        return {}
    if not isinstance(value, dict):
        raise ImportFormatError(
            f"{row.where}: expected the column {name!r} or '__{name}__' with an object; found"
            f" {field_names(row.values)}"
        )
    return value


def _lighteval_drafts(
    row: Row,
    doc: Mapping[str, Any],
    metric: Mapping[str, Any],
    response: Mapping[str, Any],
    options: ImportOptions,
    report: ImportReport,
) -> Iterator[Draft]:
    texts, outputs = _lighteval_samples(row, response)
    num_samples = max(len(texts), len(outputs))
    if num_samples == 0:
        raise ImportFormatError(f"{row.where}: model_response holds neither text nor output_tokens")
    prompt_ids = list_at(response, "input_tokens", row.where) or None
    if prompt_ids and isinstance(prompt_ids[0], list):
        prompt_ids = prompt_ids[0]
    padding = integer(response.get("padded_tokens_count"), f"{row.where}: padded_tokens_count")
    for index in range(num_samples):
        ids = outputs[index] if index < len(outputs) and len(outputs) == num_samples else None
        yield Draft(
            row.where,
            prompt=_prompt(response.get("input") or doc.get("query"), row),
            response=texts[index] if index < len(texts) else None,
            prompt_token_ids=_ids_at(prompt_ids, row, "input_tokens"),
            response_token_ids=_ids_at(ids, row, "output_tokens"),
            num_padding=padding or 0,
            prompt_key=_lighteval_key(doc),
            extras={
                "reward": _sample_reward(metric, index, num_samples, row, options, report),
                "ground_truth": _gold(doc),
            },
        )


def _lighteval_samples(row: Row, response: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Texts and token ids of the samples, either of which may be missing."""
    text = response.get("text")
    texts = [text] if isinstance(text, str) else list_at(response, "text", row.where)
    outputs = list_at(response, "output_tokens", row.where)
    return texts, [outputs] if outputs and not isinstance(outputs[0], list) else outputs


def _lighteval_key(doc: Mapping[str, Any]) -> str | None:
    task, doc_id = doc.get("task_name"), doc.get("id")
    if doc_id in (None, ""):
        return None
    return f"{task}-{doc_id}" if task else str(doc_id)


def _ids_at(ids: Any, row: Row, name: str) -> list[int] | None:
    return None if ids is None else token_ids(ids, f"{row.where}: {name}")


def _sample_reward(
    metric: Mapping[str, Any],
    index: int,
    num_samples: int,
    row: Row,
    options: ImportOptions,
    report: ImportReport,
) -> float | None:
    """A metric of one sample: a list has one value a sample; a single value of several samples
    belongs to none of them."""
    per_sample = {}
    for name, value in metric.items():
        if isinstance(value, list) and len(value) == num_samples:
            per_sample[name] = value[index]
        elif num_samples == 1 and isinstance(value, bool | int | float):
            per_sample[name] = value
    if not per_sample:
        if metric:
            report.note(
                "metrics of several samples together are not taken as rewards; grade the import to"
                " fill them in"
            )
        return None
    return pick_reward(per_sample, row, options, report)


def _gold(doc: Mapping[str, Any]) -> str | None:
    choices, index = doc.get("choices"), doc.get("gold_index")
    index = index[0] if isinstance(index, list) and index else index
    if isinstance(choices, list) and isinstance(index, int) and 0 <= index < len(choices):
        return text_or_none(choices[index])
    return None


def read_lm_eval(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """lm-evaluation-harness's `samples_{task}_{date}.jsonl`; the rows that several filters make of
    one document are one."""
    for path in files:
        named = _LM_EVAL_FILE.fullmatch(path.stem)
        task = named["task"] if named else path.stem
        documents: dict[str, list[Row]] = {}
        for row in rows_of([path], options, report):
            if "doc_id" not in row.values:
                found = field_names(row.values)
                handle_bad_row(
                    ImportFormatError(f"{row.where}: expected the field 'doc_id'; found {found}"),
                    options,
                    report,
                )
                continue
            documents.setdefault(str(row.values["doc_id"]), []).append(row)
        for doc_id, rows in documents.items():
            report.merged_rows += len(rows) - 1
            make = partial(
                _lm_eval_drafts, rows, f"{task}-{doc_id}", options=options, report=report
            )
            yield from drafts_of(rows[:1], lambda _, make=make: make(), options, report)


def _filtered(rows: list[Row], options: ImportOptions) -> tuple[Row, str | None]:
    """The row of the filter that is taken, and what there is to say about the choice."""
    by_filter = {str(row.values.get("filter")): row for row in rows}
    if options.filter_name is not None:
        if options.filter_name not in by_filter:
            raise UnknownNameError(f"filter ({rows[0].where})", options.filter_name, by_filter)
        return by_filter[options.filter_name], None
    first, *others = by_filter
    if not others:
        return rows[0], None
    return (
        rows[0],
        f"metrics are those of the filter {first!r}; there are also {', '.join(others)}",
    )


def _lm_eval_drafts(
    rows: list[Row], prompt_key: str, *, options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    row, choice = _filtered(rows, options)
    prompt, settings = _lm_eval_request(row)
    responses = _lm_eval_responses(row)
    reward = _lm_eval_reward(row, len(responses), choice, options, report)
    is_greedy = settings.get("do_sample") is False
    temperature = (
        0.0 if is_greedy else number(settings.get("temperature"), f"{row.where}: temperature")
    )
    for text in responses:
        yield Draft(
            row.where,
            prompt=_prompt(prompt, row),
            response=text,
            prompt_key=prompt_key,
            extras={
                "reward": reward,
                "ground_truth": text_or_none(row.values.get("target")),
                "temperature": temperature,
                "top_p": number(settings.get("top_p"), f"{row.where}: top_p"),
            },
        )


def _lm_eval_responses(row: Row) -> list[str]:
    """Generated texts; null, as a server gives for a thought that was cut off, is an empty one."""
    responses = [
        "" if text is None else text
        for group in list_at(row.values, "resps", row.where)
        for text in (group if isinstance(group, list) else [group])
    ]
    if not responses or not all(isinstance(text, str) for text in responses):
        raise ImportFormatError(
            f"{row.where}: resps: expected generated texts, found"
            f" {preview(row.values.get('resps'))}; only tasks that generate (generate_until) have"
            " rollouts"
        )
    return responses


def _lm_eval_reward(
    row: Row, num_samples: int, choice: str | None, options: ImportOptions, report: ImportReport
) -> float | None:
    """A document's metric, where it belongs to one response."""
    metrics = {
        name: value
        for name, value in row.values.items()
        if name != "doc_id" and isinstance(value, int | float)
    }
    if num_samples > 1:
        if metrics:
            report.note(
                "metrics of several samples together are not taken as rewards; grade the import to"
                " fill them in"
            )
        return None
    if choice is not None:
        report.note(choice)
    named = [name for name in list_at(row.values, "metrics", row.where) if isinstance(name, str)]
    preferred = named or ["exact_match", "acc"]
    return pick_reward(metrics, row, options, report, preferred=preferred)


def _lm_eval_request(row: Row) -> tuple[Any, Mapping[str, Any]]:
    """Prompt and generation settings: `arguments.gen_args_0.arg_0`, or the first of a list of pairs
    in older files."""
    arguments = row.values.get("arguments")
    pair: Any = None
    if isinstance(arguments, dict) and isinstance(first := arguments.get("gen_args_0"), dict):
        pair = [first.get("arg_0"), first.get("arg_1")]
    elif isinstance(arguments, list) and arguments and isinstance(arguments[0], list):
        pair = [*arguments[0], None]
    if pair is None or pair[0] is None:
        raise ImportFormatError(
            f"{row.where}: arguments: expected gen_args_0.arg_0 (the prompt), found"
            f" {preview(arguments)}"
        )
    return pair[0], pair[1] if isinstance(pair[1], dict) else {}


def _prompt(value: Any, row: Row) -> str | tuple[Message, ...] | None:
    """A prompt that is a text, a list of messages, or a list of messages written as JSON."""
    if value is None:
        return None
    if not isinstance(value, str | list):
        raise ImportFormatError(
            f"{row.where}: prompt: expected a text or messages, found {preview(value)}"
        )
    return text_or_messages(value, f"{row.where}: prompt")
