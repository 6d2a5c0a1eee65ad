"""A run, its cuts and the shares of its quadrants, as they show themselves."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Unpack

import polars as pl
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tip_analysis.analysis.confidence import warn_about_confidence
from tip_analysis.analysis.cuts import Cut, Cuts
from tip_analysis.analysis.paper_preset import PAPER_RANGES
from tip_analysis.analysis.quadrants import warn_about_cuts
from tip_analysis.analysis.run_view import ReportOptions, RunView
from tip_analysis.analysis.status import next_steps, stage_table
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, CutOptions, Taxonomy
from tip_analysis.core.errors import TipAnalysisError
from tip_analysis.core.names import Scope
from tip_analysis.core.run_folder import Run
from tip_analysis.core.text import visible
from tip_analysis.core.words import count, number, percent, plural
from tip_analysis.figures.style import QUADRANT_COLORS, QUADRANT_NAMES
from tip_analysis.report.notebook.frame import framed, swatch, table_html

MAX_SUMMARY_TOKENS = 5_000_000
"""A run of more tokens does not compute its quadrants merely because it is the last line of a
cell."""


@dataclass(frozen=True)
class QuadrantSummary:
    """Shares of the quadrants under two cuts, beside the ranges that the paper reports."""

    shares: pl.DataFrame
    """`quadrants.quadrant_shares`."""
    cuts: Cuts
    warning: str | None
    """Where the entropy cut calls tokens uncertain that are not."""

    def share(self, quadrant: str) -> float:
        """Share of a quadrant, in [0, 1]; 0 where there is no token."""
        return float(
            self.shares.filter(pl.col("quadrant").cast(pl.String) == quadrant)["share"][0] or 0.0
        )

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Quadrant, its name, number of tokens, share, the paper's range: as they are shown."""
        paper = {name: _range(name) for name in ("Q3", "Q4")} | dict.fromkeys(
            ("Q1", "Q2"), f"Q1+Q2 {_range('Q1+Q2')}"
        )
        return [
            (
                name,
                QUADRANT_NAMES[name],
                count(row["num_tokens"]),
                percent(row["share"]),
                paper[name],
            )
            for row in self.shares.iter_rows(named=True)
            for name in [str(row["quadrant"])]
        ]

    def _repr_html_(self) -> str:
        return framed(self.html())

    def html(self) -> str:
        """The summary without its frame."""
        bar = "".join(
            f'<span style="width:{self.share(name):.2%};background:{color}"></span>'
            for name, color in QUADRANT_COLORS.items()
        )
        rows = [(swatch(name), *rest) for name, *rest in self.rows()]
        header = ("quadrant", "", "tokens", "share", "in the paper")
        warning = f"<div><small>Note: {escape(self.warning)}.</small></div>" if self.warning else ""
        table = table_html(header, rows, (2, 3))
        return f'<div class="tip-bar">{bar}</div>{table}{_cuts_line(self.cuts)}{warning}'

    def __rich__(self) -> Group:
        table = Table(
            "quadrant", "", "tokens", "share", "in the paper", box=None, header_style="dim"
        )
        for name, *rest in self.rows():
            table.add_row(
                Text.assemble(("  ", Style(bgcolor=QUADRANT_COLORS[name])), f" {name}"), *rest
            )
        note = [Text(f"note: {self.warning}", style="dim")] if self.warning else []
        return Group(
            table,
            *(
                Text(_cut_words(cut), style="dim")
                for cut in (self.cuts.entropy, self.cuts.divergence)
            ),
            *note,
        )

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {share}" for name, _, _, share, _ in self.rows())
        return f"QuadrantSummary({shares})"


def _range(name: str) -> str:
    low, high = PAPER_RANGES[name]
    return f"{percent(low, 0)} to {percent(high, 0)}"


