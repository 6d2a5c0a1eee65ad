"""Figures of training ablations: accuracy of each arm, differences from training on all tokens, and
the claims."""

import polars as pl
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from tip_analysis.analysis.arms import Arm
from tip_analysis.figures.style import (
    COLUMN_WIDTH,
    GRID,
    INK,
    MUTED,
    PAGE_WIDTH,
    SURFACE,
    WIDE,
    figure_style,
    require,
)

_MARKS = "osD^vPX*<>hd"
VERDICT_COLORS = {"supported": "#0072b2", "contradicted": "#d55e00", "not resolved": "#98a2ae"}


def accuracy_by_ratio(
    arms: pl.DataFrame, *, metric: str = "mean@k", width: float = PAGE_WIDTH
) -> Figure:
    """Accuracy against ρ, one line a rule; training on all tokens and the untrained student are
    level lines (Figures 2, 3).

    Args:
        arms: `rule`, `retention_ratio`, `accuracy` in [0, 1], `low`, `high` (may be null).
        metric: name of the accuracy, for the axis.
    """
    require(arms, ["rule", "retention_ratio", "accuracy", "low", "high"])
    named = [Arm(rule) for rule in arms["rule"].unique(maintain_order=True)]
    rules = [arm.rule for arm in named if arm.has_ratio]
    levels = [arm for arm in named if not arm.has_ratio]
    colors = sns.color_palette("colorblind", n_colors=max(1, len(rules)))
    wide = width >= WIDE
    with figure_style():
        figure = Figure(figsize=(width, 3.6 if wide else width * 1.3), layout="constrained")
        axes = figure.subplots()
        for arm in levels:
            style = ":" if arm.is_untrained else "-"
            for row in arms.filter(arm.rows()).iter_rows(named=True):
                axes.axhline(row["accuracy"], color=MUTED, ls=style, lw=1.1)
                axes.annotate(
                    arm.rule,
                    (1, row["accuracy"]),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=8,
                )
        for index, rule in enumerate(rules):
            part = arms.filter(pl.col("rule") == rule).sort("retention_ratio")
            x = part["retention_ratio"].to_numpy() * (1 + 0.012 * (index - len(rules) / 2))
            axes.plot(
                x,
                part["accuracy"],
                marker=_MARKS[index % len(_MARKS)],
                ms=5.5,
                color=colors[index],
                label=rule,
                lw=1.3,
            )
            known = part.with_columns(pl.Series("x", x)).drop_nulls(["low", "high"])
            axes.vlines(known["x"], known["low"], known["high"], color=colors[index], lw=1.1)
        ratios = sorted(arms.filter(pl.col("rule").is_in(rules))["retention_ratio"].unique())
        axes.set_xscale("log")
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.set_xlabel("retention ratio ρ")
        axes.set_ylabel(metric)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if rules:
            figure.legend(
                loc="outside right upper" if wide else "outside lower left", ncols=1 if wide else 2
            )
    return figure


def difference_from_all(
    arms: pl.DataFrame, paper: pl.DataFrame, *, width: float = PAGE_WIDTH
) -> Figure:
    """Each arm's accuracy minus that of training on all tokens, with the paper's differences as
    hollow marks.

    Args:
        arms: `rule`, `retention_ratio`, `difference` (of accuracies in [0, 1]), `low`, `high`.
        paper: `rule`, `retention_ratio`, `difference` (likewise), one row for each pair and
            benchmark of the paper's.
    """
    require(arms, ["rule", "retention_ratio", "difference", "low", "high"])
    require(paper, ["rule", "retention_ratio", "difference"])
    keys = (
        arms.select("rule", "retention_ratio")
        .unique(maintain_order=True)
        .sort("rule", "retention_ratio")
        .rows()
    )
    with figure_style():
        figure = Figure(figsize=(width, 0.9 + 0.3 * max(1, len(keys))), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, lw=0.9)
        for place, key in enumerate(keys):
            same = Arm(*key).rows()
            theirs = paper.filter(same)["difference"]
            axes.plot(
                theirs, [place] * len(theirs), "D", ms=5, mfc="none", mec=MUTED, mew=0.9, ls=""
            )
            for row in arms.filter(same).iter_rows(named=True):
                if row["low"] is not None and row["high"] is not None:
                    axes.plot(
                        [row["low"], row["high"]],
                        [place] * 2,
                        color=VERDICT_COLORS["supported"],
                        lw=1.5,
                    )
                axes.plot(
                    row["difference"],
                    place,
                    "o",
                    ms=6.5,
                    color=VERDICT_COLORS["supported"],
                    mec=SURFACE,
                    mew=0.6,
                )
        axes.set_yticks(range(len(keys)), [str(Arm(*key)) for key in keys])
        axes.set_ylim(len(keys) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="x", color=GRID)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
        axes.set_xlabel("accuracy minus that of `all`, points")
        ours = Line2D(
            [],
            [],
            marker="o",
            ls="-",
            color=VERDICT_COLORS["supported"],
            label="this run, 95 % interval",
        )
        mark = Line2D(
            [],
            [],
            marker="D",
            ls="",
            mfc="none",
            mec=MUTED,
            label="the paper (each pair and benchmark)",
        )
        figure.legend(
            handles=[ours, mark], loc="outside upper left", ncols=2 if width > COLUMN_WIDTH else 1
        )
    return figure


def claims(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """The effect of each claim with its interval and verdict.

    Args:
        table: `claim` (text), `effect`, `low`, `high` (differences of accuracies in [0, 1]),
            `margin` (of claims of equality; null for others), `verdict` (supported, contradicted,
            not resolved).
    """
    require(table, ["claim", "effect", "low", "high", "margin", "verdict"])
    with figure_style():
        figure = Figure(figsize=(width, 0.9 + 0.38 * max(1, table.height)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, lw=0.9)
        for place, row in enumerate(table.iter_rows(named=True)):
            color = VERDICT_COLORS.get(row["verdict"], MUTED)
            if row["margin"] is not None:
                axes.barh(
                    place, 2 * row["margin"], left=-row["margin"], height=0.7, color=GRID, zorder=0
                )
            if row["low"] is not None and row["high"] is not None:
                axes.plot([row["low"], row["high"]], [place] * 2, color=color, lw=1.6)
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
        axes.set_yticks(range(table.height), table["claim"].to_list())
        axes.set_ylim(table.height - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
        axes.set_xlabel("difference of accuracies, points; grey: within the margin of equality")
    return figure


def memory_by_ratio(
    ours: pl.DataFrame, paper: pl.DataFrame, *, width: float = PAGE_WIDTH
) -> Figure:
    """Peak memory of training relative to ρ = 1, with the paper's as hollow marks (the form of
    Figure 4).

    Args:
        ours: `rule`, `retention_ratio`, `relative_memory` (1 at ρ = 1).
        paper: the same columns from the paper's tables.
    """
    require(ours, ["rule", "retention_ratio", "relative_memory"])
    require(paper, ["rule", "retention_ratio", "relative_memory"])
    with figure_style():
        figure = Figure(figsize=(width, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            paper["retention_ratio"],
            paper["relative_memory"],
            "D",
            ms=5.5,
            mfc="none",
            mec=MUTED,
            ls="",
            label="the paper",
        )
        axes.plot(
            ours["retention_ratio"],
            ours["relative_memory"],
            "o",
            ms=6,
            color=VERDICT_COLORS["supported"],
            ls="",
            label="this run",
        )
        axes.set_xlabel("retention ratio ρ")
        axes.set_ylabel("peak memory over that of ρ = 1")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend(loc="outside upper left", ncols=2)
    return figure
