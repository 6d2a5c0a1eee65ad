"""Figures of training ablations: accuracy of each arm, differences from training on all tokens, and
the claims."""

from collections.abc import Sequence
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tip_analysis.analysis.arms import Arm
from tip_analysis.core.result_tables import (
    ArmAccuracyTable,
    ArmDifferenceTable,
    ClaimEffectTable,
    MemoryTable,
    PaperDifferenceTable,
    checked,
)
from tip_analysis.figures.rule_styles import rule_style
from tip_analysis.figures.style import (
    COLUMN_WIDTH,
    GRID,
    INK,
    MUTED,
    PAGE_WIDTH,
    SURFACE,
    WIDE,
    figure_style,
    interval_along,
    list_down,
    new_figure,
    percent_axis,
)

VERDICT_COLORS = {"supported": "#2a8f4f", "contradicted": "#a3223f", "not resolved": MUTED}
"""None of a quadrant's."""
OURS = "#8250c4"
"""The colour of this run beside the paper's hollow marks; none of a quadrant's."""
_HOLLOW: dict[str, Any] = {"marker": "D", "mfc": "none", "mec": MUTED, "ls": ""}


def accuracy_by_ratio(
    arms: pl.DataFrame, *, metric: str = "mean@k", width: float = PAGE_WIDTH
) -> Figure:
    """Accuracy against ρ, one line a rule; training on all tokens and the untrained student are
    horizontal lines (Figures 2, 3).

    Args:
        arms: an `ArmAccuracyTable`.
        metric: name of the accuracy, for the axis.
    """
    arms = checked(arms, ArmAccuracyTable)
    named = [Arm(rule) for rule in arms["rule"].unique(maintain_order=True)]
    rules = [arm.rule for arm in named if arm.has_ratio]
    wide = width >= WIDE
    with figure_style():
        figure, axes = new_figure(width, 3.0 if wide else width * 1.3)
        for arm in named:
            if not arm.has_ratio:
                _level_lines(axes, arm, arms.filter(arm.rows())["accuracy"])
        _rule_lines(axes, arms, rules)
        ratios = sorted(arms.filter(pl.col("rule").is_in(rules))["retention_ratio"].unique())
        axes.set_xscale("log")
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.set_xlabel("retention ratio ρ")
        axes.set_ylabel(metric)
        percent_axis(axes.yaxis)
        if rules:
            place = "outside right upper" if wide else "outside lower left"
            figure.legend(loc=place, ncols=1 if wide else 2)
    return figure


def _level_lines(axes: Axes, arm: Arm, accuracies: pl.Series) -> None:
    above = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
    for accuracy in accuracies:
        axes.axhline(accuracy, color=MUTED, ls=":" if arm.is_untrained else "-", lw=1.1)
        axes.annotate(arm.rule, (1, accuracy), fontsize=8, **above)


def _rule_lines(axes: Axes, arms: pl.DataFrame, rules: Sequence[str]) -> None:
    """One line a rule, moved a little to the side so that intervals do not hide each other."""
    for index, rule in enumerate(rules):
        style = rule_style(rule)
        part = arms.filter(pl.col("rule") == rule).sort("retention_ratio")
        x = part["retention_ratio"].to_numpy() * (1 + 0.012 * (index - len(rules) / 2))
        axes.plot(x, part["accuracy"], ms=5.5, label=rule, lw=1.3, **style)
        known = part.with_columns(pl.Series("x", x)).drop_nulls(["low", "high"])
        axes.vlines(known["x"], known["low"], known["high"], color=style["color"], lw=1.1)


