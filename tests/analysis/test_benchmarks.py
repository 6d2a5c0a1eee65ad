"""Results per benchmark: nothing is pooled, and the mean over benchmarks is unweighted."""

import numpy as np
import polars as pl
import pytest
from synthetic import make_ablations

from tip_analysis.analysis.ablation_tables import differences_from_all, final_arms
from tip_analysis.analysis.accuracy import accuracy_table, compare_models, problem_table
from tip_analysis.analysis.arms import ALL, Arm, arm_results
from tip_analysis.analysis.benchmarks import (
    MEAN_OVER_BENCHMARKS,
    benchmarks_of,
    paper_benchmark,
    with_mean_over_benchmarks,
)
from tip_analysis.analysis.claims import arm_summary, claims_table, problem_difference
from tip_analysis.analysis.paper_claims import paper_differences, paper_differences_beside
from tip_analysis.core.errors import SchemaError

LARGE, SMALL = (
    make_ablations(benchmark="MATH-500", problems=97, seed=3),
    make_ablations(benchmark="aime_2024", problems=13, seed=4),
)
BOTH = pl.concat([LARGE, SMALL])
KEYS = ["rule", "retention_ratio", "seed"]


def pooled_accuracies() -> list[float]:
    """What each arm's accuracy would be with the problems of both thrown together."""
    joined = LARGE.join(SMALL, on=KEYS, suffix="_small")
    values = ((97 * joined["accuracy"] + 13 * joined["accuracy_small"]) / 110).to_list()
    by_arm = (
        joined.with_columns(pooled=pl.Series(values))
        .group_by(KEYS[:2])
        .agg(pl.col("pooled").mean())
    )
    return [*values, *by_arm["pooled"]]


def numbers_in(table: pl.DataFrame) -> np.ndarray:
    floats = [column.drop_nulls().to_numpy() for column in table if column.dtype == pl.Float64]
    return np.concatenate(floats)


def test_pooling_appears_nowhere() -> None:
    arms = final_arms(BOTH)
    results = [arm_results(BOTH), arm_summary(arms)]
    for pooled in pooled_accuracies():
        for table in results:
            assert np.abs(numbers_in(table) - pooled).min() > 1e-9
    pooled = dict.fromkeys(arms.select(KEYS[:2]).unique().rows(), 0.0)
    for rule, ratio in pooled:
        of_arm = [
            part.filter(Arm(rule, ratio).rows())["accuracy"].mean()
            - part.filter(ALL.rows())["accuracy"].mean()
            for part in (LARGE, SMALL)
        ]
        pooled[rule, ratio] = (97 * of_arm[0] + 13 * of_arm[1]) / 110
    differences = [*pooled.values(), *(-value for value in pooled.values())]
    tables = [
        differences_from_all(arms).select("difference"),
        claims_table(arms).select("effect", "problem_effect"),
    ]
    for value in differences:
        for table in tables:
            assert value == 0.0 or np.abs(numbers_in(table) - value).min() > 1e-9


def test_each_benchmark_is_what_it_is_alone_and_the_mean_is_unweighted() -> None:
    results = arm_results(BOTH)
    for name, alone in (("MATH-500", LARGE), ("aime_2024", SMALL)):
        assert results.filter(benchmark=name).equals(arm_results(alone))
    assert results["benchmark"].unique(maintain_order=True).to_list() == [
        "MATH-500",
        "aime_2024",
        MEAN_OVER_BENCHMARKS,
    ]
    for row in results.filter(benchmark=MEAN_OVER_BENCHMARKS).iter_rows(named=True):
        own = results.filter(rule=row["rule"], retention_ratio=row["retention_ratio"]).filter(
            pl.col("benchmark") != MEAN_OVER_BENCHMARKS
        )
        assert row["accuracy"] == pytest.approx(own["accuracy"].mean())
        assert row["best_at_k"] == pytest.approx(own["best_at_k"].mean())


def test_claims_stand_beside_the_papers_same_benchmark() -> None:
    table = claims_table(final_arms(BOTH)).filter(claim="e")
    assert table["benchmark"].to_list() == ["MATH-500", "aime_2024", MEAN_OVER_BENCHMARKS]
    assert table["paper_comparisons"].to_list() == [3, 3, 3]
    paper = paper_differences((Arm("soft_or", 0.5), Arm("soft_or_bottom", 0.5)))
    for row in table.head(2).iter_rows(named=True):
        own = paper.filter(benchmark=paper_benchmark(row["benchmark"]))["difference"]
        assert row["paper_median"] == own.median()
    pairs = (
        paper.filter(pl.col("benchmark") != "AIME25")
        .group_by("pair")
        .agg(pl.col("difference").mean())
    )
    assert table["paper_max"][2] == pytest.approx(pairs["difference"].max())
    assert table["num_problems"].to_list() == [97, 13, 110]


