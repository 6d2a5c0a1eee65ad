"""Chat templates are programs of strangers: how long one may run, how much memory it may take, and
what none needs."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import lru_cache

import jinja2
import psutil

from tip_analysis.core.errors import PromptFileError

SECONDS = 10.0
"""Most time that a template takes for one conversation."""
BYTES = 2**30
"""Most memory that a template takes besides, where the operating system can limit it."""
MAX_CHARACTERS = 5 * 10**7
"""Longest text that a template makes: beyond any context."""
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


_limiting = threading.Lock()
"""Held while memory is limited: a limit is the whole process's."""


@contextlib.contextmanager
def memory_limit(num_bytes: int | None = None) -> Iterator[None]:
    """Let this process take so much more memory (by default `BYTES`) and no more; nothing where
    the operating system has no such limit.

    Raises:
        MemoryError: inside the block.
    """
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    with _limiting:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = psutil.Process().memory_info().vms + (BYTES if num_bytes is None else num_bytes)
        known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _OvertimeError(Exception):
    """Raised between two instructions of a thread whose time is over."""
