import json
import os
import subprocess
import sys
import textwrap

import polars as pl
import psutil
import pytest
from synthetic import make_tables, write_run

from tip_analysis.core.atomic_files import file_hash
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import ConfigurationMismatchError, RunError, SchemaError, StorageError
from tip_analysis.core.record import config_hash
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.core.schema import LATER_COLUMNS, MaskTable, TokenTable


def mask_rows(position: int = 0) -> pl.DataFrame:
    row = {
        "rule": "q3",
        "retention_ratio": 0.1,
        "selection_scope": "rollout",
        "seed": 0,
        "rollout_id": "a/0",
        "position": position,
    }
    return pl.DataFrame([row], schema=polars_schema(MaskTable))


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run")


def test_a_written_shard_is_read_back_and_on_record(run):
    stage = run.begin("select", config={"rule": "q3"}, additive=True)
    path = stage.write(0, mask_rows())
    assert run.masks().collect().equals(mask_rows())
    assert run.stages()[stage.key]["shards"][path.name] == {
        "sha256": file_hash(path),
        "num_rows": 1,
    }
    assert not list(run.path.rglob("*.part"))


def test_an_altered_shard_counts_as_absent_and_is_named(run, caplog):
    stage = run.begin("select", config={"rule": "q3"}, additive=True)
    path = stage.write(0, mask_rows())
    assert stage.is_whole(0)
    path.write_bytes(path.read_bytes()[:-1])
    assert not stage.is_whole(0)
    assert path.name in caplog.text
    assert run.altered_shards() == [f"masks/{path.name}"]
    stage.write(0, mask_rows())
    assert stage.is_whole(0)


def test_another_configuration_is_refused_with_what_differs(run):
    run.begin(
        "score", config={"teacher": "b"}
    )  # nothing was written under it, so nothing stands in the way
    stage = run.begin("score", config={"teacher": "a", "top_k": 5}, inputs={"rollouts": "x"})
    stage.write(0, TokenTable.create_empty())
    run.begin("score", config={"teacher": "a", "top_k": 5}, inputs={"rollouts": "x"})
    with pytest.raises(
        ConfigurationMismatchError, match=r'rollouts: "x" → "y"; top_k: 5 → 6\. .*--overwrite'
    ):
        run.begin("score", config={"teacher": "a", "top_k": 6}, inputs={"rollouts": "y"})


def test_overwriting_removes_the_stage_and_what_was_built_on_it(run):
    score = run.begin("score", config={"a": 1})
    masks = run.begin("select", config={"rule": "q3"}, additive=True)
    masks.write(0, mask_rows())
    again = run.begin("score", config={"a": 2}, overwrite=True)
    assert again.key == score.key
    assert run.masks().collect().height == 1, "old rows stay until the first new shard is safe"
    assert run.stages()["score"]["config"] == {"a": 1}
    again.write(0, TokenTable.create_empty())
    assert list(run.stages()) == ["score"]
    assert run.stages()["score"]["config"] == {"a": 2}
    assert not run.has("masks")
    assert not list((run.path / "masks").iterdir())


def test_keyed_records_stand_side_by_side_and_refuse_another_identity(run):
    one = run.begin("select", key={"rule": "q3"}, config={"rule": "q3", "clip": None})
    one.write(0, mask_rows())
    two = run.begin("select", key={"rule": "all"}, config={"rule": "all", "clip": None})
    assert one.key != two.key
    with pytest.raises(ConfigurationMismatchError, match="clip"):
        run.begin("select", key={"rule": "q3"}, config={"rule": "q3", "clip": 0.9})


def test_rows_that_break_the_contract_are_not_written(run):
    stage = run.begin("select", config={}, additive=True)
    with pytest.raises(SchemaError, match="retention_ratio"):
        stage.write(0, mask_rows().with_columns(retention_ratio=pl.lit(0.0)))
    with pytest.raises(SchemaError, match="position"):
        stage.write(0, mask_rows().drop("position"))
    assert not run.has("masks")
    assert stage.missing(1) == [0]


