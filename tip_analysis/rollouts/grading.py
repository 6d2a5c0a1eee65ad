"""Graders: what a response is worth against the reference answer.

`math` (math-verify, and what `answers` adds: \\frac{1}{2} is 0.5, 5 km are 5000 m), `exact` (the
integer that ends an arithmetic response), `none`, and a function of the user's own, named as
`module:function` or `path/to/file.py:function`, which takes the response and the answer (or None)
and returns a number, a bool or None.

Mathematical comparison runs in a process of its own, which is ended when it takes too long: this
works in any thread, and no expression that a model writes can hang the caller. Such a response gets
0.
"""

import atexit
import contextlib
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from tip_analysis.core.errors import InputError, OptionError, TipAnalysisError, UnknownNameError
from tip_analysis.core.optional import require
from tip_analysis.core.toy_pairs import toy_pairs
from tip_analysis.rollouts.answers.reading import opened_thought, read_answer

Grader = Callable[[str, str | None], float | None]
"""Takes the response and the reference answer (None where there is none); returns the reward, None
for no verdict."""

MATH_TIMEOUT_SECONDS = 10.0
"""How long one comparison may take."""

_WORKER = Path(__file__).with_name("math_worker.py")
_LONE_INTEGER = re.compile(r"\s*([+-]?\d+)\s*(?:<[^<>]*>\s*)*")


