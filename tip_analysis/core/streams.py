"""Standard streams that are closed, full, or cannot encode what they are given."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


class OutputError(Exception):
    """Standard output cannot be written to; the operating system's error is the cause."""


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Say of errors in a block that only writes to stdout that they are stdout's.

    Raises:
        OutputError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(str(error)) from error


class Output:
    """`sys.stdout` as it is at the time, with errors that say whose they are."""

    def write(self, text: str) -> int:
        """Write a text."""
        with output_errors():
            return sys.stdout.write(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with output_errors():
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


class Remarks:
    """`sys.stderr` as it is at the time; that it cannot be written to stops nobody."""

    def write(self, text: str) -> int:
        """Write a text, if that is possible."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, if that is possible."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def silence(stream: Any) -> None:
    """Send what is still written to a stream nowhere, so that no later flush fails."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_standard_streams() -> None:
    """Give every closed standard stream a place, or files opened later would take its descriptor;
    spell out characters that a stream cannot encode."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, _open_nowhere(descriptor))
        if name != "stdin" and hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _open_nowhere(descriptor: int) -> Any:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    os.set_inheritable(descriptor, True)
    return os.fdopen(descriptor, "r" if descriptor == 0 else "w", encoding="utf-8", closefd=False)


@contextlib.contextmanager
def stderr_held() -> Iterator[list[bool]]:
    """Hold back what is written to descriptor 2 in a block, be it by libraries that are not
    Python's; it appears after the block unless something was put into the list."""
    dropped: list[bool] = []
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(tempfile.TemporaryFile())
            kept = os.dup(2)
        except OSError:  # a full disk, or no stderr: nothing is held back
            yield dropped
            return
        _flush_stderr()
        os.dup2(held.fileno(), 2)
        try:
            yield dropped
        finally:
            _flush_stderr()
            os.dup2(kept, 2)
            os.close(kept)
            if not dropped:
                _show(held.fileno())


def _show(descriptor: int) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with contextlib.suppress(OSError):
        while content := os.read(descriptor, 2**16):
            os.write(2, content)


def _flush_stderr() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
