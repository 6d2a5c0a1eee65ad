"""How training goes: quantities of the dynamics table over steps, arm by arm.

Reads rows of `tip_analysis.core.schema.DynamicsTable`; writes nothing. Steps are put into bins of
equal length, so that a curve shows the course and not the noise of single steps; within a bin each
seed is averaged by itself, and the band spans the seeds.
"""

from collections.abc import Mapping, Sequence

import polars as pl

from tip_analysis.analysis.arms import Arm
from tip_analysis.core.errors import UnknownNameError

METRICS: Mapping[str, str] = {
    "response_tokens": "mean length of a response, tokens",
    "truncated_share": "responses cut off",
    "student_entropy": "mean student entropy, nats",
    "reverse_kl": "mean reverse KL, nats",
    "share_q3": "share of Q3",
    "divergence_q3": "mean reverse KL in Q3, nats",
    "soft_or_overlap": "overlap with Soft-OR at equal ρ",
    "topk_overlap": "top-16 overlap of both models",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
}
"""What is shown, in words. Every other column of numbers has a curve too."""
DEFAULT_BINS = 20


def dynamics_curves(
    dynamics: pl.DataFrame | pl.LazyFrame,
    metrics: Sequence[str] = tuple(METRICS),
    *,
    num_bins: int = DEFAULT_BINS,
) -> pl.DataFrame:
    """Curves of some quantities over steps: a `DynamicsCurveTable`.

    Args:
        dynamics: rows of the dynamics table.
        metrics: its columns.
        num_bins: bins of equal length over all steps; fewer where there are fewer steps.

    Returns:
        arm, metric, step (mean of the bin), value (mean over seeds), low and high (smallest and
        largest seed), num_seeds; null where a quantity is not known.

    Raises:
        UnknownNameError: the table has no such column.
    """
    table = dynamics.lazy().collect()
    if unknown := [name for name in metrics if name not in table.columns]:
        raise UnknownNameError("quantity of training", unknown[0], [*METRICS])
    table = table.with_columns(_bins(table, num_bins), pl.Series("arm", _names(table)))
    by_seed = table.group_by("arm", "seed", "bin", maintain_order=True).agg(
        pl.col("step").mean(), *(pl.col(name).cast(pl.Float64).mean() for name in metrics)
    )
    parts = [_curve(by_seed, name) for name in metrics]
    return pl.concat(parts).sort("metric", "arm", "step", maintain_order=True)


def _bins(table: pl.DataFrame, num_bins: int) -> pl.Series:
    if table.is_empty():
        return pl.Series("bin", [], dtype=pl.Int64)
    step = table["step"].cast(pl.Float64)
    length = max(1.0, (step.max() + 1.0) / num_bins)  # pyright: ignore
    return (step / length).floor().cast(pl.Int64).alias("bin")


def _names(table: pl.DataFrame) -> list[str]:
    return [str(Arm(*key)) for key in table.select("rule", "retention_ratio").iter_rows()]


def _curve(by_seed: pl.DataFrame, metric: str) -> pl.DataFrame:
    value = pl.col(metric)
    return (
        by_seed.group_by("arm", "bin", maintain_order=True)
        .agg(
            pl.lit(metric).alias("metric"),
            pl.col("step").mean(),
            value.mean().alias("value"),
            value.min().alias("low"),
            value.max().alias("high"),
            value.count().cast(pl.Int64).alias("num_seeds"),
        )
        .select("arm", "metric", "step", "value", "low", "high", "num_seeds")
    )
