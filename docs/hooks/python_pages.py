"""The page of the Python interface: the door's names, then every room's public names."""

import ast
import importlib
import inspect
from pathlib import Path

import tip_analysis as tip

PACKAGE = Path(tip.__file__).parent
ROOMS = (
    "core",
    "analysis",
    "figures",
    "report",
    "report.notebook",
    "rollouts",
    "scoring",
    "gradients",
    "training",
    "logits",
    "models",
    "demo",
)

HEAD = """# Python

`import tip_analysis as tip` loads neither torch nor polars; what needs them loads them when
first used. The names of the package itself:

{names}

Below, each room of the package with the names that it offers; what starts with an underscore may
change at any time.
"""


def python_page() -> str:
    """Every room with its purpose, and the docstrings of what it offers."""
    names = ", ".join(f"`tip.{name}`" for name in tip.__all__ if name != "__version__")
    return "\n".join([HEAD.format(names=names), *map(_room, ROOMS)])


def _room(name: str) -> str:
    doc = ast.get_docstring(ast.parse(_init(name).read_text("utf-8"))) or ""
    defined, constants = offered(name)
    parts = [f"## tip_analysis.{name}", _escaped(doc)]
    if constants:
        parts.append("Constants: " + ", ".join(f"`{constant}`" for constant in constants) + ".")
    return "\n\n".join([*parts, *(f"::: {home}" for home in defined), ""])


def offered(name: str) -> tuple[list[str], list[str]]:
    """Dotted paths of the functions and classes that a room offers, and the names of its other
    values."""
    room = importlib.import_module(f"tip_analysis.{name}")
    defined, constants = [], []
    for public in sorted(getattr(room, "__all__", ())):
        value = getattr(room, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            defined.append(f"{value.__module__}.{value.__qualname__}")
        elif not inspect.ismodule(value):
            constants.append(public)
    return defined, constants


def _init(name: str) -> Path:
    return PACKAGE.joinpath(*name.split("."), "__init__.py")


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;")
