"""Importance through training: flow, half-life, rocks and falls against hand counts."""

import math

import numpy as np
import polars as pl
import pytest
from scipy import stats
from synthetic import make_tables

from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.analysis.trajectories import (
    half_life,
    placed_trajectory,
    q3_survival,
    realised_falls,
    rock_tokens,
    trajectory_flow,
    with_facts,
    with_selected,
)
from tip_analysis.core import result_tables as contracts
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.result_tables import checked

CUTS = Taxonomy(entropy_cut=1.0, divergence_cut=1.0)
POINTS = {"Q1": (2.0, 2.0), "Q2": (2.0, 0.5), "Q3": (0.5, 2.0), "Q4": (0.5, 0.5)}
"""Entropy and divergence of a token in each quadrant."""
STORY = {
    0: ["Q3", "Q3", "Q3", "Q3", "Q1", "Q2", "Q4", "Q4"],
    10: ["Q3", "Q3", "Q4", "Q1", "Q1", "Q2", "Q4", "Q3"],
    20: ["Q3", "Q4", "Q4", "Q4", "Q1", "Q4", "Q4", "Q4"],
}
"""Quadrants of eight tokens at three steps, of two prompts (the even and the odd)."""


def trajectory(story=STORY, *, rule="q3", ratio=0.5, key="ablate-1") -> pl.DataFrame:
    rows = [
        {
            "arm_key": key,
            "step": step,
            "rollout_id": f"p{token % 2}/0",
            "position": token // 2,
            "prompt_id": f"p{token % 2}",
            "rule": rule,
            "retention_ratio": ratio,
            "seed": 0,
            "student_entropy": POINTS[name][0],
            "student_entropy_norm": POINTS[name][0] / 4,
            "reverse_kl": POINTS[name][1],
            "forward_kl": POINTS[name][1],
        }
        for step, names in story.items()
        for token, name in enumerate(names)
    ]
    return pl.DataFrame(rows)


def test_a_hand_made_sequence_gives_the_hand_counted_flow() -> None:
    flow = checked(trajectory_flow(placed_trajectory(trajectory(), CUTS)), contracts.FlowTable)
    counted = {
        (row["step_from"], str(row["quadrant_from"]), str(row["quadrant_to"])): row["num_tokens"]
        for row in flow.iter_rows(named=True)
        if row["num_tokens"]
    }
    assert counted == {
        (0, "Q3", "Q3"): 2,
        (0, "Q3", "Q4"): 1,
        (0, "Q3", "Q1"): 1,
        (0, "Q1", "Q1"): 1,
        (0, "Q2", "Q2"): 1,
        (0, "Q4", "Q4"): 1,
        (0, "Q4", "Q3"): 1,
        (10, "Q3", "Q3"): 1,
        (10, "Q3", "Q4"): 2,
        (10, "Q4", "Q4"): 2,
        (10, "Q1", "Q4"): 1,
        (10, "Q1", "Q1"): 1,
        (10, "Q2", "Q4"): 1,
    }
    assert flow.height == 2 * 16
    assert flow.group_by("step_from").agg(pl.col("share").sum())["share"].to_list() == [1.0, 1.0]


def test_cuts_are_those_of_the_first_step() -> None:
    """Measured on each step, a median cut would never let a quadrant empty."""
    placed = placed_trajectory(trajectory(), Taxonomy("median", "median"))
    first = placed.filter(step=0)
    cut = first["reverse_kl"].median()
    later = placed.filter(step=20)
    above = (later["reverse_kl"] > cut).to_list()
    assert later["quadrant"].is_in(["Q1", "Q3"]).to_list() == above


def test_survival_and_half_life_of_q3_by_hand() -> None:
    """4 of 4, then 2, then 1 of them are still Q3: half are left at step 10."""
    table = checked(
        q3_survival(placed_trajectory(trajectory(), CUTS), num_resamples=50),
        contracts.SurvivalTable,
    )
    assert table["tokens"].unique().to_list() == ["all"]
    assert table["share"].to_list() == [1.0, 0.5, 0.25]
    assert table["half_life"].unique().to_list() == [10.0]
    assert table["num_tokens"].unique().to_list() == [4]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ([1.0, 0.8, 0.4], 10 + 10 * 0.3 / 0.4),
        ([1.0, 0.9, 0.6], None),
        ([1.0, 0.5, 0.7], 10.0),
        ([0.4, 0.3, 0.2], 0.0),
    ],
)
def test_half_life_lies_on_straight_lines_between_steps(share, expected) -> None:
    found = half_life([0, 10, 20], np.array(share))
    assert found is None if expected is None else found == pytest.approx(expected)


