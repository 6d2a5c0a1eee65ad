"""How well quadrants and scores find the errors that were planted in the arithmetic student.

Only this pair has true labels (`planted_label`), which makes it a test of the taxonomy: a planted
error is a place where the student is wrong by design; those at which it is also confident should be
Q3.
"""

import polars as pl

from tip_analysis.analysis.correlations import auc
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.names import PlantedLabel, Quadrant

CONFIDENT = 0.9
"""A planted error counts as confident where the student's top-1 probability is at least this."""


def planted_detection(tokens: pl.LazyFrame | pl.DataFrame) -> pl.DataFrame:
    """One row: how many planted errors there are, and how Q3 and the Q3 score find them.

    Args:
        tokens: the token table with the columns of `add_scores` and `assign_quadrants`.

    Returns:
        num_tokens, num_planted, num_confident (planted, top-1 probability ≥ 0.9), num_q3, q3_recall
        (share of the confident planted errors that are in Q3), q3_precision (share of Q3 that is
        planted errors), auc (of the Q3 score, planted errors against all other tokens). A share of
        nothing is null, and so is the AUC without both kinds of token.

    Raises:
        SchemaError: a column is missing.
    """
    tokens = tokens.lazy()
    needed = ["planted_label", "loss_mask", "quadrant", "q3_score", "student_top1_prob"]
    require_columns(tokens, needed, "planted_detection")
    frame = tokens.filter("loss_mask").select(needed).collect()
    planted = (frame["planted_label"] == PlantedLabel.PLANTED_ERROR).fill_null(False)
    confident = planted & (frame["student_top1_prob"] >= CONFIDENT)
    in_q3 = frame["quadrant"] == Quadrant.Q3
    both_kinds = planted.any() and not planted.all()
    return pl.DataFrame(
        {
            "num_tokens": frame.height,
            "num_planted": int(planted.sum()),
            "num_confident": int(confident.sum()),
            "num_q3": int(in_q3.sum()),
            "q3_recall": _share(in_q3 & confident, confident),
            "q3_precision": _share(in_q3 & planted, in_q3),
            "auc": auc(frame["q3_score"].to_numpy(), planted.to_numpy()) if both_kinds else None,
        },
        schema_overrides={"q3_recall": pl.Float64, "q3_precision": pl.Float64, "auc": pl.Float64},
    )


def _share(part: pl.Series, whole: pl.Series) -> float | None:
    return int(part.sum()) / int(whole.sum()) if whole.any() else None
