"""Gradients of a run by quadrant, as the figures take them: means side by side, and shares.

Asks a `RunView`, whose chooser says which measurement the numbers are from.
"""

from collections.abc import Mapping

import polars as pl

from tip_analysis.analysis.quadrant_tables import quadrant_statistics, widen
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.names import Loss
from tip_analysis.core.result_tables import QUANTITIES

DIVERGENCE = "divergence"
"""Stands for the divergence that a loss is the mean of."""
LOGIT_NORMS = {
    Loss.REVERSE_KL: "reverse_kl_logit_grad_norm",
    Loss.FORWARD_KL: "forward_kl_logit_grad_norm",
}
"""Columns of the norm of a loss's gradient over the logits."""


def gradient_statistics(view: RunView, loss: Loss | str) -> pl.DataFrame:
    """`quadrant_statistics` over the tokens whose gradient of `loss` was measured, one row per
    quadrant (`widen`)."""

    def compute(tokens: pl.LazyFrame, num_resamples: int) -> pl.DataFrame:
        return quadrant_statistics(
            tokens, num_resamples=num_resamples, taxonomy=view.options.taxonomy
        )

    return widen(
        view.with_intervals(
            view.measured(loss), compute, keys=["quadrant", "statistic"], names=["value"]
        )
    )


def gradient_profile(
    tables: Mapping[str, pl.DataFrame], measures: Mapping[str, str]
) -> pl.DataFrame:
    """Means by quadrant for each loss, a `QuadrantProfileTable`.

    Args:
        tables: loss -> its `gradient_statistics`.
        measures: column of the token table, or `DIVERGENCE` -> its name in words. A mean that a
            loss's table does not have is left out.
    """
    parts = []
    for loss, table in tables.items():
        for measure, name in measures.items():
            column = f"mean_{loss if measure == DIVERGENCE else measure}"
            if column in table.columns:
                parts.append(_means(table, column, loss, name))
    return pl.concat(parts)


def logit_profile(view: RunView, *, divergence: str, norm: str) -> pl.DataFrame:
    """Mean divergence and mean norm of the gradient over the logits, by quadrant, for both
    directions of the KL: a `QuadrantProfileTable`.

    Args:
        view: the run.
        divergence: name of the one in words.
        norm: name of the other.
    """
    table = widen(view.quadrant_means)
    parts = []
    for loss, column in LOGIT_NORMS.items():
        parts.append(_means(table, f"mean_{loss}", loss, divergence))
        parts.append(_means(table, f"mean_{column}", loss, norm))
    return pl.concat(parts)


def energy_shares(tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """What each quadrant has of the tokens, of Σ‖g‖² and of Σφ: an `EnergyShareTable`.

    Args:
        tables: loss -> its `gradient_statistics`.
    """
    parts = [
        table.select(
            pl.lit(loss).alias("loss"),
            pl.lit(quantity).alias("quantity"),
            pl.col("quadrant").cast(pl.String),
            *_ends("share" if quantity == "tokens" else f"share_{quantity}", "share"),
        )
        for loss, table in tables.items()
        for quantity in QUANTITIES
    ]
    return pl.concat(parts)


def _means(table: pl.DataFrame, column: str, loss: str, measure: str) -> pl.DataFrame:
    return table.select(
        pl.lit(loss).alias("loss"),
        pl.lit(measure).alias("measure"),
        pl.col("quadrant").cast(pl.String),
        *_ends(column, "value"),
    )


def _ends(column: str, name: str) -> list[pl.Expr]:
    tails = {"": name, "_low": "low", "_high": "high"}
    return [pl.col(f"{column}{tail}").alias(end) for tail, end in tails.items()]
