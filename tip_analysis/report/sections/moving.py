"""The section on what moved between two runs of the same rollouts: two teachers, or two
checkpoints, side by side."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from tip_analysis.analysis.densities import text_around
from tip_analysis.analysis.moves import (
    COMPARED,
    PLACE,
    aligned_tokens,
    moved_share,
    quadrant_flow,
    strongest_moves,
)
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Quadrant
from tip_analysis.core.text import one_line, visible
from tip_analysis.core.words import count, interval, percent, plural
from tip_analysis.report.page import Part, Section, Warnings
from tip_analysis.report.sections.overview import FEW_TOKENS, population

LISTED = 40
"""Tokens listed of each pair of quadrants."""
_REACH = 6
"""Tokens of context on either side."""


def moving(views: Sequence[RunView]) -> Section:
    """Every other run beside the first: where its tokens went."""
    made = [_pair(views[0], other) for other in views[1:]]
    return Section(
        "moves",
        "What moved between runs",
        [part for part, _ in made],
        shows=(
            "the same tokens under two teachers or two checkpoints, aligned by rollout and"
            " position, and the quadrant of each in either run."
        ),
        shows_not=(
            "which teacher is right. Each run has its own cuts where those are measured on the"
            " data: with cuts in nats, what moves is due to the models alone."
        ),
        template="moving.html.j2",
        extra={"payload": [pair for _, pair in made if pair]},
    )


def _pair(a: RunView, b: RunView) -> tuple[Part, dict[str, Any]]:
    label = f"From {a.name} to {b.name}"
    try:
        aligned = aligned_tokens(a.tokens, b.tokens)
        flow = quadrant_flow(aligned, num_resamples=a.options.num_resamples)
    except SchemaError as error:
        reason = f"{a.name} and {b.name} are not compared token by token: {one_line(str(error))}"
        return Part("", [Warnings([visible(reason, 700)])], run=label), {}
    total = int(flow["num_tokens"].sum())
    if not total:
        words = f"{a.name} and {b.name} share no rollout, so no token of one is in the other."
        return Part(words, run=label), {}
    note = f"{a.name}: {population(a)} {b.name}: {population(b)}"
    finding = _finding(a, b, flow, moved_share(aligned, num_resamples=a.options.num_resamples))
    return Part(finding, population=note, run=label), _payload(a, b, aligned, flow)


def _finding(
    a: RunView, b: RunView, flow: pl.DataFrame, moved: tuple[float, float | None, float | None]
) -> str:
    total = int(flow["num_tokens"].sum())
    changed = flow.filter(pl.col("quadrant_a") != pl.col("quadrant_b"))
    number = int(changed["num_tokens"].sum())
    share = f"{percent(moved[0])} {interval(*moved[1:])}".strip()
    words = (
        f"Of {plural(total, 'token')} in both runs, {share} are in another quadrant in {b.name}"
        f" than in {a.name}"
    )
    if number < FEW_TOKENS:
        return f"{words}: {plural(number, 'token')}, too few to say more."
    top = changed.sort("num_tokens", descending=True).row(0, named=True)
    ends = interval(top["low"], top["high"])
    return (
        f"{words}; most of these go from {top['quadrant_a']} to {top['quadrant_b']}"
        f" ({percent(top['share'])} {ends} of all)."
    )


def _payload(a: RunView, b: RunView, aligned: pl.LazyFrame, flow: pl.DataFrame) -> dict[str, Any]:
    moves = strongest_moves(aligned, LISTED)
    around = text_around(a.raw, moves.select(PLACE), reach=_REACH)
    tops = [_first_choices(view, moves) for view in (a, b)]
    return {
        "names": [visible(view.name, 60) for view in (a, b)],
        "teachers": [visible(view.model_names()[1], 60) for view in (a, b)],
        "flow": _cells(flow),
        "tokens": [
            _token(row, around[row["rollout_id"], row["position"]], tops)
            for row in moves.iter_rows(named=True)
        ],
    }


def _cells(flow: pl.DataFrame) -> list[list[dict[str, str]]]:
    """Rows by quadrant in a, columns by that in b."""
    cells = [
        {
            "count": count(row["num_tokens"]),
            "share": percent(row["share"]),
            "interval": interval(row["low"], row["high"]),
        }
        for row in flow.iter_rows(named=True)
    ]
    return [cells[start : start + 4] for start in range(0, 16, 4)]


def _first_choices(view: RunView, moves: pl.DataFrame) -> dict[tuple[str, int], str]:
    """What the teacher of a run holds most likely at each place."""
    first = pl.col("teacher_topk_ids").list.first().alias("first")
    rows = (
        view.raw.join(moves.select(PLACE).lazy(), on=PLACE, how="semi")
        .select(*PLACE, first)
        .collect()
    )
    texts = view.token_texts(rows["first"].drop_nulls().unique())
    return {
        (rollout, position): "" if index is None else visible(texts[index])
        for rollout, position, index in rows.iter_rows()
    }


def _token(
    row: dict[str, Any], around: tuple[str, str], tops: list[dict[tuple[str, int], str]]
) -> list[Any]:
    """Codes of both quadrants, rollout, position, text with what is around, what both teachers
    expect, and the statistics of both runs."""
    codes = [list(Quadrant).index(row[f"quadrant_{side}"]) + 1 for side in "ab"]
    place = row["rollout_id"], row["position"]
    texts = [visible(text, 200) for text in (around[0], row["token"], around[1])]
    numbers = [_number(row[f"{name}_{side}"]) for name in COMPARED for side in "ab"]
    return [*codes, *place, *texts, *(top.get(place, "") for top in tops), *numbers]


def _number(value: float | None) -> float | str | None:
    if value is None:
        return None
    return float(f"{value:.4g}") if abs(value) < float("inf") else "∞"
