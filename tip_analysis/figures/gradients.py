"""Figures of per-token gradients: what each quadrant carries, and how that compares with its number
of tokens."""

import math
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tip_analysis.core.result_tables import EnergyShareTable, QuadrantProfileTable, checked
from tip_analysis.figures.style import (
    INK,
    MUTED,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    WIDE,
    figure_style,
    interval_along,
    list_down,
    new_panels,
    percent_axis,
    plain_number,
)

VANISHING = 1 / 40
"""Of the largest bar: what is lower can hardly be seen beside it."""
LOSS_NAMES = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "jsd": "JSD",
    "negative_logprob": "−ln P of the token",
}
_MARKS = {"tokens": ("o", "tokens"), "grad_norm_sq": ("s", "Σ‖g‖²"), "grad_dot_loss": ("^", "Σφ")}


def quadrant_profile(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Means by quadrant, one row of panels for each loss, one column for each measure: the
    saturation trap side by side.

    Each panel has an axis of its own: linear from 0 where no value is negative, and logarithmic,
    said so in its title, where on a linear one all bars but the largest would vanish.

    Args:
        table: a `QuadrantProfileTable`.
    """
    table = checked(table, QuadrantProfileTable)
    losses, measures = (
        table[name].unique(maintain_order=True).to_list() for name in ("loss", "measure")
    )
    wide = width >= WIDE
    rows, columns = (len(losses), len(measures)) if wide else (len(measures), len(losses))
    with figure_style():
        size = width, rows * (1.75 if wide else 1.7)
        figure, panels = new_panels((rows, columns), size)
        for i, loss in enumerate(losses):
            for j, measure in enumerate(measures):
                axes = panels[i, j] if wide else panels[j, i]
                part = table.filter(pl.col("loss") == loss, pl.col("measure") == measure)
                _bars(axes, part)
                title = _panel_title(loss, measure, wide, first=j == 0)
                title = f"{title} (log)" if bars_vanish(part) else title
                axes.set_title(title, fontsize=8.5 if wide else 7.5)
    return figure


def _panel_title(loss: str, measure: str, wide: bool, *, first: bool) -> str:
    name = LOSS_NAMES.get(loss, loss)
    if wide:
        return f"{name}: {measure}"
    return f"{name}\n{measure}" if first else measure


def energy_shares(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Each quadrant's share of the tokens, of Σ‖g‖² and of Σφ, one panel for each loss.

    Args:
        table: an `EnergyShareTable`.
    """
    table = checked(table, EnergyShareTable)
    losses = table["loss"].unique(maintain_order=True).to_list()
    wide = width >= WIDE
    shape = (1, len(losses)) if wide else (len(losses), 1)
    with figure_style():
        size = width, 2.5 if wide else 2.3 * len(losses) + 0.3
        figure, panels = new_panels(shape, size)
        for axes, loss in zip(panels.flat, losses, strict=True):
            _share_marks(axes, table.filter(pl.col("loss") == loss))
            axes.set_title(LOSS_NAMES.get(loss, loss))
        handles = [_handle(name) for name in _MARKS]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handletextpad=0.2)
    return figure


def _handle(quantity: str) -> Line2D:
    mark, label = _MARKS[quantity]
    fill = "none" if quantity == "tokens" else INK
    return Line2D([], [], marker=mark, ls="", color=INK, mfc=fill, ms=6, label=label)


def _bars(axes: Axes, part: pl.DataFrame) -> None:
    values = {row["quadrant"]: row for row in part.iter_rows(named=True)}
    for index, (name, color) in enumerate(QUADRANT_COLORS.items()):
        row = values.get(name)
        if row is None or row["value"] is None:
            continue
        axes.bar(index, row["value"], width=0.66, color=color)
        if row["low"] is not None and row["high"] is not None:
            axes.plot(
                [index, index], [row["low"], row["high"]], color=INK, lw=1.2, solid_capstyle="butt"
            )
    axes.set_xticks(range(4), list(QUADRANT_COLORS))
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    if bars_vanish(part):
        _log_from(axes, float(part["value"].min()))  # pyright: ignore[reportArgumentType]
    else:
        axes.axhline(0, color=MUTED, lw=0.7)
        axes.locator_params(axis="y", nbins=4)


def bars_vanish(part: pl.DataFrame) -> bool:
    """Whether, on a linear axis, every bar but the largest would be a line: all values are above 0,
    and the second largest is less than a fortieth of the largest."""
    values = sorted(part["value"].drop_nulls())
    return len(values) > 2 and values[0] > 0 and values[-2] < VANISHING * values[-1]


def _log_from(axes: Axes, lowest: float) -> None:
    """A logarithmic axis from the power of ten below the lowest bar."""
    axes.set_yscale("log")
    axes.set_ylim(bottom=10.0 ** math.floor(math.log10(lowest) - 0.15))
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))


def _share_marks(axes: Axes, part: pl.DataFrame) -> None:
    for row in part.filter(pl.col("share").is_not_null()).iter_rows(named=True):
        _share_mark(axes, row)
    axes.axvline(0, color=MUTED, lw=0.7)
    list_down(axes, list(QUADRANT_COLORS))
    axes.grid(axis="x")
    percent_axis(axes.xaxis)


def _share_mark(axes: Axes, row: dict[str, Any]) -> None:
    place = list(QUADRANT_COLORS).index(row["quadrant"])
    place += 0.22 * (list(_MARKS).index(row["quantity"]) - 1)
    mark, _ = _MARKS[row["quantity"]]
    color = QUADRANT_COLORS[row["quadrant"]]
    fill = "none" if row["quantity"] == "tokens" else color
    interval_along(axes, row["low"], row["high"], place, color=color, lw=1.4)
    axes.plot(row["share"], place, mark, ms=6.5, color=color, mfc=fill, mew=1.5)
