"""Figures: what is drawn equals the table, at either width, as vector files, without state left
behind."""

import itertools
from functools import cache

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from synthetic import make_ablations, make_dynamics

from tip_analysis import figures
from tip_analysis.analysis.dynamics import dynamics_curves
from tip_analysis.analysis.paper_preset import PAPER_RANGES
from tip_analysis.core.errors import SchemaError

QUADRANTS = ["Q1", "Q2", "Q3", "Q4"]
INSTRUMENTS = {
    "influence_matrix",
    "intervention_aucs",
    "intervention_effects",
    "league",
    "q3_survival",
    "trajectory_flow",
}
"""Drawn in `test_instruments`."""


def _shares(runs=("demo",)) -> pl.DataFrame:
    rows = [
        (run, name, share, share - 0.01, share + 0.02)
        for run in runs
        for name, share in zip(QUADRANTS, (0.14, 0.36, 0.11, 0.39), strict=True)
    ]
    return pl.DataFrame(
        rows, schema=["run", "quadrant", "share", "share_low", "share_high"], orient="row"
    )


def _density() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "entropy_left": [0.01, 1.0, 0.01],
            "entropy_right": [1.0, 3.0, 1.0],
            "divergence_left": [0.1, 0.1, 0.001],
            "divergence_right": [10.0, 10.0, 0.1],
            "num_tokens": [5, 50, 500],
            "quadrant": ["Q3", "Q1", "Q4"],
        }
    )


def _grid() -> pl.DataFrame:
    rows = []
    for i, j in itertools.product(range(6), range(5)):
        q3 = 0.02 * i * (5 - j) / 5
        rows.append((0.1 * (i + 1), 0.2 * (j + 1), 0.1, 0.4, q3, 0.5 - q3, i == 3))
    names = ["entropy_cut", "divergence_cut", *QUADRANTS, "in_paper_ranges"]
    return pl.DataFrame(rows, schema=names, orient="row")


def _profile() -> pl.DataFrame:
    rows = [
        (loss, measure, name, value, value * 0.9, value * 1.1)
        for loss in ("reverse_kl", "forward_kl")
        for measure in ("mean divergence", "mean ‖g‖²", "mean φ")
        for name, value in zip(QUADRANTS, (2.0, 0.1, 5.0, 0.01), strict=True)
    ]
    return pl.DataFrame(
        rows, schema=["loss", "measure", "quadrant", "value", "low", "high"], orient="row"
    )


def _energy() -> pl.DataFrame:
    rows = [
        ("reverse_kl", quantity, name, share, share - 0.02, None if name == "Q2" else share + 0.02)
        for quantity in ("tokens", "grad_norm_sq", "grad_dot_loss")
        for name, share in zip(QUADRANTS, (0.7, -0.05, 0.3, 0.05), strict=True)
    ]
    return pl.DataFrame(
        rows, schema=["loss", "quantity", "quadrant", "share", "low", "high"], orient="row"
    )


def _composition() -> pl.DataFrame:
    rows = [
        (rule, ratio, name, share, whole)
        for rule in ("entropy", "q3")
        for ratio in (0.1, 0.5)
        for name, share, whole in zip(
            QUADRANTS, (0.2, 0.5, 0.3, 0.0), (0.1, 0.4, 0.1, 0.4), strict=True
        )
    ]
    return pl.DataFrame(
        rows, schema=["rule", "retention_ratio", "quadrant", "share", "token_share"], orient="row"
    )


def _overlap() -> pl.DataFrame:
    return pl.DataFrame(
        {"rule_a": ["a", "a", "b"], "rule_b": ["b", "c", "c"], "jaccard": [0.5, 0.1, None]}
    )


def _coverage() -> pl.DataFrame:
    rows = [
        (rule, ratio, ratio * scale, None, None)
        for rule, scale in (("q3", 1.6), ("random", 1.0))
        for ratio in (0.1, 0.5)
    ]
    schema = {
        "rule": pl.String,
        **dict.fromkeys(("retention_ratio", "share", "share_low", "share_high"), pl.Float64),
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def _groups() -> pl.DataFrame:
    rows = [
        (grouping, group, name, 0.25, 300)
        for grouping, group in (("position", "0"), ("position", "1–3"), ("kind", "number"))
        for name in QUADRANTS
    ]
    return pl.DataFrame(
        rows, schema=["grouping", "group", "quadrant", "share", "num_tokens"], orient="row"
    )


def _arms() -> pl.DataFrame:
    rows = [
        ("all", 1.0, 0.8, 0.78, 0.82),
        ("untrained", 1.0, 0.5, None, None),
        ("q3", 0.1, 0.79, 0.7, 0.85),
        ("q3", 0.5, 0.81, None, None),
    ]
    return pl.DataFrame(
        rows, schema=["rule", "retention_ratio", "accuracy", "low", "high"], orient="row"
    )


def _differences() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "rule": ["q3"],
            "retention_ratio": [0.1],
            "difference": [-0.01],
            "low": [-0.03],
            "high": [0.01],
        }
    )


