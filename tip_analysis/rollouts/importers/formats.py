"""Rollouts that other tools wrote, as rows of the native rollout table.

A format is a function that reads files into drafts; what the drafts lack (token ids, chat markers)
is worked out with the student's tokenizer, and what cannot be recovered is counted in an
`ImportReport`. Pickles are refused: `VERL_CONVERTER` is a script that turns verl's into a file that
can be imported.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from tip_analysis.core.contract_checks import polars_schema, validate
from tip_analysis.core.errors import ImportFormatError, InputError, OptionError, UnknownNameError
from tip_analysis.core.names import OnBadRow
from tip_analysis.core.schema import RolloutTable
from tip_analysis.rollouts.importers.deepplanning_results import read_deepplanning
from tip_analysis.rollouts.importers.drafts import (
    Draft,
    ImportOptions,
    ImportReport,
    handle_bad_row,
)
from tip_analysis.rollouts.importers.evaluation import read_lighteval, read_lm_eval
from tip_analysis.rollouts.importers.given import read_chat, read_native, read_responses, read_text
from tip_analysis.rollouts.importers.resolving import Resolver
from tip_analysis.rollouts.importers.training import VERL_CONVERTER, read_trl, read_verl
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.row_files import (
    JSONL_SUFFIXES,
    PARQUET_SUFFIXES,
    PICKLE_SUFFIXES,
    check_file,
    is_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FORMATS",
    "VERL_CONVERTER",
    "Format",
    "ImportOptions",
    "ImportReport",
    "import_rollouts",
]


_DIGITS = re.compile(r"([0-9]+)")


class Format(NamedTuple):
    """A format that can be imported."""

    read: Callable[[Sequence[Path], ImportOptions, ImportReport], Iterator[Draft]]
    pattern: str
    """Which files of a folder are its own."""
    description: str


FORMATS: dict[str, Format] = {
    "native": Format(
        read_native,
        "*",
        "token ids of prompt and response, and any other column of the rollout table",
    ),
    "text": Format(
        read_text, "*", "prompts (problem, prompt or messages) with a response or several"
    ),
    "chat": Format(read_chat, "*", "chat data: messages, or prompt and completion"),
    "verl": Format(read_verl, "*.jsonl", "verl's rollout and validation dumps, {step}.jsonl"),
    "trl": Format(
        read_trl, "completions_*.parquet", "TRL's logged completions, completions_{step}.parquet"
    ),
    "lighteval": Format(
        read_lighteval, "details_*.parquet", "lighteval's details_{task}_{date}.parquet"
    ),
    "lm-eval": Format(
        read_lm_eval, "samples_*.jsonl", "lm-evaluation-harness's samples_{task}_{date}.jsonl"
    ),
    "openai": Format(
        read_responses, "*.jsonl", "responses of vLLM or of a server with OpenAI's protocol"
    ),
    "vllm": Format(read_responses, "*.jsonl", "the same as openai"),
    "deepplanning": Format(
        read_deepplanning,
        "*.json",
        "trajectories of DeepPlanning's runner, trajectories/id_N.json and case_N/messages.json",
    ),
}
"""The formats by name."""


def _check(format: str, **counts: int | None) -> None:
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    for name, value in counts.items():
        if value is not None and value < 1:
            raise OptionError(f"{name}: expected at least 1, found {value}")


def _nothing_found(report: ImportReport) -> ImportFormatError:
    reason = f"; the first row at fault: {report.skipped[0]}" if report.skipped else ""
    files = ", ".join(report.files) or "no file"
    return ImportFormatError(f"{files}: holds no rollout of the format {report.format}{reason}")


def import_rollouts(
    format: str,
    files: Sequence[str | Path],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    tokenizer_fingerprint: str,
    prompts: Sequence[Prompt] = (),
    template: str = "plain",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    reward_key: str | None = None,
    filter_name: str | None = None,
    all_turns: bool = False,
    prompts_per_batch: int = 8,
    limit: int | None = None,
    on_bad_row: OnBadRow | str = OnBadRow.FAIL,
) -> tuple[pl.DataFrame, ImportReport]:
    """Read rollouts of another tool into the rollout table.

    Args:
        format: One of `FORMATS`.
        files: Files, or folders whose files of this format, at any depth, are read in the order of
            the numbers in their names.
        tokenizer: The student's.
        tokenizer_fingerprint: What the rows say about it; native rows that say otherwise are
            refused.
        prompts: The prompts that the rollouts answer: chat markers are restored from them, and
            responses without a prompt joined to them by id.
        template: The text around a problem in `prompts`.
        chat_template_kwargs: Switches for the chat template, such as `enable_thinking`.
        reward_key: Which of several rewards or metrics is taken.
        filter_name: lm-evaluation-harness: whose filter's metrics are taken.
        all_turns: Chat data: all turns of the assistant are the student's, not only those after the
            last user's.
        prompts_per_batch: Prompts of one `batch_id`, with all their rollouts; where every row has a
            `step`, the step decides.
        limit: Import the first `limit` rollouts only.
        on_bad_row: `fail`, or `skip`: a row that cannot be used is left out and counted.

    Returns:
        A valid rollout table in the order of the files, and the account of what could not be
        recovered.

    Raises:
        UnknownNameError: no such format, reward or filter; the message lists those that there are.
        ImportFormatError: a file is missing, broken, a pickle, or not of this format; the message
            names the line.
        OptionError: `limit` or `prompts_per_batch` is below 1.
    """
    _check(format, limit=limit, prompts_per_batch=prompts_per_batch)
    paths = _expand(files, FORMATS[format])
    report = ImportReport(format, files=[str(path) for path in paths])
    by_id = {prompt.id: prompt for prompt in prompts}
    options = ImportOptions(
        reward_key, filter_name, all_turns, by_id, template, OnBadRow(on_bad_row)
    )
    resolver = Resolver(
        tokenizer,
        report,
        prompts=by_id,
        template=template,
        chat_template_kwargs=chat_template_kwargs,
    )
    drafts = FORMATS[format].read(paths, options, report)
    own = {"source": format, "tokenizer_fingerprint": tokenizer_fingerprint}
    found = list(itertools.islice(_resolved(drafts, resolver, own, options, report), limit))
    found = _identify(found, format, options, report)
    found = _fitting(found, options, report)
    if not found:
        raise _nothing_found(report)
    for one in found:
        report.add(one.facts)
    rows = [one.row for one in found]
    _assign_batches(rows, prompts_per_batch)
    report.without_reward = sum(row.get("reward") is None for row in rows)
    return _table(rows), report


class _Found(NamedTuple):
    """A rollout on its way into the table."""

    where: str
    row: dict[str, Any]
    facts: Mapping[str, int]
    """What it adds to the report's counts."""


