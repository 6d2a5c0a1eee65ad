"""Files that ship with the package: top-level `data/` in a checkout, `tip_analysis/core/data/` in
an installed wheel."""

from pathlib import Path

from tip_analysis.core.errors import InputError


def data_path(name: str) -> Path:
    """Where the shipped file or folder `name` lies.

    Raises:
        InputError: it is not there: the installation is incomplete.
    """
    core = Path(__file__).resolve().parent
    for root in (core / "data", core.parent.parent / "data"):
        if (root / name).exists():
            return root / name
    raise InputError(
        f"the shipped data {name!r} is missing beside {core}: install the package again"
    )
