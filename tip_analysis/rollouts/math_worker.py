"""A process that compares answers with math-verify: one JSON object a line in, one out.

In: `{"response": …, "answer": …}`; out: `{"reward": 0 or 1}`. A first line `{"ready": true}` says
that the libraries are loaded. The process stands alone (it imports nothing of tip_analysis), so
that whoever asks can end it: math-verify's own time limit needs the main thread's signals, and
neither stops a power tower in the middle of a multiplication.
"""

import contextlib
import json
import logging
import sys

MEMORY_BYTES = 4 << 30
"""An expression that needs more is wrong, and does not take the machine with it."""


def is_correct(response: str, answer: str) -> bool:
    """Whether the last answer that a response gives is the reference answer, as a text or
    mathematically."""
    response = response.rsplit("</think>", maxsplit=1)[-1]
    if _plain(answer) == _plain(_last_boxed(response) or response):
        return True
    try:
        return _is_equal(response, answer)
    except Exception:  # sympy and the LaTeX parser raise errors of every kind on what models write
        return False


def _is_equal(response: str, answer: str) -> bool:
    from math_verify import parse, verify

    marked = any(mark in answer for mark in ("$", "\\boxed", "\\[", "\\("))
    no_signals = {"parsing_timeout": None}
    gold = parse(answer if marked else f"${answer}$", **no_signals)  # pyright: ignore[reportArgumentType]
    found = parse(response, **no_signals)  # pyright: ignore[reportArgumentType]
    return bool(gold and found and verify(gold, found, timeout_seconds=None))


def _last_boxed(response: str) -> str | None:
    """Content of the last `\\boxed{}`, braces balanced; None where there is none or it is not
    closed."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for end in range(begin, len(response)):
        depth += {"{": 1, "}": -1}.get(response[end], 0)
        if depth == 0:
            return response[begin:end]
    return None


def _plain(text: str) -> str:
    text = text.strip().strip("$").strip().removesuffix(".")
    if text.startswith("\\text{") and text.endswith("}"):
        text = text[len("\\text{") : -1]
    return " ".join(text.split()).casefold()


def main() -> None:
    """Answer requests until the input ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    import math_verify  # noqa: F401

    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reward = float(is_correct(request["response"], request["answer"]))
        print(json.dumps({"reward": reward}), file=out, flush=True)


if __name__ == "__main__":
    main()
