"""Run folders from strangers: `run.json` and shards spoiled in every way that `mutations` knows,
with hashes that fit and hashes that do not."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
from faults.mutations import mutate, spoil

from tip_analysis.cli import main as cli

Case = tuple[str, list[str]]
"""What was spoiled, and the command that reads it."""

TABLES = ("rollouts", "tokens", "gradients", "masks", "vocabulary")


def commands(run: Path, out: Path, rng: random.Random) -> list[str]:
    """A command that reads (or, with --overwrite, replaces) what a run folder holds."""
    return rng.choice(
        [
            ["status", str(run)],
            ["status", str(run), "--verify"],
            ["compare", str(run), str(run)],
            ["export", str(run), "--to", str(out), "--overwrite"],
            ["select", str(run), "--rules", "entropy", "--ratios", "0.3", "--overwrite"],
            ["select", str(run), "--rules", "q3", "--ratios", "0.25"],
        ]
    )


def record_cases(seed: int, number: int, good: Path, folder: Path) -> Iterator[Case]:
    """Copies of a good run whose `run.json` is spoiled."""
    text = (good / "run.json").read_bytes()
    for index in range(number):
        rng = random.Random(f"records {seed} {index}")
        run = fresh(good, folder, index)
        record = json.loads(text)
        for _ in range(rng.choice([1, 1, 2, 4])):
            record = mutate(record, rng) if rng.random() < 0.7 else lead_out(record, rng)
        content = json.dumps(record).encode()
        (run / "run.json").write_bytes(spoil(content, rng) if rng.random() < 0.2 else content)
        yield f"record {index}", commands(run, folder / f"flat-{index}", rng)
        shutil.rmtree(run)


def lead_out(record: Any, rng: random.Random) -> Any:
    """A record whose names lead out of the run folder."""
    name = rng.choice(["../../x.parquet", "/tmp/x", "..", "part-00000.parquet/../../../x", "~", ""])
    if not isinstance(record, dict) or not isinstance(record.get("stages"), dict):
        return record
    stages = [stage for stage in record["stages"].values() if isinstance(stage, dict)]
    if not stages:
        return record
    stage = rng.choice(stages)
    where = rng.choice(["shard", "table", "superseded", "key"])
    if where == "shard":
        stage["shards"] = {name: {"sha256": "0" * 64, "num_rows": 1}}
    elif where == "table":
        stage["table"] = name
    elif where == "superseded":
        record["superseded"] = [name, f"tokens/{name}"]
    else:
        record["stages"][f"score-{name}"] = stage
    return record


def shard_cases(seed: int, number: int, good: Path, folder: Path) -> Iterator[Case]:
    """Copies of a good run one of whose shards is spoiled: bytes, or values."""
    for index in range(number):
        rng = random.Random(f"shards {seed} {index}")
        run = fresh(good, folder, index)
        shard = rng.choice(sorted((run / rng.choice(TABLES)).glob("*.parquet")))
        if rng.random() < 0.5:
            shard.write_bytes(spoil(shard.read_bytes(), rng))
        else:
            spoil_values(shard, rng)
        if rng.random() < 0.6:
            fit_record(run, shard)
        yield f"shard {index} {shard.name}", commands(run, folder / f"flat-{index}", rng)
        shutil.rmtree(run)


def spoil_values(shard: Path, rng: random.Random) -> None:
    """A sound Parquet file whose rows are not what they should be."""
    frame = pl.read_parquet(shard, glob=False)
    column = rng.choice(frame.columns)
    row = rng.randrange(frame.height)
    at = pl.int_range(pl.len()) == row
    dtype = frame.schema[column]
    changes: list[Callable[[], pl.DataFrame]] = [
        lambda: frame.drop(column),
        lambda: frame.with_columns(pl.lit(1).alias("stranger")),
        lambda: frame.with_columns(pl.when(~at).then(pl.col(column)).alias(column)),
        lambda: (
            frame.with_columns(pl.col(column).cast(pl.String, strict=False).alias(column))
            if dtype != pl.List
            else frame.reverse()
        ),
        lambda: pl.concat([frame, frame[row : row + 1]]),
        lambda: frame.head(row),
        lambda: frame.with_columns(strange_value(frame, column, rng).alias(column)),
        lambda: frame.select(sorted(frame.columns)),
    ]
    rng.choice(changes)().write_parquet(shard)


def strange_value(frame: pl.DataFrame, column: str, rng: random.Random) -> pl.Expr:
    """One row of a column set to a value that does not belong there."""
    at = pl.int_range(pl.len()) == rng.randrange(frame.height)
    dtype = frame.schema[column]
    if dtype.is_float():
        value: Any = rng.choice([float("nan"), float("inf"), -1.0, -0.0, 1e30])
    elif dtype.is_integer():
        value = rng.choice([-1, 2**31 - 1, 0])
    elif dtype == pl.String:
        value = rng.choice(["", "../../x", "\x1b[2J", "x" * 5000, "a\u202eb"])
    elif dtype == pl.Boolean:
        return pl.when(at).then(~pl.col(column)).otherwise(column)
    elif isinstance(dtype, pl.List):
        return pl.when(at).then(pl.col(column).list.head(1)).otherwise(column)
    else:
        return pl.col(column).reverse()
    return pl.when(at).then(pl.lit(value, dtype)).otherwise(column)


def fit_record(run: Path, shard: Path) -> None:
    """Have `run.json` say what the shard now is, as somebody would who wants it to be read."""
    record = json.loads((run / "run.json").read_bytes())
    try:
        num_rows = pl.scan_parquet(shard, glob=False).select(pl.len()).collect().item()
    except (pl.exceptions.PolarsError, OSError):
        num_rows = None
    for stage in record["stages"].values():
        if (entry := stage["shards"].get(shard.name)) and stage["table"] == shard.parent.name:
            entry["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
            entry["num_rows"] = entry["num_rows"] if num_rows is None else num_rows
    (run / "run.json").write_text(json.dumps(record))


def fresh(good: Path, folder: Path, index: int) -> Path:
    """A copy of the good run."""
    run = folder / f"run-{index}"
    shutil.copytree(good, run)
    return run


def run_case(arguments: list[str]) -> int:
    """The exit status of a command in this process."""
    try:
        cli.main(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0
