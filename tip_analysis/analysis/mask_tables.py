"""What masks are made of and how they differ: result tables over rows of the mask table.

Reads `tip_analysis.core.schema.MaskTable` rows and the token table; writes nothing. A mask is told
from another by `MASK_KEYS`.
"""

from collections.abc import Sequence

import polars as pl

from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import PlantedLabel, Quadrant

MASK_KEYS = ["rule", "retention_ratio", "selection_scope", "seed"]
"""What tells one mask from another."""


def composition(masks: pl.DataFrame, quadrants: pl.LazyFrame | pl.DataFrame) -> pl.DataFrame:
    """What each mask is made of, by quadrant: one row per mask and quadrant, empty ones included.

    Returns:
        A `CompositionTable` with the mask's keys, num_tokens, num_rollouts, num_prompts, recall (of
        the quadrant's tokens that are selected) and lift = share / token_share. Null where the
        denominator is 0.
    """
    frame = _quadrant_frame(quadrants)
    totals = frame.group_by("quadrant").agg(pl.len().alias("_quadrant_tokens"))
    counted = (
        _joined(masks, frame)
        .group_by(*MASK_KEYS, "quadrant")
        .agg(
            pl.len().alias("num_tokens"),
            pl.col("rollout_id").n_unique().alias("num_rollouts"),
            pl.col("prompt_id").n_unique().alias("num_prompts"),
        )
    )
    every = masks.select(MASK_KEYS).unique(maintain_order=True)
    names = pl.DataFrame({"quadrant": list(Quadrant)}, schema={"quadrant": pl.Enum(Quadrant)})
    table = every.join(names, how="cross").join(
        counted, on=[*MASK_KEYS, "quadrant"], how="left", maintain_order="left"
    )
    table = table.join(totals, on="quadrant", how="left", maintain_order="left").with_columns(
        pl.col("num_tokens", "num_rollouts", "num_prompts", "_quadrant_tokens")
        .fill_null(0)
        .cast(pl.Int64)
    )
    tokens = pl.col("num_tokens")
    token_share = (
        pl.col("_quadrant_tokens") / frame.height if frame.height else pl.lit(None, pl.Float64)
    )
    return (
        table.with_columns(
            _ratio(tokens, tokens.sum().over(MASK_KEYS)).alias("share"),
            _ratio(tokens, pl.col("_quadrant_tokens")).alias("recall"),
            token_share.alias("token_share"),
        )
        .with_columns(_ratio(pl.col("share"), pl.col("token_share")).alias("lift"))
        .drop("_quadrant_tokens")
    )


def overlap(masks: pl.DataFrame) -> pl.DataFrame:
    """How far any two masks agree: one row per unordered pair of different masks.

    Returns:
        An `OverlapTable` with the keys of both (`*_a`, `*_b`), num_both, num_either and
        containment = both / the smaller mask.
    """
    keyed = masks.with_columns(pl.struct(MASK_KEYS).rank("dense").alias("_mask"))
    keys = keyed.select("_mask", *MASK_KEYS).unique().sort("_mask")
    sizes = keyed.group_by("_mask").agg(pl.len().cast(pl.Int64).alias("_size"))
    narrow = keyed.select("_mask", "rollout_id", "position")
    both = (
        narrow.join(narrow, on=["rollout_id", "position"], suffix="_b")
        .filter(pl.col("_mask") < pl.col("_mask_b"))
        .group_by("_mask", "_mask_b")
        .agg(pl.len().cast(pl.Int64).alias("num_both"))
    )
    keys = keys.join(sizes, on="_mask")
    pairs = keys.rename({name: f"{name}_a" for name in MASK_KEYS}).join(
        keys.rename({name: f"{name}_b" for name in MASK_KEYS}), how="cross", suffix="_b"
    )
    pairs = pairs.filter(pl.col("_mask") < pl.col("_mask_b")).join(
        both, on=["_mask", "_mask_b"], how="left"
    )
    num_both = pl.col("num_both").fill_null(0)
    return (
        pairs.sort("_mask", "_mask_b")
        .with_columns(
            num_both, (pl.col("_size") + pl.col("_size_b") - num_both).alias("num_either")
        )
        .with_columns(
            (pl.col("num_both") / pl.col("num_either")).alias("jaccard"),
            (pl.col("num_both") / pl.min_horizontal("_size", "_size_b")).alias("containment"),
        )
        .drop("_mask", "_mask_b", "_size", "_size_b")
    )


