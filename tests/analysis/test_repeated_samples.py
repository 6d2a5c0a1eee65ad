"""pass@j against all subsets, majority@k by hand, both per benchmark."""

import itertools
import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import make_ablations

from tip_analysis.analysis.repeated_samples import (
    arm_pass_at,
    majority,
    mean_majority,
    num_correct,
    pass_at,
    sample_metrics,
)
from tip_analysis.core.errors import OptionError


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_is_the_mean_over_all_subsets(graded: list[bool], data: st.DataObject) -> None:
    j = data.draw(st.integers(1, len(graded)))
    subsets = list(itertools.combinations(graded, j))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    found = pass_at(np.array([sum(graded)]), len(graded), j)
    assert found[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_one_is_the_mean_and_at_k_the_best() -> None:
    rewards = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=float)
    correct = num_correct(rewards)
    assert pass_at(correct, 4, 1).tolist() == rewards.mean(1).tolist()
    assert pass_at(correct, 4, 4).tolist() == rewards.max(1).tolist()
    for j in (0, 5):
        with pytest.raises(OptionError, match="needs 1 ≤ j ≤ 4"):
            pass_at(correct, 4, j)


def test_majority_by_eye() -> None:
    rewards = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], dtype=float)
    answers = [
        *("0.5", "1/2", "3", "4"),  # two ways to write what is right: 2 of 4
        *("1", "7", "7", "7"),  # outvoted
        *("1", "2", "2", "1"),  # a tie
        *(None, None, None, None),  # nobody votes
    ]
    found = majority(rewards, answers)
    assert found is not None
    assert found.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert mean_majority(rewards, answers) == 0.375
    assert majority(rewards, [None] * 16) is None


def evaluations() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {
            "model": "m",
            "benchmark": benchmark,
            "problem_id": f"{benchmark}-{i}",
            "sample_index": j,
            "seed": 0,
            "reward": float(rng.random() < chance),
            "answer": "x",
        }
        for benchmark, size, chance in (("small", 4, 0.9), ("large", 40, 0.2))
        for i in range(size)
        for j in range(4)
    ]
    return pl.DataFrame(rows)


def test_benchmarks_are_never_pooled_and_have_intervals_of_their_own() -> None:
    table = evaluations()
    found = sample_metrics(table)
    metrics = ["mean@4", "Best@4", "majority@4", "pass@1", "pass@2", "pass@4"]
    assert found["benchmark"].unique(maintain_order=True).to_list() == ["small", "large"]
    for name, count in (("small", 4), ("large", 40)):
        part = found.filter(benchmark=name)
        assert part["metric"].to_list() == metrics
        assert part["num_problems"].unique().to_list() == [count]
        rows = table.filter(benchmark=name)
        means = rows.group_by("problem_id").agg(pl.col("reward").mean())["reward"].to_numpy()
        half = stats.t.ppf(0.975, count - 1) * means.std(ddof=1) / math.sqrt(count)
        mean = part.row(0, named=True)
        assert mean["value"] == pytest.approx(means.mean())
        assert (mean["low"], mean["high"]) == pytest.approx(
            (means.mean() - half, means.mean() + half)
        )
    assert "majority@4" not in sample_metrics(table.drop("answer"))["metric"].to_list()


def test_arms_have_pass_at_too() -> None:
    arms = make_ablations()
    found = arm_pass_at(arms, 1)
    assert found["pass_at_j"].to_list() == pytest.approx(arms["accuracy"].to_list())
    best = arm_pass_at(arms, 4)
    assert best["pass_at_j"].to_list() == pytest.approx(arms["best_at_k"].to_list())
