"""What quadrants carry: against loops, against known values, and under bad input."""

import math

import numpy as np
import polars as pl
import pytest
import reference
from scipy import stats
from synthetic import make_tables

from tip_analysis.analysis.measurements import join_gradients
from tip_analysis.analysis.quadrant_tables import quadrant_statistics, widen
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.core.names import Quadrant


@pytest.fixture(scope="module")
def tables():
    return make_tables(num_prompts=8, rollouts_per_prompt=2, mean_length=25)


@pytest.fixture(scope="module")
def joined(tables) -> pl.DataFrame:
    return join_gradients(add_scores(tables.tokens), tables.gradients).collect()


@pytest.fixture(scope="module")
def quadrants(joined: pl.DataFrame) -> pl.DataFrame:
    return assign_quadrants(joined).collect()


def value(table: pl.DataFrame, quadrant: str, statistic: str) -> float:
    return table.filter(quadrant=quadrant, statistic=statistic)["value"].item()


def test_every_statistic_equals_a_loop(joined: pl.DataFrame, quadrants: pl.DataFrame) -> None:
    table = quadrant_statistics(joined, num_resamples=20)
    names = quadrants["quadrant"].to_list()
    phi, norm = joined["grad_dot_loss"].to_list(), joined["grad_norm_sq"].to_list()
    counts = reference.quadrant_sums(names, [1.0] * len(names))
    sums = {
        column: reference.quadrant_sums(names, joined[column].cast(pl.Float64).to_list())
        for column in ("grad_dot_loss", "grad_norm_sq", "reverse_kl", "reward_alignment")
    }
    negative = reference.quadrant_sums(names, [float(x < 0) for x in phi])
    positive = reference.quadrant_sums(names, [float(x > 0) for x in joined["reward_alignment"]])
    for q in Quadrant:
        assert value(table, q, "share") == pytest.approx(counts[q] / len(names))
        for column, by_quadrant in sums.items():
            assert value(table, q, f"mean_{column}") == pytest.approx(by_quadrant[q] / counts[q])
            assert value(table, q, f"share_{column}") == pytest.approx(
                by_quadrant[q] / math.fsum(by_quadrant.values())
            )
        assert value(table, q, "sum_grad_dot_loss") == pytest.approx(sums["grad_dot_loss"][q])
        assert value(table, q, "alignment_ratio") == pytest.approx(
            sums["grad_dot_loss"][q] / sums["grad_norm_sq"][q]
        )
        assert value(table, q, "negative_alignment_share") == pytest.approx(negative[q] / counts[q])
        assert value(table, q, "positive_reward_alignment_share") == pytest.approx(
            positive[q] / counts[q]
        )
        ratios = [p / m for p, m, name in zip(phi, norm, names, strict=True) if name == q]
        assert value(table, q, "median_oracle_weight") == pytest.approx(float(np.median(ratios)))
        row = table.filter(quadrant=q, statistic="share").row(0, named=True)
        rows = quadrants.filter(quadrant=q)
        assert (row["num_tokens"], row["num_rollouts"], row["num_prompts"]) == (
            rows.height,
            rows["rollout_id"].n_unique(),
            rows["prompt_id"].n_unique(),
        )
        assert row["low"] <= row["value"] <= row["high"]


def by_hand() -> pl.DataFrame:
    """Eight tokens, two prompts; every quadrant holds two."""
    return pl.DataFrame(
        {
            "rollout_id": ["a/0"] * 4 + ["b/0"] * 4,
            "prompt_id": ["a"] * 4 + ["b"] * 4,
            "position": [0, 1, 2, 3] * 2,
            "batch_id": [0] * 8,
            "loss_mask": [True] * 8,
            "student_entropy": [2.0, 2.0, 0.0, 0.0] * 2,
            "reverse_kl": [3.0, 0.0, 3.0, 0.0] * 2,
            "grad_norm_sq": [4.0, 1.0, 4.0, 1.0, 4.0, 1.0, 12.0, 1.0],
            "grad_dot_loss": [1.0, 2.0, -4.0, 0.0, 3.0, 2.0, 6.0, -2.0],
            "num_probes": [0] * 8,
        }
    )