def _resolved(
    drafts: Iterator[Draft],
    resolver: Resolver,
    own: Mapping[str, Any],
    options: ImportOptions,
    report: ImportReport,
) -> Iterator[_Found]:
    for draft in drafts:
        try:
            row, facts = resolver.resolve(draft)
            row = dict(own) | row
            _check_fingerprint(row, own["tokenizer_fingerprint"], draft.where)
        except InputError as problem:
            handle_bad_row(problem, options, report)
            continue
        yield _Found(draft.where, row, facts)


def _expand(files: Sequence[str | Path], format: Format) -> list[Path]:
    paths: list[Path] = []
    for path in map(Path, files):
        folder = is_folder(path, error=ImportFormatError)
        found = _files_below(path, format.pattern) if folder else [path]
        if not found:
            raise ImportFormatError(f"{path}: the folder has no file {format.pattern}")
        paths += found
    for path in paths:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise ImportFormatError(
                f"{path}: a pickle can run any code when it is opened, so it is never read; convert"
                " it where verl is installed, with the script VERL_CONVERTER of"
                " tip_analysis.rollouts.importers.formats, and import what that writes as native"
            )
        check_file(path, error=ImportFormatError, also=_own_suffixes(format.pattern))
    return paths


def _own_suffixes(pattern: str) -> tuple[str, ...]:
    """Extensions that only this format has: a file of JSON is no rows in any other."""
    return (".json",) if pattern.endswith(".json") else ()


