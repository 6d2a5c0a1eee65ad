"""Figures of the taxonomy: shares of the quadrants, their map, and their sensitivity to the
cuts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from tip_analysis.core.result_tables import (
    CutSensitivityTable,
    DensityTable,
    QuadrantShareTable,
    checked,
)
from tip_analysis.figures.style import (
    INK,
    ON_BLUE,
    ON_LIGHT,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    QUADRANT_NAMES,
    SEQUENTIAL,
    WIDE,
    figure_style,
    interval_along,
    new_figure,
    new_panels,
    paper_band,
    percent_axis,
    plain_number,
    quadrant_handles,
    short,
)


def quadrant_shares(
    table: pl.DataFrame,
    paper_ranges: Mapping[str, tuple[float, float]],
    *,
    width: float = PAGE_WIDTH,
) -> Figure:
    """Share of tokens in each quadrant, with intervals, beside the ranges that the paper reports.

    Args:
        table: a `QuadrantShareTable`.
        paper_ranges: quadrants as `Q3`, or a sum of two as `Q1+Q2`, to (low, high) in [0, 1].
    """
    table = checked(table, QuadrantShareTable)
    runs = table.partition_by("run", as_dict=True, maintain_order=True)
    names = {str(key[0]): rows for key, rows in runs.items()}
    with figure_style():
        figure, axes = new_figure(width, 0.75 + len(_BAR_GROUPS) * (0.26 + 0.26 * len(names)))
        ticks: dict[float, str] = {}
        y = 0.0
        for group in _BAR_GROUPS:
            y = _share_group(axes, names, group, ticks, y, paper_ranges.get("+".join(group)))
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_ylim(y - 0.8, -0.8)
        axes.set_xlim(0, max(0.62, float(axes.get_xlim()[1])))
        percent_axis(axes.xaxis)
        axes.set_xlabel("share of response tokens")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        handles = [*quadrant_handles(), paper_band(0, 0, 1, 1, label="the paper's range")]
        columns = 5 if width >= WIDE else 3
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.2)
    return figure


_BAR_GROUPS = (("Q1", "Q2"), ("Q3",), ("Q4",))
"""Quadrants that lie end to end in one bar."""


def _share_group(
    axes: Axes,
    runs: Mapping[str, pl.DataFrame],
    group: Sequence[str],
    ticks: dict[float, str],
    y: float,
    paper_range: tuple[float, float] | None,
) -> float:
    """The bars of a group, one a run, over the paper's range; returns where the next group
    starts."""
    top, key = y - 0.62, "+".join(group)
    for run, rows in runs.items():
        _stacked_share(axes, rows, group, y)
        ticks[y] = key if len(runs) == 1 else f"{key}  {short(run)}"
        y += 1.0
    if paper_range is not None:
        low, high = paper_range
        axes.add_patch(paper_band(low, top, high - low, y - 1.0 + 0.62 - top))
    return y + 0.6


def quadrant_map(
    density: pl.DataFrame,
    *,
    entropy_cut: float | None,
    divergence_cut: float | None,
    shares: Mapping[str, float],
    width: float = PAGE_WIDTH,
) -> Figure:
    """Density of tokens over student entropy and reverse KL, coloured by quadrant, with both cuts.

    Args:
        density: a `DensityTable`.
        entropy_cut: nats; None draws no line (one cut for each batch).
        divergence_cut: likewise.
        shares: share of each quadrant, in [0, 1].
    """
    density = checked(density, DensityTable)
    with figure_style():
        figure, axes = new_figure(width, min(width * 0.66, 4.4) if width >= WIDE else width * 1.0)
        if density.height:
            _density_image(axes, density)
        if entropy_cut:
            axes.axvline(entropy_cut, color=INK, lw=1.0)
        if divergence_cut:
            axes.axhline(divergence_cut, color=INK, lw=1.0)
        axes.set_xlabel("student entropy, nats")
        axes.set_ylabel("reverse KL, nats")
        _name_corners(axes, shares, named=width >= WIDE)
    return figure


def cut_sensitivity(
    grid: pl.DataFrame,
    *,
    entropy_cut: float | None,
    divergence_cut: float | None,
    width: float = PAGE_WIDTH,
) -> Figure:
    """How the shares move with both cuts: the Q3 share over the plane of cuts, and the four shares
    along each axis.

    Args:
        grid: a `CutSensitivityTable`.
        entropy_cut: the cut in use, nats; None where there is one for each batch.
        divergence_cut: likewise.
    """
    grid = checked(grid, CutSensitivityTable)
    wide = width >= WIDE
    cuts = {"entropy_cut": entropy_cut, "divergence_cut": divergence_cut}
    with figure_style():
        size = width, 2.9 if wide else width * 2.3
        figure, panels = new_panels((1, 3) if wide else (3, 1), size)
        plane, *along = panels.flat
        _plane_of_cuts(figure, plane, grid, entropy_cut, divergence_cut)
        for axes, moved, held in zip(along, cuts, reversed(cuts), strict=True):
            nearest = _nearest(grid[held], cuts[held])
            _shares_along(axes, grid.filter(pl.col(held) == nearest), moved, cuts[moved])
            axes.set_xlabel(f"{moved.replace('_', ' ')}, nats")
            axes.set_title(f"{held.replace('_', ' ')} {plain_number(nearest)}")
    return figure


def _name_corners(axes: Axes, shares: Mapping[str, float], *, named: bool) -> None:
    """The quadrants and their shares, just outside the four corners, where no token is hidden."""
    below = -0.115 if named else -0.24
    corners = {"Q3": (0.0, 1.025), "Q1": (1.0, 1.025), "Q4": (0.0, below), "Q2": (1.0, below)}
    for name, (x, y) in corners.items():
        text = f"{name}  {shares.get(name, 0.0):.1%}" + (
            f"  {QUADRANT_NAMES[name]}" if named else ""
        )
        on_left, above = x == 0.0, y > 0.0
        axes.annotate(
            text,
            (x + (0.025 if named else 0.05) * on_left, y),
            xycoords="axes fraction",
            ha="left" if on_left else "right",
            va="bottom" if above else "top",
            fontweight="bold",
            fontsize=8.5,
        )
        beside = 0.008 if on_left else 0.014 if named else 0.035
        swatch = x + beside, y + (0.018 if above else -0.022) * (1 if named else 1.4)
        axes.plot(
            *swatch, "s", ms=6, color=QUADRANT_COLORS[name], transform=axes.transAxes, clip_on=False
        )


def _stacked_share(axes: Axes, rows: pl.DataFrame, group: Sequence[str], y: float) -> None:
    """One horizontal bar: the shares of a group of quadrants end to end, each with its interval at
    its end."""
    values = {row["quadrant"]: row for row in rows.iter_rows(named=True)}
    left, end, outside = 0.0, 0.0, ""
    for name in group:
        row = values.get(name, dict.fromkeys(("share", "share_low", "share_high")))
        share = float(row["share"] or 0.0)
        axes.barh(y, share, left=left, height=0.62, color=QUADRANT_COLORS[name], zorder=2)
        if row["share_low"] is not None and row["share_high"] is not None:
            low, high = left + row["share_low"], left + row["share_high"]
            style = {"color": INK, "lw": 1.4, "zorder": 4, "solid_capstyle": "butt"}
            interval_along(axes, low, high, y + 0.2, **style)
            end = max(end, high)
        if share > 0.06:
            color = ON_BLUE if name == "Q1" else ON_LIGHT
            axes.text(left + 0.008, y - 0.06, f"{share:.1%}", color=color, **_BOLD)
        elif len(group) > 1:  # over its own segment: beside the bar it would seem another's
            above: dict[str, Any] = {**_BOLD, "va": "bottom"}
            axes.text(left, y - 0.33, f"{name} {share:.1%}", **above)
        else:
            outside = f"{share:.1%}"
        left += share
        end = max(end, left)
    if outside:
        axes.text(end + 0.008, y, outside, **_BOLD)


_BOLD: dict[str, Any] = {"va": "center", "zorder": 5, "fontsize": 8, "fontweight": "bold"}


def _density_image(axes: Axes, density: pl.DataFrame) -> None:
    """Cells as one raster image: hue from the quadrant, opacity from the logarithm of the density
    per cell."""
    x = _edges(density, "entropy")
    y = _edges(density, "divergence")
    image = np.zeros((len(y) - 1, len(x) - 1, 4))
    columns = np.searchsorted(x, density["entropy_left"].to_numpy())
    rows = np.searchsorted(y, density["divergence_left"].to_numpy())
    weight = np.log1p(density["num_tokens"].to_numpy())
    image[rows, columns, :3] = [to_rgb(QUADRANT_COLORS[str(name)]) for name in density["quadrant"]]
    image[rows, columns, 3] = 0.4 + 0.6 * weight / weight.max()
    mesh = axes.pcolormesh(x, y, image, rasterized=True, zorder=1)
    mesh.set_edgecolor("none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(plain_number))


def _edges(density: pl.DataFrame, axis: str) -> np.ndarray:
    left, right = density[f"{axis}_left"].to_numpy(), density[f"{axis}_right"].to_numpy()
    return np.unique(np.concatenate([left, right]))


def _plane_of_cuts(
    figure: Figure,
    axes: Axes,
    grid: pl.DataFrame,
    entropy_cut: float | None,
    divergence_cut: float | None,
) -> None:
    """Share of Q3 over all pairs of cuts, evenly spaced by rank, outlined where the paper's ranges
    hold."""
    x, y = np.unique(grid["entropy_cut"].to_numpy()), np.unique(grid["divergence_cut"].to_numpy())
    ordered = grid.unique(["entropy_cut", "divergence_cut"]).sort("divergence_cut", "entropy_cut")
    q3 = ordered["Q3"].to_numpy().reshape(len(y), len(x))
    holds = ordered["in_paper_ranges"].to_numpy().reshape(len(y), len(x))
    left, bottom = np.arange(len(x) + 1) - 0.5, np.arange(len(y) + 1) - 0.5
    colors = sns.color_palette(SEQUENTIAL, as_cmap=True)
    mesh = axes.pcolormesh(left, bottom, q3, cmap=colors, vmin=0, rasterized=True)
    for row, column in np.argwhere(holds):
        axes.add_patch(_holding(row, column))
    if entropy_cut is not None and divergence_cut is not None:
        column, row = _index_of(x, entropy_cut), _index_of(y, divergence_cut)
        if column is not None and row is not None:
            axes.plot(column, row, marker="o", ms=7, mfc="#ffffff", mec=ON_LIGHT, mew=1.4)
    _value_ticks(axes, x, y)
    axes.set_xlabel("entropy cut, nats")
    axes.set_ylabel("divergence cut, nats")
    axes.set_title("share of Q3")
    bar = figure.colorbar(
        mesh, ax=axes, format=PercentFormatter(1, decimals=0), pad=0.02, aspect=30
    )
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _holding(row: int, column: int) -> Rectangle:
    """The hatching of a cell where the paper's ranges hold."""
    place = column - 0.5, row - 0.5
    return Rectangle(place, 1, 1, facecolor="#ffffff70", edgecolor=ON_LIGHT, hatch="/////", lw=0)


