"""Q3 that is not confident: warned about and given a better cut, against plain numpy."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_analysis.analysis.confidence import CANDIDATE_CUTS, FEW, warn_about_confidence
from tip_analysis.analysis.cuts import shares_by_construction
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.errors import SchemaError


def _tokens(entropy, divergence, top1) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "batch_id": np.zeros(len(entropy), dtype=np.int32),
            "loss_mask": np.ones(len(entropy), dtype=bool),
            "student_entropy": np.asarray(entropy, dtype=float),
            "reverse_kl": np.asarray(divergence, dtype=float),
            "student_top1_prob": np.asarray(top1, dtype=float),
        }
    )


def _warn(tokens, **cuts):
    return warn_about_confidence(tokens, Taxonomy(**cuts).measure(tokens))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["median", "mean", "q0.7", 0.6]))
def test_warning_equals_a_plain_count(seed, cut):
    rng = np.random.default_rng(seed)
    entropy, divergence = rng.exponential(0.8, 300), rng.exponential(1.0, 300)
    top1 = np.clip(np.exp(-entropy * rng.uniform(0.3, 1.2)), 0.01, 1.0)
    tokens = _tokens(entropy, divergence, top1)
    threshold = {
        "median": np.median(entropy),
        "mean": entropy.mean(),
        "q0.7": np.quantile(entropy, 0.7),
    }
    at = threshold.get(cut, 0.6)
    q3 = (entropy <= at) & (divergence > divergence.mean())
    found = _warn(tokens, entropy_cut=cut)
    if q3.sum() < FEW or np.median(top1[q3]) >= 0.8:
        assert found is None
        return
    assert (found.num_tokens, found.share_below_half) == (q3.sum(), (top1[q3] < 0.5).mean())
    assert found.median_top1 == pytest.approx(np.median(top1[q3]))
    fitting = []
    for candidate in CANDIDATE_CUTS:
        inside = q3 & (entropy <= candidate)
        if candidate < at and inside.sum() >= FEW and np.median(top1[inside]) >= 0.8:
            fitting.append(candidate)
    assert found.better_cut == max(fitting, default=None)
    if found.better_cut is not None:
        assert f"--entropy-cut {found.better_cut:g}" in found.message
        assert _warn(tokens, entropy_cut=found.better_cut, divergence_cut=divergence.mean()) is None


def test_a_confident_or_tiny_q3_is_not_warned_about():
    tokens = _tokens([0.1] * 60 + [2.0] * 60, [2.0, 0.0] * 60, [0.98] * 60 + [0.3] * 60)
    assert _warn(tokens) is None
    few = _tokens([0.5] * 10 + [2.0] * 10, [2.0] * 10 + [0.0] * 10, [0.4] * 20)
    assert _warn(few) is None
    with pytest.raises(SchemaError, match="student_top1_prob"):
        warn_about_confidence(tokens.drop("student_top1_prob"), Taxonomy().measure(tokens))


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        ({}, ["Q1+Q2"]),
        ({"entropy_cut": "q0.8"}, ["Q1+Q2"]),
        ({"entropy_cut": 0.5, "divergence_cut": "median"}, []),
        ({"entropy_cut": "otsu"}, []),
        ({"entropy_cut": "paper"}, ["Q1+Q2", "Q3", "Q4"]),
    ],
)
def test_what_cuts_fix_by_construction(options, fixed):
    rng = np.random.default_rng(0)
    tokens = _tokens(rng.exponential(1, 200), rng.exponential(1, 200), np.full(200, 0.9))
    assert shares_by_construction(Taxonomy(**options).measure(tokens)) == fixed
