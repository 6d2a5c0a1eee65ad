"""Tokens of two runs side by side: counted as a plain loop does, refused where they differ."""

import numpy as np
import polars as pl
import pytest
from synthetic import make_tables

from tip_analysis.analysis.moves import aligned_tokens, moved_share, quadrant_flow, strongest_moves
from tip_analysis.core import result_tables as contracts
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Quadrant
from tip_analysis.core.result_tables import checked

NAMES = [name.value for name in Quadrant]


@pytest.fixture(scope="module")
def runs() -> tuple[pl.DataFrame, pl.DataFrame]:
    """One run twice, the second with other statistics and rows in another order."""
    tokens = make_tables(num_prompts=6, rollouts_per_prompt=2).tokens
    rng = np.random.default_rng(7)

    def placed(frame: pl.DataFrame) -> pl.DataFrame:
        drawn = pl.Series(rng.choice(NAMES, frame.height), dtype=pl.Enum(Quadrant))
        noise = pl.Series(rng.gamma(1.0, size=frame.height).astype(np.float32))
        return frame.with_columns(quadrant=drawn, reverse_kl=noise)

    return placed(tokens), placed(tokens).sample(fraction=1.0, shuffle=True, seed=3)


def test_the_flow_equals_a_plain_count(runs):
    a, b = runs
    in_b = {(r, p): q for r, p, q in b.select("rollout_id", "position", "quadrant").rows()}
    plain = dict.fromkeys(((one, other) for one in NAMES for other in NAMES), 0)
    for rollout, position, quadrant in a.select("rollout_id", "position", "quadrant").rows():
        plain[quadrant, in_b[rollout, position]] += 1
    flow = checked(
        quadrant_flow(aligned_tokens(a.lazy(), b.lazy()), num_resamples=50),
        contracts.QuadrantFlowTable,
    )
    found = {(row[0], row[1]): row[2] for row in flow.iter_rows()}
    assert found == plain
    assert flow["share"].sum() == pytest.approx(1.0)
    assert (flow["low"] <= flow["share"]).all()
    assert (flow["share"] <= flow["high"]).all()
    moved, low, high = moved_share(aligned_tokens(a.lazy(), b.lazy()), num_resamples=50)
    away = sum(number for (one, other), number in plain.items() if one != other)
    assert moved == pytest.approx(away / a.height)
    assert low < moved < high


def test_a_run_beside_itself_does_not_move(runs):
    flow = quadrant_flow(aligned_tokens(runs[0].lazy(), runs[0].lazy()), num_resamples=20)
    off = flow.filter(pl.col("quadrant_a") != pl.col("quadrant_b"))
    assert off["num_tokens"].sum() == 0


def test_other_tokens_at_a_shared_place_are_refused(runs):
    a, b = runs
    first = a.sort("rollout_id", "position").row(0, named=True)
    there = (pl.col("rollout_id") == first["rollout_id"]) & (pl.col("position") == 0)
    changed = b.with_columns(
        token_id=pl.when(there).then(pl.col("token_id") + 1).otherwise("token_id")
    )
    with pytest.raises(SchemaError, match=r"another at 1 of \d+: first in rollout 'p000/0', pos"):
        aligned_tokens(a.lazy(), changed.lazy())


def test_runs_without_a_common_rollout_share_nothing(runs):
    other = runs[1].with_columns(rollout_id="z" + pl.col("rollout_id"))
    flow = quadrant_flow(aligned_tokens(runs[0].lazy(), other.lazy()), num_resamples=20)
    assert flow["num_tokens"].sum() == 0
    assert flow["share"].null_count() == 16


def test_strongest_moves_are_those_of_a_plain_sort(runs):
    aligned = aligned_tokens(runs[0].lazy(), runs[1].lazy())
    found = strongest_moves(aligned, 3)
    rows = aligned.collect().to_dicts()
    for row in rows:
        row["change"] = abs(float(row["reverse_kl_b"]) - float(row["reverse_kl_a"]))
    for one in NAMES:
        for other in NAMES:
            inside = [r for r in rows if (r["quadrant_a"], r["quadrant_b"]) == (one, other)]
            inside.sort(key=lambda r: (-r["change"], r["rollout_id"], r["position"]))
            part = found.filter(quadrant_a=one, quadrant_b=other)
            assert part.select("rollout_id", "position").rows() == [
                (r["rollout_id"], r["position"]) for r in inside[:3]
            ]
