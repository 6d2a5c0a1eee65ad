"""Files that are complete or absent: written beside their place, then renamed into it.

A file and its folder are synchronised with the disk, so that what was renamed survives a power cut
as well. Whoever is killed at any moment leaves a hidden part file at most, which the next process
of that machine removes.
"""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import psutil

from tip_analysis.core.errors import StorageError, TipAnalysisError
from tip_analysis.core.text import first_line

LONGEST_NAME = 255
"""Bytes that a file system allows the name of a file."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_of(path: Path) -> Path:
    """Where this process makes a file before it is renamed to `path`: hidden, beside its place."""
    owner = f".{socket.gethostname()}.{os.getpid()}-{_start_of(os.getpid())}.part"
    name = path.name
    if len(os.fsencode(f".{name}{owner}")) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return path.with_name(f".{name}{owner}")


@contextmanager
def replacing(path: Path, *, sweep: bool = True) -> Iterator[Path]:
    """Where to make a file that takes its place at `path` when the block ends well.

    Args:
        path: the file's place; its folder is made if need be.
        sweep: first remove the part files of processes that are gone, `path`'s whole folder over.

    Raises:
        StorageError: no space, or no permission; what was there before is intact.
    """
    with made_beside(path, sweep=sweep) as part:
        yield part
        sync(part)
        put_in_place(part, path)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a file that was made whole beside its place."""
    part.replace(path)
    sync(path.parent)


@contextmanager
def made_beside(path: Path, *, sweep: bool = True) -> Iterator[Path]:
    """Where to make a file beside its place; what is still there at the end is removed.

    Raises:
        StorageError: no space, or no permission; what was there before is intact.
    """
    part = part_of(path)
    try:
        with storage_errors(path):
            make_folder(path.parent)
            if sweep:
                remove_stale_parts(path.parent)
            yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def made_in_a_folder(part: Path) -> Iterator[Path]:
    """Where to make a part file by a library that puts files of its own beside it: in a hidden
    folder, which goes as part files go.

    Raises:
        OSError: no space, or no permission.
    """
    folder = part.with_name(f".in{part.name}")
    folder.mkdir()
    try:
        yield folder / "made"
        (folder / "made").replace(part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, then rename it into its place.

    Raises:
        StorageError: no space, or no permission; what was there before is intact.
    """
    with replacing(path) as part:
        write(part)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, for good: the entry in the folder above is synchronised."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of files, written to the disk itself.

    Raises:
        OSError: the disk reports an error for a file. Folders that cannot be synchronised (some
            network file systems) are left as they are.
    """
    is_folder = path.is_dir()
    try:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError:
        if not is_folder:
            raise


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a full or closed disk into one clear error."""
    try:
        yield
    except TipAnalysisError:  # some of them are OSErrors too
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise StorageError(
            f"cannot write {path}: {reason}{_free_space(path)}; what was there before is intact"
        ) from error
    except pl.exceptions.ComputeError as error:
        raise StorageError(
            f"cannot write {path}: {first_line(error)}; what was there before is intact"
        ) from error


def _free_space(path: Path) -> str:
    with suppress(OSError):
        parent = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
        return f" ({shutil.disk_usage(parent).free / 1e9:.1f} GB free)"
    return ""


def remove_stale_parts(folder: Path) -> None:
    """Remove the part files of processes of this machine that are gone."""
    owner = re.compile(rf"\..+\.{re.escape(socket.gethostname())}\.(\d+)-(\d+)\.part")
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = owner.fullmatch(entry.name)
            if match and not _is_alive(int(match[1]), int(match[2])):
                _remove(Path(entry.path))


def _remove(part: Path) -> None:
    with suppress(OSError):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink()


def _is_alive(pid: int, start: int) -> bool:
    """Whether the process that was `pid` then still runs: numbers are given again to others."""
    try:
        return abs(_start_of(pid) - start) <= 2
    except (psutil.Error, OverflowError):
        return False


def _start_of(pid: int) -> int:
    """When a process began, in seconds since 1970."""
    return _own_start(pid) if pid == os.getpid() else round(psutil.Process(pid).create_time())


@cache
def _own_start(pid: int) -> int:
    return round(psutil.Process(pid).create_time())
