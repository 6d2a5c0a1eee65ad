"""Trajectories that DeepPlanning's own runner wrote: `results/MODEL_LANG/trajectories/id_N.json` of
travel, `case_N/messages.json` of shopping.

Tool schemas are not in these files: they are taken from the checkout that a file lies in. Rewards
of travel come from `evaluation/id_N_score.json` beside the trajectories, where it is there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import ImportFormatError
from tip_analysis.core.names import FinishReason
from tip_analysis.rollouts.importers.drafts import Draft, ImportOptions, ImportReport, drafts_of
from tip_analysis.rollouts.prompts import parse_messages, parse_tools
from tip_analysis.rollouts.row_files import Row, field_names, json_value, preview

TRAVEL_SCORE = "composite_score"
"""Which of the evaluation's scores is the reward."""


def read_deepplanning(
    files: Sequence[Path], options: ImportOptions, report: ImportReport
) -> Iterator[Draft]:
    """One rollout for each file of messages; other files of a result are passed over."""
    rows = (_row(path) for path in files if _is_trajectory(path))
    yield from drafts_of(_counted(rows, report), lambda row: [_draft(row, report)], options, report)


def _is_trajectory(path: Path) -> bool:
    return path.parent.name == "trajectories" or path.name == "messages.json"


def _counted(rows: Iterator[Row], report: ImportReport) -> Iterator[Row]:
    for row in rows:
        report.rows_read += 1
        yield row


def _row(path: Path) -> Row:
    value = json_value(path.read_bytes(), str(path), error=ImportFormatError)
    if not isinstance(value, dict):
        raise ImportFormatError(f"{path}: expected an object, found {preview(value)}")
    return Row(str(path), {**value, "_path": path})


def _draft(row: Row, report: ImportReport) -> Draft:
    path: Path = row.values["_path"]
    if "messages" not in row.values:
        raise ImportFormatError(
            f"{row.where}: expected the field messages; found {field_names(row.values)}"
        )
    where = f"{row.where}: messages"
    messages = parse_messages(row.values["messages"], where, error=ImportFormatError)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:]:
        raise ImportFormatError(f"{where}: expected a turn of the assistant after the query")
    first, last = roles.index("assistant"), len(roles) - 1 - roles[::-1].index("assistant")
    kind, key = _task(path, row)
    ended = last == len(roles) - 1 and not messages[last].get("tool_calls")
    return Draft(
        row.where,
        prompt=messages[:first],
        response=messages[first : last + 1],
        tools=_tools(path, kind, report),
        prompt_key=key,
        finish_reason=FinishReason.STOP if ended else FinishReason.GIVEN,
        extras={"environment": "deepplanning", **_reward(path)},
    )


def _task(path: Path, row: Row) -> tuple[str, str]:
    """The name of the schema file without its end, and the task's id as the environment has it."""
    if path.name == "messages.json":
        return "shopping_tool_schema", f"shopping/{path.parent.name.removeprefix('case_')}"
    language = row.values.get("language") or path.parent.parent.name.rpartition("_")[2]
    return f"tool_schema_{language}", f"travel-{language}/{path.stem.removeprefix('id_')}"


def _tools(path: Path, name: str, report: ImportReport) -> Any:
    """The tool schemas of the checkout that a file lies in."""
    for folder in path.resolve().parents:
        schema = folder / "tools" / f"{name}.json"
        if schema.is_file():
            value = json_value(schema.read_bytes(), str(schema), error=ImportFormatError)
            return parse_tools(value, str(schema), error=ImportFormatError)
    report.note(
        f"no tools/{name}.json lies above the files: prompts are rendered without the tools that"
        " they showed; import the files where the benchmark wrote them"
    )
    return None


def _reward(path: Path) -> Mapping[str, Any]:
    """What the benchmark's evaluation says of a travel plan, where it was run."""
    scored = path.parent.parent / "evaluation" / f"{path.stem}_score.json"
    if path.parent.name != "trajectories" or not scored.is_file():
        return {}
    found = json_value(scored.read_bytes(), str(scored), error=ImportFormatError)
    scores = found.get("scores") if isinstance(found, dict) else None
    if not isinstance(scores, dict) or not isinstance(scores.get(TRAVEL_SCORE), int | float):
        raise ImportFormatError(f"{scored}: expected scores with {TRAVEL_SCORE}")
    return {"reward": float(scores[TRAVEL_SCORE]), "reward_parts": json.dumps(scores)}
