"""`python -m tip_analysis.report RUN… -o reports/NAME.html`: the same as `tip-analysis report`."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Hand over to the command line's `report`."""
    from tip_analysis.__main__ import main as run_command

    run_command(["report", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
