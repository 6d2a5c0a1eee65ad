"""Quadrants, shares, sensitivity and the warning about cuts by rank."""

import math
import sys

import numpy as np
import polars as pl
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import frame, token_frames

from tip_analysis.analysis.paper_preset import PAPER_RANGES
from tip_analysis.analysis.quadrants import (
    assign_quadrants,
    cut_sensitivity,
    quadrant_shares,
    warn_about_cuts,
)
from tip_analysis.analysis.taxonomy import resolve_cuts
from tip_analysis.core.errors import OptionError, SchemaError, UnknownNameError
from tip_analysis.core.names import Quadrant

CUTS = ["median", "mean", "otsu", "q0.8", "q0", "q1", 0.3, "0.125"]


def oracle_cut(values: list[float], cut: str | float) -> float:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if isinstance(cut, float) or cut == "0.125":
        return float(cut)
    if not finite:
        return sys.float_info.max  # no finite value: only +inf is high
    if cut == "mean":
        return math.fsum(finite) / len(finite)
    if cut == "otsu":
        return reference.otsu(finite)
    return reference.quantile_linear(finite, 0.5 if cut == "median" else float(cut[1:]))


@settings(deadline=None, max_examples=80)
@given(
    token_frames(), st.sampled_from(CUTS), st.sampled_from(CUTS), st.sampled_from(["run", "batch"])
)
def test_quadrants_equal_the_oracle_in_each_scope(
    tokens: pl.DataFrame, entropy_cut, divergence_cut, scope: str
) -> None:
    found = assign_quadrants(
        tokens, entropy_cut=entropy_cut, divergence_cut=divergence_cut, cut_scope=scope
    ).collect()
    for group in [found] if scope == "run" else found.partition_by("batch_id"):
        entropy, divergence = group["student_entropy"].to_list(), group["reverse_kl"].to_list()
        cuts = oracle_cut(entropy, entropy_cut), oracle_cut(divergence, divergence_cut)
        for h, d, quadrant in zip(entropy, divergence, group["quadrant"].to_list(), strict=True):
            if (
                "mean" in (entropy_cut, divergence_cut)
                and h is not None
                and (
                    math.isclose(h, cuts[0], rel_tol=1e-12)
                    or math.isclose(d, cuts[1], rel_tol=1e-12)
                )
            ):
                continue  # the mean of equal values may differ from them in its last bit
            assert quadrant == reference.quadrant(h, d, *cuts)


@settings(deadline=None, max_examples=30)
@given(token_frames())
def test_quadrants_partition_what_the_student_wrote(tokens: pl.DataFrame) -> None:
    quadrants = assign_quadrants(tokens).collect()
    assert (quadrants["quadrant"].is_not_null() == quadrants["loss_mask"]).all()
    shares = quadrant_shares(quadrants)
    assert shares["quadrant"].to_list() == list(Quadrant)
    assert shares["num_tokens"].sum() == tokens["loss_mask"].sum()
    assert shares["share"].sum() == pytest.approx(1.0)


def test_a_case_to_check_by_eye() -> None:
    tokens = frame([0.0, 0.0, 1.0, 1.0, 0.5], [0.0, 2.0, 0.0, 2.0, 1.0])
    quadrants = assign_quadrants(tokens).collect()["quadrant"].to_list()
    assert quadrants == [
        "Q4",
        "Q3",
        "Q2",
        "Q1",
        "Q4",
    ]  # the median entropy ½ and the mean divergence 1 are not above themselves


def test_infinite_divergence_is_high_counted_and_left_out_of_the_mean() -> None:
    tokens = frame([0.0, 0.0, 0.0, 1.0], [1.0, 3.0, math.inf, math.inf])
    cuts = resolve_cuts(tokens)
    assert cuts.divergence.value == 2.0
    assert cuts.num_infinite == 2
    assert assign_quadrants(tokens, cuts=cuts).collect()["quadrant"].to_list() == [
        "Q4",
        "Q3",
        "Q3",
        "Q1",
    ]
    all_infinite = frame([0.0, 1.0], [math.inf, math.inf])
    assert resolve_cuts(all_infinite).divergence.value is None
    assert assign_quadrants(all_infinite).collect()["quadrant"].to_list() == ["Q3", "Q1"]


def test_cut_scope_batch_measures_each_batch() -> None:
    tokens = frame([0.0, 1.0, 10.0, 11.0], [0.0, 1.0, 10.0, 11.0], batch_id=[0, 0, 1, 1])
    assert assign_quadrants(tokens).collect()["quadrant"].to_list() == ["Q4", "Q4", "Q1", "Q1"]
    by_batch = assign_quadrants(tokens, cut_scope="batch").collect()["quadrant"].to_list()
    assert by_batch == ["Q4", "Q1", "Q4", "Q1"]
    assert resolve_cuts(tokens, cut_scope="batch").entropy.batch_values == ((0, 0.5), (1, 10.5))


