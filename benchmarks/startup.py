"""How long the command line and the package take to start, each in fresh processes.

    python benchmarks/startup.py --out benchmarks/results/startup.json

`python` alone is the floor. Rounds are interleaved; the first, which may have to compile bytecode,
is left out.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from measuring import interleaved, medians, show, write_results

COMMANDS = {
    "python": ["-c", "pass"],
    "import": ["-c", "import tip_analysis"],
    "help": ["-m", "tip_analysis", "--help"],
    "help of a command": ["-m", "tip_analysis", "score", "--help"],
}


def run(arguments: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    seconds = interleaved(
        {name: run(arguments) for name, arguments in COMMANDS.items()}, options.rounds
    )
    found = medians(seconds)
    ratios = {
        f"{name}: over python alone": found[name] / found["python"]
        for name in found
        if name != "python"
    }
    show(seconds, ratios)
    write_results(options.out, options, seconds=seconds, ratios=ratios)


if __name__ == "__main__":
    main()
