"""`tip-analysis COMMAND …` (the same as `python -m tip_analysis`): one command for each stage.

Exit status: 0 done; 2 for anything wrong with input or options, in one line on stderr; 1 for a
failure of ours.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from tip_analysis.cli import options
from tip_analysis.core.errors import InputError

Command = (
    Annotated[options.Demo, tyro.conf.subcommand("demo")]
    | Annotated[options.Rollout, tyro.conf.subcommand("rollout")]
    | Annotated[options.Import, tyro.conf.subcommand("import")]
    | Annotated[options.Score, tyro.conf.subcommand("score")]
    | Annotated[options.Gradients, tyro.conf.subcommand("gradients")]
    | Annotated[options.Select, tyro.conf.subcommand("select")]
    | Annotated[options.Ablate, tyro.conf.subcommand("ablate")]
    | Annotated[options.Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[options.Compare, tyro.conf.subcommand("compare")]
    | Annotated[options.Status, tyro.conf.subcommand("status")]
    | Annotated[options.Export, tyro.conf.subcommand("export")]
    | Annotated[options.Report, tyro.conf.subcommand("report")]
)

DESCRIPTION = """Which tokens matter when a student language model is distilled on its own rollouts,
and why.

A run folder fills from left to right: rollout (or import), score, gradients, select, ablate,
report.
`tip-analysis demo` does all of it on a tiny pair of models that is built in."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, do what it says, and exit."""
    command = tyro.cli(Command, args=arguments, prog="tip-analysis", description=DESCRIPTION)  # pyright: ignore[reportCallIssue, reportArgumentType]
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr
    )
    from tip_analysis.cli import commands  # only now: help needs none of what the commands do

    try:
        commands.run(command)
    except InputError as error:
        if command.common.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
