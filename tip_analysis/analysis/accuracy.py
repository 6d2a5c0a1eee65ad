"""How good sampled answers are: mean@k, Best@k, their standard errors, and the paired difference of
two models.

Reads rewards r[i, j] of sample j of problem i, from the evaluation table (`schema.EvaluationTable`)
or as an array [P, k].

The variance of a mean over P problems with k samples each has two parts, σ²_problems / P +
σ²_samples / (P·k). The first is there however many samples are drawn: a model may be luckier with
these problems than with others. The second falls with k. Two models on the same problems share most
of the first part; the paired difference is free of what they share, which is what makes small
differences resolvable.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from tip_analysis.analysis.benchmarks import (
    benchmarks_of,
    with_benchmark,
    with_mean_over_benchmarks,
)
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import FinishReason

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Accuracy:
    """mean@k and Best@k of one model; standard errors are NaN where one problem or one sample is
    too few for them."""

    num_problems: int
    num_samples: int
    """k, samples of each problem."""
    accuracy: float
    """mean@k: mean reward over samples, then problems."""
    accuracy_se: float
    """Its standard error over problems and samples: standard deviation of the problems' means /
    √P."""
    accuracy_se_problems: float
    """The part that more samples would not lessen: √(σ²_problems / P)."""
    accuracy_se_samples: float
    """The part that is left when the problems are taken as given: √(σ²_samples / (P·k))."""
    best_at_k: float
    """Best@k: mean over problems of the best of the k samples."""
    best_at_k_se: float
    """Its standard error over problems."""


def accuracy(rewards: np.ndarray) -> Accuracy:
    """mean@k and Best@k with standard errors, of rewards [P, k].

    σ²_samples is the mean over problems of the unbiased variance within a problem; what it leaves
    of the total is the problems' part, 0 where it leaves nothing.
    """
    num_problems, num_samples = rewards.shape
    means, best = rewards.mean(1), rewards.max(1)
    total = _variance(means) / num_problems
    within = (
        float(rewards.var(1, ddof=1).mean()) / (num_problems * num_samples)
        if num_samples > 1
        else math.nan
    )
    return Accuracy(
        num_problems=num_problems,
        num_samples=num_samples,
        accuracy=float(means.mean()),
        accuracy_se=math.sqrt(total),
        accuracy_se_problems=(
            math.sqrt(max(0.0, total - within)) if not math.isnan(total - within) else math.nan
        ),
        accuracy_se_samples=math.sqrt(within),
        best_at_k=float(best.mean()),
        best_at_k_se=math.sqrt(_variance(best) / num_problems),
    )


@dataclass(frozen=True)
class PairedDifference:
    """The difference a − b of two models' mean@k on the same problems."""

    num_problems: int
    difference: float
    se: float
    """Standard error of the mean over problems of the paired differences."""
    low: float
    high: float
    """95 % interval: Student's t over problems."""
    p_value: float
    """Two-sided, of no difference."""
    unpaired_se: float
    """What the standard error would be on two independent sets of problems."""


