"""The section on importance through training."""

from collections.abc import Sequence

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.run_view import RunView
from tip_analysis.analysis.trajectories import (
    placed_trajectory,
    q3_survival,
    realised_falls,
    rock_tokens,
    trajectory_flow,
    with_facts,
)
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.words import count, interval, number, percent, plural
from tip_analysis.report.page import Block, Missing, Part, Section, Table, picture
from tip_analysis.report.sections.overview import label_of, slug_of


def trajectories(views: Sequence[RunView]) -> Section:
    """What became of the run's tokens while an arm was trained."""
    return Section(
        "trajectories",
        "Importance through training",
        [part for view in views for part in _parts(view, label_of(view, views))],
        shows=(
            "how training moves fixed tokens between quadrants, how long Q3 lasts, and"
            " which scores foretell where δ falls. Cuts are those of the first step."
        ),
        shows_not="what the arm did to the rollouts that it wrote itself: contexts are fixed.",
    )


def _parts(view: RunView, label: str) -> list[Part]:
    if not view.run.has("trajectories"):
        command = f"tip-analysis track {view.run.path} --arm ARM"
        return [Part("", [Missing("No arm has been tracked.", command)], run=label)]
    arms = view.run.table("trajectories").collect().partition_by("arm_key", maintain_order=True)
    return [_part(view, rows, label, index) for index, rows in enumerate(arms)]


def _part(view: RunView, rows: pl.DataFrame, label: str, index: int) -> Part:
    resamples = view.options.num_resamples
    placed = with_facts(placed_trajectory(rows, view.options.taxonomy), view.raw)
    arm = Arm(rows["rule"][0], rows["retention_ratio"][0])
    slug = f"{index}-{slug_of(view)}"
    blocks: list[Block] = []
    if placed["step"].n_unique() > 1:
        flow = trajectory_flow(placed)
        blocks += [_flow_picture(flow, slug), _flow_block(flow)]
    try:
        survival = q3_survival(placed, num_resamples=resamples)
    except SchemaError:
        survival = None
    if survival is not None:
        blocks += [_survival_picture(survival, slug), _survival_block(survival)]
    blocks.append(_rocks_block(rock_tokens(placed, num_resamples=resamples)))
    blocks.append(_falls_block(realised_falls(placed, view.raw, num_resamples=resamples)))
    first = placed.filter(pl.col("step") == pl.col("step").min())
    note = (
        f"Arm {arm}, seed {rows['seed'][0]}; {plural(first.height, 'token')},"
        f" {plural(first['prompt_id'].n_unique(), 'prompt')}, steps"
        f" {', '.join(map(str, sorted(placed['step'].unique())))}. 95% intervals over prompts."
    )
    return Part(f"Arm {arm}: {_finding(survival)}", blocks, note, label)


def _finding(survival: pl.DataFrame | None) -> str:
    if survival is None:
        return "no token is in Q3 at the first step."
    every = survival.filter(tokens="all")
    life, left = every["half_life"][0], every.sort("step")["share"][-1]
    if life is None:
        return (
            f"{percent(left)} of the tokens that began in Q3 are still there at the last step:"
            " half of them have not left."
        )
    return f"half of Q3 has left it by step {number(life)}; {percent(left)} are there at the end."


def _flow_picture(flow: pl.DataFrame, slug: str) -> Block:
    return picture(
        lambda width: figures.trajectory_flow(flow, width=width),
        key=f"flow-{slug}",
        caption="Tokens by quadrant at each kept step; a band has the colour of where it is from.",
        alt="Bands between quadrants from step to step; the table below has the numbers.",
    )


def _flow_block(flow: pl.DataFrame) -> Table:
    kept = flow.filter(pl.col("num_tokens") > 0)
    rows = [
        [
            f"{row['step_from']} to {row['step_to']}",
            str(row["quadrant_from"]),
            str(row["quadrant_to"]),
            count(row["num_tokens"]),
            percent(row["share"]),
        ]
        for row in kept.iter_rows(named=True)
    ]
    columns = ["steps", "from", "to", "tokens", "of all"]
    return Table(columns, rows, "Tokens by quadrant from step to step.", frozenset({3, 4}))


def _survival_picture(survival: pl.DataFrame, slug: str) -> Block:
    return picture(
        lambda width: figures.q3_survival(survival, width=width),
        key=f"survival-{slug}",
        caption="Of the tokens in Q3 at the first step, the share that still is.",
        alt="Falling lines, one a subset of tokens; the table below has half-lives.",
    )


def _survival_block(survival: pl.DataFrame) -> Table:
    rows = []
    for (name,), part in survival.group_by("tokens", maintain_order=True):
        last = part.sort("step").row(-1, named=True)
        rows.append(
            [
                str(name),
                count(last["num_tokens"]),
                "not reached" if last["half_life"] is None else number(last["half_life"]),
                _life(last["half_life_low"], last["half_life_high"]),
                percent(last["share"]),
                interval(last["low"], last["high"]),
            ]
        )
    columns = ["tokens", "Q3 at first", "half-life, steps", "95%", "left at last", "95%"]
    return Table(columns, rows, "How long Q3 lasts.", frozenset({1, 2, 3, 4, 5}))


def _life(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f"[{number(low)}, {'beyond' if high is None else number(high)}]"


def _rocks_block(rocks: pl.DataFrame) -> Table:
    rows = [
        [
            row["tokens"],
            count(row["num_high"]),
            count(row["num_rocks"]),
            percent(row["share"]),
            interval(row["low"], row["high"]),
            percent(row["rock_divergence"]),
        ]
        for row in rocks.iter_rows(named=True)
    ]
    columns = ["tokens", "high δ at first", "rocks", "share", "95% interval", "of Σδ at last"]
    caption = "Rock tokens: δ above the cut at every kept step."
    return Table(columns, rows, caption, frozenset({1, 2, 3, 4, 5}))


def _falls_block(falls: pl.DataFrame) -> Table:
    rows = [
        [
            row["tokens"],
            row["score"],
            number(row["spearman"]),
            interval(row["low"], row["high"], as_share=False),
            number(row["mean_fall"]),
            count(row["num_tokens"]),
        ]
        for row in falls.iter_rows(named=True)
    ]
    columns = ["tokens", "score before training", "Spearman", "95%", "mean fall of δ", "tokens"]
    caption = "Which score foretells where δ falls: rank correlation with the realised fall."
    return Table(columns, rows, caption, frozenset({2, 3, 4, 5}))
