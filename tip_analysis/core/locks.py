"""Locks that say who holds them, and the marks of processes that are at work in a run folder.

A lock goes with the process that holds it, however that ends. Whoever waits is told after
`SAY_AFTER` seconds who holds it, and gives up after `--lock-timeout` (the environment variable
`TIP_ANALYSIS_LOCK_TIMEOUT`, so that it reaches the processes that a command starts).
"""

import itertools
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tip_analysis.core.errors import LockedError, OptionError
from tip_analysis.core.provenance import now

logger = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "TIP_ANALYSIS_LOCK_TIMEOUT"
DEFAULT_TIMEOUT = 60.0
"""Seconds after which a waiting process gives up."""
SAY_AFTER = 5.0
"""Seconds after which a waiting process says whom it waits for."""

_count = itertools.count()
_sessions: set[str] = set()
"""What this process has taken part in, so that those who do the same are not in its way."""


def lock_timeout() -> float:
    """Seconds that this process waits for a lock.

    Raises:
        OptionError: the environment variable holds no number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    try:
        timeout = float(text)
    except ValueError:
        timeout = -1.0
    if not timeout >= 0:  # NaN too
        raise OptionError(
            f"--lock-timeout ({TIMEOUT_VARIABLE}) must be a number of seconds from 0, found"
            f" {text!r}"
        )
    return timeout


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; `what` says in messages what it guards.

    Raises:
        LockedError: another process held it for longer than `lock_timeout`.
    """
    lock = FileLock(path)

    def taken() -> str | None:
        with suppress(Timeout):
            lock.acquire(timeout=0.5, poll_interval=0.02)
            return None
        return holder_of(path)

    wait_until_free(taken, what)
    try:
        _sign(path)
        yield
    finally:
        lock.release()


def wait_until_free(holder: Callable[[], str | None], what: str) -> None:
    """Ask `holder` until it says that nobody is in the way.

    Raises:
        LockedError: somebody still is after `lock_timeout`.
    """
    start, said, timeout = time.monotonic(), False, lock_timeout()
    while (who := holder()) is not None:
        waited = time.monotonic() - start
        if waited >= timeout:
            raise LockedError(
                f"{what} is held by {who}: gave up after {timeout:g} s (--lock-timeout); wait for"
                " it, or stop that process"
            )
        if waited >= SAY_AFTER and not said:
            said = True
            logger.warning("waiting for %s, held by %s", what, who)
        time.sleep(0.05)


def holder_of(path: Path) -> str:
    """Who holds a lock file, in words."""
    return in_words(_read(path))


def in_words(holder: Mapping[str, Any]) -> str:
    """A holder as messages name it: process, machine, since when."""
    if "process" not in holder:
        return "another process"
    command = f" ({holder['command']})" if holder.get("command") else ""
    return (
        f"process {holder['process']} on {holder.get('host')}{command} since {holder.get('since')}"
    )


def myself() -> dict[str, Any]:
    """This process, as its locks name it."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]) if sys.argv else ""
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": now(),
        "command": command.encode("utf-8", "backslashreplace").decode()[:80],
    }


def _sign(path: Path, **about: Any) -> None:
    with suppress(OSError):  # a full disk; the lock is held all the same
        path.write_text(json.dumps(myself() | about), "utf-8")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would be waited for
        return {}
    try:
        holder = json.loads(path.read_bytes()[:65536])
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


class Mark:
    """The mark of a process at work: a file in `folder` that it holds locked until `end`, or until
    its own end."""

    def __init__(self, folder: Path, name: str, **about: Any) -> None:
        host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:40]
        self.path = folder / f"{name}.{host}.{os.getpid()}.{next(_count)}.lock"
        self._pid = os.getpid()
        self._lock = FileLock(self.path)
        self._lock.acquire(timeout=0)
        _sign(self.path, **about)
        _sessions.update(filter(None, [about.get("session")]))

    def end(self) -> None:
        """Take the mark away."""
        if os.getpid() == self._pid:  # a fork has inherited it, but does not hold it
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            self._lock.release()


def others_at_work(folder: Path) -> list[dict[str, Any]]:
    """What the marks of other processes say; marks of processes that are gone are removed."""
    me = (os.getpid(), socket.gethostname())
    found = []
    for path in sorted(_marks(folder)):
        about = _read(path)
        if (about.get("process"), about.get("host")) == me or about.get("session") in _sessions:
            continue
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            found.append(about)
        except OSError:
            continue
        else:
            path.unlink(missing_ok=True)
            lock.release()
    return found


def _marks(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".lock")]
    except OSError:
        return []
