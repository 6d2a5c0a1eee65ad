"""Rank correlations, partial ones, probe noise and the area under the ROC curve."""

import math

import numpy as np
import polars as pl
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import make_tables

from tip_analysis.analysis.correlations import (
    RankedColumn,
    auc,
    correlation_matrix,
    correlation_table,
    equation_6,
    partial_correlations,
)
from tip_analysis.analysis.measurements import join_gradients
from tip_analysis.analysis.scores import add_scores
from tip_analysis.core.errors import SchemaError, UnknownNameError

NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(-5, 5, width=32))


@pytest.fixture(scope="module")
def joined() -> pl.DataFrame:
    tables = make_tables(num_prompts=6, rollouts_per_prompt=2, mean_length=20)
    return join_gradients(add_scores(tables.tokens), tables.gradients).collect()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(NUMBERS, st.integers(0, 3)), min_size=1, max_size=25))
def test_weighted_ranks_equal_ranks_of_copied_rows(rows: list[tuple[float, int]]) -> None:
    values, weights = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    copies = np.repeat(np.arange(values.size), weights)
    found = RankedColumn(values).ranks(weights.astype(float))[copies]
    assert found.tolist() == reference.midranks(values[copies].tolist())


@settings(deadline=None, max_examples=60)
@given(st.integers(5, 40), st.integers(0, 10_000), st.booleans())
def test_partial_correlations_equal_those_of_residuals(size: int, seed: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(4, size)) + rng.normal(size=size)
    columns = np.round(raw) if tied else raw
    assume(all(np.ptp(column) > 0 for column in columns))
    ranks = np.stack([stats.rankdata(column) for column in columns])
    assume(np.linalg.det(np.corrcoef(ranks)) > 1e-4)
    matrix = correlation_matrix(ranks, np.ones(size))
    assert matrix[0, 1] == pytest.approx(
        stats.spearmanr(columns[0], columns[1]).statistic, abs=1e-9
    )
    found = partial_correlations(matrix, [2, 3])
    assert found[0, 1] == pytest.approx(
        reference.partial_pearson(ranks[0], ranks[1], [ranks[2], ranks[3]]), abs=1e-7
    )
    assert partial_correlations(matrix, [])[0, 1] == pytest.approx(matrix[0, 1])
    assert math.isnan(found[2, 0])


def test_constant_and_repeated_controls_are_left_out() -> None:
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 50))
    matrix = correlation_matrix(np.stack([x, y, z, z, np.ones(50)]), np.ones(50))
    assert math.isnan(matrix[0, 4])
    assert partial_correlations(matrix, [2, 3, 4])[0, 1] == pytest.approx(
        partial_correlations(matrix, [2])[0, 1]
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(NUMBERS, st.booleans()), min_size=2, max_size=30))
def test_auc_equals_counting_pairs(rows: list[tuple[float, bool]]) -> None:
    scores, positive = [row[0] for row in rows], [row[1] for row in rows]
    if all(positive) or not any(positive):
        assert math.isnan(auc(np.array(scores), np.array(positive)))
    else:
        assert auc(np.array(scores), np.array(positive)) == pytest.approx(
            reference.auc(scores, positive)
        )


