"""Figures of the instruments: what is drawn is what the table holds."""

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from tip_analysis import figures
from tip_analysis.core.errors import SchemaError

QUADRANTS = ["Q1", "Q2", "Q3", "Q4"]


def league() -> pl.DataFrame:
    rows = [
        (rule, "selection", ratio, "phi", value, value - 0.1, value + 0.1, rank, low, high)
        for ratio in (0.1, 0.5)
        for rule, value, rank, low, high in (
            ("q3", 0.8, 1, 1, 2),
            ("soft_or", 0.7, 2, 1, 2),
            ("random", 0.1, 3, 3, 3),
        )
    ]
    names = ["rule", "form", "retention_ratio", "figure", "value", "low", "high",
             "rank", "rank_low", "rank_high"]  # fmt: skip
    return pl.DataFrame(rows, schema=names, orient="row")


def matrix() -> pl.DataFrame:
    rows = [
        (a, b, value, value - 0.1, value + 0.1)
        for i, a in enumerate(QUADRANTS)
        for j, b in enumerate(QUADRANTS)
        for value in [1.0 if i == j else 0.2 * (i - j)]
    ]
    table = pl.DataFrame(
        rows, schema=["source", "target", "cosine", "cosine_low", "cosine_high"], orient="row"
    )
    same = {f"{form}{tail}": f"cosine{tail}" for form in ("influence",) for tail in
            ("", "_low", "_high")}  # fmt: skip
    return table.with_columns(
        *(pl.col(source).alias(name) for name, source in same.items()),
        per_token=pl.col("cosine") * 4,
    )


def flow() -> pl.DataFrame:
    rows = [
        (before, after, a, b, 10 * (a == b) + 2, (10 * (a == b) + 2) / 72)
        for before, after in ((0, 10), (10, 30))
        for a in QUADRANTS
        for b in QUADRANTS
    ]
    names = ["step_from", "step_to", "quadrant_from", "quadrant_to", "num_tokens", "share"]
    return pl.DataFrame(rows, schema=names, orient="row")


def survival() -> pl.DataFrame:
    rows = [
        (name, step, share, share - 0.05, share + 0.05, 12.0)
        for name in ("all", "selected", "not selected", "planted errors")
        for step, share in ((0, 1.0), (10, 0.6), (30, 0.2))
    ]
    names = ["tokens", "step", "share", "low", "high", "half_life"]
    return pl.DataFrame(rows, schema=names, orient="row")


def effects() -> pl.DataFrame:
    rows = [
        (group, choice, 0.4, value, value - 0.05, value + 0.05, 50)
        for group, value in zip([*QUADRANTS, "all"], (0.1, 0.0, 0.3, 0.0, 0.1), strict=True)
        for choice in ("teacher", "fresh")
    ]
    names = ["group", "choice", "success_student", "difference", "low", "high", "num_tokens"]
    return pl.DataFrame(rows, schema=names, orient="row")


def aucs() -> pl.DataFrame:
    rows = [("q3_score", 0.8, 0.7, 0.9), ("entropy", 0.4, 0.3, 0.5), ("none", None, None, None)]
    return pl.DataFrame(rows, schema=["score", "auc", "low", "high"], orient="row")


DRAWN = {
    "league": lambda width: figures.league(league(), figure="phi", width=width),
    "influence_matrix": lambda width: figures.influence_matrix(matrix(), width=width),
    "trajectory_flow": lambda width: figures.trajectory_flow(flow(), width=width),
    "q3_survival": lambda width: figures.q3_survival(survival(), width=width),
    "intervention_effects": lambda width: figures.intervention_effects(effects(), width=width),
    "intervention_aucs": lambda width: figures.intervention_aucs(aucs(), width=width),
}


@pytest.mark.parametrize("width", [figures.PAGE_WIDTH, figures.COLUMN_WIDTH])
@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_drawn_at_either_width_and_saved(name, width, tmp_path) -> None:
    figure = DRAWN[name](width)
    assert isinstance(figure, Figure)
    assert figure.get_figwidth() <= width + 1e-9
    saved = figures.save_figure(figure, tmp_path / f"{name}.svg").read_text("utf-8")
    assert "<text" in saved


def test_a_league_has_a_panel_for_each_ratio_and_the_ranks_before_the_names() -> None:
    figure = DRAWN["league"](figures.PAGE_WIDTH)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == [
        "ρ = 0.1",
        "ρ = 0.5",
    ]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["1–2  q3", "1–2  soft_or", "3  random"]
    values = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert values == [0.8, 0.7, 0.1]


def test_a_matrix_shows_every_pair() -> None:
    axes = DRAWN["influence_matrix"](figures.PAGE_WIDTH).axes[0]
    drawn = np.asarray(axes.collections[0].get_array()).reshape(4, 4)
    expected = matrix()["cosine"].to_numpy().reshape(4, 4)
    assert np.allclose(drawn, expected)
    form = figures.influence_matrix(matrix(), form="per_token").axes[0]
    assert np.allclose(np.asarray(form.collections[0].get_array()).reshape(4, 4), expected * 4)


def test_bands_leave_and_reach_the_bars_they_belong_to() -> None:
    axes = DRAWN["trajectory_flow"](figures.PAGE_WIDTH).axes[0]
    assert len(axes.collections) == 2 * 16
    heights = [bar.get_height() for bar in axes.patches]
    assert sum(heights) == pytest.approx(3.0)  # three steps, each whole
    for band in axes.collections:
        path = band.get_paths()[0].vertices
        left = path[np.isclose(path[:, 0], path[:, 0].min())][:, 1]
        right = path[np.isclose(path[:, 0], path[:, 0].max())][:, 1]
        assert np.ptp(left) == pytest.approx(np.ptp(right))  # as many tokens arrive as left


def test_effects_stand_where_the_table_says() -> None:
    axes = DRAWN["intervention_effects"](figures.PAGE_WIDTH).axes[0]
    marks = [line for line in axes.lines if line.get_marker() in ("o", "s")]
    assert sorted(float(line.get_xdata()[0]) for line in marks) == sorted(
        effects()["difference"].to_list()
    )


def test_a_table_that_lacks_a_column_is_refused() -> None:
    with pytest.raises(SchemaError, match="LeagueTable"):
        figures.league(league().drop("rank"), figure="phi")
    with pytest.raises(SchemaError, match="FlowTable"):
        figures.trajectory_flow(flow().drop("share"))
