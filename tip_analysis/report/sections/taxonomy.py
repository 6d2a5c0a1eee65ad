"""Sections on the taxonomy: the map of quadrants, its sensitivity to the cuts, and the strongest
tokens."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.browsing import listed_ids
from tip_analysis.analysis.densities import STRENGTH, density, strongest_tokens, text_around
from tip_analysis.analysis.paper_preset import PAPER_RANGES
from tip_analysis.analysis.quadrants import cut_sensitivity
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.text import visible
from tip_analysis.core.words import interval, listed, number, percent, plural
from tip_analysis.report import paper
from tip_analysis.report.page import (
    Block,
    Part,
    Section,
    StrongList,
    StrongToken,
    Table,
    TopToken,
    picture,
)
from tip_analysis.report.sections import exploring
from tip_analysis.report.sections.overview import FEW_TOKENS, label_of, population, slug_of

STRONG_TITLES = {
    "Q3": "Confident, and the teacher disagrees (Q3)",
    "Q1": "Uncertain, and the teacher disagrees (Q1)",
}
RANKED_BY = {"q3_score": "forward KL × (1 − ĥ)", "forward_kl": "forward KL"}


def quadrant_map(views: Sequence[RunView]) -> Section:
    """Where tokens lie on the plane of entropy and divergence."""
    return Section(
        "map",
        "Quadrant map",
        [
            Part(_map_finding(view), _map_blocks(view), population(view), label_of(view, views))
            for view in views
        ],
        shows=(
            "the density of tokens over both axes, and whether a cut runs through a gap or through"
            " a cluster."
        ),
        shows_not=(
            "rates: opacity is on a log scale, so that rare tokens stay visible beside common ones."
        ),
        template="exploring.html.j2",
        extra={"payload": exploring.payload(views)},
    )


def sensitivity(views: Sequence[RunView]) -> Section:
    """How the shares move with both cuts."""
    return Section(
        "sensitivity",
        "Sensitivity to the cuts",
        [_sensitivity_part(view, label_of(view, views)) for view in views],
        shows=(
            "what any other choice of cuts would have made of the same tokens, and for which cuts"
            " the paper’s ranges hold."
        ),
        shows_not=(
            "which cut is right: the data favour no particular cut, and the paper does not state"
            " its own."
        ),
    )


def strong_tokens(views: Sequence[RunView]) -> Section:
    """The strongest Q3 and Q1 tokens with both models' top tokens, and the paper's worked
    examples."""
    parts = [_strong_part(view, label_of(view, views), index) for index, view in enumerate(views)]
    parts.append(Part("", [_paper_examples()], run="For comparison"))
    return Section(
        "strongest",
        "Strongest tokens",
        parts,
        shows=(
            "single positions with what both models would have written there, in the fields of the"
            " paper’s worked examples."
        ),
        shows_not=(
            "typical tokens: these are the extremes, one for each prompt. Nor does it show who is"
            " right: the teacher makes mistakes too."
        ),
    )


def _map_finding(view: RunView) -> str:
    if not view.population.num_tokens:
        return "No token has statistics."
    rows = {row["quadrant"]: row for row in view.share_table.iter_rows(named=True)}
    sizes = dict(view.shares.select(pl.col("quadrant").cast(pl.String), "num_tokens").rows())
    largest = max(view.share_of, key=lambda name: view.share_of[name])
    words = (
        f"Most of {plural(view.population.num_tokens, 'token')}, {_share_words(rows[largest])},"
        f" are {figures.QUADRANT_NAMES[largest].replace(',', ' and')} ({largest})."
    )
    if (sizes.get("Q3") or 0) < FEW_TOKENS:
        return words
    return (
        f"{words} Q3, {_share_words(rows['Q3'])}, lies below the entropy cut: a rule that sees"
        " entropy alone cannot find it."
    )


def _share_words(row: dict[str, Any]) -> str:
    return f"{percent(row['share'])} {interval(row['share_low'], row['share_high'])}".strip()


def _map_blocks(view: RunView) -> list[Block]:
    table = density(view.tokens, view.cuts)
    drawn = picture(
        lambda width: figures.quadrant_map(
            table,
            entropy_cut=view.cuts.entropy.value,
            divergence_cut=view.cuts.divergence.value,
            shares=view.share_of,
            width=width,
        ),
        key=f"map-{slug_of(view)}",
        caption=(
            "Each cell is coloured by the quadrant of its tokens; opacity grows with the logarithm"
            " of their number. Lines: the cuts. Values below the first cell of an axis are drawn"
            " in it."
        ),
        alt=(
            "Density of tokens over student entropy and reverse KL, with the cuts; shares are in"
            " the overview's table."
        ),
        kind="map",
    )
    return [drawn]


def _sensitivity_part(view: RunView, label: str) -> Part:
    if not view.population.num_tokens:
        return Part("No token has statistics.", run=label)
    grid = cut_sensitivity(view.raw, in_use=view.cuts)
    drawn = picture(
        lambda width: figures.cut_sensitivity(
            grid,
            entropy_cut=view.cuts.entropy.value,
            divergence_cut=view.cuts.divergence.value,
            width=width,
        ),
        key=f"sensitivity-{slug_of(view)}",
        caption=(
            "Left: share of Q3 for cuts at the 5 % to 95 % quantiles of either axis, and at the"
            " cuts in use (the ring); hatched where all the paper’s ranges hold. Then: all shares"
            " along one cut while the other is held."
        ),
        alt="Shares for a grid of cuts; the table below has the extremes.",
    )
    return Part(
        _sensitivity_finding(view, grid), [drawn, _sensitivity_table(grid)], population(view), label
    )


def _sensitivity_finding(view: RunView, grid: pl.DataFrame) -> str:
    low, high = _span(grid["Q3"])
    holds = grid.filter("in_paper_ranges")
    span = (
        f"Over the grid of cuts, Q3 is {percent(low)} to {percent(high)} of"
        f" {plural(view.population.num_tokens, 'token')}"
    )
    if holds.height == 0:
        failing = [
            name
            for name, column in (
                ("Q4", "q4_in_range"),
                ("Q1+Q2", "q1_q2_in_range"),
                ("Q3", "q3_in_range"),
            )
            if not grid[column].any()
        ]
        reason = f"; {listed(failing)} never does" if failing else ""
        return f"{span}; no pair of these cuts puts all shares within the paper’s ranges{reason}."
    entropy, divergence = _span(holds["entropy_cut"]), _span(holds["divergence_cut"])
    return (
        f"{span}; {percent(holds.height / grid.height)} of the pairs of cuts put all shares within"
        f" the paper’s ranges, with entropy cuts from {number(entropy[0])} to {number(entropy[1])}"
        f" and divergence cuts from {number(divergence[0])} to {number(divergence[1])} nats."
    )


def _span(column: pl.Series) -> tuple[float, float]:
    values = column.to_numpy()
    return float(values.min()), float(values.max())


def _sensitivity_table(grid: pl.DataFrame) -> Table:
    quantiles = ("q0.1", "q0.25", "q0.5", "q0.75", "q0.9")
    chosen = grid.filter(
        pl.col("entropy_spec").is_in(["q0.25", "q0.5", "q0.75"]),
        pl.col("divergence_spec").is_in(quantiles),
    )
    rows = [
        [
            f"{row['entropy_spec']} ({number(row['entropy_cut'])})",
            f"{row['divergence_spec']} ({number(row['divergence_cut'])})",
            *(percent(row[name]) for name in figures.QUADRANT_COLORS),
            "yes" if row["in_paper_ranges"] else "no",
        ]
        for row in chosen.iter_rows(named=True)
    ]
    columns = [
        "entropy cut (nats)",
        "divergence cut (nats)",
        *figures.QUADRANT_COLORS,
        "in the paper’s ranges",
    ]
    ranges = "; ".join(f"{name} {paper.range_of(name)}" for name in PAPER_RANGES)
    return Table(
        columns,
        rows,
        f"Shares at some quantile cuts. The paper’s ranges: {ranges}.",
        frozenset({2, 3, 4, 5}),
    )


def _strong_part(view: RunView, label: str, run_index: int) -> Part:
    lists, words = [], []
    for quadrant in ("Q3", "Q1"):
        table = strongest_tokens(view.tokens, quadrant, view.options.num_strong)
        if table.height == 0:
            words.append(f"{quadrant} is empty")
            continue
        first = table.row(0, named=True)
        texts = view.token_texts([first["student_topk_ids"][0], first["teacher_topk_ids"][0]])
        student, teacher = (
            visible(texts[first[f"{model}_topk_ids"][0]]) for model in ("student", "teacher")
        )
        words.append(
            f"at the strongest {quadrant} token the student expects “{student}”, the teacher"
            f" “{teacher}”"
        )
        lists.append(_strong_list(view, table, quadrant, run_index))
    sentence = "; ".join(words)
    return Part(f"{sentence[:1].upper()}{sentence[1:]}.", lists, population(view), label)


def _strong_list(view: RunView, table: pl.DataFrame, quadrant: str, run_index: int) -> StrongList:
    around, texts = text_around(view.raw, table), view.token_texts(listed_ids(table))
    tokens = []
    for row in table.iter_rows(named=True):
        place = row["rollout_id"], row["position"]
        before, after = around[place]
        tokens.append(
            StrongToken(
                quadrant,
                _strong_facts(row, quadrant),
                before=_tail(before),
                token=visible(row["token"]),
                after=_head(after),
                student_top=_top(row, "student", texts),
                teacher_top=_top(row, "teacher", texts),
                link=token_link(run_index, *place),
            )
        )
    note = (
        f"Ranked by {RANKED_BY[STRENGTH[quadrant]]}; at most one token a prompt. Entropy, KL and"
        " score in nats."
    )
    return StrongList(STRONG_TITLES[quadrant], tokens, note)


def _strong_facts(row: dict[str, Any], quadrant: str) -> list[tuple[str, str]]:
    in_q3 = quadrant == "Q3"
    name, score = ("overconfidence score", STRENGTH["Q3"]) if in_q3 else ("Soft-OR", "soft_or")
    return [
        ("student entropy", number(row["student_entropy"])),
        ("reverse KL", number(row["reverse_kl"])),
        ("forward KL", number(row["forward_kl"])),
        (name, number(row[score])),
        ("rollout", f"{visible(row['rollout_id'], 40)}, position {row['position']}"),
    ]


def token_link(run_index: int, rollout_id: str, position: int) -> str:
    """The fragment that opens a token in the browser."""
    return f"#token={run_index}/{quote(rollout_id, safe='')}/{position}"


def _top(row: dict, model: str, texts: dict[int, str]) -> list[TopToken]:
    pairs = zip(row[f"{model}_topk_ids"][:5], row[f"{model}_topk_logprobs"][:5], strict=True)
    return [
        TopToken(
            visible(texts[index]).replace(" ", "␣"), probability(logprob), index == row["token_id"]
        )
        for index, logprob in pairs
    ]


def probability(logprob: float) -> float:
    """exp, for −inf too."""
    return 0.0 if logprob == float("-inf") else min(1.0, 2.718281828459045**logprob)


def _tail(text: str, length: int = 160) -> str:
    shown = _lines(text[-2 * length :])
    return shown if len(shown) <= length else f"…{shown[-length:]}"


def _head(text: str, length: int = 120) -> str:
    shown = _lines(text[: 2 * length])
    return shown if len(shown) <= length else f"{shown[:length]}…"


def _lines(text: str) -> str:
    """Visible text in which line breaks still break."""
    return visible(text, len(text)).replace("↵", "↵\n")


def _paper_examples() -> StrongList:
    tokens = [
        StrongToken(
            example.quadrant,
            [
                ("example", str(example.number)),
                ("student entropy", f"{example.student_entropy:.2f}"),
                ("forward KL", f"{example.forward_kl:.2f}"),
                *(
                    [("overconfidence score", f"{example.score:.2f}")]
                    if example.score is not None
                    else []
                ),
            ],
            before="",
            token="",
            after="",
            student_top=[TopToken(text, share / 100) for text, share in example.student_top],
            teacher_top=[TopToken(text, share / 100) for text, share in example.teacher_top],
            from_paper=True,
        )
        for example in paper.WORKED_EXAMPLES
    ]
    note = (
        "Worked examples of Appendix B.5, as printed there; entropy, KL and score in nats. They are"
        " not from this run."
    )
    return StrongList("The paper’s worked examples", tokens, note, compact=True)
