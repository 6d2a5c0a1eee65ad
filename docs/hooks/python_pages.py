"""The page of the Python interface: the door's names, then every room's public names."""

import ast
import importlib
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

`import tip_analysis as tip` loads neither torch nor polars; what needs them loads them when first used. The names
of the package itself:

{names}

Below, each room of the package with the names that it offers; what starts with an underscore may change at any time.
"""


def python_page() -> str:
    """Every room with its purpose, and the docstrings of what it offers."""
    names = ", ".join(f"`tip.{name}`" for name in tip.__all__ if name != "__version__")
    return "\n".join([HEAD.format(names=names), *map(_room, ROOMS)])


def _room(name: str) -> str:
    room = f"tip_analysis.{name}"
    doc = ast.get_docstring(ast.parse(_init(name).read_text("utf-8"))) or ""
    entries = [f"::: {home}\n" for home in offered(name)]
    return f"## {room}\n\n{_escaped(doc)}\n\n" + "\n".join(entries)


def offered(name: str) -> list[str]:
    """Where the public names of a room are defined, as dotted paths, without repetition."""
    room = importlib.import_module(f"tip_analysis.{name}")
    homes = _reexports(name)
    return [homes[public] for public in sorted(getattr(room, "__all__", ())) if public in homes]


def _reexports(name: str) -> dict[str, str]:
    """Public name -> dotted path of its definition, for what a room imports from its modules."""
    stub = _init(name).with_suffix(".pyi")
    source = stub if stub.is_file() else _init(name)
    found = {}
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module if not node.level else f"tip_analysis.{name}.{node.module}"
            found |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    return {public: home for public, home in found.items() if home.startswith("tip_analysis")}


def _init(name: str) -> Path:
    return PACKAGE.joinpath(*name.split("."), "__init__.py")


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;")