def decaying(seed: int, half_life: float) -> pl.DataFrame:
    """600 tokens of 60 prompts, each leaving Q3 at a time of its own."""
    left = np.random.default_rng(seed).exponential(half_life / math.log(2), size=600)
    rows = [
        {
            "arm_key": "a",
            "step": step,
            "rollout_id": f"p{token % 60}/0",
            "position": token // 60,
            "prompt_id": f"p{token % 60}",
            "rule": "all",
            "retention_ratio": 1.0,
            "student_entropy": 0.5,
            "reverse_kl": 2.0 if step < left[token] else 0.5,
        }
        for step in range(0, 100, 5)
        for token in range(600)
    ]
    return placed_trajectory(pl.DataFrame(rows), CUTS)


def test_a_planted_decay_has_its_half_life_in_the_interval() -> None:
    inside = 0
    for seed in range(10):
        row = q3_survival(decaying(seed, 30), num_resamples=100).row(0, named=True)
        assert row["half_life"] == pytest.approx(30, abs=6)
        inside += row["half_life_low"] < 30 < row["half_life_high"]
    assert inside >= 8
    slow = q3_survival(decaying(0, 400), num_resamples=50).row(0, named=True)
    assert slow["half_life"] is None
    assert slow["half_life_high"] is None


def test_rock_tokens_stay_above_the_cut_at_every_step() -> None:
    placed = placed_trajectory(trajectory(), CUTS)
    row = rock_tokens(placed, num_resamples=50).row(0, named=True)
    # tokens 0 and 4 (Q3 → Q3 → Q3, Q1 → Q1 → Q1); five are above the cut at first
    assert (row["num_rocks"], row["num_high"], row["share"]) == (2, 5, 0.4)
    assert row["rock_divergence"] == pytest.approx(4.0 / (4.0 + 6 * 0.5))


def tracked(tables, fall: pl.Expr) -> pl.DataFrame:
    """Two steps of a run's own tokens, δ falling as told."""
    first = tables.tokens.filter("loss_mask").select(
        pl.lit("a").alias("arm_key"),
        pl.lit(0).alias("step"),
        "rollout_id",
        "position",
        "prompt_id",
        pl.lit("divergence").alias("rule"),
        pl.lit(0.2).alias("retention_ratio"),
        pl.lit(0).alias("seed"),
        "student_entropy",
        "student_entropy_norm",
        "reverse_kl",
        "forward_kl",
    )
    second = first.with_columns(pl.lit(9).alias("step"), reverse_kl=pl.col("reverse_kl") - fall)
    return pl.concat([first, second])


def test_falls_are_set_against_scores_before_training() -> None:
    """δ falls by half of itself: the rank correlation with δ is 1, that with others scipy's."""
    tables = make_tables(num_prompts=10, rollouts_per_prompt=3)
    placed = with_facts(placed_trajectory(tracked(tables, pl.col("reverse_kl") / 2)), tables.tokens)
    table = checked(realised_falls(placed, tables.tokens, num_resamples=40), contracts.FallTable)
    every = table.filter(tokens="all")
    found = dict(every.select("score", "spearman").iter_rows())
    assert found["reverse_kl"] == pytest.approx(1.0)
    tokens = tables.tokens.filter("loss_mask")
    expected = stats.spearmanr(tokens["forward_kl"], tokens["reverse_kl"]).statistic
    assert found["forward_kl"] == pytest.approx(expected, abs=1e-6)
    mean = (tokens["reverse_kl"] / 2).mean()
    assert every["mean_fall"][0] == pytest.approx(mean, rel=1e-5)
    row = every.filter(score="forward_kl").row(0, named=True)
    assert row["low"] < row["spearman"] < row["high"]
    assert set(table["tokens"]) == {"all", "selected", "not selected", "planted errors"}


def test_selected_is_what_the_arms_rule_takes_before_training() -> None:
    tables = make_tables(num_prompts=4)
    placed = placed_trajectory(tracked(tables, pl.lit(0.0)))
    found = with_selected(placed, tables.tokens).filter(step=0, selected=True)
    size = tables.tokens.group_by("rollout_id").len().with_columns(k=pl.col("len") // 5)
    assert found.height == size["k"].sum()
    lowest = found.group_by("rollout_id").agg(pl.col("reverse_kl").min().alias("low"))
    rest = tables.tokens.join(found.select("rollout_id", "position"),
                              on=["rollout_id", "position"], how="anti")  # fmt: skip
    both = rest.group_by("rollout_id").agg(pl.col("reverse_kl").max()).join(lowest, on="rollout_id")
    assert (both["reverse_kl"] <= both["low"]).all()


def test_a_trajectory_is_of_one_arm_with_the_same_tokens_at_each_step() -> None:
    other = trajectory(key="ablate-2")
    with pytest.raises(SchemaError, match="one arm"):
        placed_trajectory(pl.concat([trajectory(), other]))
    with pytest.raises(SchemaError, match="same tokens"):
        placed_trajectory(trajectory().head(20))
    with pytest.raises(SchemaError, match="at least two steps"):
        trajectory_flow(placed_trajectory(trajectory({0: STORY[0]})))
    with pytest.raises(SchemaError, match="Q3 at the first step"):
        q3_survival(placed_trajectory(trajectory({0: ["Q4"] * 4, 5: ["Q4"] * 4}), CUTS))
