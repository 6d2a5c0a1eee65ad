"""Bad files made from good ones: rows of JSON with strange values in strange places, and bytes that
a disk or an editor has spoiled. The same seed makes the same file."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

STRANGE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**30,
    1e308,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\n",
    "0",
    "nan",
    "²",
    "x" * 3000,
    "\x00",
    "\x1b[2J\x07",
    "\u202eabc",
    "\u2028",
    "[/b]:smile:",
    "{{ 7 * 7 }}{% raw %}",
    "../../x",
    "<|im_end|>",
    "a\ud800b",
    "\udcff",
    "\ufeff",
    "é" * 40,
    "🤷\u200d♀️",
    [],
    {},
    [[]],
    [None],
    [[[1]]],
    {"": None},
    {"role": "user"},
    [{"role": "assistant", "content": None}],
    {"a": {"b": [1, {"c": "d"}]}},
)
"""Values that some reader, somewhere, does not expect."""


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one thing in it changed."""
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value:
        return rng.choice(STRANGE)
    places = list(_places(value))
    holder, key = rng.choice(places)
    change = rng.choice(["replace", "replace", "replace", "remove", "rename", "wrap", "deepen"])
    if change == "remove" or (change == "rename" and isinstance(holder, list)):
        del holder[key]
    elif change == "rename":
        holder[rng.choice(["", "id", "\ud800", f"{key}_", key.upper()])] = holder.pop(key)
    elif change == "wrap":
        holder[key] = rng.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
    elif change == "deepen":
        deep: Any = holder[key]
        for _ in range(rng.choice([3, 20, 100])):
            deep = [deep] if rng.random() < 0.5 else {"d": deep}
        holder[key] = deep
    else:
        holder[key] = rng.choice(STRANGE)
    return value


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def json_lines(rows: Sequence[Any], rng: random.Random) -> bytes:
    """Rows as a JSONL file, in one of the ways in which such files are written."""
    ascii_only = rng.random() < 0.5
    ending = rng.choice(["\n", "\n", "\r\n", "\n\n"])
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = ending.join(lines) + rng.choice(["", ending])
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")


def spoil(content: bytes, rng: random.Random) -> bytes:
    """A file's content with some bytes changed, lost or put in."""
    content = bytearray(content)
    ways: list[Callable[[], None]] = [
        lambda: content.__delitem__(slice(rng.randrange(len(content) + 1), None)),
        lambda: content.__setitem__(rng.randrange(len(content)), rng.randrange(256)),
        lambda: content.__setitem__(rng.randrange(len(content)), rng.randrange(256)),
        lambda: _insert(content, rng, rng.randbytes(rng.choice([1, 4, 64]))),
        lambda: _insert(content, rng, rng.choice([b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3"])),
        lambda: _insert(
            content, rng, rng.choice([b"[", b'{"a":']) * rng.choice([10, 900, 100_000])
        ),
        lambda: _insert(content, rng, b"9" * 5000),
        lambda: _cut(content, rng),
    ]
    for _ in range(rng.choice([1, 1, 2, 8])):
        if content:
            rng.choice(ways)()
    return bytes(content)


def _insert(content: bytearray, rng: random.Random, piece: bytes) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = piece


def _cut(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice([1, 8, 200])]
