"""Texts that hold more than one value."""

import pytest

from tip_analysis.cli.option_values import parse_part, parse_switches
from tip_analysis.core.errors import OptionError


def test_switches_are_json_where_they_can_be() -> None:
    found = parse_switches(["enable_thinking=false", "level=3", "name=a=b", "empty=", 'list=["x"]'])
    assert found == {
        "enable_thinking": False,
        "level": 3,
        "name": "a=b",
        "empty": "",
        "list": ["x"],
    }


@pytest.mark.parametrize("pair", ["enable_thinking", "=true", ""])
def test_a_switch_without_name_or_value_is_refused(pair: str) -> None:
    with pytest.raises(OptionError, match="KEY=VALUE"):
        parse_switches([pair])


def test_a_part_counts_from_nought() -> None:
    assert parse_part("0/1") == (0, 1)
    assert parse_part("3/4") == (3, 4)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/4", "1/", "/4", "1/2/3"])
def test_other_parts_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="0 <= i < n"):
        parse_part(text)
