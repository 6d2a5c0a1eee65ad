"""Cuts, quadrants, shares, sensitivity and the warning about cuts by rank."""

import dataclasses
import math
import sys

import numpy as np
import polars as pl
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import token_frames

from tip_analysis.cuts import (
    PAPER_RANGES,
    PAPER_TARGET,
    Cut,
    otsu_cut,
    paper_cuts,
    paper_range_distance,
    parse_cut,
    resolve_cuts,
)
from tip_analysis.errors import OptionError, SchemaError
from tip_analysis.quadrants import assign_quadrants, cut_sensitivity, quadrant_shares, warn_about_cuts
from tip_analysis.schema import Quadrant

CUTS = ["median", "mean", "otsu", "q0.8", "q0", "q1", 0.3, "0.125"]


def frame(entropy: list, divergence: list, **columns: list) -> pl.DataFrame:
    size = len(entropy)
    defaults = {
        "rollout_id": ["a/0"] * size,
        "prompt_id": ["a"] * size,
        "position": list(range(size)),
        "batch_id": [0] * size,
        "loss_mask": [value is not None for value in entropy],
    }
    return pl.DataFrame(
        {**defaults, "student_entropy": entropy, "reverse_kl": divergence, **columns}, schema_overrides={"batch_id": pl.Int32}
    )


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
@given(token_frames(), st.sampled_from(CUTS), st.sampled_from(CUTS), st.sampled_from(["run", "batch"]))
def test_quadrants_equal_the_oracle_in_each_scope(tokens: pl.DataFrame, entropy_cut, divergence_cut, scope: str) -> None:
    found = assign_quadrants(tokens, entropy_cut=entropy_cut, divergence_cut=divergence_cut, cut_scope=scope).collect()
    for group in [found] if scope == "run" else found.partition_by("batch_id"):
        entropy, divergence = group["student_entropy"].to_list(), group["reverse_kl"].to_list()
        cuts = oracle_cut(entropy, entropy_cut), oracle_cut(divergence, divergence_cut)
        for h, d, quadrant in zip(entropy, divergence, group["quadrant"].to_list(), strict=True):
            if (
                "mean" in (entropy_cut, divergence_cut)
                and h is not None
                and (math.isclose(h, cuts[0], rel_tol=1e-12) or math.isclose(d, cuts[1], rel_tol=1e-12))
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
    assert assign_quadrants(tokens, cuts=cuts).collect()["quadrant"].to_list() == ["Q4", "Q3", "Q3", "Q1"]
    all_infinite = frame([0.0, 1.0], [math.inf, math.inf])
    assert resolve_cuts(all_infinite).divergence.value is None
    assert assign_quadrants(all_infinite).collect()["quadrant"].to_list() == ["Q3", "Q1"]


def test_cut_scope_batch_measures_each_batch() -> None:
    tokens = frame([0.0, 1.0, 10.0, 11.0], [0.0, 1.0, 10.0, 11.0], batch_id=[0, 0, 1, 1])
    assert assign_quadrants(tokens).collect()["quadrant"].to_list() == ["Q4", "Q4", "Q1", "Q1"]
    by_batch = assign_quadrants(tokens, cut_scope="batch").collect()["quadrant"].to_list()
    assert by_batch == ["Q4", "Q1", "Q4", "Q1"]
    assert resolve_cuts(tokens, cut_scope="batch").entropy.batch_values == ((0, 0.5), (1, 10.5))


def test_a_cut_is_recorded_and_cannot_be_changed() -> None:
    cuts = resolve_cuts(frame([0.0, 1.0, 2.0], [0.0, 1.0, 5.0]), entropy_cut="q0.5", divergence_cut=0.25)
    assert cuts.entropy == Cut("entropy", "q0.5", "run", 1.0)
    assert cuts.divergence == Cut("divergence", "0.25", "run", 0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cuts.entropy.value = 2.0  # type: ignore[misc]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 4, width=32)), min_size=1, max_size=25))
def test_otsu_equals_trying_every_split(values: list[float]) -> None:
    found = otsu_cut(np.asarray(values))
    wanted = reference.otsu(values)

    def variance(cut: float) -> float:
        low, high = [v for v in values if v <= cut], [v for v in values if v > cut]
        return len(low) * len(high) * (sum(low) / len(low) - sum(high) / len(high)) ** 2 if low and high else 0.0

    assert found in values
    assert variance(found) == pytest.approx(variance(wanted), rel=1e-9, abs=1e-30)


def test_otsu_splits_two_heaps() -> None:
    assert otsu_cut(np.array([0.0, 0.1, 0.2, 5.0, 5.1])) == 0.2
    assert otsu_cut(np.array([3.0, 3.0])) == 3.0


@settings(deadline=None, max_examples=25)
@given(st.integers(60, 400), st.integers(0, 10_000), st.floats(0.2, 3.0))
def test_the_paper_preset_lands_in_the_ranges_where_values_are_many(size: int, seed: int, shape: float) -> None:
    rng = np.random.default_rng(seed)
    entropy, divergence = rng.gamma(shape, size=size), rng.gamma(shape, size=size)
    entropy_cut, divergence_cut, met = paper_cuts(entropy, divergence)
    uncertain = float((entropy > entropy_cut).mean())
    q3 = float(((entropy <= entropy_cut) & (divergence > divergence_cut)).mean())
    assert met
    assert paper_range_distance(uncertain, q3) == 0.0
    assert uncertain == pytest.approx(PAPER_TARGET[0], abs=1.5 / size)
    assert q3 == pytest.approx(PAPER_TARGET[1], abs=1.5 / size)


@settings(deadline=None, max_examples=40)
@given(token_frames(max_rollouts=4))
def test_the_paper_preset_finds_the_ranges_whenever_any_pair_of_values_does(tokens: pl.DataFrame) -> None:
    kept = tokens.filter("loss_mask")
    entropy, divergence = (kept[name].cast(pl.Float64).to_numpy() for name in ("student_entropy", "reverse_kl"))
    distances = [
        paper_range_distance(float((entropy > a).mean()), float(((entropy <= a) & (divergence > b)).mean()))
        for a in [0.0, *entropy]
        for b in [0.0, *divergence[np.isfinite(divergence)]]
    ]
    *_, met = paper_cuts(entropy, divergence)
    assert met == (min(distances) == 0.0)


def test_the_paper_preset_says_so_when_it_cannot() -> None:
    tokens = frame([0.0] * 9 + [1.0], [0.0] * 9 + [1.0])
    cuts = resolve_cuts(tokens, entropy_cut="paper")
    assert cuts.paper_ranges_met is False
    assert cuts.entropy.spec == cuts.divergence.spec == "paper"
    assert resolve_cuts(tokens).paper_ranges_met is None


@settings(deadline=None, max_examples=25)
@given(token_frames())
def test_sensitivity_equals_assigning_with_each_pair(tokens: pl.DataFrame) -> None:
    entropy_cuts, divergence_cuts = ["q0.1", "median", 0.5, "otsu"], ["mean", 0.0, "q0.9"]
    table = cut_sensitivity(tokens, entropy_cuts=entropy_cuts, divergence_cuts=divergence_cuts)
    assert table.height == 12
    for row in table.iter_rows(named=True):
        quadrants = assign_quadrants(tokens, entropy_cut=row["entropy_spec"], divergence_cut=row["divergence_spec"])
        shares = dict(quadrant_shares(quadrants).select("quadrant", "share").iter_rows())
        assert [row[name] for name in Quadrant] == pytest.approx([shares[name] for name in Quadrant])
        in_ranges = (
            PAPER_RANGES["Q4"][0] <= row["Q4"] <= PAPER_RANGES["Q4"][1],
            PAPER_RANGES["Q1+Q2"][0] <= row["Q1"] + row["Q2"] <= PAPER_RANGES["Q1+Q2"][1],
            PAPER_RANGES["Q3"][0] <= row["Q3"] <= PAPER_RANGES["Q3"][1],
        )
        if all(abs(share * 100 - round(share * 100)) > 1e-6 for share in (row["Q4"], row["Q1"] + row["Q2"], row["Q3"])):
            assert (row["q4_in_range"], row["q1_q2_in_range"], row["q3_in_range"]) == in_ranges
            assert row["in_paper_ranges"] == all(in_ranges)


@settings(deadline=None, max_examples=20)
@given(token_frames())
def test_a_higher_entropy_cut_never_makes_more_tokens_uncertain(tokens: pl.DataFrame) -> None:
    table = cut_sensitivity(tokens, entropy_cuts=["q0.1", "q0.5", "q0.9"], divergence_cuts=["median"])
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


def test_one_axis_named_paper_holds_for_both() -> None:
    rng = np.random.default_rng(0)
    tokens = frame(rng.random(200).tolist(), rng.random(200).tolist())
    both = resolve_cuts(tokens, entropy_cut="paper", divergence_cut="paper")
    assert resolve_cuts(tokens, entropy_cut="paper") == resolve_cuts(tokens, divergence_cut="paper") == both
    with pytest.raises(OptionError, match="chooses both cuts together"):
        resolve_cuts(tokens, entropy_cut="paper", divergence_cut="otsu")
    with pytest.raises(OptionError, match="one point of a grid"):
        cut_sensitivity(tokens, entropy_cuts=["paper"])


@pytest.mark.parametrize("cut", ["medain", "q1.2", "q", "-0.1", "nan", "inf", -1.0, "qx", ""])
def test_cuts_of_no_valid_form_are_refused(cut: str | float) -> None:
    with pytest.raises(OptionError, match="cut"):
        parse_cut(cut)


def test_other_errors_and_empty_tables() -> None:
    tokens = frame([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(OptionError, match="cut_scope must be one of batch, run"):
        resolve_cuts(tokens, cut_scope="rollout")
    with pytest.raises(SchemaError, match="reverse_kl"):
        assign_quadrants(tokens.drop("reverse_kl"))
    empty = tokens.clear()
    assert quadrant_shares(assign_quadrants(empty))["num_tokens"].to_list() == [0, 0, 0, 0]
    assert quadrant_shares(assign_quadrants(empty))["share"].null_count() == 4
    with pytest.raises(SchemaError, match="at least one token"):
        cut_sensitivity(empty)
    assert resolve_cuts(empty, entropy_cut="paper").paper_ranges_met is False
