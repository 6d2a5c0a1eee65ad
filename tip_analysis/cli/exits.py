"""How a command ends: one line on stderr and an exit status, whatever happened.

| status | what happened | on stderr |
| --- | --- | --- |
| 0 | done | nothing |
| 2 | input, options, or the machine (no permission, no space, no memory) | one line |
| 1 | a failure of ours | one line |
| 130 | Ctrl-C, at any moment | one line |
| 141 | the reader of our output is gone | nothing |

`--debug` shows the traceback as well. A standard stream that is closed is taken for one that nobody
reads; characters that a stream's encoding lacks are spelled out.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import InputError, TipAnalysisError
from tip_analysis.core.text import one_line

INPUT, OURS, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141

_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in (
        "EACCES EPERM ENOENT ENOTDIR EISDIR EEXIST ENOTEMPTY ENAMETOOLONG ELOOP EROFS ENOSPC EDQUOT"
        " EFBIG EMFILE ENFILE EIO ESTALE EBUSY ETXTBSY ENODEV ENXIO"
    ).split()
}
"""What the operating system says of files: never a failure of ours."""


def message(error: BaseException) -> str:
    """What an error says to the person at the terminal, in one line."""
    if is_out_of_memory(error):
        return (
            "memory ran out: a smaller --token-budget, shorter rollouts or --dtype bfloat16 take"
            f" less ({one_line(str(error), 120) or type(error).__name__})"
        )
    if isinstance(error, TipAnalysisError):
        return one_line(str(error))
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        where = one_line(str(error.filename), 200) + ": " if error.filename else ""
        return f"{where}{error.strerror}"
    said = one_line(str(error), 300)
    return (
        f"unexpected {type(error).__name__}{': ' if said else ''}{said} ({_place(error)}); this is"
        " a failure of tip_analysis, and --debug shows where it comes from"
    )


def status_of(error: BaseException) -> int:
    """The exit status that an error stands for."""
    of_the_machine = isinstance(error, OSError) and error.errno in _OF_THE_MACHINE
    if isinstance(error, InputError) or is_out_of_memory(error) or of_the_machine:
        return INPUT
    return OURS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or (as torch says it) on a device."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _place(error: BaseException) -> str:
    """Where in this package an error comes from, as far as its traceback reaches into it."""
    package = Path(__file__).parents[1]
    frames = [
        f"{Path(frame.filename).relative_to(package)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(package)
    ]
    return frames[-1] if frames else "outside the package"


@contextlib.contextmanager
def ending(*, debug: bool, own_process: bool) -> Iterator[None]:
    """Run a block and end as the module's table says; a block that ends well returns.

    Args:
        debug: show tracebacks.
        own_process: the block is all that this process does, so that signals, streams and library
            warnings are ours to set.
    """
    open_standard_streams()
    _log_in_lines(debug)
    if own_process and not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries: ours are log records
    with _interrupts(own_process) as interrupted:
        try:
            yield
            flush()
        except SystemExit:
            flush()
            raise
        except BaseException as error:
            _end(error, debug, interrupted=bool(interrupted))


def _end(error: BaseException, debug: bool, *, interrupted: bool) -> None:
    if debug:
        _say(traceback.format_exc())
    if interrupted or isinstance(error, KeyboardInterrupt):
        _say("interrupted; the same command goes on from here")
        sys.exit(INTERRUPTED)
    if isinstance(error, OSError):
        flush()  # raises SystemExit where it is the output that failed
    _say(f"error: {message(error)}")
    sys.exit(status_of(error))


def flush() -> None:
    """Write what is still to be written to stdout.

    Raises:
        SystemExit: the reader is gone, or there is no space.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        silence(sys.stdout)
        _say(f"error: cannot write to standard output: {error.strerror}; files are complete")
        sys.exit(INPUT)


def _say(text: str) -> None:
    """Write to stderr, if that is possible."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


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
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != descriptor:
                    os.dup2(nowhere, descriptor)
                    os.close(nowhere)
                os.set_inheritable(descriptor, True)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
        if name != "stdin" and hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Lines(logging.Formatter):
    """Every record is one line."""

    def __init__(self, debug: bool) -> None:
        super().__init__("%(levelname)s: %(message)s")
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        if self._debug:
            return super().format(record)
        record.exc_info = record.exc_text = record.stack_info = None
        return one_line(super().format(record))


def _log_in_lines(debug: bool) -> None:
    logging.raiseExceptions = debug  # a stderr that is full or gone is no reason to stop
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(debug))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


@contextlib.contextmanager
def _interrupts(own_process: bool) -> Iterator[list[int]]:
    """What Ctrl-C does: once, a KeyboardInterrupt that is remembered, since libraries can swallow
    it or turn it into an error of theirs; a second time, the end."""
    interrupted: list[int] = []
    if not own_process:
        yield interrupted
        return

    def interrupt(number: int, frame: Any) -> None:
        interrupted.append(number)
        sys.unraisablehook = lambda _: None
        if len(interrupted) > 1:
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