class MathGrader:
    """Compares with math-verify, in one process that is started when first needed and again after a
    time-out.

    Attributes:
        timeout_seconds: How long one comparison may take.
        num_timeouts: Comparisons that took longer, and got 0.
    """

    def __init__(self, timeout_seconds: float = MATH_TIMEOUT_SECONDS) -> None:
        self.timeout_seconds = timeout_seconds
        self.num_timeouts = 0
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def __call__(self, response: str, answer: str | None) -> float | None:
        """1.0 if the last answer in the response equals the reference answer, else 0.0; None
        without an answer."""
        if answer is None:
            return None
        with self._lock:
            for _ in range(
                2
            ):  # once more if the process was ended by somebody else between two questions
                if (reply := self._ask(response, answer)) is not None:
                    return reply
        raise TipAnalysisError(
            "the process that compares answers ends at once: is math-verify installed?"
        )

    def _ask(self, response: str, answer: str) -> float | None:
        process = self._running_process()
        assert process.stdin is not None
        assert process.stdout is not None
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(self.timeout_seconds, end)
        timer.daemon = True
        try:
            timer.start()
            process.stdin.write(json.dumps({"response": response, "answer": answer}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return float(json.loads(line)["reward"])
        self.close()
        if timed_out.is_set():
            self.num_timeouts += 1
            return 0.0
        return None

    def _running_process(self) -> subprocess.Popen[str]:
        if self._owner != os.getpid():  # after a fork the process belongs to the parent
            self._process = None
        if self._process is None or self._process.poll() is not None:
            self.close()
            # -P: the worker's own folder must not be searched first
            command = [sys.executable, "-P", str(_WORKER)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            self._owner = os.getpid()
            assert self._process.stdout is not None
            self._process.stdout.readline()  # loading takes seconds, which are not the comparison's
        return self._process

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        process.wait()


_math_grader = MathGrader()
atexit.register(_math_grader.close)


def grade_exact(response: str, answer: str | None) -> float | None:
    """1.0 if the integer that ends the response is the answer, in decimal; None without an answer.

    The integer is the one after a toy language's last answer word, or the whole response.

    Raises:
        InputError: the reference answer is no integer.
    """
    if answer is None:
        return None
    if not re.fullmatch(r"\s*[+-]?\d+\s*", answer):
        raise InputError(
            f"the grader `exact` compares integers, found the answer {answer!r}; use `math`"
        )
    found = _integer_in(response)
    return float(found is not None and int(found) == int(answer))


def _integer_in(response: str) -> str | None:
    readings = (pair.extract_answer(response) for pair in toy_pairs().values())
    found = next((reading for reading in readings if reading is not None), None)
    if found is None and (lone := _LONE_INTEGER.fullmatch(response)):
        found = lone[1]
    return found


def answer_in(grader: str, response: str) -> str | None:
    """The answer that a grader of this package reads in a response, without spaces around it; None
    where there is none, or the grader is the user's own.

    Two texts may be one answer (`0.5` and `1/2`): the grader's verdict says which are right.
    """
    if grader == "exact":
        found = _integer_in(response)
        return None if found is None else str(int(found))
    read = read_answer(response) if grader == "math" else None
    return None if read is None or read.text is None else read.text.strip()


def grade_none(response: str, answer: str | None) -> None:
    """No verdict."""


GRADERS: dict[str, Grader] = {"math": _math_grader, "exact": grade_exact, "none": grade_none}
"""The graders by name."""


_OWN = frozenset(GRADERS.values())
"""Graders whose verdicts need no check."""


def register_grader(name: str, grader: Grader, *, overwrite: bool = False) -> None:
    """Make a function usable by name.

    Args:
        name: What users call it.
        grader: From (response, answer or None) to a finite number, a bool, or None for no verdict.
        overwrite: Replace a grader of that name.

    Raises:
        OptionError: the name is empty or taken, or could be read as a module's or a file's.
    """
    if not name or name != name.strip() or ":" in name:
        raise OptionError(f"a grader needs a name without spaces around it or ':'; found {name!r}")
    if name in GRADERS and not overwrite:
        raise OptionError(
            f"there is a grader {name!r} already; choose another name, or pass overwrite=True"
        )
    GRADERS[name] = grader


def default_grader(*, has_answer: bool, is_toy: bool = False) -> str:
    """The grader for prompts that name none: `math` where there is an answer, `exact` for a toy
    pair."""
    if not has_answer:
        return "none"
    return "exact" if is_toy else "math"


def grade(grader: str, response: str, answer: str | None, *, prompt_text: str = "") -> float | None:
    """The reward of one response.

    Args:
        grader: A registered name, `module:function`, or `path/to/file.py:function`.
        response: What the model wrote. `math` leaves out its thought, and gives 0 for a thought or
            a last box that is not closed.
        answer: The reference answer; without one, `math` and `exact` give None.
        prompt_text: What the model was shown, chat markers included: a thought that the chat
            template opened there is the response's to close.

    Raises:
        UnknownNameError: no grader of this name.
        OptionError: the user's function cannot be loaded.
        InputError: it raised an error, or returned something that is no finite number.
    """
    function = resolve_grader(grader)
    if function is _math_grader:
        response = opened_thought(prompt_text) + response
    if function in _OWN:
        return function(response, answer)
    try:
        verdict: Any = function(response, answer)
    except Exception as problem:
        raise InputError(
            f"the grader {grader} raised {type(problem).__name__}: {problem}"
        ) from problem
    return _reward(verdict, grader)


def _reward(verdict: Any, grader: str) -> float | None:
    if verdict is None:
        return None
    try:
        reward = float(verdict) if not isinstance(verdict, str) else math.nan
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise InputError(
            f"the grader {grader} has to return a finite number, a bool or None; it returned"
            f" {verdict!r}"
        )
    return reward


def resolve_grader(grader: str) -> Grader:
    """The function that a grader's name stands for; loaded once.

    Raises:
        UnknownNameError: no grader of this name.
        OptionError: the user's function cannot be loaded.
    """
    if GRADERS.get(grader) is _math_grader:
        for package in ("math_verify", "pint"):
            require(package, "the grader `math`")
    if grader in GRADERS:
        return GRADERS[grader]
    place, colon, name = grader.rpartition(":")
    if not (colon and place and name):
        raise UnknownNameError(
            "grader", grader, [*GRADERS, "module:function", "path/to/file.py:function"]
        )
    return _load_function(place, name)


@cache
def _load_function(place: str, name: str) -> Grader:
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    except OptionError:
        raise
    except Exception as problem:  # a user's module may fail in any way
        raise OptionError(
            f"the grader {place}:{name} cannot be imported: {type(problem).__name__}: {problem}"
        ) from problem
    function = getattr(module, name, None)
    if not callable(function):
        found = "has no such name" if function is None else f"has a {type(function).__name__} there"
        raise OptionError(
            f"the grader {place}:{name}: expected a function {name!r}; {place} {found}"
        )
    return cast(Grader, function)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise OptionError(f"the grader's file {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is None or not f"{name}.".startswith(f"{problem.name}."):
            raise  # the module is there; something that it imports is not
    sys.path.insert(
        0, str(Path.cwd())
    )  # an installed command does not look in the working folder by itself
    try:
        importlib.invalidate_caches()
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
