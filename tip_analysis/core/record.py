"""`run.json`: how each table of a run came to be, as a typed record.

A run folder may come from anywhere, so the record is checked whenever it is read: what has the
wrong shape is named with its place in the file, and the only file names that it may hold are those
that this package gives to shards. No name from a file becomes a path otherwise.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import from_json
from typing_extensions import TypedDict

from tip_analysis.core.atomic_files import write_atomically
from tip_analysis.core.errors import RunError
from tip_analysis.core.names import TeacherContext, TeacherStoreForm
from tip_analysis.core.schema import SCHEMA_VERSION
from tip_analysis.core.text import first_line

Record = dict[str, Any]

TABLE_OF_STAGE = {
    "rollout": "rollouts",
    "teacher": "teacher_states",
    "vocabulary": "vocabulary",
    "score": "tokens",
    "gradients": "gradients",
    "select": "masks",
    "screen": "screens",
    "rank": "rankings",
    "influence": "influences",
    "intervene": "interventions",
    "ablate": "ablations",
    "dynamics": "dynamics",
    "keep": "checkpoints",
    "track": "trajectories",
    "evaluate": "evaluations",
}
"""The folder that each stage fills."""

COMMAND_OF_STAGE = {
    "teacher": "score --phase teacher",
    "vocabulary": "score",
    "rank": "rank-rules",
    "keep": "ablate --keep-every N",
    "dynamics": "ablate",
}
"""The command that does a stage, where it has another name."""

SHARD_SUFFIX = {"teacher_states": ".safetensors", "checkpoints": ".safetensors"}
"""How shards are called that are no Parquet files."""

_ON_TOKENS = ("gradients", "select", "screen", "rank", "influence", "intervene", "track")
BUILT_ON = {
    "rollout": ("teacher", "vocabulary", "score", *_ON_TOKENS),
    "score": ("vocabulary", *_ON_TOKENS),
}
"""Stages whose rows lose their meaning when a stage starts afresh."""

_SHARD = r"(?:[0-9a-f]{8}-)?part-[0-9]{5,9}(?:\.g[0-9]{1,9})?\.(?:parquet|safetensors)"
ShardName = Annotated[str, StringConstraints(pattern=f"^{_SHARD}$")]
"""The names that shards have: `part-00003.parquet`, `1f2e3d4c-part-00000.g1.parquet` …"""
ShardPath = Annotated[
    str, StringConstraints(pattern=f"^(?:{'|'.join(TABLE_OF_STAGE.values())})/{_SHARD}$")
]
Count = Annotated[int, Field(ge=0, lt=2**63)]


def _stage_key(key: str) -> str:
    if not re.fullmatch(r"[a-z_]+(-[0-9a-f]{8})?", key) or stage_of(key) not in TABLE_OF_STAGE:
        raise ValueError(f"no stage is called {key!r:.60}")
    return key


class Model(TypedDict, total=False):
    """What is kept of a model; more may stand beside it."""

    name: str
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]


class Config(TypedDict, total=False):
    """Those options of a stage that other stages read back; more stand beside them."""

    student: Model | str
    teacher: Model | str
    teacher_context: Annotated[str, AfterValidator(TeacherContext)]
    shard_size: Annotated[int, Field(ge=1)]
    shared_vocabulary: Annotated[int, Field(ge=1, lt=2**31)]
    chat_template_kwargs: dict[str, Any]
    head_fingerprint: str
    form: Annotated[str, AfterValidator(TeacherStoreForm)]
    store_k: Annotated[int, Field(ge=1)]
    approximate: str
    lower_bounds: list[str]
    not_available: list[str]


class Environment(TypedDict, total=False):
    """With what a stage was run."""

    python: str
    versions: dict[str, str]
    git_commit: str | None
    machine: str
    num_cores: int | None
    command: str | None


class ShardRecord(TypedDict, total=False):
    """One shard as it was written; further facts stand beside it."""

    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    num_rows: Count
    padding_waste: float
    tail_mass: float
    norms: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]


@with_config(ConfigDict(extra="allow"))
class StageRecord(TypedDict):
    """One stage under one identity."""

    table: str
    config: Config
    inputs: dict[str, str]
    settings: dict[str, Any]
    environment: Environment
    began: str
    finished: str | None
    wall_time_s: Annotated[float, Field(ge=0)]
    shards: dict[ShardName, ShardRecord]
    summary: dict[str, Any]


@with_config(ConfigDict(extra="allow"))
class RunRecord(TypedDict):
    """The whole of `run.json`."""

    schema_version: int
    stages: dict[Annotated[str, AfterValidator(_stage_key)], StageRecord]


for _part in (Model, Config, Environment, ShardRecord):
    with_config(ConfigDict(extra="allow"))(_part)


_RECORD = TypeAdapter(RunRecord)
_SUPERSEDED = TypeAdapter(list[ShardPath])


def read_record(path: Path) -> Record:
    """`run.json`, checked.

    Raises:
        RunError: it is not readable, was written by a newer version, or holds something that this
            package does not write; says what and where.
    """
    try:
        found = from_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is not readable: {first_line(error)}") from error
    version = found.get("schema_version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RunError(f"{path} has schema version {version}, newer than {SCHEMA_VERSION}; update")
    try:
        record: Any = _RECORD.validate_python(found, strict=True)
        _SUPERSEDED.validate_python(record.get("superseded", []), strict=True)
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {_in_words(error)}") from error
    for key, stage in record["stages"].items():
        _check_stage(path, key, stage)
    return record


def _check_stage(path: Path, key: str, stage: Record) -> None:
    where = f"{path} is damaged: stages.{key}"
    table = TABLE_OF_STAGE[stage_of(key)]
    if stage["table"] != table:
        raise RunError(f"{where}.table: expected {table!r}, found {stage['table']!r:.60}")
    for name, shard in stage["shards"].items():
        if missing := {"sha256", "num_rows"} - shard.keys():
            raise RunError(f"{where}.shards.{name}: {sorted(missing)[0]} is missing")
    for role in ("student", "teacher"):
        model = stage["config"].get(role)
        if isinstance(model, dict) and "name" not in model:
            raise RunError(f"{where}.config.{role}: name is missing")


def _in_words(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    found = first["input"]
    shown = type(found).__name__ if isinstance(found, dict | list) else repr(found)
    more = error.error_count() - 1
    rest = f" (and {more} more)" if more else ""
    return f"{where}: {first['msg']}, found {shown:.80}{rest}"


def write_record(path: Path, record: Record) -> None:
    """Write `run.json`, whole or not at all."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, "utf-8"))


def stage_of(key: str) -> str:
    """The stage of a record's key: `select` of `select-1f2e3d4c`."""
    return key.split("-", maxsplit=1)[0]


def model_name(model: Any) -> str | None:
    """The name of a model in a configuration; None where it has none."""
    name = model.get("name") if isinstance(model, dict) else model
    return name if isinstance(name, str) else None


def config_hash(value: Any) -> str:
    """A short stable hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(jsonable(value), sort_keys=True).encode()).hexdigest()[:16]


def jsonable(value: Any) -> Any:
    """Through JSON and back, so that what is compared is what is stored; bytes of a path that are
    no text are written out."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return json.loads(re.sub("[\ud800-\udfff]", lambda half: f"\\\\u{ord(half[0]):04x}", text))


def differences(known: Record, identity: Record) -> list[str]:
    """What differs between two identities, each as `option: old → new`."""
    old, new = (_flat(value["config"] | value["inputs"]) for value in (known, identity))
    return [
        f"{key}: {_brief(old.get(key))} → {_brief(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(record: Record, prefix: str = "") -> Record:
    """Nested records as one, with keys such as `teacher.name`."""
    flat: Record = {}
    for key, value in record.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