def _claims() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "claim": ["b: soft_or > entropy", "c: q3 ≈ all"],
            "effect": [0.02, -0.01],
            "low": [0.01, None],
            "high": [0.03, None],
            "margin": [None, 0.02],
            "verdict": ["supported", "not resolved"],
        }
    )


_MEMORY = pl.DataFrame(
    {"rule": ["all", "q3"], "retention_ratio": [1.0, 0.1], "relative_memory": [1.0, 0.5]}
)


@cache
def _curves() -> pl.DataFrame:
    return dynamics_curves(make_dynamics(make_ablations()))


def _flow() -> pl.DataFrame:
    pairs = [(one, other) for one in QUADRANTS for other in QUADRANTS]
    return pl.DataFrame(
        {
            "quadrant_a": [one for one, _ in pairs],
            "quadrant_b": [other for _, other in pairs],
            "num_tokens": list(range(16)),
            "share": [number / 120 for number in range(16)],
            "low": [None] * 16,
            "high": [None] * 16,
        },
        schema_overrides={"low": pl.Float64, "high": pl.Float64},
    )


DRAWINGS = {
    "quadrant_shares": lambda width: figures.quadrant_shares(_shares(), PAPER_RANGES, width=width),
    "quadrant_map": lambda width: figures.quadrant_map(
        _density(),
        entropy_cut=1.0,
        divergence_cut=0.1,
        shares=dict.fromkeys(QUADRANTS, 0.25),
        width=width,
    ),
    "cut_sensitivity": lambda width: figures.cut_sensitivity(
        _grid(), entropy_cut=0.3, divergence_cut=0.5, width=width
    ),
    "quadrant_profile": lambda width: figures.quadrant_profile(_profile(), width=width),
    "energy_shares": lambda width: figures.energy_shares(_energy(), width=width),
    "composition": lambda width: figures.composition(_composition(), width=width),
    "overlap": lambda width: figures.overlap(_overlap(), width=width),
    "coverage_curve": lambda width: figures.coverage_curve(_coverage(), label="Σφ", width=width),
    "group_shares": lambda width: figures.group_shares(_groups(), width=width),
    "accuracy_by_ratio": lambda width: figures.accuracy_by_ratio(_arms(), width=width),
    "difference_from_all": lambda width: figures.difference_from_all(
        _differences(), _differences(), width=width
    ),
    "claims": lambda width: figures.claims(_claims(), width=width),
    "memory_by_ratio": lambda width: figures.memory_by_ratio(_MEMORY, _MEMORY, width=width),
    "training_curves": lambda width: figures.training_curves(_curves(), width=width),
    "quadrant_flow": lambda width: figures.quadrant_flow(_flow(), width=width),
}
WIDTHS = (figures.PAGE_WIDTH, figures.COLUMN_WIDTH)


