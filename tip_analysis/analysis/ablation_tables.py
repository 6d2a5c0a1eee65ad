"""The arms of an ablation as they are compared: at their last step, under one configuration.

Reads rows of `tip_analysis.core.schema.AblationTable`; writes nothing.
"""

import polars as pl

from tip_analysis.analysis.arms import ALL, UNTRAINED, Arm
from tip_analysis.analysis.claims import paired_difference

CONFIGURATION = (
    "mode",
    "loss",
    "loss_normalizer",
    "loss_aggregation",
    "selection_scope",
    "num_steps",
)
"""Arms are compared only under one of each."""


def final_arms(table: pl.DataFrame) -> pl.DataFrame:
    """Rows of trained arms at their last step, under the configuration that most rows have; without
    the untrained student."""
    trained = table.filter(
        ~Arm(UNTRAINED).rows(), pl.col("step") == pl.col("num_steps"), pl.col("step") > 0
    )
    if trained.is_empty():
        return trained
    most = (
        trained.group_by(CONFIGURATION)
        .len()
        .sort("len", *CONFIGURATION, descending=[True] + [False] * len(CONFIGURATION))
    )
    return trained.join(
        most.head(1).drop("len"), on=CONFIGURATION, how="semi", maintain_order="left"
    )


def differences_from_all(arms: pl.DataFrame) -> pl.DataFrame:
    """Each arm's accuracy minus that of `all` on the same seeds: rule, retention_ratio, difference,
    low, high."""
    everything = arms.filter(ALL.rows())
    rows = []
    for (rule, ratio), part in arms.filter(~ALL.rows()).group_by(
        "rule", "retention_ratio", maintain_order=True
    ):
        difference, low, high, _ = paired_difference(part, everything, "accuracy")
        rows.append((rule, ratio, difference, low, high))
    schema = {
        "rule": pl.String,
        **dict.fromkeys(("retention_ratio", "difference", "low", "high"), pl.Float64),
    }
    return pl.DataFrame(rows, schema=schema, orient="row").drop_nulls("difference")
