import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tip_analysis.analysis.accuracy import (
    accuracy,
    accuracy_table,
    compare_models,
    paired_difference,
    problem_table,
    rewards_by_problem,
)
from tip_analysis.core.errors import SchemaError

REWARDS = arrays(
    np.float64,
    st.tuples(st.integers(2, 6), st.integers(2, 5)),
    elements=st.sampled_from([0.0, 0.5, 1.0]),
)


def test_by_hand():
    # Problem 1: right in 2 of 4 samples; problem 2: 4 of 4; problem 3: none.
    found = accuracy(np.array([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=float))
    assert found.accuracy == pytest.approx(0.5)
    assert found.best_at_k == pytest.approx(2 / 3)
    assert found.accuracy_se == pytest.approx(math.sqrt(0.25 / 3))  # variance of 0.5, 1, 0 is 1/4
    assert found.accuracy_se_samples == pytest.approx(
        math.sqrt((1 / 3) / 3 / 12)
    )  # within problem 1: 1/3, else 0
    assert found.accuracy_se**2 == pytest.approx(
        found.accuracy_se_problems**2 + found.accuracy_se_samples**2
    )
    assert found.best_at_k_se == pytest.approx(math.sqrt((1 / 3) / 3))
    assert (found.num_problems, found.num_samples) == (3, 4)


@given(rewards=REWARDS)
@settings(deadline=None, max_examples=60)
def test_the_parts_of_the_variance_agree_with_a_one_way_analysis(rewards):
    found = accuracy(rewards)
    num_problems, k = rewards.shape
    between = (
        k * sum((row.mean() - rewards.mean()) ** 2 for row in rewards) / (num_problems - 1)
    )  # mean squares
    within = sum(((row - row.mean()) ** 2).sum() for row in rewards) / (num_problems * (k - 1))
    assert found.accuracy_se == pytest.approx(math.sqrt(between / (num_problems * k)), abs=1e-12)
    assert found.accuracy_se_samples == pytest.approx(
        math.sqrt(within / (num_problems * k)), abs=1e-12
    )
    expected = math.sqrt(max(0.0, (between - within) / (num_problems * k)))
    assert found.accuracy_se_problems == pytest.approx(expected, abs=1e-7)
    assert found.best_at_k >= found.accuracy - 1e-12


def test_the_standard_error_is_the_spread_of_repeated_evaluations():
    rng = np.random.default_rng(0)
    means, claimed, given_problems = [], [], []
    difficulty = rng.beta(2, 1, size=40)
    fixed_means = []
    for _ in range(2000):
        drawn = rng.beta(2, 1, size=40)
        found = accuracy((rng.random((40, 8)) < drawn[:, None]).astype(float))
        means.append(found.accuracy)
        claimed.append(found.accuracy_se)
        again = accuracy((rng.random((40, 8)) < difficulty[:, None]).astype(float))
        fixed_means.append(again.accuracy)
        given_problems.append(again.accuracy_se_samples)
    assert np.mean(claimed) == pytest.approx(np.std(means), rel=0.05)
    assert np.mean(given_problems) == pytest.approx(np.std(fixed_means), rel=0.05)


def test_too_few_for_a_standard_error():
    one_problem = accuracy(np.array([[1.0, 0.0]]))
    assert math.isnan(one_problem.accuracy_se)
    one_sample = accuracy(np.array([[1.0], [0.0]]))
    assert math.isnan(one_sample.accuracy_se_samples)
    assert one_sample.accuracy_se == pytest.approx(0.5)


def test_pairing_removes_what_the_problems_share():
    rng = np.random.default_rng(1)
    difficulty = rng.random(200)
    a, b = difficulty + 0.02 + rng.normal(0, 0.01, 200), difficulty + rng.normal(0, 0.01, 200)
    found = paired_difference(a, b)
    assert found.low < 0.02 < found.high
    assert found.low > 0
    assert found.unpaired_se > 10 * found.se
    assert found.p_value < 1e-6


def test_paired_difference_is_the_t_test():
    from scipy import stats

    a, b = np.array([0.1, 0.5, 0.9, 0.4]), np.array([0.0, 0.6, 0.5, 0.2])
    found, expected = paired_difference(a, b), stats.ttest_rel(a, b)
    interval = expected.confidence_interval()
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    same = paired_difference(a, a)
    assert (same.difference, same.se, same.p_value) == (0.0, 0.0, 1.0)
    assert math.isnan(paired_difference(a[:1], b[:1]).p_value)
    with pytest.raises(SchemaError, match="same problems"):
        paired_difference(a, b[:2])


def rows(model, rewards, problems=("p", "q")):
    return [
        {
            "model": model,
            "problem_id": problem,
            "sample_index": index,
            "reward": float(reward),
            "num_tokens": 10 * (index + 1),
            "finish_reason": "stop" if index else "length",
            "seed": 0,
        }
        for problem, samples in zip(problems, rewards, strict=True)
        for index, reward in enumerate(samples)
    ]


def test_tables_of_several_models():
    table = pl.DataFrame(rows("b", [[1, 0], [1, 1]]) + rows("a", [[0, 0], [1, 0]])).sample(
        fraction=1.0, shuffle=True, seed=0
    )
    found = accuracy_table(table).sort("model")
    assert found["accuracy"].to_list() == [0.25, 0.75]
    assert found["best_at_k"].to_list() == [0.5, 1.0]
    assert found["mean_num_tokens"].to_list() == [15.0, 15.0]
    assert found["truncated_share"].to_list() == [0.5, 0.5]
    problems = problem_table(table)
    assert problems.filter(pl.col("model") == "b")["accuracy"].to_list() == [0.5, 1.0]
    assert problems["best"].to_list() == [0.0, 1.0, 1.0, 1.0]
    difference = compare_models(table, model="b", baseline="a")
    assert difference.difference == pytest.approx(0.5)
    np.testing.assert_array_equal(
        rewards_by_problem(table.filter(pl.col("model") == "a")), [[0, 0], [1, 0]]
    )


def test_tables_that_cannot_be_used():
    uneven = pl.DataFrame(rows("a", [[1, 0], [1]]))
    with pytest.raises(SchemaError, match=r"unequal numbers of samples \('q' and 'p'"):
        accuracy_table(uneven)
    table = pl.DataFrame(rows("a", [[1], [0]]) + rows("b", [[1], [0]], problems=("p", "r")))
    with pytest.raises(SchemaError, match="different problems"):
        compare_models(table, model="a", baseline="b")
    with pytest.raises(SchemaError, match="'c' was not evaluated; the table has a, b"):
        compare_models(table, model="c", baseline="a")
    with pytest.raises(SchemaError, match="reward"):
        problem_table(table.drop("reward"))
