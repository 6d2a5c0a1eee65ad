"""Figures of what a step on one group of tokens does to the others."""

import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.figure import Figure

from tip_analysis.core.result_tables import InfluenceMatrix, checked
from tip_analysis.core.words import number
from tip_analysis.figures.style import INK, PAGE_WIDTH, WIDE, figure_style, new_figure

FORMS = {
    "cosine": "cosine of the groups' gradients",
    "influence": "⟨∇L of the source, ∇L of the target⟩",
    "per_token": "the same, per unit of both groups' weights",
}


def influence_matrix(
    table: pl.DataFrame, *, form: str = "cosine", width: float = PAGE_WIDTH
) -> Figure:
    """A square for every source and target, with value and interval; blue lowers the target's loss,
    red raises it.

    Args:
        table: an `InfluenceMatrix`.
        form: `cosine`, `influence` or `per_token`.
    """
    table = checked(table, InfluenceMatrix)
    names = table["source"].unique(maintain_order=True).to_list()
    values = _square(table, form, names)
    labels = np.array([[_label(row) for row in line] for line in _cells(table, form, names)])
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    size = min(width, 1.15 * len(names) + 2.0)
    with figure_style(8.0):
        figure, axes = new_figure(size if width >= WIDE else width, min(size, width) * 0.8)
        sns.heatmap(
            values,
            ax=axes,
            annot=labels,
            fmt="",
            cmap="vlag_r",
            vmin=-largest,
            vmax=largest,
            xticklabels=names,
            yticklabels=names,
            linewidths=1.5,
            linecolor=(0, 0, 0, 0),
            cbar_kws={"label": FORMS[form], "shrink": 0.8},
            annot_kws={"fontsize": 7},
        )
        axes.set_xlabel("whose loss changes (target)")
        axes.set_ylabel("whose tokens are stepped on (source)")
        axes.tick_params(length=0, labelcolor=INK)
        axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    return figure


def _cells(table: pl.DataFrame, form: str, names: list[str]) -> list[list[tuple]]:
    columns = [form, f"{form}_low", f"{form}_high"]
    have = [name if name in table.columns else form for name in columns]
    known = {
        (row[0], row[1]): row[2:] for row in table.select("source", "target", *have).iter_rows()
    } if len(set(have)) == 3 else {
        (a, b): (value, None, None)
        for a, b, value in table.select("source", "target", form).iter_rows()
    }  # fmt: skip
    return [[known.get((a, b), (None, None, None)) for b in names] for a in names]


def _square(table: pl.DataFrame, form: str, names: list[str]) -> np.ndarray:
    cells = _cells(table, form, names)
    return np.array([[np.nan if cell[0] is None else cell[0] for cell in row] for row in cells])


def _label(cell: tuple) -> str:
    value, low, high = cell
    if value is None:
        return "–"
    if low is None or high is None:
        return number(value, 2)
    return f"{number(value, 2)}\n[{number(low, 2)}, {number(high, 2)}]"
