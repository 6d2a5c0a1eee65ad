"""Every command meets the same strangers: the list is the command line's own, so that a new command
without a row here fails."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from faults.run_folders import run_case
from synthetic import make_tables, write_run

from tip_analysis.cli.registry import COMMANDS

STUDENT, TEACHER = ("--student", "arithmetic-student"), ("--teacher", "arithmetic-teacher")
ARGUMENTS = {
    "demo": ["--out", "RUN"],
    "rollout": ["RUN", *STUDENT, "--prompts", "PROMPTS"],
    "import": ["RUN", "--from", "text", "--files", "PROMPTS", *STUDENT],
    "score": ["RUN", *TEACHER],
    "gradients": ["RUN"],
    "select": ["RUN", "--rules", "q3"],
    "screen": ["RUN"],
    "rank-rules": ["RUN"],
    "influence": ["RUN"],
    "intervene": ["RUN"],
    "track": ["RUN", "--arm", "q3:0.1"],
    "claims": ["PROMPTS"],
    "ablate": ["RUN", "--preset", "arithmetic", "--dry-run"],
    "evaluate": ["RUN", "--model", "arithmetic-student", "--prompts", "PROMPTS"],
    "compare": ["RUN", "RUN"],
    "status": ["RUN"],
    "export": ["RUN", "--to", "OUT"],
    "report": ["RUN", "-o", "OUT.html"],
}
"""What each command takes; nothing in it is wrong."""
OF_A_RUN = [name for name, arguments in ARGUMENTS.items() if "RUN" in arguments]


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", make_tables(num_prompts=2, mean_length=6))


def typed(command: str, run: Path, folder: Path) -> list[str]:
    prompts = folder / "p.jsonl"
    prompts.write_text(json.dumps({"problem": "1+1=", "response": "2", "answer": "2"}))
    places = {"RUN": run, "PROMPTS": prompts, "OUT": folder / "out", "OUT.html": folder / "o.html"}
    return [command, *(str(places.get(argument, argument)) for argument in ARGUMENTS[command])]


def test_every_command_has_a_row():
    assert ARGUMENTS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", OF_A_RUN)
def test_verify_refuses_altered_shards(command, run, tmp_path, monkeypatch, capfd, count_check):
    monkeypatch.setattr("tip_analysis.core.run_folder.CHEAP_BYTES", 0)
    (shard,) = (run / "tokens").glob("*.parquet")
    frame = pl.read_parquet(shard, glob=False)
    frame.with_columns(token=pl.lit("changed")).write_parquet(shard)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status = run_case([*typed(command, run, tmp_path), "--verify"])
    said = capfd.readouterr()
    if command == "status":  # lists them
        assert (status, "altered or missing: tokens/" in said.out) == (0, True)
    else:
        (line,) = said.err.splitlines()
        assert status == 2
        assert line.startswith(f"error: {shard}")
        assert "was altered since it was written" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    count_check("commands: altered shards under --verify")


@pytest.mark.parametrize("command", OF_A_RUN)
@pytest.mark.parametrize("place", ["run.json", "run.json/x"])
def test_a_run_that_is_a_file_is_one_line(command, place, run, tmp_path, capfd, count_check):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, said = run_case(typed(command, run / place, tmp_path)), capfd.readouterr().err
    if command == "ablate":  # only plans
        assert (status, said) == (0, "")
    else:
        (line,) = said.splitlines()
        assert status == 2
        assert line.startswith("error: ")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    count_check("commands: runs that are files")


LOAD_MODELS = ("demo", "gradients", "influence", "intervene", "track")
"""Commands that need the models of the run, which are none here, or minutes."""
SURROUNDINGS = {
    "stdout closed": ("", ">&-"),
    "stderr closed": ("", "2>&-"),
    "all closed": ("", "<&- >&- 2>&-"),
    "stdout full": ("", ">/dev/full"),
    "stderr full": ("", "2>/dev/full"),
    "no reader": ("", "| true"),
    "ASCII": ("LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", ""),
    "no home": ("env -u HOME", ""),
    "no folder for temporary files": ("TMPDIR=/nowhere", ""),
}


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("command", [name for name in OF_A_RUN if name not in LOAD_MODELS])
def test_commands_in_odd_surroundings(command, surroundings, run, tmp_path, count_check):
    before, after = SURROUNDINGS[surroundings]
    if command in ("rollout", "import", "evaluate"):
        run = tmp_path / "new"
    arguments = typed(command, run, tmp_path)
    if command in ("rollout", "evaluate"):
        arguments += ["--max-new-tokens", "2"]
    line = f"{before} {shlex.join([sys.executable, '-m', 'tip_analysis', *arguments])} {after}"
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", line],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 2, 141), done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
    assert len(said) <= 1
    assert "Traceback" not in done.stdout + done.stderr
    if surroundings in ("ASCII", "no home", "no folder for temporary files", "stderr closed"):
        assert done.returncode == 0 or command == "score", said  # whose student is none
    count_check("commands: odd surroundings")
