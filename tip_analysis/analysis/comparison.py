"""Two runs side by side: two checkpoints, two teachers, two prompts sets.

Where both runs scored the same tokens (the same rollouts under another student or teacher), tokens
are followed from their quadrant in one run to that in the other.
"""

import polars as pl

from tip_analysis.analysis.quadrants import assign_quadrants, quadrant_shares
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.names import Quadrant
from tip_analysis.core.run_folder import RunLike, open_run

COMPARED = (
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "jsd",
    "student_top1_prob",
)


def compare_runs(
    run_a: RunLike, run_b: RunLike, taxonomy: Taxonomy = DEFAULT_TAXONOMY
) -> dict[str, pl.DataFrame]:
    """Result tables by title: quadrant shares, means, and, where tokens are shared, how they move
    between quadrants.

    Each run's cuts are measured on that run, unless they are given in nats.

    Raises:
        RunError: a run has no scored tokens.
    """
    sides = [
        _placed(run.tokens(), taxonomy).filter("loss_mask") for run in map(open_run, (run_a, run_b))
    ]
    tables = {
        "quadrant shares": _side_by_side(
            [quadrant_shares(side).select("quadrant", "share") for side in sides]
        ),
        "means over tokens": _means(sides),
    }
    moves = _moves(*sides)
    if moves.height:
        tables["tokens that both runs scored, by quadrant in a (rows) and b (columns)"] = moves
    return tables


def _placed(tokens: pl.LazyFrame, taxonomy: Taxonomy) -> pl.LazyFrame:
    return assign_quadrants(tokens, cuts=taxonomy.measure(tokens))


def _side_by_side(shares: list[pl.DataFrame]) -> pl.DataFrame:
    a, b = (
        table.rename({"share": name})
        for table, name in zip(shares, ("share_a", "share_b"), strict=True)
    )
    return a.join(b, on="quadrant", how="full", coalesce=True).with_columns(
        difference=pl.col("share_b") - pl.col("share_a")
    )


def _means(sides: list[pl.LazyFrame]) -> pl.DataFrame:
    """Mean of each statistic, infinite values left out."""
    finite = [pl.col(name).filter(pl.col(name).is_finite()).mean() for name in COMPARED]
    a, b = (side.select(finite).collect(engine="streaming").row(0) for side in sides)
    return pl.DataFrame({"statistic": COMPARED, "mean_a": a, "mean_b": b}).with_columns(
        difference=pl.col("mean_b") - pl.col("mean_a")
    )


def _moves(a: pl.LazyFrame, b: pl.LazyFrame) -> pl.DataFrame:
    """Shares of the common tokens by quadrant in a and in b; empty where the runs share none."""
    key = ["rollout_id", "position", "token_id"]
    both = (
        a.select(*key, "quadrant")
        .join(b.select(*key, quadrant_b="quadrant"), on=key)
        .collect(engine="streaming")
    )
    if both.is_empty():
        return both
    counts = both.group_by("quadrant", "quadrant_b").len()
    table = counts.with_columns(share=pl.col("len") / both.height).pivot(
        on="quadrant_b", index="quadrant", values="share", aggregate_function="sum"
    )
    missing = [pl.lit(0.0).alias(name) for name in Quadrant if name not in table.columns]
    return table.with_columns(missing).select("quadrant", *Quadrant).sort("quadrant").fill_null(0.0)
