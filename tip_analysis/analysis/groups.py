"""Does a quadrant just mean "first tokens", "rare tokens" or "punctuation"? And do rewards go with
quadrant shares?

Reads the token table (and rewards of the rollout table); writes nothing. Groups are fixed, cuts and
shares are measured again in each resample of prompts (`bootstrap`).
"""

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import polars as pl

from tip_analysis.analysis.bootstrap import Floats, group_index, interval_frame, with_counts
from tip_analysis.analysis.correlations import RankedColumn, correlation_matrix
from tip_analysis.analysis.groupings import available_grouping, available_groupings, with_group
from tip_analysis.analysis.quadrant_rule import QUADRANTS, Codes
from tip_analysis.analysis.resampling import Resampler, written_tokens
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, CutOptions, Taxonomy
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import Quadrant


def group_effects(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    grouping: str,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    num_resamples: int | None = None,
    seed: int = 0,
    **cuts: Unpack[CutOptions],
) -> pl.DataFrame:
    """Quadrants within groups of tokens: one row per group and quadrant.

    Args:
        tokens: Token table.
        grouping: A name of `groupings.GROUPINGS` whose columns the table has.
        taxonomy: Whose cuts are measured again in each resample.
        num_resamples: None for a number that suits the size of the table.
        seed: Of the resamples.
        cuts: `entropy_cut`, `divergence_cut`, `cut_scope` in place of the taxonomy's.

    Returns:
        A `GroupTable` with lift (share over the quadrant's overall share; 1 says that the group
        does not matter) and composition (of the quadrant in this group), each, as share, with
        `_low`, `_high`, `_se`; num_rollouts and num_prompts of the table.

    Raises:
        UnknownNameError: there is no such grouping.
        SchemaError: a column is missing.
    """
    frame, groups, names, resampler = _grouped(
        tokens, grouping, taxonomy.changed(**cuts), num_resamples, seed
    )

    def finish(sums: Floats) -> Floats:
        counts = sums.T
        overall = counts.sum(0) / counts.sum()
        share = counts / counts.sum(1, keepdims=True)
        return np.concatenate(
            [share.ravel(), (share / overall).ravel(), (counts / counts.sum(0)).ravel()]
        )

    interval = resampler.measure_sums(_members(groups, len(names)), finish)
    size = len(names) * 4
    weights, codes = resampler.whole()
    table = pl.DataFrame(
        {
            "grouping": [grouping] * size,
            "group": [name for name in names for _ in QUADRANTS],
            "quadrant": pl.Series([*QUADRANTS] * len(names), dtype=pl.Enum(Quadrant)),
        }
    )
    table = pl.concat(
        [table, interval_frame(interval, ("share", "lift", "composition"))], how="horizontal"
    )
    counts = _contingency(groups, codes, weights, len(names)).ravel().astype(np.int64)
    return with_counts(table, frame).with_columns(pl.Series("num_tokens", counts))


def association(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    among: Sequence[str] | None = None,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    num_resamples: int | None = None,
    seed: int = 0,
    **cuts: Unpack[CutOptions],
) -> pl.DataFrame:
    """How much each grouping says about the quadrant: the answer to "is it just position, frequency
    or kind?".

    Args:
        tokens: Token table.
        among: Names of groupings; by default all whose columns the table has.
        taxonomy, num_resamples, seed, cuts: As in `group_effects`.

    Returns:
        One row per grouping: explained = I(group; quadrant) / H(quadrant), the share of the
        quadrant's uncertainty that knowing the group removes, in [0, 1]; cramers_v in [0, 1]; each
        with `_low`, `_high`, `_se`; num_tokens, num_rollouts, num_prompts. Both are plug-in
        estimates: with N tokens and G groups, `explained`·H is about 3·(G − 1)/(2N) too large, and
            more so where tokens of a prompt are alike.

    Raises:
        SchemaError: a column is missing.
    """
    rows = []
    for grouping in available_groupings(tokens) if among is None else among:
        frame, groups, names, resampler = _grouped(
            tokens, grouping, taxonomy.changed(**cuts), num_resamples, seed
        )

        interval = resampler.measure_sums(
            _members(groups, len(names)), lambda sums: _association(sums.T)
        )
        ends = interval_frame(interval, ("explained", "cramers_v"))
        rows.append(with_counts(ends.insert_column(0, pl.Series("grouping", [grouping])), frame))
    return pl.concat(rows)


