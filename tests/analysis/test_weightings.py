"""Weightings: each against an oracle; inclusion probabilities by the average over seeds."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import token_frames

from tip_analysis.analysis.inclusion import inclusion_probabilities
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.rules import RULES, register_rule, rule_names
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.analysis.weightings import weigh_tokens, weighting_names, weighting_of
from tip_analysis.core.errors import OptionError, SchemaError, UnknownNameError
from tip_analysis.core.names import WeightScale


def table(num_rollouts: int = 3, length: int = 20, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    size = num_rollouts * length
    columns = ("student_entropy", "student_entropy_norm", "reverse_kl", "forward_kl", "jsd")
    return pl.DataFrame(
        {
            "rollout_id": [f"r{i}" for i in range(num_rollouts) for _ in range(length)],
            "batch_id": [i // 2 for i in range(num_rollouts) for _ in range(length)],
            "position": list(range(length)) * num_rollouts,
            "loss_mask": rng.random(size) < 0.9,
            **{name: rng.random(size) for name in columns},
            "student_logprob": -rng.random(size),
            "teacher_logprob": -rng.random(size) * 3,
            "grad_dot_loss": rng.normal(size=size),
            "grad_norm_sq": rng.random(size),
        },
        schema_overrides={"position": pl.Int32, "batch_id": pl.Int32},
    )


def weights(tokens: pl.DataFrame, weighting: str, **options) -> list:
    return weigh_tokens(tokens, weighting=weighting, **options).collect()["weight"].to_list()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 15))
def test_prefix_weights_equal_a_plain_loop(seed: int, num_rollouts: int, length: int) -> None:
    tokens = table(num_rollouts, length, seed)
    expected: dict[tuple[str, int], float] = {}
    for name in tokens["rollout_id"].unique():
        rows = tokens.filter(pl.col("rollout_id") == name, "loss_mask").sort("position")
        discrepancy = [abs(r["teacher_logprob"] - r["student_logprob"]) for r in rows.to_dicts()]
        total, before = max(sum(discrepancy), 1e-8), 0.0
        for row, each in zip(rows.to_dicts(), discrepancy, strict=True):
            expected[name, row["position"]] = 1.0 + 0.5 * (1.0 - before / total)
            before += each
    shuffled = tokens.sample(fraction=1.0, shuffle=True, seed=seed)
    found = weigh_tokens(shuffled, weighting="iw_opd").collect()
    for row in found.to_dicts():
        wanted = expected.get((row["rollout_id"], row["position"]))
        assert row["weight"] == (None if wanted is None else pytest.approx(wanted, rel=1e-12))


def test_weights_by_eye() -> None:
    tokens = add_scores(table(1, 4)).collect().with_columns(loss_mask=True)
    tokens = tokens.with_columns(
        grad_dot_loss=pl.Series([1.0, -1.0, 3.0, 1.0]),
        grad_norm_sq=pl.Series([2.0, 2.0, 1.0, 0.0]),
        quadrant=pl.Series(["Q1", "Q3", "Q4", "Q3"]),
    )
    assert weights(tokens, "none") == [1.0] * 4
    assert weights(tokens, "oracle") == [0.5, 0.0, 3.0, 0.0]
    assert weights(tokens, "gradient_oracle") == [1.0, 0.0, 3.0, 1.0]
    assert weights(tokens, "quadrant:Q3") == [0.0, 1.0, 0.0, 1.0]
    assert weights(tokens, "not:Q4") == [1.0, 1.0, 0.0, 1.0]
    assert weights(tokens, "position") == [1.0, 0.75, 0.5, 0.25]
    assert weights(tokens, "last") == [0.25, 0.5, 0.75, 1.0]
    assert weights(tokens, "jsd") == tokens["jsd"].to_list()


@settings(deadline=None, max_examples=30)
@given(token_frames(infinite=False))
def test_soft_or_weighs_as_its_score_and_its_bottom_as_the_rest(tokens: pl.DataFrame) -> None:
    scored = add_scores(tokens).collect()
    soft_or = scored["soft_or"].to_list()
    assert weights(scored, "soft_or") == soft_or
    bottom = weights(scored, "soft_or_bottom")
    assert bottom == [None if s is None else 1.0 - s for s in soft_or]


def test_every_rule_weighs_but_those_without_a_weight() -> None:
    names = weighting_names()
    assert {"none", "iw_opd", "horvitz_thompson", "oracle", "ta_opd", "soft_or"} <= set(names)
    assert set(rule_names()) - set(names) == {"all", "random_window"}
    assert weighting_of("soft_or").scale is WeightScale.MEAN_ONE
    assert weighting_of("iw_opd").scale is WeightScale.NONE
    for name in ("all", "random_window", "softor"):
        with pytest.raises(UnknownNameError, match="valid names: none, iw_opd"):
            weighting_of(name)


def test_weights_that_are_none_are_refused() -> None:
    tokens = table(1, 4).with_columns(loss_mask=True)
    register_rule("below", lambda df: df["jsd"] - 1.0)
    try:
        with pytest.raises(OptionError, match="from 0 to below infinity; 4 of 4"):
            weights(tokens, "below")
    finally:
        del RULES["below"]
    infinite = tokens.with_columns(reverse_kl=pl.Series([1.0, math.inf, 1.0, 1.0]))
    with pytest.raises(OptionError, match="1 of 4"):
        weights(infinite, "divergence")
    unknown = tokens.with_columns(teacher_logprob=pl.lit(None, pl.Float64))
    with pytest.raises(SchemaError, match="4 of 4 have none"):
        weights(unknown, "iw_opd")
    with pytest.raises(SchemaError, match="gradients stage"):
        weights(tokens.drop("grad_dot_loss"), "oracle")


def weighted_sums(tokens: pl.DataFrame, by: str, **options) -> np.ndarray:
    found = weigh_tokens(tokens, weighting="horvitz_thompson", **options)
    sums = found.group_by(by).agg((pl.col("weight") * pl.col("reverse_kl")).sum().alias("sum"))
    return sums.collect()["sum"].to_numpy()


@pytest.mark.parametrize("rule", ["random", "entropy_sampling", "entropy_jsd_sampling"])
@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_inverse_probabilities_are_unbiased(rule: str, scope: str, ratio: float) -> None:
    """Over 3,000 copies of one batch, each with random numbers of its own: the mean of the weighted
    sums is the sum over all tokens, within 3 standard errors."""
    tokens = add_scores(table(2, 12)).collect()
    exact = tokens.filter("loss_mask")["reverse_kl"].sum()
    copies = pl.DataFrame({"batch_id": range(3000)}, schema={"batch_id": pl.Int32})
    many = tokens.drop("batch_id").join(copies, how="cross")
    name = pl.col("rollout_id") + "-" + pl.col("batch_id").cast(pl.String)
    sums = weighted_sums(
        many.with_columns(rollout_id=name),
        "batch_id",
        rule=rule,
        retention_ratio=ratio,
        selection_scope=scope,
    )
    error = np.std(sums, ddof=1) / math.sqrt(len(sums))
    assert abs(np.mean(sums) - exact) < 3 * error


def test_inverse_probabilities_are_unbiased_over_seeds() -> None:
    tokens = add_scores(table(4, 12)).collect()
    how = {"rule": "entropy_sampling", "retention_ratio": 0.3, "selection_scope": "run"}
    everything = tokens.with_columns(all=pl.lit(0))
    sums = [weighted_sums(everything, "all", seed=seed, **how)[0] for seed in range(150)]
    exact = tokens.filter("loss_mask")["reverse_kl"].sum()
    assert abs(np.mean(sums) - exact) < 3 * np.std(sums, ddof=1) / math.sqrt(len(sums))


def test_weights_in_proportion_to_k_would_be_biased() -> None:
    """What the plain 1/(k·w/Σw) gives instead: the test above can fail."""
    tokens = table(1, 6).with_columns(
        loss_mask=True, student_entropy_norm=pl.Series([1.0, 0.9, 0.05, 0.05, 0.05, 0.05])
    )
    weight = tokens["student_entropy_norm"].to_numpy()
    share = np.minimum(1.0, 3 * weight / weight.sum())
    many = pl.concat([tokens.with_columns(rollout_id=pl.lit(f"r{i}")) for i in range(1000)])
    chosen = select_tokens(many, rule="entropy_sampling", retention_ratio=0.5)
    counts = chosen.group_by("position").agg(pl.col("selected").mean()).sort("position").collect()
    error = np.sqrt(share * (1 - share) / 1000) + 1e-9
    assert (np.abs(counts["selected"].to_numpy() - share) > 3 * error).any()


def test_probabilities_belong_to_the_selection() -> None:
    tokens = add_scores(table(3, 15)).collect()
    how = {"rule": "entropy_sampling", "retention_ratio": 0.3, "seed": 4}
    found = inclusion_probabilities(tokens, **how).collect()
    chosen = select_tokens(tokens, **how).collect()["selected"]
    assert found["inclusion_probability"].is_not_null().equals(chosen)
    assert found["inclusion_probability"].drop_nulls().is_between(0.0, 1.0).all()
    whole = inclusion_probabilities(tokens, rule="entropy_sampling", retention_ratio=1.0)
    assert whole.filter("loss_mask").collect()["inclusion_probability"].eq(1.0).all()
    everything = inclusion_probabilities(tokens, rule="all", retention_ratio=1.0)
    assert everything.filter("loss_mask").collect()["inclusion_probability"].eq(1.0).all()
    with pytest.raises(OptionError, match="leaves out tokens"):
        inclusion_probabilities(tokens, rule="soft_or", retention_ratio=0.5)


def test_tokens_of_no_weight_that_fill_up_are_sure() -> None:
    tokens = table(1, 4).with_columns(
        loss_mask=True, student_entropy_norm=pl.Series([0.0, 1.0, 0.0, 0.0])
    )
    found = inclusion_probabilities(tokens, rule="entropy_sampling", retention_ratio=0.5).collect()
    assert found["inclusion_probability"].to_list() == [1.0, 1.0, None, None]


def test_a_quadrant_weighting_reads_quadrants() -> None:
    tokens = assign_quadrants(table(2, 10)).collect()
    found = weights(tokens, "quadrant:Q1")
    expected = [
        None if not written else float(quadrant == "Q1")
        for written, quadrant in tokens.select("loss_mask", "quadrant").rows()
    ]
    assert found == expected
