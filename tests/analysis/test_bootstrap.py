"""The prompt bootstrap: weights equal copied rows, standard errors equal known ones, intervals
cover."""

import math

import numpy as np
import polars as pl
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import token_frames

from tip_analysis.analysis.bootstrap import (
    SortedColumn,
    bootstrap_interval,
    default_resamples,
    expanded_interval,
    interval_frame,
    prompt_weights,
)
from tip_analysis.analysis.cut_measuring import measure_cut
from tip_analysis.analysis.cuts import parse_cut
from tip_analysis.analysis.quadrant_rule import QUADRANTS
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.resampling import ResampledScores, Resampler, written_tokens
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.errors import OptionError, SchemaError

VALUES = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.inf]), st.floats(0, 2, width=32)),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=100)
@given(VALUES, st.sampled_from(["median", "mean", "otsu", "q0.9", "q0.98", "0.25"]))
def test_weighted_cuts_equal_cuts_of_copied_rows(rows: list[tuple[float, int]], cut: str) -> None:
    values, weights = np.array([row[0] for row in rows]), np.array([float(row[1]) for row in rows])
    copied = np.repeat(values, weights.astype(int))
    assume(np.isfinite(copied).any())
    column = SortedColumn(values)
    assert column.cut(weights, parse_cut(cut)) == pytest.approx(
        measure_cut(copied, parse_cut(cut)), rel=1e-9, abs=1e-12
    )
    finite = copied[np.isfinite(copied)]
    assert column.extremes(weights) == (finite.min(), finite.max())
    assert column.quantile(weights, 0.7) == pytest.approx(
        reference.quantile_linear(finite.tolist(), 0.7), rel=1e-9, abs=1e-12
    )


def test_weighted_cuts_of_nothing_are_unknown() -> None:
    column, nothing = SortedColumn(np.array([1.0, math.inf])), np.array([0.0, 5.0])
    assert [
        math.isnan(column.cut(nothing, parse_cut(cut))) for cut in ("median", "mean", "otsu")
    ] == [True] * 3
    assert math.isnan(column.extremes(nothing)[0])
    assert column.cut(nothing, parse_cut(0.5)) == 0.5


@settings(deadline=None, max_examples=50)
@given(
    token_frames(),
    st.sampled_from([("median", "mean"), ("q0.8", "otsu"), ("paper", "paper"), (0.5, "median")]),
    st.sampled_from(["run", "batch"]),
    st.lists(st.integers(0, 2), min_size=3, max_size=3),
)
def test_quadrants_of_a_resample_equal_those_of_copied_rows(
    tokens: pl.DataFrame, cuts, scope: str, times: list[int]
) -> None:
    frame = written_tokens(tokens, [], "test")
    resampler = Resampler(frame, taxonomy=Taxonomy(*cuts, scope), num_resamples=2)
    weights = np.asarray(times, dtype=np.float64)[resampler.prompts]
    assume(weights.sum() > 0)
    codes = resampler.codes(weights)
    copied = frame[np.repeat(np.arange(frame.height), weights.astype(int))].with_columns(
        loss_mask=True
    )
    expected = assign_quadrants(
        copied, entropy_cut=cuts[0], divergence_cut=cuts[1], cut_scope=scope
    ).collect()["quadrant"]
    found = [QUADRANTS[code] for code in np.repeat(codes, weights.astype(int))]
    agree = [a == b for a, b in zip(found, expected.to_list(), strict=True)]
    if "mean" in cuts:  # a value may sit on its mean's last bit
        divergence = copied["reverse_kl"].cast(pl.Float64).to_numpy()
        finite = divergence[np.isfinite(divergence)]
        near = (
            np.isclose(divergence, finite.mean() if finite.size else 0.0, rtol=1e-12)
            if scope == "run"
            else None
        )
        assume(scope == "run" or all(agree))
        agree = (
            [ok or bool(near[index]) for index, ok in enumerate(agree)]
            if near is not None
            else agree
        )
    assert all(agree)


