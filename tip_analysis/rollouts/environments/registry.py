"""Environments by name: registered ones, `FILE.py:CLASS`, and DeepPlanning.

Code is loaded only for what a user names in a call or on the command line; the name of an
environment in a run folder is never followed.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tip_analysis.core.atomic_files import file_hash
from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.text import one_line
from tip_analysis.core.toy_pairs import toy_pairs
from tip_analysis.rollouts.environments.protocol import Environment
from tip_analysis.rollouts.prompts import Prompt, usable_prompts
from tip_analysis.rollouts.row_files import Row

Rows = Callable[[], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class EnvironmentSource:
    """Where environments come from: one is made for each rollout."""

    name: str
    """As tables and records have it."""
    make: Callable[[], Environment]
    rows: Rows | None = None
    """Its own tasks, as rows of a file of prompts."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What decides how it answers, beside its name: part of a stage's configuration."""

    def identity(self) -> dict[str, Any]:
        """Part of a stage's configuration."""
        return {"environment": self.name, **self.facts}

    def tasks(self, limit: int | None = None) -> list[Prompt]:
        """Its own tasks.

        Raises:
            OptionError: it has none.
        """
        if self.rows is None:
            raise OptionError(
                f"the environment {self.name} has no tasks of its own: give --prompts"
            )
        named = (
            Row(f"{self.name}, task {index}", dict(row)) for index, row in enumerate(self.rows())
        )
        return usable_prompts(named, self.name, stem=self.name, limit=limit)


_registered: dict[str, EnvironmentSource] = {}


def register_environment(
    name: str,
    make: Callable[[], Environment],
    *,
    tasks: Rows | None = None,
    overwrite: bool = False,
) -> None:
    """Make an environment usable by name.

    Args:
        name: what users call it.
        make: makes one for each rollout.
        tasks: gives rows of prompts, where it has tasks of its own.
        overwrite: replace one of that name.

    Raises:
        OptionError: the name is empty or taken, or could be read as a file's or a package's.
    """
    if not name or name != name.strip() or ":" in name:
        raise OptionError(
            f"an environment needs a name without spaces around it or ':'; found {name!r}"
        )
    if name in _known() and not overwrite:
        raise OptionError(
            f"there is an environment {name!r} already; choose another name, or pass overwrite=True"
        )
    _registered[name] = EnvironmentSource(name, make, tasks)


def _known() -> dict[str, EnvironmentSource]:
    """Those of toy pairs, and those that were registered."""
    pairs = {
        pair.name: EnvironmentSource(pair.name, pair.environment, _pair_rows(pair))
        for pair in toy_pairs().values()
        if pair.environment is not None
    }
    return pairs | _registered


def _pair_rows(pair: Any) -> Rows:
    return lambda: pair.prompts(pair.name)


def resolve_environment(name: "str | EnvironmentSource") -> EnvironmentSource:
    """The environment that a name stands for.

    Args:
        name: a registered name, `FILE.py:CLASS`, or `deepplanning:DIR`.

    Raises:
        UnknownNameError: none of these.
        OptionError: it cannot be loaded.
    """
    if isinstance(name, EnvironmentSource):
        return name
    known = _known()
    if name in known:
        return known[name]
    kind, colon, rest = name.partition(":")
    if colon and kind == "deepplanning":
        from tip_analysis.rollouts.environments.deepplanning import deepplanning_source

        return deepplanning_source(rest)
    file, colon, cls = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), cls)
    valid = [*known, "FILE.py:CLASS", "deepplanning:DIR"]
    raise UnknownNameError("environment", name, valid)


def _from_file(path: Path, name: str) -> EnvironmentSource:
    if not path.is_file():
        raise OptionError(f"the environment's file {path} does not exist")
    module = load_file(path)
    made: Any = getattr(module, name, None)
    if not callable(made):
        found = "no such name" if made is None else f"a {type(made).__name__}"
        raise OptionError(f"the environment {path}:{name}: expected a class, found {found}")
    missing = [
        part for part in ("reset", "step", "reward") if not callable(getattr(made, part, None))
    ]
    if missing:
        raise OptionError(f"the environment {path}:{name} has no function {missing[0]!r}")
    rows: Any = getattr(made, "tasks", None)
    facts = {"environment_file": file_hash(path)}
    own_tasks = cast(Rows, rows) if callable(rows) else None
    return EnvironmentSource(
        f"{path.name}:{name}", cast(Callable[[], Environment], made), own_tasks, facts
    )


def load_file(path: Path) -> Any:
    """The module that a Python file of the user's makes.

    Raises:
        OptionError: it cannot be imported.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # a user's module may fail in any way
        reason = one_line(f"{type(problem).__name__}: {problem}", 200)
        raise OptionError(f"{path} cannot be imported: {reason}") from problem
    return module
