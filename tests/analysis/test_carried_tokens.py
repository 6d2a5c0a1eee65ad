"""The tokens of a page: all of a small run; of a large one its strongest and an even draw, the same
each time."""

import polars as pl
import pytest
from synthetic import Tables, make_tables, write_run

from tip_analysis.analysis import carried_tokens
from tip_analysis.analysis.carried_tokens import (
    AFTER,
    BEFORE,
    DRAWN,
    RANKED_BY,
    STRONGEST,
    carried_ratios,
    carry_tokens,
)
from tip_analysis.analysis.run_view import ReportOptions, RunView

PLACE = ["rollout_id", "position"]


@pytest.fixture(scope="module")
def tables() -> Tables:
    return make_tables(num_prompts=60, rollouts_per_prompt=4, mean_length=60)


@pytest.fixture(scope="module")
def view(tables, tmp_path_factory) -> RunView:
    return RunView(write_run(tmp_path_factory.mktemp("runs") / "run", tables), ReportOptions())


def test_a_small_run_is_carried_whole(view, tables):
    carried = carry_tokens(view)
    assert carried.complete
    assert carried.tokens.select(PLACE).equals(tables.tokens.select(PLACE).sort(PLACE))


def test_a_large_run_gives_its_strongest_tokens_and_their_context(view, tables):
    carried = carry_tokens(view, complete_rows=100)
    assert not carried.complete
    kept = set(carried.tokens.select(PLACE).rows())
    assert len(kept) == carried.tokens.height < tables.tokens.height
    placed = view.tokens.select(*PLACE, "token", "quadrant", "q3_score", "forward_kl").collect()
    is_number = placed["token"].str.contains(r"^ ?[0-9]+$")
    for quadrant in ("Q1", "Q3"):
        for score in ("q3_score", "forward_kl"):
            rivals = placed.filter(is_number).filter(quadrant=quadrant)
            best = rivals.sort(score, descending=True).head(STRONGEST)
            assert set(best.select(PLACE).rows()) <= kept
    texts = {(r, p): t for r, p, t in tables.tokens.select(*PLACE, "token").iter_rows()}
    for rollout, position in list(kept)[:200]:
        for near in range(position - BEFORE, position + AFTER + 1):
            found = carried.around.get((rollout, near))
            assert (found and found[1]) == texts.get((rollout, near))


def test_chunks_do_not_matter(view, monkeypatch):
    whole = carry_tokens(view, complete_rows=100)
    frame = view.tokens.filter(pl.col("quadrant").is_not_null()).collect()
    names = [*PLACE, "token_id", "quadrant", *RANKED_BY]
    frame = frame.with_columns(pl.col("quadrant").cast(pl.String)).select(names)
    pieces = [frame[start : start + 997] for start in range(0, frame.height, 997)]
    monkeypatch.setattr(carried_tokens, "_batches", lambda _: iter(pieces))
    assert carry_tokens(view, complete_rows=100).tokens.equals(whole.tokens)


def test_the_draw_is_even_and_the_same_each_time(view):
    first, second = (carry_tokens(view, complete_rows=100) for _ in range(2))
    assert first.tokens.equals(second.tokens)
    sizes = dict(first.tokens["quadrant"].cast(pl.String).value_counts().rows())
    population = dict(view.shares.select(pl.col("quadrant").cast(pl.String), "num_tokens").rows())
    for name, size in sizes.items():
        drawn = min(DRAWN, population[name])
        assert 0.8 * drawn <= size <= drawn + 24 * STRONGEST + 200


def test_the_smallest_ratio_that_keeps_each_token(view, tables):
    places = tables.tokens.select(PLACE).head(500)
    found = carried_ratios(view, places)
    plain: dict[tuple, float] = {}
    wanted = set(places.rows())
    for rule, ratio, rollout, position in tables.masks.select(
        "rule", "retention_ratio", *PLACE
    ).iter_rows():
        if (rollout, position) in wanted:
            key = (rule, rollout, position)
            plain[key] = min(ratio, plain.get(key, 1.0))
    assert {row[:3]: row[3] for row in found.iter_rows()} == plain
