"""When, with what and by which command a number was made: what `run.json` keeps of every stage
besides its configuration."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_VERSIONED_PACKAGES = ("tip-analysis", "torch", "transformers", "tokenizers", "polars", "numpy")


def package_version() -> str:
    """The installed release; `0+unknown` for a source tree that was never installed."""
    try:
        return metadata.version("tip-analysis")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def environment() -> dict[str, Any]:
    """Versions, CPU and git commit: what a number may depend on besides the configuration."""
    versions = {}
    for package in _VERSIONED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git_commit(),
        "machine": platform.machine(),
        "num_cores": psutil.cpu_count(logical=True),
        "command": _command_line(),
    }


def _command_line() -> str | None:
    """The command that this process was started with; null where the package is used from other
    code."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    if program.name == "__main__.py" and program.parent.name == "tip_analysis":
        return shlex.join(["python", "-m", "tip_analysis", *sys.argv[1:]])
    return shlex.join(["tip-analysis", *sys.argv[1:]]) if program.name == "tip-analysis" else None


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from; null for an installed wheel."""
    here = Path(__file__).resolve().parent.parent
    if not (here.parent / ".git").exists():
        return None
    command: Sequence[str] = (
        "git",
        "-C",
        str(here),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    )
    try:
        return (
            subprocess.run(
                command, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