def difference_from_all(
    arms: pl.DataFrame, paper: pl.DataFrame, *, width: float = PAGE_WIDTH
) -> Figure:
    """Each arm's accuracy minus that of training on all tokens, with the paper's differences as
    hollow marks.

    Args:
        arms: an `ArmDifferenceTable`.
        paper: a `PaperDifferenceTable`.
    """
    arms, paper = checked(arms, ArmDifferenceTable), checked(paper, PaperDifferenceTable)
    names = ["rule", "retention_ratio"]
    named = [Arm(*key) for key in arms.select(names).unique().sort(names).rows()]
    with figure_style():
        figure, axes = new_figure(width, 0.9 + 0.3 * max(1, len(named)))
        axes.axvline(0, color=MUTED, lw=0.9)
        for place, arm in enumerate(named):
            theirs = paper.filter(arm.rows())["difference"]
            _difference_row(axes, arms.filter(arm.rows()), theirs, place)
        list_down(axes, list(map(str, named)))
        axes.grid(axis="x", color=GRID)
        percent_axis(axes.xaxis, symbol="")
        axes.set_xlabel("accuracy minus that of `all`, points")
        figure.legend(
            handles=_difference_handles(),
            loc="outside upper left",
            ncols=2 if width > COLUMN_WIDTH else 1,
        )
    return figure


def _difference_row(axes: Axes, ours: pl.DataFrame, theirs: pl.Series, place: int) -> None:
    axes.plot(theirs, [place] * len(theirs), ms=5, mew=0.9, **_HOLLOW)
    for row in ours.iter_rows(named=True):
        interval_along(axes, row["low"], row["high"], place, color=OURS, lw=1.5)
        axes.plot(row["difference"], place, "o", ms=6.5, color=OURS, mec=SURFACE, mew=0.6)


def _difference_handles() -> list[Line2D]:
    ours = Line2D([], [], marker="o", ls="-", color=OURS, label="this run, 95 % interval")
    return [ours, Line2D([], [], label="the paper (each pair and benchmark)", **_HOLLOW)]


def claims(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """The effect of each claim with its interval and verdict.

    Args:
        table: a `ClaimEffectTable`.
    """
    table = checked(table, ClaimEffectTable)
    with figure_style():
        figure, axes = new_figure(width, 0.9 + 0.38 * max(1, table.height))
        axes.axvline(0, color=MUTED, lw=0.9)
        for place, row in enumerate(table.iter_rows(named=True)):
            _claim_row(axes, row, place)
        list_down(axes, table["claim"].to_list())
        percent_axis(axes.xaxis, symbol="")
        gap = " " if width >= WIDE else "\n"
        axes.set_xlabel(f"difference of accuracies, points;{gap}grey: the margin of equality")
    return figure


def _claim_row(axes: Axes, row: dict[str, Any], place: int) -> None:
    color = VERDICT_COLORS.get(row["verdict"], MUTED)
    margin = row["margin"]
    if margin is not None:
        axes.barh(place, 2 * margin, left=-margin, height=0.7, color=GRID, zorder=0)
    interval_along(axes, row["low"], row["high"], place, color=color, lw=1.6)
    if row["effect"] is not None:
        axes.plot(row["effect"], place, "o", ms=6.5, color=color)
    axes.annotate(
        row["verdict"],
        (1.01, place),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8,
        color=INK,
    )


def memory_by_ratio(
    ours: pl.DataFrame, paper: pl.DataFrame, *, width: float = PAGE_WIDTH
) -> Figure:
    """Peak memory of training relative to ρ = 1, with the paper's as hollow marks (the form of
    Figure 4).

    Args:
        ours: a `MemoryTable`.
        paper: the paper's, likewise.
    """
    ours, paper = checked(ours, MemoryTable), checked(paper, MemoryTable)
    columns = ("retention_ratio", "relative_memory")
    with figure_style():
        figure, axes = new_figure(width, 2.8)
        axes.plot(*(paper[name] for name in columns), ms=5.5, label="the paper", **_HOLLOW)
        own = {"ms": 6, "color": OURS, "ls": "", "label": "this run"}
        axes.plot(*(ours[name] for name in columns), "o", **own)
        axes.set_xlabel("retention ratio ρ")
        axes.set_ylabel("peak memory over that of ρ = 1")
        axes.set_ylim(bottom=0)
        percent_axis(axes.yaxis)
        figure.legend(loc="outside upper left", ncols=2)
    return figure
