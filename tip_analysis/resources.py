"""Files that ship with the package: top-level `data/` in a checkout, `tip_analysis/data/` in an installed wheel."""

from pathlib import Path

from tip_analysis.errors import InputError


def data_path(name: str) -> Path:
    """Where the shipped file or folder `name` lies.

    Raises:
        InputError: it is not there: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "data", package.parent / "data"):
        if (root / name).exists():
            return root / name
    raise InputError(f"the shipped data {name!r} is missing beside {package}: install the package again")
