"""The paper's claims and the numbers that they rest on (Section 7, Tables 3 to 8).

Reads the result tables that came with this installation. Each claim compares two named arms.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.benchmarks import (
    AGENTIC_BENCHMARK,
    MEAN_OVER_BENCHMARKS,
    paper_benchmark,
)
from tip_analysis.core.names import Relation, set_names
from tip_analysis.core.resources import data_path

PAPER_RESULTS = "tip_paper_results.csv"

Arms = tuple[Arm, Arm]
"""A and B."""


@dataclass(frozen=True)
class Claim:
    """Arm A compared with arm B, each a rule and a retention ratio; None for every ratio that both
    were run at."""

    name: str
    statement: str
    rule_a: str
    ratio_a: float | None
    relation: Relation | str
    rule_b: str
    ratio_b: float | None
    benchmark: str | None = None
    """The paper's benchmark that it is about; None for any."""

    def __post_init__(self) -> None:
        set_names(self, relation=Relation)

    def is_about(self, benchmark: str | None) -> bool:
        """Whether results on this benchmark can judge it."""
        return self.benchmark is None or paper_benchmark(benchmark) == self.benchmark


CLAIMS = (
    Claim(
        "a",
        "half of the tokens, sampled by entropy, do as well as all or better",
        "entropy_sampling",
        0.5,
        "≳",
        "all",
        1.0,
    ),
    Claim(
        "b",
        "Soft-OR beats entropy sampling at the same ratio",
        "soft_or",
        None,
        ">",
        "entropy_sampling",
        None,
    ),
    Claim(
        "c",
        "a tenth of the tokens, the overconfident ones, do as well as all",
        "q3",
        0.1,
        "≈",
        "all",
        1.0,
    ),
    Claim(
        "d",
        "overconfident tokens beat those of largest divergence",
        "q3",
        0.1,
        ">",
        "divergence",
        0.1,
    ),
    Claim(
        "e",
        "the upper half of Soft-OR beats the lower half",
        "soft_or",
        0.5,
        ">",
        "soft_or_bottom",
        0.5,
    ),
    Claim(
        "f",
        "on agentic tasks a fifth of the tokens, the overconfident ones, beat all",
        "q3",
        0.2,
        ">",
        "all",
        1.0,
        AGENTIC_BENCHMARK,
    ),
    Claim("g", "the upper half of Soft-OR beats all", "soft_or", 0.5, ">", "all", 1.0),
    Claim(
        "h",
        "half of the tokens, those of largest divergence, do as well as a tenth, the overconfident"
        " ones",
        "divergence",
        0.5,
        "≈",
        "q3",
        0.1,
    ),
    Claim(
        "i",
        "all tokens but the solved ones (Q4) do as well as all: a prediction of Table 2",
        "not:Q4",
        1.0,
        "≈",
        "all",
        1.0,
    ),
)
"""The claims of the paper: (f) on agentic tasks (Table 7), (i) a prediction that the paper does not
test (Table 2), the others on any (Tables 3 to 8)."""

PAPER_ACCURACIES = ("mean@16 accuracy %", "avg@16 %")
"""What the paper calls mean@16."""


def paper_results() -> pl.DataFrame:
    """The paper's result tables: table, pair, benchmark, metric, rule, retention_ratio, mean, std
    ("±" as printed).

    Percentages and GB as the paper prints them. Over what its "±" is taken is not stated there.

    Raises:
        InputError: the file did not come with this installation.
    """
    return pl.read_csv(
        data_path(PAPER_RESULTS),
        schema_overrides={"mean": pl.Float64, "std": pl.Float64, "table": pl.Int64},
    )


def paper_differences(arms: Arms) -> pl.DataFrame:
    """The paper's own A − B on every pair and benchmark with both arms, as shares: pair, benchmark,
    difference."""
    results = paper_results().filter(pl.col("metric").is_in(PAPER_ACCURACIES))
    keys = ["pair", "benchmark"]
    a, b = (results.filter(arm.rows()).select(*keys, "mean") for arm in arms)
    joined = a.join(b, on=keys, suffix="_b", maintain_order="left")
    return joined.select(*keys, ((pl.col("mean") - pl.col("mean_b")) / 100.0).alias("difference"))


def paper_differences_beside(
    arms: Arms, benchmark: str | None, among: Sequence[str] = ()
) -> pl.DataFrame:
    """Those of the paper's differences that may stand beside a benchmark's: pair, benchmark,
    difference.

    Args:
        arms: A and B.
        benchmark: a benchmark's name, or `MEAN_OVER_BENCHMARKS`.
        among: what the mean is over.

    Returns:
        Of a benchmark that the paper has: those on the same. Of one that it does not have: all,
        each by itself. Of a mean over benchmarks: the mean of each pair that has all of them, if
        they are the paper's.
    """
    table = paper_differences(arms)
    if benchmark != MEAN_OVER_BENCHMARKS:
        own = paper_benchmark(benchmark)
        return table if own is None else table.filter(benchmark=own)
    names = [paper_benchmark(name) or "" for name in among]
    per_pair = table.filter(pl.col("benchmark").is_in(names)).group_by("pair", maintain_order=True)
    means = per_pair.agg(pl.col("difference").mean(), pl.len().alias("count"))
    whole = means.filter(pl.col("count") == len(names))
    return whole.select("pair", pl.lit(benchmark).alias("benchmark"), "difference")
