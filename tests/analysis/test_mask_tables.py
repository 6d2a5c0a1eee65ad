"""What masks are made of: by quadrant, against each other, against planted errors, and what they
keep of a sum."""

import math

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import token_frames

from tip_analysis.analysis.mask_tables import composition, coverage, overlap, planted_recall
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import to_masks
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Quadrant

RULES = ["all", "random", "entropy", "q3", "position"]
TOKENS = pl.DataFrame(
    {
        "rollout_id": ["a/0"] * 4 + ["b/0"] * 2,
        "prompt_id": ["a"] * 4 + ["b"] * 2,
        "position": [0, 1, 2, 3, 0, 1],
        "loss_mask": [True] * 6,
        "quadrant": ["Q1", "Q3", "Q4", "Q4", "Q3", "Q4"],
        "planted_label": ["plain", "planted_error", "plain", "fork", "planted_error", "plain"],
        "weight": [1.0, 5.0, 0.0, -1.0, math.inf, 3.0],
    },
    schema_overrides={"quadrant": pl.Enum(Quadrant), "position": pl.Int32},
)


def mask(rule: str, keys: list[tuple[str, int]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "rule": [rule] * len(keys),
            "retention_ratio": [0.5] * len(keys),
            "selection_scope": ["rollout"] * len(keys),
            "seed": [0] * len(keys),
            "rollout_id": [key[0] for key in keys],
            "position": [key[1] for key in keys],
        },
        schema_overrides={"position": pl.Int32},
    )


A = mask("a", [("a/0", 0), ("a/0", 1), ("b/0", 0)])
B = mask("b", [("a/0", 1), ("b/0", 1)])


def test_composition_by_eye() -> None:
    table = composition(pl.concat([A, B]), TOKENS)
    assert table.height == 8
    q3 = table.filter(rule="a", quadrant="Q3").row(0, named=True)
    assert (q3["num_tokens"], q3["num_rollouts"], q3["num_prompts"]) == (2, 2, 2)
    assert (q3["share"], q3["recall"], q3["token_share"], q3["lift"]) == pytest.approx(
        (2 / 3, 1.0, 1 / 3, 2.0)
    )
    q2 = table.filter(rule="b", quadrant="Q2").row(0, named=True)
    assert (q2["num_tokens"], q2["share"], q2["recall"], q2["token_share"], q2["lift"]) == (
        0,
        0.0,
        None,
        0.0,
        None,
    )


def test_overlap_by_eye() -> None:
    row = overlap(pl.concat([B, A])).row(0, named=True)
    assert (row["rule_a"], row["rule_b"], row["num_both"], row["num_either"]) == ("a", "b", 1, 4)
    assert (row["jaccard"], row["containment"]) == (0.25, 0.5)
    apart = overlap(pl.concat([mask("x", [("a/0", 0)]), mask("y", [("a/0", 1)])]))
    assert apart["jaccard"].to_list() == [0.0]


def test_planted_recall_by_eye() -> None:
    table = planted_recall(pl.concat([A, B]), TOKENS)
    assert table.select("num_tokens", "num_planted", "num_found").rows() == [(3, 2, 2), (2, 2, 1)]
    assert table["recall"].to_list() == [1.0, 0.5]
    assert table["precision"].to_list() == pytest.approx([2 / 3, 0.5])


def test_coverage_by_eye() -> None:
    table = coverage(pl.concat([A, B]), TOKENS, ["weight"])
    assert table.select("num_tokens", "kept", "total", "share").rows() == [
        (3, 6.0, 8.0, 0.75),
        (2, 8.0, 8.0, 1.0),
    ]
    assert table["token_share"].to_list() == pytest.approx([0.5, 1 / 3])


@settings(deadline=None, max_examples=20)
@given(token_frames(), st.sampled_from([0.2, 0.5]))
def test_tables_equal_set_arithmetic(tokens: pl.DataFrame, ratio: float) -> None:
    quadrants = assign_quadrants(add_scores(tokens)).collect()
    masks = to_masks(quadrants, rules=RULES, retention_ratios=[ratio])
    sets = {
        rule: set(masks.filter(rule=rule).select("rollout_id", "position").iter_rows())
        for rule in RULES
    }
    quadrant_of = {
        (row[0], row[1]): row[2]
        for row in quadrants.select("rollout_id", "position", "quadrant").iter_rows()
    }
    for row in composition(masks, quadrants).iter_rows(named=True):
        chosen = sets[row["rule"]]
        assert row["num_tokens"] == sum(quadrant_of[key] == row["quadrant"] for key in chosen)
        assert row["share"] == pytest.approx(row["num_tokens"] / len(chosen))
    for row in overlap(masks).iter_rows(named=True):
        a, b = sets[row["rule_a"]], sets[row["rule_b"]]
        assert row["jaccard"] == pytest.approx(len(a & b) / len(a | b))
    whole = coverage(masks, quadrants, ["student_entropy"]).filter(rule="all")
    assert whole["kept"].to_list() == pytest.approx(whole["total"].to_list())


def test_foreign_masks_and_missing_labels_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"1 selected token\(s\) are not in the token table"):
        composition(mask("a", [("c/0", 0)]), TOKENS)
    with pytest.raises(SchemaError, match="none"):
        planted_recall(A, TOKENS.with_columns(planted_label=pl.lit("plain")))
    with pytest.raises(SchemaError, match="planted_label"):
        planted_recall(A, TOKENS.drop("planted_label"))
    with pytest.raises(SchemaError, match="missing_column"):
        coverage(A, TOKENS, ["missing_column"])
