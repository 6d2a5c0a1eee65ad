"""A run folder: validated reads of its tables, and `run.json`, the record of how each came to be.

Every file is complete or absent (`tip_analysis.core.stages` says how shards are written), and
`run.json` is rewritten under a file lock: array jobs may fill one run together. A run folder from
elsewhere is not trusted: its record is checked when it is read (`tip_analysis.core.record`), its
tables before any number is made of them (`tip_analysis.core.table_files`), and nothing is deleted
but shards on record that lie in the run's own folders.

A stage has an identity (its configuration and the hashes of its inputs). Stages that own their
table (`rollout`, `score`) refuse to go on under another identity; stages that add rows (`select`,
`gradients` …) keep one record for each.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl

from tip_analysis.core.atomic_files import file_hash, make_folder, storage_errors
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.lazy_display import notebook_html
from tip_analysis.core.locks import locked
from tip_analysis.core.record import (
    COMMAND_OF_STAGE,
    TABLE_OF_STAGE,
    Record,
    config_hash,
    jsonable,
    read_record,
    stage_of,
    write_record,
)
from tip_analysis.core.schema import SCHEMA_VERSION, TABLES
from tip_analysis.core.stages import Stage, begin_stage, discard_rows, stage_on_record
from tip_analysis.core.table_files import (
    CHEAP_BYTES,
    Shard,
    check_footers,
    check_whole,
    scan_table,
    shards_of,
)

__all__ = ["Run", "RunLike", "Stage", "check_place", "create_run", "open_run"]


RunLike = str | os.PathLike[str]
"""A run, or where it lies: what every function that takes a run folder accepts."""


def open_run(path: RunLike, *, on_altered: str = "refuse") -> "Run":
    """Open an existing run folder; a run that is open already is given back as it is.

    Args:
        path: the folder.
        on_altered: `refuse` tables whose bytes are not those that were written, or `accept` them
            while their rows keep the contract (for readers that warn of it).

    Raises:
        RunError: there is no run at `path`.
    """
    if isinstance(path, Run):
        return path
    path = Path(path)
    try:
        is_run, is_folder = (path / "run.json").is_file(), path.is_dir()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    if not is_run:
        found = "a folder without run.json" if is_folder else "nothing"
        raise RunError(
            f"no run at {path}: expected a folder with run.json, found {found}; `tip-analysis"
            f" rollout {path} …` begins one"
        )
    return Run(path, on_altered=on_altered)


def create_run(path: RunLike) -> "Run":
    """Open the run folder at `path`, made if need be.

    Raises:
        StorageError: the folder cannot be made or written to.
        RunError: `path` is a folder with other things in it.
    """
    path = Path(path)
    with storage_errors(path):
        is_run = (path / "run.json").is_file()
        if not is_run and path.is_dir() and any(path.glob("[!.]*")):
            raise RunError(
                f"{path} holds other files and is no run folder; name a new or empty folder"
            )
        make_folder(path)
        run = Run(path)
        if not is_run:
            with run.locked():
                if not run.record_path.is_file():
                    run.write({"schema_version": SCHEMA_VERSION, "stages": {}})
    return run


def check_place(path: Path) -> None:
    """Refuse to write a file in the place of what a run folder holds.

    Raises:
        OptionError: it would replace the record of a run, or lie among its shards.
    """
    place = path.resolve()
    owned = {"run.json", *TABLE_OF_STAGE.values()}
    for parent in place.parents:
        first = place.relative_to(parent).parts[0]
        if (first in owned or first.startswith(".")) and (parent / "run.json").is_file():
            raise OptionError(
                f"{path} lies among the files of the run folder {parent}, which are the run's own;"
                " name another place"
            )


class Run:
    """One run folder. Tables are read as lazy frames whose columns keep the contract of
    `tip_analysis.core.schema`."""

    def __init__(self, path: Path, *, on_altered: str = "refuse") -> None:
        self.path = path
        self.record_path = path / "run.json"
        self._refuses_altered = on_altered == "refuse"
        self._known: tuple[tuple[int, ...], Record] | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {', '.join(self.stages()) or 'empty'})"

    def _repr_html_(self) -> str:
        return notebook_html(self)

    def __fspath__(self) -> str:
        return str(self.path)

    def rollouts(self) -> pl.LazyFrame:
        """One row per rollout (`schema.RolloutTable`)."""
        return self.table("rollouts")

    def vocabulary(self) -> pl.LazyFrame:
        """One row per token that both models share (`schema.VocabularyTable`)."""
        return self.table("vocabulary")

    def tokens(self) -> pl.LazyFrame:
        """One row per response token (`schema.TokenTable`)."""
        return self.table("tokens")

    def gradients(self) -> pl.LazyFrame:
        """One row per response token, loss, parameter scope, method and seed
        (`schema.GradientTable`)."""
        return self.table("gradients")

    def masks(self) -> pl.LazyFrame:
        """One row per selected token of each selection (`schema.MaskTable`)."""
        return self.table("masks")

    def ablations(self) -> pl.LazyFrame:
        """One row per arm, seed and evaluation."""
        return self.table("ablations")

    def dynamics(self) -> pl.LazyFrame:
        """One row per arm, seed and training step that was observed (`schema.DynamicsTable`)."""
        return self.table("dynamics")

    def evaluations(self) -> pl.LazyFrame:
        """One row per graded sample (`schema.EvaluationTable`)."""
        return self.table("evaluations")

    def has(self, table: str) -> bool:
        """Whether any shard of `table` lies in its place."""
        return bool(self._shards(table))

    def table(self, name: str) -> pl.LazyFrame:
        """All rows of one table, in the order of its shards.

        Raises:
            RunError: the table is not there, or a shard is missing, altered, on no record or no
                readable Parquet file.
            SchemaError: a column is missing or has another dtype, or a row breaks the contract.
        """
        shards = self._shards(name)
        if not shards:
            stage = next(stage for stage, table in TABLE_OF_STAGE.items() if table == name)
            stage = COMMAND_OF_STAGE.get(stage, stage)
            raise RunError(
                f"{self.path} has no {name} yet; `tip-analysis {stage} {self.path} …` makes them"
            )
        self._check_source(name)
        check_footers(shards, name)
        if sum(shard.path.stat().st_size for shard in shards) <= CHEAP_BYTES:
            self._check_whole(shards, name)
        return scan_table(shards, name)

    def _shards(self, table: str) -> list[Shard]:
        return shards_of(self.path, self.known(), table)

    def _check_whole(self, shards: Sequence[Shard], table: str) -> None:
        scored = self.known()["stages"].get("score", {}).get("config", {})
        check_whole(
            shards,
            table,
            vocab_size=self._vocab_size(table),
            not_available=scored.get("not_available", []) if table == "tokens" else None,
            hashes=self._refuses_altered,
        )

    def _vocab_size(self, table: str) -> int | None:
        """|V| of the ids in a table, where it is on record."""
        configs = {key: stage["config"] for key, stage in self.known()["stages"].items()}
        if table in ("tokens", "vocabulary"):
            return configs.get("score", {}).get("shared_vocabulary")
        student = configs.get("rollout", {}).get("student") if table == "rollouts" else None
        return student.get("vocab_size") if isinstance(student, dict) else None

    def _check_source(self, table: str) -> None:
        """Refuse rows that were made of other rollouts than those that lie here."""
        for key, stage in self.known()["stages"].items():
            source = stage["inputs"].get("rollouts") if stage["table"] == table else None
            if source is not None and source != self.table_hash("rollouts"):
                raise RunError(
                    f"{self.path}: {key} was made of other rollouts than those that are on record"
                    f" now: restore them, or run `{stage_of(key)}` again with --overwrite"
                )

    def verify(self) -> None:
        """Check every file on record against its hash, and every row of every table against its
        contract, whatever the size.

        Raises:
            RunError, SchemaError: names the first fault's file and row.
        """
        for table in TABLE_OF_STAGE.values():
            shards = self._shards(table)
            if table in TABLES and shards:
                self._check_source(table)
                check_footers(shards, table)
                self._check_whole(shards, table)
            elif altered := [shard for shard in shards if shard.is_altered()]:
                raise RunError(
                    f"{altered[0].name} was altered since it was written: {altered[0].again}"
                )

    def record(self) -> Record:
        """`run.json` as it stands, checked.

        Raises:
            RunError: it is not readable or damaged, or was written by a newer version.
        """
        return read_record(self.record_path)

    def known(self) -> Record:
        """The same, read again only where the file has changed; not to be changed by the caller."""
        with suppress(OSError):
            found = self.record_path.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if self._known is None or self._known[0] != stamp:
                self._known = stamp, self.record()
            return self._known[1]
        return self.record()

    def stages(self) -> dict[str, Record]:
        """The record of every stage begun so far, by key: `score`, `select-1f2e3d4c` …"""
        return self.record()["stages"]

    def altered_shards(self) -> list[str]:
        """Shards that are missing, or whose content is not what the stage wrote, as
        `tokens/part-00003.parquet`."""
        altered = []
        for stage in self.stages().values():
            for name, shard in stage["shards"].items():
                path = self.path / stage["table"] / name
                if not path.is_file() or file_hash(path) != shard["sha256"]:
                    altered.append(f"{stage['table']}/{name}")
        return altered

    def table_hash(self, name: str) -> str:
        """One hash for all shards of a table, from the hashes on record."""
        shards = {
            shard_name: shard["sha256"]
            for stage in self.known()["stages"].values()
            if stage["table"] == name
            for shard_name, shard in stage["shards"].items()
        }
        return config_hash(shards)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock on `run.json`.

        Raises:
            LockedError: another process holds it for longer than `--lock-timeout`.
        """
        with locked(self.path / ".run.json.lock", str(self.record_path)):
            yield

    def update(self, change: Callable[[Record], None]) -> None:
        """Apply `change` to `run.json` under the lock.

        Raises:
            StorageError: it cannot be written.
        """
        with storage_errors(self.record_path), self.locked():
            record = self.record()
            change(record)
            self.write(record)

    def write(self, record: Record) -> None:
        """Put `record` in place of `run.json`; the caller holds the lock."""
        write_record(self.record_path, record)

    def sweep(self) -> None:
        """Remove shards that were superseded, and then forget them."""
        if self.record().get("superseded"):
            self.update(self._remove_superseded)

    def _remove_superseded(self, record: Record) -> None:
        kept = {
            f"{stage['table']}/{name}"
            for stage in record["stages"].values()
            for name in stage["shards"]
        }
        for name in set(record.pop("superseded", [])) - kept:
            table, _, shard = name.partition("/")
            if not (self.path / table).is_symlink():  # a link leads out of the run
                (self.path / table / shard).unlink(missing_ok=True)

    def begin(
        self,
        stage: str,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        overwrite: bool | str = False,
        additive: bool = False,
        key: Mapping[str, Any] | None = None,
    ) -> Stage:
        """Begin a stage, or go on with it.

        Args:
            stage: a key of `TABLE_OF_STAGE`.
            config: what decides the numbers: part of the stage's identity.
            inputs: hashes of what is read: part of the identity too.
            settings: what may change between sessions (device, batch size): recorded only.
            overwrite: put new rows in place of the stage's own and of those built on them, once the
                first new shard is safe. A text names the session of several processes that do so
                together.
            additive: keep one record for each identity, instead of refusing another.
            key: what tells the records of an additive stage apart, where that is not the whole
                identity: under one key, another identity is refused.

        Raises:
            ConfigurationMismatchError: the stage was begun with another identity; says what
                differs.
            LockedError: another process reads what is to be replaced, or replaces what is read.
            StorageError: the folder cannot be written to.
        """
        identity = jsonable({"config": dict(config), "inputs": dict(inputs or {})})
        name = f"{stage}-{config_hash(key or identity)[:8]}" if additive or key else stage
        return begin_stage(
            self, stage, identity=identity, key=name, settings=settings or {}, overwrite=overwrite
        )

    def stage(self, key: str) -> Stage:
        """A stage that was begun.

        Raises:
            RunError: it was not.
        """
        record = self.stages().get(key)
        if record is None:
            raise RunError(
                f"{self.path}: {key} was not begun; there are"
                f" {', '.join(self.stages()) or 'no stages'}"
            )
        return stage_on_record(self, key, record)

    def discard(self, key: str, *, keep_record: bool = False) -> None:
        """Remove a stage's rows, and with its record those of the stages that were built on it.

        Args:
            key: of the stage's record.
            keep_record: keep on record how the rows were made, and that they were discarded.
        """
        discard_rows(self, key, keep_record=keep_record)
