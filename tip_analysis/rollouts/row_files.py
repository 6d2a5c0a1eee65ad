"""Rows of JSONL and Parquet files, each with the place that an error message should name.

JSONL is read line by line and Parquet batch by batch, so a large file is never held at once.
Pickles are never read.
"""

import json
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tip_analysis.core.errors import InputError
from tip_analysis.core.text import one_line

MAX_DEPTH = 100
"""How deeply lists and objects may be nested: far beyond any conversation, far below what readers
and writers of JSON can follow."""

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
    on_bad_row: Callable[[InputError], None] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a JSONL or Parquet file in order; blank lines are passed over.

    Args:
        path: The file; its extension says what it is.
        error: What to raise.
        on_partial_line: Called where the last line has no newline and is no JSON, as a writer that
            was killed leaves it; the line is then left out. Without it such a line is an error like
            any other.
        on_bad_row: Called in place of raising where a single row cannot be read, which is then left
            out; it may raise.

    Raises:
        InputError: (as `error`) no such file, an unknown extension, text that is not UTF-8, broken
            JSON, or a line that is no JSON object, with its number.
    """
    check_file(path, error=error)
    handle = on_bad_row or _raise
    if path.suffix.lower() in PARQUET_SUFFIXES:
        yield from _parquet_rows(path, error, handle)
    else:
        yield from _jsonl_rows(path, error, on_partial_line, handle)


def _raise(problem: InputError) -> None:
    raise problem


def check_file(
    path: Path, *, error: type[InputError] = InputError, also: Sequence[str] = ()
) -> None:
    """Refuse what cannot be read at all: a missing file, a folder, a pickle, or an unknown
    extension; `also` names further ones that a format has.

    Raises:
        InputError: (as `error`) with the extensions that are read.
    """
    suffixes = (*JSONL_SUFFIXES, *PARQUET_SUFFIXES, *also)
    known = ", ".join(suffixes)
    if is_folder(path, error=error):
        raise error(f"{path}: expected a file ({known}), found a folder")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise error(
            f"{path}: a pickle can run any code when it is opened, so it is never read; expected"
            f" {known}"
        )
    if path.suffix.lower() not in suffixes:
        found = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise error(f"{path}: expected one of the extensions {known}, found {found}")


def is_folder(path: Path, *, error: type[InputError] = InputError) -> bool:
    """Whether a path is a folder rather than a file.

    Raises:
        InputError: (as `error`) it is nothing, or nobody can tell: a name that is too long, a
            folder that may not be searched.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError as problem:
        raise error(f"{path}: no such file") from problem
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or one_line(str(problem))
        raise error(f"{one_line(str(path), 200)}: {reason}") from problem


def _jsonl_rows(
    path: Path,
    error: type[InputError],
    on_partial_line: Callable[[], None] | None,
    on_bad_row: Callable[[InputError], None],
) -> Iterator[Row]:
    for number, line in _lines(path, error):
        where = f"{path}, line {number}"
        text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
        if not text:
            continue
        try:
            values = json_value(text, where, error=error)
        except error as problem:
            if on_partial_line and not line.endswith(b"\n"):
                on_partial_line()
                return
            on_bad_row(problem)
            continue
        if not isinstance(values, dict):
            on_bad_row(error(f"{where}: expected a JSON object, found {type_name(values)}"))
            continue
        yield Row(where, {key: value for key, value in values.items() if value is not None})


def _lines(path: Path, error: type[InputError]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, as bytes: str.splitlines would also split at U+2028, which JSON
    strings may hold."""
    try:
        with path.open("rb") as lines:
            yield from enumerate(lines, start=1)
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}") from problem


def json_value(text: str | bytes, where: str, *, error: type[InputError]) -> Any:
    """What a JSON text from a stranger stands for.

    Raises:
        InputError: (as `error`) broken JSON, text that is not UTF-8 (half of a surrogate pair is
            none), or nesting beyond `MAX_DEPTH`.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text)
    except UnicodeDecodeError as problem:
        raise error(f"{where}: text that is not UTF-8") from problem
    except ValueError as problem:
        raise error(f"{where}: broken JSON ({problem})") from problem
    except RecursionError as problem:
        raise error(f"{where}: JSON that is nested too deeply") from problem
    may_be_deep = text.count("[") + text.count("{") > MAX_DEPTH
    may_be_halved = "\\ud" in text or "\\uD" in text  # UTF-8 itself holds no half of a pair
    if (may_be_deep or may_be_halved) and (fault := _fault(value)) is not None:
        raise error(f"{where}: {fault}")
    return value


def json_or_none(text: str) -> Any:
    """What a JSON text stands for; None where it is none."""
    try:
        return json_value(text, "", error=InputError)
    except InputError:
        return None


def is_json(value: Any) -> bool:
    """Whether JSON can hold a value; a Parquet file can bring bytes, dates and more."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _fault(value: Any, depth: int = 0) -> str | None:
    """What is wrong with a value wherever it stands: half characters, and nesting."""
    if isinstance(value, str):
        return None if _is_text(value) else f"half of a surrogate pair in {preview(value)}"
    if not isinstance(value, dict | list):
        return None
    if depth == MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} levels"
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return next((fault for item in items if (fault := _fault(item, depth + 1))), None)


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(
    path: Path, error: type[InputError], on_bad_row: Callable[[InputError], None]
) -> Iterator[Row]:
    index = 0
    try:
        with pq.ParquetFile(path) as file:
            if any(str(field.type).count("<") > MAX_DEPTH for field in file.schema_arrow):
                raise error(f"{path}: columns are nested deeper than {MAX_DEPTH} levels")
            for batch in file.iter_batches(batch_size=256):
                for row in range(batch.num_rows):
                    where, index = f"{path}, row {index}", index + 1
                    try:
                        values = batch.slice(row, 1).to_pylist()[0]
                    except UnicodeDecodeError:
                        on_bad_row(error(f"{where}: text that is not UTF-8"))
                        continue
                    except (ValueError, OverflowError) as problem:
                        on_bad_row(error(f"{where}: {one_line(str(problem), 200)}"))
                        continue
                    yield Row(where, _without_nulls(values))
    except error:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as problem:
        reason = one_line(str(problem), 200)
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
    return one_line(repr(value), length)


def field_names(values: Mapping[str, Any], length: int = 160) -> str:
    """The fields of a row for an error message: one line, cut to `length` characters."""
    return one_line(", ".join(map(str, values)), length) or "none"
