"""What selections keep and miss: against sums by hand, and under bad input."""

import polars as pl
import pytest
from synthetic import make_tables

from tip_analysis.analysis.coverage_tables import coverage_curve, proposition_2
from tip_analysis.analysis.mask_tables import composition
from tip_analysis.analysis.measurements import join_gradients
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import to_masks
from tip_analysis.core.errors import SchemaError


@pytest.fixture(scope="module")
def joined() -> pl.DataFrame:
    tables = make_tables(num_prompts=8, rollouts_per_prompt=2, mean_length=25)
    return join_gradients(add_scores(tables.tokens), tables.gradients).collect()


@pytest.fixture(scope="module")
def quadrants(joined: pl.DataFrame) -> pl.DataFrame:
    return assign_quadrants(joined).collect()


def test_coverage_equals_sums_and_the_oracle_bounds_every_rule(joined: pl.DataFrame) -> None:
    masks = to_masks(
        joined,
        rules=["all", "random", "entropy", "q3", "gradient_oracle"],
        retention_ratios=[0.2, 0.5],
        seeds=[0, 1],
    )
    table = coverage_curve(masks, joined, columns=["grad_dot_loss", "grad_norm_sq"])
    total = joined["grad_dot_loss"].sum()
    for row in table.filter(column="grad_dot_loss").iter_rows(named=True):
        part = masks.filter(rule=row["rule"], retention_ratio=row["retention_ratio"])
        kept = (
            part.join(joined, on=["rollout_id", "position"])["grad_dot_loss"].sum()
            / row["num_seeds"]
        )
        assert row["share"] == pytest.approx(kept / total)
        assert row["num_seeds"] == (2 if row["rule"] == "random" else 1)
        bound = table.filter(
            rule="gradient_oracle", retention_ratio=row["retention_ratio"], column="grad_dot_loss"
        )
        assert row["rule"] == "all" or row["share"] <= bound["share"].item() + 1e-12
    everything = table.filter(rule="all")
    assert everything["share"].to_list() == pytest.approx([1.0, 1.0])
    assert everything["share_se"].to_list() == pytest.approx([0.0, 0.0], abs=1e-12)
    with pytest.raises(SchemaError, match="at least one mask"):
        coverage_curve(masks.clear(), joined)


def test_proposition_2_equals_the_composition(
    joined: pl.DataFrame, quadrants: pl.DataFrame
) -> None:
    masks = to_masks(joined, rules=["entropy", "q3"], retention_ratios=[0.1, 0.5])
    table = proposition_2(masks, joined, num_resamples=30)
    shares = composition(masks, quadrants).filter(quadrant="Q3")
    assert table["q3_share"].to_list() == pytest.approx(shares["share"].to_list())
    assert table["q3_missed"].to_list() == pytest.approx(
        [1 - recall for recall in shares["recall"]]
    )
    assert table["entropy_only"].to_list() == [True, True, False, False]
    in_q3 = quadrants.filter(quadrant="Q3")
    for row in table.iter_rows(named=True):
        part = masks.filter(rule=row["rule"], retention_ratio=row["retention_ratio"])
        kept = part.join(in_q3, on=["rollout_id", "position"])["grad_dot_loss"].sum()
        assert row["q3_alignment_missed"] == pytest.approx(1 - kept / in_q3["grad_dot_loss"].sum())
        assert row["num_q3"] == in_q3.height
        assert row["num_tokens"] == part.height
    with pytest.raises(SchemaError, match="at least one mask"):
        proposition_2(masks.clear(), joined)
    assert (
        "q3_alignment_missed"
        not in proposition_2(masks, joined.drop("grad_dot_loss"), num_resamples=5).columns
    )
