"""The paper's claims, tested on the arms of an ablation, beside the paper's own numbers (Section
7).

Reads rows of `tip_analysis.core.schema.AblationTable`, or any table of arms and seeds; writes
nothing. Each claim is a paired difference of two named arms: same seeds, same problems. The verdict
follows the 95 % t interval over seeds; a bootstrap over problems stands beside it, since seeds say
how training varies and problems how the test set does.

| relation | supported | contradicted |
| --- | --- | --- |
| `>` | the interval lies above 0 | below 0 |
| `≈` | within ±margin | wholly outside ±margin |
| `≳` (≈ or >) | above −margin | below −margin |

Each benchmark is judged by itself; with several, their unweighted mean is judged too and labelled
as such. The paper's numbers that stand beside a benchmark are those of the same benchmark; beside
one that the paper does not have, they are all of the paper's, each a difference of its own.

Anything else is `not resolved`; a claim whose arms were not run is `not run`. Accuracies,
differences and the margin are shares in [0, 1], the paper's percentages included.
"""

from collections.abc import Iterable

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis import accuracy
from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.benchmarks import (
    MEAN_OVER_BENCHMARKS,
    benchmarks_of,
    with_benchmark,
    with_mean_over_benchmarks,
)
from tip_analysis.analysis.bootstrap import expanded_interval, prompt_weights
from tip_analysis.analysis.paper_claims import CLAIMS, Arms, Claim, paper_differences_beside
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.names import Relation
from tip_analysis.core.result_tables import VERDICTS

DEFAULT_MARGIN = 0.02
"""Two points: how far apart two accuracies may be and still count as equal."""


def judge(relation: Relation | str, low: float | None, high: float | None, margin: float) -> str:
    """The verdict that an interval gives on a relation; `not resolved` where there is no
    interval."""
    if low is None or high is None or not (np.isfinite(low) and np.isfinite(high)):
        return "not resolved"
    supported, contradicted = {
        ">": (low > 0.0, high < 0.0),
        "≈": (low >= -margin and high <= margin, low > margin or high < -margin),
        "≳": (low > -margin, high < -margin),
    }[Relation(relation)]
    return "supported" if supported else "contradicted" if contradicted else "not resolved"


def paired_difference(
    a: pl.DataFrame, b: pl.DataFrame, metric: str
) -> tuple[float | None, float | None, float | None, int]:
    """Mean difference A − B over the seeds that both have, with the ends of its 95 % t interval,
    and the number of seeds.

    Args:
        a, b: One row per seed: seed, and the metric.
        metric: Column to compare.
    """
    joined = (
        a.select("seed", metric)
        .join(b.select("seed", metric), on="seed", suffix="_b")
        .drop_nulls()
        .sort("seed")
    )
    if joined.height == 0:
        return None, None, None, 0
    ours, theirs = (joined[name].cast(pl.Float64).to_numpy() for name in (metric, f"{metric}_b"))
    found = accuracy.paired_difference(ours, theirs)
    if joined.height == 1:
        return found.difference, None, None, 1
    return found.difference, found.low, found.high, joined.height


def problem_difference(
    a: pl.DataFrame, b: pl.DataFrame, *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float | None, float | None, float | None, int]:
    """Mean difference A − B over problems, with the ends of its 95 % bootstrap interval, and the
    number of problems. Over several benchmarks: the unweighted mean of theirs.

    Problems are drawn within their benchmark. The interval is expanded as that of the benchmark
    with fewest problems would be.

    Args:
        a, b: One row per seed and problem: seed, problem_id, mean_reward, and benchmark where there
            are several. Those of both are paired; seeds are averaged first.
        num_resamples: Of problems.
        seed: Of the resamples.
    """
    parts = _problem_differences(with_benchmark(a), with_benchmark(b))
    if not parts:
        return None, None, None, 0
    replicates = [
        prompt_weights(len(part), num_resamples, seed + index) @ part / len(part)
        for index, part in enumerate(parts)
    ]
    means = np.array([part.mean() for part in parts])
    interval = expanded_interval(
        means.mean(keepdims=True),
        np.mean(replicates, axis=0)[:, None],
        min(len(part) for part in parts),
    )
    low, high = (
        float(end[0]) if np.isfinite(end[0]) else None for end in (interval.low, interval.high)
    )
    return float(interval.value[0]), low, high, sum(len(part) for part in parts)


def _problem_differences(a: pl.DataFrame, b: pl.DataFrame) -> list[np.ndarray]:
    """A − B of each problem that both have, for each benchmark; seeds are averaged."""
    keys = ["seed", "benchmark", "problem_id"]
    joined = (
        a.select(*keys, "mean_reward")
        .join(b.select(*keys, "mean_reward"), on=keys, suffix="_b")
        .drop_nulls()
    )
    difference = (pl.col("mean_reward") - pl.col("mean_reward_b")).mean().cast(pl.Float64)
    table = joined.group_by("benchmark", "problem_id").agg(difference.alias("difference"))
    groups = table.sort("problem_id").partition_by("benchmark", maintain_order=True)
    return [group["difference"].to_numpy() for group in groups]


