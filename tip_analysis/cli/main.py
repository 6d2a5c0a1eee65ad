"""`tip-analysis COMMAND …` (the same as `python -m tip_analysis`): one command for each stage.

Options and files are checked before anything slow is imported; `exits` says how a command ends.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tip_analysis.cli import exits
from tip_analysis.core.optional import extras_named
from tip_analysis.core.streams import output_errors

DESCRIPTION = """Which tokens matter when a student language model is distilled on its own rollouts,
and why.

A run folder fills from left to right: rollout (or import), score, gradients, select, ablate,
report.
`tip-analysis demo` does all of it on a tiny pair of models that is built in;
`tip-analysis --version` says which release this is."""

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""What keeps libraries from writing between our lines."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, do what it says, and exit (with a status unless it is 0)."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    with exits.ending(debug="--debug" in typed, own_process=arguments is None):
        if typed[:1] == ["--version"]:
            with output_errors():
                from tip_analysis.core.provenance import package_version

                print(f"tip-analysis {package_version()}")
            return
        _carry_out(_parse(typed))


def _carry_out(command: Any) -> None:
    from tip_analysis.cli.checks import check_command
    from tip_analysis.cli.registry import COMMANDS

    name = next(name for name, kind in COMMANDS.items() if kind is type(command))
    with extras_named(f"`tip-analysis {name}`"):
        check_command(command)
        _prepare(command)
        command.carry_out()


def _prepare(command: Any) -> None:
    """Settings for the libraries, and the checks that the user asks for."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if command.common.lock_timeout is not None:
        from tip_analysis.core.locks import TIMEOUT_VARIABLE

        os.environ[TIMEOUT_VARIABLE] = str(command.common.lock_timeout)
    if command.common.verify and not getattr(command, "shows_what_is_altered", False):
        _verify(command)


def _verify(command: Any) -> None:
    """Check whole whatever run folder an option names."""
    from tip_analysis.core.run_folder import open_run

    for field in fields(command):
        value = getattr(command, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and (path / "run.json").is_file():
                open_run(path).verify()


def _parse(typed: Sequence[str]) -> Any:
    import tyro

    from tip_analysis.cli.registry import Command

    with output_errors():  # help and complaints are all that is written here
        return tyro.cli(
            Command,
            args=typed,
            prog="tip-analysis",
            description=DESCRIPTION,
            config=(tyro.conf.EnumChoicesFromValues,),
        )


if __name__ == "__main__":
    main()
