"""Where pages and exports may go: never among a run's own files, never in the place of what is none
of ours."""

import os
from pathlib import Path

import pytest
from synthetic import make_tables, write_run

from tip_analysis.analysis.flat_files import export_run
from tip_analysis.analysis.masks import write_masks
from tip_analysis.core.errors import OptionError
from tip_analysis.core.run_folder import open_run
from tip_analysis.report.build import write_report


@pytest.fixture(scope="module")
def tables():
    return make_tables(num_prompts=2, rollouts_per_prompt=2, mean_length=6)


@pytest.fixture
def run(tables, tmp_path) -> Path:
    return write_run(tmp_path / "run", tables)


@pytest.mark.parametrize("place", ["", "tokens", "labels", "x/y"])
def test_an_export_into_another_run_is_refused(run, tables, tmp_path, place):
    other = write_run(tmp_path / "other", tables)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(OptionError, match="lies in the run folder"):
        export_run(open_run(run), other / place, overwrite=True)
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


OWNED = ["run.json", "tokens/part-00000.parquet", "tokens/page.html", ".run.json.lock", "rollouts"]


@pytest.mark.parametrize("name", OWNED)
@pytest.mark.parametrize("which", ["run", "other", "link"])
def test_a_report_in_the_place_of_a_runs_own_file_is_refused(run, tables, tmp_path, name, which):
    write_run(tmp_path / "other", tables)
    (tmp_path / "link").symlink_to(run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OptionError, match="lies among the files of the run folder"):
        write_report(run, tmp_path / which / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_report_replaces_pages_alone(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tip_analysis.report.build.build_report", lambda *_, **__: "<!DOCTYPE html>"
    )
    for name in ("page.html", "run/page.html"):
        write_report(run, tmp_path / name)
        write_report(run, tmp_path / name)
    (tmp_path / "empty").touch()
    write_report(run, tmp_path / "empty")
    (tmp_path / "p.jsonl").write_text('{"problem": "mine"}')
    with pytest.raises(OptionError, match=r"p\.jsonl is no page, and would be lost"):
        write_report(run, tmp_path / "p.jsonl")
    assert (tmp_path / "p.jsonl").read_text() == '{"problem": "mine"}'


def test_an_export_does_not_follow_a_link(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "labels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OptionError, match="labels is a link, which leads elsewhere"):
        export_run(open_run(run), tmp_path / "flat", overwrite=True)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.timeout(60)
def test_pipes_are_not_waited_for(run, tmp_path):
    (run / ".working").mkdir(exist_ok=True)
    (tmp_path / "flat").mkdir()
    pipes = [run / ".working" / "x.lock", tmp_path / "flat" / "export.json"]
    for pipe in [*pipes, tmp_path / "flat" / "README.md"]:
        os.mkfifo(pipe)
    write_masks(open_run(run), rules=["entropy"], retention_ratios=[0.35])
    assert export_run(open_run(run), tmp_path / "flat", overwrite=True)
