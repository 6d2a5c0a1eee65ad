"""What a run folder holds, and which commands can come next. Reads `run.json` and the tables' sizes
only.

Commands come from the record where it holds them. A record may come from anywhere, so a command of
it is shown only if it is one of ours, about this very run, with each of its words quoted.
"""

import shlex
from pathlib import Path
from typing import Any

import polars as pl

from tip_analysis.core.record import COMMAND_OF_STAGE, TABLE_OF_STAGE, stage_of
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
    path = shlex.quote(str(run.path))
    done = dict(stage_table(run).select("stage", "state").iter_rows())
    if not run.has("rollouts"):
        return [
            f"tip-analysis rollout {path} --student MODEL --prompts FILE",
            f"tip-analysis import {path} --from FORMAT …",
        ]
    if unfinished := [stage for stage, state in done.items() if state == "unfinished"]:
        return list(dict.fromkeys(_go_on(run, stage) for stage in unfinished))
    if not run.has("tokens") and "teacher" in done:
        return [f"tip-analysis score {path} --teacher MODEL --phase student"]
    if not run.has("tokens"):
        return [f"tip-analysis score {path} --teacher MODEL"]
    report = shlex.quote(f"reports/{run.path.name}.html")
    return [f"tip-analysis report {path} -o {report}", *_not_done(run)]


def _go_on(run: Run, stage: str) -> str:
    """How an unfinished stage is finished: by its own command, where the record has it."""
    records = [record for key, record in run.stages().items() if stage_of(key) == stage]
    for record in records:
        if not record["finished"] and (command := _own_command(run, record)):
            return command
    command = COMMAND_OF_STAGE.get(stage, stage)
    return f"run `{command}` again with the same options: it goes on where it stopped"


def _own_command(run: Run, record: dict[str, Any]) -> str | None:
    """The recorded command line, if it is one of this package's that names this run."""
    try:
        words = shlex.split(record["environment"].get("command") or "")
    except ValueError:  # an unbalanced quote
        return None
    for start in (["tip-analysis"], ["python", "-m", "tip_analysis"]):
        rest = words[len(start) :]
        if words[: len(start)] == start and any(_is_run(run, word) for word in rest):
            return shlex.join(["tip-analysis", *(w for w in rest if w != "--overwrite")])
    return None


def _is_run(run: Run, word: str) -> bool:
    try:
        return Path(word).is_dir() and Path(word).samefile(run.path)
    except (OSError, ValueError):
        return False


def advice(run: Run) -> list[str]:
    """What the record says that a user can act on: rollouts that were cut off."""
    rollouts = run.stages().get("rollout")
    return [] if rollouts is None else _truncation(rollouts)


SERIOUS_TRUNCATION = 0.1
"""The share of rollouts that may end by their length before `status` says so."""


def _truncation(record: dict[str, Any]) -> list[str]:
    summary, limit = record["summary"], record["config"].get("max_new_tokens")
    reasons = summary.get("finish_reasons")
    if not isinstance(reasons, dict) or not isinstance(limit, int):
        return []
    cut, total = reasons.get("length", 0), sum(reasons.values())
    if not total or cut / total <= SERIOUS_TRUNCATION:
        return []
    words = (
        f"{cut:,} of {total:,} rollouts hit --max-new-tokens {limit:,}: their answers are missing, "
        f"and so are their rewards; `rollout` again with --max-new-tokens {2 * limit} --overwrite"
    )
    return [words]


def _not_done(run: Run) -> list[str]:
    """Commands for what a scored run does not hold yet."""
    path, steps = shlex.quote(str(run.path)), []
    if not run.has("gradients"):
        steps.append(f"tip-analysis gradients {path}{_limit(run)}")
    if not run.has("masks"):
        steps.append(f"tip-analysis select {path} --rules soft_or q3 --ratios 0.1 0.5")
    if not run.has("ablations"):
        steps.append(f"tip-analysis ablate {path} --rules all soft_or q3 --ratios 0.1 0.5")
    return steps


GRADIENTS_PER_SCORE = 40
"""What measuring a rollout's gradients with 32 probes costs, in scorings of it (about 20 on the
arithmetic pair, where a scoring has fixed costs; 32 forward-mode passes and two backward ones)."""
PATIENCE_S = 600.0
"""How long a suggested measurement of gradients should take at most."""


def _limit(run: Run) -> str:
    """`--limit N`: as many rollouts as are measured within ten minutes at the pace of scoring; at
    least 8, and nothing where all of them are."""
    rollouts, score = run.stages().get("rollout"), run.stages().get("score")
    total = rollouts["summary"].get("num_rollouts") if rollouts else None
    if score is None or not isinstance(total, int) or total < 1 or not score["wall_time_s"]:
        return ""
    seconds = score["wall_time_s"] / total * GRADIENTS_PER_SCORE
    fits = max(8, int(PATIENCE_S / seconds))
    return "" if fits >= total else f" --limit {fits}"
