"""Rows of JSONL and Parquet files, each with the place that an error message should name.

JSONL is read line by line and Parquet batch by batch, so a large file is never held at once.
Pickles are never read.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tip_analysis.core.errors import InputError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
PICKLE_SUFFIXES = (".dp", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Row:
    """One object of a JSONL file or one row of a Parquet file."""

    where: str
    """`file.jsonl, line 3` (from 1) or `file.parquet, row 2` (from 0)."""
    values: dict[str, Any]
    """Its fields. Nulls are left out, at every depth of a Parquet row: Parquet fills them in for
    absent keys."""


def read_rows(
    path: Path,
    *,
    error: type[InputError] = InputError,
    on_partial_line: Callable[[], None] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a JSONL or Parquet file in order; blank lines are passed over.

    Args:
        path: The file; its extension says what it is.
        error: What to raise.
        on_partial_line: Called where the last line has no newline and is no JSON, as a writer that
            was killed leaves it; the line is then left out. Without it such a line is an error like
            any other.

    Raises:
        InputError: (as `error`) no such file, an unknown extension, text that is not UTF-8, broken
            JSON, or a line that is no JSON object, with its number.
    """
    check_file(path, error=error)
    if path.suffix.lower() in PARQUET_SUFFIXES:
        yield from _parquet_rows(path, error)
    else:
        yield from _jsonl_rows(path, error, on_partial_line)


def check_file(path: Path, *, error: type[InputError] = InputError) -> None:
    """Refuse what cannot be read at all: a missing file, a folder, a pickle, or an unknown
    extension.

    Raises:
        InputError: (as `error`) with the extensions that are read.
    """
    known = ", ".join(JSONL_SUFFIXES + PARQUET_SUFFIXES)
    if not path.exists():
        raise error(f"{path}: no such file")
    if path.is_dir():
        raise error(f"{path}: expected a file ({known}), found a folder")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise error(
            f"{path}: a pickle can run any code when it is opened, so it is never read; expected"
            f" {known}"
        )
    if path.suffix.lower() not in JSONL_SUFFIXES + PARQUET_SUFFIXES:
        found = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise error(f"{path}: expected one of the extensions {known}, found {found}")


def _jsonl_rows(
    path: Path, error: type[InputError], on_partial_line: Callable[[], None] | None
) -> Iterator[Row]:
    with path.open(
        "rb"
    ) as lines:  # bytes: str.splitlines would also split at U+2028, which JSON strings may hold
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if not text:
                continue
            try:
                values = json.loads(text.decode("utf-8"))
            except ValueError as problem:  # JSONDecodeError and UnicodeDecodeError
                if on_partial_line and not line.endswith(b"\n"):
                    on_partial_line()
                    return
                kind = (
                    "text that is not UTF-8"
                    if isinstance(problem, UnicodeDecodeError)
                    else f"broken JSON ({problem})"
                )
                raise error(f"{where}: {kind}") from problem
            except RecursionError as problem:
                raise error(f"{where}: JSON that is nested too deeply") from problem
            if not isinstance(values, dict):
                raise error(f"{where}: expected a JSON object, found {type_name(values)}")
            yield Row(where, {key: value for key, value in values.items() if value is not None})


def _parquet_rows(path: Path, error: type[InputError]) -> Iterator[Row]:
    index = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    yield Row(f"{path}, row {index}", _without_nulls(values))
                    index += 1
    except (pa.ArrowException, OSError) as problem:
        reason = str(problem).split("\n", maxsplit=1)[0]
        raise error(f"{path}: not a Parquet file that can be read ({reason})") from problem


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(item) for item in value]
    return value


def type_name(value: Any) -> str:
    """The type of a JSON value in the words of JSON."""
    names = {
        type(None): "null",
        bool: "a boolean",
        str: "a string",
        int: "a number",
        float: "a number",
        list: "a list",
    }
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def preview(value: Any, length: int = 60) -> str:
    """A value on one line, cut to `length` characters, for an error message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
