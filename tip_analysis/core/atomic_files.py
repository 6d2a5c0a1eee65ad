"""Files that are complete or absent: written beside their place, then renamed into it.

Whoever is killed at any moment leaves a part file at most, which the next process of that machine
removes.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import psutil

from tip_analysis.core.errors import StorageError


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_of(path: Path) -> Path:
    """Where this process makes a file before it is renamed to `path`."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to make a file that takes its place at `path` when the block ends well.

    Raises:
        StorageError: no space, or no permission; what was there before is intact.
    """
    part = part_of(path)
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, then rename it into its place.

    Raises:
        StorageError: no space, or no permission; what was there before is intact.
    """
    with replacing(path) as part:
        write(part)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a full or closed disk into one clear error."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        free = shutil.disk_usage(_existing_parent(path)).free
        reason = error.strerror or first_line(error)
        raise StorageError(
            f"cannot write {path}: {reason} ({free / 1e9:.1f} GB free); what was there before is"
            " intact"
        ) from error
    except pl.exceptions.ComputeError as error:
        raise StorageError(
            f"cannot write {path}: {first_line(error)}; what was there before is intact"
        ) from error


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in [path, *path.absolute().parents] if parent.exists())


def remove_stale_parts(folder: Path) -> None:
    """Remove the part files of processes of this machine that are gone."""
    for part in folder.glob("*.part"):
        *_, host, pid, _ = part.name.rsplit(".", maxsplit=3)
        if host == socket.gethostname() and not (pid.isdigit() and psutil.pid_exists(int(pid))):
            part.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
