"""The house itself: what lies at the package's top, what files are called, what a room's door
holds."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import tip_analysis

PACKAGE = Path(tip_analysis.__file__).parent
ROOMS = sorted(
    path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__" not in path.stem)


def test_the_top_of_the_package_shows_its_rooms_and_little_else() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__",)]
    code = [name for name in entries if name != "py.typed"]
    assert "py.typed" in entries
    assert len(code) <= 14, sorted(code)
    assert {name for name in code if name not in ROOMS} <= {
        "__init__.py",
        "__init__.pyi",
        "__main__.py",
    }


def test_no_line_of_the_sources_is_longer_than_100_columns() -> None:
    root = PACKAGE.parent
    folders = ("tip_analysis", "tests", "benchmarks", "docs")
    files = [path for folder in folders for path in (root / folder).rglob("*.py*")]
    sources = [path for path in files if path.suffix in (".py", ".pyi")]
    assert len(sources) > 300
    long = [
        f"{path.relative_to(root)}:{number}: {len(line)}"
        for path in sources
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if len(line) > 100
    ]
    assert long == []


def test_no_file_has_the_name_of_a_standard_library_module() -> None:
    clashes = [
        str(path.relative_to(PACKAGE)) for path in MODULES if path.stem in sys.stdlib_module_names
    ]
    assert not clashes
    assert "statistics" in sys.stdlib_module_names  # the name that once clashed


def test_the_command_line_is_the_only_room_without_names_of_its_own() -> None:
    without = [room for room in ROOMS if not (PACKAGE / room / "__init__.pyi").is_file()]
    assert without == ["cli"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_door_says_what_goes_in_and_out_and_only_passes_names_on(room: str) -> None:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8"))
    text = ast.get_docstring(tree) or ""
    assert 4 <= len(text.splitlines()) <= 8
    assert all(word in text for word in ("In:", "Out:", "Read first:"))
    body = [ast.unparse(node) for node in tree.body[1:]]
    if room != "cli":
        assert body == [
            "from tip_analysis.core.optional import attach_room",
            "__getattr__, __dir__, __all__ = attach_room(__name__, __file__)",
        ]


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "cli"])
def test_every_name_of_a_room_can_be_had_and_is_no_modules_name(room: str) -> None:
    module = importlib.import_module(f"tip_analysis.{room}")
    siblings = {path.stem for path in (PACKAGE / room).iterdir()}
    assert not siblings & set(module.__all__), "a module would hide the function of its name"
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_type_checkers_and_running_programs_find_the_same_names_in_the_same_rooms() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: str(node.module)
        for node in guarded.body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    homes = {name: f"tip_analysis.{room}" for name, room in tip_analysis._HOMES.items()}
    rooms = dict.fromkeys(tip_analysis._ROOMS, "tip_analysis")
    rooms["trl"] = "tip_analysis.training"  # where the alias leads
    assert seen == homes | rooms
    assert set(tip_analysis.__all__) == seen.keys() | {"__version__"}


@pytest.mark.parametrize("name", tip_analysis.__all__)
def test_every_name_of_the_door_can_be_had(name: str) -> None:
    assert getattr(tip_analysis, name) is not None


def test_a_name_that_the_door_lacks_is_answered_with_those_it_has() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'qadrants'; it has .*open_run"):
        tip_analysis.qadrants  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
