"""The section on position, frequency and kind of token: does a quadrant just mean "first tokens" or
"punctuation"?"""

from collections.abc import Sequence

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis import groups as effects
from tip_analysis.analysis.group_averages import group_means
from tip_analysis.analysis.groupings import GROUPINGS, available_groupings, with_rewards
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.words import count, interval, number, percent
from tip_analysis.figures.groups import GROUPING_NAMES
from tip_analysis.report.page import Block, Part, Section, Table, Tag, picture
from tip_analysis.report.sections.overview import label_of, population, slug_of


def group_effects(views: Sequence[RunView]) -> Section:
    """Quadrants by groups of tokens, and by reward."""
    return Section(
        "effects",
        "Position, frequency and kind of token",
        [_part(view, label_of(view, views)) for view in views],
        shows="how much a token’s position, frequency or kind says about its quadrant.",
        shows_not=(
            "why: a kind of token can be hard because of its position, or the other way round."
        ),
    )


def _part(view: RunView, label: str) -> Part:
    if not view.population.num_tokens:
        return Part("No token has statistics.", run=label)
    taxonomy = view.options.taxonomy
    resamples = min(60, view.options.num_resamples)
    tokens = with_rewards(view.raw, view.run.rollouts())
    names = _shown_groupings(view, tokens)
    sample = view.sampled(tokens).collect().lazy()
    told = effects.association(sample, among=names, num_resamples=resamples, taxonomy=taxonomy)
    groups = pl.concat(
        [
            effects.group_effects(tokens, grouping=name, num_resamples=2, taxonomy=taxonomy)
            for name in names
        ]
    )
    drawn = _groups_picture(view, groups)
    blocks: list[Block] = [drawn, _association_block(told), _lift_block(groups)]
    blocks += _means_blocks(view, tokens, names, resamples)
    if view.rollouts["reward"].drop_nulls().n_unique() > 1:
        blocks.append(_reward_block(view, sample, resamples))
    return Part(
        _finding(told, groups), blocks, f"{population(view)} {view.interval_words()}", label
    )


_BY_TURN = ("turn", "part", "segment", "first_error")
"""Groupings within which means are told; where calls have parts, those stand for segments."""
_COLUMN_NAMES = {
    "student_entropy": "entropy (nats)",
    "reverse_kl": "δ (nats)",
    "grad_norm_sq": "M",
    "grad_dot_loss": "φ",
}


def _means_blocks(
    view: RunView, tokens: pl.LazyFrame, names: Sequence[str], resamples: int
) -> list[Block]:
    """Means of h, δ, M and φ by turn, part of the turn, and before and after the first error: of
    groupings that tell tokens apart."""
    columns = ["student_entropy", "reverse_kl"]
    if view.gradients is not None:
        tokens = view.with_gradients(tokens)
        tokens = tokens.with_columns(grad_norm_sq=pl.col("grad_norm") ** 2)
        columns += ["grad_norm_sq", "grad_dot_loss"]
    told = [
        name for name in _BY_TURN if name in names and not (name == "segment" and "part" in names)
    ]
    sample = view.sampled(tokens).collect()
    tables = [
        group_means(sample, grouping=name, columns=columns, num_resamples=resamples)
        for name in told
    ]
    parts = [table for table in tables if table["group"].n_unique() > 1]
    return [_means_block(pl.concat(parts), columns)] if parts else []


def _means_block(means: pl.DataFrame, columns: Sequence[str]) -> Table:
    rows = []
    for (grouping, group), part in means.group_by("grouping", "group", maintain_order=True):
        cells = {row["column"]: row for row in part.iter_rows(named=True)}
        row = [
            f"{GROUPING_NAMES[str(grouping)]}: {group}",
            count(cells["reverse_kl"]["num_tokens"]),
        ]
        for name in columns:
            one = cells[name]
            row += [
                number(one["mean"]),
                interval(one["mean_low"], one["mean_high"], as_share=False),
            ]
        rows.append([*row, percent(cells["reverse_kl"]["share"])])
    shown = [part for name in columns for part in (_COLUMN_NAMES[name], "95% interval")]
    return Table(
        ["group", "tokens", *shown, "share of Σδ"],
        rows,
        "Means within groups of the student’s tokens, of those for which a value is finite.",
        frozenset(range(1, 3 + 2 * len(columns))),
        folded="Show means of entropy, δ, M and φ within groups",
    )


