"""Figures of per-token gradients: what each quadrant carries, and how that compares with its number
of tokens."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from tip_analysis.figures.style import (
    INK,
    MUTED,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    WIDE,
    figure_style,
    require,
)

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

    Args:
        table: `loss`, `measure` (a label), `quadrant`, `value`, `low`, `high` (95 % interval; may
            be null). Each panel has a linear axis of its own that starts at 0 where no value is
            negative.
    """
    require(table, ["loss", "measure", "quadrant", "value", "low", "high"])
    losses, measures = (
        table[name].unique(maintain_order=True).to_list() for name in ("loss", "measure")
    )
    wide = width >= WIDE
    rows, columns = (len(losses), len(measures)) if wide else (len(measures), len(losses))
    with figure_style():
        figure = Figure(figsize=(width, rows * (1.75 if wide else 1.7)), layout="constrained")
        panels = np.asarray(figure.subplots(rows, columns, squeeze=False))
        for i, loss in enumerate(losses):
            for j, measure in enumerate(measures):
                axes = panels[i, j] if wide else panels[j, i]
                part = table.filter(pl.col("loss") == loss, pl.col("measure") == measure)
                _bars(axes, part)
                axes.set_title(
                    f"{LOSS_NAMES.get(loss, loss)}: {measure}" if wide else measure, fontsize=8.5
                )
                if not wide and j == 0:
                    axes.set_title(f"{LOSS_NAMES.get(loss, loss)}\n{measure}", fontsize=8.5)
    return figure


def energy_shares(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Each quadrant's share of the tokens, of Σ‖g‖² and of Σφ, one panel for each loss.

    Args:
        table: `loss`, `quantity` (tokens, grad_norm_sq, grad_dot_loss), `quadrant`, `share`, `low`,
            `high`. A share of Σφ may be negative or above 1.
    """
    require(table, ["loss", "quantity", "quadrant", "share", "low", "high"])
    losses = table["loss"].unique(maintain_order=True).to_list()
    wide = width >= WIDE
    shape = (1, len(losses)) if wide else (len(losses), 1)
    with figure_style():
        figure = Figure(
            figsize=(width, 2.5 if wide else 2.3 * len(losses) + 0.3), layout="constrained"
        )
        panels = np.asarray(figure.subplots(*shape, squeeze=False)).flat
        for axes, loss in zip(panels, losses, strict=True):
            _share_marks(axes, table.filter(pl.col("loss") == loss))
            axes.set_title(LOSS_NAMES.get(loss, loss))
        handles = [
            Line2D(
                [],
                [],
                marker=mark,
                ls="",
                color=INK,
                mfc="none" if name == "tokens" else INK,
                ms=6,
                label=label,
            )
            for name, (mark, label) in _MARKS.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handletextpad=0.2)
    return figure


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
    axes.axhline(0, color=MUTED, lw=0.7)
    axes.set_xticks(range(4), list(QUADRANT_COLORS))
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.locator_params(axis="y", nbins=4)


def _share_marks(axes: Axes, part: pl.DataFrame) -> None:
    for row in part.iter_rows(named=True):
        if row["share"] is None:
            continue
        place = list(QUADRANT_COLORS).index(row["quadrant"])
        offset = 0.22 * (list(_MARKS).index(row["quantity"]) - 1)
        mark, _ = _MARKS[row["quantity"]]
        color = QUADRANT_COLORS[row["quadrant"]]
        if row["low"] is not None and row["high"] is not None:
            axes.plot([row["low"], row["high"]], [place + offset] * 2, color=color, lw=1.4)
        hollow = row["quantity"] == "tokens"
        axes.plot(
            row["share"],
            place + offset,
            mark,
            ms=6.5,
            color=color,
            mfc="none" if hollow else color,
            mew=1.5,
        )
    axes.axvline(0, color=MUTED, lw=0.7)
    axes.set_yticks(range(4), list(QUADRANT_COLORS))
    axes.set_ylim(3.6, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="x")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
