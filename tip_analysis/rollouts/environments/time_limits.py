"""Work that may raise or hang, done within a time limit.

It runs in a thread of its own, since Python can stop no other thread: one that hangs is left
behind and ends with the process. Work that never gives up the interpreter (a tight loop in C) can't
be left behind; a tool that may do so belongs into a process of its own.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class NoAnswerError(Exception):
    """The work took too long."""


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """The result of some work.

    Raises:
        NoAnswerError: there was none in time.
        Exception: what the work raised; what would end the process comes as a `RuntimeError`.
    """
    results: list[Result] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as problem:  # SystemExit too: a tool must not end the run
            problems.append(problem)

    thread = threading.Thread(target=run, daemon=True, name="environment")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise NoAnswerError(f"no answer within {seconds:g} s")
    if problems:
        if isinstance(problems[0], Exception):
            raise problems[0]
        raise RuntimeError(f"{type(problems[0]).__name__}: {problems[0]}") from problems[0]
    return results[0]