def paired_difference(a: np.ndarray, b: np.ndarray) -> PairedDifference:
    """Compare two models by their mean reward on each of the same P problems, [P] each.

    Raises:
        SchemaError: the two do not have one value for each of the same problems.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise SchemaError(
            f"a paired comparison needs one mean for each of the same problems; found {a.shape} and"
            f" {b.shape}"
        )
    differences = a - b
    count, mean = len(differences), float(differences.mean())
    se = math.sqrt(_variance(differences) / count)
    low, high, p_value = _paired_test(a, b)
    unpaired = math.sqrt((_variance(a) + _variance(b)) / count)
    return PairedDifference(count, mean, se, low, high, p_value, unpaired)


def _paired_test(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Both ends of the 95 % interval of the mean difference, and the p-value: NaN for one pair;
    differences that are all equal leave no doubt."""
    differences = a - b
    if len(differences) < 2:
        return math.nan, math.nan, math.nan
    if not np.ptp(differences):
        mean = float(differences[0])
        return mean, mean, float(mean == 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are nearly equal
        test: Any = stats.ttest_rel(a, b)
        low, high = test.confidence_interval(CONFIDENCE)
    return float(low), float(high), float(test.pvalue)


def problem_table(
    evaluations: pl.DataFrame | pl.LazyFrame, by: Sequence[str] = ("model",)
) -> pl.DataFrame:
    """One row per problem of each model and benchmark: num_samples, accuracy (mean reward), best,
    num_tokens (mean).

    Args:
        evaluations: rows of the evaluation table.
        by: what tells one evaluation from another; `("model", "seed")` keeps the seeds apart.
    """
    require_columns(
        evaluations.lazy(), [*by, "problem_id", "reward", "num_tokens"], "problem_table"
    )
    evaluations = with_benchmark(evaluations.lazy().collect())
    reward = pl.col("reward").cast(pl.Float64)
    return (
        evaluations.group_by(*by, "benchmark", "problem_id")
        .agg(
            num_samples=pl.len().cast(pl.Int64),
            accuracy=reward.mean(),
            best=reward.max(),
            num_tokens=pl.col("num_tokens").cast(pl.Float64).mean(),
        )
        .sort(*by, "benchmark", "problem_id")
    )


def accuracy_table(
    evaluations: pl.DataFrame | pl.LazyFrame, by: Sequence[str] = ("model",)
) -> pl.DataFrame:
    """One row per model and benchmark with the fields of `Accuracy`, and mean response length and
    share of truncated responses; with several benchmarks, also the unweighted mean of each model's
    mean@k and Best@k, labelled as such (other fields of it are null).

    Raises:
        SchemaError: problems have unequal numbers of samples, so that k is not one number.
    """
    frame = with_benchmark(evaluations.lazy().collect())
    keys = [*by, "benchmark"]
    rows = []
    for key, group in frame.group_by(*keys, maintain_order=True):
        rewards = rewards_by_problem(group)
        rows.append(
            dict(zip(keys, key, strict=True))
            | asdict(accuracy(rewards))
            | {
                "mean_num_tokens": group["num_tokens"].mean(),
                "truncated_share": truncated_share(group),
            }
        )
    table = pl.DataFrame(rows).with_columns(pl.selectors.float().fill_nan(None))
    shown = [*keys, "num_samples", "accuracy", "accuracy_se", "best_at_k"]
    means = with_mean_over_benchmarks(table.select(*shown), by)[table.height :]
    return pl.concat([table, means], how="diagonal")


def rewards_by_problem(evaluations: pl.DataFrame) -> np.ndarray:
    """Rewards [P, k] of one model, problems and samples in order of their ids.

    Raises:
        SchemaError: problems have unequal numbers of samples.
    """
    ordered = evaluations.sort("problem_id", "seed", "sample_index")
    counts = ordered.group_by("problem_id", maintain_order=True).len()
    if counts["len"].n_unique() != 1:
        few, many = counts.sort("len")["problem_id"][0], counts.sort("len")["problem_id"][-1]
        raise SchemaError(
            f"problems have unequal numbers of samples ({few!r} and {many!r}, for two): finish the"
            " evaluation"
        )
    return ordered["reward"].to_numpy().astype(np.float64).reshape(counts.height, -1)


def truncated_share(evaluations: pl.DataFrame) -> float:
    """Share of the responses that the length limit cut off, in [0, 1]."""
    return evaluations.filter(
        pl.col("finish_reason").cast(pl.String) == FinishReason.LENGTH
    ).height / max(1, evaluations.height)


def compare_models(
    evaluations: pl.DataFrame | pl.LazyFrame,
    *,
    model: str,
    baseline: str,
    benchmark: str | None = None,
) -> PairedDifference:
    """The paired difference of two models' mean@k over the problems of one benchmark.

    Args:
        evaluations: rows of the evaluation table.
        model: the one.
        baseline: the other.
        benchmark: which benchmark; needed where there are several, which are never pooled.

    Raises:
        SchemaError: a model was not evaluated on it, the two were given different problems, or
            there are several benchmarks and none is named.
    """
    table = problem_table(evaluations)
    known = benchmarks_of(table)
    if benchmark not in known and (benchmark is not None or len(known) > 1):
        raise SchemaError(
            f"models are compared on one benchmark; found benchmark={benchmark!r}: name one of"
            f" {', '.join(known)}"
        )
    table = table.filter(benchmark=benchmark or known[0])
    means = {}
    for name in (model, baseline):
        rows = table.filter(pl.col("model") == name)
        if rows.is_empty():
            known = ", ".join(table["model"].unique().sort())
            raise SchemaError(f"{name!r} was not evaluated; the table has {known}")
        means[name] = rows.sort("problem_id")
    if means[model]["problem_id"].to_list() != means[baseline]["problem_id"].to_list():
        raise SchemaError(
            f"{model!r} and {baseline!r} were given different problems, so they cannot be paired"
        )
    return paired_difference(
        means[model]["accuracy"].to_numpy(), means[baseline]["accuracy"].to_numpy()
    )


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else math.nan
