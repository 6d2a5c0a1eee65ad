"""Exported files in the programs that people read tables with: the same rows in each."""

import math
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import make_tables, write_run

from tip_analysis.analysis.flat_files import export_run
from tip_analysis.core.run_folder import open_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tables = make_tables(num_prompts=3, rollouts_per_prompt=2, mean_length=8)
    made = tmp_path_factory.mktemp("export")
    export_run(open_run(write_run(made / "run", tables)), made / "flat", layout="verl")
    return made / "flat"


def plain(value):
    """A cell as plain Python, whatever read it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.parquet"))
    assert len(found) > 8
    return found


def rows(frame: pl.DataFrame) -> list[list]:
    return [[plain(value) for value in row] for row in frame.iter_rows()]


def test_polars_and_arrow_read_the_same(folder: Path) -> None:
    for path in files(folder):
        read = pq.read_table(path)
        assert pl.read_parquet(path).columns == read.column_names
        again = pl.DataFrame(pl.from_arrow(read))
        assert rows(again) == rows(pl.read_parquet(path)), path.name


@pytest.mark.parametrize("backend", ["numpy_nullable", "pyarrow", None])
def test_pandas_reads_the_same_rows(folder: Path, backend: str | None) -> None:
    for path in files(folder):
        expected = pl.read_parquet(path)
        read = pd.read_parquet(path, **({"dtype_backend": backend} if backend else {}))
        assert list(read.columns) == expected.columns
        assert len(read) == expected.height
        for name in expected.columns:
            found = [None if is_missing(value) else plain(value) for value in read[name]]
            assert found == [plain(value) for value in expected[name].to_list()], (path.name, name)


def is_missing(value) -> bool:
    if value is None or value is pd.NA:
        return True
    return isinstance(value, float) and math.isnan(value)


@pytest.mark.interop
def test_duckdb_reads_the_same_rows_and_counts_by_sql(folder: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    for path in files(folder):
        found = duckdb.sql(f"select * from read_parquet('{path}')").fetchall()
        assert [[plain(value) for value in row] for row in found] == rows(pl.read_parquet(path))
    shares = duckdb.sql(
        f"select quadrant, count(*) from read_parquet('{folder / 'tokens.parquet'}')"
        " where loss_mask group by quadrant order by quadrant"
    ).fetchall()
    tokens = pl.read_parquet(folder / "tokens.parquet").filter("loss_mask")
    counts = tokens.group_by(pl.col("quadrant").cast(pl.String)).len().sort("quadrant")
    assert shares == counts.rows()


def test_datasets_reads_each_table_by_name(folder: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    named = {path: path.relative_to(folder).as_posix() for path in files(folder)}
    for path, name in named.items():
        config = name.removesuffix(".parquet").replace("/", "-").replace("%", "_")
        read = load_dataset(str(folder), config, split="train", cache_dir=str(tmp_path))
        expected = pl.read_parquet(path)
        assert read.column_names == expected.columns
        table: pa.Table = read.data.table
        assert [list(map(plain, row.values())) for row in table.to_pylist()] == rows(expected)
