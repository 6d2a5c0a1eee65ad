"""What the command line prints: a stage's summary, a result table, the verdicts on the paper's
claims.

Texts are shown as they are: no markup, no emoji codes, and control characters spelled out, since
names come from files. Styles of our own are `rich.text.Text`.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tip_analysis.core.terminal import stdout_console
from tip_analysis.core.text import shown
from tip_analysis.core.words import points

if TYPE_CHECKING:
    import polars as pl

WIDTH_OF_FILES = 120
"""Columns of what is printed into a file or a pipe, which has no width of its own."""


def _width() -> int | None:
    has_width = (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ
    return None if has_width else WIDTH_OF_FILES


console = stdout_console(width=_width())


def show_claims(claims: "pl.DataFrame") -> None:
    """Print the verdict on each claim, ours beside the paper's."""
    table = Table(box=None, header_style="dim")
    for name in (
        "claim",
        "benchmark",
        "arms",
        "difference [95 % interval]",
        "seeds",
        "verdict",
        "paper's differences (median, range)",
    ):
        table.add_column(name)
    for row in claims.iter_rows(named=True):
        ours = f"{points(row['effect'])} [{points(row['low'])}, {points(row['high'])}]"
        paper = (
            f"{points(row['paper_median'])} ({points(row['paper_min'])} to"
            f" {points(row['paper_max'])})"
        )
        arms = f"{row['arm_a']} {row['relation']} {row['arm_b']}"
        benchmark = row["benchmark"] or "–"
        table.add_row(
            row["claim"], benchmark, arms, ours, shown(row["num_seeds"]), row["verdict"], paper
        )
    title = Text("the paper's claims on this pair", style="bold")
    console.print(
        title.append(" (differences in points of accuracy, over seeds)", style="not bold")
    )
    console.print(table)


def show_summary(title: str, summary: dict[str, Any]) -> None:
    """Print a stage's summary, one line a figure."""
    console.print(title, style="bold", soft_wrap=True)
    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), shown(value))
    console.print(table)


def show_note(label: str, text: str) -> None:
    """Print a remark under a coloured label."""
    console.print(Text(f"{label} ", style="yellow"), text, soft_wrap=True, sep="")


def show_table(title: str, frame: "pl.DataFrame") -> None:
    """Print a result table; headings give way before cells do."""
    console.print(title, style="bold", soft_wrap=True)
    table = Table(box=None, header_style="dim")
    for name, dtype in frame.schema.items():
        numeric = dtype.is_numeric()
        table.add_column(
            name.replace("_", " "), justify="right" if numeric else "left", no_wrap=not numeric
        )
    for row in frame.iter_rows():
        table.add_row(*(shown(value, digits=3) for value in row))
    console.print(table)


RANKED_BY = ("cosine_loss", "phi_positive")
"""The figure that a printed league table is ordered by: the first that was measured."""


def league_by_ratio(league: "pl.DataFrame") -> "list[tuple[str, pl.DataFrame]]":
    """A league table for each ratio: a rule a row, a figure a column, and the ranks that a rule may
    have by one of them."""
    import polars as pl

    known = set(league.drop_nulls("value")["figure"].cast(pl.String))
    by = next((figure for figure in RANKED_BY if figure in known), None)
    tables = []
    for (ratio,), part in league.group_by("retention_ratio", maintain_order=True):
        wide = part.pivot(on="figure", index="rule", values="value", maintain_order=True)
        if by is not None:
            ranks = part.filter(pl.col("figure") == by).select(
                "rule", "rank", ranks=pl.format("{} to {}", "rank_low", "rank_high")
            )
            wide = wide.join(ranks, on="rule", how="left").sort("rank", "rule", nulls_last=True)
            wide = wide.drop("rank")
        tables.append((float(ratio), wide))
    return [
        (f"rules at ρ = {ratio:g}; ranks by {by or 'nothing'} that cannot be ruled out", table)
        for ratio, table in sorted(tables, key=lambda entry: entry[0])
    ]
