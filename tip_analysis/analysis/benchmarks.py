"""Results per benchmark, and their unweighted mean, which is labelled as such.

A benchmark is one set of problems. Its problems are never thrown together with another's: of
MATH-500 and AIME 2024 together, 94 % would be MATH-500, and the number would be comparable with
nothing. Where one number is wanted, it is the mean over benchmarks, each with the same weight.
"""

import re
from collections.abc import Sequence

import polars as pl

from tip_analysis.core.names import UNNAMED_BENCHMARK

MEAN_OVER_BENCHMARKS = "mean over benchmarks"
"""What stands in the column `benchmark` of rows that are an unweighted mean over benchmarks."""

AGENTIC_BENCHMARK = "DeepPlanning travel"
"""The agentic benchmark of the paper (Table 7)."""

_PAPER_NAMES = {
    "math500": "MATH-500",
    **dict.fromkeys(["aime24", "aime2024"], "AIME24"),
    **dict.fromkeys(["aime25", "aime2025"], "AIME25"),
    **dict.fromkeys(["deepplanning", "deepplanningtravel"], AGENTIC_BENCHMARK),
}
_MEAN = (
    "accuracy",
    "best_at_k",
    "majority_at_k",
    "response_tokens",
    "truncated_share",
    "heldout_reverse_kl",
)
_LISTS = ("problem_ids", "problem_accuracy", "problem_best", "problem_correct")


def paper_benchmark(name: str | None) -> str | None:
    """What the paper calls this benchmark, if it is one of the paper's: `AIME24` of `aime_2024`."""
    return _PAPER_NAMES.get(re.sub(r"[^a-z0-9]", "", (name or "").lower()))


def with_benchmark(table: pl.DataFrame) -> pl.DataFrame:
    """The table with its column `benchmark`; one without it holds one nameless benchmark."""
    if "benchmark" in table.columns:
        return table
    return table.with_columns(pl.lit(UNNAMED_BENCHMARK).alias("benchmark"))


def benchmarks_of(table: pl.DataFrame) -> list[str]:
    """The benchmarks of a table in the order in which they come, the mean left out."""
    names = with_benchmark(table)["benchmark"].unique(maintain_order=True)
    return [name for name in names if name != MEAN_OVER_BENCHMARKS]


def with_mean_over_benchmarks(
    table: pl.DataFrame, keys: Sequence[str], metrics: Sequence[str] = ()
) -> pl.DataFrame:
    """The table and, where it has several benchmarks, their unweighted mean for each evaluation.

    Args:
        table: one row per evaluation and benchmark.
        keys: what tells one evaluation from another: rule, retention_ratio, seed …
        metrics: columns to average beside `accuracy`, `best_at_k`, `majority_at_k`,
            `heldout_reverse_kl` and what responses are like.

    Returns:
        The rows and, with `MEAN_OVER_BENCHMARKS` as `benchmark`, one row for each evaluation that
        has every benchmark. `accuracy_se` of a mean of B is √(Σ se²) / B; lists of problems are
        empty; `num_problems` is null; other columns are those of the first benchmark.
    """
    table = with_benchmark(table)
    benchmarks = benchmarks_of(table)
    if len(benchmarks) < 2:
        return table
    others = [name for name in table.columns if name not in (*keys, "benchmark")]
    rows = (
        table.filter(pl.col("benchmark") != MEAN_OVER_BENCHMARKS)
        .group_by(keys, maintain_order=True)
        .agg(
            pl.col("benchmark").n_unique().alias("_count"),
            *(_averaged(name, {*_MEAN, *metrics}) for name in others),
        )
        .filter(pl.col("_count") == len(benchmarks))
        .with_columns(pl.lit(MEAN_OVER_BENCHMARKS).alias("benchmark"))
        .select(table.columns)
    )
    return pl.concat([table, rows.cast(table.schema)])


def _averaged(name: str, metrics: set[str]) -> pl.Expr:
    column = pl.col(name)
    if name in metrics:  # unknown where a benchmark's is
        return pl.when(column.null_count() == 0).then(column.mean()).alias(name)
    if name == "accuracy_se":
        se = column.pow(2).sum().sqrt() / column.len()
        return pl.when(column.null_count() == 0).then(se).alias(name)
    if name in _LISTS:
        return column.first().list.head(0)
    return pl.lit(None).alias(name) if name == "num_problems" else column.first()
