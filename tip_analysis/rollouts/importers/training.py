"""Rollouts that training libraries write down: verl's dumps and TRL's logged completions.

Both decode with special tokens skipped: chat markers, end-of-sequence tokens and the cut of a
truncated response are gone.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import polars as pl

from tip_analysis.core.errors import ImportFormatError
from tip_analysis.rollouts.importers.drafts import (
    Draft,
    ImportOptions,
    ImportReport,
    TurnEnd,
    drafts_of,
    field_of,
    integer,
    pick_reward,
    rows_of,
    text_or_messages,
    text_or_none,
)
from tip_analysis.rollouts.prompts import parse_tools
from tip_analysis.rollouts.row_files import PARQUET_SUFFIXES, Row, check_file

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
MIN_FREE_ADVANTAGES = 6
"""Advantages, less one for each prompt, that must agree before a column is known for the reward."""
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

    def on_partial_line() -> None:
        report.partial_lines += 1

    rows = rows_of(files, options, report, on_partial_line=on_partial_line)
    yield from drafts_of(rows, lambda row: [_verl_draft(row, options, report)], options, report)


def _verl_draft(row: Row, options: ImportOptions, report: ImportReport) -> Draft:
    output = field_of(row, "output")
    if marker := next((marker for marker in _TOOL_MARKERS if marker in output), None):
        raise ImportFormatError(
            f"{row.where}: `output` holds the text of a tool ({marker}), and the dump does not say"
            " which tokens the student wrote; convert verl's RolloutSkip dump instead"
            " (VERL_CONVERTER in tip_analysis.rollouts.importers.formats)"
        )
    scores = {name: value for name, value in row.values.items() if name not in _VERL_KEYS}
    truth, uid = row.values.get("gts"), row.values.get("uid")
    named = {"rollout_id": uid} if isinstance(uid, str) and uid else {}  # newer versions' own name
    return Draft(
        row.where,
        prompt=field_of(row, "input"),
        response=output,
        specials_skipped=True,
        extras={
            **named,
            "step": integer(row.values.get("step"), f"{row.where}: step"),
            "reward": pick_reward(scores, row, options, report, preferred=("score",)),
            # verl writes null as text where it does so with numbers
            "ground_truth": None if truth == "None" else text_or_none(truth),
        },
    )


def read_trl(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """TRL's `completions_{step}.parquet`: `step`, `prompt`, `completion`, a column per reward
    function, columns of `log_extra`, `advantage`.

    Completions are the trainer's decoded text: neither they nor the log say whether a completion
    ended or was cut off, so the end-of-turn token that a chat template would add is left out.
    """
    report.note(
        "TRL: an evaluation writes over the file of a training step of the same number; such files"
        " are not told apart"
    )
    for path in files:
        check_file(path, error=ImportFormatError)
        names = reward_columns(path, report)
        rows = rows_of([path], options, report)
        yield from drafts_of(
            rows, partial(_trl_drafts, names=names, options=options, report=report), options, report
        )


def _trl_drafts(
    row: Row, *, names: Sequence[str], options: ImportOptions, report: ImportReport
) -> list[Draft]:
    prompt, completion = (
        text_or_messages(field_of(row, name, (str, list)), f"{row.where}: {name}")
        for name in ("prompt", "completion")
    )
    rewards = {name: row.values.get(name) for name in names}
    return [
        Draft(
            row.where,
            prompt=prompt,
            response=completion,
            specials_skipped=True,
            tools=parse_tools(
                row.values.get("tools"), f"{row.where}: tools", error=ImportFormatError
            ),
            turn_end=TurnEnd.OPEN,
            extras={
                "step": integer(row.values.get("step"), f"{row.where}: step"),
                "reward": pick_reward(rewards, row, options, report),
            },
        )
    ]


def reward_columns(path: Path, report: ImportReport) -> list[str]:
    """Columns of TRL's log that may be rewards.

    Reward functions give numbers with a decimal point, and stand before what they log besides
    (`log_extra`) and the advantage. Where the advantages of every prompt follow the first such
    column alone, it is the only reward and the others were logged.
    """
    if path.suffix.lower() not in PARQUET_SUFFIXES:
        return []
    try:
        columns = pl.read_parquet_schema(path)
    except (pl.exceptions.PolarsError, OSError):
        return []  # the reader says what is wrong with the file
    names = [
        name
        for name, dtype in columns.items()
        if name not in _TRL_KEYS and (dtype.is_float() or dtype == pl.Null or dtype == pl.Boolean)
    ]
    if len(names) < 2 or not {"advantage", "prompt", "step"} <= columns.keys():
        return names
    frame = pl.read_parquet(path, columns=["prompt", "step", "advantage", names[0]])
    if not _follows(frame, names[0]):
        return names
    report.note(
        f"TRL: the reward is {names[0]!r}, which the advantages follow alone; not taken for rewards"
        f" (log_extra): {', '.join(names[1:])}"
    )
    return names[:1]


def _follows(frame: pl.DataFrame, name: str) -> bool:
    """Whether, within each step and prompt, the advantages are one positive multiple of a column's
    distance from its mean."""
    if not frame.schema[name].is_float() or not frame.schema["advantage"].is_float():
        return False
    frame = frame.select(
        group=pl.struct(pl.col("step"), pl.col("prompt")).hash(), x=name, y="advantage"
    ).filter(pl.col("x").is_finite() & pl.col("y").is_finite())
    centred = frame.with_columns(pl.col("x", "y") - pl.col("x", "y").mean().over("group"))
    sums = centred.group_by("group").agg(
        free=pl.len() - 1,
        xx=(pl.col("x") ** 2).sum(),
        yy=(pl.col("y") ** 2).sum(),
        xy=(pl.col("x") * pl.col("y")).sum(),
    )
    varied = sums.filter((pl.col("xx") > 1e-12) | (pl.col("yy") > 1e-12))
    fits = varied.select(
        (pl.col("xy") > 0.999 * (pl.col("xx") * pl.col("yy")).sqrt()) & (pl.col("xy") > 0)
    ).to_series()
    return varied["free"].sum() >= MIN_FREE_ADVANTAGES and bool(fits.all())
