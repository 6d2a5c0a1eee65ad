"""Packages that only some commands need: one that is missing is named with its extra."""

import ast
import pickle
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from tip_analysis.core.errors import InputError, MissingExtraError
from tip_analysis.core.optional import EXTRA_OF, extras_named, require
from tip_analysis.core.run_folder import create_run

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tip_analysis"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

FORBIDDING = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {packages!r}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""Source that makes packages look as if they were not installed."""


def without(
    packages: set[str], code: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a process where packages are not installed."""
    source = FORBIDDING.format(packages=packages) + textwrap.dedent(code)
    command = [sys.executable, "-W", "ignore", "-c", source]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)


def command_line(*arguments: str) -> str:
    return f"from tip_analysis.cli.main import main\nmain({list(arguments)!r})"


def packages_of(extra: str) -> set[str]:
    """The names that an extra's requirements are imported under, those of nested extras not."""
    requirements = PROJECT["optional-dependencies"][extra]
    names = {re.split(r"[\[><=; ]", requirement)[0] for requirement in requirements}
    return {name.replace("-", "_") for name in names - {"tip-analysis"}}


def test_the_extras_bring_what_the_messages_promise() -> None:
    for package, extra in EXTRA_OF.items():
        assert package in packages_of(extra), f"[{extra}] does not bring {package}"


def test_every_package_that_is_imported_belongs_to_the_plain_installation_or_to_an_extra() -> None:
    plain = {
        re.split(r"[\[><=; ]", entry)[0].replace("-", "_") for entry in PROJECT["dependencies"]
    }
    known = plain | EXTRA_OF.keys() | set(sys.stdlib_module_names) | {"tip_analysis"}
    known |= {"markupsafe", "pydantic_core", "typing_extensions"}  # with Jinja2 and pydantic
    imported = {
        name.partition(".")[0]: path
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for name in imported_names(node)
    }
    assert not {name: str(path) for name, path in imported.items() if name not in known}


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [str(node.module)]
    return []


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    said = (
        "a LoRA adapter needs the package 'peft', which is not installed; pip install"
        ' "tip-analysis[train]" brings it'
    )
    with pytest.raises(MissingExtraError, match=re.escape(said)) as caught:
        require("peft", "a LoRA adapter")
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, ImportError)
    assert (caught.value.package, caught.value.extra) == ("peft", "train")
    assert str(pickle.loads(pickle.dumps(caught.value))) == said
    require("torch", "this")  # installed here: nothing is said


def test_an_import_that_fails_for_want_of_an_extra_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"tip-analysis\[train\]"), extras_named("that"):
        import datasets  # noqa: F401


def test_other_missing_modules_keep_their_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as plain, extras_named():
        import no_such_module  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert not isinstance(plain.value, MissingExtraError)
    with pytest.raises(ModuleNotFoundError, match=r"torch\.no_such_part") as broken, extras_named():
        import torch.no_such_part  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert not isinstance(broken.value, MissingExtraError)


ARITHMETIC = ("arithmetic-student", "arithmetic-teacher")
MODEL_PACKAGES = {name for name, extra in EXTRA_OF.items() if extra == "models"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--out", "made"),
        ("rollout", "made", "--student", "arithmetic-student", "--prompts", "problems.jsonl"),
        (
            "import",
            "made",
            "--from",
            "native",
            "--files",
            "problems.jsonl",
            "--student",
            ARITHMETIC[0],
        ),
        ("score", "run", "--student", ARITHMETIC[0], "--teacher", ARITHMETIC[1]),
        ("score", "run", "--student", ARITHMETIC[0], "--teacher", ARITHMETIC[1], "--engine", "ray"),
        ("gradients", "run"),
        ("evaluate", "made", "--model", "arithmetic-student", "--prompts", "problems.jsonl"),
        ("ablate", "made", "--preset", "arithmetic"),
    ],
    ids=lambda arguments: arguments[0] + ("-ray" if "ray" in arguments else ""),
)
def test_a_command_that_needs_models_says_which_extra_to_install(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    create_run(tmp_path / "run")
    (tmp_path / "problems.jsonl").write_text('{"problem": "12+34+56=", "answer": "102"}\n')
    ended = without(MODEL_PACKAGES, command_line(*arguments), cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    line = ended.stderr.strip()
    assert "\n" not in line
    assert line.startswith("error: ")
    assert 'pip install "tip-analysis[models]"' in line
    assert not (tmp_path / "made").exists()


def test_rooms_that_load_models_name_the_extra_where_one_of_their_names_is_used() -> None:
    ended = without(
        MODEL_PACKAGES,
        """
        import tip_analysis as tip
        for use in (lambda: tip.gradients.token_gradients, lambda: tip.divergence.token_statistics):
            try:
                use()
            except ImportError as error:
                print(error)
        """,
    )
    lines = ended.stdout.splitlines()
    assert len(lines) == 2, ended.stderr
    assert all('pip install "tip-analysis[models]"' in line for line in lines)
    assert lines[0].startswith("tip_analysis.gradients.token_gradients needs the package ")


def test_a_module_under_another_name_is_imported_when_it_is_used() -> None:
    ended = without(
        {"trl"},
        """
        import sys
        import tip_analysis as tip
        import tip_analysis.trl
        print("torch" in sys.modules, tip.trl is tip_analysis.trl, hasattr(tip.trl, "__path__"))
        for use in (
            lambda: tip.trl.TIPDistillationTrainer,
            lambda: exec("from tip_analysis.trl import TIPDistillationTrainer"),
        ):
            try:
                use()
            except ImportError as error:
                print(type(error).__name__, error)
        """,
    )
    first, *errors = ended.stdout.splitlines()
    assert first == "False True False", ended.stderr
    said = (
        "MissingExtraError tip_analysis.trl.TIPDistillationTrainer needs the package 'trl', which"
        ' is not installed; pip install "tip-analysis[trl]" brings it'
    )
    assert errors == [said, said]
