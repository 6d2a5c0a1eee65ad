"""What is asked of a table before it is written or used: its contract, whole or in part.

The contracts themselves: `schema` and `result_tables`. Reads and writes no files.
"""

import dataframely as dy
import polars as pl
from dataframely.exc import SchemaError as MissingColumnError
from dataframely.exc import ValidationError

from tip_analysis.core.errors import SchemaError
from tip_analysis.core.text import one_line


def polars_schema(schema: type[dy.Schema]) -> dict[str, pl.DataType]:
    """Column names and dtypes of a contract, as polars takes them."""
    return {name: column.dtype for name, column in schema.columns().items()}


def validate(frame: pl.DataFrame, schema: type[dy.Schema]) -> pl.DataFrame:
    """Check a table against its contract; columns are put in the contract's order.

    Raises:
        SchemaError: a column is missing, has another dtype, or breaks a rule; the message says
            which.
    """
    try:
        return schema.validate(frame)
    except (MissingColumnError, ValidationError) as error:
        reason = one_line(str(error).split("\n\nResolved plan", maxsplit=1)[0], 400)
        raise SchemaError(f"{schema.__name__}: {reason}") from error


_IN_WORDS = {
    "nan": "must not be NaN",
    "inf": "must be finite",
    "nullability": "must not be null",
    "primary_key": "must not occur twice",
    "min": "is below its range",
    "max": "is above its range",
    "min_exclusive": "is below its range",
    "min_length": "is too short",
}


def first_fault(frame: pl.DataFrame, schema: type[dy.Schema]) -> str | None:
    """The first row that breaks a contract, as `row 17: student_entropy must not be NaN, found
    nan`; None where all rows keep it.

    Args:
        frame: a table that has the contract's columns with their dtypes.
        schema: the contract.
    """
    sound, failure = schema.filter(frame)
    if not len(failure):
        return None
    frame = frame.select(sound.columns)
    kept, given = sound.hash_rows(), frame.hash_rows().head(sound.height)
    differ = (kept != given).arg_true()
    row = differ[0] if differ.len() else sound.height
    first = failure.details().row(0, named=True)
    broken = [name for name, verdict in first.items() if verdict == "invalid"]
    rule = min(broken, key=lambda name: not name.endswith("|nan"))  # NaN is above any range, too
    return f"row {row}: {_rule_in_words(rule, frame.row(row, named=True), schema)}"


def _rule_in_words(rule: str, row: dict[str, object], schema: type[dy.Schema]) -> str:
    column, _, kind = rule.partition("|")
    if rule == "primary_key":
        return f"the key {tuple(row[name] for name in schema.primary_key())} must not occur twice"
    if column not in row:
        return f"breaks the rule {rule.replace('_', ' ')!r}"
    return f"{column} {_IN_WORDS.get(kind, f'breaks its rule {kind!r}')}, found {row[column]!r:.80}"


def require_columns(frame: pl.LazyFrame, columns: list[str], purpose: str) -> None:
    """Say which columns are missing, before a query fails deep inside.

    Raises:
        SchemaError: a column that `purpose` needs is not there.
    """
    present = frame.collect_schema().names()
    if missing := [name for name in columns if name not in present]:
        raise SchemaError(
            f"{purpose} needs the column(s) {', '.join(missing)}; the table has"
            f" {', '.join(present)}"
        )