def test_auc_by_eye() -> None:
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    assert auc(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


def test_the_table_equals_the_oracle(joined: pl.DataFrame) -> None:
    table = correlation_table(joined, num_resamples=20)
    ranks = {
        "grad_norm": joined["grad_norm_sq"],
        "grad_dot_loss": joined["grad_dot_loss"],
        "oracle_weight": joined["grad_dot_loss"] / joined["grad_norm_sq"],
        **{
            name: joined[name]
            for name in ("student_entropy_norm", "reverse_kl", "forward_kl", "soft_or", "q3_score")
        },
        "position": joined["position"],
        "token_frequency": joined.select(pl.len().over("token_id")).to_series(),
    }
    ranks = {name: stats.rankdata(values.to_numpy()).tolist() for name, values in ranks.items()}
    controls = [ranks["position"], ranks["token_frequency"]]
    assert table.height == 15
    for row in table.iter_rows(named=True):
        x, y = ranks[row["target"]], ranks[row["predictor"]]
        assert row["spearman"] == pytest.approx(reference.pearson(x, y), abs=1e-9)
        assert row["partial"] == pytest.approx(reference.partial_pearson(x, y, controls), abs=1e-7)
        assert row["spearman_low"] <= row["spearman_high"]
        assert (row["spearman_deconvolved"] is None) == (row["target"] == "grad_dot_loss")
    assert table["num_tokens"].unique().to_list() == [joined.height]
    assert table["num_prompts"].unique().to_list() == [6]


def test_the_standard_error_of_a_correlation_of_independent_tokens() -> None:
    rng = np.random.default_rng(0)
    size = 400
    x = rng.normal(size=size)
    frame = pl.DataFrame(
        {
            "rollout_id": [f"p{i}/0" for i in range(size)],
            "prompt_id": [f"p{i}" for i in range(size)],
            "position": [0] * size,
            "batch_id": [0] * size,
            "loss_mask": [True] * size,
            "student_entropy": x - x.min(),
            "reverse_kl": x - x.min(),
            "a": x,
            "b": rng.normal(size=size),
        }
    )
    row = correlation_table(
        frame, targets=["a"], predictors=["b"], controls=[], num_resamples=800
    ).row(0, named=True)
    assert row["spearman_se"] == pytest.approx(1 / math.sqrt(size - 1), rel=0.12)
    assert row["partial"] == pytest.approx(row["spearman"])


@pytest.mark.parametrize(("num_probes", "probed"), [(4, 1.0), (32, 1.0), (4, 0.3)])
def test_deconvolution_takes_probe_noise_out(num_probes: int, probed: float) -> None:
    rng = np.random.default_rng(0)
    size = 6000
    latent = rng.normal(size=size)
    norm = np.exp(latent)
    x = 0.8 * latent + 0.6 * rng.normal(size=size)
    part = probed * norm * rng.chisquare(num_probes, size) / num_probes
    measured = (1 - probed) * norm + part
    frame = pl.DataFrame(
        {
            "rollout_id": [f"p{i % 60}/0" for i in range(size)],
            "prompt_id": [f"p{i % 60}" for i in range(size)],
            "position": [i // 60 for i in range(size)],
            "batch_id": [0] * size,
            "loss_mask": [True] * size,
            "student_entropy": np.abs(x),
            "reverse_kl": np.abs(x),
            "x": x,
            "grad_norm_sq": measured,
            "grad_norm_sq_se": part * math.sqrt(2 / num_probes),
            "grad_dot_loss": rng.normal(size=size) * norm,
            "num_probes": [num_probes] * size,
        }
    )
    row = correlation_table(
        frame, targets=["grad_norm"], predictors=["x"], controls=["position"], num_resamples=50
    ).row(0, named=True)
    true, plain = stats.spearmanr(norm, x).statistic, stats.spearmanr(measured, x).statistic
    assert row["spearman"] == pytest.approx(plain)
    assert abs(row["spearman_deconvolved"] - true) < (0.025 if num_probes == 4 else 0.01)
    assert abs(row["spearman_deconvolved"] - true) < 0.35 * abs(plain - true)
    assert row["spearman_deconvolved_low"] < true < row["spearman_deconvolved_high"]


def test_exact_norms_need_no_deconvolution(joined: pl.DataFrame) -> None:
    exact = joined.with_columns(num_probes=pl.lit(0, pl.Int32))
    table = correlation_table(
        exact, targets=["grad_norm"], predictors=["reverse_kl"], num_resamples=5
    )
    assert table["spearman_deconvolved"].to_list() == [None]


def test_equation_6_names_its_pair(joined: pl.DataFrame) -> None:
    row = equation_6(joined, num_resamples=10).row(0, named=True)
    kept = joined.filter(pl.col("w_local").is_not_null())
    expected = stats.spearmanr(
        kept["w_local"], kept["grad_dot_loss"] / kept["grad_norm_sq"]
    ).statistic
    assert (row["target"], row["predictor"], row["num_tokens"]) == (
        "oracle_weight",
        "w_local",
        kept.height,
    )
    assert row["spearman"] == pytest.approx(expected, abs=1e-9)


def test_errors(joined: pl.DataFrame) -> None:
    with pytest.raises(SchemaError, match="grad_norm_sq"):
        correlation_table(joined.drop("grad_norm_sq"))
    with pytest.raises(SchemaError, match="at least three tokens"):
        correlation_table(joined.head(2))
    with pytest.raises(UnknownNameError):
        correlation_table(joined, targets=["reverse_kl"], predictors=["reverse_kl"])
