"""Rollouts that training libraries write down: verl's dumps and TRL's logged completions.

Both decode with special tokens skipped: chat markers, end-of-sequence tokens and the cut of a
truncated response are gone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tip_analysis.core.errors import ImportFormatError
from tip_analysis.rollouts.importers.drafts import (
    Draft,
    ImportOptions,
    ImportReport,
    field_of,
    integer,
    pick_reward,
    text_or_none,
)
from tip_analysis.rollouts.prompts import parse_messages
from tip_analysis.rollouts.row_files import read_rows

VERL_CONVERTER = '''\
"""Converts verl's RolloutSkip dumps, exact token ids and all.

python convert.py gen_batch.dp rollouts.jsonl

Run it where verl is installed. It opens a pickle, which can run any code: use it on your own files
only.
"""
import json
import sys

import torch
from verl import DataProto

source, target = sys.argv[1:]
if source.endswith(".dp"):
    batch = DataProto.load_from_disk(source).batch
else:
    batch = torch.load(source, weights_only=False)
keys, width = set(batch.keys()), batch["prompts"].shape[1]
with open(target, "w") as file:
    for i in range(len(batch["prompts"])):
        seen = batch["attention_mask"][i].bool()
        kept = seen[width:]
        row = {"prompt_token_ids": batch["prompts"][i][seen[:width]].tolist()}
        row["response_token_ids"] = batch["responses"][i][kept].tolist()
        if "response_mask" in keys:
            row["loss_mask"] = batch["response_mask"][i][kept].bool().tolist()
        if "rm_scores" in keys:
            row["reward"] = float(batch["rm_scores"][i].sum())
        file.write(json.dumps(row) + "\\n")
'''
"""A script for the user's own verl environment; what it writes is imported as `native`."""

_TOOL_MARKERS = (
    "<tool_response>",
    "</tool_response>",
    "<|tool_response",
    "[TOOL_RESULTS]",
    "<tool_results>",
)
_VERL_KEYS = ("input", "output", "gts", "step", "uid")
_TRL_KEYS = ("step", "prompt", "completion", "advantage")


def read_verl(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """verl's `{step}.jsonl` (rollout_data_dir, validation_data_dir): `input`, `output`, `gts`,
    `score`, `step`, extras.

    Raises:
        ImportFormatError: a field is missing, or a response holds the text of a tool: the dump does
            not say which tokens the student wrote.
    """
    for path in files:
        for row in read_rows(
            path, error=ImportFormatError, on_partial_line=lambda: _count_partial(report)
        ):
            report.rows_read += 1
            output = field_of(row, "output")
            if marker := next((marker for marker in _TOOL_MARKERS if marker in output), None):
                raise ImportFormatError(
                    f"{row.where}: `output` holds the text of a tool ({marker}), and the dump does"
                    " not say which tokens the student wrote; convert verl's RolloutSkip dump"
                    " instead (VERL_CONVERTER in tip_analysis.rollouts.importers.formats)"
                )
            scores = {name: value for name, value in row.values.items() if name not in _VERL_KEYS}
            yield Draft(
                row.where,
                prompt=field_of(row, "input"),
                response=output,
                specials_skipped=True,
                extras={
                    "step": integer(row.values.get("step"), f"{row.where}: step"),
                    "reward": pick_reward(scores, row, options, report, preferred=("score",)),
                    "ground_truth": text_or_none(row.values.get("gts")),
                },
            )


def _count_partial(report: ImportReport) -> None:
    report.partial_lines += 1


def read_trl(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """TRL's `completions_{step}.parquet`: `step`, `prompt`, `completion`, a column per reward
    function, `advantage`."""
    report.note(
        "TRL: an evaluation writes over the file of a training step of the same number; such files"
        " are not told apart"
    )
    for path in files:
        for row in read_rows(path, error=ImportFormatError):
            report.rows_read += 1
            rewards = {
                name: value
                for name, value in row.values.items()
                if name not in _TRL_KEYS and isinstance(value, int | float)
            }
            prompt, completion = (
                field_of(row, name, (str, list)) for name in ("prompt", "completion")
            )
            yield Draft(
                row.where,
                prompt=(
                    prompt if isinstance(prompt, str) else _messages(prompt, f"{row.where}: prompt")
                ),
                response=(
                    completion
                    if isinstance(completion, str)
                    else _messages(completion, f"{row.where}: completion")
                ),
                specials_skipped=True,
                extras={
                    "step": integer(row.values.get("step"), f"{row.where}: step"),
                    "reward": pick_reward(rewards, row, options, report),
                },
            )


def _messages(value: list, where: str):
    return parse_messages(value, where, error=ImportFormatError)
