"""The same tokens in two runs: which quadrant each was in, and which it is in.

Two teachers, or two checkpoints, that scored the same rollouts share their tokens: those are
aligned by rollout and position, never by text, and where the ids differ nothing is compared.
Reads token tables with quadrants; writes nothing.
"""

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import bootstrap_interval
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Quadrant

PLACE = ["rollout_id", "position"]
COMPARED = ("student_entropy", "reverse_kl", "forward_kl")
"""Statistics of both runs that stand side by side."""


def aligned_tokens(a: pl.LazyFrame, b: pl.LazyFrame) -> pl.LazyFrame:
    """The tokens that the student wrote in both runs, one row each.

    Args:
        a: Token table with `quadrant` of one run.
        b: That of the other.

    Returns:
        `rollout_id`, `position`, `prompt_id`, `token_id`, `token`, and `NAME_a`, `NAME_b` of
        `quadrant` and `COMPARED`; no row where the runs share no place.

    Raises:
        SchemaError: the runs name rollouts alike, but hold other tokens there.
    """
    named = ["quadrant", *COMPARED]
    ours, theirs = (frame.filter(pl.col("quadrant").is_not_null()) for frame in (a, b))
    left = ours.select(*PLACE, "prompt_id", "token_id", "token", pl.col(named).name.suffix("_a"))
    right = theirs.select(
        *PLACE,
        pl.col("token_id").alias("token_id_b"),
        pl.col("token").alias("token_b"),
        pl.col(named).name.suffix("_b"),
    )
    joined = left.join(right, on=PLACE, how="inner")
    _refuse_other_tokens(joined)
    return joined.drop("token_id_b", "token_b")


def _refuse_other_tokens(joined: pl.LazyFrame) -> None:
    differs = pl.col("token_id") != pl.col("token_id_b")
    first = pl.struct(*PLACE, "token", "token_b").filter(differs).first()
    counted = joined.select(
        pl.len().alias("all"), differs.sum().alias("other"), first.alias("first")
    )
    total, other, place = counted.collect(engine="streaming").row(0)
    if other:
        raise SchemaError(
            f"expected the same token at each place that both runs hold, found another at"
            f" {other:,} of {total:,}: first in rollout {place['rollout_id']!r}, position"
            f" {place['position']}, {place['token']!r} against {place['token_b']!r}; compare runs"
            " that scored the same rollouts"
        )


def quadrant_flow(
    aligned: pl.LazyFrame | pl.DataFrame, *, num_resamples: int = 300, seed: int = 0
) -> pl.DataFrame:
    """How many tokens go from each quadrant to each, as shares of all that are aligned.

    Intervals (95 %) are from resamples of prompts with the quadrants as they are: cuts are held.

    Returns:
        A `result_tables.QuadrantFlowTable` of 16 rows.
    """
    pairs = ["quadrant_a", "quadrant_b"]
    counted = aligned.lazy().group_by("prompt_id", *pairs).agg(pl.len().alias("number"))
    frame = counted.collect(engine="streaming").sort("prompt_id")
    prompts = frame["prompt_id"].unique(maintain_order=True)
    place = {name: index for index, name in enumerate(prompts)}
    sums = np.zeros((max(1, len(place)), 16))
    codes = {name.value: index for index, name in enumerate(Quadrant)}
    for prompt, one, other, number in frame.select(
        "prompt_id", *(pl.col(name).cast(pl.String) for name in pairs), "number"
    ).iter_rows():
        sums[place[prompt], 4 * codes[one] + codes[other]] += number
    return _flow_table(sums, num_resamples, seed)


def moved_share(
    aligned: pl.LazyFrame | pl.DataFrame, *, num_resamples: int = 300, seed: int = 0
) -> tuple[float, float | None, float | None]:
    """The share of aligned tokens that are in another quadrant in b, with its 95 % interval."""
    moved = (pl.col("quadrant_a").cast(pl.String) != pl.col("quadrant_b").cast(pl.String)).sum()
    by_prompt = (
        aligned.lazy().group_by("prompt_id").agg(moved.alias("moved"), pl.len().alias("all"))
    )
    frame = by_prompt.sort("prompt_id").collect(engine="streaming")
    sums = [frame[name].cast(pl.Float64).to_numpy()[:, None] for name in ("moved", "all")]
    found = bootstrap_interval(*sums, num_resamples=num_resamples, seed=seed)
    return float(found.value[0]), _known(found.low[0]), _known(found.high[0])


def strongest_moves(aligned: pl.LazyFrame, num_tokens: int) -> pl.DataFrame:
    """Of each pair of quadrants, the tokens whose reverse KL changes most, largest first; ties go
    to the smaller rollout id, then the earlier position."""
    change = (pl.col("reverse_kl_b").cast(pl.Float64) - pl.col("reverse_kl_a")).abs()
    ranked = aligned.with_columns(change=change.fill_nan(0.0))
    pairs = ["quadrant_a", "quadrant_b"]
    best = ranked.sort("change", *PLACE, descending=[True, False, False]).group_by(
        pairs, maintain_order=True
    )
    return (
        best.head(num_tokens)
        .sort([*pairs, "change", *PLACE], descending=[*[False] * 2, True, False, False])
        .collect()
    )


def _flow_table(sums: np.ndarray, num_resamples: int, seed: int) -> pl.DataFrame:
    total = sums.sum(1, keepdims=True)
    found = bootstrap_interval(sums, total, num_resamples=num_resamples, seed=seed)
    names = [name.value for name in Quadrant]
    return pl.DataFrame(
        {
            "quadrant_a": [one for one in names for _ in names],
            "quadrant_b": [other for _ in names for other in names],
            "num_tokens": sums.sum(0).astype(np.int64),
            "share": found.value,
            "low": found.low,
            "high": found.high,
        }
    ).with_columns(pl.col("share", "low", "high").fill_nan(None))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
