"""Tests of tokens: who is drawn, paired differences and areas under the curve by hand."""

import numpy as np
import polars as pl
import pytest
from synthetic import make_tables

from tip_analysis.analysis.correlations import RankedColumn, auc
from tip_analysis.analysis.interventions import (
    draw_tests,
    intervention_aucs,
    intervention_effects,
    token_outcomes,
    weighted_auc,
)
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.core import result_tables as contracts
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.result_tables import checked

TABLES = make_tables(num_prompts=20, rollouts_per_prompt=3, mean_length=40)
PLACED = assign_quadrants(TABLES.tokens, entropy_cut=0.8, divergence_cut=0.5).collect()


def test_as_many_tokens_are_drawn_from_each_quadrant() -> None:
    tests = draw_tests(PLACED, 80)
    assert tests.height == 80
    assert tests["stratum"].value_counts()["count"].to_list() == [20] * 4
    assert tests.select("rollout_id", "position").is_unique().all()
    shuffled = PLACED.sample(fraction=1.0, shuffle=True, seed=3)
    assert draw_tests(shuffled, 80).equals(tests)
    assert not draw_tests(PLACED, 80, seed=1).equals(tests)


def test_a_rare_quadrant_leaves_its_room_to_others() -> None:
    few = PLACED.filter((pl.col("quadrant") != "Q3") | (pl.col("rollout_id") == "p000/0"))
    rare = few.filter(quadrant="Q3").height
    assert 0 < rare < 25
    tests = draw_tests(few, 100)
    assert tests.height == 100
    assert tests.filter(stratum="Q3").height == rare
    assert draw_tests(few, 10**4).height == few.height


def test_controls_are_the_nearest_solved_tokens_of_the_same_rollouts() -> None:
    placed = pl.DataFrame(
        {
            "rollout_id": ["a"] * 6 + ["b"] * 2,
            "prompt_id": ["p"] * 8,
            "position": [0, 1, 2, 3, 4, 5, 0, 1],
            "quadrant": ["Q4", "Q4", "Q3", "Q4", "Q4", "Q4", "Q4", "Q4"],
        }
    )
    tests = draw_tests(placed, 4)
    controls = tests.filter(stratum="Q4")
    assert tests.filter(stratum="Q3")["position"].to_list() == [2]
    assert ("a", 1) in controls.select("rollout_id", "position").rows()  # nearest, the earlier one


def test_nothing_to_draw_from_is_said() -> None:
    with pytest.raises(SchemaError, match="graded rollouts"):
        draw_tests(PLACED.clear(), 5)
    with pytest.raises(OptionError, match="at least 1"):
        draw_tests(PLACED, 0)


def rows_of(success: dict[tuple[str, int], tuple[list[float], list[float], list[float]]], **more):
    """Interventions with known rewards: (rollout, position) -> student, teacher, fresh."""
    rows = []
    for (rollout_id, position), rewards in success.items():
        for choice, given in zip(("student", "teacher", "fresh"), rewards, strict=True):
            rows += [
                {
                    "test_key": "k",
                    "rollout_id": rollout_id,
                    "position": position,
                    "choice": choice,
                    "continuation": index,
                    "prompt_id": rollout_id.split("/")[0],
                    "stratum": "Q3" if position % 2 else "Q4",
                    "forced_token_id": {"student": 1, "teacher": 1 + position % 2}.get(choice),
                    "reward": reward,
                }
                for index, reward in enumerate(given)
            ]
    return pl.DataFrame(rows).with_columns(**more)


HAND = {
    ("p0/0", 1): ([0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]),
    ("p0/1", 3): ([0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]),
    ("p1/0", 1): ([1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]),
    ("p0/0", 2): ([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]),
    ("p1/0", 4): ([1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]),
}


