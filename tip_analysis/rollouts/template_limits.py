"""Chat templates are programs of strangers: how long one may run, and what none needs."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import lru_cache

import jinja2

from tip_analysis.core.errors import PromptFileError

SECONDS = 10.0
"""Most time that a template takes for one conversation."""
MAX_NUMBER = 10**6
"""Largest number written in a template: beyond it, texts and loops only exhaust the machine."""


@lru_cache(maxsize=8)
def check_template(template: str) -> None:
    """Refuse what the compiler of templates would compute without end, before it does.

    Raises:
        PromptFileError: the template raises to a power, or holds a huge number.
    """
    before = ""
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:
        return  # the compiler says what is wrong
    for line, kind, text in tokens:
        if kind == "operator" and text == "**" and before not in ("(", ","):
            raise PromptFileError(f"the chat template raises to a power in line {line}")
        if kind == "integer" and _is_huge(text):
            raise PromptFileError(f"the chat template holds more than {MAX_NUMBER} in line {line}")
        before = before if kind == "whitespace" else text


def _is_huge(number: str) -> bool:
    digits = number.replace("_", "")
    return len(digits) > 30 or int(digits, 0) > MAX_NUMBER


@contextlib.contextmanager
def time_limit(seconds: float | None = None) -> Iterator[None]:
    """Stop Python code in this thread, whichever it is, when its time (by default `SECONDS`) is
    over.

    Raises:
        TimeoutError: inside the block.
    """
    seconds = SECONDS if seconds is None else seconds
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def expire() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(_OvertimeError)
                )

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except _OvertimeError as over:
        raise TimeoutError(f"it did not end within {seconds:g} s") from over
    finally:
        with lock:
            done = True
        timer.cancel()


class _OvertimeError(Exception):
    """Raised between two instructions of a thread whose time is over."""
