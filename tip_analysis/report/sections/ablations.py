"""The section on training ablations: accuracy of each arm, and the paper's claims beside the
paper's own numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from tip_analysis import figures
from tip_analysis.analysis.ablation_tables import (
    arm_accuracies,
    arm_costs,
    claim_effects,
    differences_from_all,
    final_arms,
    paper_differences_from_all,
    paper_memory,
    relative_memory,
)
from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.benchmarks import MEAN_OVER_BENCHMARKS, benchmarks_of
from tip_analysis.analysis.claims import arm_summary, claims_table
from tip_analysis.analysis.pair_tables import MEAN_OVER_PAIRS, arms_of_pairs, paper_arms_of_pairs
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.text import visible
from tip_analysis.core.words import count, interval, listed, number, percent, plural, points
from tip_analysis.report.page import (
    Block,
    FromPaper,
    Measured,
    Missing,
    Part,
    Section,
    Table,
    picture,
)
from tip_analysis.report.sections.overview import label_of, slug_of


def ablations(views: Sequence[RunView]) -> Section:
    """What training on each selection did, and which of the paper's claims hold here."""
    return Section(
        "ablations",
        "Ablations and the paper’s claims",
        [*_pairs(views), *(_part(view, label_of(view, views)) for view in views)],
        shows=(
            "the accuracy of students trained on the selected tokens alone, with equal steps,"
            " prompts and seeds, and whether the paper’s claims hold on this pair by a rule that"
            " was fixed beforehand."
        ),
        shows_not=(
            "that a claim fails where it is not resolved: few seeds leave wide intervals; nor"
            " anything about other pairs."
        ),
    )


def _pairs(views: Sequence[RunView]) -> list[Part]:
    """Several ablations side by side, where there are several."""
    tables = {
        label_of(view, views): view.run.ablations().collect()
        for view in views
        if view.run.has("ablations")
    }
    ours = arms_of_pairs(tables)
    if MEAN_OVER_PAIRS not in ours["pair"]:
        return []
    paper = paper_arms_of_pairs()
    pairs = ours["pair"].n_unique() - 1
    blocks: list[Block] = [
        picture(
            lambda width: figures.mean_over_pairs(ours, paper, mean=MEAN_OVER_PAIRS, width=width),
            key="mean-over-pairs",
            caption=(
                "Accuracy of each arm, unweighted mean over these runs, each of which is a stroke."
                " Hollow diamonds are the paper’s mean over its own pairs on mathematics: other"
                " models, other problems. An arm that one run lacks is left out."
            ),
            alt="Dots of mean accuracy over pairs for each arm.",
        ),
        picture(
            lambda width: figures.average_and_best(ours, width=width),
            key="average-and-best",
            caption="mean@k and Best@k of each arm, run by run, and their mean over runs.",
            alt="Marks of mean@k and Best@k for each arm of each run.",
        ),
    ]
    finding = f"{plural(pairs, 'run')} have ablations; every run weighs the same in the mean."
    return [Part(finding, blocks, "Means over seeds and benchmarks.", "all runs")]


@dataclass(frozen=True)
class _Shown:
    """A benchmark, or the mean over them, whose results pictures show."""

    name: str
    suffix: str
    """What tells its pictures from those of other benchmarks."""
    caption: str
    """Whose results they are, where there are several benchmarks."""


def _shown(arms: pl.DataFrame) -> list[_Shown]:
    """The benchmarks of a run and, of several, their mean."""
    names = benchmarks_of(arms)
    if len(names) == 1:
        return [_Shown(names[0], "", "")]
    each = [_Shown(name, f"-{i}", f"{visible(name, 60)}. ") for i, name in enumerate(names)]
    return [*each, _Shown(MEAN_OVER_BENCHMARKS, "-mean", "Unweighted mean over benchmarks. ")]


def _part(view: RunView, label: str) -> Part:
    command = (
        f"tip-analysis ablate {view.run.path} --rules all entropy_sampling soft_or soft_or_bottom"
        " q3 divergence random --ratios 0.5 0.1 --seeds 0 1 2"
    )
    if not view.run.has("ablations"):
        return Part("", [Missing("No ablation has been run.", command)], run=label)
    table = view.run.ablations().collect()
    arms = final_arms(table)
    if arms.is_empty():
        return Part("", [Missing("No arm has been trained to its end.", command)], run=label)
    judged = claims_table(arms)
    summary = arm_summary(arms)
    shown = _shown(arms)
    blocks: list[Block] = [_accuracy_picture(view, table, one) for one in shown]
    minus_all = differences_from_all(arms)
    if minus_all.height:
        blocks += [_difference_picture(view, minus_all, one) for one in shown]
    blocks += [
        _claims_picture(view, judged),
        _claims_block(judged),
        _arms_block(arms, summary),
        _memory_picture(view, arms),
    ]
    return Part(_finding(judged, arms), blocks, _population(arms, summary), label)


