"""One stage at work in a run folder: begun, filled shard by shard, finished, or started afresh.

A shard is written beside its place, hashed, entered in `run.json` and only then renamed into its
place, so that a shard that lies in its place always has its hash on record. A stage that starts
afresh (`--overwrite`) leaves the old rows alone until its own first shard is safe: new shards carry
the number of their generation in their names, and one change of `run.json` puts them in place of
the old ones, which are removed after that.

A process at work leaves a locked mark in `.working/`: nobody replaces what another one is reading.
"""

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import polars as pl

from tip_analysis.core import locks
from tip_analysis.core.atomic_files import (
    file_hash,
    made_beside,
    make_folder,
    put_in_place,
    remove_stale_parts,
    storage_errors,
    sync,
)
from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import ConfigurationMismatchError, RunError
from tip_analysis.core.provenance import environment, now
from tip_analysis.core.record import (
    BUILT_ON,
    SHARD_SUFFIX,
    TABLE_OF_STAGE,
    Record,
    config_hash,
    differences,
    jsonable,
    stage_of,
)
from tip_analysis.core.schema import TABLES

logger = logging.getLogger(__name__)


class RecordedFolder(Protocol):
    """What a stage needs of its run folder (`run_folder.Run`): where it lies, and its record."""

    path: Path
    record_path: Path

    def record(self) -> Record:
        """`run.json` as it stands."""
        ...

    def known(self) -> Record:
        """The same, read again only where it has changed."""
        ...

    def stages(self) -> dict[str, Record]:
        """The record of every stage begun so far."""
        ...

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock on the record."""
        ...

    def update(self, change: Callable[[Record], None]) -> None:
        """Apply `change` to the record under the lock."""
        ...

    def write(self, record: Record) -> None:
        """Replace the record, whole or not at all."""
        ...

    def sweep(self) -> None:
        """Remove the shards that others have taken the place of."""
        ...


WORKING = ".working"
"""Where processes at work leave their marks."""


@dataclass(frozen=True)
class _Begin:
    """What a stage is begun with."""

    stage: str
    key: str
    identity: Record
    settings: Record
    session: str | None
    """What the shards of one `--overwrite` have in common; None where nothing is overwritten."""

    def entry(self, known: Record | None) -> Record:
        """A record without shards."""
        generation = 0 if known is None else known.get("generation", 0) + (self.session is not None)
        entry = self.identity | {
            "table": TABLE_OF_STAGE[self.stage],
            "began": now(),
            "wall_time_s": 0.0,
            "shards": {},
            "summary": {},
        }
        entry |= {"generation": generation} if generation else {}
        entry |= {"session": self.session} if self.session else {}
        return entry | self.now()

    def now(self) -> Record:
        """What every session that writes a shard puts on record."""
        return {"settings": self.settings, "environment": environment(), "finished": None}

    def mark(self, folder: Path) -> locks.Mark:
        """The mark of this process at work."""
        return locks.Mark(
            folder,
            self.key,
            stage=self.stage,
            key=self.key,
            session=self.session,
            identity=config_hash(self.identity),
        )


def begin_stage(
    run: RecordedFolder,
    stage: str,
    *,
    identity: Record,
    key: str,
    settings: Mapping[str, Any],
    overwrite: bool | str,
) -> "Stage":
    """See `Run.begin`."""
    session = (overwrite if isinstance(overwrite, str) else uuid4().hex) if overwrite else None
    wanted = _Begin(stage, key, identity, jsonable(dict(settings)), session)
    table = run.path / TABLE_OF_STAGE[stage]
    with storage_errors(table):
        for name in (table.name, WORKING):
            own_folder(run.path, name)
        remove_stale_parts(table)
        remove_stale_parts(run.path)
    run.sweep()
    begun: list[Stage] = []

    def attempt() -> str | None:
        with storage_errors(run.path), run.locked():
            others = locks.others_at_work(run.path / WORKING)
            if (one := _in_the_way(others, wanted)) is not None:
                return one
            begun.append(_enter(run, _joined(others, wanted)))
        return None

    locks.wait_until_free(attempt, f"{run.path}: {stage}")
    return begun[0]


def own_folder(run: Path, name: str) -> Path:
    """A folder of the run, made if need be; a link is refused, since it leads out of the run.

    Raises:
        RunError: it is a link or a file.
    """
    folder = run / name
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunError(
            f"{folder} must be a folder of the run itself, found"
            f" {'a link' if folder.is_symlink() else 'a file'}: move it elsewhere"
        )
    make_folder(folder)
    return folder


def _in_the_way(others: Sequence[Record], wanted: _Begin) -> str | None:
    """Who reads what is to be replaced, or replaces what is to be read; None if nobody."""
    for mark in others:
        theirs, replaces = str(mark.get("stage")), bool(mark.get("session"))
        same = mark.get("key") == wanted.key
        alike = same and mark.get("identity") == config_hash(wanted.identity)
        if alike and replaces == bool(wanted.session):
            continue  # they fill one table together
        mine = wanted.session and (same or theirs in BUILT_ON.get(wanted.stage, ()))
        if mine or (replaces and (same or wanted.stage in BUILT_ON.get(theirs, ()))):
            doing = "replacing" if replaces else "at work on"
            return f"{locks.in_words(mark)}, {doing} `{theirs}`"
    return None


def _joined(others: Sequence[Record], wanted: _Begin) -> _Begin:
    """The same, in the session of another process that overwrites under the same identity."""
    for mark in others if wanted.session else ():
        session = mark.get("session")
        if mark.get("key") == wanted.key and isinstance(session, str):
            return replace(wanted, session=session)
    return wanted


def _enter(run: RecordedFolder, wanted: _Begin) -> "Stage":
    """Under the lock: put the stage on record, or leave that to its first shard where old rows must
    stay until then."""
    record = run.record()
    known = record["stages"].get(wanted.key)
    mark = wanted.mark(run.path / WORKING)
    if wanted.session is not None and _is_replaced(record, wanted):
        return Stage(run, wanted, pending=wanted.entry(known), mark=mark)
    if known is None or _is_empty(known):  # nothing that another identity could be mixed with
        record["stages"][wanted.key] = wanted.entry(known)
        run.write(record)
    elif different := differences(known, wanted.identity):
        mark.end()
        raise ConfigurationMismatchError(
            f"{run.path}: {wanted.stage} was begun with another configuration:"
            f" {'; '.join(different)}. Use the same options, another run folder, or"
            " --overwrite to start afresh"
        )
    return Stage(run, wanted, mark=mark)


def _is_empty(entry: Record) -> bool:
    return not entry["shards"] and (not entry["finished"] or "discarded" in entry)


def _is_replaced(record: Record, wanted: _Begin) -> bool:
    """Whether rows are there that a new start must remove."""
    known = record["stages"].get(wanted.key)
    if known is not None and known.get("session") == wanted.session:
        return False
    return known is not None or bool(_built_on(record, wanted.stage))


def _built_on(record: Record, stage: str) -> list[str]:
    return [key for key in record["stages"] if stage_of(key) in BUILT_ON.get(stage, ())]


def stage_on_record(run: RecordedFolder, key: str, entry: Record) -> "Stage":
    """A stage that was begun by whomever, to be read or finished."""
    identity = {name: entry[name] for name in ("config", "inputs")}
    return Stage(run, _Begin(stage_of(key), key, identity, entry["settings"], None))


class Stage:
    """One stage at work: which shards are whole, and the way to add one."""

    def __init__(
        self,
        run: RecordedFolder,
        begun: _Begin,
        *,
        pending: Record | None = None,
        mark: locks.Mark | None = None,
    ) -> None:
        self.run = run
        self.key = begun.key
        self.table = TABLE_OF_STAGE[begun.stage]
        self._begun = begun
        self._pending = pending
        """The record that takes the place of the old one with the first shard."""
        self._clock = time.monotonic()
        self._prefix = f"{self.key.split('-', 1)[1]}-" if "-" in self.key else ""
        entry = self.entry()
        self._generation, self._session = entry.get("generation", 0), entry.get("session")
        self._end = (lambda: None) if mark is None else weakref.finalize(self, mark.end)

    def entry(self) -> Record:
        """The stage's record as it stands.

        Raises:
            RunError: another process has removed it.
        """
        entry = self._pending or self.run.known()["stages"].get(self.key)
        if entry is None:
            raise self._gone()
        return entry

    def _gone(self) -> RunError:
        return RunError(
            f"{self.run.path}: another process has started {self.key} afresh; run this again if"
            " its rows are wanted"
        )

    @property
    def config(self) -> Record:
        """What decides the stage's numbers."""
        return self.entry()["config"]

    @property
    def is_finished(self) -> bool:
        """Whether `finish` was reached, now or before, and no shard was made since."""
        return bool(self.entry()["finished"])

    def path(self, index: int) -> Path:
        """Where shard `index` lies."""
        suffix = SHARD_SUFFIX.get(self.table, ".parquet")
        generation = f".g{self._generation}" if self._generation else ""
        return self.run.path / self.table / f"{self._prefix}part-{index:05d}{generation}{suffix}"

    def is_whole(self, index: int) -> bool:
        """Whether a shard is there and unchanged; an altered one is named in a warning and counts
        as absent."""
        path = self.path(index)
        known = self.entry()["shards"].get(path.name)
        if known is None or not path.is_file():
            return False
        if file_hash(path) != known["sha256"]:
            logger.warning(
                "%s was truncated or altered since it was written: it is made again", path
            )
            return False
        return True

    def missing(self, count: int) -> list[int]:
        """Those of the first `count` shards that are not whole."""
        return [index for index in range(count) if not self.is_whole(index)]

    def shards(self) -> list[Record]:
        """What is on record of each shard, in the order of their names."""
        return [shard for _, shard in sorted(self.entry()["shards"].items())]

    def write(self, index: int, frame: pl.DataFrame, **facts: Any) -> Path:
        """Validate and write one shard, with facts about it for the record.

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
        own_folder(self.run.path, self.table)
        with made_beside(path, sweep=False) as part:
            write(part)
            entry = {"sha256": file_hash(part), "num_rows": num_rows, **jsonable(facts)}
            sync(part)
            if self._pending is None:
                self._update(lambda stage: self._add(stage, {path.name: entry}))
                put_in_place(part, path)
            else:
                self._replace({path.name: entry}, lambda: put_in_place(part, path))
        return path

    def _update(self, change: Callable[[Record], None]) -> None:
        """Change this stage's own record."""

        def checked(record: Record) -> None:
            entry = record["stages"].get(self.key)
            if entry is None or entry.get("session") != self._session:
                raise self._gone()
            change(entry)

        self.run.update(checked)

    def _add(self, entry: Record, shards: Record) -> None:
        entry["shards"].update(shards)
        entry.update(self._begun.now())
        entry.pop("discarded", None)

    def _replace(self, shards: Record, put: Callable[[], None] = lambda: None) -> None:
        """Put this stage's record, with its first shard, in place of the old one and of all that
        was built on it.

        The shard is announced before it is put in its place, so that whoever comes after a kill
        in between knows it for a leftover.
        """
        run = self.run
        with storage_errors(run.record_path), run.locked():
            record = run.record()
            run.write(_superseding(record, [f"{self.table}/{name}" for name in shards]))
            put()
            built_on = _built_on(record, self._begun.stage)
            self._swap(record, built_on, shards)
            run.write(record)
        self._pending = None
        run.sweep()
        if built_on:
            names = ", ".join(built_on)
            logger.warning("removed %s, built on the old %s", names, self._begun.stage)

    def _swap(self, record: Record, built_on: Sequence[str], shards: Record) -> None:
        known = record["stages"].get(self.key, {})
        if known.get("session") == self._session:  # another process of this session was first
            self._add(known, shards)
            return
        for key in [self.key, *built_on]:
            _retire(record, key)
        record["stages"][self.key] = (self._pending or {}) | {"shards": shards}

    def finish(self, **summary: Any) -> Record:
        """Record that every shard is there, with what the stage found (counts, tokens per second
        …); returns that summary. A stage that was finished before and wrote nothing since stays as
        it is."""
        if self._pending is not None:
            self._replace({})
        if not self.is_finished:
            self._update(lambda entry: self._close(entry, summary))
        self._end()
        return self.run.stages()[self.key]["summary"]

    def _close(self, entry: Record, summary: Record) -> None:
        entry["finished"] = now()
        entry["wall_time_s"] = round(entry["wall_time_s"] + time.monotonic() - self._clock, 3)
        entry["summary"] = entry["summary"] | jsonable(summary)


def _superseding(record: Record, paths: Sequence[str]) -> Record:
    """The record with more files that are to be removed."""
    if not paths:
        return record
    return record | {"superseded": sorted({*record.get("superseded", []), *paths})}


def _retire(record: Record, key: str) -> None:
    """Take a stage off the record; its files are superseded."""
    entry = record["stages"].pop(key, None)
    if entry is not None:
        record |= _superseding(record, [f"{entry['table']}/{name}" for name in entry["shards"]])


def discard_rows(run: RecordedFolder, key: str, *, keep_record: bool = False) -> None:
    """Remove a stage's rows, and with its record those of the stages that were built on it.

    Args:
        run: the run folder.
        key: of the stage's record.
        keep_record: keep on record how the rows were made, and that they were discarded.
    """

    def retire(record: Record) -> None:
        for name in [key, *([] if keep_record else _built_on(record, stage_of(key)))]:
            entry = record["stages"].get(name)
            _retire(record, name)
            if keep_record and entry is not None:
                record["stages"][name] = entry | {"shards": {}, "discarded": now()}

    run.update(retire)
    run.sweep()
