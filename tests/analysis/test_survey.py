"""Tables larger than memory: grids, exact quantiles in two passes, and a survey that equals the one
in memory."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import token_frames

from tip_analysis.analysis import grids as module
from tip_analysis.analysis.grids import ColumnGrid, bins_of, exact_quantiles, measure_grids
from tip_analysis.analysis.quadrants import assign_quadrants, quadrant_shares
from tip_analysis.analysis.score_functions import SCORE_COLUMNS
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.survey import survey_tokens
from tip_analysis.analysis.taxonomy import resolve_cuts
from tip_analysis.core.errors import SchemaError

FLOATS = st.lists(
    st.one_of(
        st.sampled_from([-0.0, 0.0, 1.0, -1.0, math.inf]), st.floats(-(2.0**60), 2.0**60, width=32)
    ),
    min_size=1,
    max_size=60,
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any table large, and read it in small pieces."""
    monkeypatch.setattr(module, "LARGE_TABLE_ROWS", 0)
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)


@settings(deadline=None, max_examples=100)
@given(FLOATS)
def test_bins_keep_the_order_and_count_everything(values: list[float]) -> None:
    array = np.asarray(values, dtype=np.float32)
    bins = bins_of(array)
    order = np.argsort(array, kind="stable")
    assert (np.diff(bins[order].astype(np.int64)) >= 0).all()
    zeros = bins[array == 0]
    assert (zeros == zeros[:1]).all()
    grid = ColumnGrid()
    for part in np.array_split(array, 3):
        if part.size:
            grid.add(part)
    finite = array[np.isfinite(array)].astype(np.float64)
    assert grid.num_values == array.size
    assert grid.num_finite == finite.size
    if finite.size:
        assert (grid.low, grid.high) == (finite.min(), finite.max())
        assert grid.mean == pytest.approx(
            finite.mean(), rel=1e-12, abs=1e-12 * np.abs(finite).max()
        )


def test_bins_are_half_a_thousandth_wide() -> None:
    values = np.asarray([1.0, 1.0 + 2.0**-12, 1.0 + 2.0**-11], dtype=np.float32)
    bins = bins_of(values)
    assert bins[0] == bins[1] != bins[2]