def _population(arms: pl.DataFrame, summary: pl.DataFrame) -> str:
    first = arms.row(0, named=True)
    return (
        f"{plural(summary['arm'].n_unique(), 'arm')}, {plural(arms['seed'].n_unique(), 'seed')},"
        f" {plural(first['num_steps'], 'step')}; {_problems(arms)} with"
        f" {plural(first['num_samples'], 'sample')} each; {first['mode']}, loss {first['loss']}"
        f" over {first['loss_normalizer']} tokens. Intervals are 95 %, Student’s t over seeds."
    )


def _problems(arms: pl.DataFrame) -> str:
    """How many problems each benchmark has."""
    counts = arms.group_by("benchmark", maintain_order=True).agg(pl.col("num_problems").first())
    if counts.height == 1:
        return f"{counts['num_problems'][0]} problems"
    return listed([f"{n} problems of {visible(name, 40)}" for name, n in counts.iter_rows()])


def _finding(judged: pl.DataFrame, arms: pl.DataFrame) -> str:
    """Which claims hold: on the one benchmark, or for the mean over several."""
    where = ""
    if judged["benchmark"].n_unique() > 1:
        judged = judged.filter(benchmark=MEAN_OVER_BENCHMARKS)
        where = ", for the unweighted mean over benchmarks"
    words = []
    several = pl.len().over("claim") > 1
    ratio = pl.Series([f" at ρ = {Arm.parse(arm).retention_ratio:g}" for arm in judged["arm_a"]])
    named = judged.with_columns(
        pl.col("claim") + pl.when(several).then(ratio).otherwise(pl.lit(""))
    )
    for verdict in ("supported", "contradicted", "not resolved", "not run"):
        names = named.filter(pl.col("verdict").cast(pl.String) == verdict)["claim"].to_list()
        if names:
            words.append(f"{verdict}: {listed(names)}")
    number = f"{plural(arms['seed'].n_unique(), 'seed')}, {_problems(arms)}"
    return f"The paper’s claims on this pair ({number}){where}: {'; '.join(words)}."


def _accuracy_picture(view: RunView, table: pl.DataFrame, shown: _Shown) -> Block:
    drawn = arm_accuracies(table).filter(benchmark=shown.name)
    metric = f"mean@{final_arms(table)['num_samples'][0]}"
    return picture(
        lambda width: figures.accuracy_by_ratio(drawn, metric=metric, width=width),
        key=f"accuracy-{slug_of(view)}{shown.suffix}",
        caption=shown.caption
        + (
            "Accuracy after training on the selected tokens alone, mean over seeds with its 95%"
            " interval. Horizontal lines: training on all tokens, and the student before training."
        ),
        alt=(
            "Lines of accuracy against retention ratio for each rule; the table below has the"
            " numbers."
        ),
    )


def _difference_picture(view: RunView, minus_all: pl.DataFrame, shown: _Shown) -> Block:
    ours, theirs = (
        table.filter(benchmark=shown.name)
        for table in (minus_all, paper_differences_from_all(minus_all))
    )
    return picture(
        lambda width: figures.difference_from_all(ours, theirs, width=width),
        key=f"minus-all-{slug_of(view)}{shown.suffix}",
        folded="Show differences from training on all tokens, beside the paper’s",
        caption=shown.caption
        + (
            "Accuracy minus that of training on all tokens, paired by seed. Hollow diamonds are the"
            " paper’s own differences, one for each of its pairs (and benchmarks, where it does not"
            " have this one): other models, other problems."
        ),
        alt="Marks of the difference from training on all tokens, for this run and for the paper.",
    )


def _claims_picture(view: RunView, judged: pl.DataFrame) -> Block:
    drawn = claim_effects(judged)
    return picture(
        lambda width: figures.claims(drawn, width=width),
        key=f"claims-{slug_of(view)}",
        caption=(
            "The effect of each claim with its 95% interval over seeds, and the verdict that it"
            " gives."
        ),
        alt="Marks of the effect of each claim; the table below has the numbers.",
    )


def _claims_block(judged: pl.DataFrame) -> Table:
    margin = percent(judged["margin"][0], 0).removesuffix("%")
    caption = (
        "Differences of accuracy in points. A claim “>” is supported if its interval over seeds"
        f" lies above 0, “≈” if within ±{margin} points, “≳” if above −{margin}; contradicted if it"
        " lies wholly on the other side; otherwise not resolved. Each benchmark is judged by"
        f" itself; “{MEAN_OVER_BENCHMARKS}” gives each the same weight."
    )
    rows = [_claim_cells(row) for row in judged.iter_rows(named=True)]
    opener = f"Show the {len(rows)} comparisons"
    return Table(_CLAIM_COLUMNS, rows, caption, frozenset({4, 5}), folded=opener)


