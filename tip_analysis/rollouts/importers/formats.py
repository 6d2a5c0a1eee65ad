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

from tip_analysis.core.errors import ImportFormatError, OptionError, UnknownNameError
from tip_analysis.core.schema import RolloutTable, polars_schema, validate
from tip_analysis.rollouts.importers.drafts import Draft, ImportOptions, ImportReport
from tip_analysis.rollouts.importers.evaluation import read_lighteval, read_lm_eval
from tip_analysis.rollouts.importers.given import read_chat, read_native, read_responses, read_text
from tip_analysis.rollouts.importers.resolving import Resolver
from tip_analysis.rollouts.importers.training import VERL_CONVERTER, read_trl, read_verl
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.row_files import PICKLE_SUFFIXES, check_file, is_folder

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
    "trl": Format(read_trl, "*.parquet", "TRL's logged completions, completions_{step}.parquet"),
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
}
"""The formats by name."""


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
) -> tuple[pl.DataFrame, ImportReport]:
    """Read rollouts of another tool into the rollout table.

    Args:
        format: One of `FORMATS`.
        files: Files, or folders whose files of this format are read in the order of the numbers in
            their names.
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

    Returns:
        A valid rollout table in the order of the files, and the account of what could not be
        recovered.

    Raises:
        UnknownNameError: no such format, reward or filter; the message lists those that there are.
        ImportFormatError: a file is missing, broken, a pickle, or not of this format; the message
            names the line.
        OptionError: `limit` or `prompts_per_batch` is below 1.
    """
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    for name, value in (("limit", limit), ("prompts_per_batch", prompts_per_batch)):
        if value is not None and value < 1:
            raise OptionError(f"{name}: expected at least 1, found {value}")
    paths = _expand(files, FORMATS[format])
    report = ImportReport(format, files=[str(path) for path in paths])
    by_id = {prompt.id: prompt for prompt in prompts}
    options = ImportOptions(reward_key, filter_name, all_turns, by_id, template)
    resolver = Resolver(
        tokenizer,
        report,
        prompts=by_id,
        template=template,
        chat_template_kwargs=chat_template_kwargs,
    )
    drafts = itertools.islice(FORMATS[format].read(paths, options, report), limit)
    rows, wheres = [], []
    for draft in drafts:
        rows.append(
            {"source": format, "tokenizer_fingerprint": tokenizer_fingerprint}
            | resolver.resolve(draft)
        )
        _check_fingerprint(rows[-1], tokenizer_fingerprint, draft.where)
        wheres.append(draft.where)
    if not rows:
        raise ImportFormatError(
            f"{', '.join(report.files) or 'no file'}: holds no rollout of the format {format}"
        )
    _identify(rows, wheres, format)
    _assign_batches(rows, prompts_per_batch)
    report.without_reward = sum(row.get("reward") is None for row in rows)
    return _table(rows), report


def _expand(files: Sequence[str | Path], format: Format) -> list[Path]:
    paths: list[Path] = []
    for path in map(Path, files):
        folder = is_folder(path, error=ImportFormatError)
        found = sorted(path.glob(format.pattern), key=_by_numbers) if folder else [path]
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
        check_file(path, error=ImportFormatError)
    return paths


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"([0-9]+)", path.name)
    ]


def _check_fingerprint(row: Mapping[str, Any], expected: str, where: str) -> None:
    if row["tokenizer_fingerprint"] != expected:
        raise ImportFormatError(
            f"{where}: the ids belong to the tokenizer {row['tokenizer_fingerprint']}, the"
            f" student's is {expected}; is --student the model that wrote these rollouts?"
        )


def _identify(rows: list[dict[str, Any]], wheres: Sequence[str], format: str) -> None:
    """Give each row its prompt_id (one for each distinct prompt), sample_index and rollout_id;
    those given are kept."""
    names: dict[tuple[str | None, tuple[int, ...]], str] = {}
    num_prompts: Counter[str] = Counter()
    num_samples: Counter[str] = Counter()
    taken: dict[str, str] = {}
    for row, where in zip(rows, wheres, strict=True):
        key = row.pop("prompt_key")
        prompt = (key, tuple(row["prompt_token_ids"]))
        if prompt not in names:
            name = key or f"{format}-{len(names)}"
            num_prompts[
                name
                # one identifier for two prompts (few-shot examples drawn again, say) would mix them
            ] += 1
            is_new = num_prompts[name] == 1 or "prompt_id" in row
            names[prompt] = name if is_new else f"{name}#{num_prompts[name]}"
        row["prompt_id"] = names[prompt]
        row.setdefault("sample_index", num_samples[row["prompt_id"]])
        num_samples[row["prompt_id"]] += 1
        row.setdefault("rollout_id", f"{row['prompt_id']}/{row['sample_index']}")
        if row["rollout_id"] in taken:
            raise ImportFormatError(
                f"{where}: the rollout_id {row['rollout_id']!r} occurs twice (first in"
                f" {taken[row['rollout_id']]})"
            )
        taken[row["rollout_id"]] = where


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
