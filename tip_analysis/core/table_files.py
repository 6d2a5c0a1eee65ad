"""The shards of a table: which belong to it, and whether they hold what their stage wrote.

Checked before any number is made of a table, each fault named by file (and row):

- always: no shard besides those on record, none missing, one schema (the contract's) in all, as
  many rows as were written;
- where the table is small (`CHEAP_BYTES`), and everywhere under `--verify`: the hash of each shard,
  every row against the contract, keys over all shards, and ids against the shared vocabulary.

What was found sound is not checked again by the same process while the file stays as it is.
"""

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from tip_analysis.core.atomic_files import file_hash
from tip_analysis.core.contract_checks import first_fault
from tip_analysis.core.errors import RunError, SchemaError
from tip_analysis.core.record import COMMAND_OF_STAGE, SHARD_SUFFIX, Record, stage_of
from tip_analysis.core.schema import ALWAYS_THERE, LATER_COLUMNS, TABLES
from tip_analysis.core.streams import stderr_held
from tip_analysis.core.text import first_line

logger = logging.getLogger(__name__)

CHEAP_BYTES = 64 * 2**20
"""Size up to which a table is checked whole wherever it is read."""

_Stamp = tuple[str, int, int, int]
_sound: dict[_Stamp, pl.Schema] = {}
"""The columns of files whose footer is sound, by name and the file system's own marks."""
_whole: set[tuple[_Stamp, ...]] = set()
"""Tables that were checked whole."""


@dataclass(frozen=True)
class Shard:
    """One shard on record."""

    path: Path
    stage_key: str
    sha256: str
    num_rows: int

    @property
    def name(self) -> str:
        """As messages name it: the whole path."""
        return str(self.path)

    @property
    def again(self) -> str:
        """What to do about a fault."""
        stage = stage_of(self.stage_key)
        stage = COMMAND_OF_STAGE.get(stage, stage)
        return f"restore it, or run `{stage}` again, which makes it again"

    def stamp(self) -> _Stamp:
        """Changes when the file does."""
        found = self.path.stat()
        return str(self.path), found.st_ino, found.st_mtime_ns, found.st_size

    def is_altered(self) -> bool:
        """Whether its bytes are not those that were written."""
        return file_hash(self.path) != self.sha256


def scan(files: Sequence[Path]) -> pl.LazyFrame:
    """Parquet files as one lazy frame; a path is never a pattern."""
    return pl.scan_parquet(list(files), glob=False, hive_partitioning=False)


def scan_table(shards: "Sequence[Shard]", table: str) -> pl.LazyFrame:
    """Shards with sound footers as one lazy frame that has every column of its contract."""
    if table not in LATER_COLUMNS or all(_is_complete(shard, table) for shard in shards):
        return scan([shard.path for shard in shards])
    return pl.concat([with_later_columns(scan([shard.path]), table) for shard in shards])


def _is_complete(shard: "Shard", table: str) -> bool:
    return LATER_COLUMNS[table] <= set(_sound_columns(shard, table))


def with_later_columns(frame: pl.LazyFrame, table: str) -> pl.LazyFrame:
    """A table with the columns of its contract that came after it was written, as nulls."""
    present = frame.collect_schema().names()
    contract = TABLES[table].columns()
    missing = [name for name in contract if name in LATER_COLUMNS.get(table, ())]
    missing = [name for name in missing if name not in present]
    if not missing:
        return frame
    nulls = [pl.lit(None, contract[name].dtype).alias(name) for name in missing]
    others = [name for name in present if name not in contract]
    return frame.with_columns(nulls).select(*contract, *others)


def read(file: Path) -> pl.DataFrame:
    """One Parquet file; its path is never a pattern."""
    return pl.read_parquet(file, glob=False, hive_partitioning=False)