def _files_below(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern at any depth, in natural order; where the pattern takes any name, those
    that can be read."""
    known = (*JSONL_SUFFIXES, *PARQUET_SUFFIXES, *PICKLE_SUFFIXES, *_own_suffixes(pattern))
    found = [
        path
        for path in folder.rglob(pattern)
        if path.is_file() and path.suffix.lower() in known and not path.name.startswith(".")
    ]
    return sorted(found, key=lambda path: [_by_numbers(part) for part in path.parts])


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]


def _check_fingerprint(row: Mapping[str, Any], expected: str, where: str) -> None:
    if row["tokenizer_fingerprint"] != expected:
        raise ImportFormatError(
            f"{where}: the ids belong to the tokenizer {row['tokenizer_fingerprint']}, the"
            f" student's is {expected}; is --student the model that wrote these rollouts?"
        )


def _identify(
    found: Sequence[_Found], format: str, options: ImportOptions, report: ImportReport
) -> list[_Found]:
    """Give each row its prompt_id (one for each distinct prompt), sample_index and rollout_id;
    those given are kept."""
    names: dict[tuple[str | None, tuple[int, ...]], str] = {}
    num_prompts: Counter[str] = Counter()
    num_samples: Counter[str] = Counter()
    taken: dict[str, str] = {}
    kept = []
    for one in found:
        row = one.row
        key = row.pop("prompt_key")
        prompt = (key, tuple(row["prompt_token_ids"]))
        if prompt not in names:
            name = key or f"{format}-{len(names)}"
            # one identifier for two prompts (few-shot examples drawn again, say) would mix them
            num_prompts[name] += 1
            is_new = num_prompts[name] == 1 or "prompt_id" in row
            names[prompt] = name if is_new else f"{name}#{num_prompts[name]}"
        row["prompt_id"] = names[prompt]
        row.setdefault("sample_index", num_samples[row["prompt_id"]])
        row.setdefault("rollout_id", f"{row['prompt_id']}/{row['sample_index']}")
        if row["rollout_id"] in taken:
            twice = (
                f"{one.where}: the rollout_id {row['rollout_id']!r} occurs twice (first in"
                f" {taken[row['rollout_id']]})"
            )
            handle_bad_row(ImportFormatError(twice), options, report)
            continue
        num_samples[row["prompt_id"]] += 1
        taken[row["rollout_id"]] = one.where
        kept.append(one)
    return kept


def _fitting(found: Sequence[_Found], options: ImportOptions, report: ImportReport) -> list[_Found]:
    """The rows that keep the contract of the table; each is tried alone only if all are not."""
    if not found or _fault([one.row for one in found]) is None:
        return list(found)
    kept = []
    for one in found:
        if (fault := _fault([one.row])) is None:
            kept.append(one)
        else:
            handle_bad_row(ImportFormatError(f"{one.where}: {fault}"), options, report)
    return kept


def _fault(rows: list[dict[str, Any]]) -> str | None:
    """Why rows do not fit the rollout table; None if they do."""
    try:
        _table([row | {"batch_id": 0} for row in rows])
    except InputError as problem:
        return str(problem).split("\n", maxsplit=1)[0]
    return None


def _assign_batches(rows: list[dict[str, Any]], prompts_per_batch: int) -> None:
    """The optimizer step that a rollout belongs to: its source's, by rank, or so many prompts at a
    time."""
    if all("batch_id" in row for row in rows):
        return
    steps = [int(row["step"]) for row in rows if row.get("step") is not None]
    if len(steps) == len(rows):
        ranks = {step: rank for rank, step in enumerate(sorted(set(steps)))}
        batches = [ranks[step] for step in steps]
    else:
        order = {
            prompt_id: rank
            for rank, prompt_id in enumerate(dict.fromkeys(row["prompt_id"] for row in rows))
        }
        batches = [order[row["prompt_id"]] // prompts_per_batch for row in rows]
    for row, batch_id in zip(rows, batches, strict=True):
        row["batch_id"] = batch_id


def _table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    schema = polars_schema(RolloutTable)
    try:
        frame = pl.DataFrame(
            [{name: row.get(name) for name in schema} for row in rows],
            schema=schema,
            infer_schema_length=None,
        )
    except (pl.exceptions.PolarsError, TypeError, OverflowError) as problem:
        reason = str(problem).split("\n", maxsplit=1)[0]
        raise ImportFormatError(f"the rows do not fit the rollout table: {reason}") from problem
    return validate(frame, RolloutTable)
