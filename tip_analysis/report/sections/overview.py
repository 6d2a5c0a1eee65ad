"""The sections on the run as a whole: its finding with warnings, and the shares of the quadrants
beside the paper's ranges."""

from collections.abc import Sequence
from zlib import crc32

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.cuts import shares_by_construction
from tip_analysis.analysis.paper_preset import PAPER_RANGES
from tip_analysis.analysis.planted import planted_detection
from tip_analysis.analysis.quadrant_tables import widen
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.names import Scope, TeacherContext
from tip_analysis.core.text import visible
from tip_analysis.core.words import count, interval, listed, number, percent, plural, sentence
from tip_analysis.report import paper
from tip_analysis.report.page import (
    Block,
    FromPaper,
    Numbers,
    Part,
    Section,
    Table,
    Tag,
    Warnings,
    picture,
)
from tip_analysis.report.run_warnings import warnings_of

FEW_TOKENS = 20
"""A headline says nothing of what fewer tokens carry."""


def overview(views: Sequence[RunView]) -> Section:
    """The finding, four numbers, and what to know before trusting them."""
    parts = [
        Part(_finding(view), _overview_blocks(view), run=label_of(view, views)) for view in views
    ]
    return Section("overview", "The finding", parts)


def quadrant_shares(views: Sequence[RunView]) -> Section:
    """Shares of the quadrants beside the paper's ranges, and what their tokens are like."""
    parts = [
        Part(
            _shares_finding(view),
            _share_blocks(view, alone=len(views) == 1),
            population(view),
            label_of(view, views),
        )
        for view in views
    ]
    if len(views) > 1:
        parts.insert(0, _comparison(views))
    return Section(
        "shares",
        "Shares of the quadrants",
        parts,
        shows=(
            "the share of the tokens that the student wrote in each quadrant at the cuts named,"
            " beside the shares that the paper reports for its pairs."
        ),
        shows_not=(
            "that the tokens of a quadrant are worth training on: shares depend on the cuts, and"
            " the paper does not state its own."
        ),
    )


def context_words(view: RunView) -> str:
    """What the teacher sees besides the student's prompt."""
    config = view.stages.get("score", {}).get("config", {})
    if config.get("teacher_context") == TeacherContext.SOLUTION:
        return "the teacher is also shown the reference solution"
    if not view.run.has("rollouts"):
        return "the context of the teacher is not on record"
    own = pl.col("teacher_prompt_token_ids").is_not_null()
    num_own, total = view.run.rollouts().select(own.sum(), own.len().alias("all")).collect().row(0)
    if not num_own:
        return "both see the same prompt"
    return f"the teacher has a prompt of its own in {count(num_own)} of {plural(total, 'rollout')}"


def population(view: RunView) -> str:
    """n in tokens, rollouts and prompts, with the cuts."""
    counted = view.population
    return (
        f"n = {plural(counted.num_tokens, 'token')}, {plural(counted.num_rollouts, 'rollout')}, "
        f"{plural(counted.num_prompts, 'prompt')}. {sentence(_cut_words(view))}"
    )


NOTHING = (
    "No response token has statistics: every rollout is empty, or the student wrote none of the"
    " tokens."
)


def _finding(view: RunView) -> str:
    return _headline(view) if view.population.num_tokens else NOTHING


def _shares_finding(view: RunView) -> str:
    """The shares with their intervals, beside the paper's ranges."""
    if not view.population.num_tokens:
        return NOTHING
    ends = {
        name: interval(low, high)
        for _, name, _, low, high in view.share_table.iter_rows()
        if low is not None
    }
    uncertain = percent(view.share_of["Q1"] + view.share_of["Q2"])
    settled = f"{percent(view.share_of['Q4'])} {ends.get('Q4', '')}".strip()
    return (
        f"Of {plural(view.population.num_tokens, 'token')}, {uncertain} are uncertain (Q1 and Q2)"
        f" and {settled} are settled (Q4): {_verdict(view)}."
    )


def _headline(view: RunView) -> str:
    """What Q3 is of the tokens and of the loss, with n and intervals; of the loss nothing where Q3
    is too small for that."""
    row = view.share_table.row(by_predicate=pl.col("quadrant") == "Q3", named=True)
    share = f"{percent(row['share'])} {interval(row['share_low'], row['share_high'])}".strip()
    words = (
        "Q3, where the student is confident and the teacher disagrees, is"
        f" {share} of {plural(view.population.num_tokens, 'token')}"
    )
    size = _num_q3(view)
    if size < FEW_TOKENS:
        return f"{words}: {plural(size, 'token')}, too few to say what it carries."
    loss = widen(view.quadrant_means).row(by_predicate=pl.col("quadrant") == "Q3", named=True)
    ends = interval(loss["share_reverse_kl_low"], loss["share_reverse_kl_high"])
    carried = f"{percent(loss['share_reverse_kl'])} {ends}".strip()
    return f"{words} and {carried} of the loss (Σ reverse KL)."


