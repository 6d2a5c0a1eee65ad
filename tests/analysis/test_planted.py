import polars as pl
import pytest

from tip_analysis.analysis.planted import planted_detection
from tip_analysis.core.errors import SchemaError

#       label            top-1  quadrant score
ROWS = [
    ("planted_error", 0.95, "Q3", 5.0),  # found
    ("planted_error", 0.90, "Q3", 4.0),  # found, just confident
    ("planted_error", 0.99, "Q4", 0.2),  # missed
    ("planted_error", 0.60, "Q1", 2.0),  # not confident: no matter for recall
    ("plain", 0.99, "Q3", 3.0),  # false alarm
    ("fork", 0.40, "Q2", 0.1),
    ("plain", 0.99, "Q4", 0.0),
    (None, None, None, None),  # not written by the student
]


def table(rows=ROWS):
    frame = pl.DataFrame(
        rows, schema=["planted_label", "student_top1_prob", "quadrant", "q3_score"], orient="row"
    )
    return frame.with_columns(
        pl.col("planted_label").cast(pl.Enum(["planted_error", "fork", "plain"])),
        pl.col("quadrant").cast(pl.Enum(["Q1", "Q2", "Q3", "Q4"])),
        loss_mask=pl.col("quadrant").is_not_null(),
    )


def test_by_hand():
    found = planted_detection(table()).row(0, named=True)
    assert found["num_tokens"] == 7
    assert (found["num_planted"], found["num_confident"], found["num_q3"]) == (4, 3, 3)
    assert found["q3_recall"] == pytest.approx(2 / 3)
    assert found["q3_precision"] == pytest.approx(2 / 3)
    # pairs (planted, other) in which the planted error scores higher: 5 and 4 beat all 3; 2.0 beats
    # 2; 0.2 beats 2
    assert found["auc"] == pytest.approx((3 + 3 + 2 + 2) / 12)


def test_a_share_of_nothing_is_null():
    found = planted_detection(
        table([("planted_error", 0.5, "Q1", 1.0), ("plain", 0.5, "Q2", 0.0)])
    ).row(0, named=True)
    assert found["q3_recall"] is None
    assert found["q3_precision"] is None


def test_without_planted_errors_there_is_nothing_to_find():
    found = planted_detection(table([("plain", 0.5, "Q1", 1.0)])).row(0, named=True)
    assert found["num_planted"] == 0
    assert found["q3_recall"] is None
    assert found["auc"] is None


def test_missing_columns_are_named():
    with pytest.raises(SchemaError, match="q3_score"):
        planted_detection(table().drop("q3_score"))
