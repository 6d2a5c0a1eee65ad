"""Windows of neighbouring tokens at a place that is drawn for each rollout.

Of m tokens in a row, the window of k begins at ⌊u·(m − k + 1)⌋, u uniform: every place is as
likely, and the window of k lies inside that of k + 1. So one order of the tokens, that in which
growing windows take them in, gives the window of every k.
"""

import numpy as np
import polars as pl

from tip_analysis.analysis.counter_random import random_uniforms

_PLACE = 2**32
"""A position that no token has: its random number is the rollout's."""


def window_order(keys: pl.DataFrame, seed: int) -> pl.Series:
    """The share of its rollout that must be taken until the window reaches a token, in [0, 1).

    Args:
        keys: `rollout_id`, `position`, `loss_mask` of each token, in any order.
        seed: Any integer.

    Returns:
        [N] Float64: rank / m, 0 for the token where the window begins; null where `loss_mask` is
        false.
    """
    indexed = keys.with_row_index("_row").filter("loss_mask").sort("rollout_id", "position")
    ids = indexed["rollout_id"].unique(maintain_order=True)
    places = pl.repeat(_PLACE, len(ids), dtype=pl.UInt64, eager=True)
    lengths = indexed["rollout_id"].rle().struct.field("len").to_numpy()
    parts = [
        _taken_in(int(m), float(u)) / m
        for m, u in zip(lengths, random_uniforms(ids, places, seed), strict=True)
    ]
    order = np.full(keys.height, np.nan)
    order[indexed["_row"].to_numpy()] = np.concatenate(parts) if parts else []
    return pl.Series(order).fill_nan(None)


def _taken_in(m: int, u: float) -> np.ndarray:
    """[m]: when each place is taken in, from 0."""
    starts = np.floor(u * (m - np.arange(m))).astype(np.int64)
    to_the_left = np.append(True, np.diff(starts) < 0)  # at most one place a step, since u < 1
    taken = np.where(to_the_left, starts, starts + np.arange(m))
    order = np.empty(m)
    order[taken] = np.arange(m)
    return order
