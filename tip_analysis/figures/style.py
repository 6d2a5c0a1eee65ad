"""The look of all figures: sizes, colours, text as text, and what the paper's own values look
like.

Colours are the Okabe-Ito set, told apart with any common colour-vision deficiency: the blues are
the uncertain half of the taxonomy (Q1, Q2), vermilion the overconfident tokens (Q3), grey the
solved ones (Q4). The paper's own values are always drawn as hollow marks or hatched bands, never in
a colour of ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Quadrant

PAGE_WIDTH = 7.0
"""Inches: the text block of a paper, or the column of the report."""
COLUMN_WIDTH = 3.4
"""Inches: one column of a two-column paper, or a phone."""

QUADRANT_COLORS: dict[str, str] = {
    Quadrant.Q1.value: "#0072b2",
    Quadrant.Q2.value: "#56b4e9",
    Quadrant.Q3.value: "#d55e00",
    Quadrant.Q4.value: "#98a2ae",
}
QUADRANT_NAMES: dict[str, str] = {
    Quadrant.Q1.value: "uncertain, disagreeing",
    Quadrant.Q2.value: "uncertain, agreeing",
    Quadrant.Q3.value: "confident, disagreeing",
    Quadrant.Q4.value: "confident, agreeing",
}
INK, MUTED, GRID, SURFACE = "#1f2430", "#5b6472", "#d8dde4", "#fefefe"
"""Text, secondary text, rules and the ground; the report replaces them by those of the reader's
theme."""
ON_LIGHT, ON_BLUE = "#101418", "#fffffe"
"""Text on a light colour, and on the dark blue of Q1."""
SEQUENTIAL = "mako_r"
WIDE = 5.0
"""Inches from which panels stand side by side."""


@contextmanager
def figure_style(font_size: float = 9.0) -> Iterator[None]:
    """The look of all figures: quiet axes, text kept as text, no state left behind."""
    settings: dict[Any, Any] = {
        "font.size": font_size,
        "font.family": "DejaVu Sans",
        "axes.titlesize": font_size,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": font_size,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": font_size - 1,
        "ytick.labelsize": font_size - 1,
        "legend.fontsize": font_size - 1,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "tip-analysis",
        "pdf.fonttype": 42,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.formatter.use_mathtext": False,
    }
    with mpl.rc_context(settings):
        yield


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 300) -> Path:
    """Write a figure as its suffix says: .pdf and .svg are vector, .png is for slides. Equal
    figures give equal bytes."""
    path = Path(path)
    metadata: dict[str, Any] = {
        ".pdf": {"CreationDate": None, "ModDate": None},
        ".svg": {"Date": None},
    }.get(path.suffix, {})
    with figure_style():
        figure.savefig(path, dpi=dpi, metadata=metadata)
    return path


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches, with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def require(table: pl.DataFrame, columns: Sequence[str]) -> None:
    """Say which columns of a result table are missing.

    Raises:
        SchemaError: a column is not there.
    """
    if missing := [name for name in columns if name not in table.columns]:
        raise SchemaError(
            f"the figure needs the column(s) {', '.join(missing)}; the table has"
            f" {', '.join(table.columns)}"
        )


def short(text: str, length: int = 24) -> str:
    """A label cut to what fits."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def paper_band(
    x: float, y: float, width: float, height: float, label: str | None = None
) -> Rectangle:
    """What the paper reports: always a hatched band without a colour of its own."""
    return Rectangle(
        (x, y),
        width,
        height,
        facecolor="none",
        edgecolor=MUTED,
        hatch="////",
        lw=0.8,
        zorder=0.5,
        label=label,
    )


def plain_number(value: float, _position: int | None = None) -> str:
    """0.001, 1, 10; powers only beyond what reads well."""
    return (
        f"{value:.2g}"
        if value == 0 or 1e-4 <= abs(value) < 1e5
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )
