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
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter

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
CREATOR = "tip-analysis figure"
"""The mark of a file that this room wrote."""
SEQUENTIAL = "mako_r"
WIDE = 5.0
"""Inches from which panels stand side by side."""
Panels = tuple[Figure, np.ndarray]
"""A figure and its panels."""


_QUIET: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
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
_SIZES = {
    "font.size": 0,
    "axes.titlesize": 0,
    "axes.labelsize": 0,
    "xtick.labelsize": -1,
    "ytick.labelsize": -1,
    "legend.fontsize": -1,
}
"""Points over or under the size of the text."""


@contextmanager
def figure_style(font_size: float = 9.0) -> Iterator[None]:
    """The look of all figures: quiet axes, text kept as text, no state left behind."""
    sizes = {name: font_size + more for name, more in _SIZES.items()}
    settings: dict[Any, Any] = {**_QUIET, **sizes}
    with mpl.rc_context(settings):
        yield


def save_figure(
    figure: Figure, path: str | Path, *, dpi: int = 300, suffix: str | None = None
) -> Path:
    """Write a figure as its suffix says: .pdf and .svg are vector, .png is for slides. Equal
    figures give equal bytes.

    Args:
        figure: any figure of this room.
        path: where it is written.
        dpi: of rasters.
        suffix: the kind of file, where the path does not end so.
    """
    path = Path(path)
    kind = suffix or path.suffix
    metadata: dict[str, Any] = {
        ".pdf": {"CreationDate": None, "ModDate": None, "Creator": CREATOR},
        ".svg": {"Date": None, "Creator": CREATOR},
    }.get(kind, {})
    with figure_style():
        figure.savefig(path, dpi=dpi, metadata=metadata, format=kind.removeprefix("."))
    return path


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches, with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def new_panels(shape: tuple[int, int], size: tuple[float, float], **options: Any) -> Panels:
    """A figure of `size` (inches), and its panels as an array of `shape`."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, np.asarray(figure.subplots(*shape, squeeze=False, **options))


def quadrant_handles() -> list[Patch]:
    """A legend's entries for the colours of the quadrants."""
    return [Patch(color=color, label=name) for name, color in QUADRANT_COLORS.items()]


def percent_axis(axis: Axis, symbol: str = "%") -> None:
    """Ticks of shares in [0, 1] as whole percents."""
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=symbol))


def list_down(axes: Axes, labels: Sequence[str], margin: float = 0.4, **options: Any) -> None:
    """Rows of a figure from the top down, each with its label and no tick."""
    axes.set_yticks(range(len(labels)), labels, **options)
    axes.set_ylim(len(labels) - margin, margin - 1.0)
    axes.tick_params(axis="y", length=0, labelcolor=INK)


def interval_along(axes: Axes, low: Any, high: Any, place: float, **style: Any) -> None:
    """A horizontal interval; nothing where it has no ends."""
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], **style)


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
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