def shards_of(run: Path, record: Record, table: str) -> list[Shard]:
    """The shards of a table that are on record and in their place, in the order of their names.

    Raises:
        RunError: a shard lies there that is on no record, or one is missing of a finished stage
            that owns its table.
    """
    folder = run / table
    present = _files(folder, SHARD_SUFFIX.get(table, ".parquet"))
    known = {
        name: (key, entry, shard)
        for key, entry in record["stages"].items()
        if entry["table"] == table
        for name, shard in entry["shards"].items()
    }
    superseded = {
        Path(path).name for path in record.get("superseded", []) if path.startswith(f"{table}/")
    }
    if strangers := sorted(present - known.keys() - superseded):
        raise RunError(
            f"{folder / strangers[0]} is not on record in run.json, so nobody knows what it is:"
            " move it elsewhere"
        )
    for name, (key, entry, _) in sorted(known.items()):
        if name not in present and entry["finished"]:
            lost = (
                f"{folder / name} is on record but missing: restore it, or run `{stage_of(key)}`"
                " again, which makes it again"
            )
            if key == stage_of(key):
                raise RunError(lost)
            logger.warning("%s; its rows are left out", lost)  # others stand beside it
    return [
        Shard(folder / name, key, shard["sha256"], shard["num_rows"])
        for name, (key, _, shard) in sorted(known.items())
        if name in present
    ]


