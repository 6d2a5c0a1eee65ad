"""`python -m tip_analysis.report RUN… -o reports/NAME.html`: one page from one or more runs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tip_analysis.errors import InputError


@dataclass(frozen=True)
class ReportCommand:
    """Make one self-contained HTML page from one or more run folders."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders with scored tokens; several are compared side by side."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where the page is written; by default reports/NAME.html, NAME being the first run's."""
    entropy_cut: str = "median"
    """Cut on student entropy: median, mean, otsu, paper, a quantile such as q0.8, or a number in nats."""
    divergence_cut: str = "mean"
    """Cut on the reverse KL, likewise."""
    normalization_scope: str = "run"
    """Whose tokens share one min-max: run, or batch (one optimizer step)."""
    divergence_clip: float | None = None
    """Quantile at which the divergence is clipped before its min-max; off by default, as in the paper."""
    cut_scope: str = "run"
    """Whose tokens a cut is measured on: run, or batch."""
    debug: bool = False
    """Show the traceback of an error."""


def run_report(command: ReportCommand) -> Path:
    """Do what the command says; returns where the page lies."""
    from tip_analysis.report import ReportOptions, write_report

    options = ReportOptions(
        entropy_cut=command.entropy_cut,
        divergence_cut=command.divergence_cut,
        normalization_scope=command.normalization_scope,
        divergence_clip=command.divergence_clip,
        cut_scope=command.cut_scope,
    )
    output = command.output or Path("reports") / f"{command.runs[0].resolve().name}.html"
    return write_report(command.runs, output, options)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when the page is written, 2 for anything wrong with input or options."""
    command = tyro.cli(ReportCommand, args=arguments, prog="python -m tip_analysis.report")
    try:
        output = run_report(command)
    except InputError as error:
        if command.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
