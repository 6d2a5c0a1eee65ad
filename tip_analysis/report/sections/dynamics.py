"""The section on how training went: what students wrote at each step, arm by arm."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.dynamics import METRICS, dynamics_curves
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.text import visible
from tip_analysis.core.words import number, percent, plural
from tip_analysis.report.page import Block, Missing, Part, Section, Table, picture
from tip_analysis.report.sections.overview import label_of, slug_of

_ENDS = ("response_tokens", "student_entropy", "reverse_kl", "share_q3", "topk_overlap")
"""What the table shows of the first and the last bin of steps."""


def dynamics(views: Sequence[RunView]) -> Section:
    """How training went on each selection."""
    return Section(
        "dynamics",
        "Training over steps",
        [_part(view, label_of(view, views)) for view in views],
        shows=(
            "what students wrote while they were trained: length, entropy, divergence from the"
            " teacher, quadrants, and how far the selection agrees with Soft-OR’s."
        ),
        shows_not=(
            "how good they were at that step: a student that repeats itself may be close to its"
            " teacher on what it repeats. Quadrants are by each step’s own cuts."
        ),
    )


def _part(view: RunView, label: str) -> Part:
    command = f"tip-analysis ablate {view.run.path} --rules all soft_or:0.5 --dynamics-every 1"
    if not view.run.has("dynamics"):
        return Part("", [Missing("No training was observed.", command)], run=label)
    table = view.run.dynamics().collect()
    curves = dynamics_curves(table)
    blocks: list[Block] = [_curves_picture(view, curves), _ends_block(curves)]
    return Part(_finding(curves), blocks, _population(table), label)


def _population(table: pl.DataFrame) -> str:
    arms = table.select("rule", "retention_ratio").n_unique()
    return (
        f"{plural(arms, 'arm')}, {plural(table['seed'].n_unique(), 'seed')},"
        f" {plural(table['step'].n_unique(), 'observed step')}. Bands span the seeds."
    )


def _finding(curves: pl.DataFrame) -> str:
    """Which arm ends farthest from its teacher, and which nearest."""
    last = _at_end(curves, "reverse_kl", last=True).sort("value", "arm")
    if last.height < 2:
        return ""
    near, far = last.row(0, named=True), last.row(-1, named=True)
    return (
        f"At the end of training {near['arm']} is nearest to its teacher on what it writes"
        f" ({number(near['value'])} nats a token), {far['arm']} farthest"
        f" ({number(far['value'])})."
    )


def _curves_picture(view: RunView, curves: pl.DataFrame) -> Block:
    return picture(
        lambda width: figures.training_curves(curves, words=METRICS, width=width),
        key=f"dynamics-{slug_of(view)}",
        folded="Show the curves over steps",
        caption=(
            "What students wrote over the steps of their training, mean over seeds, in bins of"
            " equal length. The band spans the seeds."
        ),
        alt="Lines over training steps, one for each arm; the table below has their ends.",
    )


def _at_end(curves: pl.DataFrame, metric: str, *, last: bool) -> pl.DataFrame:
    """arm and value of each arm in its first or its last bin."""
    part = curves.filter(metric=metric).drop_nulls("value").sort("step")
    value = pl.col("value").last() if last else pl.col("value").first()
    return part.group_by("arm", maintain_order=True).agg(value)


def _ends_block(curves: pl.DataFrame) -> Table:
    arms = curves["arm"].unique(maintain_order=True)
    ends: dict[str, dict[bool, dict[str, float]]] = {
        metric: {
            last: dict(_at_end(curves, metric, last=last).iter_rows()) for last in (False, True)
        }
        for metric in _ENDS
    }
    rows: list[list[Any]] = [
        [visible(arm, 40), *(_change(ends[metric], arm, metric) for metric in _ENDS)]
        for arm in arms
    ]
    columns = ["arm", *(METRICS[metric] for metric in _ENDS)]
    caption = "First and last bin of steps of each arm, means over seeds."
    return Table(columns, rows, caption, frozenset(range(1, len(columns))))


def _change(ends: dict[bool, dict[str, float]], arm: str, metric: str) -> str:
    if arm not in ends[False]:
        return "–"
    form = percent if metric in ("share_q3", "topk_overlap") else number
    return f"{form(ends[False][arm])} → {form(ends[True][arm])}"