def test_a_table_with_a_foreign_dtype_is_refused_at_reading(run):
    stage = run.begin("select", config={}, additive=True)
    stage.write(0, mask_rows())
    mask_rows().with_columns(pl.col("seed").cast(pl.Int32)).write_parquet(stage.path(0))
    with pytest.raises(SchemaError, match=r"seed.*Int64.*Int32"):
        run.masks()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run at"):
        open_run(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        create_run(tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_reading_a_table_that_is_not_there_names_the_command(run):
    with pytest.raises(RunError, match="tip-analysis score"):
        run.tokens()


def test_a_damaged_or_newer_record_is_refused(run):
    record = run.record()
    run.record_path.write_text(json.dumps(record | {"schema_version": 999}))
    with pytest.raises(RunError, match="newer"):
        run.stages()
    run.record_path.write_text("{")
    with pytest.raises(RunError, match="not readable"):
        run.stages()


def test_a_record_with_an_unknown_name_is_refused(run):
    run.begin("score", config={"teacher_context": "solution"})
    text = run.record_path.read_text().replace('"solution"', '"answer"')
    run.record_path.write_text(text)
    with pytest.raises(RunError, match=r"teacher_context: .*'answer'; valid names: none, solution"):
        run.stages()


def test_a_full_disk_leaves_what_was_there(run):
    stage = run.begin("select", config={}, additive=True)
    path = stage.write(0, mask_rows())
    before, record = path.read_bytes(), run.record_path.read_bytes()
    script = f"""
        import resource, signal
        import polars as pl
        from tip_analysis.core.run_folder import open_run
        from tip_analysis.core.errors import StorageError
        run = open_run({str(run.path)!r})
        stage = run.begin("select", config={{}}, additive=True)
        frame = run.masks().collect()
        names = pl.Series([f"{{i * 7919}}" for i in range(9000)])
        frame = pl.concat([frame] * 9000).with_columns(rollout_id=names)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            stage.write(0, frame)
        except StorageError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout
    assert "intact" in done.stdout
    assert path.read_bytes() == before
    assert (
        json.loads(run.record_path.read_bytes())["stages"][stage.key]["shards"]
        == json.loads(record)["stages"][stage.key]["shards"]
    )
    assert not list(run.path.rglob("*.part"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_closed_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot write"):
        create_run(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        create_run(tmp_path / "file" / "run")


def test_part_files_of_dead_processes_are_removed(run):
    stage = run.begin("select", config={}, additive=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    folder, start = run.path / "masks", round(psutil.Process().create_time())
    stale = folder / f".part-00000.parquet.{host}.{dead.pid}-{start}.part"
    reused = folder / f".part-00000.parquet.{host}.{os.getpid()}-{start - 1000}.part"
    alive = folder / f".part-00001.parquet.{host}.{os.getpid()}-{start}.part"
    elsewhere = folder / f".part-00001.parquet.other-host.{dead.pid}-{start}.part"
    for part in (stale, reused, alive, elsewhere):
        part.write_text("")
    run.begin("select", config={}, additive=True)
    assert not stale.exists()
    assert not reused.exists(), "the process number was given to another process"
    assert alive.exists()
    assert elsewhere.exists()
    assert stage.missing(1) == [0]


def test_hashes_do_not_depend_on_the_order_of_keys():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_two_processes_may_fill_one_run(run):
    script = """
        import sys, polars as pl
        from tip_analysis.core.run_folder import open_run
        from tip_analysis.core.schema import MaskTable, TokenTable
        from tip_analysis.core.contract_checks import polars_schema
        run, first = open_run(sys.argv[1]), int(sys.argv[2])
        stage = run.begin("select", config={}, additive=True)
        for index in range(first, 20, 2):
            row = dict(
                rule="q3", retention_ratio=0.1, selection_scope="rollout",
                seed=0, rollout_id="a/0", position=index,
            )
            stage.write(index, pl.DataFrame([row], schema=polars_schema(MaskTable)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(run.path)]
    workers = [subprocess.Popen([*command, str(first)]) for first in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    stage = run.begin("select", config={}, additive=True)
    assert stage.missing(20) == []
    assert sorted(run.masks().collect()["position"]) == list(range(20))


def test_columns_that_came_later_are_null_where_a_table_lacks_them(tmp_path):
    path = write_run(tmp_path / "old", make_tables(num_prompts=2, mean_length=5))
    shards = sorted((path / "tokens").glob("*.parquet"))
    table = pl.read_parquet(shards[0])
    later = sorted(LATER_COLUMNS["tokens"])
    assert table["turn"].null_count() == 0
    rewritten = table.drop(later)
    rewritten.write_parquet(shards[0])
    record = json.loads((path / "run.json").read_text())
    record["stages"]["score"]["shards"][shards[0].name]["sha256"] = file_hash(shards[0])
    (path / "run.json").write_text(json.dumps(record))
    found = open_run(path).tokens().collect()
    assert found.columns == TokenTable.column_names()
    assert found.select(later).null_count().row(0) == (table.height,) * len(later)
    assert found.drop(later).equals(rewritten)


def test_other_columns_may_not_be_missing(tmp_path):
    path = write_run(tmp_path / "old", make_tables(num_prompts=2, mean_length=5))
    shard = next((path / "tokens").glob("*.parquet"))
    pl.read_parquet(shard).drop("jsd").write_parquet(shard)
    with pytest.raises(SchemaError, match="'jsd' is missing"):
        open_run(path).tokens()