@settings(deadline=None, max_examples=25)
@given(token_frames())
def test_sensitivity_equals_assigning_with_each_pair(tokens: pl.DataFrame) -> None:
    entropy_cuts, divergence_cuts = ["q0.1", "median", 0.5, "otsu"], ["mean", 0.0, "q0.9"]
    table = cut_sensitivity(tokens, entropy_cuts=entropy_cuts, divergence_cuts=divergence_cuts)
    assert table.height == 12
    for row in table.iter_rows(named=True):
        quadrants = assign_quadrants(
            tokens, entropy_cut=row["entropy_spec"], divergence_cut=row["divergence_spec"]
        )
        shares = dict(quadrant_shares(quadrants).select("quadrant", "share").iter_rows())
        assert [row[name] for name in Quadrant] == pytest.approx(
            [shares[name] for name in Quadrant]
        )
        in_ranges = (
            PAPER_RANGES["Q4"][0] <= row["Q4"] <= PAPER_RANGES["Q4"][1],
            PAPER_RANGES["Q1+Q2"][0] <= row["Q1"] + row["Q2"] <= PAPER_RANGES["Q1+Q2"][1],
            PAPER_RANGES["Q3"][0] <= row["Q3"] <= PAPER_RANGES["Q3"][1],
        )
        if all(
            abs(share * 100 - round(share * 100)) > 1e-6
            for share in (row["Q4"], row["Q1"] + row["Q2"], row["Q3"])
        ):
            assert (row["q4_in_range"], row["q1_q2_in_range"], row["q3_in_range"]) == in_ranges
            assert row["in_paper_ranges"] == all(in_ranges)


@settings(deadline=None, max_examples=20)
@given(token_frames())
def test_a_higher_entropy_cut_never_makes_more_tokens_uncertain(tokens: pl.DataFrame) -> None:
    table = cut_sensitivity(
        tokens, entropy_cuts=["q0.1", "q0.5", "q0.9"], divergence_cuts=["median"]
    )
    uncertain = (table["Q1"] + table["Q2"]).to_list()
    assume(len(uncertain) == 3)
    assert uncertain == sorted(uncertain, reverse=True)


def test_the_warning_counts_confident_tokens_above_the_cut() -> None:
    tokens = frame([0.0, 0.01, 0.02, 2.0], [0.0] * 4, student_top1_prob=[1.0, 0.99, 0.97, 0.3])
    warning = warn_about_cuts(tokens, resolve_cuts(tokens))
    assert warning is not None
    assert (warning.num_tokens, warning.share_of_uncertain) == (1, 0.5)
    assert "0.95" in warning.message
    assert warn_about_cuts(tokens, resolve_cuts(tokens, entropy_cut=0.5)) is None
    edge = frame([0.0, 1.0], [0.0, 0.0], student_top1_prob=[1.0, 0.95])
    assert warn_about_cuts(edge, resolve_cuts(edge)) is None


def test_the_preset_is_no_point_of_a_grid() -> None:
    with pytest.raises(OptionError, match="one point of a grid"):
        cut_sensitivity(frame([0.0, 1.0], [0.0, 1.0]), entropy_cuts=["paper"])


def test_other_errors_and_empty_tables() -> None:
    tokens = frame([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(UnknownNameError, match="unknown scope 'rollout'; valid names: run, batch"):
        resolve_cuts(tokens, cut_scope="rollout")
    with pytest.raises(SchemaError, match="reverse_kl"):
        assign_quadrants(tokens.drop("reverse_kl"))
    empty = tokens.clear()
    assert quadrant_shares(assign_quadrants(empty))["num_tokens"].to_list() == [0, 0, 0, 0]
    assert quadrant_shares(assign_quadrants(empty))["share"].null_count() == 4
    with pytest.raises(SchemaError, match="at least one token"):
        cut_sensitivity(empty)
    assert resolve_cuts(empty, entropy_cut="paper").paper_ranges_met is False


def test_cuts_in_use_are_lines_of_the_grid() -> None:
    rng = np.random.default_rng(1)
    tokens = frame(rng.exponential(0.1, 200), rng.exponential(1.0, 200))
    for options in ({"entropy_cut": 0.5}, {"divergence_cut": 7.25}, {}):
        cuts = resolve_cuts(tokens, **options)
        table = cut_sensitivity(tokens, in_use=cuts)
        row = table.filter(
            entropy_cut=cuts.entropy.value, divergence_cut=cuts.divergence.value
        ).row(0, named=True)
        shares = dict(
            quadrant_shares(assign_quadrants(tokens, cuts=cuts))
            .select("quadrant", "share")
            .iter_rows()
        )
        expected = [shares[name] for name in Quadrant]
        assert [row[name] for name in Quadrant] == pytest.approx(expected)
        sizes = table["entropy_cut"].n_unique() * table["divergence_cut"].n_unique()
        assert table.height == sizes == table.unique(["entropy_cut", "divergence_cut"]).height