def _num_q3(view: RunView) -> int:
    sizes = view.shares.filter(pl.col("quadrant").cast(pl.String) == "Q3")["num_tokens"]
    return int(sizes.sum())


def _verdict(view: RunView) -> str:
    """Which shares lie in the paper's ranges, among those that the cuts leave open."""
    shares, fixed = view.share_of, shares_by_construction(view.cuts)
    compared = {"Q1+Q2": shares["Q1"] + shares["Q2"], "Q3": shares["Q3"], "Q4": shares["Q4"]}
    if len(fixed) == len(compared):
        return "the preset `paper` sets the cuts by the ranges, so that they are no evidence here"
    left = [name for name in compared if name not in fixed]
    inside = [name for name in left if _in_paper_range(name, compared[name])]
    outside = [name for name in left if name not in inside]
    words = [f"{listed(inside)} within"] if inside else []
    words += [f"{listed(outside)} outside"] if outside else []
    num = len(outside or inside)
    verdict = f"{', '.join(words)} the range{'s' if num > 1 else ''} that the paper reports"
    if fixed:
        verdict += (
            f" ({listed(fixed)} is what the {view.cuts.entropy.spec} cut makes it, by construction,"
            " and takes no part)"
        )
    return verdict


def _in_paper_range(name: str, share: float) -> bool:
    low, high = PAPER_RANGES[name]
    return low <= share <= high


def _overview_blocks(view: RunView) -> list[Block]:
    counted = view.population
    entries = [("tokens", count(counted.num_tokens), _written_words(view))]
    if counted.num_tokens:
        entries += _q3_entries(view)
    entries.append(_reward_entry(view))
    return [Numbers(entries), Warnings(warnings_of(view))]


def _written_words(view: RunView) -> str:
    counted = view.population
    words = f"{plural(counted.num_rollouts, 'rollout')}, {plural(counted.num_prompts, 'prompt')}"
    if counted.num_masked:
        words += f"; {count(counted.num_masked)} more are not the student’s"
    return words


def _q3_entries(view: RunView) -> list[tuple[str, str, str]]:
    """Q3's share of the tokens and, where it is not too small for that, of the loss."""
    row = view.share_table.row(by_predicate=pl.col("quadrant") == "Q3", named=True)
    ends = interval(row["share_low"], row["share_high"])
    entries = [("in Q3: confident, disagreeing", percent(row["share"]), ends)]
    if _num_q3(view) < FEW_TOKENS:
        return entries
    loss = widen(view.quadrant_means).row(by_predicate=pl.col("quadrant") == "Q3", named=True)
    ends = interval(loss["share_reverse_kl_low"], loss["share_reverse_kl_high"])
    return [*entries, ("of the loss lies in Q3", percent(loss["share_reverse_kl"]), ends)]


def _reward_entry(view: RunView) -> tuple[str, str, str]:
    """The mean reward, or where nothing was graded the cuts."""
    rewards = view.rollouts["reward"].drop_nulls()
    if rewards.len():
        mean = number(float(rewards.to_numpy().mean()))
        return "mean reward", mean, f"of {plural(rewards.len(), 'graded rollout')}"
    return "graded rollouts", "none", "no reward is on record"


def _share_blocks(view: RunView, *, alone: bool) -> list[Block]:
    blocks: list[Block] = [_shares_picture(view)] if alone else []
    blocks.append(_shares_block(view))
    if view.population.num_tokens:
        blocks.append(_carried_block(view))
    if view.has_planted_labels:
        blocks.append(_planted_block(view))
    return blocks


def _shares_picture(view: RunView) -> Block:
    table = view.share_table
    return picture(
        lambda width: figures.quadrant_shares(table, PAPER_RANGES, width=width),
        key=f"shares-{slug_of(view)}",
        caption=(
            "Share of response tokens in each quadrant. Hatched: the range that the paper reports"
            f" over its pairs.{_fixed_words(view)}"
        ),
        alt=(
            "Bars of the quadrant shares beside the paper's ranges; the table below has the"
            " numbers."
        ),
    )


def _fixed_words(view: RunView) -> str:
    if not (fixed := shares_by_construction(view.cuts)):
        return ""
    return f" What the cuts fix by construction ({listed(fixed)}) is no comparison."


def _shares_block(view: RunView) -> Table:
    table = view.share_table
    ends = {name: interval(low, high) for _, name, _, low, high in table.iter_rows()}
    rows = [
        [
            Tag(name),
            figures.QUADRANT_NAMES[name],
            count(row["num_tokens"]),
            count(row["num_rollouts"]),
            count(row["num_prompts"]),
            percent(row["share"]),
            ends.get(name, ""),
            FromPaper(_paper_range(name)),
        ]
        for row in view.shares.iter_rows(named=True)
        for name in [str(row["quadrant"])]
    ]
    caption = f"Tokens of each quadrant. {view.interval_words()}"
    return Table(_SHARE_COLUMNS, rows, caption, frozenset({2, 3, 4, 5, 6, 7}))


