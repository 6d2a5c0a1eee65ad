"""Compiled kernels, kept on disk for other processes: in a folder of ours that nobody else can
write to.

Numba's cache is made of pickles and machine code, so whoever can write to it can run code here. It
is therefore used only where its folder belongs to this user and is closed to all others (0700), and
only files whose SHA-256 was noted when they were written are read: damaged ones are made again.
"""

import functools
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
from filelock import FileLock
from numba.core import config

from tip_analysis.core.atomic_files import file_hash, write_atomically
from tip_analysis.core.errors import StorageError

NOTES = "digests.json"
WAIT_S = 120
"""Seconds that a process waits for another one to compile, before it compiles for itself."""


def private_folder() -> Path | None:
    """`tip_analysis/numba` in the user's cache, made if need be; None where it cannot be trusted or
    made, and then nothing is kept."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base).absolute() / "tip_analysis" / "numba"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError):  # no home, no permission, no space
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if is_ours and not found.st_mode & 0o077 else None


def remove_damaged(folder: Path) -> None:
    """Remove whatever is not as it was noted."""
    found = _digests(folder)
    try:
        noted = json.loads((folder / NOTES).read_bytes())
    except (OSError, ValueError, RecursionError):
        noted = {}
    if found != noted:
        for path in folder.glob("[!.]*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def note(folder: Path) -> None:
    """Note the digests of all files, for the next process."""
    try:
        text = json.dumps(_digests(folder))
        write_atomically(folder / NOTES, lambda part: part.write_text(text, "utf-8"))
    except (OSError, StorageError):  # then the next process compiles again
        return


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): file_hash(path) for path in files if path.name != NOTES}


class KeptOnDisk:
    """A function that is compiled, or read from the cache, for each kind of arguments at the first
    call with them.

    One process at a time reads and writes the cache. What is kept is renewed when the function's
    file changes, but not when only the constants change that it takes from elsewhere.
    """

    def __init__(self, function: Callable[..., None], **options: Any) -> None:
        functools.update_wrapper(self, function)
        self._function, self._options = function, options
        self._ready: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._first = threading.Lock()

    def __call__(self, *arguments: Any) -> None:
        """Call the compiled function."""
        kind = tuple(getattr(each, "dtype", type(each)) for each in arguments)
        if (ready := self._ready.get(kind)) is not None:
            ready(*arguments)
            return
        with self._first:
            self._ready[kind] = self._load(arguments)

    def _load(self, arguments: Sequence[Any]) -> Callable[..., None]:
        """The function, compiled for such arguments and called once with them."""
        folder = private_folder()
        if folder is not None:
            try:
                with FileLock(folder / ".lock", timeout=WAIT_S):
                    remove_damaged(folder)
                    compiled = self._cached(folder)
                    compiled(*arguments)
                    note(folder)
                return compiled
            except (OSError, RuntimeError):  # no space, no permission, another's lock
                pass
        compiled = numba.njit(**self._options)(self._function)
        compiled(*arguments)
        return compiled

    def _cached(self, folder: Path) -> Callable[..., None]:
        """A new dispatcher, which looks for what it needs in `folder`."""
        before = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]
        config.CACHE_DIR = str(folder)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return numba.njit(cache=True, **self._options)(self._function)
        finally:
            config.CACHE_DIR = before  # pyright: ignore[reportAttributeAccessIssue]