def test_a_mean_over_others_than_the_papers_stands_beside_nothing() -> None:
    arms = (Arm("q3", 0.1), ALL)
    among = ["MATH-500", "mine"]
    assert paper_differences_beside(arms, MEAN_OVER_BENCHMARKS, among).is_empty()
    assert paper_differences_beside(arms, "mine", among).height == 9
    assert paper_differences_beside(arms, "aime25", among)["benchmark"].unique().to_list() == [
        "AIME25"
    ]


def test_the_interval_over_problems_draws_within_benchmarks() -> None:
    """Two benchmarks with constant differences of their own have no spread at all."""
    rows = [
        (seed, name, f"p{i}", value)
        for seed in (0, 1)
        for name, count, value in (("a", 30, 0.2), ("b", 5, -0.1))
        for i in range(count)
    ]
    a = pl.DataFrame(rows, schema=["seed", "benchmark", "problem_id", "mean_reward"], orient="row")
    b = a.with_columns(mean_reward=pl.lit(0.0))
    value, low, high, count = problem_difference(a, b)
    assert (value, low, high) == pytest.approx((0.05, 0.05, 0.05))
    assert count == 35


def test_an_evaluation_without_every_benchmark_has_no_mean() -> None:
    part = BOTH.filter(~((pl.col("seed") == 2) & (pl.col("benchmark") == "aime_2024")))
    means = with_mean_over_benchmarks(part, KEYS).filter(benchmark=MEAN_OVER_BENCHMARKS)
    assert set(means["seed"]) == {0, 1}
    assert with_mean_over_benchmarks(LARGE, KEYS).equals(LARGE)
    assert benchmarks_of(LARGE.drop("benchmark")) == ["problems"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MATH-500", "MATH-500"),
        ("math_500", "MATH-500"),
        ("aime_2024", "AIME24"),
        ("aime25", "AIME25"),
        ("AIME-2025", "AIME25"),
        ("deepplanning", "DeepPlanning travel"),
        ("arithmetic", None),
        ("MATH-5000", None),
        (None, None),
    ],
)
def test_names_of_the_papers_benchmarks(name: str | None, expected: str | None) -> None:
    assert paper_benchmark(name) == expected


def evaluations(model: str, shift: int) -> list[dict]:
    """All right on the 3 problems of `easy`, all wrong on the one of `hard`, but for `shift`."""
    return [
        {
            "model": model,
            "benchmark": name,
            "problem_id": f"p{i}",
            "sample_index": j,
            "reward": float(name == "easy" and j >= shift),
            "num_tokens": 5,
            "finish_reason": "stop",
            "seed": 0,
        }
        for name, count in (("easy", 3), ("hard", 1))
        for i in range(count)
        for j in range(2)
    ]


def test_evaluations_are_judged_per_benchmark() -> None:
    table = pl.DataFrame(evaluations("a", 0) + evaluations("b", 1))
    found = accuracy_table(table).filter(model="a")
    assert dict(found.select("benchmark", "accuracy").iter_rows()) == {
        "easy": 1.0,
        "hard": 0.0,
        MEAN_OVER_BENCHMARKS: 0.5,
    }
    assert 0.75 not in numbers_in(found)
    assert problem_table(table).height == 8
    with pytest.raises(SchemaError, match="name one of easy, hard"):
        compare_models(table, model="a", baseline="b")
    with pytest.raises(SchemaError, match="benchmark='harder'"):
        compare_models(table, model="a", baseline="b", benchmark="harder")
    found = compare_models(table, model="a", baseline="b", benchmark="easy")
    assert (found.difference, found.num_problems) == (0.5, 3)


def test_what_is_beside_the_accuracy_is_averaged_too_and_lists_are_empty() -> None:
    small = make_ablations(benchmark="AIME24", problems=5).with_columns(majority_at_k=pl.lit(0.2))
    large = make_ablations(benchmark="MATH-500", problems=80).with_columns(
        majority_at_k=pl.lit(0.6), truncated_share=pl.lit(0.25)
    )
    keys = ["rule", "retention_ratio", "seed"]
    found = with_mean_over_benchmarks(pl.concat([small, large]), keys)
    mean = found.filter(benchmark=MEAN_OVER_BENCHMARKS)
    assert mean["majority_at_k"].to_list() == pytest.approx([0.4] * mean.height)
    assert mean["truncated_share"].to_list() == pytest.approx([0.15] * mean.height)
    assert mean["problem_correct"].list.len().to_list() == [0] * mean.height
