"""The section on the causal test of tokens."""

from collections.abc import Sequence

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.interventions import (
    intervention_aucs,
    intervention_effects,
    token_outcomes,
)
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.words import count, interval, number, percent, plural, points
from tip_analysis.report.page import Block, Missing, Part, Section, Table, picture
from tip_analysis.report.sections.overview import label_of, slug_of


def interventions(views: Sequence[RunView]) -> Section:
    """What replacing a token does to success."""
    return Section(
        "interventions",
        "The causal test of tokens",
        [_part(view, label_of(view, views)) for view in views],
        shows=(
            "whether the student would have succeeded more often with the teacher's token in place"
            " of its own: disagreement that costs nothing has a difference of 0."
        ),
        shows_not=(
            "what training on these tokens does; and over all tests, rare quadrants weigh more than"
            " in the run."
        ),
    )


def _part(view: RunView, label: str) -> Part:
    if not view.run.has("interventions"):
        command = f"tip-analysis intervene {view.run.path}"
        return Part("", [Missing("No token has been tested.", command)], run=label)
    rows = view.run.table("interventions").collect()
    largest = rows.group_by("test_key", maintain_order=True).len().sort("len")["test_key"][-1]
    rows = rows.filter(test_key=largest)
    resamples = view.options.num_resamples
    effects = intervention_effects(rows, num_resamples=resamples)
    blocks: list[Block] = [_effects_picture(view, effects), _effects_block(effects, "quadrant")]
    if view.has_planted_labels:
        labels = view.raw.select(
            "rollout_id", "position", group=pl.col("planted_label").cast(pl.String)
        )
        planted = intervention_effects(rows, labels.collect(), num_resamples=resamples)
        blocks.append(_effects_block(planted.filter(pl.col("group") != "all"), "true label"))
    aucs = intervention_aucs(rows, view.raw, num_resamples=resamples)
    if aucs["auc"].drop_nulls().len():
        blocks += [_aucs_picture(view, aucs), _aucs_block(aucs)]
    tests = token_outcomes(rows)
    each = rows.height // max(1, 3 * tests.height)
    note = (
        f"{plural(tests.height, 'token')} of {plural(tests['prompt_id'].n_unique(), 'prompt')},"
        f" {plural(each, 'continuation')} of each choice; 95% intervals over prompts."
    )
    return Part(_finding(effects), blocks, note, label)


def _finding(effects: pl.DataFrame) -> str:
    of_teacher = effects.filter(choice="teacher").filter(pl.col("group") != "all")
    helped = of_teacher.drop_nulls("low").filter(pl.col("low") > 0)
    if helped.is_empty():
        return "In no quadrant is the teacher's token shown to raise success."
    best = helped.sort("difference", descending=True).row(0, named=True)
    words = (
        f"In {best['group']} the teacher's token raises success by"
        f" {points(best['difference'])} points [{points(best['low'])}, {points(best['high'])}]"
    )
    rest = [name for name in of_teacher["group"] if name not in set(helped["group"])]
    return f"{words}; in {', '.join(rest)} no gain is shown." if rest else f"{words}."


def _effects_picture(view: RunView, effects: pl.DataFrame) -> Block:
    return picture(
        lambda width: figures.intervention_effects(effects, width=width),
        key=f"interventions-{slug_of(view)}",
        caption=(
            "Success with the teacher's choice and with a fresh sample, minus that with the"
            " student's own token; in brackets the number of tested tokens."
        ),
        alt="Differences in success by quadrant; the table below has the numbers.",
    )


def _effects_block(effects: pl.DataFrame, grouped_by: str) -> Table:
    rows = [
        [
            row["group"],
            row["choice"],
            percent(row["success_student"]),
            points(row["difference"]),
            _ends(row["low"], row["high"]),
            percent(row["differing_share"]),
            count(row["num_tokens"]),
        ]
        for row in effects.iter_rows(named=True)
    ]
    columns = [
        grouped_by,
        "put in place",
        "success of the student's own",
        "difference, points",
        "95% interval",
        "another token",
        "tokens",
    ]
    caption = f"Paired difference in success by {grouped_by}."
    return Table(columns, rows, caption, frozenset({2, 3, 4, 5, 6}))


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{points(low)}, {points(high)}]"


def _aucs_picture(view: RunView, aucs: pl.DataFrame) -> Block:
    return picture(
        lambda width: figures.intervention_aucs(aucs, width=width),
        key=f"interventions-auc-{slug_of(view)}",
        caption="How well each score finds the tokens whose replacement raises success.",
        alt="Areas under the ROC curve by score; the table below has the numbers.",
    )


def _aucs_block(aucs: pl.DataFrame) -> Table:
    rows = [
        [row["score"], number(row["auc"]), interval(row["low"], row["high"], as_share=False)]
        for row in aucs.sort("auc", descending=True, nulls_last=True).iter_rows(named=True)
    ]
    raised, total = aucs["num_raised"][0], aucs["num_tokens"][0]
    caption = (
        "Area under the ROC curve for the tokens whose replacement by the teacher's raises"
        f" success: {count(raised)} of {count(total)} tested."
    )
    return Table(["score", "AUROC", "95% interval"], rows, caption, frozenset({1, 2}))
