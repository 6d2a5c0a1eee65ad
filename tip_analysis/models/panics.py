"""Panics of tokenizers, which is written in Rust: no `Exception` in Python, and several lines on
stderr."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from tip_analysis.core.errors import ModelError
from tip_analysis.core.text import first_line


@contextlib.contextmanager
def panics_named() -> Iterator[None]:
    """Turn a panic in a block into an error of one line; what else is written to stderr meanwhile
    appears after the block.

    Raises:
        ModelError: in place of a panic.
    """
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(tempfile.TemporaryFile())
        is_panic = stack.enter_context(_stderr_into(said.fileno()))
        try:
            yield
        except BaseException as problem:
            if type(problem).__name__ != "PanicException":  # its class cannot be imported
                raise
            is_panic.append(True)
            raise ModelError(f"its tokenizer is broken: {first_line(problem)}") from problem


@contextlib.contextmanager
def _stderr_into(descriptor: int) -> Iterator[list[bool]]:
    """Send descriptor 2 elsewhere for a while; then write it out, unless the list has an entry."""
    is_panic: list[bool] = []
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield is_panic
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.lseek(descriptor, 0, os.SEEK_SET)
        if not is_panic:
            while content := os.read(descriptor, 2**16):
                os.write(2, content)
