"""The section on training over steps, and several ablations side by side."""

from pathlib import Path

import pytest
from synthetic import (
    make_ablations,
    make_dynamics,
    make_tables,
    write_ablations,
    write_dynamics,
    write_run,
)

from tip_analysis.report.build import build_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = write_run(tmp_path / "run", make_tables(num_prompts=4))
    arms = make_ablations()
    write_ablations(path, arms)
    write_dynamics(path, make_dynamics(arms))
    return path


def test_training_over_steps_has_a_section_with_a_row_for_each_arm(run: Path) -> None:
    page = build_report([run])
    assert "Training over steps" in page
    section = page[page.index('id="dynamics"') :]
    for words in ("9 arms", "3 seeds", "60 observed steps", "soft_or_bottom:0.5", "→"):
        assert words in section


def test_runs_without_observed_steps_have_no_such_section(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_tables(num_prompts=4))
    assert "Training over steps" not in build_report([path])


def test_several_runs_have_their_mean(tmp_path: Path, run: Path) -> None:
    other = write_run(tmp_path / "other", make_tables(num_prompts=4, seed=1))
    write_ablations(other, make_ablations(seed=5))
    page = build_report([run, other])
    assert "unweighted mean over these runs" in page
    assert "2 runs have ablations" in page
    assert "unweighted mean over these runs" not in build_report([run])