@settings(deadline=None, max_examples=40)
@given(
    token_frames(),
    st.sampled_from(
        [("median", "mean"), ("q0.8", "q0.3"), ("mean", 0.5), ("otsu", "mean"), ("paper", "paper")]
    ),
    st.sampled_from(["run", "batch"]),
)
def test_sums_by_quadrant_equal_those_of_every_resample(
    tokens: pl.DataFrame, cuts, scope: str
) -> None:
    frame = written_tokens(tokens, ["jsd"], "test")
    resampler = Resampler(frame, taxonomy=Taxonomy(*cuts, scope), num_resamples=8)
    values = np.column_stack([np.ones(frame.height), frame["jsd"].cast(pl.Float64).to_numpy()])
    fast = resampler.measure_sums(values, np.ravel)
    slow = resampler.measure(
        lambda weights, codes: np.stack(
            [(values * weights[:, None])[codes == code].sum(0) for code in range(4)]
        ).ravel()
    )
    if "mean" not in cuts:  # a value may sit on its mean's last bit
        for a, b in (
            (fast.value, slow.value),
            (fast.low, slow.low),
            (fast.high, slow.high),
            (fast.se, slow.se),
        ):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-9, nan_ok=True)
    assert fast.value == pytest.approx(slow.value, rel=1e-9, abs=1e-9)


