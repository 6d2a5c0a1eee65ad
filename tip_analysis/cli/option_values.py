"""Values of options that hold more than one thing in a text."""

import json
from collections.abc import Sequence
from typing import Any

from tip_analysis.core.errors import OptionError


def parse_switches(pairs: Sequence[str], option: str = "--chat-template-kwargs") -> dict[str, Any]:
    """`KEY=VALUE` pairs as a mapping; a value that is JSON (true, 3 …) counts as such, any other as
    text.

    Raises:
        OptionError: a pair has no `=`.
    """
    switches = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise OptionError(f"{option} takes KEY=VALUE pairs, found {pair!r}")
        try:
            switches[key] = json.loads(value)
        except json.JSONDecodeError:
            switches[key] = value
    return switches


def parse_part(text: str) -> tuple[int, int]:
    """`i/n` of an array job, 0 <= i < n.

    Raises:
        OptionError: it is not of that form.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise OptionError(f"--shard takes i/n with 0 <= i < n, such as 0/4; found {text!r}")
    return int(index), int(count)