def test_paired_differences_by_hand() -> None:
    tests = token_outcomes(rows_of(HAND))
    assert tests["teacher_delta"].to_list() == [0.75, 0.75, 0.0, 0.0, 0.0]
    assert tests["fresh_delta"].to_list() == [0.25, -0.25, 0.0, 0.0, 0.25]
    table = checked(intervention_effects(rows_of(HAND), num_resamples=200), contracts.EffectTable)
    row = table.filter(group="Q3", choice="teacher").row(0, named=True)
    assert row["difference"] == pytest.approx(0.5)
    assert (row["num_tokens"], row["num_prompts"], row["differing_share"]) == (3, 2, 1.0)
    assert row["success_student"] == pytest.approx((0 + 0.25 + 0.5) / 3)
    same = table.filter(group="Q4", choice="teacher").row(0, named=True)
    assert same["difference"] == same["low"] == same["high"] == 0.0
    assert same["differing_share"] == 0.0
    every = table.filter(group="all", choice="fresh").row(0, named=True)
    assert every["difference"] == pytest.approx(0.05)


def test_groups_of_another_kind() -> None:
    groups = pl.DataFrame(
        [("p0/0", 1, "error"), ("p0/1", 3, "error"), ("p1/0", 4, "fork")],
        schema=["rollout_id", "position", "group"],
        orient="row",
        schema_overrides={"position": pl.Int64},
    )
    table = intervention_effects(rows_of(HAND), groups, num_resamples=50)
    assert table["group"].unique(maintain_order=True).to_list() == ["error", "fork", "all"]
    assert table.filter(group="error", choice="teacher")["difference"].to_list() == [0.75]


def test_several_configurations_are_refused() -> None:
    both = pl.concat([rows_of(HAND), rows_of(HAND, test_key=pl.lit("other"))])
    with pytest.raises(SchemaError, match="one configuration"):
        intervention_effects(both)


def test_planted_effects_are_found_and_their_absence_too() -> None:
    """Replacing raises success by 0.4 in Q3 and not at all in Q4."""
    rng = np.random.default_rng(0)
    success = {}
    for prompt in range(60):
        for position in (1, 2):
            gain = 0.4 if position == 1 else 0.0
            own, other, fresh = (rng.random(8) < p for p in (0.4, 0.4 + gain, 0.4))
            success[f"p{prompt}/0", position] = tuple(
                part.astype(float).tolist() for part in (own, other, fresh)
            )
    table = intervention_effects(rows_of(success), num_resamples=300)
    q3 = table.filter(group="Q3", choice="teacher").row(0, named=True)
    q4 = table.filter(group="Q4", choice="teacher").row(0, named=True)
    assert q3["low"] > 0
    assert q3["low"] < 0.4 < q3["high"]
    assert q4["low"] < 0 < q4["high"]


def test_the_weighted_area_is_that_of_repeated_rows() -> None:
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.3
    times = rng.integers(0, 4, 50)
    found = weighted_auc(RankedColumn(scores), positive, times.astype(float))
    assert found == pytest.approx(auc(np.repeat(scores, times), np.repeat(positive, times)))
    assert np.isnan(weighted_auc(RankedColumn(scores), positive & False, np.ones(50)))


def test_the_score_that_decides_success_has_the_area_1() -> None:
    """The teacher's token helps exactly where the reverse KL is above its median."""
    tests = draw_tests(PLACED, 120).join(
        TABLES.tokens.select("rollout_id", "position", "reverse_kl", "prompt_id"),
        on=["rollout_id", "position"],
    )
    middle = tests["reverse_kl"].median()
    success = {
        (rollout_id, position): (
            [0.0, 0.0],
            [1.0, 1.0] if delta > middle else [0.0, 0.0],
            [0.0, 0.0],
        )
        for rollout_id, position, delta in tests.select(
            "rollout_id", "position", "reverse_kl"
        ).iter_rows()
    }
    table = checked(
        intervention_aucs(rows_of(success), TABLES.tokens, num_resamples=50), contracts.AucTable
    )
    found = dict(table.select("score", "auc").iter_rows())
    assert found["reverse_kl"] == 1.0
    assert 0.5 < found["jsd"] <= 1.0
    assert table["num_raised"].unique().to_list() == [60]
