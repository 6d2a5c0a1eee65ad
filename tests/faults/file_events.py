"""What a process does to files, an event at a time; and what can go wrong at each.

Events are opening for writing, renaming, removing, making folders (Python's audit events), and
`os.fsync`, in or under one folder. The hook cannot be taken out again: use it in a process of its
own.
"""

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NAMED = {"os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,)}


def watch(folder: Path, at: Callable[[str], None]) -> None:
    """Call `at` before each file event under `folder`."""
    root = os.path.realpath(folder)

    def is_inside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return f"{os.path.realpath(os.fsdecode(path))}/".startswith(f"{root}/")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and is_inside(path):
                at(f"open {os.fsdecode(path)}")
        elif event in NAMED and any(is_inside(arguments[index]) for index in NAMED[event]):
            at(f"{event} {os.fsdecode(arguments[0])}")

    sys.addaudithook(hook)
    fsync = os.fsync

    def counted_fsync(number: int) -> None:
        at("fsync")
        fsync(number)

    os.fsync = counted_fsync


class Counter:
    """Counts events and does something at one of them."""

    def __init__(self, target: int | None = None, act: Callable[[], None] = lambda: None) -> None:
        self.names: list[str] = []
        self._target, self._act = target, act

    def __call__(self, name: str) -> None:
        """One more event."""
        self.names.append(name)
        if len(self.names) - 1 == self._target:
            self._act()


def kill() -> None:
    """Kill -9 this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """What the operating system says of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die_in_writing(num_bytes: int) -> None:
    """From here on, a file that grows beyond `num_bytes` kills this process in the middle of the
    write, whoever writes: Python, Polars or safetensors."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
