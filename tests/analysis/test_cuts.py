"""What a cut may be, and what it measures: medians, quantiles, Otsu's split, the joint preset."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import frame, token_frames

from tip_analysis.analysis.cut_measuring import measure_cut, otsu_cut
from tip_analysis.analysis.cuts import Cut, parse_cut
from tip_analysis.analysis.paper_preset import PAPER_TARGET, paper_cuts, paper_range_distance
from tip_analysis.analysis.taxonomy import resolve_cuts
from tip_analysis.core.errors import OptionError


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0, 9, width=32), min_size=1, max_size=30),
    st.sampled_from(["median", "q0.8", "q0", "q1", "q0.37"]),
)
def test_quantiles_interpolate_between_finite_values(values: list[float], cut: str) -> None:
    found = measure_cut(np.array([*values, np.inf]), parse_cut(cut))
    assert found == pytest.approx(
        reference.quantile_linear(values, 0.5 if cut == "median" else float(cut[1:])), abs=1e-12
    )


def test_a_cut_is_recorded_and_cannot_be_changed() -> None:
    cuts = resolve_cuts(
        frame([0.0, 1.0, 2.0], [0.0, 1.0, 5.0]), entropy_cut="q0.5", divergence_cut=0.25
    )
    assert cuts.entropy == Cut("entropy", "q0.5", "run", 1.0)
    assert cuts.divergence == Cut("divergence", "0.25", "run", 0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cuts.entropy.value = 2.0  # type: ignore[misc]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 4, width=32)),
        min_size=1,
        max_size=25,
    )
)
def test_otsu_equals_trying_every_split(values: list[float]) -> None:
    found = otsu_cut(np.asarray(values))
    wanted = reference.otsu(values)

    def variance(cut: float) -> float:
        low, high = [v for v in values if v <= cut], [v for v in values if v > cut]
        return (
            len(low) * len(high) * (sum(low) / len(low) - sum(high) / len(high)) ** 2
            if low and high
            else 0.0
        )

    assert found in values
    assert variance(found) == pytest.approx(variance(wanted), rel=1e-9, abs=1e-30)


def test_otsu_splits_two_heaps() -> None:
    assert otsu_cut(np.array([0.0, 0.1, 0.2, 5.0, 5.1])) == 0.2
    assert otsu_cut(np.array([3.0, 3.0])) == 3.0


@settings(deadline=None, max_examples=25)
@given(st.integers(60, 400), st.integers(0, 10_000), st.floats(0.2, 3.0))
def test_the_paper_preset_lands_in_the_ranges_where_values_are_many(
    size: int, seed: int, shape: float
) -> None:
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
def test_the_paper_preset_finds_the_ranges_whenever_any_pair_of_values_does(
    tokens: pl.DataFrame,
) -> None:
    kept = tokens.filter("loss_mask")
    entropy, divergence = (
        kept[name].cast(pl.Float64).to_numpy() for name in ("student_entropy", "reverse_kl")
    )
    distances = [
        paper_range_distance(
            float((entropy > a).mean()), float(((entropy <= a) & (divergence > b)).mean())
        )
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


def test_one_axis_named_paper_holds_for_both() -> None:
    rng = np.random.default_rng(0)
    tokens = frame(rng.random(200).tolist(), rng.random(200).tolist())
    both = resolve_cuts(tokens, entropy_cut="paper", divergence_cut="paper")
    assert (
        resolve_cuts(tokens, entropy_cut="paper")
        == resolve_cuts(tokens, divergence_cut="paper")
        == both
    )
    with pytest.raises(OptionError, match="chooses both cuts together"):
        resolve_cuts(tokens, entropy_cut="paper", divergence_cut="otsu")


@pytest.mark.parametrize("cut", ["medain", "q1.2", "q", "-0.1", "nan", "inf", -1.0, "qx", ""])
def test_cuts_of_no_valid_form_are_refused(cut: str | float) -> None:
    with pytest.raises(OptionError, match="cut"):
        parse_cut(cut)
