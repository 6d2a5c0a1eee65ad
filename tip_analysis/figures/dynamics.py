"""The figure of training over steps: one line an arm, its seeds as a band."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.dynamics import METRICS
from tip_analysis.core.result_tables import DynamicsCurveTable, checked
from tip_analysis.figures.rule_styles import rule_style
from tip_analysis.figures.style import PAGE_WIDTH, WIDE, figure_style, new_panels


def training_curves(
    curves: pl.DataFrame, *, words: Mapping[str, str] = METRICS, width: float = PAGE_WIDTH
) -> Figure:
    """Quantities of training over steps, a panel each; a line is the mean over seeds of an arm, and
    its band spans the seeds.

    Args:
        curves: a `DynamicsCurveTable`; a quantity without a known value gets no panel.
        words: what each quantity is called above its panel, else its name.
        width: of the figure, inches.
    """
    curves = checked(curves, DynamicsCurveTable)
    known = curves.drop_nulls("value")
    metrics = known["metric"].unique(maintain_order=True).to_list()
    arms = known["arm"].unique(maintain_order=True).to_list()
    columns = 2 if width >= WIDE else 1
    rows = -(-max(1, len(metrics)) // columns)
    with figure_style():
        figure, panels = new_panels((rows, columns), (width, 0.8 + 1.9 * rows))
        for place, axes in enumerate(panels.flat):
            if place >= len(metrics):
                axes.remove()
                continue
            _panel(axes, known.filter(metric=metrics[place]), arms)
            axes.set_title(words.get(metrics[place], metrics[place]), fontsize=9, loc="left")
            if place >= len(metrics) - columns:
                axes.set_xlabel("step")
        if metrics:
            handles, labels = panels.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower left", ncols=3 if columns > 1 else 2)
    return figure


def _panel(axes: Axes, curves: pl.DataFrame, arms: Sequence[str]) -> None:
    for arm in arms:
        part = curves.filter(arm=arm).sort("step")
        style: dict[str, Any] = {**rule_style(Arm.parse(arm).rule), "marker": ""}
        axes.plot(part["step"], part["value"], lw=1.2, label=arm, **style)
        axes.fill_between(
            part["step"], part["low"], part["high"], color=style["color"], alpha=0.15, lw=0
        )
    axes.margins(x=0.01)
