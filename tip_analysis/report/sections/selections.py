"""The section on selection rules: composition, overlap, coverage, and Proposition 2 on data."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis import mask_tables as composition
from tip_analysis.analysis.coverage_tables import coverage_curve, proposition_2
from tip_analysis.analysis.masks import recorded_measurements
from tip_analysis.analysis.rules import keeps_all
from tip_analysis.analysis.run_view import RunView
from tip_analysis.analysis.shown_masks import (
    compared_masks,
    compared_tokens,
    comparing_measurements,
    mean_composition,
    num_compared,
    overlap_at_one_ratio,
    taxonomy_of_compared,
    tokens_with_alignment,
)
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Loss
from tip_analysis.core.words import count, interval, listed, number, percent, plural
from tip_analysis.report.page import Block, Missing, Part, Section, Table, picture
from tip_analysis.report.sections.gradients import measurement_words
from tip_analysis.report.sections.overview import FEW_TOKENS, label_of, slug_of


def selections(views: Sequence[RunView]) -> Section:
    """What each rule picks, how far rules agree, and what they miss."""
    return Section(
        "selection",
        "Selection rules",
        [_part(view, label_of(view, views)) for view in views],
        shows=(
            "which quadrants a rule’s tokens come from, how alike two rules are, and how much of Q3"
            " and of Σφ each rule leaves out (Proposition 2: a rule that sees entropy alone must"
            " miss Q3)."
        ),
        shows_not="which rule trains best: only ablations can show that.",
    )


def _part(view: RunView, label: str) -> Part:
    if not view.population.num_tokens:
        return Part("No token has statistics.", run=label)
    if not view.run.has("masks"):
        command = (
            f"tip-analysis select {view.run.path} --rules entropy soft_or q3 divergence random"
            " --ratios 0.1 0.2 0.5"
        )
        return Part("", [Missing("No selection has been made.", command)], run=label)
    masks, tokens = compared_masks(view), compared_tokens(view)
    blocks: list[Block] = []
    made = composition.composition(masks, tokens)
    blocks.append(_composition_picture(view, made))
    pairs = overlap_at_one_ratio(masks)
    if pairs is not None:
        blocks.append(_overlap_picture(view, *pairs))
    aligned = tokens_with_alignment(view)
    missed = proposition_2(
        masks,
        aligned,
        num_resamples=min(200, view.options.num_resamples),
        taxonomy=taxonomy_of_compared(view),
    )
    blocks += _coverage_pictures(view, masks, aligned)
    blocks.append(_missed_block(view, missed))
    if view.has_planted_labels:
        blocks.append(_planted_block(composition.planted_recall(masks, tokens)))
    num_masks = made.filter(pl.col("quadrant") == "Q1").height
    return Part(_finding(missed), blocks, _population(view, missed, num_masks), label)


def _population(view: RunView, missed: pl.DataFrame, num_masks: int) -> str:
    n = missed.row(0, named=True)
    return (
        f"Masks as recorded, on {plural(num_masks, 'mask')};"
        f" {plural(n['num_rollouts'], 'rollout')}, {plural(n['num_prompts'], 'prompt')}."
        f" {view.interval_words()}{_compared_words(view)}{_oracle_words(view)}"
    )


def _compared_words(view: RunView) -> str:
    """On how many tokens the rules are compared, where some rule could choose among a part only."""
    total, compared = view.population.num_tokens, num_compared(view)
    if not comparing_measurements(view) or compared == total:
        return ""
    return (
        " Some rules select by gradients, which were measured for a part of the run: all rules are"
        f" compared on the same {plural(compared, 'measured token')}"
        f" ({percent(compared / total)} of the run), under the whole run’s cuts, which are held"
        " here."
    )


def _measured_words(view: RunView) -> str:
    return f" φ of the {measurement_words(view)}."


def _oracle_words(view: RunView) -> str:
    """Whose φ the rule `gradient_oracle` selected by, and whether the page shows another."""
    made_from = recorded_measurements(view.run)
    if not made_from:
        return ""
    named = listed([one.setting_words() for one in made_from])
    shown = [view.measurement()] if Loss.REVERSE_KL in view.losses else []
    differs = "" if made_from == shown else "; φ on this page is another measurement’s"
    return f" gradient_oracle selected by φ of the reverse KL ({named}){differs}."


def _finding(missed: pl.DataFrame) -> str:
    """Which rule sees most of Q3 at the smallest ρ that all rules share, and what entropy misses
    there."""
    rows = missed.filter(~keeps_all()).drop_nulls("q3_missed").sort("q3_missed")
    if rows.height == 0:
        return "Q3 is empty: no rule can miss it."
    ratio, size = rows["retention_ratio"].min(), int(rows["num_q3"][0])
    if size < FEW_TOKENS:
        return f"Q3 has {plural(size, 'token')} here, too few to say which rule keeps them."
    at_ratio = rows.filter(pl.col("retention_ratio") == ratio)
    best = at_ratio.row(0, named=True)
    low, high = (None if best[name] is None else 1 - best[name] for name in _ENDS)
    words = (
        f"At ρ = {ratio:g}, {best['rule']} keeps most of Q3: {percent(1 - best['q3_missed'])}"
        f" {interval(low, high)} of its {count(size)} tokens"
    )
    entropy = at_ratio.filter("entropy_only").sort("q3_missed", descending=True)
    if entropy.height == 0:
        return f"{words}."
    row = entropy.row(0, named=True)
    return (
        f"{words}; {row['rule']}, which sees entropy alone, misses {percent(row['q3_missed'])}"
        f" {interval(row['q3_missed_low'], row['q3_missed_high'])}."
    )


_ENDS = ("q3_missed_high", "q3_missed_low")
"""Ends of what is missed, from the high one: those of what is kept, from the low one."""


def _composition_picture(view: RunView, made: pl.DataFrame) -> Block:
    table = mean_composition(made)
    return picture(
        lambda width: figures.composition(table, width=width),
        key=f"composition-{slug_of(view)}",
        caption=(
            "What each rule selects, by quadrant; sampling rules are averaged over seeds. The pale"
            " bar shows all tokens on which the rules are compared."
        ),
        alt=(
            "Stacked bars of the quadrants in each selection; the table below says how much of Q3"
            " each rule keeps."
        ),
    )


def _overlap_picture(view: RunView, ratio: float, pairs: pl.DataFrame) -> Block:
    return picture(
        lambda width: figures.overlap(pairs, width=width),
        key=f"overlap-{slug_of(view)}",
        folded="Show how far the rules agree",
        caption=(
            f"How far the selections of two rules agree at ρ = {ratio:g}: tokens that both select"
            " over tokens that either does. Two selections drawn independently at this ρ would"
            f" agree at {number(ratio / (2 - ratio))}."
        ),
        alt="Heat map of the Jaccard index of every two rules.",
    )


def _coverage_pictures(view: RunView, masks: pl.DataFrame, aligned: pl.LazyFrame) -> list[Block]:
    columns = {"reverse_kl": "Σ reverse KL", "forward_kl": "Σ forward KL"}
    if "grad_dot_loss" in aligned.collect_schema().names():
        columns = {"grad_dot_loss": "Σφ", "reverse_kl": "Σ reverse KL"}
    try:
        table = coverage_curve(
            masks,
            aligned,
            columns=list(columns),
            num_resamples=min(200, view.options.num_resamples),
        )
    except SchemaError:
        return []
    return [
        picture(
            lambda width, column=column, label=label: figures.coverage_curve(
                table.filter(pl.col("column") == column), label=label, width=width
            ),
            key=f"coverage-{column.replace('_', '-')}-{slug_of(view)}",
            folded=f"Show how much of {label} is kept",
            caption=(
                f"How much of {label} each rule keeps at each ρ, with 95% intervals; dotted: what"
                f" chance keeps.{_measured_words(view) if column == 'grad_dot_loss' else ''}"
            ),
            alt=f"Lines of the share of {label} kept by each rule.",
        )
        for column, label in columns.items()
    ]


def _missed_block(view: RunView, missed: pl.DataFrame) -> Table:
    has_phi = "q3_alignment_missed" in missed.columns
    ordered = missed.sort("retention_ratio", "q3_missed", nulls_last=True)
    rows = [_missed_cells(row) for row in ordered.iter_rows(named=True)]
    columns = [*_MISSED_COLUMNS, *(["of Σφ in Q3 missed"] if has_phi else [])]
    caption = (
        "What each selection takes from Q3 and what it misses (Proposition 2 on data)."
        f"{_measured_words(view) if has_phi else ''}"
    )
    return Table(columns, rows, caption, frozenset({1, *range(3, len(columns))}))


_MISSED_COLUMNS = [
    "rule",
    "ρ",
    "scope",
    "seed",
    "tokens",
    "of it in Q3",
    "of Q3 missed",
    "95% interval",
]


def _missed_cells(row: dict[str, Any]) -> list[str]:
    cells = [
        row["rule"],
        f"{row['retention_ratio']:g}",
        row["selection_scope"],
        str(row["seed"]),
        count(row["num_tokens"]),
        percent(row["q3_share"]),
        percent(row["q3_missed"]),
        interval(row["q3_missed_low"], row["q3_missed_high"]),
    ]
    has_phi = "q3_alignment_missed" in row
    return [*cells, percent(row["q3_alignment_missed"])] if has_phi else cells


def _planted_block(table: pl.DataFrame) -> Table:
    rows = [
        [
            row["rule"],
            f"{row['retention_ratio']:g}",
            count(row["num_found"]),
            percent(row["recall"]),
            percent(row["precision"]),
        ]
        for row in table.sort("retention_ratio", "recall", descending=[False, True]).iter_rows(
            named=True
        )
    ]
    caption = f"Planted errors found, of {count(table['num_planted'][0])} (arithmetic pair)."
    columns = ["rule", "ρ", "found", "recall", "precision"]
    return Table(columns, rows, caption, frozenset(range(1, 5)), folded="Show planted errors found")
