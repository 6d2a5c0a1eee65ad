"""Every stage, killed or out of space at file events: the same command goes on to the same end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.kills import SCENARIOS

HERE = Path(__file__).parent
SHORT = ("score again", "select", "export")
"""Scenarios of the gate, at a few events."""

KINDS = {
    "kill": "killed before and after file events",
    "fail": "disk full at file events",
    "write": "killed in the middle of a write",
}


def verdicts(folder: Path, kind: str, spacing: int, names) -> list[dict]:
    """What every trial came to."""
    command = [sys.executable, str(HERE / "kills.py"), str(folder), kind, str(spacing), *names]
    threads = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        command, env=os.environ | threads, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict]) -> None:
    wrong = [verdict for verdict in found if verdict["wrong"] is not None]
    assert not wrong, f"{len(wrong)} of {len(found)}: {json.dumps(wrong[:10], indent=1)}"


@pytest.mark.parametrize("kind", ["kill"])
def test_some_events(tmp_path, kind, count_check):
    found = verdicts(tmp_path, kind, 40, SHORT)
    assert {verdict["scenario"] for verdict in found} == set(SHORT)
    check(found)
    count_check(KINDS[kind], len(found))


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["kill", "fail", "write"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_event(tmp_path, name, kind, count_check):
    found = verdicts(tmp_path, kind, 1, [name])
    assert len(found) >= 5
    check(found)
    count_check(KINDS[kind], len(found))