def _shown_groupings(view: RunView, tokens: pl.LazyFrame) -> list[str]:
    """Groupings that the run has the columns of; those of rewards only where rewards differ."""
    of_rewards = view.rollouts["reward"].drop_nulls().n_unique() > 1
    return [
        name
        for name in available_groupings(tokens)
        if of_rewards or "reward" not in GROUPINGS[name].columns
    ]


def _groups_picture(view: RunView, groups: pl.DataFrame) -> Block:
    return picture(
        lambda width: figures.group_shares(groups, width=width),
        key=f"effects-{slug_of(view)}",
        folded="Show the quadrants within each group",
        caption=(
            "Shares of the quadrants within each group; in brackets the number of tokens. Bars that"
            " look alike mean that the grouping does not matter."
        ),
        alt=(
            "Stacked bars of quadrant shares by position, frequency and kind of token; the table"
            " below has the numbers of Q3."
        ),
    )


def _finding(told: pl.DataFrame, groups: pl.DataFrame) -> str:
    best = told.sort("explained", descending=True, nulls_last=True).row(0, named=True)
    q3 = (
        groups.filter(pl.col("quadrant") == "Q3", pl.col("num_tokens") >= 20)
        .drop_nulls("lift")
        .sort("lift", descending=True)
    )
    first = (
        f"Over {count(best['num_tokens'])} tokens, of {len(told)} groupings"
        f" {GROUPING_NAMES[best['grouping']]} says most about a token’s quadrant: it removes"
        f" {percent(best['explained'])}"
        f" {interval(best['explained_low'], best['explained_high'])} of the uncertainty"
    )
    if q3.height == 0:
        return f"{first}."
    row = q3.row(0, named=True)
    return (
        f"{first}. Q3 is most over-represented in the group “{row['group']}”:"
        f" {count(row['num_tokens'])} tokens, {percent(row['share'])} of the group and"
        f" {number(row['lift'])} times its share overall."
    )


def _association_block(told: pl.DataFrame) -> Table:
    rows = [
        [
            GROUPING_NAMES[row["grouping"]],
            percent(row["explained"]),
            interval(row["explained_low"], row["explained_high"]),
            number(row["cramers_v"]),
            interval(row["cramers_v_low"], row["cramers_v_high"], as_share=False),
        ]
        for row in told.iter_rows(named=True)
    ]
    columns = ["grouping", "uncertainty removed", "95% interval", "Cramér’s V", "95% interval"]
    caption = (
        f"How much a grouping says about the quadrant, over {count(told['num_tokens'][0])} tokens:"
        " I(group; quadrant) / H(quadrant)."
    )
    return Table(columns, rows, caption, frozenset({1, 2, 3, 4}))


def _lift_block(groups: pl.DataFrame) -> Table:
    rows = []
    for grouping in groups["grouping"].unique(maintain_order=True):
        part = groups.filter(pl.col("grouping") == grouping)
        for group in part["group"].unique(maintain_order=True):
            cells = {
                str(row["quadrant"]): row
                for row in part.filter(pl.col("group") == group).iter_rows(named=True)
            }
            total = sum(row["num_tokens"] for row in cells.values())
            rows.append(
                [
                    f"{grouping}: {group}",
                    count(total),
                    *(percent(cells[name]["share"]) for name in figures.QUADRANT_COLORS),
                    number(cells["Q3"]["lift"]),
                ]
            )
    columns = ["group", "tokens", *figures.QUADRANT_COLORS, "lift of Q3"]
    return Table(
        columns,
        rows,
        "Shares within groups; lift is the share over that in the whole run.",
        frozenset(range(1, 7)),
    )


def _reward_block(view: RunView, sample: pl.LazyFrame, resamples: int) -> Table:
    table = effects.reward_effects(
        sample, view.run.rollouts(), num_resamples=resamples, taxonomy=view.options.taxonomy
    )
    rows = [
        [
            Tag(str(row["quadrant"])),
            percent(row["share_rewarded"]),
            percent(row["share_unrewarded"]),
            percent(row["difference"]),
            interval(row["difference_low"], row["difference_high"]),
            number(row["spearman"]),
            interval(row["spearman_low"], row["spearman_high"], as_share=False),
        ]
        for row in table.iter_rows(named=True)
    ]
    caption = (
        "Shares of the quadrants in rollouts with a reward above ½ and in the others; "
        f"{count(table['num_rollouts'][0])} graded rollouts."
    )
    numeric = frozenset(range(1, 7))
    return Table(_REWARD_COLUMNS, rows, caption, numeric, folded="Show shares by reward")


_REWARD_COLUMNS = [
    "quadrant",
    "in rewarded rollouts",
    "in others",
    "difference",
    "95% interval",
    "Spearman with reward",
    "95% interval",
]
