"""DeepPlanning as an environment: `deepplanning:DIR`, DIR the user's checkout of the benchmark.

Queries, tool schemas, tool classes, prompts and evaluation are used from there; none is copied. Its
databases must lie where its README puts them. Each rollout has a process of its own with the
benchmark's code (`deepplanning_worker`); a shopping rollout also has a copy of its case, since the
tools write the cart there.

`DIR#travel-en`, `DIR#travel-zh`, `DIR#shopping-1` … take one set of tasks; without, all that are
there. Rewards: shopping, the share of products and coupons that match (its `score`); travel, its
`composite_score`, for which its conversion of plans asks the model that its README names.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_analysis.core.atomic_files import file_hash
from tip_analysis.core.errors import InputError, OptionError
from tip_analysis.core.text import one_line
from tip_analysis.rollouts.environments.protocol import Reward, Task, Trajectory
from tip_analysis.rollouts.environments.registry import EnvironmentSource
from tip_analysis.rollouts.environments.tool_box import TOOL_TIMEOUT_S, error_text
from tip_analysis.rollouts.prompts import Message

_WORKER = Path(__file__).with_name("deepplanning_worker.py")
START_TIMEOUT_S = 120.0
"""How long the benchmark's imports may take, and an evaluation."""


@dataclass(frozen=True)
class TaskSet:
    """One file of queries."""

    name: str
    """`travel-en`, `shopping-1` …"""
    kind: str
    """`travel` or `shopping`."""
    variant: str
    """The language, or the level."""
    queries: Path
    schema: Path
    database: Path

    @property
    def domain(self) -> Path:
        """Folder of the domain."""
        return self.queries.parent.parent

    def rows(self) -> list[dict[str, Any]]:
        """Its queries as rows of prompts."""
        with self.queries.open(encoding="utf-8") as file:
            found = json.load(file)
        return [
            {"id": f"{self.name}/{row['id']}", "problem": row["query"], "task_set": self.name}
            for row in found
        ]

    def tools(self) -> list[Any]:
        """Its tool schemas."""
        with self.schema.open(encoding="utf-8") as file:
            return json.load(file)


def task_sets(folder: Path) -> dict[str, TaskSet]:
    """The sets of tasks that a checkout holds, by name.

    Raises:
        OptionError: it is no checkout of the benchmark.
    """
    inside = folder / "benchmark" / "deepplanning"
    root = (inside if inside.is_dir() else folder).resolve()
    travel, shopping = root / "travelplanning", root / "shoppingplanning"
    found = [
        TaskSet(
            f"travel-{language}",
            "travel",
            language,
            travel / "data" / f"travelplanning_query_{language}.json",
            travel / "tools" / f"tool_schema_{language}.json",
            travel / "database" / f"database_{language}",
        )
        for language in ("en", "zh")
    ] + [
        TaskSet(
            f"shopping-{level}",
            "shopping",
            level,
            shopping / "data" / f"level_{level}_query_meta.json",
            shopping / "tools" / "shopping_tool_schema.json",
            shopping / "database",
        )
        for level in "123"
    ]
    there = {one.name: one for one in found if one.queries.is_file() and one.schema.is_file()}
    if not there:
        raise OptionError(
            f"{folder} is no checkout of DeepPlanning: expected travelplanning/data/"
            "travelplanning_query_en.json or shoppingplanning/data/level_1_query_meta.json in it"
        )
    return there


def deepplanning_source(place: str) -> EnvironmentSource:
    """The environment of a checkout.

    Args:
        place: `DIR`, or `DIR#SET` for one set of tasks.

    Raises:
        OptionError: there is no such checkout or set, or its databases are not there.
    """
    folder, _, name = place.partition("#")
    sets = task_sets(Path(folder).expanduser())
    if name and name not in sets:
        raise OptionError(f"{folder} has no set of tasks {name!r}; there are {', '.join(sets)}")
    chosen = {name: sets[name]} if name else sets
    if missing := [one for one in chosen.values() if not one.database.is_dir()]:
        raise OptionError(
            f"the databases of {missing[0].name} are not there: expected {missing[0].database};"
            " the benchmark's README says where they come from"
        )
    hashes = {f"{one.name} queries": file_hash(one.queries) for one in chosen.values()}
    hashes |= {f"{one.name} tools": file_hash(one.schema) for one in chosen.values()}
    return EnvironmentSource(
        f"deepplanning#{name}" if name else "deepplanning",
        lambda: DeepPlanning(chosen),
        lambda: [row for one in chosen.values() for row in one.rows()],
        {"deepplanning": hashes},
    )


