"""Figures of what became of tokens through training."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tip_analysis.core.result_tables import FlowTable, SurvivalTable, checked
from tip_analysis.figures.style import (
    INK,
    MUTED,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    WIDE,
    figure_style,
    new_figure,
    percent_axis,
    quadrant_handles,
)

BAR = 0.16
"""Width of a step's bar, where steps are 1 apart."""
SUBSET_STYLES = {
    "all": (INK, "o", "-"),
    "selected": ("#c2408f", "D", "-"),
    "not selected": ("#128a85", "s", "--"),
    "planted errors": ("#d55e00", "^", "-."),
}
"""Colour, mark and line of each subset of tokens."""


def trajectory_flow(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Quadrants at each kept step as bars, and between them bands of the tokens that go from one to
    another (an alluvial figure); a band has the colour of where it comes from.

    Args:
        table: a `FlowTable`.
    """
    table = checked(table, FlowTable)
    steps = sorted({*table["step_from"], *table["step_to"]})
    with figure_style():
        figure, axes = new_figure(width, 3.4 if width >= WIDE else width * 0.9)
        for place, step in enumerate(steps[:-1]):
            _bands(axes, table.filter(step_from=step), place)
        for place, step in enumerate(steps):
            _bars(axes, _shares_at(table, step), place)
        axes.set_xticks(range(len(steps)), [f"{step}" for step in steps])
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("share of tokens")
        axes.set_ylim(1.0, 0.0)
        percent_axis(axes.yaxis)
        figure.legend(handles=quadrant_handles(), loc="outside upper left", ncols=4)
    return figure


def _shares_at(table: pl.DataFrame, step: int) -> dict[str, float]:
    """Share of each quadrant at a step, from the flow that leaves it, or else that reaches it."""
    leaving = table.filter(step_from=step)
    part = leaving if leaving.height else table.filter(step_to=step)
    column = "quadrant_from" if leaving.height else "quadrant_to"
    sums = part.group_by(column).agg(pl.col("share").sum())
    return {str(name): share for name, share in sums.iter_rows()}


def _bars(axes: Axes, shares: dict[str, float], place: int) -> None:
    top = 0.0
    for name, color in QUADRANT_COLORS.items():
        axes.bar(place, shares.get(name, 0.0), bottom=top, width=BAR, color=color)
        top += shares.get(name, 0.0)


def _bands(axes: Axes, flow: pl.DataFrame, place: int) -> None:
    names = list(QUADRANT_COLORS)
    share = {
        (str(a), str(b)): value
        for a, b, value in flow.select("quadrant_from", "quadrant_to", "share").iter_rows()
    }
    left = _starts({name: sum(share[name, other] for other in names) for name in names})
    right = _starts({name: sum(share[other, name] for other in names) for name in names})
    x = np.linspace(place + BAR / 2, place + 1 - BAR / 2, 40)
    bend = (1 - np.cos(np.linspace(0.0, np.pi, 40))) / 2
    for source in names:
        for target in names:
            size = share[source, target]
            if size > 0:
                top = left[source] + bend * (right[target] - left[source])
                axes.fill_between(
                    x, top, top + size, color=QUADRANT_COLORS[source], alpha=0.45, lw=0
                )
                left[source] += size
                right[target] += size


def _starts(shares: dict[str, float]) -> dict[str, float]:
    starts, top = {}, 0.0
    for name, share in shares.items():
        starts[name] = top
        top += share
    return starts


def q3_survival(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Of the tokens in Q3 at the first step, the share that still is, with intervals; the dotted
    line is one half.

    Args:
        table: a `SurvivalTable`.
    """
    table = checked(table, SurvivalTable)
    with figure_style():
        figure, axes = new_figure(width, 3.0 if width >= WIDE else width * 0.9)
        axes.axhline(0.5, color=MUTED, lw=0.8, ls=(0, (1, 2)))
        for name, (color, mark, line) in SUBSET_STYLES.items():
            part = table.filter(tokens=name).sort("step")
            if part.height:
                axes.plot(
                    part["step"], part["share"], color=color, marker=mark, ls=line, ms=4, label=name
                )
                known = part.drop_nulls(["low", "high"])
                axes.vlines(
                    known["step"], known["low"], known["high"], color=color, lw=1, alpha=0.6
                )
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("of Q3, still in Q3")
        axes.set_ylim(0.0, 1.05)
        percent_axis(axes.yaxis)
        figure.legend(loc="outside upper left", ncols=4, handlelength=2.6)
    return figure