def _value_ticks(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Cells are evenly spaced by rank of the cut; ticks name a few of the values."""
    for values, setter in ((x, axes.set_xticks), (y, axes.set_yticks)):
        chosen = np.unique(np.linspace(0, len(values) - 1, 4).round().astype(int))
        setter(chosen, [plain_number(float(values[index])) for index in chosen])


def _index_of(values: np.ndarray, value: float) -> float | None:
    """Fractional index of `value` among increasing `values`; None beyond their ends, where no place
    of the grid would be its own."""
    if not values[0] <= value <= values[-1]:
        return None
    return float(np.interp(value, values, np.arange(len(values))))


def _nearest(values: pl.Series, value: float | None) -> float:
    """The value of the grid next to `value`, or the middle one."""
    unique = values.unique().sort().to_numpy()
    return float(unique[len(unique) // 2 if value is None else np.abs(unique - value).argmin()])


def _shares_along(axes: Axes, rows: pl.DataFrame, column: str, chosen: float | None) -> None:
    """The four shares, stacked, along one cut."""
    rows = rows.unique(column).sort(column)
    x, values = np.arange(rows.height), rows[column].to_numpy()
    shares = [rows[name].to_numpy() for name in QUADRANT_COLORS]
    axes.stackplot(x, *shares, colors=list(QUADRANT_COLORS.values()), lw=0)
    if chosen is not None and (place := _index_of(values, chosen)) is not None:
        axes.axvline(place, color=ON_LIGHT, lw=1.2)
    bottom = np.cumsum([np.zeros(len(x)), *shares], axis=0)
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": ON_LIGHT}
    style |= {"fontsize": 8, "fontweight": "bold"}
    for index, name in enumerate(QUADRANT_COLORS):
        widest = int(np.argmax(shares[index][1:-1])) + 1 if len(x) > 2 else 0
        if shares[index][widest] > 0.12:
            height = (bottom[index][widest] + bottom[index + 1][widest]) / 2
            axes.text(widest, height, name, **style)
    ticks = np.unique(np.linspace(0, len(values) - 1, 4).round().astype(int))
    axes.set_xticks(ticks, [plain_number(float(values[index])) for index in ticks])
    axes.set_xlim(0, max(1, len(x) - 1))
    axes.set_ylim(0, 1)
    percent_axis(axes.yaxis)
