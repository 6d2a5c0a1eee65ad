"""The console script `tip-analysis`, and `python -m tip_analysis COMMAND …`, which is the same.

Ctrl-C is ours before anything else of the package is imported. What comes before this module (the
interpreter's own start, some hundredths of a second) is the interpreter's: it ends for Ctrl-C with
the same status, and with a traceback of its own.
"""

import contextlib
import os
import signal

INTERRUPTED = 130
SAID = b"interrupted; the same command goes on from here\n"


def main() -> None:
    """Do what the command line says."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job
        signal.signal(signal.SIGINT, _end)
    from tip_analysis.cli.main import main as carry_out

    carry_out()


def _end(*_: object) -> None:
    """There is nothing to clean up yet."""
    with contextlib.suppress(OSError):
        os.write(2, SAID)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
