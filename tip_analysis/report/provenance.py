"""The section on provenance: every stage of `run.json`, and the exact commands."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from tip_analysis.report.overview import label_of
from tip_analysis.report.page import Block, Command, Part, Section, Table
from tip_analysis.report.reading import RunView
from tip_analysis.report.words import count, duration, listed, number, visible


def provenance(views: Sequence[RunView], output: str) -> Section:
    """Every stage of `run.json`: configuration, versions, fingerprints, time, rate and commands."""
    parts = [Part(_provenance_finding(view), _provenance_blocks(view), run=label_of(view, views)) for view in views]
    parts.append(Part("", [Command("This page is made by", command_of(views, output))]))
    return Section(
        "provenance",
        "Provenance",
        parts,
        shows="what each table was made from and with, as recorded when it was written.",
        shows_not="anything that was done to the models or the prompts before.",
    )


def _provenance_finding(view: RunView) -> str:
    finished = [key for key, stage in view.stages.items() if stage.get("finished")]
    seconds = sum(stage.get("wall_time_s") or 0.0 for stage in view.stages.values())
    return f"{listed(finished) or 'No stage'} finished, in {duration(seconds)} in all."


def _provenance_blocks(view: RunView) -> list[Block]:
    rows = []
    for key, stage in view.stages.items():
        rate = stage.get("summary", {}).get("tokens_per_second")
        rows.append([
            key, _time(stage.get("began")), _time(stage.get("finished") or "not finished"), duration(stage.get("wall_time_s")),
            number(rate) if rate else "–", count(len(stage.get("shards", {}))),
        ])  # fmt: skip
    columns = ["stage", "began (UTC)", "finished", "time", "tokens/s", "shards"]
    blocks: list[Block] = [Table(columns, rows, "Stages of this run.", frozenset({3, 4, 5}))]
    for key, stage in view.stages.items():
        entries = {
            **stage.get("config", {}),
            **stage.get("inputs", {}),
            **stage.get("settings", {}),
            **stage.get("summary", {}),
        }
        versions = stage.get("environment", {}).get("versions", {})
        entries["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        entries["git commit"] = stage.get("environment", {}).get("git_commit")
        entries["shards"] = {name: shard["sha256"][:12] for name, shard in list(stage.get("shards", {}).items())[:4]}
        blocks.append(
            Table(["setting", "value"], [[name, _plain(value)] for name, value in entries.items()], f"{key}: as recorded.")
        )
    return blocks


def command_of(views: Sequence[RunView], output: str) -> str:
    """The command that makes this page."""
    paths = " ".join(shlex.quote(str(view.run.path)) for view in views)
    return f"python -m tip_analysis.report {paths} -o {shlex.quote(output)} {views[0].options.arguments()}"


def _time(stamp: str | None) -> str:
    """2026-01-31 12:00:00, from an ISO time."""
    return "–" if stamp is None else stamp[:19].replace("T", " ")


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return visible(text, 400)
