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

Anything else is `not resolved`; a claim whose arms were not run is `not run`. Accuracies,
differences and the margin are shares in [0, 1], the paper's percentages included.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis import accuracy
from tip_analysis.analysis.arms import Arm
from tip_analysis.analysis.bootstrap import bootstrap_interval
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.resources import data_path
from tip_analysis.core.result_tables import VERDICTS

DEFAULT_MARGIN = 0.02
"""Two points: how far apart two accuracies may be and still count as equal."""

PAPER_RESULTS = "tip_paper_results.csv"

Arms = tuple[Arm, Arm]
"""A and B."""

Relation = Literal[">", "≈", "≳"]


@dataclass(frozen=True)
class Claim:
    """Arm A compared with arm B, each a rule and a retention ratio; None for every ratio that both
    were run at."""

    name: str
    statement: str
    rule_a: str
    ratio_a: float | None
    relation: Relation
    rule_b: str
    ratio_b: float | None


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
)
"""The claims of the paper that any pair can be tested on."""


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


def judge(relation: Relation, low: float | None, high: float | None, margin: float) -> str:
    """The verdict that an interval gives on a relation; `not resolved` where there is no
    interval."""
    if low is None or high is None or not (np.isfinite(low) and np.isfinite(high)):
        return "not resolved"
    supported, contradicted = {
        ">": (low > 0.0, high < 0.0),
        "≈": (low >= -margin and high <= margin, low > margin or high < -margin),
        "≳": (low > -margin, high < -margin),
    }[relation]
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
    number of problems.

    Args:
        a, b: One row per seed and problem: seed, problem_id, mean_reward. Those of both are paired;
            seeds are averaged first.
        num_resamples: Of problems.
        seed: Of the resamples.
    """
    keys = ["seed", "problem_id"]
    joined = (
        a.select(*keys, "mean_reward")
        .join(b.select(*keys, "mean_reward"), on=keys, suffix="_b")
        .drop_nulls()
    )
    by_problem = (
        joined.group_by("problem_id").agg(
            (pl.col("mean_reward") - pl.col("mean_reward_b")).mean().alias("difference")
        )
    ).sort("problem_id")
    if by_problem.height == 0:
        return None, None, None, 0
    differences = by_problem["difference"].cast(pl.Float64).to_numpy()[:, None]
    interval = bootstrap_interval(
        differences, np.ones_like(differences), num_resamples=num_resamples, seed=seed
    )
    low, high = (
        float(end[0]) if np.isfinite(end[0]) else None for end in (interval.low, interval.high)
    )
    return float(interval.value[0]), low, high, by_problem.height


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
        arms: One row per arm and seed: rule, retention_ratio, seed and the metric, a share in [0,
            1]. With a column `step` the last one of each arm and seed counts, and with `num_steps`
            only arms that were trained to the end.
        problems: One row per arm, seed and problem: rule, retention_ratio, seed, problem_id,
            mean_reward. Taken from `problem_ids` and `problem_accuracy` of `arms` where these are
            there.
        metric: Column of `arms` to compare.
        margin: How far from 0 a difference may lie and still be "≈", a share.
        claims: Which claims.
        seed: Of the bootstrap over problems.

    Returns:
        claim, statement, arm_a, arm_b, relation, effect (A − B), low, high (t over seeds),
        num_seeds, problem_effect, problem_low, problem_high, num_problems, margin, verdict; and of
        the paper, over its pairs and benchmarks: paper_median, paper_min, paper_max (differences),
        paper_comparisons, paper_agreeing (how many of them would support the claim if they were
        exact).

    Raises:
        SchemaError: a column is missing, or an arm has two rows for one seed.
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
    rows = [
        _judged(claim, pair, arms, problems, metric, margin, seed)
        for claim in claims
        for pair in _arms_of(claim, arms)
    ]
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def _judged(
    claim: Claim,
    pair: Arms,
    arms: pl.DataFrame,
    problems: pl.DataFrame,
    metric: str,
    margin: float,
    seed: int,
) -> tuple:
    """One row of the table."""
    a, b = (arms.filter(arm.rows()) for arm in pair)
    effect = paired_difference(a, b, metric)
    by_problem = problem_difference(*(problems.filter(arm.rows()) for arm in pair), seed=seed)
    was_run = a.height and b.height
    verdict = judge(claim.relation, effect[1], effect[2], margin) if was_run else "not run"
    named = (claim.name, claim.statement, *map(str, pair), claim.relation)
    return (*named, *effect, *by_problem, margin, verdict, *_paper_summary(claim, pair, margin))


_SCHEMA = {
    **dict.fromkeys(["claim", "statement", "arm_a", "arm_b", "relation"], pl.String),
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
    """Mean of the metric over seeds: arm, rule, retention_ratio, mean, std (over seeds), low, high
    (95 % t), num_seeds.

    Raises:
        SchemaError: a column is missing, or an arm has two rows for one seed.
    """
    arms = _last_step(arms, metric)
    grouped = arms.group_by("rule", "retention_ratio", maintain_order=True).agg(
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
        "mean",
        "std",
        (pl.col("mean") - half).alias("low"),
        (pl.col("mean") + half).alias("high"),
        "num_seeds",
    )


def paper_differences(arms: Arms) -> pl.DataFrame:
    """The paper's own A − B on every pair and benchmark with both arms, as shares: pair, benchmark,
    difference."""
    results = paper_results().filter(pl.col("metric") == "mean@16 accuracy %")
    keys = ["pair", "benchmark"]
    a, b = (results.filter(arm.rows()).select(*keys, "mean") for arm in arms)
    joined = a.join(b, on=keys, suffix="_b", maintain_order="left")
    return joined.select(*keys, ((pl.col("mean") - pl.col("mean_b")) / 100.0).alias("difference"))


def _paper_summary(claim: Claim, arms: Arms, margin: float) -> tuple:
    differences = paper_differences(arms)["difference"]
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
    """rule, retention_ratio, seed, problem_id, mean_reward from the lists of an ablation table;
    empty where it has none."""
    keys = ["rule", "retention_ratio", "seed"]
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
    keys = ["rule", "retention_ratio", "seed"]
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
            "one row per arm and seed is needed; found several for"
            f" {', '.join(map(str, twice[:3]))}: keep one configuration"
        )
    return arms


def _require(table: pl.DataFrame, columns: list[str], purpose: str) -> None:
    if missing := [name for name in columns if name not in table.columns]:
        raise SchemaError(
            f"{purpose} needs the column(s) {', '.join(missing)}; the table has"
            f" {', '.join(table.columns)}"
        )
