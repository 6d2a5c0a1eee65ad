"""The figure of what moved between two runs of the same rollouts."""

import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.figure import Figure

from tip_analysis.core.result_tables import QuadrantFlowTable, checked
from tip_analysis.figures.style import (
    INK,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    SEQUENTIAL,
    figure_style,
    new_figure,
)


def quadrant_flow(
    table: pl.DataFrame, *, names: tuple[str, str] = ("a", "b"), width: float = PAGE_WIDTH
) -> Figure:
    """Where the tokens of each quadrant of one run are in the other, as shares of all.

    Args:
        table: a `QuadrantFlowTable`.
        names: of both runs, for the axes.
    """
    table = checked(table, QuadrantFlowTable).sort("quadrant_a", "quadrant_b")
    shares = table["share"].fill_null(np.nan).to_numpy().reshape(4, 4)
    size = min(width, 4.2)
    with figure_style():
        figure, axes = new_figure(size, 0.78 * size)
        sns.heatmap(
            shares,
            ax=axes,
            vmin=0,
            cmap=SEQUENTIAL,
            annot=True,
            fmt=".1%",
            cbar=False,
            xticklabels=list(QUADRANT_COLORS),
            yticklabels=list(QUADRANT_COLORS),
            linewidths=1.5,
            linecolor=(0, 0, 0, 0),
        )
        axes.set_xlabel(f"in {names[1]}")
        axes.set_ylabel(f"in {names[0]}")
        axes.tick_params(length=0, labelcolor=INK, labelrotation=0)
    return figure
