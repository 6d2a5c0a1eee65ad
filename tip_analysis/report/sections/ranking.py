"""The section on rules compared without training: a league table, and whether it predicts."""

from collections.abc import Sequence

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.rank_stage import run_rankings
from tip_analysis.analysis.rank_validity import ranking_validity, validity_sentence
from tip_analysis.analysis.ranking import league_table
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.names import RankFigure
from tip_analysis.core.words import interval, number, plural
from tip_analysis.figures.ranking import FIGURE_NAMES
from tip_analysis.report.page import Block, Measured, Missing, Part, Section, Table, picture
from tip_analysis.report.sections.overview import label_of, slug_of

DRAWN = (RankFigure.COSINE_LOSS, RankFigure.PHI_POSITIVE)
"""The figure that is drawn: the first that was measured."""


def ranking(views: Sequence[RunView]) -> Section:
    """Selection rules at equal budget, without training."""
    return Section(
        "ranking",
        "Rules ranked without training",
        [_part(view, label_of(view, views)) for view in views],
        shows=(
            "what each rule keeps at the same ρ, and which ranks cannot be ruled out for it: the"
            " differences of all pairs are judged together, in the same resamples of prompts."
        ),
        shows_not=(
            "which rule trains best, unless the correlation with trained accuracy says so: these"
            " figures describe the first step only."
        ),
    )


def _part(view: RunView, label: str) -> Part:
    if not view.run.has("rankings"):
        command = f"tip-analysis rank-rules {view.run.path} --cosines"
        return Part("", [Missing("Rules have not been ranked.", command)], run=label)
    rankings = run_rankings(view.run)
    table = league_table(rankings)
    blocks: list[Block] = [_league_picture(view, table), _league_block(table)]
    finding = _finding(table)
    if view.run.has("ablations"):
        validity = ranking_validity(rankings, view.run.ablations().collect())
        finding += f" {validity_sentence(validity)}"
        if validity.height:
            blocks.append(_validity_block(validity))
    note = (
        f"{plural(table['num_tokens'][0], 'token')} whose gradients were measured,"
        f" {plural(table['num_prompts'][0], 'prompt')}. Intervals are 95%, from resamples of"
        " prompts; masks are held."
    )
    return Part(finding, blocks, note, label)


def _drawn(table: pl.DataFrame) -> RankFigure:
    have = set(table.drop_nulls("value")["figure"].cast(pl.String))
    return next((figure for figure in DRAWN if figure in have), RankFigure.PHI_POSITIVE)


def _finding(table: pl.DataFrame) -> str:
    figure = _drawn(table)
    rows = table.filter(pl.col("figure") == str(figure)).drop_nulls("value")
    ratios = [
        (ratio, part)
        for (ratio,), part in rows.group_by("retention_ratio", maintain_order=True)
        if part.height > 1
    ]
    if not ratios:
        return "One rule was ranked."
    ratio, part = ratios[0]
    best = part.sort("rank").row(0, named=True)
    tied = part.filter(pl.col("rank_low") == 1).height
    words = (
        f"At ρ = {ratio:g} the first by {FIGURE_NAMES[figure]} is {best['rule']}"
        f" ({number(best['value'])})"
    )
    if tied == 1:
        return f"{words}, told apart from every other rule."
    return f"{words}, but {plural(tied, 'rule')} may be first: they cannot be told apart."


def _league_picture(view: RunView, table: pl.DataFrame) -> Block:
    figure = _drawn(table)
    return picture(
        lambda width: figures.league(table, figure=figure, width=width),
        key=f"ranking-{slug_of(view)}",
        caption=(
            f"Rules in the order of {FIGURE_NAMES[figure]} with 95% intervals; in front of a name"
            " the ranks that it may have."
        ),
        alt=f"Rules in the order of {FIGURE_NAMES[figure]}; the table below has the numbers.",
    )


def _league_block(table: pl.DataFrame) -> Table:
    shown = [figure for figure in RankFigure if figure in set(table["figure"].cast(pl.String))]
    rows = []
    for (ratio, rule), part in table.group_by("retention_ratio", "rule", maintain_order=True):
        cells = {str(row["figure"]): row for row in part.iter_rows(named=True)}
        rows.append(
            (ratio, [f"{ratio:g}", str(rule), *(_cell(cells.get(figure)) for figure in shown)])
        )
    rows.sort(key=lambda row: row[0])
    columns = ["ρ", "rule", *(FIGURE_NAMES[figure] for figure in shown)]
    caption = "What each rule keeps, with its interval and (in brackets) the ranks it may have."
    numeric = frozenset(range(2, len(columns)))
    return Table(columns, [cells for _, cells in rows], caption, numeric, dense=True)


def _cell(row: dict | None) -> str | Measured:
    if row is None or row["value"] is None:
        return "–"
    low, high = row["rank_low"], row["rank_high"]
    ranks = f"{low}" if low == high else f"{low}–{high}"
    return Measured(
        f"{number(row['value'])} ({ranks})", interval(row["low"], row["high"], as_share=False)
    )


def _validity_block(validity: pl.DataFrame) -> Table:
    rows = [
        [
            row["benchmark"],
            FIGURE_NAMES[RankFigure(row["figure"])],
            "all arms" if row["retention_ratio"] is None else f"ρ = {row['retention_ratio']:g}",
            str(row["num_arms"]),
            number(row["spearman"]),
            interval(row["low"], row["high"], as_share=False),
            row["verdict"],
        ]
        for row in validity.iter_rows(named=True)
    ]
    columns = ["benchmark", "figure", "over", "arms", "Spearman", "95% interval", "verdict"]
    caption = "Rank correlation of each figure with trained accuracy; over all arms budgets differ."
    return Table(columns, rows, caption, frozenset({3, 4, 5}))