@settings(deadline=None, max_examples=60)
@given(token_frames(), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_quantiles_in_two_passes_are_exact(tokens: pl.DataFrame, quantiles: list[float]) -> None:
    columns = ["student_entropy", "reverse_kl"]
    grids = measure_grids(tokens.lazy(), columns)
    found = exact_quantiles(tokens.lazy(), grids, {name: [0.5, *quantiles] for name in columns})
    for name in columns:
        finite = [
            value for value in tokens.filter("loss_mask")[name].to_list() if math.isfinite(value)
        ]
        for quantile, value in zip([0.5, *quantiles], found[name], strict=True):
            assert (value is None) == (not finite)
            assert value is None or value == pytest.approx(
                reference.quantile_linear(finite, quantile), rel=1e-12, abs=1e-15
            )


def test_ranks_on_the_grid_are_off_by_no_more_than_stated() -> None:
    rng = np.random.default_rng(0)
    values = rng.gamma(0.4, size=20_000).astype(np.float32)
    values[:6000] = 0.0
    grid = ColumnGrid()
    grid.add(values)
    found = grid.standard_ranks()[bins_of(values)].astype(np.float64) * values.size
    true = stats.rankdata(values) - (values.size + 1) / 2
    off = np.linalg.norm(found - true) / np.linalg.norm(true)
    zero = frozenset([int(bins_of(np.zeros(1, dtype=np.float32))[0])])
    assert int(next(iter(zero))) in grid.heavy_bins()
    assert off <= grid.rank_error(zero) * (1 + 1e-6) + 1e-6
    assert grid.rank_error(zero) < 0.01 < grid.rank_error()


def _table(num_prompts: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    length, rollouts = 50, num_prompts * 2
    size = length * rollouts
    entropy = np.where(rng.random(size) < 0.3, 0.0, rng.gamma(0.4, size=size)).astype(np.float32)
    divergence = (rng.gamma(0.4, size=size) * (0.2 + entropy)).astype(np.float32)
    divergence[rng.random(size) < 0.01] = math.inf
    names = [f"p{i // 2:03d}/{i % 2}" for i in np.repeat(np.arange(rollouts), length)]
    return pl.DataFrame(
        {
            "rollout_id": names,
            "prompt_id": [name.split("/")[0] for name in names],
            "position": pl.Series(np.tile(np.arange(length), rollouts), dtype=pl.Int32),
            "batch_id": pl.Series(np.zeros(size), dtype=pl.Int32),
            "loss_mask": rng.random(size) < 0.95,
            "student_entropy": entropy,
            "student_entropy_norm": entropy / np.float32(12),
            "reverse_kl": divergence,
            "forward_kl": (divergence * rng.lognormal(0, 0.5, size=size)).astype(np.float32),
        }
    )


@pytest.mark.parametrize(
    ("entropy_cut", "divergence_cut"),
    [("median", "mean"), ("q0.8", "0.1"), ("mean", "median"), ("otsu", "otsu")],
)
def test_a_streamed_survey_equals_the_exact_one(
    small_chunks: None, tmp_path: Path, entropy_cut, divergence_cut
) -> None:
    tokens = _table(30, 0)
    for index in range(3):
        tokens[index * 1000 : (index + 1) * 1000].write_parquet(tmp_path / f"{index}.parquet")
    options = {"entropy_cut": entropy_cut, "divergence_cut": divergence_cut}
    exact = survey_tokens(tokens, exact=True, **options)
    streamed = survey_tokens(pl.scan_parquet(tmp_path / "*.parquet"), exact=False, **options)
    assert (exact.method, streamed.method) == ("exact", "grid")
    assert streamed.cuts.entropy.value == pytest.approx(exact.cuts.entropy.value, rel=1e-12)
    assert streamed.cuts.divergence.value == pytest.approx(exact.cuts.divergence.value, rel=1e-9)
    assert streamed.cuts.num_infinite == exact.cuts.num_infinite > 0
    assert streamed.shares.equals(exact.shares)
    for a, b in zip(
        exact.correlations.iter_rows(named=True),
        streamed.correlations.iter_rows(named=True),
        strict=True,
    ):
        assert abs(a["spearman"] - b["spearman"]) <= b["spearman_error"] + 1e-6
        assert 0 < b["spearman_error"] < 0.02
        assert a["spearman_error"] == 0.0


def test_a_survey_equals_the_other_tables() -> None:
    tokens = _table(10, 1)
    survey = survey_tokens(tokens)
    assert survey.method == "exact"
    shares = quadrant_shares(assign_quadrants(tokens, cuts=survey.cuts))
    assert survey.shares.select("quadrant", "num_tokens", "num_rollouts", "num_prompts").equals(
        shares.drop("share")
    )
    assert survey.shares["share"].to_list() == pytest.approx(shares["share"].to_list())
    kept = tokens.filter("loss_mask")
    row = survey.correlations.filter(column_a="student_entropy", column_b="forward_kl").row(
        0, named=True
    )
    assert row["spearman"] == pytest.approx(
        stats.spearmanr(kept["student_entropy"], kept["forward_kl"]).statistic
    )


def test_a_cut_between_two_float32_values_is_not_rounded_onto_one() -> None:
    """In float32 the cut 0.1 would become 0.10000000149, and the token that has this value would
    not be above it."""
    tokens = (
        _table(2, 2)
        .head(4)
        .with_columns(
            loss_mask=True,
            student_entropy=pl.Series([0.1, 0.0, 0.0, 0.0], dtype=pl.Float32),
            reverse_kl=pl.Series([0.1, 0.1, 0.0, math.inf], dtype=pl.Float32),
        )
    )
    for exact in (True, False):
        shares = survey_tokens(tokens, entropy_cut=0.1, divergence_cut=0.1, exact=exact).shares
        assert shares["num_tokens"].to_list() == [1, 0, 2, 1]


def test_a_token_on_the_cut_is_not_above_it() -> None:
    tokens = (
        _table(2, 2)
        .head(4)
        .with_columns(
            loss_mask=True,
            student_entropy=pl.Series([0.5, 0.75, 0.5, 0.25], dtype=pl.Float32),
            reverse_kl=pl.Series([0.5, 0.5, 0.75, 0.25], dtype=pl.Float32),
        )
    )
    for exact in (True, False):
        shares = survey_tokens(tokens, entropy_cut=0.5, divergence_cut=0.5, exact=exact).shares
        assert shares["num_tokens"].to_list() == [0, 1, 1, 2]
        medians = survey_tokens(tokens, divergence_cut="median", exact=exact).shares
        assert medians["num_tokens"].to_list() == [0, 1, 1, 2]


def test_large_tables_are_measured_in_passes_with_the_same_result(small_chunks: None) -> None:
    tokens = _table(6, 3)
    cuts, scored = (
        resolve_cuts(tokens, entropy_cut="q0.7"),
        add_scores(tokens, divergence_clip=0.9).collect(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGE_TABLE_ROWS", 10**9)
        plain, expected = (
            resolve_cuts(tokens, entropy_cut="q0.7"),
            add_scores(tokens, divergence_clip=0.9).collect(),
        )
    assert cuts.entropy.value == pytest.approx(plain.entropy.value, rel=1e-12)
    assert cuts.divergence.value == pytest.approx(plain.divergence.value, rel=1e-9)
    assert cuts.num_infinite == plain.num_infinite
    for name in SCORE_COLUMNS:
        found, wanted = scored[name].drop_nulls().to_numpy(), expected[name].drop_nulls().to_numpy()
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_errors() -> None:
    tokens = _table(2, 4)
    with pytest.raises(SchemaError, match="at least one token"):
        survey_tokens(tokens.with_columns(loss_mask=False))
    with pytest.raises(SchemaError, match="at least one token"):
        survey_tokens(tokens.with_columns(loss_mask=False), exact=False)
    with pytest.raises(SchemaError, match="jsd"):
        survey_tokens(tokens, columns=["jsd"])
    grids = measure_grids(tokens.lazy(), ["student_entropy"])
    with pytest.raises(SchemaError, match="changed while it was read"):
        exact_quantiles(
            tokens.filter(pl.col("student_entropy") == 0.0).lazy(),
            grids,
            {"student_entropy": [0.9]},
        )
