"""One rule, four engines: all must put every token into the same quadrant."""

import math

import numpy as np
import polars as pl
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_analysis.analysis.quadrant_rule import (
    QUADRANTS,
    float32_threshold,
    is_high_expression,
    quadrant_codes,
    quadrant_codes_float32,
    quadrant_expression,
    shares_by_cut,
)

_STEPS = st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0])
_ENTROPIES = st.one_of(_STEPS, st.floats(0, 9, width=32))
_DIVERGENCES = st.one_of(_ENTROPIES, st.just(math.inf))
_TOKENS = st.lists(st.tuples(_ENTROPIES, _DIVERGENCES), min_size=1, max_size=30)
_CUTS = st.one_of(_STEPS, st.floats(0, 9), st.floats(0, 9, width=32))


def by_polars(entropy: np.ndarray, divergence: np.ndarray, cuts: tuple[float, float]) -> list[str]:
    frame = pl.DataFrame({"h": entropy, "d": divergence})
    high = (
        is_high_expression(pl.col(name), pl.lit(cut)) for name, cut in zip("hd", cuts, strict=True)
    )
    return frame.select(quadrant_expression(*high).alias("quadrant"))["quadrant"].to_list()


@settings(deadline=None, max_examples=200)
@given(_TOKENS, _CUTS, _CUTS)
def test_every_engine_gives_the_same_quadrants(tokens, entropy_cut, divergence_cut) -> None:
    entropy, divergence = np.array(tokens, dtype=np.float32).T
    cuts = entropy_cut, divergence_cut
    wide = entropy.astype(np.float64), divergence.astype(np.float64)
    expected = [reference.quadrant(h, d, *cuts) for h, d in zip(*wide, strict=True)]
    narrow_cuts = float32_threshold(entropy_cut), float32_threshold(divergence_cut)
    codes = quadrant_codes(*wide, cuts)
    assert [QUADRANTS[code] for code in codes] == expected
    assert (quadrant_codes_float32(entropy, divergence, narrow_cuts) == codes).all()
    assert by_polars(entropy, divergence, cuts) == expected
    shares = shares_by_cut(*wide, [entropy_cut], [divergence_cut])[:, 0, 0]
    assert (shares * len(tokens)).round().tolist() == np.bincount(codes, minlength=4).tolist()


@settings(deadline=None, max_examples=50)
@given(_TOKENS, st.lists(_CUTS, min_size=1, max_size=5), st.lists(_CUTS, min_size=1, max_size=5))
def test_a_histogram_over_many_cuts_equals_one_pair_at_a_time(tokens, rows, columns) -> None:
    entropy, divergence = np.array(tokens, dtype=np.float64).T
    together = shares_by_cut(entropy, divergence, rows, columns)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            alone = shares_by_cut(entropy, divergence, [row], [column])[:, 0, 0]
            assert together[:, i, j].tolist() == alone.tolist()


def test_where_nothing_was_measured_only_infinity_is_high() -> None:
    entropy, divergence = np.array([0.5, 2.0, 0.5]), np.array([1.0, math.inf, math.inf])
    expected = ["Q4", "Q3", "Q3"]
    codes = quadrant_codes(entropy, divergence, (math.nan, math.nan))
    assert [QUADRANTS[code] for code in codes] == expected
    frame = pl.DataFrame({"h": entropy, "d": divergence})
    high = [is_high_expression(pl.col(name), pl.lit(None, pl.Float64)) for name in "hd"]
    assert frame.select(quadrant_expression(*high)).to_series().to_list() == expected
    cuts = float32_threshold(np.finfo(np.float32).max.item()), float32_threshold(math.inf)
    narrow = entropy.astype(np.float32), divergence.astype(np.float32)
    assert (quadrant_codes_float32(*narrow, cuts) == codes).all()


def test_a_float32_equal_to_its_cut_is_low() -> None:
    value = np.float32(0.1)  # 0.100000001490116, above the float64 0.1
    assert quadrant_codes(np.array([value], np.float64), np.zeros(1), (0.1, 0.0)).tolist() == [1]
    assert quadrant_codes_float32(
        np.array([value]), np.zeros(1, np.float32), (float32_threshold(0.1), float32_threshold(0.0))
    ).tolist() == [1]
    same = float32_threshold(float(value))
    assert quadrant_codes_float32(
        np.array([value]), np.zeros(1, np.float32), (same, float32_threshold(0.0))
    ).tolist() == [3]
