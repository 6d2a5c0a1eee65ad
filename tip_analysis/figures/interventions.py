"""Figures of the causal test of tokens."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tip_analysis.core.names import ForcedToken
from tip_analysis.core.result_tables import AucTable, EffectTable, checked
from tip_analysis.figures.style import (
    INK,
    MUTED,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    WIDE,
    figure_style,
    interval_along,
    list_down,
    new_figure,
)

CHOICES = {
    ForcedToken.TEACHER.value: ("the teacher's choice", "o"),
    ForcedToken.FRESH.value: ("a fresh sample", "s"),
}
"""What was put in place: its name and mark."""


def intervention_effects(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Δ success of replacing the student's token, by group of tokens, with intervals.

    Args:
        table: an `EffectTable`.
    """
    table = checked(table, EffectTable)
    groups = table["group"].unique(maintain_order=True).to_list()
    with figure_style():
        figure, axes = new_figure(width, 1.0 + 0.42 * len(groups))
        axes.axvline(0.0, color=MUTED, lw=0.8)
        for offset, (choice, (label, mark)) in zip((-0.13, 0.13), CHOICES.items(), strict=True):
            part = table.filter(pl.col("choice") == choice)
            _effects(axes, part, groups, offset, mark, label)
        sizes = dict(table.select("group", "num_tokens").iter_rows())
        list_down(axes, [f"{group} ({sizes[group]})" for group in groups], margin=0.5)
        axes.set_xlabel("success, minus that with the student's own token")
        place = "outside upper left"
        figure.legend(loc=place, ncols=2 if width >= WIDE else 1, handlelength=1.2)
    return figure


def _effects(
    axes: Axes, part: pl.DataFrame, groups: list[str], offset: float, mark: str, label: str
) -> None:
    named = label
    for row in part.iter_rows(named=True):
        if row["difference"] is None:
            continue
        place = groups.index(row["group"]) + offset
        color = QUADRANT_COLORS.get(row["group"], INK)
        interval_along(axes, row["low"], row["high"], place, color=color, lw=1.2)
        axes.plot(row["difference"], place, ls="", marker=mark, ms=5, color=color, label=named)
        named = "_"  # one entry in the legend


def intervention_aucs(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """How well each score finds the tokens whose replacement raises success; one half is chance.

    Args:
        table: an `AucTable`.
    """
    table = checked(table, AucTable).sort("auc", descending=True, nulls_last=True)
    with figure_style():
        figure, axes = new_figure(width, 0.8 + 0.26 * table.height)
        axes.axvline(0.5, color=MUTED, lw=0.8, ls=(0, (1, 2)))
        for place, row in enumerate(table.iter_rows(named=True)):
            if row["auc"] is not None:
                interval_along(axes, row["low"], row["high"], place, color=INK, lw=1.2)
                axes.plot(row["auc"], place, ls="", marker="o", ms=5, color=INK)
        list_down(axes, table["score"].to_list(), margin=0.5)
        axes.set_xlim(0.0, 1.0)
        axes.set_xlabel("area under the ROC curve")
    return figure
