"""Run folders from strangers: read, or refused in one line; nothing outside is touched."""

from pathlib import Path

import pytest
from faults.run_folders import record_cases, run_case, shard_cases
from synthetic import make_tables, write_run

SHORT, WHOLE = 40, 2000
"""Mutations in the gate, and in the marked target."""


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A run with two shards of tokens."""
    tables = make_tables(num_prompts=4, rollouts_per_prompt=2, mean_length=8)
    return write_run(tmp_path_factory.mktemp("good") / "run", tables)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_all(cases, good: Path, capfd, tmp_path: Path, count_check) -> None:
    """Each case ends with 0 or 2, says one line at most, and leaves all else alone."""
    outside = tmp_path / "x.parquet"
    outside.write_text("mine")
    before = listing(good)
    statuses = []
    for name, arguments in cases:
        capfd.readouterr()
        status = run_case(arguments)
        said = capfd.readouterr().err.splitlines()
        case = f"{name}: {arguments}: {said}"
        assert status in (0, 2), case
        assert len([line for line in said if not line.startswith("warning")]) <= 1, case
        assert status == 0 or said, case
        statuses.append(status)
        count_check("run.json: mutations" if name.startswith("record") else "shards: mutations")
    assert outside.read_text() == "mine"
    assert listing(good) == before
    assert {0, 2} == set(statuses)


def test_spoiled_records(good, capfd, tmp_path, count_check):
    run_all(record_cases(0, SHORT, good, tmp_path / "a" / "b"), good, capfd, tmp_path, count_check)


def test_spoiled_shards(good, capfd, tmp_path, count_check):
    run_all(shard_cases(0, SHORT, good, tmp_path / "a" / "b"), good, capfd, tmp_path, count_check)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cases", [record_cases, shard_cases])
def test_many_spoiled_run_folders(good, capfd, tmp_path, count_check, cases):
    run_all(cases(1, WHOLE, good, tmp_path / "a" / "b"), good, capfd, tmp_path, count_check)