@pytest.mark.parametrize("name", DRAWINGS)
def test_vector_files_at_paper_size(name, tmp_path):
    for width in WIDTHS:
        figure = DRAWINGS[name](width)
        assert isinstance(figure, Figure)
        assert figure.get_figwidth() <= width + 1e-6
        first = figures.save_figure(figure, tmp_path / "a.svg").read_text()
        assert "<text" in first
        assert figures.save_figure(DRAWINGS[name](width), tmp_path / "b.svg").read_text() == first
    pdf = figures.save_figure(figure, tmp_path / "a.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Type /Font" in pdf


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", DRAWINGS)
def test_no_text_is_cut_off(name, width):
    """Titles, labels and legends lie inside the figure, on a page and on a phone."""
    figure = DRAWINGS[name](width)
    with figures.figure_style():
        figure.draw_without_rendering()
    whole, shown = figure.bbox, [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        titles = [axes.title, axes._left_title, axes._right_title]  # pyright: ignore
        shown += [*titles, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    for text in shown:
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            assert box.x0 >= whole.x0 - 2, text.get_text()
            assert box.x1 <= whole.x1 + 2, text.get_text()
            assert box.y0 >= whole.y0 - 2, text.get_text()
            assert box.y1 <= whole.y1 + 2, text.get_text()


def test_every_figure_is_drawn_here():
    drawn = {
        name for name in figures.__all__ if name.islower() and callable(getattr(figures, name))
    }
    others = {"figure_style", "save_figure", "write_figures"}
    of_several_runs = {"average_and_best", "mean_over_pairs"}  # drawn with the tables they need
    assert drawn - others - of_several_runs == set(DRAWINGS) | set(INSTRUMENTS)


def test_no_state_is_left():
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    DRAWINGS["overlap"](figures.PAGE_WIDTH)
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_bars_are_as_long_as_the_shares():
    axes = DRAWINGS["quadrant_shares"](figures.PAGE_WIDTH).axes[0]
    bars = [
        patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_hatch()
    ]
    assert sorted(round(bar.get_width(), 6) for bar in bars) == [0.11, 0.14, 0.36, 0.39]
    bands = {
        (round(p.get_x(), 4), round(p.get_x() + p.get_width(), 4))
        for p in axes.patches
        if p.get_hatch()
    }
    assert bands == set(PAPER_RANGES.values())


def test_shares_of_several_runs_are_labelled():
    figure = figures.quadrant_shares(_shares(("a $x_1$ run", "second")), PAPER_RANGES)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "Q3  a $x_1$ run" in labels
    assert len(labels) == 6


def test_map_cells_have_the_colour_of_their_quadrant():
    axes = DRAWINGS["quadrant_map"](figures.PAGE_WIDTH).axes[0]
    image = axes.collections[0].get_array()
    assert image.shape == (2, 2, 4)
    assert tuple(image[1, 1, :3]) == pytest.approx(to_rgb(figures.QUADRANT_COLORS["Q1"]))
    assert tuple(image[1, 0, :3]) == pytest.approx(to_rgb(figures.QUADRANT_COLORS["Q3"]))
    assert tuple(image[0, 0, :3]) == pytest.approx(to_rgb(figures.QUADRANT_COLORS["Q4"]))
    assert image[0, 1, 3] == 0.0
    assert image[0, 0, 3] == 1.0
    assert image[0, 0, 3] > image[1, 1, 3] > image[1, 0, 3] > 0.3
    assert sorted(line.get_xdata()[0] for line in axes.lines[:2]) == [0, 1.0]


def test_sensitivity_draws_the_grid_and_marks_the_papers_ranges():
    axes = DRAWINGS["cut_sensitivity"](figures.PAGE_WIDTH).axes[0]
    expected = _grid().sort("divergence_cut", "entropy_cut")["Q3"].to_numpy().reshape(5, 6)
    np.testing.assert_allclose(axes.collections[0].get_array(), expected)
    assert [round(patch.get_x() + 0.5) for patch in axes.patches] == [3] * 5


def _rings(entropy_cut, divergence_cut):
    axes = figures.cut_sensitivity(
        _grid(), entropy_cut=entropy_cut, divergence_cut=divergence_cut
    ).axes[0]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]


def test_the_ring_stands_on_the_cut_and_nowhere_else():
    grid = _grid()
    x, y = (np.unique(grid[name].to_numpy()) for name in ("entropy_cut", "divergence_cut"))
    assert _rings(float(x[2]), float(y[1])) == [(2.0, 1.0)]
    assert _rings(float(x[-1]) + 1.0, float(y[1])) == []
    assert _rings(float(x[0]), float(y[0]) - 1.0) == []


def test_overlap_puts_each_pair_once():
    axes = DRAWINGS["overlap"](figures.PAGE_WIDTH).axes[0]
    values = np.ma.filled(axes.collections[0].get_array(), np.nan).reshape(2, 2)
    np.testing.assert_allclose(values, [[0.5, np.nan], [0.1, np.nan]])


def test_an_empty_map_and_constant_cuts_are_drawn():
    empty = _density().clear()
    figures.quadrant_map(empty, entropy_cut=None, divergence_cut=0.0, shares={})
    constant = _grid().with_columns(pl.lit(0.0).alias("entropy_cut"))
    figures.cut_sensitivity(constant, entropy_cut=0.0, divergence_cut=0.4)


@pytest.mark.parametrize("kind", ["protan", "deutan", "tritan"])
def test_quadrants_differ_for_the_colour_blind(kind):
    """Machado et al. 2009, severity 1, in linear RGB; CIELAB distances of at least 15."""
    matrices = {
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
        "tritan": [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.3039],
        ],
    }
    linear = {
        name: np.array([_linear(c) for c in to_rgb(color)])
        for name, color in figures.QUADRANT_COLORS.items()
    }
    seen = {
        name: _lab(np.clip(np.array(matrices[kind]) @ value, 0, 1))
        for name, value in linear.items()
    }
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 15, (a, b)


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def _lab(linear: np.ndarray) -> np.ndarray:
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ linear
    )
    f = [
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in xyz / [0.9505, 1.0, 1.089]
    ]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_a_missing_column_is_named():
    with pytest.raises(SchemaError, match="jaccard"):
        figures.overlap(_overlap().drop("jaccard"))
    with pytest.raises(SchemaError, match="share_high"):
        figures.quadrant_shares(_shares().drop("share_high"), PAPER_RANGES)