def _files(folder: Path, suffix: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise RunError(f"{folder} cannot be read: {error.strerror}") from error
    return {name for name in names if name.endswith(suffix) and not name.startswith(".")}


def check_footers(shards: Sequence[Shard], table: str) -> None:
    """Refuse shards that are no Parquet files, hold other columns than the contract says or than
    the first shard, or another number of rows than were written.

    Raises:
        RunError, SchemaError: names the shard and what is wrong.
    """
    later = LATER_COLUMNS.get(table, frozenset())
    columns = [
        pl.Schema(
            {name: of for name, of in _sound_columns(shard, table).items() if name not in later}
        )
        for shard in shards
    ]
    for shard, found in zip(shards, columns, strict=True):
        if found != columns[0]:
            raise SchemaError(
                f"{shard.name} has other columns than {shards[0].name}:"
                f" {_first_difference(columns[0], found)}; {shard.again}"
            )


def _sound_columns(shard: Shard, table: str) -> pl.Schema:
    with readable(shard):
        stamp = shard.stamp()
        if stamp in _sound:
            return _sound[stamp]
        if not stat.S_ISREG(shard.path.stat().st_mode):
            raise RunError(f"{shard.name} is no ordinary file: {shard.again}")
        frame = scan([shard.path])
        found = frame.collect_schema()
        _check_columns(found, table, shard)
        _check_height(frame.select(pl.len()).collect().item(), shard)
    _sound[stamp] = found
    return found


def _check_columns(found: pl.Schema, table: str, shard: Shard) -> None:
    for column, contract in TABLES[table].columns().items():
        if column not in found:
            if column in LATER_COLUMNS.get(table, ()):
                continue
            raise SchemaError(
                f"{shard.name}: the column {column!r} is missing; the table was written by another"
                " version"
            )
        if found[column] != contract.dtype:
            raise SchemaError(
                f"{shard.name}: column {column!r} should be {contract.dtype}, found {found[column]}"
            )


def _check_height(found: int, shard: Shard) -> None:
    if found != shard.num_rows:
        raise RunError(
            f"{shard.name} has {found} rows, but {shard.num_rows} were written: {shard.again}"
        )


def _first_difference(first: pl.Schema, found: pl.Schema) -> str:
    for name in [*first, *found]:
        if first.get(name) != found.get(name):
            return (
                f"{name!r} is {found.get(name, 'missing')} instead of {first.get(name, 'absent')}"
            )
    return "they stand in another order"


def check_whole(
    shards: Sequence[Shard],
    table: str,
    *,
    vocab_size: int | None = None,
    not_available: Sequence[str] | None = None,
    hashes: bool = True,
) -> None:
    """Read a table whole, and refuse what its stage cannot have written.

    Args:
        shards: all shards of the table, with sound footers.
        table: its name.
        vocab_size: |V|, where it is on record: no token id may reach it.
        not_available: of a token table: columns that the record says are null; others of
            `schema.ALWAYS_THERE` may not be, where the student wrote.
        hashes: refuse altered bytes too, even where rows are sound.

    Raises:
        RunError: a shard was altered.
        SchemaError: a row breaks the contract, or a key occurs twice; names file and row.
    """
    stamps = tuple(shard.stamp() for shard in shards)
    if stamps in _whole:
        return
    altered = {shard.path for shard in shards if shard.is_altered()}
    for shard in shards:
        _check_rows(shard, table, vocab_size, not_available)
        if hashes and shard.path in altered:
            raise RunError(
                f"{shard.name} was altered since it was written (its SHA-256 is not that on"
                f" record): {shard.again}"
            )
    _check_keys(shards, table)
    if not altered:
        _whole.add(stamps)


def _check_rows(
    shard: Shard, table: str, vocab_size: int | None, not_available: Sequence[str] | None
) -> None:
    with readable(shard):
        frame = with_later_columns(read(shard.path).lazy(), table).collect()
        fault = (
            first_fault(frame, TABLES[table])
            or _outside_vocabulary(frame, vocab_size)
            or _without_value(frame, not_available)
        )
    if fault is not None:
        raise SchemaError(f"{shard.name}, {fault}; {shard.again}")


def _outside_vocabulary(frame: pl.DataFrame, vocab_size: int | None) -> str | None:
    names = [name for name in frame.columns if name.endswith(("token_id", "token_ids", "topk_ids"))]
    for name in names if vocab_size is not None else ():
        of_lists = isinstance(frame.schema[name], pl.List)
        largest = frame[name].list.max() if of_lists else frame[name]
        rows = (largest >= vocab_size).fill_null(value=False).arg_true()
        if rows.len():
            return (
                f"row {rows[0]}: {name} holds {largest[rows[0]]}, outside the vocabulary of"
                f" {vocab_size} tokens"
            )
    return None


def _without_value(frame: pl.DataFrame, not_available: Sequence[str] | None) -> str | None:
    if not_available is None:
        return None
    written = frame["loss_mask"]
    for name in ALWAYS_THERE:
        rows = (written & frame[name].is_null()).arg_true()
        if name not in not_available and rows.len():
            return f"row {rows[0]}: {name} must not be null, unless the teacher is approximate"
    return None


def _check_keys(shards: Sequence[Shard], table: str) -> None:
    """Keys are unique within each shard by its rows' check; here over all shards."""
    keys = TABLES[table].primary_key()
    if not keys or len(shards) < 2:
        return
    frames = [
        scan([shard.path]).select(*keys, _shard=pl.lit(index), _row=pl.int_range(pl.len()))
        for index, shard in enumerate(shards)
    ]
    twice = pl.concat(frames).filter(~pl.struct(keys).is_first_distinct()).head(1).collect()
    if twice.height:
        shard = shards[twice["_shard"][0]]
        raise SchemaError(
            f"{shard.name}, row {twice['_row'][0]}: the key {twice.select(keys).row(0)} lies in"
            f" another shard already; {shard.again}"
        )


@contextmanager
def readable(shard: Shard) -> Iterator[None]:
    """Turn what goes wrong in reading a shard into one clear error. Polars panics at some files,
    and says so in many lines of its own."""
    with stderr_held() as dropped:
        try:
            yield
        except (RunError, SchemaError):
            raise
        except (pl.exceptions.PolarsError, OSError, ValueError, MemoryError) as error:
            raise RunError(
                f"{shard.name}: not readable as Parquet ({first_line(error)}); {shard.again}"
            ) from error
        except pl.exceptions.PanicException as error:  # pyright: ignore # no Exception
            dropped.append(True)
            raise RunError(f"{shard.name}: not readable as Parquet; {shard.again}") from error