class Worker:
    """A process with the benchmark's code of one domain."""

    def __init__(self, task_set: TaskSet) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self.ask("open", folder=str(task_set.domain), kind=task_set.kind)

    def ask(self, what: str, timeout_s: float = START_TIMEOUT_S, **arguments: Any) -> Any:
        """What the process finds.

        Raises:
            InputError: the benchmark's code failed, or took too long (then the process is ended).
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(timeout_s, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps({"do": what, "with": arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            raise InputError(f"DeepPlanning, {what}: no answer within {timeout_s:g} s")
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(f"DeepPlanning, {what}: {one_line(answer['error'], 300)}")
        return answer["found"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        self._process.wait()


_prompts: dict[tuple[Path, str, str], str] = {}


def system_prompt(task_set: TaskSet) -> str:
    """The benchmark's system prompt; read once, when its tools are tried too.

    Raises:
        InputError: the benchmark's code fails, or lacks a tool that its schema names.
    """
    key = (task_set.domain, task_set.kind, task_set.variant)
    if key not in _prompts:
        worker = Worker(task_set)
        try:
            found = worker.ask("prompt", variant=task_set.variant)
            _check_tools(worker, task_set)
        finally:
            worker.close()
        _prompts[key] = found
    return _prompts[key]


def _check_tools(worker: Worker, task_set: TaskSet) -> None:
    """The benchmark's agent leaves out tools that cannot be imported, without a word."""
    sample = task_set.rows()[0]["id"].rpartition("/")[2]
    place, variant = str(task_set.database), task_set.variant
    there = worker.ask("set_up", sample=sample, variant=variant, database=place)
    named = [tool["function"]["name"] for tool in task_set.tools()]
    if missing := [name for name in named if name not in there]:
        raise InputError(
            f"DeepPlanning, {task_set.name}: the benchmark's agent has no tool {missing[0]!r} that"
            f" its schema names (it has {', '.join(there) or 'none'}): are its requirements"
            " installed beside this package?"
        )


class DeepPlanning:
    """One task of the benchmark, as its own runner would lead through it."""

    def __init__(
        self, sets: Mapping[str, TaskSet], *, tool_timeout_s: float = TOOL_TIMEOUT_S
    ) -> None:
        self._sets, self._timeout_s = sets, tool_timeout_s
        self._worker: Worker | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._asked_again = False

    def reset(self, task: Task) -> tuple[list[Message], list[Any]]:
        """Show a query under the benchmark's prompt.

        Raises:
            InputError: it is none of the benchmark's.
        """
        self.close()
        name, _, self._sample = task.id.rpartition("/")
        if name not in self._sets:
            raise InputError(f"task {task.id!r} is none of {', '.join(self._sets)}")
        self._set, self._asked_again = self._sets[name], False
        messages = [
            {"role": "system", "content": system_prompt(self._set)},
            {"role": "user", "content": str(task.row["problem"])},
        ]
        return messages, self._set.tools()

    def step(self, message: Message) -> tuple[list[Message], bool]:
        """Let the benchmark's tools answer; a shopper who stops is asked once to look again."""
        calls = message.get("tool_calls") or []
        if calls:
            return [self._answer(call) for call in calls], False
        if self._set.kind == "travel" or self._asked_again:
            return [], True
        self._asked_again = True
        return [{"role": "user", "content": self._at_work().ask("second_question")}], False

    def reward(self, trajectory: Trajectory) -> Reward:
        """The benchmark's own verdict."""
        try:
            return (
                self._travel(trajectory) if self._set.kind == "travel" else self._shop(trajectory)
            )
        finally:
            self.close()

    def close(self) -> None:
        """End the process, and remove the copy of the case."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _answer(self, call: Mapping[str, Any]) -> Message:
        function = call["function"]
        arguments = function["arguments"]
        text = (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )
        try:
            content = self._at_work().ask(
                "call", self._timeout_s, name=str(function["name"]), arguments=text
            )
        except InputError as problem:  # the process may be gone: the next call starts another
            content = error_text(str(problem))
            self._restart()
        said = {"role": "tool", "name": str(function["name"]), "content": str(content)}
        return said | ({"tool_call_id": call["id"]} if "id" in call else {})

    def _restart(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _at_work(self) -> Worker:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="deepplanning-")
            if self._set.kind == "shopping":
                case = f"case_{self._sample}"
                shutil.copytree(self._set.database / case, self._case)
        if self._worker is None:
            self._worker = Worker(self._set)
            self._worker.ask(
                "set_up", sample=self._sample, variant=self._set.variant, database=self._database
            )
        return self._worker

    @property
    def _case(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"case_{self._sample}"

    @property
    def _database(self) -> str:
        assert self._folder is not None
        return self._folder.name if self._set.kind == "shopping" else str(self._set.database)

    def _shop(self, trajectory: Trajectory) -> Reward:
        worker = self._at_work()
        said = json.dumps({"messages": list(trajectory.messages)}, ensure_ascii=False)
        (self._case / "messages.json").write_text(said, encoding="utf-8")
        found = worker.ask("score_cart", case=str(self._case))
        if not found["success"]:
            raise InputError(f"DeepPlanning, {trajectory.task.id}: {found.get('error')}")
        names = ("score", "case_score", "coupon_score", "is_completed")
        return Reward(float(found["score"]), {name: float(found[name]) for name in names})

    def _travel(self, trajectory: Trajectory) -> Reward:
        last = trajectory.messages[-1]
        worker = self._at_work()
        assert self._folder is not None
        found = worker.ask(
            "score_plan",
            content=str(last["content"]) if last["role"] == "assistant" else "",
            sample=self._sample,
            variant=self._set.variant,
            database=self._database,
            results=str(Path(self._folder.name) / "results"),
        )
        parts = {name: float(value) for name, value in found.items()}
        return Reward(parts.get("composite_score", 0.0), parts)
