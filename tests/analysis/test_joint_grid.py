"""The joint histogram gives the quadrants of any pair of its edges as a plain count does."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_analysis.analysis.joint_grid import cut_edges, measure_joint_grid
from tip_analysis.analysis.taxonomy import resolve_cuts

NATS = st.one_of(st.just(0.0), st.floats(0, 30, width=32), st.sampled_from([0.5, 0.3, 1e-6]))


def _tokens(entropy, divergence, mask=None) -> pl.LazyFrame:
    written = [True] * len(entropy) if mask is None else mask
    return pl.LazyFrame(
        {
            "batch_id": [0] * len(entropy),
            "loss_mask": written,
            "student_entropy": [h if w else None for h, w in zip(entropy, written, strict=True)],
            "reverse_kl": [d if w else None for d, w in zip(divergence, written, strict=True)],
        },
        schema={
            "batch_id": pl.Int32,
            "loss_mask": pl.Boolean,
            "student_entropy": pl.Float32,
            "reverse_kl": pl.Float32,
        },
    )


def _plain_counts(entropy, divergence, cuts) -> list[int]:
    counts = [0, 0, 0, 0]
    for h, d in zip(np.float32(entropy), np.float32(divergence), strict=True):
        low, agree = not float(h) > cuts[0], not (float(d) > cuts[1] or math.isinf(d))
        counts[2 * low + agree] += 1
    return counts


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(NATS, st.one_of(NATS, st.just(math.inf))), min_size=1, max_size=40),
    st.floats(0.01, 4),
    st.floats(0.01, 4),
    st.data(),
)
def test_every_pair_of_edges_counts_as_a_plain_loop_does(pairs, h_cut, d_cut, data):
    entropy, divergence = zip(*pairs, strict=True)
    tokens = _tokens(entropy, divergence)
    grid = measure_joint_grid(tokens, resolve_cuts(tokens, entropy_cut=h_cut, divergence_cut=d_cut))
    assert {h_cut, d_cut} <= {*grid.entropy_edges, *grid.divergence_edges}
    chosen = [
        (h_cut, d_cut),
        (
            float(data.draw(st.sampled_from(list(grid.entropy_edges)))),
            float(data.draw(st.sampled_from(list(grid.divergence_edges)))),
        ),
    ]
    for cuts in chosen:
        assert grid.quadrant_counts(*cuts).tolist() == _plain_counts(entropy, divergence, cuts)
    finite = np.float32(divergence)[np.isfinite(divergence)].astype(np.float64)
    assert grid.loss.sum() == pytest.approx(finite.sum())


def test_tokens_of_others_are_left_out():
    tokens = _tokens([0.1, 2.0, 3.0], [0.1, 2.0, 3.0], [True, True, False])
    grid = measure_joint_grid(tokens, resolve_cuts(tokens, entropy_cut=1.0, divergence_cut=1.0))
    assert grid.counts.sum() == 2
    assert grid.quadrant_counts(1.0, 1.0).tolist() == [1, 0, 0, 1]


def test_a_cut_off_the_grid_is_refused():
    tokens = _tokens([0.1, 2.0], [0.1, 2.0])
    grid = measure_joint_grid(tokens, resolve_cuts(tokens, entropy_cut=1.0, divergence_cut=1.0))
    with pytest.raises(ValueError, match=r"among the grid's edges, found 0\.123"):
        grid.quadrant_counts(0.123, 1.0)


@pytest.mark.parametrize("highest", [1e-7, 0.004, 1.0, 2.3, 12.0, 25.0])
def test_edges_hold_round_numbers_and_reach_the_top(highest):
    edges = cut_edges(highest, 0.12345)
    assert (np.diff(edges) > 0).all()
    assert edges[0] == 0.0
    assert edges[-1] >= highest
    assert 0.12345 in edges
    for cut in (0.05, 0.1, 0.3, 0.5, 1.0, 2.0):
        assert cut in edges or cut >= highest
    inside = edges[(edges > 1e-5) & (edges <= highest)]
    assert (np.diff(np.log10(inside)) < 0.065).all()
