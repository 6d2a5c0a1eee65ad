"""Every stage, killed or out of space at file events: the same command goes on to the same end."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from faults.kills import SCENARIOS, UNDISTURBED

from tip_analysis.cli.registry import COMMANDS
from tip_analysis.core.record import TABLE_OF_STAGE

HERE = Path(__file__).parent
SHORT = ("score again", "select", "export")
"""Scenarios of the gate, at a few events."""

KINDS = {
    "kill": "killed before and after file events",
    "fail": "disk full at file events",
    "write": "killed in the middle of a write",
}


def verdicts(folder: Path, kinds: Iterable[str], spacing: int, names) -> list[dict]:
    """What every trial came to."""
    command = [sys.executable, str(HERE / "kills.py"), str(folder), ",".join(kinds), str(spacing)]
    threads = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [*command, *names], env=os.environ | threads, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict], count_check) -> None:
    """Nothing is wrong; each trial counts."""
    wrong = [verdict for verdict in found if verdict["wrong"] is not None]
    assert not wrong, f"{len(wrong)} of {len(found)}: {json.dumps(wrong[:10], indent=1)}"
    for verdict in found:
        count_check(KINDS[verdict["kind"]])


def test_every_command_and_stage_is_disturbed():
    tried = {scenario.command[0] for scenario in SCENARIOS.values()}
    assert tried | UNDISTURBED.keys() == COMMANDS.keys(), "a command without a scenario in kills.py"
    assert not tried & UNDISTURBED.keys()
    filled = {stage for scenario in SCENARIOS.values() for stage in scenario.fills}
    assert filled == TABLE_OF_STAGE.keys(), "a stage without a scenario in kills.py"


def test_some_events(tmp_path, count_check):
    found = verdicts(tmp_path, ["kill"], 40, SHORT)
    assert {verdict["scenario"] for verdict in found} == set(SHORT)
    check(found, count_check)


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_event(tmp_path, name, count_check):
    found = verdicts(tmp_path, KINDS, 1, [name])
    assert {verdict["kind"] for verdict in found} == set(KINDS)
    check(found, count_check)
