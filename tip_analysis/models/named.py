"""Models by name or as they are: what the door's functions take."""

from pathlib import Path
from typing import TypeAlias

from rich.text import Text

from tip_analysis.core.terminal import stderr_console
from tip_analysis.core.text import one_line
from tip_analysis.models.loading import LanguageModel, load_model

ModelLike: TypeAlias = LanguageModel | str | Path
"""A loaded model, or a name as `load_model` takes it."""


def as_model(model: ModelLike, *, dtype: str = "auto", device: str = "auto") -> LanguageModel:
    """The model itself; one that is named is loaded, which is said where somebody is looking.

    Args:
        model: a loaded model, or its name.
        dtype: as for `load_model`; of a model that is named.
        device: likewise.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    if isinstance(model, LanguageModel):
        return model
    with stderr_console().status(Text(one_line(f"loading {model}", 80))):
        return load_model(str(model), dtype=dtype, device=device)


def as_pair(
    student: ModelLike, teacher: ModelLike, *, dtype: str = "auto", device: str = "auto"
) -> tuple[LanguageModel, LanguageModel]:
    """Student and teacher; one model that is named for both is loaded once."""
    loaded = as_model(student, dtype=dtype, device=device)
    same = not isinstance(teacher, LanguageModel) and str(teacher) == str(student)
    return loaded, loaded if same else as_model(teacher, dtype=dtype, device=device)


def name_of(model: ModelLike) -> str:
    """What a model is called."""
    return model.name if isinstance(model, LanguageModel) else str(model)
