"""The section on what a step on one group of tokens does to the others."""

from collections.abc import Sequence

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.influences import (
    assumption_2,
    configurations,
    influence_matrix,
    recorded_norms,
)
from tip_analysis.analysis.measurements import run_measurement
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import Preconditioner
from tip_analysis.core.words import count, interval, number, percent, plural
from tip_analysis.report.page import Block, Missing, Part, Section, Table, picture
from tip_analysis.report.sections.overview import label_of, slug_of


def influences(views: Sequence[RunView]) -> Section:
    """What a step on one group does to the loss of another."""
    return Section(
        "influence",
        "Influence of groups on each other",
        [part for view in views for part in _parts(view, label_of(view, views))],
        shows=(
            "whether descending on the loss of one quadrant lowers or raises that of another: inner"
            " products of gradients from different prompts, so that no noise counts as agreement."
        ),
        shows_not="what many steps do: the products are those of the student as it is.",
    )


def _parts(view: RunView, label: str) -> list[Part]:
    if not view.run.has("influences"):
        command = f"tip-analysis influence {view.run.path}"
        return [Part("", [Missing("Influences have not been measured.", command)], run=label)]
    every = configurations(view.run.table("influences").collect())
    return [_part(view, rows, label, index) for index, rows in enumerate(every)]


def _part(view: RunView, rows: pl.DataFrame, label: str, index: int) -> Part:
    matrix = influence_matrix(rows, num_resamples=view.options.num_resamples)
    how = rows.select("grouping", "preconditioner", "param_scope", "loss").row(0, named=True)
    blocks: list[Block] = [_matrix_picture(view, matrix, index), _matrix_block(matrix)]
    if (dropped := _dropped(view, rows)) is not None:
        blocks.append(_dropped_block(dropped))
    num_tokens = rows.select("rollout_id", "position").n_unique()
    note = (
        f"Groups: {how['grouping']}; step: {_step_words(how['preconditioner'])}; loss {how['loss']}"
        f" over {how['param_scope']} parameters. {plural(num_tokens, 'token')},"
        f" {plural(int(matrix['num_prompts'][0]), 'prompt')}; intervals are 95%, over prompts."
    )
    return Part(_finding(matrix), blocks, note, label)


def _step_words(preconditioner: str) -> str:
    return "Adam's" if preconditioner == Preconditioner.ADAM else "plain gradient"


def _finding(matrix: pl.DataFrame) -> str:
    across = matrix.filter(pl.col("source") != pl.col("target")).drop_nulls("influence_low")
    against = across.filter(pl.col("influence_high") < 0)
    along = across.filter(pl.col("influence_low") > 0)
    total = across.height
    if against.height:
        worst = against.sort("cosine").row(0, named=True)
        return (
            f"A step on {worst['source']} raises the loss of {worst['target']}"
            f" (cosine {number(worst['cosine'])}); {against.height} of {total} pairs of groups work"
            f" against each other and {along.height} help each other."
        )
    return (
        f"No pair of groups is shown to work against each other; of {total} ordered pairs,"
        f" {along.height} are shown to help."
    )


def _matrix_picture(view: RunView, matrix: pl.DataFrame, index: int) -> Block:
    return picture(
        lambda width: figures.influence_matrix(matrix, width=width),
        key=f"influence-{index}-{slug_of(view)}",
        caption=(
            "Cosine between the gradients of two groups' losses, cross-fitted over prompts; with"
            " 95% intervals."
        ),
        alt="A matrix of cosines between groups; the table below has the numbers.",
    )


def _matrix_block(matrix: pl.DataFrame) -> Table:
    rows = [
        [
            row["source"],
            row["target"],
            number(row["influence"]),
            interval(row["influence_low"], row["influence_high"], as_share=False),
            number(row["cosine"]),
            interval(row["cosine_low"], row["cosine_high"], as_share=False),
            number(row["per_token"]),
            count(row["num_tokens"]),
        ]
        for row in matrix.iter_rows(named=True)
    ]
    columns = [
        "step on",
        "loss of",
        "influence",
        "95% interval",
        "cosine",
        "95% interval",
        "per token",
        "tokens",
    ]
    caption = "Influence of each group on each: positive lowers the other's loss."
    return Table(columns, rows, caption, frozenset(range(2, 8)))


def _dropped(view: RunView, rows: pl.DataFrame) -> pl.DataFrame | None:
    """What Assumption 2 drops, where norms of these tokens were measured."""
    if rows["preconditioner"][0] != Preconditioner.NONE or not view.run.has("gradients"):
        return None
    try:
        chosen = run_measurement(
            view.run, loss=str(rows["loss"][0]), wanted=view.options.measurement
        )
    except (OptionError, SchemaError):
        return None
    if chosen.param_scope != rows["param_scope"][0]:
        return None
    norms = recorded_norms(view.run, rows)
    table = assumption_2(rows, chosen.rows(view.run.gradients()), norms) if norms else None
    return table if table is not None and table["kept"].drop_nulls().len() else None


def _dropped_block(table: pl.DataFrame) -> Table:
    rows = [
        [row["group"], number(row["norm_sq"]), number(row["kept"]), percent(row["kept_share"])]
        for row in table.iter_rows(named=True)
    ]
    columns = ["group", "‖Σ w g‖²", "Σ w² ‖g‖²", "kept by Assumption 2"]
    caption = (
        "What Assumption 2 keeps of the squared norm: the products of a token's gradient with"
        " itself."
    )
    return Table(columns, rows, caption, frozenset({1, 2, 3}))
