"""Figures of groups of tokens: is a quadrant just the first tokens, the rare ones, or
punctuation?"""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tip_analysis.analysis.groupings import GROUPINGS
from tip_analysis.core.result_tables import GroupTable, checked
from tip_analysis.core.words import brief
from tip_analysis.figures.style import (
    PAGE_WIDTH,
    QUADRANT_COLORS,
    WIDE,
    figure_style,
    list_down,
    new_panels,
    percent_axis,
    quadrant_handles,
)

GROUPING_NAMES = {name: grouping.title for name, grouping in GROUPINGS.items()}
PANELS_PER_ROW = 3


def group_shares(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Shares of the quadrants within each group of tokens, one panel for each grouping; bars are as
    thick as any other.

    Args:
        table: a `GroupTable`.
    """
    table = checked(table, GroupTable)
    groupings = table["grouping"].unique(maintain_order=True).to_list()
    groups = [table.filter(pl.col("grouping") == name)["group"].n_unique() for name in groupings]
    wide = width >= WIDE
    across = min(PANELS_PER_ROW, len(groupings)) if wide else 1
    lines = [max(groups[start : start + across]) for start in range(0, len(groups), across)]
    ratios = [0.55 + 0.26 * size for size in lines]
    height = 0.6 + sum(ratios) if len(lines) > 1 else 0.8 + 0.26 * lines[0]
    with figure_style():
        figure, panels = new_panels((len(lines), across), (width, height), height_ratios=ratios)
        for spare in panels.flat[len(groupings) :]:
            spare.set_visible(False)
        for axes, name in zip(panels.flat, groupings, strict=False):
            _group_bars(axes, table.filter(pl.col("grouping") == name))
            axes.set_title(GROUPING_NAMES.get(name, name), fontsize=8.5)
        handles = quadrant_handles()
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.2)
    return figure


def _group_bars(axes: Axes, part: pl.DataFrame) -> None:
    groups = part["group"].unique(maintain_order=True).to_list()
    totals = dict(part.group_by("group").agg(pl.col("num_tokens").sum()).iter_rows())
    for place, group in enumerate(groups):
        left = 0.0
        shares = {
            str(row["quadrant"]): row["share"] or 0.0
            for row in part.filter(pl.col("group") == group).iter_rows(named=True)
        }
        for name, color in QUADRANT_COLORS.items():
            axes.barh(place, shares.get(name, 0.0), left=left, height=0.74, color=color)
            left += shares.get(name, 0.0)
    labels = [f"{group} ({brief(totals[group])})" for group in groups]
    list_down(axes, labels, margin=0.5, fontsize=7.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    percent_axis(axes.xaxis)
