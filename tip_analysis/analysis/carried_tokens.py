"""Which tokens a page carries, so that a reader can sort, filter and find them: all of a small run;
of a large one the strongest, and an even draw from each quadrant.

Reads a run; writes nothing. The draw goes by a hash of rollout and position, so that the same run
gives the same tokens. One pass in chunks finds them, one more gathers their columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from tip_analysis.analysis.grids import CHUNK_ROWS
from tip_analysis.analysis.groupings import token_kind
from tip_analysis.analysis.run_view import GRADIENT_SCORES, RunView

COMPLETE_ROWS = 30_000
"""A run of no more tokens is carried whole."""
DRAWN = 2_000
"""Tokens drawn from each quadrant of a larger run."""
STRONGEST = 50
"""Tokens of each quadrant and kind that are carried as its strongest, by each of `RANKED_BY`."""
RANKED_BY = ("q3_score", "forward_kl", "reverse_kl")
BEFORE, AFTER = 6, 4
"""Tokens of context on either side."""

PLACE = ["rollout_id", "position"]
SCORES = ("student_entropy", "reverse_kl", "forward_kl", "soft_or", "q3_score", "student_top1_prob")
_COLUMNS = [
    *PLACE,
    "token_id",
    "token",
    "quadrant",
    "artefact",
    "planted_label",
    "student_topk_ids",
    "teacher_topk_ids",
    *SCORES,
]


@dataclass(frozen=True)
class Carried:
    """The tokens that a page carries."""

    tokens: pl.DataFrame
    """One row each, by rollout and position, with scores, `kind`, gradients where measured, and
    `segment` where the run has it."""
    around: dict[tuple[str, int], tuple[int, str]]
    """Id and text of each token near one of them, by rollout and position; empty where all tokens
    are carried, since they are each other's context."""
    complete: bool
    """Whether these are all tokens of the run."""


def carry_tokens(view: RunView, *, complete_rows: int = COMPLETE_ROWS) -> Carried:
    """Choose and gather the tokens that a page carries.

    Args:
        view: a run.
        complete_rows: a run of no more tokens is carried whole, those included that the student
            did not write: they are context.
    """
    total = view.population.num_tokens + view.population.num_masked
    if total <= complete_rows:
        rows = _with_kind(view.with_gradients(view.tokens.select(_present(view)))).collect()
        return Carried(rows.sort(PLACE), {}, complete=True)
    chosen = _chosen(view)
    near = _gather(view, _widened(chosen))
    picked = near.join(chosen, on=PLACE, how="semi")
    rows = _with_kind(view.with_gradients(picked.lazy())).collect()
    around = {
        (rollout, position): (index, text)
        for rollout, position, index, text in near.select(*PLACE, "token_id", "token").iter_rows()
    }
    return Carried(rows.sort(PLACE), around, complete=False)


def _present(view: RunView) -> list[str]:
    """The columns that are carried, among those that the run has."""
    has_segment = "segment" in view.raw.collect_schema().names()
    return [*_COLUMNS, *(["segment"] if has_segment else [])]


def _with_kind(rows: pl.LazyFrame) -> pl.LazyFrame:
    floats = pl.col(*SCORES, *GRADIENT_SCORES).cast(pl.Float32)
    return rows.with_columns(floats, kind=token_kind(pl.col("token")))


def _chosen(view: RunView) -> pl.DataFrame:
    """Places of the strongest tokens and of the draw, found in one pass."""
    sizes = {
        str(name): number for name, number in view.shares.select("quadrant", "num_tokens").rows()
    }
    threshold = {
        name: min(2**64 - 1, int(2**64 * DRAWN / number))
        for name, number in sizes.items()
        if number
    }
    kinds = _kinds(view)
    best: dict[str, pl.DataFrame] = {}
    drawn: list[pl.DataFrame] = []
    for batch in _batches(view):
        draw = pl.struct(PLACE).hash(seed=0)
        limit = pl.col("quadrant").replace_strict(threshold, return_dtype=pl.UInt64, default=0)
        drawn.append(batch.filter(draw < limit).select(PLACE))
        named = batch.join(kinds, on="token_id", how="left")
        for score in RANKED_BY:
            rivals = named.select(*PLACE, "quadrant", "kind", score)
            rivals = pl.concat([best[score], rivals]) if score in best else rivals
            best[score] = _strongest(rivals, score)
    places = [*drawn, *(frame.select(PLACE) for frame in best.values())]
    return pl.concat(places).unique() if places else pl.DataFrame(schema=_PLACE_SCHEMA)


_PLACE_SCHEMA = {"rollout_id": pl.String, "position": pl.Int32}


def _strongest(rivals: pl.DataFrame, score: str) -> pl.DataFrame:
    """The largest of each quadrant and kind; ties go to the smaller rollout id, then the earlier
    position."""
    ordered = rivals.drop_nulls(score).sort(score, *PLACE, descending=[True, False, False])
    best = ordered.group_by("quadrant", "kind", maintain_order=True).head(STRONGEST)
    return best.select(rivals.columns)  # keys of groups come first otherwise


def _batches(view: RunView) -> Iterator[pl.DataFrame]:
    wanted = view.tokens.filter(pl.col("quadrant").is_not_null()).select(
        *PLACE, "token_id", pl.col("quadrant").cast(pl.String), *RANKED_BY
    )
    batches = wanted.collect_batches(chunk_size=8 * CHUNK_ROWS, engine="streaming")
    return (batch for batch in batches if batch.height)


def _kinds(view: RunView) -> pl.DataFrame:
    """The kind of each token id, by its first text."""
    if view.run.has("vocabulary"):
        texts = view.run.vocabulary().select("token_id", "token")
    else:
        texts = view.raw.group_by("token_id").agg(pl.col("token").first())
    kinds = texts.select("token_id", kind=token_kind(pl.col("token")))
    return kinds.collect(engine="streaming")


def _widened(chosen: pl.DataFrame) -> pl.DataFrame:
    """The places with those around them."""
    offsets = pl.DataFrame({"offset": pl.Series(range(-BEFORE, AFTER + 1), dtype=pl.Int32)})
    moved = chosen.join(offsets, how="cross").select(
        "rollout_id", position=pl.col("position") + pl.col("offset")
    )
    return moved.filter(pl.col("position") >= 0).unique()


def _gather(view: RunView, places: pl.DataFrame) -> pl.DataFrame:
    rows = view.tokens.select(_present(view)).join(places.lazy(), on=PLACE, how="semi")
    return rows.collect(engine="streaming")


def context_places(rollout: str, position: int) -> Sequence[tuple[str, int]]:
    """The places before and after a token that its context is made of, itself left out."""
    offsets = (*range(-BEFORE, 0), *range(1, AFTER + 1))
    return [(rollout, position + offset) for offset in offsets]


def carried_ratios(view: RunView, places: pl.DataFrame) -> pl.DataFrame:
    """The smallest ρ at which each rule of the run's masks keeps each of these tokens: rule,
    rollout_id, position, retention_ratio; no row where the run has no masks."""
    keys = ["rule", *PLACE]
    if not view.run.has("masks"):
        schema = {"rule": pl.String, **_PLACE_SCHEMA, "retention_ratio": pl.Float64}
        return pl.DataFrame(schema=schema)
    kept = view.run.masks().join(places.lazy(), on=PLACE, how="semi")
    smallest = kept.group_by(keys).agg(pl.col("retention_ratio").min())
    return smallest.collect(engine="streaming").sort(keys)
