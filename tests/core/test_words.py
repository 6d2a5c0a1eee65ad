"""Numbers as words."""

import math

import pytest

from tip_analysis.core.words import (
    brief,
    count,
    duration,
    interval,
    listed,
    number,
    percent,
    plural,
    points,
    sentence,
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (percent(0.1234), "12.3%"),
        (percent(-0.5, 0), "−50%"),
        (percent(-0.00001), "0.0%"),
        (percent(math.nan), "–"),
        (points(0.0123), "+1.2"),
        (points(-0.1), "−10.0"),
        (points(None), "–"),
        (number(0.001234), "0.00123"),
        (number(-math.inf), "−∞"),
        (number(1234567.0), "1.23e+06"),
        (count(12345), "12,345"),
        (brief(999), "999"),
        (brief(1234), "1.2k"),
        (brief(2_500_000), "2.5M"),
        (interval(0.1, 0.2), "[10.0%, 20.0%]"),
        (interval(0.1, None), ""),
        (listed(["a", "b", "c"]), "a, b and c"),
        (plural(1, "token"), "1 token"),
        (plural(2000, "token"), "2,000 tokens"),
        (sentence("two runs"), "Two runs."),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 5 min"),
    ],
)
def test_numbers_read_well(words: str, expected: str) -> None:
    assert words == expected
