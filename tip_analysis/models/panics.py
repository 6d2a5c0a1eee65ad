"""Panics of tokenizers, which is written in Rust: no `Exception` in Python, and several lines on
stderr."""

import contextlib
from collections.abc import Iterator

from tip_analysis.core.errors import ModelError
from tip_analysis.core.streams import stderr_held
from tip_analysis.core.text import first_line


@contextlib.contextmanager
def panics_named() -> Iterator[None]:
    """Turn a panic in a block into an error of one line; what else is written to stderr meanwhile
    appears after the block.

    Raises:
        ModelError: in place of a panic.
    """
    with stderr_held() as dropped:
        try:
            yield
        except BaseException as problem:
            if type(problem).__name__ != "PanicException":  # its class cannot be imported
                raise
            dropped.append(True)
            raise ModelError(f"its tokenizer is broken: {first_line(problem)}") from problem