_SHARE_COLUMNS = [
    "quadrant",
    "student is",
    "tokens",
    "in rollouts",
    "in prompts",
    "share",
    "95% interval",
    "paper’s range",
]


def _paper_range(name: str) -> str:
    if name in ("Q1", "Q2"):
        return f"{paper.range_of('Q1+Q2')} (Q1+Q2)"
    return paper.range_of(name)


def _carried_block(view: RunView) -> Table:
    """What a quadrant's tokens are like on average, and its part of the loss."""
    table = widen(view.quadrant_means)
    rows = [
        [
            Tag(str(row["quadrant"])),
            number(row["mean_student_entropy"]),
            number(row["mean_teacher_entropy"]),
            number(row["mean_reverse_kl"]),
            number(row["mean_forward_kl"]),
            percent(row["share_reverse_kl"]),
            interval(row["share_reverse_kl_low"], row["share_reverse_kl_high"]),
        ]
        for row in table.iter_rows(named=True)
    ]
    columns = [
        "quadrant",
        "student entropy",
        "teacher entropy",
        "reverse KL",
        "forward KL",
        "share of Σ reverse KL",
        "95% interval",
    ]
    caption = (
        "Means over the tokens of each quadrant, in nats, and its share of the summed loss; +∞ is"
        " left out."
    )
    return Table(columns, rows, caption, frozenset(range(1, 7)))


def _planted_block(view: RunView) -> Table:
    found = planted_detection(view.tokens).row(0, named=True)
    rows = [
        [
            "recall",
            percent(found["q3_recall"]),
            (
                f"of {count(found['num_confident'])} planted errors with student top-1 ≥ 0.9"
                " are in Q3"
            ),
        ],
        ["precision", percent(found["q3_precision"]), "of Q3 tokens are planted errors"],
        [
            "AUC",
            number(found["auc"]),
            f"of the Q3 score for {count(found['num_planted'])} planted errors among all tokens",
        ],
    ]
    caption = (
        "The arithmetic pair has planted errors, so that the taxonomy can be checked against the"
        " truth."
    )
    return Table(["planted errors", "value", "meaning"], rows, caption, frozenset({1}))


def _comparison(views: Sequence[RunView]) -> Part:
    table = pl.concat([view.share_table for view in views])
    drawn = picture(
        lambda width: figures.quadrant_shares(table, PAPER_RANGES, width=width),
        key="shares-all",
        caption=(
            "The runs side by side, each with its own cuts where those are measured on the data."
        ),
        alt="Bars of the quadrant shares of each run; the table below has the numbers.",
    )
    by_q3 = sorted(views, key=lambda view: view.share_of["Q3"])
    finding = (
        f"Of {len(views)} runs, Q3 is smallest in {by_q3[0].name}"
        f" ({percent(by_q3[0].share_of['Q3'])}) and largest in {by_q3[-1].name}"
        f" ({percent(by_q3[-1].share_of['Q3'])})."
    )
    return Part(finding, [drawn, _runs_block(views)], run="All runs")


def _runs_block(views: Sequence[RunView]) -> Table:
    names = figures.QUADRANT_COLORS
    rows = [
        [
            view.name,
            *(visible(name, 40) for name in view.model_names()),
            count(view.population.num_tokens),
            *(percent(view.share_of[name]) for name in names),
            number(view.cuts.entropy.value),
            number(view.cuts.divergence.value),
        ]
        for view in views
    ]
    columns = ["run", "student", "teacher", "tokens", *names, "entropy cut", "divergence cut"]
    return Table(columns, rows, "Runs side by side; cuts in nats.", frozenset(range(3, 10)))


def _cut_words(view: RunView) -> str:
    words = []
    for cut in (view.cuts.entropy, view.cuts.divergence):
        where = "one for each batch" if cut.scope == Scope.BATCH else f"{number(cut.value)} nats"
        words.append(
            f"{cut.axis} cut: {cut.spec} ({where})"
            if cut.spec != where.split()[0]
            else f"{cut.axis} cut: {where}"
        )
    return f"{'; '.join(words)}; high is strictly above."


def slug_of(view: RunView) -> str:
    """The run's name as part of an id."""
    plain = "".join(character if character.isalnum() else "-" for character in view.name)
    return plain if plain == view.name else f"{plain}-{crc32(view.name.encode()):08x}"


def label_of(view: RunView, views: Sequence[RunView]) -> str:
    """The run's name where there are several."""
    return view.name if len(views) > 1 else ""
