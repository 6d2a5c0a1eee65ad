"""Figures of several pairs of models: the mean over pairs (Figure 1), mean@k and Best@k pair by
pair (Figure 4)."""

from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tip_analysis.analysis.arms import Arm
from tip_analysis.core.result_tables import PairAccuracyTable, checked
from tip_analysis.figures.rule_styles import rule_style
from tip_analysis.figures.style import (
    GRID,
    MUTED,
    PAGE_WIDTH,
    WIDE,
    figure_style,
    list_down,
    new_figure,
    new_panels,
    percent_axis,
)

OURS = "#8250c4"
"""The colour of these runs beside the paper's hollow marks; none of a quadrant's."""


def mean_over_pairs(
    ours: pl.DataFrame, paper: pl.DataFrame, *, mean: str, width: float = PAGE_WIDTH
) -> Figure:
    """Accuracy of each arm, mean over pairs, with each pair as a small mark and the paper's mean as
    a hollow one (Figure 1).

    Args:
        ours: a `PairAccuracyTable`.
        paper: the paper's, likewise.
        mean: what stands for the mean where a pair's name stands.
        width: of the figure, inches.
    """
    ours, paper = checked(ours, PairAccuracyTable), checked(paper, PairAccuracyTable)
    means = ours.filter(pair=mean).sort("accuracy")
    arms = [Arm(*key) for key in means.select("rule", "retention_ratio").iter_rows()]
    with figure_style():
        figure, axes = new_figure(width, 1.0 + 0.3 * max(1, len(arms)))
        for place, arm in enumerate(arms):
            single = ours.filter(arm.rows(), pl.col("pair") != mean)["accuracy"]
            axes.plot(single, [place] * len(single), "|", ms=8, color=MUTED)
            axes.plot(means.filter(arm.rows())["accuracy"], [place], "o", ms=6.5, color=OURS)
            theirs = paper.filter(arm.rows(), pl.col("pair") == mean)["accuracy"]
            hollow: dict[str, Any] = {"marker": "D", "mfc": "none", "mec": MUTED, "ls": ""}
            axes.plot(theirs, [place] * len(theirs), ms=5, **hollow)
        list_down(axes, list(map(str, arms)))
        axes.grid(axis="x", color=GRID)
        percent_axis(axes.xaxis)
        axes.set_xlabel("accuracy: mean over pairs (dots), pairs (strokes), the paper’s (hollow)")
    return figure


def average_and_best(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """mean@k and Best@k of each arm, a panel each pair (Figure 4).

    Args:
        table: a `PairAccuracyTable`; arms without Best@k show mean@k alone.
        width: of the figure, inches.
    """
    table = checked(table, PairAccuracyTable)
    pairs = table["pair"].unique(maintain_order=True).to_list()
    columns = 2 if width >= WIDE else 1
    rows = -(-max(1, len(pairs)) // columns)
    tallest = max((table.filter(pair=pair).height for pair in pairs), default=1)
    with figure_style():
        size = width, rows * (0.9 + 0.26 * tallest)
        figure, panels = new_panels((rows, columns), size)
        for place, axes in enumerate(panels.flat):
            if place >= len(pairs):
                axes.remove()
                continue
            _pair_panel(axes, table.filter(pair=pairs[place]).sort("accuracy"))
            axes.set_title(pairs[place], fontsize=9, loc="left")
    return figure


def _pair_panel(axes: Axes, table: pl.DataFrame) -> None:
    arms = [Arm(*key) for key in table.select("rule", "retention_ratio").iter_rows()]
    for place, row in enumerate(table.iter_rows(named=True)):
        color = rule_style(row["rule"])["color"]
        best = row["best_at_k"]
        if best is not None:
            axes.plot([row["accuracy"], best], [place, place], color=color, lw=1.1)
            axes.plot(best, place, "D", ms=4.5, mfc="none", mec=color)
        axes.plot(row["accuracy"], place, "o", ms=5.5, color=color)
    list_down(axes, list(map(str, arms)))
    percent_axis(axes.xaxis)
    axes.set_xlabel("mean@k (dots), Best@k (hollow)")
