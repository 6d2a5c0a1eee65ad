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
from typing import Any, NoReturn

from tip_analysis.core.errors import InputError, TipAnalysisError
from tip_analysis.core.streams import OutputError, open_standard_streams, output_errors, silence
from tip_analysis.core.text import one_line

INPUT, OURS, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141

_OF_THE_MACHINE = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.EBUSY,
    errno.ENXIO,
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
    if _is_panic(error):
        return f"a file is damaged ({one_line(str(error), 200)}); --verify names it"
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
    at_fault = isinstance(error, InputError) or is_out_of_memory(error) or _is_panic(error)
    if at_fault or of_the_machine:
        return INPUT
    return OURS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or (as torch says it) on a device."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
    )


def _is_panic(error: BaseException) -> bool:
    """Whether Polars gave up over bytes that were written by nobody."""
    return type(error).__name__ == "PanicException"


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
            with _flushing():
                yield
        except SystemExit:
            raise
        except BaseException as error:
            _end(error, debug, interrupted=bool(interrupted))


@contextlib.contextmanager
def _flushing() -> Iterator[None]:
    """Write all of stdout before the block is over, be it by `SystemExit`."""
    try:
        yield
    except SystemExit:
        with output_errors():
            sys.stdout.flush()
        raise
    with output_errors():
        sys.stdout.flush()


def _end(error: BaseException, debug: bool, *, interrupted: bool) -> None:
    if debug:
        _say(traceback.format_exc())
    if interrupted or isinstance(error, KeyboardInterrupt):
        _say("interrupted; the same command goes on from here")
        sys.exit(INTERRUPTED)
    if isinstance(error, OutputError):
        _end_for_output(error)
    _say(f"error: {message(error)}")
    sys.exit(status_of(error))


def _end_for_output(error: OutputError) -> NoReturn:
    silence(sys.stdout)
    if isinstance(error.__cause__, BrokenPipeError):
        sys.exit(CLOSED_PIPE)
    _say(f"error: cannot write to standard output: {one_line(str(error))}")
    sys.exit(INPUT)


def _say(text: str) -> None:
    """Write to stderr, if that is possible."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


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

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
        yield interrupted
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
