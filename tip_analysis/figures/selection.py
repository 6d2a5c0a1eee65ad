"""Figures of selections: what each rule picks, how far rules agree, and how much of a quantity they
keep."""

from typing import Any

import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tip_analysis.analysis.rules import keeps_all, known_rules
from tip_analysis.core.result_tables import CompositionTable, CoverageTable, OverlapTable, checked
from tip_analysis.figures.rule_styles import rule_style
from tip_analysis.figures.style import (
    INK,
    MUTED,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    WIDE,
    figure_style,
    list_down,
    new_figure,
    new_panels,
    percent_axis,
    quadrant_handles,
)


def composition(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """What each rule selects, by quadrant: one panel for each ρ, the whole table as the first bar.

    Args:
        table: a `CompositionTable`, one mask for each rule and ρ.
    """
    table = checked(table, CompositionTable)
    ratios = sorted(table["retention_ratio"].unique())
    rules = table["rule"].unique(maintain_order=True).to_list()
    wide = width >= WIDE
    shape = (1, len(ratios)) if wide else (len(ratios), 1)
    height = 0.8 + 0.24 * (len(rules) + 1)
    with figure_style():
        size = width, height if wide else height * len(ratios)
        figure, panels = new_panels(shape, size, sharey=wide)
        for axes, ratio in zip(panels.flat, ratios, strict=True):
            _stacks(axes, table.filter(pl.col("retention_ratio") == ratio), rules)
            axes.set_title(f"ρ = {ratio:g}")
        handles = quadrant_handles()
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.2)
    return figure


def overlap(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Jaccard index of every two rules at one ρ, in [0, 1].

    Args:
        table: an `OverlapTable`.
    """
    table = checked(table, OverlapTable)
    rules = list(dict.fromkeys([*table["rule_a"], *table["rule_b"]]))
    size = min(width, 0.42 * len(rules) + 2.2)
    with figure_style(8.0):
        figure, axes = new_figure(size if width >= WIDE else width, min(size, width) * 0.82)
        sns.heatmap(
            _lower_triangle(table, rules)[1:, :-1],
            ax=axes,
            vmin=0,
            vmax=1,
            cmap="mako_r",
            annot=len(rules) <= 11,
            fmt=".2f",
            square=True,
            xticklabels=rules[:-1],
            yticklabels=rules[1:],
            linewidths=1.5,
            linecolor=(0, 0, 0, 0),
            cbar_kws={"label": "Jaccard index", "shrink": 0.7},
            annot_kws={"fontsize": 7},
        )
        axes.tick_params(length=0, labelcolor=INK)
        axes.set_xticklabels(axes.get_xticklabels(), rotation=40, ha="right")
    return figure


def _lower_triangle(table: pl.DataFrame, rules: list[str]) -> np.ndarray:
    """[R, R] the index of each pair, below the diagonal; NaN elsewhere."""
    place = {rule: index for index, rule in enumerate(rules)}
    matrix = np.full((len(rules), len(rules)), np.nan)
    for a, b, value in table.select("rule_a", "rule_b", "jaccard").iter_rows():
        i, j = sorted((place[a], place[b]))
        matrix[j, i] = np.nan if value is None else value
    return matrix


def coverage_curve(table: pl.DataFrame, *, label: str, width: float = PAGE_WIDTH) -> Figure:
    """The share of a quantity that each rule keeps at each ρ, with intervals; the diagonal is what
    chance keeps.

    Args:
        table: a `CoverageTable` of one quantity; its `column`, where there is one, says which rules
            are references for it.
        label: name of the quantity, for the axis.
    """
    table = checked(table, CoverageTable)
    wide = width >= WIDE
    with figure_style():
        figure, axes = new_figure(width, 3.2 if wide else width * 1.25)
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (1, 2)))
        _coverage_lines(axes, table)
        axes.set_xlabel("retention ratio ρ")
        axes.set_ylabel(f"share of {label} kept")
        percent_axis(axes.yaxis)
        largest: Any = table["retention_ratio"].max() or 1.0
        axes.set_xlim(0, min(1.0, 1.1 * float(largest)))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        place = "outside right upper" if wide else "outside lower left"
        figure.legend(loc=place, ncols=1 if wide else 2, handlelength=2.6)
    return figure


def _coverage_lines(axes: Axes, table: pl.DataFrame) -> None:
    rules = table.filter(~keeps_all())["rule"].unique(maintain_order=True).to_list()
    known, measured = known_rules(rules), table.filter(pl.col("share").is_not_null())
    kept = table["column"].unique().to_list() if "column" in table.columns else []
    for rule in rules:
        reference = known[rule].reference_for(kept) if rule in known else ""
        label = f"{rule} ({reference})" if reference else rule
        style = {"label": label, **rule_style(rule)}
        _coverage_line(axes, measured.filter(pl.col("rule") == rule), style)


def _coverage_line(axes: Axes, part: pl.DataFrame, style: dict[str, Any]) -> None:
    part = part.sort("retention_ratio")
    axes.plot(part["retention_ratio"], part["share"], ms=5, lw=1.5, **style)
    known = part.drop_nulls(["share_low", "share_high"])
    if known.height:
        x, low, high = (known[name] for name in ("retention_ratio", "share_low", "share_high"))
        axes.vlines(x, low, high, color=style["color"], lw=1, alpha=0.7)


def _stacks(axes: Axes, part: pl.DataFrame, rules: list[str]) -> None:
    bars = {"(all tokens)": _shares(part, "token_share")}
    bars |= {rule: _shares(part.filter(pl.col("rule") == rule), "share") for rule in rules}
    for place, shares in enumerate(bars.values()):
        left = 0.0
        for name, color in QUADRANT_COLORS.items():
            share, shade = shares.get(name, 0.0), 1.0 if place else 0.65
            axes.barh(place, share, left=left, height=0.74, color=color, alpha=shade)
            left += share
    list_down(axes, list(bars), margin=0.5)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)


def _shares(part: pl.DataFrame, column: str) -> dict[str, float]:
    return {name: share or 0.0 for name, share in part.select("quadrant", column).iter_rows()}
