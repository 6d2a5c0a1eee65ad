"""Figures from a run in one line, and all of them as files for print."""

import re

import polars as pl
import pytest
from synthetic import (
    make_ablations,
    make_dynamics,
    make_tables,
    write_ablations,
    write_dynamics,
    write_run,
)

import tip_analysis as tip
from tip_analysis.analysis.run_view import ReportOptions, RunView
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.figures.door import FIGURES, SUFFIXES, quadrant_flow, write_figures
from tip_analysis.figures.gradients import bars_vanish, quadrant_profile
from tip_analysis.figures.rule_styles import _STYLES
from tip_analysis.figures.style import QUADRANT_COLORS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("runs") / "whole", make_tables())
    arms = make_ablations()
    write_ablations(path, arms)
    write_dynamics(path, make_dynamics(arms))
    return path


@pytest.mark.parametrize("name", list(FIGURES))
def test_each_figure_takes_a_run_however_it_is_given(run, name):
    draw = getattr(tip.figures, name)
    drawn = [draw(source) for source in (run, str(run), tip.open_run(run))]
    for figure in drawn:
        assert figure.axes
        assert any(axes.has_data() or axes.texts for axes in figure.axes)


def test_titles_of_a_profile_fit_a_phone(run):
    figure = tip.figures.quadrant_profile(run, width=tip.figures.COLUMN_WIDTH)
    with tip.figures.figure_style():
        figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes._left_title.get_window_extent()  # pyright: ignore
        assert box.x1 <= figure.bbox.x1 + 2, axes.get_title(loc="left")


def test_a_figure_of_a_run_is_that_of_its_table(run):
    view = RunView(run, ReportOptions())
    ours = tip.figures.quadrant_shares(view)
    theirs = tip.figures.quadrant_shares(view.share_table, tip.PAPER_RANGES)
    widths = [[bar.get_width() for bar in figure.axes[0].patches] for figure in (ours, theirs)]
    assert widths[0] == widths[1]


def test_two_runs_make_a_flow(run, tmp_path):
    flow = quadrant_flow(run, run)
    assert "25" not in flow.axes[0].get_xlabel()
    with pytest.raises(OptionError, match="expected two runs, found one"):
        quadrant_flow(run)


def test_a_run_without_a_stage_says_which(tmp_path):
    bare = make_tables(num_prompts=2, rollouts_per_prompt=2, gradients=False)
    path = write_run(
        tmp_path / "bare",
        type(bare)(bare.rollouts, bare.tokens, bare.gradients, bare.masks.clear(), bare.vocabulary),
    )
    with pytest.raises(RunError, match=r"no masks yet; `tip-analysis select"):
        tip.figures.composition(path)
    written = write_figures(path, tmp_path / "figures")
    assert {file.stem for file in written} == {
        "quadrant_shares",
        "quadrant_map",
        "cut_sensitivity",
        "quadrant_profile",
        "group_shares",
    }


def test_files_are_vectors_whole_and_the_same_again(run, tmp_path):
    folder = tmp_path / "figures"
    written = write_figures(run, folder)
    assert {file.name for file in folder.iterdir()} == {
        f"{name}{suffix}" for name in FIGURES for suffix in SUFFIXES
    }
    first = {file: file.read_bytes() for file in written}
    for file, content in first.items():
        assert content.startswith(b"%PDF" if file.suffix == ".pdf" else b"<?xml")
    assert write_figures(run, folder) == written
    assert {file: file.read_bytes() for file in written} == first


@pytest.mark.parametrize("name", ["notes.txt", "claims.pdf", "other.svg"])
def test_a_folder_with_a_file_of_anothers_is_refused(run, tmp_path, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(OptionError, match=re.escape(f"found {name}")):
        write_figures(run, folder)
    assert [file.name for file in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="found the file"):
        write_figures(run, tmp_path / "file")


def _profile(values: list[float]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "loss": ["reverse_kl"] * 4,
            "measure": ["mean ‖g‖²"] * 4,
            "quadrant": list(QUADRANT_COLORS),
            "value": values,
            "low": [None] * 4,
            "high": [None] * 4,
        },
        schema_overrides={"low": pl.Float64, "high": pl.Float64},
    )


@pytest.mark.parametrize(
    ("values", "vanish"),
    [
        ([100.0, 0.1, 0.2, 0.01], True),
        ([100.0, 60.0, 0.2, 0.01], False),
        ([100.0, -0.1, 0.2, 0.01], False),
        ([0.0, 0.0, 0.0, 1.0], False),
    ],
)
def test_an_axis_is_logarithmic_where_three_of_four_bars_would_vanish(values, vanish):
    table = _profile(values)
    assert bars_vanish(table) == vanish
    axes = quadrant_profile(table).axes[0]
    assert axes.get_yscale() == ("log" if vanish else "linear")
    assert axes.get_title(loc="left").endswith("(log)") == vanish
    if vanish:
        assert 0 < axes.get_ylim()[0] < min(values)


def test_no_rule_has_the_colour_of_a_quadrant():
    assert not {color.lower() for color, _, _ in _STYLES.values()} & set(QUADRANT_COLORS.values())
