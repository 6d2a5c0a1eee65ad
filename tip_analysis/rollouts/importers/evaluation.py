"""Responses that evaluation tools write down: lighteval's details and lm-evaluation-harness's
samples."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import ImportFormatError, UnknownNameError
from tip_analysis.rollouts.importers.drafts import (
    Draft,
    ImportOptions,
    ImportReport,
    list_at,
    number,
    pick_reward,
    text_or_none,
    token_ids,
)
from tip_analysis.rollouts.prompts import Message, parse_messages
from tip_analysis.rollouts.row_files import Row, field_names, json_value, preview, read_rows

_LM_EVAL_FILE = re.compile(r"samples_(?P<task>.+?)_\d{4}-\d\d-\d\dT.*")


def read_lighteval(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """lighteval's `details_{task}_{date}.parquet`: `doc`, `metric`, `model_response` (or `__doc__`
    …), samples in lists."""
    for path in files:
        for row in read_rows(path, error=ImportFormatError):
            report.rows_read += 1
            doc, metric, response = (
                _lighteval_field(row, name) for name in ("doc", "metric", "model_response")
            )
            yield from _lighteval_drafts(row, doc, metric, response, options, report)


def _lighteval_field(row: Row, name: str) -> dict[str, Any]:
    value = row.values.get(name, row.values.get(f"__{name}__"))
    if isinstance(value, str):
        value = _json_or_none(value)
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
    text = response.get("text")
    texts = [text] if isinstance(text, str) else list_at(response, "text", row.where)
    outputs = list_at(response, "output_tokens", row.where)
    if outputs and not isinstance(outputs[0], list):
        outputs = [outputs]
    num_samples = max(len(texts), len(outputs))
    if num_samples == 0:
        raise ImportFormatError(f"{row.where}: model_response holds neither text nor output_tokens")
    prompt_ids = list_at(response, "input_tokens", row.where) or None
    if prompt_ids and isinstance(prompt_ids[0], list):
        prompt_ids = prompt_ids[0]
    task, doc_id = doc.get("task_name"), doc.get("id")
    for index in range(num_samples):
        ids = outputs[index] if index < len(outputs) and len(outputs) == num_samples else None
        yield Draft(
            row.where,
            prompt=_prompt(response.get("input") or doc.get("query"), row),
            response=texts[index] if index < len(texts) else None,
            prompt_token_ids=(
                None if prompt_ids is None else token_ids(prompt_ids, f"{row.where}: input_tokens")
            ),
            response_token_ids=(
                None if ids is None else token_ids(ids, f"{row.where}: output_tokens")
            ),
            prompt_key=(
                None if doc_id in (None, "") else f"{task}-{doc_id}" if task else str(doc_id)
            ),
            extras={
                "reward": _sample_reward(metric, index, num_samples, row, options, report),
                "ground_truth": _gold(doc),
            },
        )


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
        for row in read_rows(path, error=ImportFormatError):
            report.rows_read += 1
            if "doc_id" not in row.values:
                raise ImportFormatError(
                    f"{row.where}: expected the field 'doc_id'; found {field_names(row.values)}"
                )
            documents.setdefault(str(row.values["doc_id"]), []).append(row)
        for doc_id, rows in documents.items():
            report.merged_rows += len(rows) - 1
            yield from _lm_eval_drafts(
                _filtered(rows, options, report), f"{task}-{doc_id}", options, report
            )


def _filtered(rows: list[Row], options: ImportOptions, report: ImportReport) -> Row:
    by_filter = {str(row.values.get("filter")): row for row in rows}
    if options.filter_name is not None:
        if options.filter_name not in by_filter:
            raise UnknownNameError(f"filter ({rows[0].where})", options.filter_name, by_filter)
        return by_filter[options.filter_name]
    if len(by_filter) > 1:
        first, *others = by_filter
        report.note(
            f"metrics are those of the filter {first!r}; there are also {', '.join(others)}"
        )
    return rows[0]


def _lm_eval_drafts(
    row: Row, prompt_key: str, options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    prompt, settings = _lm_eval_request(row)
    responses = [
        text
        for group in list_at(row.values, "resps", row.where)
        for text in (group if isinstance(group, list) else [group])
    ]
    if not responses or not all(isinstance(text, str) for text in responses):
        raise ImportFormatError(
            f"{row.where}: resps: expected generated texts, found"
            f" {preview(row.values.get('resps'))}; only tasks that generate (generate_until) have"
            " rollouts"
        )
    metrics = {
        name: value
        for name, value in row.values.items()
        if name != "doc_id" and isinstance(value, int | float)
    }
    named = [name for name in list_at(row.values, "metrics", row.where) if isinstance(name, str)]
    preferred = named or ["exact_match", "acc"]
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
                "reward": (
                    pick_reward(metrics, row, options, report, preferred=preferred)
                    if len(responses) == 1
                    else None
                ),
                "ground_truth": text_or_none(row.values.get("target")),
                "temperature": temperature,
                "top_p": number(settings.get("top_p"), f"{row.where}: top_p"),
            },
        )


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
    if isinstance(value, str) and value.lstrip().startswith("["):
        decoded = _json_or_none(value)
        if (
            isinstance(decoded, list)
            and decoded
            and all(isinstance(item, dict) and "role" in item for item in decoded)
        ):
            value = decoded
    return (
        parse_messages(value, f"{row.where}: prompt", error=ImportFormatError)
        if isinstance(value, list)
        else value
    )


def _json_or_none(text: str) -> Any:
    try:
        return json_value(text, "", error=ImportFormatError)
    except ImportFormatError:
        return None