def claims_table(
    arms: pl.DataFrame,
    *,
    problems: pl.DataFrame | None = None,
    metric: str = "accuracy",
    margin: float = DEFAULT_MARGIN,
    claims: Iterable[Claim] = CLAIMS,
    seed: int = 0,
) -> pl.DataFrame:
    """The verdict on each claim, with effect and intervals, beside the paper's own differences.

    Args:
        arms: One row per arm, seed and benchmark: rule, retention_ratio, seed, benchmark (where
            there is one) and the metric, a share in [0, 1]. With a column `step` the last one of
            each arm and seed counts, and with `num_steps` only arms that were trained to the end.
        problems: One row per arm, seed and problem: rule, retention_ratio, seed, problem_id,
            mean_reward, benchmark. Taken from `problem_ids` and `problem_accuracy` of `arms` where
            these are there.
        metric: Column of `arms` to compare.
        margin: How far from 0 a difference may lie and still be "≈", a share.
        claims: Which claims.
        seed: Of the bootstrap over problems.

    Returns:
        One row per claim, pair of ratios and benchmark, the unweighted mean over several benchmarks
        last: claim, statement, benchmark, arm_a, arm_b, relation, effect (A − B), low, high (t over
        seeds), num_seeds, problem_effect, problem_low, problem_high, num_problems, margin, verdict;
        and of the paper, over its pairs on this benchmark (over pairs and benchmarks where the
        paper does not have it): paper_median, paper_min, paper_max (differences),
        paper_comparisons, paper_agreeing (how many of them would support the claim if they were
        exact).

    Raises:
        SchemaError: a column is missing, or an arm has two rows for one seed and benchmark.
        OptionError: the margin is negative.
    """
    if not margin >= 0.0:
        raise OptionError(f"margin must be a share of at least 0; found {margin}")
    arms = _last_step(arms, metric)
    if problems is None:
        problems = _problems_of(arms)
    else:
        _require(
            problems,
            ["rule", "retention_ratio", "seed", "problem_id", "mean_reward"],
            "claims_table (problems)",
        )
        problems = with_benchmark(problems)
    arms = with_mean_over_benchmarks(arms, ["rule", "retention_ratio", "seed"], [metric])
    results = [
        (name, arms.filter(benchmark=name), _of_benchmark(problems, name))
        for name in arms["benchmark"].unique(maintain_order=True)
    ] or [(None, arms, problems)]
    rows = [
        _judged(claim, pair, result, benchmarks_of(arms), metric, margin, seed)
        for claim in claims
        for pair in _arms_of(claim, arms)
        for result in results
    ]
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def _judged(
    claim: Claim,
    pair: Arms,
    result: tuple[str | None, pl.DataFrame, pl.DataFrame],
    among: list[str],
    metric: str,
    margin: float,
    seed: int,
) -> tuple:
    """One row of the table.

    Args:
        result: a benchmark, its rows of arms, and those of problems.
        among: all benchmarks of the arms.
    """
    benchmark, arms, problems = result
    if not claim.is_about(benchmark):
        arms, problems = arms.clear(), problems.clear()
    a, b = (arms.filter(arm.rows()) for arm in pair)
    effect = paired_difference(a, b, metric)
    by_problem = problem_difference(*(problems.filter(arm.rows()) for arm in pair), seed=seed)
    was_run = a.height and b.height
    verdict = judge(claim.relation, effect[1], effect[2], margin) if was_run else "not run"
    named = (claim.name, claim.statement, benchmark, *map(str, pair), str(claim.relation))
    paper = _paper_summary(claim, pair, benchmark, among, margin)
    return (*named, *effect, *by_problem, margin, verdict, *paper)


def _of_benchmark(problems: pl.DataFrame, benchmark: str) -> pl.DataFrame:
    """The problems of a benchmark; of all, for the mean over benchmarks."""
    if benchmark == MEAN_OVER_BENCHMARKS:
        return problems
    return problems.filter(benchmark=benchmark)


_SCHEMA = {
    **dict.fromkeys(["claim", "statement", "benchmark", "arm_a", "arm_b", "relation"], pl.String),
    **dict.fromkeys(["effect", "low", "high"], pl.Float64),
    "num_seeds": pl.Int64,
    **dict.fromkeys(["problem_effect", "problem_low", "problem_high"], pl.Float64),
    "num_problems": pl.Int64,
    "margin": pl.Float64,
    "verdict": pl.Enum(VERDICTS),
    **dict.fromkeys(["paper_median", "paper_min", "paper_max"], pl.Float64),
    **dict.fromkeys(["paper_comparisons", "paper_agreeing"], pl.Int64),
}