_CLAIM_COLUMNS = [
    "claim",
    "that",
    "benchmark",
    "arms",
    "effect (seeds)",
    "effect (problems)",
    "verdict",
    "paper: median (range)",
    "paper: agreeing",
]


def _claim_cells(row: dict[str, Any]) -> list[Any]:
    ends = ("low", "high"), ("problem_low", "problem_high")
    seeds, problems = (_point_interval(*(row[name] for name in pair)) for pair in ends)
    return [
        row["claim"],
        row["statement"],
        visible(row["benchmark"] or "–", 40),
        f"{row['arm_a']} {row['relation']} {row['arm_b']}",
        Measured(points(row["effect"]), seeds),
        Measured(points(row["problem_effect"]), problems),
        str(row["verdict"]),
        *_paper_cells(row),
    ]


def _paper_cells(row: dict[str, Any]) -> list[str | FromPaper]:
    if not row["paper_comparisons"]:
        return ["–", "–"]
    low, high = points(row["paper_min"]), points(row["paper_max"])
    return [
        FromPaper(f"{points(row['paper_median'])} ({low} to {high})"),
        FromPaper(f"{row['paper_agreeing']} of {row['paper_comparisons']}"),
    ]


def _arms_block(arms: pl.DataFrame, summary: pl.DataFrame) -> Table:
    """A row per arm; a column of accuracy and one of Best@k per benchmark."""
    keys = ["rule", "retention_ratio", "benchmark"]
    joined = summary.join(arm_costs(arms), on=keys, how="left", maintain_order="left")
    benchmarks = list(summary["benchmark"].unique(maintain_order=True))
    by_arm: dict[str, _ArmRows] = {}
    for row in joined.iter_rows(named=True):
        by_arm.setdefault(row["arm"], {})[row["benchmark"]] = row
    ordered = sorted(by_arm.values(), key=lambda rows: -_mean_on(rows, benchmarks[-1]))
    columns = ["arm", "seeds", *_accuracy_columns(benchmarks), *_COST_COLUMNS]
    caption = (
        "Arms by accuracy (± standard deviation over seeds); held-out reverse KL in nats a token."
    )
    if len(benchmarks) > 1:
        caption += f" “{MEAN_OVER_BENCHMARKS}” gives each benchmark the same weight."
    rows = [_arm_cells(rows, benchmarks) for rows in ordered]
    return Table(columns, rows, caption, frozenset(range(1, len(columns))))


_ArmRows = dict[str, dict[str, Any]]
"""What an arm reached on each benchmark."""

_ACCURACIES = ("accuracy", "Best@k", "majority@k")
_COST_COLUMNS = ["held-out KL", "tokens trained on", "seconds per step", "peak GB"]


def _mean_on(rows: _ArmRows, benchmark: str) -> float:
    return rows[benchmark]["mean"] if benchmark in rows else -math.inf


def _accuracy_columns(benchmarks: list[str]) -> list[str]:
    if len(benchmarks) == 1:
        return list(_ACCURACIES)
    names = [visible(name, 40) for name in benchmarks]
    return [f"{what}: {name}" for name in names for what in _ACCURACIES]


def _arm_cells(rows: _ArmRows, benchmarks: list[str]) -> list[Any]:
    last = list(rows.values())[-1]
    accuracies = [cell for name in benchmarks for cell in _accuracy_cells(rows.get(name))]
    return [
        visible(last["arm"], 40),
        str(last["num_seeds"]),
        *accuracies,
        number(last["heldout_reverse_kl"]),
        count(round(last["tokens_trained"])),
        number(last["step_time_s"]),
        number(last["peak_memory_bytes"] / 1e9),
    ]


def _accuracy_cells(row: dict[str, Any] | None) -> list[Any]:
    if row is None:
        return ["–"] * len(_ACCURACIES)
    spread = "" if row["std"] is None else f"± {percent(row['std'])}"
    most = row["majority_at_k"]
    voted = "–" if most is None else percent(most)
    return [Measured(percent(row["mean"]), spread), percent(row["best_at_k"]), voted]


def _memory_picture(view: RunView, arms: pl.DataFrame) -> Block:
    ours, paper = relative_memory(arms), paper_memory()
    return picture(
        lambda width: figures.memory_by_ratio(ours, paper, width=width),
        folded="Show peak memory beside the paper’s",
        key=f"memory-{slug_of(view)}",
        caption=(
            "Peak memory of training relative to training on all tokens. With a small model most"
            " memory is not logits, so less is saved."
        ),
        alt=(
            "Marks of relative peak memory against retention ratio, for this run and for the paper."
        ),
    )


def _point_interval(low: float | None, high: float | None) -> str:
    return interval(low, high) and f"[{points(low)}, {points(high)}]"
