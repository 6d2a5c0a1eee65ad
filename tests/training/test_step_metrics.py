import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

import tip_analysis as tip
from tip_analysis.core.errors import LogitsError, OptionError
from tip_analysis.training.step_metrics import soft_or_overlap, step_metrics

QUADRANTS = ("q1", "q2", "q3", "q4")


def logits(shape=(3, 5), vocabulary=7, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, vocabulary, generator=generator, dtype=torch.float64)


def by_hand(student, teacher, written, carries):
    """The same numbers from the equations, token by token in float64."""
    rows = [
        (entropy(softmax(s)), entropy(softmax(s), softmax(t)), c)
        for s, t, w, c in zip(student, teacher, written, carries, strict=True)
        if w
    ]
    h, delta, chosen = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    high_h, high_d = h > np.median(h), delta > delta.mean()
    sides = {
        "q1": high_h & high_d,
        "q2": high_h & ~high_d,
        "q3": ~high_h & high_d,
        "q4": ~high_h & ~high_d,
    }
    found = {
        "selected_share": chosen.mean(),
        "student_entropy": h.mean(),
        "reverse_kl": delta.mean(),
    }
    for name, side in sides.items():
        found[f"share_{name}"] = side.mean()
        found[f"divergence_{name}"] = delta[side].mean() if side.any() else math.nan
        found[f"selected_share_{name}"] = chosen[side].mean() if side.any() else math.nan
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
def test_a_step_in_numbers_is_what_the_equations_say(seed, rollouts, length):
    student, teacher = (logits((rollouts, length), seed=seed + i) for i in (0, 1))
    random = np.random.default_rng(seed)
    ids = torch.from_numpy(random.integers(-1, 7, (rollouts, length)))
    ids[0, 0] = 3
    mask = torch.from_numpy(random.random((rollouts, length)) < 0.5) & (ids >= 0)
    found = tip.log_step(student, teacher, ids, mask)
    flat = [each.flatten(0, 1).numpy() for each in (student, teacher)]
    expected = by_hand(*flat, (ids >= 0).flatten().numpy(), mask.flatten().numpy())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    assert sum(found[f"share_{name}"] for name in QUADRANTS) == pytest.approx(1.0)


def test_padding_is_told_by_ids_or_by_a_mask_of_its_own_and_changes_nothing():
    student, teacher = logits(), logits(seed=1)
    ids = torch.arange(15).reshape(3, 5) % 7
    mask = ids % 2 == 0
    plain = tip.log_step(student[:, :3], teacher[:, :3], ids[:, :3], mask[:, :3])
    student[:, 3:], teacher[:, 3:] = math.nan, math.nan  # what pads hold is never looked at
    labels = ids.clone()
    labels[:, 3:] = -100
    written = torch.zeros(3, 5, dtype=torch.bool)
    written[:, :3] = True
    inside = mask & written
    assert tip.log_step(student, teacher, labels, inside) == plain
    assert tip.log_step(student, teacher, ids, inside.float(), written=written) == plain


def test_a_padded_head_is_cut_to_the_smaller():
    student, teacher = logits(), logits(seed=1)
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.ones(3, 5)
    wide = torch.cat([teacher, 9.0 * torch.ones(3, 5, 2, dtype=torch.float64)], dim=-1)
    assert tip.log_step(student, wide, ids, mask) == tip.log_step(student, teacher, ids, mask)


def test_cuts_may_be_given():
    student, teacher = logits(), logits(seed=1)
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.ones(3, 5)
    all_certain = tip.log_step(student, teacher, ids, mask, entropy_cut=9.0, divergence_cut=0.0)
    assert all_certain["share_q3"] == 1.0
    assert math.isnan(all_certain["divergence_q1"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask": torch.ones(3, 4)}, r"mask has the shape \[3, 4\] .* ids has \[3, 5\]"),
        ({"teacher": logits((3, 4))}, r"teacher_logits has the shape \[3, 4\]"),
        ({"ids": torch.eye(3, 5).long() - 1}, "lie within `written`"),
        ({"ids": torch.full((3, 5), -100), "mask": torch.zeros(3, 5)}, "no token of this step"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    given = {"student": logits(), "teacher": logits(), "ids": torch.zeros(3, 5).long()}
    given |= {"mask": torch.ones(3, 5)} | change
    with pytest.raises(OptionError, match=said):
        tip.log_step(given["student"], given["teacher"], given["ids"], given["mask"])


def test_logits_that_are_no_numbers_are_refused():
    student = logits()
    student[1, 2] = math.nan
    with pytest.raises(LogitsError, match="is NaN at 1 of 15 tokens"):
        tip.log_step(student, logits(), torch.zeros(3, 5).long(), torch.ones(3, 5))


def test_overlap_is_one_with_itself_and_counts_what_both_hold(small_step):
    scored, soft_or = small_step
    same = soft_or_overlap(scored, soft_or, retention_ratio=0.5, selection_scope="rollout")
    other = soft_or_overlap(scored, ~soft_or, retention_ratio=0.5, selection_scope="rollout")
    one = soft_or.copy()
    one[np.flatnonzero(one)[0]] = False
    less = soft_or_overlap(scored, one, retention_ratio=0.5, selection_scope="rollout")
    assert (same, other) == (1.0, 0.0)
    assert less == (soft_or.sum() - 1) / soft_or.sum()


@pytest.fixture
def small_step():
    random = np.random.default_rng(0)
    count = 12
    frame = pl.DataFrame(
        {
            "rollout_id": ["a"] * 6 + ["b"] * 6,
            "position": [*range(6), *range(6)],
            "batch_id": [0] * count,
            "loss_mask": [True] * count,
            "student_entropy": random.random(count),
            "student_entropy_norm": random.random(count),
            "reverse_kl": random.random(count),
            "forward_kl": random.random(count),
        }
    )
    scored = tip.add_scores(frame)
    chosen = tip.select_tokens(scored, rule="soft_or", retention_ratio=0.5)
    return scored, chosen.collect()["selected"].to_numpy()


def test_infinite_divergences_are_left_out_of_means(small_step):
    scored, soft_or = small_step
    spoilt = scored.with_columns(
        reverse_kl=pl.when(pl.int_range(pl.len()) == 3).then(math.inf).otherwise("reverse_kl")
    )
    found = step_metrics(spoilt, soft_or)
    kept = scored.collect()["reverse_kl"].to_numpy()[np.arange(12) != 3]
    assert found["reverse_kl"] == pytest.approx(kept.mean())
    assert all(not math.isinf(value) for value in found.values())
