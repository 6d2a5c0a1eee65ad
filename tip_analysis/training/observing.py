"""What the rollouts of an observed training step are like."""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.options import TrainingOptions
from tip_analysis.training.step_metrics import METRIC_COLUMNS, soft_or_overlap, step_metrics

OBSERVED_COLUMNS = METRIC_COLUMNS | {"topk_overlap"}
"""Statistics of the steps that are observed."""


def observed(
    rollouts: Sequence[Rollout], table: pl.LazyFrame, selected: np.ndarray, options: TrainingOptions
) -> dict[str, float | None]:
    """`step_metrics`, lengths and overlaps of a step, as `schema.DynamicsTable` has them; None for
    what is not known.

    Args:
        rollouts: those of the step.
        table: their written tokens, as `step_table` gives them of `OBSERVED_COLUMNS`.
        selected: [N] bool, the tokens that carry loss.
        options: rule, ratio, scope and cuts.
    """
    overlap = table.select(pl.col("topk_overlap").cast(pl.Float64).mean()).collect().item()
    found: dict[str, float | None] = {
        **step_metrics(table, selected, Taxonomy(**options.cuts)),
        "response_tokens": float(np.mean([len(rollout.response) for rollout in rollouts])),
        "truncated_share": _truncated_share(rollouts),
        "topk_overlap": float(overlap),
        "soft_or_overlap": soft_or_overlap(
            table,
            selected,
            retention_ratio=rule_of(options.rule).retention(options.retention_ratio),
            selection_scope=options.selection_scope,
        ),
    }
    return {
        name: None if value is None or math.isnan(value) else value for name, value in found.items()
    }


def _truncated_share(rollouts: Sequence[Rollout]) -> float | None:
    """Share of the responses that the length limit cut off; None where it is not known of each."""
    cut_off = [rollout.truncated for rollout in rollouts]
    known = [value for value in cut_off if value is not None]
    return float(np.mean(known)) if len(known) == len(cut_off) else None
