"""Figures of selection rules compared without training."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tip_analysis.core.names import RankFigure
from tip_analysis.core.result_tables import LeagueTable, checked
from tip_analysis.figures.rule_styles import rule_style
from tip_analysis.figures.style import (
    GRID,
    INK,
    MUTED,
    PAGE_WIDTH,
    WIDE,
    figure_style,
    interval_along,
    list_down,
    new_panels,
)

FIGURE_NAMES = {
    RankFigure.PHI: "share of Σφ",
    RankFigure.PHI_POSITIVE: "share of Σφ⁺",
    RankFigure.REWARD: "net reward signal",
    RankFigure.REWARD_POSITIVE: "share of reward signal",
    RankFigure.GRAD_NORM_SQ: "share of Σ‖g‖²",
    RankFigure.COSINE_LOSS: "cosine with ∇L",
    RankFigure.COSINE_REWARD: "cosine with ∇J",
    RankFigure.SNR: "signal to noise",
}
"""What a figure is called on an axis."""


def league(table: pl.DataFrame, *, figure: RankFigure | str, width: float = PAGE_WIDTH) -> Figure:
    """Rules in the order of one offline figure, a panel for each ρ, with intervals and the ranks
    that they may have.

    Args:
        table: a `LeagueTable`.
        figure: which of its figures.
    """
    shown = checked(table, LeagueTable).filter(pl.col("figure") == str(RankFigure(figure)))
    shown = shown.drop_nulls("value")
    sizes = shown.group_by("retention_ratio").len().filter(pl.col("len") > 1)
    ratios = sorted(sizes["retention_ratio"])
    wide = width >= WIDE and len(ratios) > 1
    shape = (1, max(1, len(ratios))) if wide else (max(1, len(ratios)), 1)
    rows = max([2, *sizes["len"]])
    height = 0.8 + 0.22 * rows
    with figure_style():
        drawn, panels = new_panels(shape, (width, height if wide else height * shape[0]))
        for axes, ratio in zip(panels.flat, ratios, strict=False):
            _league_rows(axes, shown.filter(retention_ratio=ratio).sort("rank", "rule"))
            axes.set_title(f"ρ = {ratio:g}")
            axes.set_xlabel(FIGURE_NAMES[RankFigure(figure)])
    return drawn


def _league_rows(axes: Axes, part: pl.DataFrame) -> None:
    axes.axvline(0.0, color=GRID, lw=0.8)
    for place, row in enumerate(part.iter_rows(named=True)):
        style = rule_style(row["rule"])
        interval_along(axes, row["low"], row["high"], place, color=style["color"], lw=1.2)
        axes.plot(row["value"], place, ls="", ms=5, color=style["color"], marker=style["marker"])
    labels = [
        f"{_ranks(low, high)}  {rule}"
        for rule, low, high in part.select("rule", "rank_low", "rank_high").iter_rows()
    ]
    list_down(axes, labels, margin=0.5, fontsize=7.5)
    axes.tick_params(axis="x", labelcolor=MUTED)
    axes.tick_params(axis="y", labelcolor=INK)


def _ranks(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return "–"
    return f"{low}" if low == high else f"{low}–{high}"
