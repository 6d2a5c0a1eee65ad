"""A run folder: atomic Parquet shards, validated reads, and `run.json`, the record of how each
table came to be.

Every file is complete or absent. A shard is written beside its place, hashed, entered in `run.json`
and only then renamed into its place, so that a process killed at any moment leaves no half-written
table, and a shard that lies in its place always has its hash on record. `run.json` is rewritten
under a file lock: array jobs may fill one run together.

A stage has an identity (its configuration and the hashes of its inputs). Stages that own their
table (`rollout`, `score`) refuse to go on under another identity; stages that add rows (`select`,
`gradients` …) keep one record for each.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock

from tip_analysis.core.atomic_files import (
    file_hash,
    first_line,
    remove_stale_parts,
    replacing,
    storage_errors,
    write_atomically,
)
from tip_analysis.core.errors import ConfigurationMismatchError, RunError, SchemaError
from tip_analysis.core.lazy_display import notebook_html
from tip_analysis.core.provenance import environment, now
from tip_analysis.core.schema import SCHEMA_VERSION, TABLES, validate

logger = logging.getLogger(__name__)

TABLE_OF_STAGE = {
    "rollout": "rollouts",
    "teacher": "teacher_states",
    "vocabulary": "vocabulary",
    "score": "tokens",
    "gradients": "gradients",
    "select": "masks",
    "ablate": "ablations",
    "evaluate": "evaluations",
}
"""The folder that each stage fills."""

COMMAND_OF_STAGE = {"teacher": "score --phase teacher", "vocabulary": "score"}
"""The command that does a stage, where it has another name."""

SHARD_SUFFIX = {"teacher_states": ".safetensors"}
"""How shards are called that are no Parquet files."""

BUILT_ON = {
    "rollout": ("teacher", "vocabulary", "score", "gradients", "select"),
    "score": ("vocabulary", "gradients", "select"),
}
"""Stages whose rows lose their meaning when a stage starts afresh."""


Record = dict[str, Any]


def open_run(path: str | Path) -> "Run":
    """Open an existing run folder.

    Raises:
        RunError: there is no run at `path`.
    """
    path = Path(path)
    if not (path / "run.json").is_file():
        found = "a folder without run.json" if path.is_dir() else "nothing"
        raise RunError(
            f"no run at {path}: expected a folder with run.json, found {found}; `tip-analysis"
            f" rollout {path} …` begins one"
        )
    return Run(path)


def create_run(path: str | Path) -> "Run":
    """Open the run folder at `path`, made if need be.

    Raises:
        StorageError: the folder cannot be made or written to.
        RunError: `path` is a folder with other things in it.
    """
    path = Path(path)
    with storage_errors(path):
        if path.is_dir() and not (path / "run.json").is_file() and any(path.glob("[!.]*")):
            raise RunError(
                f"{path} holds other files and is no run folder; name a new or empty folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        run = Run(path)
        if not run.record_path.is_file():
            with run.locked():
                _write_json(run.record_path, {"schema_version": SCHEMA_VERSION, "stages": {}})
    return run


class Run:
    """One run folder. Tables are read as lazy frames whose columns keep the contract of
    `tip_analysis.core.schema`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_path = path / "run.json"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {', '.join(self.stages()) or 'empty'})"

    def _repr_html_(self) -> str:
        return notebook_html(self)

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

    def evaluations(self) -> pl.LazyFrame:
        """One row per graded sample (`schema.EvaluationTable`)."""
        return self.table("evaluations")

    def has(self, table: str) -> bool:
        """Whether any shard of `table` lies in its place."""
        return bool(self._files(table))

    def table(self, name: str) -> pl.LazyFrame:
        """All rows of one table, in the order of its shards.

        Raises:
            RunError: the table is not there, or a shard is no readable Parquet file.
            SchemaError: a column is missing or has another dtype.
        """
        files = self._files(name)
        if not files:
            stage = next(stage for stage, table in TABLE_OF_STAGE.items() if table == name)
            stage = COMMAND_OF_STAGE.get(stage, stage)
            raise RunError(
                f"{self.path} has no {name} yet; `tip-analysis {stage} {self.path} …` makes them"
            )
        try:
            frame = pl.scan_parquet(files)
            found = frame.collect_schema()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise RunError(
                f"{self.path / name}: not readable as Parquet ({first_line(error)}); run the stage"
                " again"
            ) from error
        if name in TABLES:
            _check_dtypes(found, name, self.path)
        return frame

    def _files(self, table: str) -> list[Path]:
        return sorted((self.path / table).glob("*.parquet"))

    def record(self) -> Record:
        """`run.json` as it stands.

        Raises:
            RunError: it is not readable, or was written by a newer version.
        """
        try:
            record = json.loads(self.record_path.read_text("utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise RunError(f"{self.record_path} is not readable: {first_line(error)}") from error
        if record.get("schema_version", 0) > SCHEMA_VERSION:
            raise RunError(
                f"{self.record_path} has schema version {record['schema_version']}, newer than"
                f" {SCHEMA_VERSION}; update"
            )
        return record

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
            for stage in self.stages().values()
            if stage["table"] == name
            for shard_name, shard in stage["shards"].items()
        }
        return config_hash(shards)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock on `run.json`."""
        with FileLock(self.path / ".run.json.lock"):
            yield

    def update(self, change: Callable[[Record], None]) -> None:
        """Apply `change` to `run.json` under the lock.

        Raises:
            StorageError: it cannot be written.
        """
        with storage_errors(self.record_path), self.locked():
            record = self.record()
            change(record)
            _write_json(self.record_path, record)

    def begin(
        self,
        stage: str,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        additive: bool = False,
        key: Mapping[str, Any] | None = None,
    ) -> "Stage":
        """Begin a stage, or go on with it.

        Args:
            stage: a key of `TABLE_OF_STAGE`.
            config: what decides the numbers: part of the stage's identity.
            inputs: hashes of what is read: part of the identity too.
            settings: what may change between sessions (device, batch size): recorded only.
            overwrite: remove the stage's rows, and those built on them, first.
            additive: keep one record for each identity, instead of refusing another.
            key: what tells the records of an additive stage apart, where that is not the whole
                identity: under one key, another identity is refused.

        Raises:
            ConfigurationMismatchError: the stage was begun with another identity; says what
                differs.
            StorageError: the folder cannot be written to.
        """
        identity = _jsonable({"config": dict(config), "inputs": dict(inputs or {})})
        name = f"{stage}-{config_hash(key or identity)[:8]}" if additive or key else stage
        if overwrite:
            self.discard(name)
        table = TABLE_OF_STAGE[stage]
        with storage_errors(self.path / table):
            (self.path / table).mkdir(exist_ok=True)
            remove_stale_parts(self.path / table)
        begun = {
            "settings": _jsonable(dict(settings or {})),
            "environment": environment(),
            "finished": None,
        }

        def enter(
            record: Record,
        ) -> None:  # under the lock: another process may have begun, or added a shard, just now
            known = record["stages"].get(name)
            if (
                known is None or not known["shards"]
            ):  # nothing that another identity could be mixed with
                new = {
                    "table": table,
                    "began": now(),
                    "wall_time_s": 0.0,
                    "shards": {},
                    "summary": {},
                }
                record["stages"][name] = identity | new | begun
            elif differences := _differences(known, identity):
                raise ConfigurationMismatchError(
                    f"{self.path}: {stage} was begun with another configuration:"
                    f" {'; '.join(differences)}. Use the same options, another run folder, or"
                    " --overwrite to start afresh"
                )
            else:
                known |= begun

        self.update(enter)
        return Stage(self, name, table)

    def stage(self, key: str) -> "Stage":
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
        return Stage(self, key, record["table"])

    def discard(self, key: str) -> None:
        """Remove a stage's rows and record, and those of the stages that were built on it."""
        stage = key.split("-", maxsplit=1)[0]
        built_on = [
            k for k in self.stages() if k.split("-", maxsplit=1)[0] in BUILT_ON.get(stage, ())
        ]
        for name in [key, *built_on]:
            entry = self.stages().get(name)
            if entry is None:
                continue
            for shard in entry["shards"]:
                (self.path / entry["table"] / shard).unlink(missing_ok=True)
            self.update(lambda record, name=name: record["stages"].pop(name, None))
        if built_on:
            logger.warning("removed %s, which were built on the old %s", ", ".join(built_on), stage)


class Stage:
    """One stage at work: which shards are whole, and the way to add one."""

    def __init__(self, run: Run, key: str, table: str) -> None:
        self.run = run
        self.key = key
        self.table = table
        self._clock = time.monotonic()
        self._prefix = f"{key.split('-', 1)[1]}-" if "-" in key else ""

    def path(self, index: int) -> Path:
        """Where shard `index` lies."""
        suffix = SHARD_SUFFIX.get(self.table, ".parquet")
        return self.run.path / self.table / f"{self._prefix}part-{index:05d}{suffix}"

    def is_whole(self, index: int) -> bool:
        """Whether a shard is there and unchanged; an altered one is named in a warning and counts
        as absent."""
        path = self.path(index)
        known = self.run.stages()[self.key]["shards"].get(path.name)
        if known is None or not path.is_file():
            return False
        if file_hash(path) != known["sha256"]:
            logger.warning(
                "%s was truncated or altered since it was written: it is made again", path
            )
            return False
        return True

    def shards(self) -> list[Record]:
        """What is on record of each shard: `sha256`, `num_rows`, and the facts that came with
        it."""
        return list(self.run.stages()[self.key]["shards"].values())

    def missing(self, num_shards: int) -> list[int]:
        """Indices of the shards that are still to be made."""
        return [index for index in range(num_shards) if not self.is_whole(index)]

    def write(self, index: int, frame: pl.DataFrame, **facts: Any) -> Path:
        """Write one shard, whole or not at all; `facts` about it go on record with its hash.

        Raises:
            SchemaError: the rows break the table's contract.
            StorageError: no space, or no permission; what was there before is intact.
        """
        if self.table in TABLES:
            frame = validate(frame, TABLES[self.table])

        def write(part: Path) -> None:
            with part.open("wb") as file:
                frame.write_parquet(file)

        return self.write_file(index, write, num_rows=frame.height, **facts)

    def write_file(
        self, index: int, write: Callable[[Path], Any], *, num_rows: int, **facts: Any
    ) -> Path:
        """Let `write` make one shard beside its place, enter it in the record, and rename it into
        its place.

        Raises:
            StorageError: no space, or no permission; what was there before is intact.
        """
        path = self.path(index)
        with replacing(path) as part:
            write(part)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            entry = {"sha256": file_hash(part), "num_rows": num_rows, **_jsonable(facts)}
            self.run.update(
                lambda record: record["stages"][self.key]["shards"].update({path.name: entry})
            )
        return path

    def finish(self, **summary: Any) -> Record:
        """Record that every shard is there, with what the stage found (counts, tokens per second
        …); returns that summary."""

        def change(record: Record) -> None:
            entry = record["stages"][self.key]
            entry["finished"] = now()
            entry["wall_time_s"] = round(entry["wall_time_s"] + time.monotonic() - self._clock, 3)
            entry["summary"] = entry["summary"] | _jsonable(summary)

        self.run.update(change)
        return self.run.stages()[self.key]["summary"]


def config_hash(value: Any) -> str:
    """A short stable hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(_jsonable(value), sort_keys=True).encode()).hexdigest()[:16]


def _write_json(path: Path, record: Record) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, "utf-8"))


def _check_dtypes(found: pl.Schema, name: str, path: Path) -> None:
    for column, contract in TABLES[name].columns().items():
        if column not in found:
            raise SchemaError(
                f"{path / name}: the column {column!r} is missing; the table was written by another"
                " version"
            )
        if found[column] != contract.dtype:
            raise SchemaError(
                f"{path / name}: column {column!r} should be {contract.dtype}, found"
                f" {found[column]}"
            )


def _differences(known: Record, identity: Record) -> list[str]:
    """What differs between two identities, each as `option: old → new`."""
    old, new = (_flat(value["config"] | value["inputs"]) for value in (known, identity))
    return [
        f"{key}: {_brief(old.get(key))} → {_brief(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(record: Record, prefix: str = "") -> Record:
    """Nested records as one, with keys such as `teacher.name`."""
    flat: Record = {}
    for key, value in record.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _jsonable(value: Any) -> Any:
    """Through JSON and back, so that what is compared is what is stored."""
    return json.loads(json.dumps(value, default=str))
