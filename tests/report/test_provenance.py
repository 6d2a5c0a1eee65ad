"""Time that several losses shared is counted once; time apart is added."""

import pytest

from tip_analysis.report.sections.provenance import time_taken


def _stage(began, finished, seconds):
    day = "2026-01-01T10:"
    ends = {"finished": f"{day}{finished}+00:00" if finished else None}
    return {"began": f"{day}{began}+00:00", "wall_time_s": seconds, **ends}


@pytest.mark.parametrize(
    ("stages", "seconds"),
    [
        ([("00:00", "00:21", 21.7), ("00:00", "00:21", 21.6)], 22.0),
        ([("00:00", "00:21", 21.7), ("00:21", "00:42", 21.0)], 42.7),
        ([("00:00", "00:00", 0.2), ("00:00", "00:00", 0.3)], 0.5),
        ([("00:00", "30:00", 5.0)], 5.0),
        ([("00:00", None, 4.0), ("00:00", None, 3.0)], 7.0),
        ([("05:00", "05:09", 10.0), ("00:00", "00:09", 10.0), ("05:00", "05:09", 10.0)], 20.0),
        ([], 0.0),
    ],
)
def test_time_is_what_the_clock_ran(stages, seconds):
    assert time_taken(_stage(*stage) for stage in stages) == pytest.approx(seconds)
