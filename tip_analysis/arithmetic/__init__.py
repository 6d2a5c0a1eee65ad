"""The embedded default: a tiny pair of models that add numbers, the student with a planted flaw."""

from pathlib import Path

from tip_analysis.resources import data_path


def weights_path(role: str) -> Path:
    """The folder with the shipped weights and tokenizer of `teacher` or `student`.

    Raises:
        InputError: it is not there.
    """
    return data_path(f"arithmetic/{role}")
