"""What a run folder holds, and which commands can come next. Reads `run.json` and the tables' sizes
only."""

from typing import Any

import polars as pl

from tip_analysis.core.record import COMMAND_OF_STAGE, TABLE_OF_STAGE
from tip_analysis.core.run_folder import Run


def stage_table(run: Run) -> pl.DataFrame:
    """One row per stage that was begun: how far it is, how many rows it holds, how long it took."""
    rows = []
    for stage in TABLE_OF_STAGE:
        records = [
            record for key, record in run.stages().items() if key.split("-", maxsplit=1)[0] == stage
        ]
        if records:
            rows.append(_stage_row(stage, records))
    return pl.DataFrame(rows, schema=_STAGE_COLUMNS)


_STAGE_COLUMNS = {
    "stage": pl.String,
    "state": pl.String,
    "configurations": pl.Int64,
    "shards": pl.Int64,
    "rows": pl.Int64,
    "seconds": pl.Float64,
    "finished": pl.String,
    "note": pl.String,
}


def _stage_row(stage: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    finished = [record["finished"] for record in records]
    shards = [shard for record in records for shard in record["shards"].values()]
    return {
        "stage": stage,
        "state": "done" if all(finished) else "unfinished",
        "configurations": len(records),
        "shards": len(shards),
        "rows": sum(shard["num_rows"] for shard in shards),
        "seconds": round(sum(record["wall_time_s"] for record in records), 1),
        "finished": max((time for time in finished if time), default=None),
        "note": _note(records),
    }


def _note(records: list[dict[str, Any]]) -> str | None:
    """What a reader must know of the rows."""
    why = {record["config"].get("approximate") for record in records} - {None}
    return f"approximate: {', '.join(sorted(why))}" if why else None


def next_steps(run: Run) -> list[str]:
    """Commands that make sense now, the most natural first."""
    path = run.path
    done = dict(stage_table(run).select("stage", "state").iter_rows())
    if not run.has("rollouts"):
        return [
            f"tip-analysis rollout {path} --student MODEL --prompts FILE",
            f"tip-analysis import {path} --from FORMAT …",
        ]
    if unfinished := [stage for stage, state in done.items() if state == "unfinished"]:
        commands = dict.fromkeys(COMMAND_OF_STAGE.get(stage, stage) for stage in unfinished)
        return [
            f"run `{command}` again with the same options: it goes on where it stopped"
            for command in commands
        ]
    if not run.has("tokens") and "teacher" in done:
        return [f"tip-analysis score {path} --teacher MODEL --phase student"]
    if not run.has("tokens"):
        return [f"tip-analysis score {path} --teacher MODEL"]
    return [f"tip-analysis report {path} -o reports/{path.name}.html", *_not_done(run)]


def _not_done(run: Run) -> list[str]:
    """Commands for what a scored run does not hold yet."""
    path, steps = run.path, []
    if not run.has("gradients"):
        steps.append(f"tip-analysis gradients {path}")
    if not run.has("masks"):
        steps.append(f"tip-analysis select {path} --rules soft_or q3 --ratios 0.1 0.5")
    if not run.has("ablations"):
        steps.append(f"tip-analysis ablate {path} --rules all soft_or q3 --ratios 0.1 0.5")
    return steps
