"""Whole runs in awkward places: names that are patterns, links, case and Unicode form, other
processes at work, strangers' shards."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from faults.run_folders import fit_record, run_case
from synthetic import make_tables, write_run

from tip_analysis.analysis.flat_files import export_run
from tip_analysis.analysis.masks import write_masks
from tip_analysis.analysis.run_view import ReportOptions, open_views
from tip_analysis.core.errors import LockedError, OptionError, RunError, SchemaError
from tip_analysis.core.locks import TIMEOUT_VARIABLE
from tip_analysis.core.run_folder import create_run, open_run


@pytest.fixture(scope="module")
def tables():
    return make_tables(num_prompts=4, rollouts_per_prompt=2, mean_length=8)


@pytest.fixture(scope="module")
def others(tables):
    """The tables of another run."""
    return make_tables(num_prompts=3, rollouts_per_prompt=2, mean_length=5, seed=9)


@pytest.fixture
def run(tables, tmp_path) -> Path:
    return write_run(tmp_path / "run", tables)


PATTERNS = [
    "g[1]",
    "a*b",
    "a?b",
    "**",
    "[!x]",
    "{a,b}",
    "a b",
    "x=1",
    "%41",
    "file:x",
    "~",
    "$HOME",
]


@pytest.mark.parametrize("name", PATTERNS)
def test_no_name_of_a_folder_is_a_pattern(name, tables, others, tmp_path):
    for decoy in ("g1", "axb", "aXXb", "y", "a", "b", "A"):
        write_run(tmp_path / decoy, others)
    path = write_run(tmp_path / name, tables)
    run = open_run(path)
    for table in ("rollouts", "tokens", "gradients", "masks"):
        assert run.table(table).collect().equals(getattr(tables, table)), table
    masks = write_masks(run, rules=["entropy"], retention_ratios=[0.3])
    assert set(masks["rollout_id"]) <= set(tables.rollouts["rollout_id"])
    flat = tmp_path / f"{name} flat"
    written = export_run(run, flat)
    assert written[flat / "tokens.parquet"] == tables.tokens.height
    assert run_case(["compare", str(path), str(tmp_path / "g1")]) == 0
    (view,) = open_views([path], ReportOptions())
    assert view.population.num_tokens == tables.tokens.height


def test_one_folder_under_two_spellings_is_one_folder(run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run)
    for other in (f"{run}/", link, run / ".." / "run"):
        with pytest.raises(OptionError, match="one folder"):
            open_views([run, other], ReportOptions())


@pytest.mark.parametrize(
    "names", [("run", "RUN"), ("café", unicodedata.normalize("NFD", "café")), ("a/run", "b/run")]
)
def test_folders_that_look_alike_are_told_apart(names, tables, others, tmp_path):
    paths = [tmp_path / name for name in names]
    for path, one in zip(paths, (tables, others), strict=True):
        path.parent.mkdir(exist_ok=True)
        write_run(path, one)
    if paths[0].samefile(paths[1]):
        pytest.skip("this file system takes both names for one")
    views = open_views(paths, ReportOptions())
    heights = [view.population.num_tokens for view in views]
    assert heights == [tables.tokens.height, others.tokens.height]
    shown = {unicodedata.normalize("NFC", view.name).casefold() for view in views}
    assert len(shown) == 2


def spoiled(run: Path, table: str, change, *, fit: bool = True) -> Path:
    (shard,) = (run / table).glob("*.parquet")
    frame = pl.read_parquet(shard, glob=False)
    change(frame).write_parquet(shard)
    if fit:
        fit_record(run, shard)
    return shard


def at_row(name: str, value, row: int = 3):
    return lambda frame: frame.with_columns(
        pl.when(pl.int_range(pl.len()) == row)
        .then(pl.lit(value, frame.schema[name]))
        .otherwise(name)
        .alias(name)
    )


_NAN = "row 3: student_entropy must not be NaN"
_BELOW = "row 3: teacher_entropy is below its range"
FAULTS = {
    "NaN": (
        "tokens",
        at_row("student_entropy", float("nan")),
        "row 3: student_entropy must not be NaN",
    ),
    "below": (
        "tokens",
        at_row("teacher_entropy", -1.0),
        "row 3: teacher_entropy is below its range",
    ),
    "null": ("tokens", at_row("token_id", None), "row 3: token_id must not be null"),
    "twice": (
        "tokens",
        lambda frame: pl.concat([frame, frame[5:6]]),
        r"row 5: the key \(.*\) must not occur twice",
    ),
    "top tokens": (
        "tokens",
        lambda frame: frame.with_columns(
            pl.when(pl.int_range(pl.len()) == 2)
            .then(pl.col("teacher_topk_ids").list.head(1))
            .otherwise("teacher_topk_ids")
            .alias("teacher_topk_ids")
        ),
        "row 2: breaks the rule 'top tokens have probabilities'",
    ),
    "mask": (
        "rollouts",
        lambda frame: frame.with_columns(
            pl.when(pl.int_range(pl.len()) == 2)
            .then(pl.col("loss_mask").list.head(1))
            .otherwise("loss_mask")
            .alias("loss_mask")
        ),
        "row 2: breaks the rule 'mask has response length'",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_rows_that_break_the_contract_are_named_by_file_and_row(name, run, capfd):
    table, change, says = FAULTS[name]
    shard = spoiled(run, table, change)
    with pytest.raises(SchemaError, match=says) as refused:
        open_run(run).table(table)
    assert str(shard) in str(refused.value)
    assert "\n" not in str(refused.value)
    commands = [["export", str(run), "--to", f"{run}-flat"], ["compare", str(run), str(run)]]
    for command in commands[: 2 if table == "tokens" else 1]:
        capfd.readouterr()
        assert run_case(command) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1


def test_ids_outside_the_shared_vocabulary_are_named(tables, tmp_path):
    size = len(tables.vocabulary)
    path = write_run(tmp_path / "run", tables, config={"shared_vocabulary": size})
    assert open_run(path).tokens().collect().height
    spoiled(path, "tokens", at_row("token_id", size))
    with pytest.raises(SchemaError, match=rf"row 3: token_id holds {size}, outside the vocabulary"):
        open_run(path).tokens()


@pytest.mark.parametrize("column", ["prompt_token_ids", "response_token_ids"])
def test_ids_outside_the_students_vocabulary_are_named(tables, tmp_path, column):
    size = len(tables.vocabulary)
    path = write_run(tmp_path / "run", tables)
    record = json.loads((path / "run.json").read_bytes())
    record["stages"]["rollout"]["config"]["student"] = {"name": "s", "vocab_size": size}
    (path / "run.json").write_text(json.dumps(record))
    assert open_run(path).rollouts().collect().height
    outside = pl.lit([size], pl.List(pl.Int32)).list.concat(pl.col(column).list.slice(1))
    at = pl.int_range(pl.len()) == 3
    spoiled(
        path,
        "rollouts",
        lambda frame: frame.with_columns(pl.when(at).then(outside).otherwise(column).alias(column)),
    )
    with pytest.raises(SchemaError, match=rf"row 3: {column} holds {size}, outside the vocabulary"):
        open_run(path).rollouts()


@pytest.mark.parametrize("verify", [False, True])
def test_tokens_of_other_rollouts_are_named(tables, others, tmp_path, verify):
    """Each table sound, each hash right: but the rollouts are those of another run."""
    path = write_run(tmp_path / "run", tables)
    made_of = open_run(path).table_hash("rollouts")
    record = json.loads((path / "run.json").read_bytes())
    record["stages"]["score"]["inputs"] = {"rollouts": made_of}
    (path / "run.json").write_text(json.dumps(record))
    assert open_run(path).tokens().collect().height
    spoiled(path, "rollouts", lambda _: others.rollouts)
    with pytest.raises(RunError, match="score was made of other rollouts than those"):
        open_run(path).verify() if verify else open_run(path).tokens()


def test_bytes_altered_under_a_sound_footer_are_named(run):
    (shard,) = (run / "tokens").glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises((RunError, SchemaError), match=r"tokens/part-00000\.parquet"):
        open_run(run).tokens()


def test_sound_rows_that_were_altered_are_refused_but_by_readers_that_warn(run, tables):
    spoiled(run, "tokens", at_row("token", "changed"), fit=False)
    with pytest.raises(RunError, match="altered since it was written"):
        open_run(run).tokens()
    assert open_run(run, on_altered="accept").tokens().collect().height == tables.tokens.height


def test_a_shard_that_is_not_on_record_is_named(run):
    (shard,) = (run / "tokens").glob("*.parquet")
    shutil.copy(shard, shard.with_name("part-00001.parquet"))
    with pytest.raises(RunError, match=r"part-00001\.parquet is not on record"):
        open_run(run).tokens()


def test_a_shard_that_is_missing_is_named(run):
    (shard,) = (run / "tokens").glob("*.parquet")
    shard.unlink()
    with pytest.raises(RunError, match=r"part-00000\.parquet is on record but missing"):
        open_run(run).tokens()


def test_a_second_shard_of_another_schema_is_named(tables, tmp_path):
    run = create_run(tmp_path / "run")
    stage = run.begin("select", config={}, additive=True)
    stage.write(0, tables.masks[:5])
    second = stage.write(1, tables.masks[5:])
    pl.read_parquet(second).with_columns(extra=1).write_parquet(second)
    fit_record(run.path, second)
    with pytest.raises(SchemaError, match=r"part-00001.parquet has other columns .*'extra'"):
        run.masks()


def test_a_key_in_two_shards_is_named(tables, tmp_path):
    run = create_run(tmp_path / "run")
    stage = run.begin("select", config={}, additive=True)
    stage.write(0, tables.masks[:5])
    stage.write(1, tables.masks[4:])
    with pytest.raises(SchemaError, match=r"part-00001.parquet, row 0: the key .* another shard"):
        run.masks()


@pytest.mark.parametrize("verify", [True, False])
def test_verify_checks_what_is_too_large_to_be_checked_by_default(run, verify, monkeypatch, capfd):
    monkeypatch.setattr("tip_analysis.core.run_folder.CHEAP_BYTES", 0)
    spoiled(run, "tokens", at_row("token", "changed"), fit=False)
    command = ["compare", str(run), str(run), *(["--verify"] if verify else [])]
    assert run_case(command) == (2 if verify else 0)
    assert ("altered" in capfd.readouterr().err) == verify


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "part-00000.parquet/../x", "part-1.parquet"])
@pytest.mark.parametrize("where", ["shards", "superseded"])
def test_names_that_lead_out_of_the_run_are_refused(name, where, run, tmp_path):
    (tmp_path / "x").write_text("mine")
    record = json.loads((run / "run.json").read_bytes())
    if where == "shards":
        record["stages"]["score"]["shards"][name] = {"sha256": "0" * 64, "num_rows": 1}
    else:
        record["superseded"] = [f"tokens/{name}"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        open_run(run).begin("score", config={"a": 2}, overwrite=True)
    assert (tmp_path / "x").read_text() == "mine"


def test_a_table_that_is_a_link_is_neither_written_nor_emptied(run, tables, tmp_path):
    shutil.move(run / "tokens", tmp_path / "elsewhere")
    (run / "tokens").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="must be a folder of the run itself"):
        open_run(run).begin("score", config={"a": 2}, overwrite=True)
    open_run(run).discard("score")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_rules_that_are_paths_export_into_the_folder_alone(tables, tmp_path):
    masks = tables.masks.with_columns(rule=pl.lit("../../../x"))
    path = write_run(tmp_path / "run", replace(tables, masks=masks.unique(maintain_order=True)))
    export_run(open_run(path), tmp_path / "a" / "b" / "flat")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "a"}
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {"flat"}
    assert all("%2F" in p.name for p in (tmp_path / "a/b/flat/labels").iterdir())


def test_an_export_into_the_run_is_refused(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    for folder in (run, run / "tokens", tmp_path / "link" / "flat"):
        with pytest.raises(OptionError, match="lies in the run folder"):
            export_run(open_run(run), folder, overwrite=True)


def test_an_export_removes_nothing_but_its_own_older_files(run, tmp_path):
    flat = tmp_path / "flat"
    export_run(open_run(run), flat)
    labels = sorted((flat / "labels").iterdir())
    labels[0].write_text("changed by hand")
    (flat / "notes.txt").write_text("mine")
    opened = open_run(run)
    for key in [key for key in opened.stages() if key.startswith("select")]:
        opened.discard(key)
    with pytest.raises(OptionError, match="not empty"):
        export_run(open_run(run), flat)
    export_run(open_run(run), flat, overwrite=True)
    assert (flat / "notes.txt").read_text() == "mine"
    assert list((flat / "labels").iterdir()) == [labels[0]]


def test_selecting_twice_leaves_a_finished_mask_finished(run):
    for _ in range(2):
        write_masks(open_run(run), rules=["entropy"], retention_ratios=[0.3])
        assert all(stage["finished"] for stage in open_run(run).stages().values())


@pytest.fixture
def other_process():
    """Starts Python in another process, which says `ready`; kills it in the end."""
    begun: list[subprocess.Popen] = []

    def start(script: str, *arguments: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in begun:
        end(process)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


WORKER = """
    import sys
    from tip_analysis.core.run_folder import open_run
    stage = open_run(sys.argv[1]).begin(sys.argv[2], config={"a": 1}, additive=True)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_another_process_reads_is_not_replaced(other_process, run, monkeypatch, tables):
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.3")
    worker = other_process(WORKER, run, "gradients")
    says = rf"score is held by process {worker.pid} on .* since .*, at work on `gradients`"
    with pytest.raises(LockedError, match=says):
        open_run(run).begin("score", config={"a": 2}, overwrite=True)
    end(worker)
    stage = open_run(run).begin("score", config={"a": 2}, overwrite=True)
    stage.write(0, tables.tokens)
    assert open_run(run).stages()["score"]["config"] == {"a": 2}


