"""Figures of selections: what each rule picks, how far rules agree, and how much of a quantity they
keep."""

import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from tip_analysis.analysis.rules import keeps_all, known_rules
from tip_analysis.figures.style import (
    INK,
    MUTED,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    WIDE,
    figure_style,
    require,
)

_LINES = ("-", "--", "-.", ":")
_MARKS = "osD^vPX*<>hd"


def composition(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """What each rule selects, by quadrant: one panel for each ρ, the whole table as the first bar.

    Args:
        table: `rule`, `retention_ratio`, `quadrant`, `share` (of the selection) and `token_share`
            (of all tokens).
    """
    require(table, ["rule", "retention_ratio", "quadrant", "share", "token_share"])
    ratios = sorted(table["retention_ratio"].unique())
    rules = table["rule"].unique(maintain_order=True).to_list()
    wide = width >= WIDE
    shape = (1, len(ratios)) if wide else (len(ratios), 1)
    height = 0.8 + 0.24 * (len(rules) + 1)
    with figure_style():
        figure = Figure(
            figsize=(width, height if wide else height * len(ratios)), layout="constrained"
        )
        panels = np.asarray(figure.subplots(*shape, squeeze=False, sharey=wide)).flat
        for axes, ratio in zip(panels, ratios, strict=True):
            _stacks(axes, table.filter(pl.col("retention_ratio") == ratio), rules)
            axes.set_title(f"ρ = {ratio:g}")
        handles = [Patch(color=color, label=name) for name, color in QUADRANT_COLORS.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.2)
    return figure


def overlap(table: pl.DataFrame, *, width: float = PAGE_WIDTH) -> Figure:
    """Jaccard index of every two rules at one ρ, in [0, 1].

    Args:
        table: `rule_a`, `rule_b`, `jaccard`, one row per unordered pair.
    """
    require(table, ["rule_a", "rule_b", "jaccard"])
    rules = list(dict.fromkeys([*table["rule_a"], *table["rule_b"]]))
    place = {rule: index for index, rule in enumerate(rules)}
    matrix = np.full((len(rules), len(rules)), np.nan)
    for a, b, value in table.select("rule_a", "rule_b", "jaccard").iter_rows():
        i, j = sorted((place[a], place[b]))
        matrix[j, i] = np.nan if value is None else value
    size = min(width, 0.42 * len(rules) + 2.2)
    with figure_style(8.0):
        figure = Figure(
            figsize=(size if width >= WIDE else width, min(size, width) * 0.82),
            layout="constrained",
        )
        axes = figure.subplots()
        sns.heatmap(
            matrix[1:, :-1],
            ax=axes,
            vmin=0,
            vmax=1,
            cmap="mako_r",
            annot=len(rules) <= 11,
            fmt=".2f",
            square=True,
            xticklabels=rules[:-1],
            yticklabels=rules[1:],
            linewidths=1.5,
            linecolor=(0, 0, 0, 0),
            cbar_kws={"label": "Jaccard index", "shrink": 0.7},
            annot_kws={"fontsize": 7},
        )
        axes.tick_params(length=0, labelcolor=INK)
        axes.set_xticklabels(axes.get_xticklabels(), rotation=40, ha="right")
    return figure


def coverage_curve(table: pl.DataFrame, *, label: str, width: float = PAGE_WIDTH) -> Figure:
    """The share of a quantity that each rule keeps at each ρ, with intervals; the diagonal is what
    chance keeps.

    Args:
        table: `rule`, `retention_ratio`, `share`, `share_low`, `share_high`.
        label: name of the quantity, for the axis.
    """
    require(table, ["rule", "retention_ratio", "share", "share_low", "share_high"])
    rules = table.filter(~keeps_all())["rule"].unique(maintain_order=True).to_list()
    known = known_rules(rules)
    colors = sns.color_palette("colorblind", n_colors=max(1, len(rules)))
    with figure_style():
        figure = Figure(
            figsize=(width, 3.6 if width >= WIDE else width * 1.25), layout="constrained"
        )
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (1, 2)))
        for index, rule in enumerate(rules):
            part = table.filter(pl.col("rule") == rule, pl.col("share").is_not_null()).sort(
                "retention_ratio"
            )
            x, y = part["retention_ratio"].to_numpy(), part["share"].to_numpy()
            reference = known[rule].reference if rule in known else ""
            color = INK if reference else colors[index]
            name = f"{rule} ({reference})" if reference else rule
            style = {
                "color": color,
                "ls": _LINES[index % 4],
                "marker": _MARKS[index % len(_MARKS)],
                "ms": 5,
                "lw": 1.5,
            }
            axes.plot(x, y, label=name, **style)
            known = part.drop_nulls(["share_low", "share_high"])
            if known.height:
                axes.vlines(
                    known["retention_ratio"],
                    known["share_low"],
                    known["share_high"],
                    color=color,
                    lw=1,
                    alpha=0.7,
                )
        axes.set_xlabel("retention ratio ρ")
        axes.set_ylabel(f"share of {label} kept")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlim(0, min(1.0, 1.1 * float(table["retention_ratio"].max() or 1.0)))  # pyright: ignore[reportArgumentType]
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        place = "outside right upper" if width >= WIDE else "outside lower left"
        figure.legend(loc=place, ncols=1 if width >= WIDE else 2, handlelength=2.6)
    return figure


def _stacks(axes: Axes, part: pl.DataFrame, rules: list[str]) -> None:
    whole = {str(row["quadrant"]): row["token_share"] or 0.0 for row in part.iter_rows(named=True)}
    bars = [("(all tokens)", whole)]
    for rule in rules:
        chosen = part.filter(pl.col("rule") == rule)
        bars.append(
            (
                rule,
                {str(row["quadrant"]): row["share"] or 0.0 for row in chosen.iter_rows(named=True)},
            )
        )
    for place, (_, shares) in enumerate(bars):
        left = 0.0
        for name, color in QUADRANT_COLORS.items():
            axes.barh(
                place,
                shares.get(name, 0.0),
                left=left,
                height=0.74,
                color=color,
                alpha=1.0 if place else 0.65,
            )
            left += shares.get(name, 0.0)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
