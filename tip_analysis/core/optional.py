"""Packages that only some commands need: which extra brings each, and the one line that says so.

A plain installation analyses, draws and reports; whatever loads a model needs an extra. Rooms
attach their names through `attach_room`, commands run inside `extras_named`, and a function that
imports a package late asks `require` first: each ends in the same `MissingExtraError`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import lazy_loader

from tip_analysis.core.errors import MissingExtraError

EXTRA_OF = {
    "accelerate": "models",
    "httpx": "models",
    "huggingface_hub": "models",
    "math_verify": "models",
    "numba": "models",
    "pint": "models",
    "safetensors": "models",
    "sympy": "models",
    "tokenizers": "models",
    "torch": "models",
    "transformers": "models",
    "datasets": "train",
    "peft": "train",
    "gguf": "gguf",
    "ray": "ray",
    "nbclient": "notebooks",
    "vllm": "vllm",
    "trl": "trl",
    "verifiers": "verifiers",
    "verl": "verl",
    "tensorboard": "trackers",
    "trackio": "trackers",
    "wandb": "trackers",
}
"""The extra of pyproject.toml that brings a package, by the name it is imported under."""


def require(package: str, purpose: str) -> None:
    """Make sure that a package of `EXTRA_OF` can be imported, without importing it.

    Args:
        package: the name it is imported under.
        purpose: what needs it, as in "a LoRA adapter".

    Raises:
        MissingExtraError: it is not installed; the message names the extra.
    """
    if not _is_installed(package):
        raise MissingExtraError(package, EXTRA_OF[package], purpose)


@contextmanager
def extras_named(purpose: str = "this") -> Iterator[None]:
    """Inside, an import that fails for want of a package of `EXTRA_OF` says which extra brings it.

    Raises:
        MissingExtraError: in place of the ModuleNotFoundError of such a package; of any other, the
            error is left as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        # a package that is there, but lacks a part, is broken: no extra would mend it
        if package not in EXTRA_OF or _is_installed(package):
            raise
        raise MissingExtraError(package, EXTRA_OF[package], purpose) from error


def attach_room(
    room: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a room whose names are loaded when first used, as
    its `__init__.pyi` lists them.

    Example:
        __getattr__, __dir__, __all__ = attach_room(__name__, __file__)
    """
    load, names, public = lazy_loader.attach_stub(room, file)

    def load_or_name_extra(name: str) -> Any:
        if name not in public:
            raise AttributeError(
                f"module {room!r} has no attribute {name!r}; it has {', '.join(public)}"
            )
        with extras_named(f"{room}.{name}"):
            return load(name)

    return load_or_name_extra, names, public


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # sys.modules says None: its import was forbidden
        return False