def test_what_another_process_replaces_is_not_read_for_new_rows(other_process, run, monkeypatch):
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.3")
    replacing = WORKER.replace("additive=True", "overwrite=True")
    worker = other_process(replacing, run, "score")
    with pytest.raises(LockedError, match="replacing `score`"):
        open_run(run).begin("gradients", config={"a": 2}, additive=True)
    end(worker)
    open_run(run).begin("gradients", config={"a": 2}, additive=True)


def test_a_held_lock_says_who_holds_it_and_since_when(other_process, run, monkeypatch, caplog):
    monkeypatch.setattr("tip_analysis.core.locks.SAY_AFTER", 0.2)
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.8")
    holder = other_process(
        """
        import sys
        from tip_analysis.core.run_folder import open_run
        with open_run(sys.argv[1]).locked():
            print("ready", flush=True)
            sys.stdin.read()
        """,
        run,
    )
    who = rf"run\.json is held by process {holder.pid} on {os.uname().nodename} .*since 2"
    with pytest.raises(LockedError, match=rf"{who}.*gave up after 0\.8 s \(--lock-timeout\)"):
        open_run(run).begin("score", config={"a": 1})
    assert f"held by process {holder.pid}" in caplog.text
    end(holder)
    assert open_run(run).begin("evaluate", config={}, additive=True)


def test_array_jobs_that_overwrite_together_do_not_undo_each_other(other_process, run, tables):
    script = """
        import sys, polars as pl
        from tip_analysis.core.run_folder import open_run
        run, index = open_run(sys.argv[1]), int(sys.argv[2])
        stage = run.begin("score", config={"a": 2}, overwrite=True)
        print("ready", flush=True)
        sys.stdin.readline()
        tokens = open_run(sys.argv[1], on_altered="accept")
        frame = pl.read_parquet(sys.argv[3], glob=False)
        half = frame.height // 2
        stage.write(index, frame[:half] if index == 0 else frame[half:])
        print("done", flush=True)
        sys.stdin.read()
    """
    tables.tokens.write_parquet(run.parent / "new.parquet")
    workers = [other_process(script, run, index, run.parent / "new.parquet") for index in range(2)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
        assert worker.stdout is not None
        assert worker.stdout.readline() == "done\n"
    for worker in workers:
        end(worker)
    assert open_run(run).tokens().collect().equals(tables.tokens)
    assert len(open_run(run).stages()["score"]["shards"]) == 2
