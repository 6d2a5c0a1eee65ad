"""Intervals of a long run from a sample of its prompts.

The prompt bootstrap costs time in proportion to tokens × resamples. Of a long run a random sample
of p of the P prompts is resampled instead, and half-widths are scaled by √(p/P), since the width of
an interval shrinks with the square root of the number of prompts (the m-out-of-n bootstrap). Values
are those of the whole run.
"""

from collections.abc import Sequence

import polars as pl


def draw_prompts(tokens: pl.LazyFrame, num_tokens: int) -> pl.DataFrame:
    """`prompt_id` of a sample of prompts that hold about `num_tokens` written tokens, at least two:
    the same for the same table."""
    sizes = tokens.filter("loss_mask").group_by("prompt_id").len("size").collect(engine="streaming")
    drawn = sizes.with_columns(pl.col("prompt_id").hash(seed=0).alias("draw")).sort(
        "draw", "prompt_id"
    )
    fits = pl.col("size").cum_sum() <= num_tokens
    return drawn.filter(fits | (pl.int_range(pl.len()) < 2)).select("prompt_id")


def scaled_intervals(
    whole: pl.DataFrame,
    part: pl.DataFrame,
    *,
    keys: Sequence[str],
    names: Sequence[str],
    scale: float,
) -> pl.DataFrame:
    """A result table of the whole run with the intervals of a sample, `scale` times as wide.

    Args:
        whole: the table of the whole run.
        part: the same table of the sample.
        keys: columns that identify a row.
        names: value columns; each has `NAME_low` and `NAME_high`, or `low` and `high` where the
            name is `value`.
        scale: √(p/P).
    """
    ends = {
        name: ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
        for name in names
    }
    wanted = [*keys, *names, *(end for pair in ends.values() for end in pair)]
    joined = whole.join(
        part.select(wanted), on=list(keys), how="left", suffix="_part", maintain_order="left"
    )
    scaled = [
        (pl.col(name) + scale * (pl.col(f"{end}_part") - pl.col(f"{name}_part"))).alias(end)
        for name, pair in ends.items()
        for end in pair
    ]
    return joined.with_columns(scaled).select(whole.columns)