def arm_summary(arms: pl.DataFrame, *, metric: str = "accuracy") -> pl.DataFrame:
    """Mean of the metric over seeds, per benchmark and for their unweighted mean: arm, rule,
    retention_ratio, benchmark, mean, std (over seeds), low, high (95 % t), num_seeds.

    Raises:
        SchemaError: a column is missing, or an arm has two rows for one seed and benchmark.
    """
    arms = _last_step(arms, metric)
    arms = with_mean_over_benchmarks(arms, ["rule", "retention_ratio", "seed"], [metric])
    grouped = arms.group_by("rule", "retention_ratio", "benchmark", maintain_order=True).agg(
        pl.col(metric).mean().alias("mean"),
        pl.col(metric).std().alias("std"),
        pl.col(metric).count().cast(pl.Int64).alias("num_seeds"),
    )
    quantiles = [float(stats.t.ppf(0.975, n - 1)) if n > 1 else None for n in grouped["num_seeds"]]
    half = pl.Series(quantiles, dtype=pl.Float64) * grouped["std"] / grouped["num_seeds"].sqrt()
    names = [
        str(Arm(rule, ratio))
        for rule, ratio in grouped.select("rule", "retention_ratio").iter_rows()
    ]
    return grouped.select(
        pl.Series("arm", names, dtype=pl.String),
        "rule",
        "retention_ratio",
        "benchmark",
        "mean",
        "std",
        (pl.col("mean") - half).alias("low"),
        (pl.col("mean") + half).alias("high"),
        "num_seeds",
    )


def _paper_summary(
    claim: Claim, arms: Arms, benchmark: str | None, among: list[str], margin: float
) -> tuple:
    """Median, ends and number of the paper's differences, and how many agree with the claim."""
    table = paper_differences_beside(arms, benchmark, among)
    about = [claim.benchmark in (None, name) for name in table["benchmark"]]
    differences = table.filter(pl.Series(about, dtype=pl.Boolean))["difference"]
    if differences.len() == 0:
        return None, None, None, 0, 0
    agreeing = sum(
        judge(claim.relation, value, value, margin) == "supported" for value in differences
    )
    return differences.median(), differences.min(), differences.max(), differences.len(), agreeing


def _arms_of(claim: Claim, arms: pl.DataFrame) -> list[Arms]:
    """The comparisons of a claim: its own ratios, or all that both rules were run at (½ where there
    is none)."""
    if claim.ratio_a is not None and claim.ratio_b is not None:
        return [(Arm(claim.rule_a, claim.ratio_a), Arm(claim.rule_b, claim.ratio_b))]
    run = [
        set(arms.filter(pl.col("rule") == rule)["retention_ratio"].to_list())
        for rule in (claim.rule_a, claim.rule_b)
    ]
    ratios = sorted(run[0] & run[1], reverse=True) or [0.5]
    return [(Arm(claim.rule_a, ratio), Arm(claim.rule_b, ratio)) for ratio in ratios]


def _problems_of(arms: pl.DataFrame) -> pl.DataFrame:
    """rule, retention_ratio, seed, benchmark, problem_id, mean_reward from the lists of an ablation
    table; empty where it has none."""
    keys = ["rule", "retention_ratio", "seed", "benchmark"]
    if not {"problem_ids", "problem_accuracy"} <= set(arms.columns):
        empty = arms.clear().select(keys)
        return empty.with_columns(pl.lit("").alias("problem_id"), pl.lit(0.0).alias("mean_reward"))
    lists = arms.select(
        *keys,
        pl.col("problem_ids").alias("problem_id"),
        pl.col("problem_accuracy").alias("mean_reward"),
    )
    return lists.explode("problem_id", "mean_reward", empty_as_null=False)


def _last_step(arms: pl.DataFrame, metric: str) -> pl.DataFrame:
    _require(arms, ["rule", "retention_ratio", "seed", metric], "claims_table")
    arms = with_benchmark(arms)
    keys = ["rule", "retention_ratio", "seed", "benchmark"]
    if {"step", "num_steps"} <= set(arms.columns):
        arms = arms.filter(pl.col("step") == pl.col("num_steps"))
    if "step" in arms.columns:
        arms = arms.filter(pl.col("step") == pl.col("step").max().over(keys))
    if (
        twice := arms.filter(pl.struct(keys).is_duplicated())
        .select(keys)
        .unique()
        .sort(keys)
        .rows()
    ):
        raise SchemaError(
            "one row per arm and seed (and benchmark) is needed; found several for"
            f" {', '.join(map(str, twice[:3]))}: keep one configuration"
        )
    return arms


def _require(table: pl.DataFrame, columns: list[str], purpose: str) -> None:
    if missing := [name for name in columns if name not in table.columns]:
        raise SchemaError(
            f"{purpose} needs the column(s) {', '.join(missing)}; the table has"
            f" {', '.join(table.columns)}"
        )
