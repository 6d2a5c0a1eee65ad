"""How commands end: a status and at most one line, with streams, locales and signals as they come.
Each case is a process of its own, as in a shell."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from tip_analysis.cli import exits
from tip_analysis.cli import main as cli
from tip_analysis.core.errors import OptionError, RunError, TipAnalysisError

TIP = [sys.executable, "-m", "tip_analysis"]
SHOWS = [*TIP, "select", "--list"]
FAILS = [*TIP, "select"]


def shell(line: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", "-c", line],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def quoted(command: list[str]) -> str:
    return " ".join(command)


@pytest.mark.parametrize(
    ("command", "redirection", "status", "says"),
    [
        (SHOWS, ">&-", 0, ""),
        (SHOWS, "<&- >&- 2>&-", 0, ""),
        (FAILS, "2>&-", 2, ""),
        (FAILS, "2>/dev/full", 2, ""),
        (SHOWS, ">/dev/full", 2, "cannot write to standard output"),
        ([*TIP, "--help"], ">/dev/full", 2, "cannot write to standard output"),
        ([*TIP, "--version"], ">/dev/full", 2, "cannot write to standard output"),
        ([*TIP, "status", "$'a\\xffb'"], "", 2, "RUN: expected text in UTF-8"),
        ([*TIP, "status", "$'a\\xffb'"], "2>&-", 2, ""),
        ([*TIP, "status", "x" * 300], "", 2, "File name too long"),
        ([*TIP, "report"], "", 2, "expected at least one run folder"),
        ([sys.executable, "-m", "tip_analysis.report"], "", 2, "at least one run folder"),
        ([*TIP, "gradients", "x", "--device", "meta"], "", 2, "expected auto, cpu, cuda"),
        ([*TIP, "gradients", "x", "--params", "kl"], "", 2, "unknown parameter scope 'kl'"),
        ([*TIP, "ablate", "x", "--preset", "qwen"], "", 2, "unknown preset 'qwen'"),
        ([*TIP, "select", "x", "--rules", "softor"], "", 2, "did you mean 'soft_or'"),
        ([*TIP, "score", "x", "--teacher", "nobody/nothing"], "", 2, "smollm2-135m-instruct"),
    ],
    ids=lambda value: "" if isinstance(value, int) else str(value)[-40:].encode("ascii", "ignore"),
)
def test_a_command_ends_with_a_status_and_at_most_a_line(command, redirection, status, says):
    before = time.monotonic()
    done = shell(f"{quoted(command)} {redirection}")
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == bool(says)
    assert time.monotonic() - before < 20  # no torch: under a second on a quiet machine


@pytest.mark.parametrize("command", [SHOWS, [*TIP, "score", "--help"]])
def test_a_reader_that_goes_away_is_no_error(command):
    done = shell(f"({quoted(command)}; echo $? >&2) | true")
    assert done.stderr == "141\n"


@pytest.mark.parametrize("command", [SHOWS, [*TIP, "gradients", "--help"], [*TIP, "status", "né"]])
def test_an_ascii_locale_spells_characters_out(command):
    ascii_only = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, check=False, capture_output=True, env=ascii_only, timeout=120)
    assert done.returncode in (0, 2)
    shown = (done.stdout + done.stderr).decode("ascii")
    assert "Traceback" not in shown
    assert "\\u" in shown


def test_a_home_is_not_needed(tmp_path):
    homeless = {name: value for name, value in os.environ.items() if name != "HOME"}
    for command in (SHOWS, [*TIP, "status", str(tmp_path)], [*TIP, "--version"]):
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=homeless, timeout=120
        )
        assert done.returncode in (0, 2)
        assert len(done.stderr.splitlines()) <= 1


def test_names_cannot_write_to_the_terminal():
    name = "$'\\e[31mred\\u202e\\x07[/b]:smile:\\nline'"
    done = shell(f"{quoted(TIP)} status {name}")
    (line,) = done.stderr.splitlines()
    assert "⟨1B⟩[31mred⟨202E⟩⟨07⟩[/b]:smile: line" in line


AS_FROM_A_SHELL = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""Whatever the tests run under: a background job has Ctrl-C ignored."""
AS_IN_THE_BACKGROUND = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
ANNOUNCED = """
import sys
import tip_analysis.__main__ as it

class Announcer:
    def find_spec(self, name, *_):
        if name == "tip_analysis.cli":
            print(".", flush=True)

sys.meta_path.insert(0, Announcer())
it.main()
"""


