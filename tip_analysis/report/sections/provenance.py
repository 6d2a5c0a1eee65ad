"""The section on provenance: every stage of `run.json`, and the exact commands."""

import json
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.text import visible
from tip_analysis.core.words import count, duration, listed, number, sentence
from tip_analysis.report.page import Block, Command, Part, Section, Table
from tip_analysis.report.sections.overview import label_of

MAX_SHARDS = 4
"""Shards whose hash is shown."""
MAX_RECORDS = 60
"""Records of one stage that are listed."""


def provenance(views: Sequence[RunView], output: str) -> Section:
    """Every stage of `run.json`: configuration, versions, fingerprints, time, rate and commands."""
    parts = [
        Part(
            _provenance_finding(view),
            _provenance_blocks(view),
            run=label_of(view, views),
            folded="Show stages, commands, settings and versions",
        )
        for view in views
    ]
    parts.append(Part("", [Command("This page is made by", command_of(views, output))]))
    return Section(
        "provenance",
        "Provenance",
        parts,
        shows="what each table was made from and with, as recorded when it was written.",
        shows_not="anything that was done to the models or the prompts before.",
    )


def _provenance_finding(view: RunView) -> str:
    kinds = _kinds(view)
    finished = [
        kind if len(stages) == 1 else f"{kind} ({len(stages)} times)"
        for kind, stages in kinds.items()
        if all(stage.get("finished") for stage in stages.values())
    ]
    seconds = sum(time_taken(stages.values()) for stages in kinds.values())
    return sentence(f"{listed(finished) or 'no stage'} finished, in {duration(seconds)} in all")


def time_taken(stages: Iterable[dict[str, Any]]) -> float:
    """Seconds that stages took together: what they recorded, but no more than the clock ran, since
    losses that are measured together each record the whole time."""
    stages = list(stages)
    recorded = sum(stage.get("wall_time_s") or 0.0 for stage in stages)
    if not all(stage.get("began") and stage.get("finished") for stage in stages):
        return recorded
    clock, until = 0.0, datetime.min.replace(tzinfo=UTC)
    for began, finished in sorted((stage["began"], stage["finished"]) for stage in stages):
        start, end = (datetime.fromisoformat(text) for text in (began, finished))
        end += timedelta(seconds=1)  # times are recorded in whole seconds
        clock += max(0.0, (end - max(start, until)).total_seconds())
        until = max(until, end)
    return min(recorded, clock)


def _provenance_blocks(view: RunView) -> list[Block]:
    blocks: list[Block] = [_stage_table(view)]
    for kind, stages in _kinds(view).items():
        commands = dict.fromkeys(_environment(stage).get("command") for stage in stages.values())
        blocks += [
            Command(f"{kind} was run with", visible(command, 2000))
            for command in commands
            if command
        ]
        entries = {key: _entries(stage) for key, stage in stages.items()}
        first = next(iter(entries.values()))
        same = {
            name: value
            for name, value in first.items()
            if all(each.get(name) == value for each in entries.values())
        }
        blocks.append(
            _settings(
                same,
                (
                    f"{kind}: as recorded."
                    if len(stages) == 1
                    else f"{kind}: what all {len(stages)} share."
                ),
            )
        )
        if len(stages) > 1:
            blocks.append(_differing(kind, entries, same))
    return blocks


def _kinds(view: RunView) -> dict[str, dict[str, Any]]:
    """Stages by kind: those that are kept once for each configuration together."""
    kinds: dict[str, dict[str, Any]] = {}
    for key, stage in view.stages.items():
        kinds.setdefault(key.split("-", maxsplit=1)[0], {})[key] = stage
    return kinds


def _stage_table(view: RunView) -> Table:
    rows = []
    for kind, stages in _kinds(view).items():
        seconds = time_taken(stages.values())
        tokens = sum(stage.get("summary", {}).get("num_tokens") or 0 for stage in stages.values())
        unfinished = [key for key, stage in stages.items() if not stage.get("finished")]
        last = max((stage.get("finished") or "" for stage in stages.values()), default="")
        rows.append(
            [
                kind,
                count(len(stages)),
                _time(min(stage.get("began") or "" for stage in stages.values())),
                f"{len(unfinished)} not finished" if unfinished else _time(last),
                duration(seconds),
                number(tokens / seconds) if seconds and tokens else "–",
                count(sum(len(stage.get("shards", {})) for stage in stages.values())),
            ]
        )
    columns = ["stage", "records", "began (UTC)", "finished", "time", "tokens/s", "shards"]
    return Table(columns, rows, "Stages of this run.", frozenset({1, 4, 5, 6}))


def _environment(stage: dict[str, Any]) -> dict[str, Any]:
    return stage.get("environment") or {}


def _entries(stage: dict[str, Any]) -> dict[str, Any]:
    """All that is on record of a stage, but for times and its command."""
    entries = {}
    for part in ("config", "inputs", "settings", "summary"):
        entries |= stage.get(part) or {}
    entries["versions"] = _environment(stage).get("versions", {})
    entries["git commit"] = _environment(stage).get("git_commit")
    shards = stage.get("shards", {})
    hashes = {name: shard["sha256"][:12] for name, shard in list(shards.items())[:MAX_SHARDS]}
    entries["shards"] = hashes | (
        {"…": f"{len(shards) - MAX_SHARDS} more"} if len(shards) > MAX_SHARDS else {}
    )
    return entries


def _settings(entries: dict[str, Any], caption: str) -> Table:
    rows = [[visible(name, 80), _plain(value)] for name, value in entries.items()]
    return Table(["setting", "value"], rows, caption, dense=True)


def _differing(kind: str, entries: dict[str, dict[str, Any]], same: dict[str, Any]) -> Table:
    names = list(
        dict.fromkeys(
            name
            for each in entries.values()
            for name in each
            if name not in same and name != "shards"
        )
    )
    rows = [
        [key, *(_plain(each.get(name)) for name in names)]
        for key, each in list(entries.items())[:MAX_RECORDS]
    ]
    rest = (
        "" if len(entries) <= MAX_RECORDS else f" {len(entries) - MAX_RECORDS} more are left out."
    )
    return Table(["record", *names], rows, f"{kind}: what differs.{rest}", dense=True)


def command_of(views: Sequence[RunView], output: str) -> str:
    """The command that makes this page."""
    paths = " ".join(shlex.quote(str(view.run.path)) for view in views)
    return (
        f"python -m tip_analysis.report {paths} -o {shlex.quote(output)}"
        f" {views[0].options.arguments()}"
    )


def _time(stamp: str | None) -> str:
    """2026-01-31 12:00:00, from an ISO time."""
    return "–" if not stamp else stamp[:19].replace("T", " ")


def _plain(value: Any) -> str:
    if value in (None, "", {}, []):
        return "–"
    if isinstance(value, dict):
        return "; ".join(f"{visible(str(key), 80)}: {_plain(part)}" for key, part in value.items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return visible(text, 400)
