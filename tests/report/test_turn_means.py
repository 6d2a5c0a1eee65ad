"""The report's table of means by turn, by part of the turn, and around the first error."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from synthetic import make_tables, write_run

from tip_analysis.analysis.groupings import with_rewards
from tip_analysis.analysis.run_view import ReportOptions, RunView
from tip_analysis.core.run_folder import open_run
from tip_analysis.report.sections.groups import _means_blocks, _shown_groupings


def rows_of(path, tables):
    view = RunView(open_run(write_run(path, tables)), ReportOptions())
    tokens = with_rewards(view.raw, view.run.rollouts())
    (block,) = _means_blocks(view, tokens, _shown_groupings(view, tokens), 5)
    return block.columns, {row[0]: row for row in block.rows}


def test_means_by_turn_and_part(tmp_path):
    tables = make_tables(num_prompts=6, mean_length=25)
    schema, size = tables.tokens.schema, tables.tokens.height
    segments = np.array(["think", "tool_call", "answer"])[np.arange(size) % 3]
    parts = ["argument" if segment == "tool_call" else None for segment in segments]
    tokens = tables.tokens.with_columns(
        segment=pl.Series(segments).cast(schema["segment"]),
        call_part=pl.Series(parts, dtype=schema["call_part"]),
        turn=(pl.col("position") // 15).cast(pl.Int32),
    )
    columns, rows = rows_of(tmp_path / "run", replace(tables, tokens=tokens))
    assert columns[:3] == ["group", "tokens", "entropy (nats)"]
    assert {"M", "φ"} <= set(columns)
    for group, part in {
        "turn: turn 1": tokens.filter(pl.col("turn") == 0),
        "part of the turn: call: argument": tokens.filter(pl.col("segment") == "tool_call"),
        "part of the turn: think": tokens.filter(pl.col("segment") == "think"),
    }.items():
        mean = part["reverse_kl"].cast(pl.Float64).mean()
        assert float(rows[group][4]) == pytest.approx(mean, rel=0.01)
        assert rows[group][1] == str(part.height)
    assert not any(group.startswith("segment:") for group in rows)  # parts say more


def test_a_run_of_single_turns_has_no_table_of_turns(tmp_path):
    _, rows = rows_of(tmp_path / "run", make_tables(num_prompts=6, mean_length=25))
    assert all(group.startswith("before and after the first error") for group in rows)