def _grouped(
    tokens: pl.LazyFrame | pl.DataFrame,
    grouping: str,
    taxonomy: Taxonomy,
    num_resamples: int | None,
    seed: int,
) -> tuple[pl.DataFrame, np.ndarray, list[str], Resampler]:
    chosen = available_grouping(tokens, grouping)
    written = written_tokens(tokens, list(chosen.columns), "group_effects")
    frame = with_group(written, grouping, "_group")
    resampler = Resampler(frame, taxonomy=taxonomy, num_resamples=num_resamples, seed=seed)
    present = set(frame["_group"].unique())
    names = [name for name in chosen.names if name in present]
    groups = (
        frame["_group"].replace_strict(names, range(len(names)), return_dtype=pl.Int64).to_numpy()
    )
    return frame, groups, names, resampler


def _members(groups: np.ndarray, num_groups: int) -> Floats:
    """[N, G] 1 where a token is in a group."""
    return (groups[:, None] == np.arange(num_groups)).astype(np.float64)


def _contingency(groups: np.ndarray, codes: Codes, weights: Floats, num_groups: int) -> Floats:
    """[G, 4] weighted counts."""
    return (
        np.bincount(groups * 4 + codes, weights=weights, minlength=num_groups * 4)
        .astype(np.float64)
        .reshape(num_groups, 4)
    )


def _association(counts: Floats) -> Floats:
    """[2]: I(row; column) / H(column), and Cramér's V."""
    joint = counts / counts.sum()
    rows, columns = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    expected = rows * columns
    present = joint > 0
    information = float((joint[present] * np.log(joint[present] / expected[present])).sum())
    entropy = -float((columns[columns > 0] * np.log(columns[columns > 0])).sum())
    likely = expected > 0
    chi_square = float(((joint[likely] - expected[likely]) ** 2 / expected[likely]).sum())
    smaller = min(int((rows > 0).sum()), int((columns > 0).sum())) - 1
    explained = max(information, 0.0) / entropy if entropy > 0 else np.nan
    return np.array([explained, np.sqrt(chi_square / smaller) if smaller > 0 else np.nan])


def reward_effects(
    tokens: pl.LazyFrame | pl.DataFrame,
    rollouts: pl.LazyFrame | pl.DataFrame,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    num_resamples: int | None = None,
    seed: int = 0,
    **cuts: Unpack[CutOptions],
) -> pl.DataFrame:
    """Quadrant shares of rollouts against their rewards: one row per quadrant.

    Each graded rollout counts once. `rewarded` are those with a reward above ½.

    Returns:
        quadrant, spearman (rank correlation over rollouts of the quadrant's share with the reward),
        share_rewarded, share_unrewarded (mean share over those rollouts), difference, each with
        `_low`, `_high`, `_se`, and num_tokens, num_rollouts, num_prompts (graded).

    Raises:
        SchemaError: a column is missing, or no rollout with tokens has a reward.
    """
    rollouts = rollouts.lazy()
    require_columns(rollouts, ["rollout_id", "reward"], "reward_effects")
    graded = rollouts.select("rollout_id", pl.col("reward").cast(pl.Float64)).drop_nulls().collect()
    frame = written_tokens(tokens, [], "reward_effects").join(
        graded, on="rollout_id", how="inner", maintain_order="left"
    )
    if frame.height == 0:
        raise SchemaError("reward_effects needs graded rollouts with tokens; none has a reward")
    resampler = Resampler(
        frame, taxonomy=taxonomy.changed(**cuts), num_resamples=num_resamples, seed=seed
    )
    members = group_index(frame["rollout_id"])
    first = np.unique(members, return_index=True)[1]
    reward = frame["reward"].to_numpy()[first]
    lengths = np.bincount(members).astype(np.float64)
    ranked, rewarded = RankedColumn(reward), (reward > 0.5).astype(np.float64)

    def statistic(weights: Floats, codes: Codes) -> Floats:
        shares = (
            _contingency(members, codes, np.ones(codes.size), lengths.size) / lengths[:, None]
        ).T
        times = weights[first]
        ranks = np.stack([ranked.ranks(times), *(RankedColumn(row).ranks(times) for row in shares)])
        spearman = correlation_matrix(ranks, times)[0, 1:]
        good = shares @ (times * rewarded) / (times @ rewarded)
        bad = shares @ (times * (1.0 - rewarded)) / (times @ (1.0 - rewarded))
        return np.concatenate([spearman, good, bad, good - bad])

    names = ("spearman", "share_rewarded", "share_unrewarded", "difference")
    measured = interval_frame(resampler.measure(statistic), names)
    table = measured.insert_column(0, pl.Series("quadrant", [*QUADRANTS], dtype=pl.Enum(Quadrant)))
    return with_counts(table, frame)
