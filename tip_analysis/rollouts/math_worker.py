"""A process that compares answers: one JSON object a line in, one out.

In: `{"response": …, "answer": …}`; out: `{"reward": 0 or 1}`. A first line `{"ready": true}` says
that the libraries are loaded. It is a process of its own, so that whoever asks can end it:
math-verify's own time limit needs the main thread's signals, and neither stops a power tower in the
middle of a multiplication.
"""

import contextlib
import json
import logging
import sys
from pathlib import Path

MEMORY_BYTES = 4 << 30
"""An expression that needs more is wrong, and does not take the machine with it."""


def main() -> None:
    """Answer requests until the input ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    # last, so that nothing of the package's folder stands before Python's own
    sys.path.append(str(Path(__file__).parents[2]))
    import math_verify  # noqa: F401

    from tip_analysis.rollouts.answers.equality import is_correct

    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reward = float(is_correct(request["response"], request["answer"]))
        print(json.dumps({"reward": reward}), file=out, flush=True)


if __name__ == "__main__":
    main()
