"""The arms of several ablations side by side, and their mean over pairs of models (the paper's
Figures 1 and 4).

Reads rows of `tip_analysis.core.schema.AblationTable`, one table a pair, and the paper's result
tables; writes nothing. Every benchmark weighs the same within a pair, and every pair within the
mean; problems are never pooled. A mean is over the pairs that have the arm, all of them or none:
an arm that one pair lacks has no mean.
"""

from collections.abc import Mapping

import polars as pl

from tip_analysis.analysis.ablation_tables import final_arms
from tip_analysis.analysis.benchmarks import (
    MEAN_OVER_BENCHMARKS,
    benchmarks_of,
    with_mean_over_benchmarks,
)
from tip_analysis.analysis.paper_claims import PAPER_ACCURACIES, paper_results
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.result_tables import PairAccuracyTable

MEAN_OVER_PAIRS = "mean over pairs"
"""Stands where a pair's name stands; every pair weighs the same."""
_KEYS = ["rule", "retention_ratio"]


def arms_of_pairs(ablations: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Accuracy and Best@k of each arm of each pair, means over seeds and benchmarks, and their mean
    over pairs where there are several: a
    `result_tables.PairAccuracyTable`.

    Args:
        ablations: rows of the ablation table by the name of their pair.
    """
    parts = [_of_pair(name, table) for name, table in ablations.items()]
    return _with_mean([part for part in parts if part.height])


def paper_arms_of_pairs() -> pl.DataFrame:
    """The same of the paper's own pairs on mathematics; without Best@k, which its tables lack."""
    results = paper_results().filter(
        pl.col("metric") == PAPER_ACCURACIES[0], pl.col("table").is_in([3, 4, 5])
    )
    several = results.group_by("pair", *_KEYS, "benchmark", maintain_order=True).agg(
        pl.col("mean").mean()
    )
    benchmarks = several["benchmark"].n_unique()
    means = (
        several.group_by("pair", *_KEYS, maintain_order=True)
        .agg(pl.len().alias("_count"), (pl.col("mean").mean() / 100.0).alias("accuracy"))
        .filter(pl.col("_count") == benchmarks)
    )
    best = pl.lit(None, pl.Float64).alias("best_at_k")
    table = means.select(*_KEYS, "pair", "accuracy", best)
    return _with_mean(table.partition_by("pair", maintain_order=True))


def _of_pair(name: str, table: pl.DataFrame) -> pl.DataFrame:
    arms = final_arms(table)
    several = len(benchmarks_of(arms)) > 1
    arms = with_mean_over_benchmarks(arms, [*_KEYS, "seed"])
    if several:
        arms = arms.filter(benchmark=MEAN_OVER_BENCHMARKS)
    means = arms.group_by(_KEYS, maintain_order=True).agg(
        pl.col("accuracy").mean(), pl.col("best_at_k").mean()
    )
    return means.select(*_KEYS, pl.lit(name).alias("pair"), "accuracy", "best_at_k")


def _with_mean(parts: list[pl.DataFrame]) -> pl.DataFrame:
    if not parts:
        return pl.DataFrame(schema=polars_schema(PairAccuracyTable))
    table = pl.concat(parts)
    if len(parts) == 1:
        return table
    whole = (
        table.group_by(_KEYS, maintain_order=True)
        .agg(
            pl.col("pair").n_unique().alias("_count"),
            pl.lit(MEAN_OVER_PAIRS).alias("pair"),
            pl.col("accuracy").mean(),
            pl.when(pl.col("best_at_k").null_count() == 0)
            .then(pl.col("best_at_k").mean())
            .alias("best_at_k"),
        )
        .filter(pl.col("_count") == len(parts))
    )
    return pl.concat([table, whole.select(table.columns)])