def show_quadrants(
    run: Run | str | Path, *, taxonomy: Taxonomy = DEFAULT_TAXONOMY, **cuts: Unpack[CutOptions]
) -> QuadrantSummary:
    """Shares of the quadrants of a run, as an object that shows itself.

    Args:
        run: a run with scored tokens, or its folder.
        taxonomy: where the cuts lie.
        cuts: `entropy_cut`, `divergence_cut`, `cut_scope` in place of the taxonomy's.

    Raises:
        RunError: no tokens are scored.
        OptionError: a cut has no valid form.
    """
    return _summary(open_view(run, ReportOptions(taxonomy.changed(**cuts))))


def open_view(run: Run | str | Path, options: ReportOptions) -> RunView:
    """The run with scores and quadrants, as the report reads it."""
    return RunView(run.path if isinstance(run, Run) else run, options)


def _summary(view: RunView) -> QuadrantSummary:
    found = warn_about_cuts(view.raw, view.cuts), warn_about_confidence(view.raw, view.cuts)
    messages = [one.message for one in found if one is not None]
    return QuadrantSummary(view.shares, view.cuts, "; ".join(messages) or None)


def run_html(run: Run) -> str:
    """What a run holds, its quadrants under the default cuts, and what can come next."""
    stages = stage_table(run)
    head = f"<b>Run</b> <code>{escape(visible(str(run.path), 120))}</code>"
    rows = [
        (
            row["stage"],
            row["state"],
            count(row["rows"]),
            str(row["configurations"]),
            number(row["seconds"]),
        )
        for row in stages.iter_rows(named=True)
    ]
    held = (
        table_html(("stage", "", "rows", "configurations", "seconds"), rows, (2, 3, 4))
        if rows
        else "<div>empty</div>"
    )
    steps = "<br>".join(f"<code>{escape(visible(step, 200))}</code>" for step in next_steps(run))
    return framed(
        head, held, _run_quadrants(run, stages), f"<div><small>next: {steps}</small></div>"
    )


def _run_quadrants(run: Run, stages: pl.DataFrame) -> str:
    if not run.has("tokens"):
        return ""
    num_tokens = int(stages.filter(pl.col("stage") == "score")["rows"].sum())
    if num_tokens > MAX_SUMMARY_TOKENS:
        return (
            f"<div>{count(num_tokens)} tokens: <code>tip.show_quadrants(run)</code> counts the"
            " quadrants</div>"
        )
    try:
        view = open_view(run, ReportOptions())
        names = " learns from ".join(
            f"<code>{escape(visible(name, 60))}</code>" for name in view.model_names()
        )
        return f"<div>{names}</div>{_summary(view).html()}"
    except TipAnalysisError as error:
        return f"<div>no quadrants: {escape(visible(str(error), 300))}</div>"


def cuts_html(cuts: Cuts) -> str:
    """Both cuts as they were measured."""
    return framed(_cuts_line(cuts))


def _cuts_line(cuts: Cuts) -> str:
    words = [_cut_words(cuts.entropy), _cut_words(cuts.divergence)]
    if cuts.num_infinite:
        words.append(
            f"{plural(cuts.num_infinite, 'token')} with a divergence of +∞: high, and left out of"
            " the cut"
        )
    if cuts.paper_ranges_met is not None:
        words.append(
            f"the data {'allow' if cuts.paper_ranges_met else 'do not allow'} all of the paper’s"
            " ranges"
        )
    return "".join(f"<div><small>{escape(text)}</small></div>" for text in words)


def _cut_words(cut: Cut) -> str:
    name = {"entropy": "student entropy", "divergence": "reverse KL"}[cut.axis]
    if cut.scope == Scope.BATCH:
        return (
            f"{name} is high above the {cut.spec} of its batch"
            f" ({plural(len(cut.batch_values), 'cut')})"
        )
    how = "" if cut.value is not None and cut.spec == f"{cut.value:g}" else f" ({cut.spec})"
    return f"{name} is high above {number(cut.value)} nats{how}"


def html_of(shown: Run | Cuts) -> str:
    """A run or its cuts as they show themselves in a notebook."""
    return run_html(shown) if isinstance(shown, Run) else cuts_html(shown)