def test_sums_by_quadrant_on_many_tokens() -> None:
    rng = np.random.default_rng(0)
    size = 5000
    frame = pl.DataFrame(
        {
            "prompt_id": [f"p{i % 37}" for i in range(size)],
            "batch_id": [0] * size,
            "student_entropy": rng.gamma(0.4, size=size),
            "reverse_kl": np.where(rng.random(size) < 0.01, math.inf, rng.gamma(0.4, size=size)),
        }
    )
    values = np.column_stack([np.ones(size), rng.normal(size=size)])
    resampler = Resampler(frame, num_resamples=60)
    fast = resampler.measure_sums(values, np.ravel)
    slow = resampler.measure(
        lambda weights, codes: np.stack(
            [(values * weights[:, None])[codes == code].sum(0) for code in range(4)]
        ).ravel()
    )
    for a, b in (
        (fast.value, slow.value),
        (fast.low, slow.low),
        (fast.high, slow.high),
        (fast.se, slow.se),
    ):
        assert a == pytest.approx(b, rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(token_frames(), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_scores_of_a_resample_equal_those_of_copied_rows(
    tokens: pl.DataFrame, times: list[int]
) -> None:
    frame = written_tokens(tokens, ["student_entropy_norm", "forward_kl"], "test")
    weights = np.asarray(times, dtype=np.float64)[np.asarray(frame["prompt_id"].rank("dense")) - 1]
    assume(weights.sum() > 0)
    soft_or, q3 = ResampledScores(frame).soft_or_and_q3(weights)
    copies = np.repeat(np.arange(frame.height), weights.astype(int))
    expected = add_scores(frame[copies].with_columns(loss_mask=True)).collect()
    assert soft_or[copies] == pytest.approx(expected["soft_or"].to_numpy(), rel=1e-9, abs=1e-12)
    finite = np.isfinite(q3[copies]) & np.isfinite(expected["q3_score"].to_numpy())
    assert q3[copies][finite] == pytest.approx(
        expected["q3_score"].to_numpy()[finite], rel=1e-9, abs=1e-12
    )


def test_each_resample_draws_as_many_prompts_as_there_are() -> None:
    weights = prompt_weights(7, 200, seed=3)
    assert weights.shape == (200, 7)
    assert (weights.sum(1) == 7).all()
    assert (prompt_weights(7, 200, seed=3) == weights).all()
    assert weights.mean() == pytest.approx(1.0)
    assert weights.var() == pytest.approx(6 / 7, rel=0.15)  # binomial(7, 1/7)


@pytest.mark.parametrize("num_prompts", [12, 60])
def test_the_standard_error_equals_the_analytic_one_for_an_iid_mean(num_prompts: int) -> None:
    values = np.random.default_rng(0).normal(size=(num_prompts, 1))
    interval = bootstrap_interval(values, np.ones((num_prompts, 1)), num_resamples=20_000)
    assert interval.se[0] == pytest.approx(values.std(ddof=1) / math.sqrt(num_prompts), rel=0.03)
    half = (interval.high[0] - interval.low[0]) / 2
    t_half = stats.t.ppf(0.975, num_prompts - 1) * values.std(ddof=1) / math.sqrt(num_prompts)
    assert half == pytest.approx(t_half, rel=0.1)


def _coverage(num_prompts: int, per_prompt: int, by_prompt: bool, simulations: int = 400) -> float:
    """How often the interval of a mean holds the true 0 when rollouts share their prompt's
    effect."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(simulations):
        rewards = rng.normal(size=(num_prompts, 1)) + rng.normal(size=(num_prompts, per_prompt))
        sums = rewards.sum(1, keepdims=True) if by_prompt else rewards.reshape(-1, 1)
        counts = np.full(sums.shape, per_prompt if by_prompt else 1.0)
        interval = bootstrap_interval(
            sums, counts, num_resamples=400, seed=int(rng.integers(2**31))
        )
        covered += bool(interval.low[0] <= 0.0 <= interval.high[0])
    return covered / simulations


def test_resampling_prompts_covers_where_resampling_rollouts_does_not() -> None:
    assert 0.92 <= _coverage(30, 4, by_prompt=True) <= 0.98
    assert 0.90 <= _coverage(8, 4, by_prompt=True) <= 0.985
    assert _coverage(30, 4, by_prompt=False) < 0.85


def test_the_cut_is_measured_again_in_each_resample() -> None:
    """The share of values above their mean: holding the cut would overstate its standard error by
    43 %."""
    rng = np.random.default_rng(5)
    size = 2000
    samples = rng.gamma(0.5, size=(600, size))
    spread = (samples > samples.mean(1, keepdims=True)).mean(1).std()
    frame = pl.DataFrame(
        {
            "prompt_id": [f"p{i:04d}" for i in range(size)],
            "batch_id": [0] * size,
            "student_entropy": [0.0] * size,
            "reverse_kl": rng.gamma(0.5, size=size),
        }
    )
    interval = Resampler(frame, num_resamples=400).measure(
        lambda weights, codes: np.array([weights[codes == 2].sum() / weights.sum()])
    )
    assert interval.se[0] == pytest.approx(spread, rel=0.15)
    assert interval.se[0] < 0.85 * math.sqrt(interval.value[0] * (1 - interval.value[0]) / size)


def test_one_prompt_gives_no_interval_and_unmeasured_resamples_are_left_out() -> None:
    one = expanded_interval(np.array([0.5]), np.empty((0, 1)), 1)
    assert math.isnan(one.low[0])
    replicates = np.array([[1.0, math.nan], [2.0, math.nan], [3.0, 1.0]])
    interval = expanded_interval(np.array([2.0, 1.0]), replicates, 3)
    assert interval.low[0] >= 1.0
    assert math.isnan(interval.low[1])
    table = interval_frame(interval, ("a", "b"))
    assert table.columns == ["a", "a_low", "a_high", "a_se", "b", "b_low", "b_high", "b_se"]
    assert table["b_low"][0] is None
    assert interval_frame(one).columns == ["value", "low", "high", "se"]


def test_errors_and_defaults() -> None:
    frame = pl.DataFrame(
        {"prompt_id": ["a"], "batch_id": [0], "student_entropy": [0.0], "reverse_kl": [0.0]}
    )
    with pytest.raises(OptionError, match="num_resamples must be at least 2"):
        Resampler(frame, num_resamples=1)
    with pytest.raises(SchemaError, match="at least one token"):
        Resampler(frame.clear())
    with pytest.raises(SchemaError, match="loss_mask"):
        written_tokens(frame, [], "test")
    assert (default_resamples(10), default_resamples(500_000), default_resamples(10**9)) == (
        1000,
        400,
        100,
    )
