"""The section on artefacts: tokens that only look important, and how much of the run they are."""

from collections.abc import Sequence

import polars as pl

from tip_analysis.analysis.run_view import RunView
from tip_analysis.analysis.screening import ANY, num_artefacts
from tip_analysis.core.names import ScreenedPart
from tip_analysis.core.words import count, interval, listed, number, percent, plural
from tip_analysis.report.page import Block, Part, Section, Table
from tip_analysis.report.sections.overview import label_of, population

MEANINGS = {
    "after_end": "written after a stop token of the same turn",
    "padded_mass": "a model puts probability on rows of its head that are no shared token",
    "stop_token": "the models prefer different stop tokens that mean the same",
    "special_token": "a special token inside what the student wrote",
    "retokenized_boundary": "the edge of a text that was encoded again",
    "after_truncation": "the first token after a turn that was cut off",
    "outlier": "one divergence that sets the scale of all",
}


def artefacts(views: Sequence[RunView]) -> Section:
    """How much of each quadrant and of each sum is artefact."""
    return Section(
        "artefacts",
        "Artefacts",
        [_part(view, label_of(view, views)) for view in views],
        shows=(
            "tokens whose divergence is large for a reason that says nothing about what the student"
            " knows, and their share of each quadrant and of each sum."
        ),
        shows_not="that all other tokens matter: only the classes named here are looked for.",
    )


def _part(view: RunView, label: str) -> Part:
    if not view.population.num_tokens:
        return Part("No token has statistics.", run=label)
    blocks: list[Block] = [_stop_block(view)]
    if num_artefacts(view.screened):
        blocks.insert(0, _share_block(view.screened))
    note = f"{population(view)} {view.interval_words()}"
    return Part(_finding(view.screened), blocks, note, label)


def _finding(table: pl.DataFrame) -> str:
    found = num_artefacts(table)
    if not found:
        total = table.filter(artefact=ANY, name="reverse_kl")["num_tokens"].sum()
        return f"None of {plural(int(total), 'token')} is an artefact of a known class."
    of_loss = table.filter(artefact=ANY, name="reverse_kl").row(0, named=True)
    return (
        f"{plural(found, 'token')} ({percent(found / of_loss['num_tokens'])} of all) are artefacts,"
        f" and carry {percent(of_loss['share'])} of the summed reverse KL"
        f" {interval(of_loss['share_low'], of_loss['share_high'])}."
    )


def _share_block(table: pl.DataFrame) -> Table:
    rows = [
        [
            row["artefact"],
            MEANINGS.get(row["artefact"], "all classes together"),
            _part_words(row["part"], row["name"]),
            f"{count(row['num_artefacts'])} of {count(row['num_tokens'])}",
            percent(row["share"]),
            interval(row["share_low"], row["share_high"]),
        ]
        for row in table.filter(pl.col("num_artefacts") > 0).iter_rows(named=True)
    ]
    columns = ["artefact", "meaning", "part", "tokens", "share", "95% interval"]
    return Table(columns, rows, "Shares of artefacts, by class.", frozenset({3, 4, 5}))


def _part_words(part: str, name: str) -> str:
    return name if part != ScreenedPart.SUM else f"Σ {name}"


def _stop_block(view: RunView) -> Table:
    """Both models' stop tokens, as scoring recorded them, and what they do to the divergence."""
    config = view.stages.get("score", {}).get("config", {})
    sides = [config.get(f"{side}_stop_tokens", []) for side in ("student", "teacher")]
    texts = view.token_texts({*sides[0], *sides[1]})
    mismatch = view.raw.select(
        total=pl.col("stop_mismatch").sum(), most=pl.col("stop_mismatch").max()
    )
    total, most = mismatch.collect(engine="streaming").row(0)
    rows = [
        ["student stops with", _tokens(sides[0], texts)],
        ["teacher stops with", _tokens(sides[1], texts)],
        ["scored as", str(config.get("stop_tokens", "declared"))],
        [
            "reverse KL that is which of them, nats",
            f"{number(total)} in all, {number(most)} at most",
        ],
    ]
    caption = "Stop tokens of both models; `--stop-tokens merged` scores them as one."
    return Table(["stop tokens", ""], rows, caption, frozenset(), folded="Show the stop tokens")


def _tokens(ids: Sequence[int], texts: dict[int, str]) -> str:
    return listed([f"{texts.get(index, '')} ({index})" for index in ids]) or "none known"
