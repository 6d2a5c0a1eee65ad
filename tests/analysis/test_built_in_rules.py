"""Rules of other sources and controls: windows, quadrants, propose and verify, scaled teachability;
each against an oracle, with what it keeps of the invariants of a mask."""

import math

import numpy as np
import polars as pl
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import token_frames

from tip_analysis.analysis.counter_random import random_uniforms
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.rules import RULES
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import select_tokens, to_masks
from tip_analysis.analysis.windows import _taken_in
from tip_analysis.core.errors import SchemaError

RATIOS = ["0.1", "0.3", "0.5", "1"]
SCOPES = {"rollout": "rollout_id", "batch": "batch_id", "run": None}
PARTIAL = [name for name, rule in RULES.items() if rule.partial]
NEW = [*PARTIAL, "random_window", "ta_opd", "ier", "last"]


def full_table(tokens: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The table with all that the rules read, quadrants included."""
    rng = np.random.default_rng(seed)
    written = tokens["loss_mask"]
    lists = [rng.choice(8, 3, replace=False).tolist() for _ in range(tokens.height)]
    table = tokens.with_columns(
        pl.Series("token_id", rng.integers(0, 8, tokens.height), dtype=pl.Int32),
        pl.Series("teacher_topk_ids", lists, dtype=pl.List(pl.Int32)),
        pl.Series("teacher_logprob", -rng.integers(0, 4, tokens.height) / 2.0, dtype=pl.Float32),
        pl.Series("ier", np.where(rng.random(tokens.height) < 0.3, np.nan, 0.5), dtype=pl.Float32),
    ).with_columns(pl.when(written).then(pl.col("teacher_topk_ids")))
    return assign_quadrants(add_scores(table)).collect()


def selected(table: pl.LazyFrame) -> set[tuple[str, int]]:
    return set(table.filter("selected").select("rollout_id", "position").collect().iter_rows())


def parts(table: pl.DataFrame, scope: str) -> list[pl.DataFrame]:
    written = table.filter("loss_mask")
    return [written] if SCOPES[scope] is None else written.partition_by(SCOPES[scope])


def oracle_rows(rule: str, group: pl.DataFrame) -> list[tuple[float, int, str]]:
    """(score, position, rollout_id) of the candidates."""
    kind, _, quadrant = rule.partition(":")
    rows = []
    for row in group.iter_rows(named=True):
        inside = {
            "quadrant": row["quadrant"] == quadrant,
            "not": row["quadrant"] != quadrant,
            "selectkd": row["token_id"] in row["teacher_topk_ids"],
        }[kind]
        score = row["teacher_logprob"] if kind == "selectkd" else row["reverse_kl"]
        if inside:
            rows.append((score, row["position"], row["rollout_id"]))
    return rows


@settings(deadline=None, max_examples=80)
@given(
    token_frames(),
    st.sampled_from(PARTIAL),
    st.sampled_from(RATIOS),
    st.sampled_from(list(SCOPES)),
    st.integers(0, 99),
)
def test_partial_rules_take_at_most_k_of_their_candidates(
    tokens: pl.DataFrame, rule: str, ratio: str, scope: str, seed: int
) -> None:
    table = full_table(tokens, seed)
    options = {"retention_ratio": float(ratio), "selection_scope": scope}
    expected: set[tuple[str, int]] = set()
    for group in parts(table, scope):
        rows = oracle_rows(rule, group)
        expected |= reference.top_k(rows, reference.num_kept(ratio, group.height))
    assert selected(select_tokens(table, rule=rule, **options)) == expected
    if ratio == "1":
        everything = [row for group in parts(table, scope) for row in oracle_rows(rule, group)]
        assert expected == {(row[2], row[1]) for row in everything}


@settings(deadline=None, max_examples=40)
@given(token_frames(), st.sampled_from(NEW), st.integers(0, 9), st.randoms(use_true_random=False))
def test_masks_are_nested_and_do_not_depend_on_row_order(
    tokens: pl.DataFrame, rule: str, seed: int, random
) -> None:
    table = full_table(tokens, seed)
    masks = [
        selected(select_tokens(table, rule=rule, retention_ratio=ratio, seed=seed))
        for ratio in (0.1, 0.35, 0.6, 1.0)
    ]
    assert masks[0] <= masks[1] <= masks[2] <= masks[3]
    order = list(range(table.height))
    random.shuffle(order)
    shuffled = select_tokens(table[order], rule=rule, retention_ratio=0.35, seed=seed)
    assert selected(shuffled) == masks[1]


@settings(deadline=None, max_examples=60)
@given(token_frames(), st.sampled_from(RATIOS), st.integers(0, 99))
def test_a_window_is_that_of_the_oracle(tokens: pl.DataFrame, ratio: str, seed: int) -> None:
    scored = add_scores(tokens).collect()
    found = select_tokens(scored, rule="random_window", retention_ratio=float(ratio), seed=seed)
    expected: set[tuple[str, int]] = set()
    for group in parts(scored, "rollout"):
        m, name = group.height, group["rollout_id"][0]
        u = random_uniforms(pl.Series([name]), pl.Series([2**32], dtype=pl.UInt64), seed)[0]
        places = group["position"].sort()
        expected |= {
            (name, places[i]) for i in reference.window(m, reference.num_kept(ratio, m), float(u))
        }
    assert selected(found) == expected


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 60), st.floats(2.0**-54, 1 - 2.0**-53))
def test_windows_of_every_size_grow_by_one_neighbour(m: int, u: float) -> None:
    order = _taken_in(m, u)
    assert sorted(order) == list(range(m))
    for k in range(1, m + 1):
        assert set(np.flatnonzero(order < k)) == set(reference.window(m, k, u))


def test_windows_begin_anywhere_with_the_same_chance() -> None:
    m, k = 10, 4
    tokens = pl.DataFrame(
        {
            "rollout_id": [f"r{i}" for i in range(7000) for _ in range(m)],
            "position": list(range(m)) * 7000,
            "loss_mask": [True] * m * 7000,
        }
    )
    chosen = select_tokens(tokens, rule="random_window", retention_ratio=k / m).filter("selected")
    starts = chosen.group_by("rollout_id").agg(pl.col("position").min()).collect()["position"]
    counts = starts.value_counts(sort=False).sort("position")["count"].to_numpy()
    assert len(counts) == m - k + 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_windows_keep_the_exact_number_in_wider_scopes() -> None:
    tokens = pl.DataFrame(
        {
            "rollout_id": ["a"] * 10 + ["b"] * 20,
            "batch_id": [0] * 30,
            "position": [*range(10), *range(20)],
            "loss_mask": [True] * 30,
        },
        schema_overrides={"position": pl.Int32},
    )
    chosen = select_tokens(
        tokens, rule="random_window", retention_ratio=0.5, selection_scope="batch"
    )
    kept = chosen.filter("selected").collect()
    assert kept.height == 15
    for _, group in kept.group_by("rollout_id"):
        places = group["position"].sort()
        assert (places.diff().drop_nulls() == 1).all()
    masks = to_masks(tokens, rules=["random_window"], retention_ratios=[0.5], seeds=[0, 1])
    assert masks["seed"].unique().to_list() == [0, 1]


@settings(deadline=None, max_examples=60)
@given(token_frames(), st.sampled_from(RATIOS), st.sampled_from(list(SCOPES)))
def test_scaled_teachability_equals_the_oracle(
    tokens: pl.DataFrame, ratio: str, scope: str
) -> None:
    scored = add_scores(tokens).collect()
    score = {}
    for batch in scored.filter("loss_mask").partition_by("batch_id"):
        scaled = [
            reference.between_percentiles(batch[name].to_list())
            for name in ("reverse_kl", "teacher_mass_on_student_topk")
        ]
        keys = batch.select("rollout_id", "position").rows()
        score |= {key: d * c for key, d, c in zip(keys, *scaled, strict=True)}
    found = selected(
        select_tokens(scored, rule="ta_opd", retention_ratio=float(ratio), selection_scope=scope)
    )
    for group in parts(scored, scope):
        keys = group.select("rollout_id", "position").rows()
        kept = [key for key in keys if key in found]
        assert len(kept) == reference.num_kept(ratio, len(keys))
        left = [score[key] for key in keys if key not in found]
        assert min(score[key] for key in kept) >= max(left, default=-1.0) - 1e-12


def test_scaled_teachability_by_eye() -> None:
    size = 41
    tokens = pl.DataFrame(
        {
            "rollout_id": ["a"] * size,
            "batch_id": [0] * size,
            "position": list(range(size)),
            "loss_mask": [True] * size,
            "reverse_kl": [float(i) for i in range(size)],
            "teacher_mass_on_student_topk": [1.0 - i / (size - 1) for i in range(size)],
        }
    )
    best = select_tokens(tokens, rule="ta_opd", retention_ratio=0.001).filter("selected")
    assert best.collect()["position"].to_list() == [20]  # the product of x and 1 − x


def test_an_unknown_information_ratio_comes_last() -> None:
    tokens = pl.DataFrame(
        {
            "rollout_id": ["a"] * 4,
            "position": [0, 1, 2, 3],
            "loss_mask": [True] * 4,
            "ier": [None, math.nan, 0.1, math.inf],
        }
    )
    chosen = select_tokens(tokens, rule="ier", retention_ratio=0.75)
    assert selected(chosen) == {("a", 3), ("a", 2), ("a", 0)}


def test_a_quadrant_rule_without_quadrants_says_what_adds_them() -> None:
    tokens = pl.DataFrame(
        {"rollout_id": ["a"], "position": [0], "loss_mask": [True], "reverse_kl": [1.0]}
    )
    with pytest.raises(SchemaError, match="assign_quadrants adds it"):
        select_tokens(tokens, rule="quadrant:Q3", retention_ratio=1.0)