def planted_recall(masks: pl.DataFrame, tokens: pl.LazyFrame | pl.DataFrame) -> pl.DataFrame:
    """How many of the planted errors each mask finds (arithmetic pair only).

    Returns:
        The mask's keys, num_tokens (selected), num_planted (in the table), num_found, recall (of
        planted errors), precision.

    Raises:
        SchemaError: the table has no `planted_label`, or no planted error.
    """
    tokens = tokens.lazy()
    require_columns(
        tokens, ["rollout_id", "position", "loss_mask", "planted_label"], "planted_recall"
    )
    frame = tokens.filter("loss_mask").select("rollout_id", "position", "planted_label").collect()
    is_planted = pl.col("planted_label") == PlantedLabel.PLANTED_ERROR
    num_planted = int(frame.select(is_planted.sum()).item() or 0)
    if num_planted == 0:
        raise SchemaError("planted_recall needs tokens labelled planted_error; the table has none")
    return (
        masks.join(frame, on=["rollout_id", "position"])
        .group_by(MASK_KEYS, maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("num_tokens"),
            pl.lit(num_planted, pl.Int64).alias("num_planted"),
            is_planted.sum().cast(pl.Int64).alias("num_found"),
        )
        .with_columns(
            (pl.col("num_found") / pl.col("num_planted")).alias("recall"),
            (pl.col("num_found") / pl.col("num_tokens")).alias("precision"),
        )
    )


def coverage(
    masks: pl.DataFrame, tokens: pl.LazyFrame | pl.DataFrame, columns: Sequence[str]
) -> pl.DataFrame:
    """The share of each column's sum that each mask keeps, such as Σδ, Σφ or Σ‖g‖²; +inf is left
    out of sums.

    Returns:
        The mask's keys, column, num_tokens, token_share, kept (the sum over the mask), total, share
        = kept / total (outside [0, 1] where a column has both signs; null where the total is 0).
    """
    tokens = tokens.lazy()
    require_columns(tokens, ["rollout_id", "position", "loss_mask", *columns], "coverage")
    finite = pl.col(list(columns)).cast(pl.Float64)
    written = tokens.filter("loss_mask")
    frame = written.select(
        "rollout_id", "position", pl.when(finite.is_finite()).then(finite).name.keep()
    ).collect()
    totals = frame.select(pl.col(list(columns)).sum()).row(0, named=True)
    kept = (
        masks.join(frame, on=["rollout_id", "position"])
        .group_by(MASK_KEYS, maintain_order=True)
        .agg(pl.len().cast(pl.Int64).alias("num_tokens"), pl.col(list(columns)).sum())
    )
    tables = [
        kept.select(
            *MASK_KEYS,
            pl.lit(name).alias("column"),
            "num_tokens",
            (pl.col("num_tokens") / frame.height).alias("token_share"),
            pl.col(name).alias("kept"),
            pl.lit(totals[name], pl.Float64).alias("total"),
        )
        for name in columns
    ]
    return pl.concat(tables).with_columns(_ratio(pl.col("kept"), pl.col("total")).alias("share"))


def _quadrant_frame(quadrants: pl.LazyFrame | pl.DataFrame) -> pl.DataFrame:
    quadrants = quadrants.lazy()
    require_columns(quadrants, ["rollout_id", "prompt_id", "position", "quadrant"], "composition")
    narrow = quadrants.filter(pl.col("quadrant").is_not_null()).select(
        "rollout_id", "prompt_id", "position", "quadrant"
    )
    return narrow.collect()


def _joined(masks: pl.DataFrame, frame: pl.DataFrame) -> pl.DataFrame:
    joined = masks.join(frame, on=["rollout_id", "position"], how="left")
    if strangers := int(joined["quadrant"].null_count()):
        raise SchemaError(
            f"{strangers} selected token(s) are not in the token table; the masks belong to"
            " another run"
        )
    return joined


def _ratio(numerator: pl.Expr, denominator: pl.Expr) -> pl.Expr:
    return pl.when(denominator != 0).then(numerator / denominator)