def begun(arguments: list[str], start: str = AS_FROM_A_SHELL) -> subprocess.Popen[bytes]:
    """A command that is about to import what it needs."""
    process = subprocess.Popen(
        [sys.executable, "-c", start + ANNOUNCED, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.0])
def test_ctrl_c_is_one_line_at_any_moment(tmp_path, delay):
    process = begun(["demo", "--out", str(tmp_path / "demo"), "--report", str(tmp_path / "x.html")])
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert said.decode() == "interrupted; the same command goes on from here\n"
    assert process.returncode == exits.INTERRUPTED


def test_ctrl_c_is_ours_before_anything_is_imported():
    script = (
        "import sys; before = set(sys.modules); import tip_analysis.__main__ as it; "
        "print(*sorted(set(sys.modules) - before)); print(it.INTERRUPTED, it.SAID.decode())"
    )
    command = [sys.executable, "-S", "-c", script]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    loaded, said = shown.stdout.split("\n", 1)
    ours = {name for name in loaded.split() if name.startswith("tip_analysis")}
    aliases = {"tip_analysis.trl"}  # names only: nothing is loaded
    assert ours - aliases == {"tip_analysis", "tip_analysis.__main__"}
    assert "typing" not in loaded.split()
    assert said.strip() == f"{exits.INTERRUPTED} interrupted; the same command goes on from here"


def test_a_background_job_of_a_shell_does_not_end_for_ctrl_c():
    process = begun(["select", "--list"], AS_IN_THE_BACKGROUND)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    shown, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, b"")
    assert b"soft_or" in shown


def ended(capsys, error: BaseException, **options) -> tuple[int, str]:
    """Status and stderr of a block that raises."""
    with (
        pytest.raises(SystemExit) as stopped,
        exits.ending(**({"debug": False, "own_process": False} | options)),
    ):
        raise error
    return stopped.value.code, capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """As torch has it, which is not imported here."""


class PanicException(BaseException):
    """As Polars has it, which is not imported here."""


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (OptionError("one\n\n  two\x1b[0m"), 2, "error: one two⟨1B⟩[0m"),
        (RunError("no run"), 2, "error: no run"),
        (TipAnalysisError("a process ended"), 1, "error: a process ended"),
        (MemoryError(), 2, "memory ran out: a smaller --token-budget"),
        (OutOfMemoryError("CUDA out of memory.\nTried"), 2, "(CUDA out of memory. Tried)"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 2, "memory ran out"),
        (PermissionError(errno.EACCES, "Permission denied", "p\n"), 2, "error: p: Permission"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (OSError("odd"), 1, "unexpected OSError: odd"),
        (KeyError("x\ny"), 1, "unexpected KeyError: 'x\\ny'"),
        (RecursionError("maximum\nrecursion"), 1, "RecursionError: maximum recursion"),
        (PanicException("a bad\noffset"), 2, "error: a file is damaged (a bad offset); --verify"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
        (ValueError("v" * 5000), 1, "this is a failure of tip_analysis, and --debug shows"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), 1, "UnicodeEncodeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_is_one_line(capsys, error, status, says):
    code, said = ended(capsys, error)
    assert code == status
    assert says in said
    assert len(said.splitlines()) == 1
    assert len(said) < 800


def test_a_failure_of_ours_says_where(capsys, monkeypatch):
    def broken(*_, **__):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr("tip_analysis.analysis.rules.rule_names", broken)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["select", "--list"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "unexpected IndexError: tuple index out of range (cli/commands/selection.py:" in said
    assert len(said.splitlines()) == 1


def test_debug_shows_the_traceback_before_the_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["status", "nowhere", "--debug"])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: no run at nowhere")


def test_an_interrupt_that_a_library_makes_an_error_of_is_still_one():
    script = (
        "import os, signal, sys\n"
        "from tip_analysis.cli import exits\n"
        "with exits.ending(debug=False, own_process=True):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise RuntimeError('a library gives up')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", AS_FROM_A_SHELL + script],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)


def test_log_records_are_lines(capsys):
    script = (
        "import logging\n"
        "from tip_analysis.cli import exits\n"
        "with exits.ending(debug=False, own_process=True):\n"
        "    logging.getLogger('x').warning('a\\nb\\x1b[31m %s', 'c\\u202e')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert done.stderr == "WARNING: a b⟨1B⟩[31m c⟨202E⟩\n"
