"""The embedded default: a tiny teacher and student that add three numbers, and the student's planted flaw.

`language` holds problems, solutions and true labels; `tokenizer` builds the tokenizer; `train` makes the weights anew.
"""

from pathlib import Path
from typing import Literal

from tip_analysis.errors import ModelError

MODEL_NAMES = ("teacher", "student")


def weights_path(name: Literal["teacher", "student"]) -> Path:
    """Folder of a shipped model, in a checkout (`data/`) or in an installed package (`tip_analysis/data/`).

    Raises:
        ModelError: there is no such model, or the weights are not where they were shipped.
    """
    if name not in MODEL_NAMES:
        raise ModelError(f"the arithmetic pair consists of {' and '.join(MODEL_NAMES)}; found {name!r}")
    package = Path(__file__).resolve().parent.parent
    for data in (package.parent / "data", package / "data"):
        folder = data / "arithmetic" / name
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(
        f"the weights of the arithmetic {name} are not in {package / 'data'}; "
        "make them anew with: python -m tip_analysis.arithmetic.train --out data/arithmetic"
    )