def test_a_case_to_check_by_eye() -> None:
    table = quadrant_statistics(by_hand(), entropy_cut=1.0, divergence_cut=1.0, num_resamples=50)
    assert [value(table, q, "share") for q in Quadrant] == [0.25] * 4
    assert [value(table, q, "sum_grad_dot_loss") for q in Quadrant] == [4.0, 4.0, 2.0, -2.0]
    assert [value(table, q, "share_grad_dot_loss") for q in Quadrant] == [0.5, 0.5, 0.25, -0.25]
    assert [value(table, q, "share_grad_norm_sq") for q in Quadrant] == pytest.approx(
        [8 / 28, 2 / 28, 16 / 28, 2 / 28]
    )
    assert [value(table, q, "alignment_ratio") for q in Quadrant] == [0.5, 2.0, 0.125, -1.0]
    assert [value(table, q, "median_oracle_weight") for q in Quadrant] == [0.5, 2.0, -0.25, -1.0]
    assert [value(table, q, "negative_alignment_share") for q in Quadrant] == [0.0, 0.0, 0.5, 0.5]
    wide = widen(table)
    assert wide["sum_grad_dot_loss"].to_list() == [4.0, 4.0, 2.0, -2.0]
    assert {"share_low", "share_high", "share_se", "num_prompts"} <= set(wide.columns)


def test_unknown_and_infinite_values_are_left_out() -> None:
    frame = by_hand().with_columns(
        pl.Series("reverse_kl", [math.inf, 0.0, 3.0, 0.0, 3.0, 0.0, 3.0, 0.0]),
        pl.Series("grad_dot_loss", [1.0, 2.0, None, 0.0, 3.0, 2.0, 6.0, -2.0]),
    )
    table = quadrant_statistics(frame, entropy_cut=1.0, divergence_cut=1.0, num_resamples=10)
    assert value(table, "Q1", "share") == 0.25
    assert value(table, "Q1", "mean_reverse_kl") == 3.0
    assert value(table, "Q3", "negative_alignment_share") == 0.0
    assert value(table, "Q3", "median_oracle_weight") == 0.5


def test_empty_quadrants_and_one_prompt_give_nulls_not_errors() -> None:
    table = quadrant_statistics(by_hand(), entropy_cut=5.0, divergence_cut=1.0, num_resamples=10)
    assert value(table, "Q1", "share") == 0.0
    assert value(table, "Q1", "mean_reverse_kl") is None
    assert value(table, "Q1", "median_oracle_weight") is None
    one = quadrant_statistics(by_hand().filter(prompt_id="a"), num_resamples=10)
    assert one["low"].null_count() == one.height
    assert value(one, "Q1", "share") is not None


def test_without_gradients_the_table_has_no_alignment(tables) -> None:
    names = set(quadrant_statistics(tables.tokens, num_resamples=5)["statistic"])
    assert {"share", "mean_reverse_kl", "share_forward_kl"} <= names
    assert not {name for name in names if "grad_dot_loss" in name or "oracle" in name}


@pytest.mark.parametrize("probed", [1.0, 0.3])
def test_the_median_of_ratios_is_corrected_for_probe_noise(probed: float) -> None:
    rng = np.random.default_rng(0)
    size, probes = 20_000, 4
    part = probed * rng.chisquare(probes, size) / probes
    frame = pl.DataFrame(
        {
            "rollout_id": [f"p{i % 50}/0" for i in range(size)],
            "prompt_id": [f"p{i % 50}" for i in range(size)],
            "position": [i // 50 for i in range(size)],
            "batch_id": [0] * size,
            "loss_mask": [True] * size,
            "student_entropy": [0.0] * size,
            "reverse_kl": [0.0] * size,
            "grad_dot_loss": [0.3] * size,
            "grad_norm_sq": 1 - probed + part,
            "grad_norm_sq_se": part * (2 / probes) ** 0.5,
            "num_probes": [probes] * size,
        }
    )
    table = quadrant_statistics(frame, num_resamples=5)
    assert value(table, "Q4", "median_oracle_weight") == pytest.approx(
        0.3 / (1 - probed + probed * stats.chi2.median(probes) / probes), rel=0.02
    )
    assert value(table, "Q4", "median_oracle_weight_deconvolved") == pytest.approx(0.3, rel=0.02)


def test_the_interval_of_a_quadrant_mean_covers_under_prompt_effects() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(60):
        num_prompts, per_prompt = 20, 10
        size = num_prompts * per_prompt
        prompt = np.repeat(np.arange(num_prompts), per_prompt)
        phi = rng.normal(size=num_prompts)[prompt] + rng.normal(size=size)
        frame = pl.DataFrame(
            {
                "rollout_id": [f"p{i}/0" for i in prompt],
                "prompt_id": [f"p{i}" for i in prompt],
                "position": list(range(per_prompt)) * num_prompts,
                "batch_id": [0] * size,
                "loss_mask": [True] * size,
                "student_entropy": rng.random(size),
                "reverse_kl": rng.random(size),
                "grad_dot_loss": phi,
                "grad_norm_sq": np.ones(size),
            }
        )
        row = quadrant_statistics(frame, num_resamples=150, seed=trial).filter(
            quadrant="Q1", statistic="mean_grad_dot_loss"
        )
        covered += bool(row["low"].item() <= 0.0 <= row["high"].item())
    assert covered >= 52  # 57 expected; below 52 has probability 0.01 at 95 %
