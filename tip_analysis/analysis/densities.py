"""Result tables that only the report needs: densities for the map, the strongest tokens.

Everything that is a statistic of the method (shares, cuts, correlations, coverage …) comes from
`quadrants`, `composition` and `statistics`; nothing of it is computed again here.
"""

import math

import numpy as np
import polars as pl

from tip_analysis.analysis.cuts import AXIS_COLUMNS, Cuts
from tip_analysis.core.names import Axis, Quadrant

NUM_CELLS = 64
"""Cells of the density map along each axis."""
LOWEST = 1e-6
"""Nats: what lies below is drawn in the first cell."""

STRENGTH = {"Q1": "forward_kl", "Q3": "q3_score"}
"""What the strongest tokens of a quadrant are ranked by."""

_DETAILS = (
    "rollout_id",
    "prompt_id",
    "position",
    "token_id",
    "token",
    "quadrant",
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "soft_or",
    "q3_score",
    "student_topk_ids",
    "student_topk_logprobs",
    "teacher_topk_ids",
    "teacher_topk_logprobs",
)


def density(tokens: pl.LazyFrame, cuts: Cuts) -> pl.DataFrame:
    """Tokens per cell of the plane of entropy and reverse KL, logarithmic cells whose edges include
    the cuts.

    Returns:
        A `DensityTable`; cells are open on the left, and divergences of +inf are left out.
    """
    entropy_column, divergence_column = AXIS_COLUMNS[Axis.ENTROPY], AXIS_COLUMNS[Axis.DIVERGENCE]
    frame = (
        tokens.filter(pl.col("quadrant").is_not_null(), pl.col(divergence_column).is_finite())
        .select(
            pl.col(entropy_column),
            pl.col(divergence_column),
            pl.col("quadrant").to_physical().alias("code"),
        )
        .collect(engine="streaming")
    )
    if frame.height == 0:
        return pl.DataFrame(schema=_density_schema())
    entropy = frame[entropy_column].cast(pl.Float64).to_numpy()
    divergence = frame[divergence_column].cast(pl.Float64).to_numpy()
    x, y = _edges(entropy, cuts.entropy.value), _edges(divergence, cuts.divergence.value)
    column = np.clip(np.searchsorted(x, entropy, side="left") - 1, 0, len(x) - 2)
    row = np.clip(np.searchsorted(y, divergence, side="left") - 1, 0, len(y) - 2)
    counts = np.bincount(
        (column * len(y) + row) * 4 + frame["code"].to_numpy(), minlength=len(x) * len(y) * 4
    )
    counts = counts.reshape(len(x), len(y), 4)
    filled = np.argwhere(counts.sum(2) > 0)
    cells = counts[filled[:, 0], filled[:, 1]]
    table = {
        "entropy_left": x[filled[:, 0]],
        "entropy_right": x[filled[:, 0] + 1],
        "divergence_left": y[filled[:, 1]],
        "divergence_right": y[filled[:, 1] + 1],
        "num_tokens": cells.sum(1),
        "quadrant": np.array(list(Quadrant))[cells.argmax(1)],
    }
    return pl.DataFrame(table, schema=_density_schema(), strict=False)


def strongest_tokens(tokens: pl.LazyFrame, quadrant: str, num_tokens: int) -> pl.DataFrame:
    """The strongest token of each prompt in a quadrant, strongest first (`STRENGTH`), at most
    `num_tokens` prompts.

    One token a prompt, since the rollouts of one prompt tend to make one mistake in the same way.
    Ties go to the smaller rollout id, then the earlier position.
    """
    score = STRENGTH[quadrant]
    ranked = tokens.filter(pl.col("quadrant") == quadrant, pl.col(score).is_not_null())
    best = (
        ranked.select("prompt_id", "rollout_id", "position", score)
        .sort(score, "rollout_id", "position", descending=[True, False, False])
        .unique("prompt_id", keep="first", maintain_order=True)
        .head(num_tokens)
        .collect()
    )
    wanted = best.select("rollout_id", "position").with_row_index("rank")
    details = (
        ranked.select(_DETAILS)
        .join(wanted.lazy(), on=["rollout_id", "position"], how="inner")
        .collect()
    )
    return details.sort("rank")


def text_around(
    tokens: pl.LazyFrame, places: pl.DataFrame, *, reach: int = 24
) -> dict[tuple[str, int], tuple[str, str]]:
    """The text before and after tokens, up to `reach` tokens on each side.

    Args:
        tokens: the token table.
        places: `rollout_id`, `position`.
        reach: tokens on each side.
    """
    near = tokens.select("rollout_id", "position", pl.col("token").str.head(200))
    near = (
        near.join(places.lazy().select("rollout_id").unique(), on="rollout_id", how="semi")
        .collect()
        .sort("position")
    )
    by_rollout = {
        str(key[0]): part for key, part in near.partition_by("rollout_id", as_dict=True).items()
    }
    around = {}
    for rollout_id, position in places.select("rollout_id", "position").iter_rows():
        part = by_rollout[rollout_id]
        before = part.filter(pl.col("position").is_between(position - reach, position - 1))["token"]
        after = part.filter(pl.col("position").is_between(position + 1, position + reach))["token"]
        around[rollout_id, position] = ("".join(before), "".join(after))
    return around


def _edges(values: np.ndarray, cut: float | None) -> np.ndarray:
    """Logarithmic edges from the lowest drawn value to the largest, the cut among them."""
    positive = values[values > LOWEST]
    low = max(LOWEST, float(np.quantile(positive, 0.002))) if positive.size else LOWEST
    high = max(float(values.max()), 10 * low) * 1.0001
    if cut is None or not math.isfinite(cut) or cut <= 0:
        return np.geomspace(low, high, NUM_CELLS + 1)
    edges = np.geomspace(min(low, cut / 1.5), max(high, cut * 1.5), NUM_CELLS + 1)
    edges[int(np.argmin(np.abs(np.log(edges[1:-1] / cut)))) + 1] = cut
    return edges


def _density_schema() -> dict[str, pl.DataType]:
    edges = ("entropy_left", "entropy_right", "divergence_left", "divergence_right")
    return {
        **{name: pl.Float64() for name in edges},
        "num_tokens": pl.Int64(),
        "quadrant": pl.String(),
    }
