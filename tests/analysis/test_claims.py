"""Claims: intervals, verdicts, pairing, and the paper's numbers beside them."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tip_analysis.analysis import paper_claims as module
from tip_analysis.analysis.arms import ALL, Arm
from tip_analysis.analysis.claims import (
    arm_summary,
    claims_table,
    judge,
    paired_difference,
    problem_difference,
)
from tip_analysis.analysis.paper_claims import paper_differences, paper_results
from tip_analysis.core.errors import InputError, OptionError, SchemaError


def arms(**accuracies: list[float]) -> pl.DataFrame:
    """Keyword `q3_10=[…]` is the arm q3:0.1 with one accuracy per seed."""
    rows = []
    for name, values in accuracies.items():
        rule, _, percent = name.rpartition("_")
        rows += [(rule, int(percent) / 100, seed, value) for seed, value in enumerate(values)]
    return pl.DataFrame(rows, schema=["rule", "retention_ratio", "seed", "accuracy"], orient="row")


ARMS = arms(
    all_100=[0.90, 0.91, 0.89],
    entropy_sampling_50=[0.93, 0.945, 0.92],
    entropy_sampling_10=[0.80, 0.81, 0.82],
    soft_or_50=[0.92, 0.93, 0.925],
    soft_or_10=[0.84, 0.86, 0.85],
    q3_10=[0.905, 0.912, 0.893],
    divergence_10=[0.90, 0.93, 0.88],
    soft_or_bottom_50=[0.01, 0.0, 0.02],
)


def verdicts(table: pl.DataFrame) -> dict[tuple[str, str], str]:
    return {(row["claim"], row["arm_a"]): row["verdict"] for row in table.iter_rows(named=True)}


def test_verdicts_by_eye() -> None:
    assert verdicts(claims_table(ARMS)) == {
        ("a", "entropy_sampling:0.5"): "supported",
        ("b", "soft_or:0.5"): "not resolved",
        ("b", "soft_or:0.1"): "supported",
        ("c", "q3:0.1"): "supported",
        ("d", "q3:0.1"): "not resolved",
        ("e", "soft_or:0.5"): "supported",
        ("f", "q3:0.2"): "not run",
        ("g", "soft_or:0.5"): "supported",
        ("h", "divergence:0.5"): "not run",
        ("i", "not:Q4:1"): "not run",
    }


def test_an_effect_equals_scipys_paired_t_interval() -> None:
    row = claims_table(ARMS).filter(claim="d").row(0, named=True)
    a, b = np.array([0.905, 0.912, 0.893]), np.array([0.90, 0.93, 0.88])
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert row["effect"] == pytest.approx((a - b).mean())
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert (row["num_seeds"], row["margin"]) == (3, 0.02)


@pytest.mark.parametrize(
    ("relation", "low", "high", "verdict"),
    [
        (">", 0.001, 0.05, "supported"),
        (">", 0.0, 0.05, "not resolved"),
        (">", -0.05, -0.001, "contradicted"),
        (">", -0.05, 0.0, "not resolved"),
        (">", -0.01, 0.01, "not resolved"),
        ("≈", -0.02, 0.02, "supported"),
        ("≈", -0.021, 0.01, "not resolved"),
        ("≈", 0.021, 0.03, "contradicted"),
        ("≈", 0.01, 0.03, "not resolved"),
        ("≈", -0.05, -0.021, "contradicted"),
        ("≈", 0.02, 0.03, "not resolved"),
        ("≳", -0.019, 0.5, "supported"),
        ("≳", 0.03, 0.05, "supported"),
        ("≳", -0.02, 0.1, "not resolved"),
        ("≳", -0.05, -0.021, "contradicted"),
        ("≳", -0.05, -0.02, "not resolved"),
        (">", None, None, "not resolved"),
        ("≈", math.nan, 0.0, "not resolved"),
    ],
)
def test_the_rule_of_the_verdict(
    relation, low: float | None, high: float | None, verdict: str
) -> None:
    assert judge(relation, low, high, 0.02) == verdict


@settings(deadline=None, max_examples=50)
@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 0.2))
def test_swapping_the_arms_swaps_the_verdict(low: float, width: float, margin: float) -> None:
    swap = {
        "supported": "contradicted",
        "contradicted": "supported",
        "not resolved": "not resolved",
    }
    assert judge(">", -(low + width), -low, margin) == swap[judge(">", low, low + width, margin)]
    assert judge("≈", -(low + width), -low, margin) == judge("≈", low, low + width, margin)


def test_only_shared_seeds_are_paired_and_one_seed_resolves_nothing() -> None:
    a = pl.DataFrame({"seed": [0, 1, 2], "accuracy": [0.5, 0.6, 0.9]})
    b = pl.DataFrame({"seed": [2, 1, 7], "accuracy": [0.8, 0.4, 0.1]})
    effect, low, high, count = paired_difference(a, b, "accuracy")
    assert (effect, count) == (pytest.approx(0.15), 2)
    assert low < effect < high
    assert paired_difference(a.head(1), a.head(1), "accuracy") == (0.0, None, None, 1)
    assert paired_difference(a.head(1), b.tail(1), "accuracy") == (None, None, None, 0)
    one = claims_table(ARMS.filter(seed=0))
    was_run = one.filter(~pl.col("claim").is_in(["f", "h", "i"]))
    assert set(was_run["verdict"].cast(pl.String)) == {"not resolved"}
    assert was_run["effect"].null_count() == 0


def test_arms_that_were_not_run_say_so() -> None:
    table = claims_table(ARMS.filter(pl.col("rule") != "q3"))
    assert verdicts(table)[("c", "q3:0.1")] == "not run"
    assert table.filter(claim="c")["effect"].to_list() == [None]
    empty = claims_table(ARMS.clear())
    assert set(empty["verdict"].cast(pl.String)) == {"not run"}
    assert empty.height == 9


def test_the_last_step_counts_and_duplicates_are_refused() -> None:
    early = ARMS.with_columns(accuracy=pl.lit(0.0), step=pl.lit(10))
    both = pl.concat([early, ARMS.with_columns(step=pl.lit(60))])
    assert verdicts(claims_table(both)) == verdicts(claims_table(ARMS))
    with pytest.raises(SchemaError, match="one row per arm and seed"):
        claims_table(pl.concat([ARMS, ARMS]))


def test_the_bootstrap_over_problems_pairs_problems() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.random(200)
    rows = []
    for rule, shift in (("q3", 0.05), ("divergence", 0.0)):
        for seed in (0, 1):
            noise = rng.normal(0, 0.01, 200)
            rows += [(rule, 0.1, seed, f"p{i}", hardness[i] + shift + noise[i]) for i in range(200)]
    problems = pl.DataFrame(
        rows, schema=["rule", "retention_ratio", "seed", "problem_id", "mean_reward"], orient="row"
    )
    a, b = problems.filter(rule="q3"), problems.filter(rule="divergence")
    effect, low, high, count = problem_difference(a, b)
    assert count == 200
    assert effect == pytest.approx(0.05, abs=0.005)
    wide = a.join(b, on=["seed", "problem_id"], suffix="_b").with_columns(
        d=pl.col("mean_reward") - pl.col("mean_reward_b")
    )
    differences = wide.group_by("problem_id").agg(pl.col("d").mean())["d"]
    half = 1.96 * differences.std() / math.sqrt(200)
    assert (low, high) == pytest.approx((effect - half, effect + half), abs=0.15 * half)
    row = claims_table(ARMS, problems=problems).filter(claim="d").row(0, named=True)
    assert (row["problem_effect"], row["num_problems"]) == (pytest.approx(effect), 200)
    assert claims_table(ARMS, problems=problems).filter(claim="e")["problem_effect"].to_list() == [
        None
    ]


def test_the_lists_of_an_ablation_table_give_the_problems() -> None:
    rows = [
        (rule, 0.1, seed, 60, 60, accuracy, ["p0", "p1"], [accuracy + 0.1, accuracy - 0.1])
        for rule, accuracy in (("q3", 0.6), ("divergence", 0.5))
        for seed in (0, 1)
    ]
    names = [
        "rule",
        "retention_ratio",
        "seed",
        "step",
        "num_steps",
        "accuracy",
        "problem_ids",
        "problem_accuracy",
    ]
    table = pl.DataFrame(rows, schema=names, orient="row")
    unfinished = table.with_columns(
        pl.col("step") - 20, pl.col("accuracy") * 0, pl.lit(2, pl.Int64).alias("seed")
    )
    row = claims_table(pl.concat([table, unfinished])).filter(claim="d").row(0, named=True)
    assert (row["effect"], row["num_seeds"]) == (pytest.approx(0.1), 2)
    assert (row["problem_effect"], row["num_problems"]) == (pytest.approx(0.1), 2)


def test_the_papers_numbers_stand_beside() -> None:
    results = paper_results()
    assert results.columns == [
        "table",
        "pair",
        "benchmark",
        "metric",
        "rule",
        "retention_ratio",
        "mean",
        "std",
    ]
    assert results.height == 117
    differences = paper_differences((Arm("entropy_sampling", 0.5), ALL))
    assert differences.height == 9
    qwen = differences.filter(pl.col("pair").str.starts_with("Qwen3"), benchmark="MATH-500")[
        "difference"
    ]
    assert qwen.to_list() == pytest.approx([0.786 - 0.767])
    row = claims_table(ARMS).filter(claim="d").row(0, named=True)
    expected = [0.761 - 0.743, 0.215 - 0.192, 0.171 - 0.153]  # Tables 4 and 8, Qwen3
    assert (row["paper_min"], row["paper_max"]) == pytest.approx((min(expected), max(expected)))
    assert (row["paper_comparisons"], row["paper_agreeing"]) == (3, 3)
    assert claims_table(ARMS).filter(claim="b", arm_a="soft_or:0.1")[
        "paper_comparisons"
    ].to_list() == [0]


def test_the_summary_of_arms() -> None:
    row = arm_summary(ARMS).filter(arm="all").row(0, named=True)
    values = [0.90, 0.91, 0.89]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert (row["mean"], row["std"], row["num_seeds"]) == (
        pytest.approx(0.9),
        pytest.approx(0.01),
        3,
    )
    assert (row["low"], row["high"]) == pytest.approx((0.9 - half, 0.9 + half))
    assert arm_summary(ARMS.filter(seed=0))["low"].null_count() == 8


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SchemaError, match="accuracy"):
        claims_table(ARMS.drop("accuracy"))
    with pytest.raises(SchemaError, match="problem_id"):
        claims_table(ARMS, problems=ARMS)
    with pytest.raises(OptionError, match="margin"):
        claims_table(ARMS, margin=-0.1)
    monkeypatch.setattr(module, "PAPER_RESULTS", "nowhere.csv")
    with pytest.raises(InputError, match=r"nowhere\.csv"):
        paper_results()
