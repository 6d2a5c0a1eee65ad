"""What the command line prints: a stage's summary, a result table, the verdicts on the paper's
claims."""

import os
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import polars as pl

WIDTH_OF_FILES = 120
"""Columns of what is printed into a file or a pipe, which has no width of its own."""

console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_FILES)


def show_claims(claims: "pl.DataFrame") -> None:
    """Print the verdict on each claim, ours beside the paper's."""
    table = Table(box=None, header_style="dim")
    for name in (
        "claim",
        "arms",
        "difference [95 % interval]",
        "seeds",
        "verdict",
        "paper's differences (median, range)",
    ):
        table.add_column(name)
    for row in claims.iter_rows(named=True):
        ours = f"{_points(row['effect'])} [{_points(row['low'])}, {_points(row['high'])}]"
        paper = (
            f"{_points(row['paper_median'])} ({_points(row['paper_min'])} to"
            f" {_points(row['paper_max'])})"
        )
        arms = f"{row['arm_a']} {row['relation']} {row['arm_b']}"
        table.add_row(row["claim"], arms, ours, _shown(row["num_seeds"]), row["verdict"], paper)
    console.print(
        "[bold]the paper's claims on this pair[/] (differences in points of accuracy, over seeds)"
    )
    console.print(table)


def _points(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f}"


def show_summary(title: str, summary: dict[str, Any]) -> None:
    """Print a stage's summary, one line a figure."""
    console.print(f"[bold]{title}", soft_wrap=True)
    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), _shown(value))
    console.print(table)


def show_table(title: str, frame: "pl.DataFrame") -> None:
    """Print a result table; headings give way before cells do."""
    console.print(f"[bold]{title}", soft_wrap=True)
    table = Table(box=None, header_style="dim")
    for name, dtype in frame.schema.items():
        numeric = dtype.is_numeric()
        table.add_column(
            name.replace("_", " "), justify="right" if numeric else "left", no_wrap=not numeric
        )
    for row in frame.iter_rows():
        table.add_row(*(_shown(value, digits=3) for value in row))
    console.print(table)


def _shown(value: Any, digits: int = 4) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:,.{digits}g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item, digits)}" for name, item in value.items()) or "–"
    return str(value)
