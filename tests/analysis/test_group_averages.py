"""Means within groups, against plain float64 means."""

import numpy as np
import polars as pl
import pytest
from synthetic import make_tables

from tip_analysis.analysis.group_averages import group_means
from tip_analysis.core.errors import SchemaError


@pytest.fixture(scope="module")
def tokens():
    table = make_tables(num_prompts=6, mean_length=25, seed=3).tokens
    rng = np.random.default_rng(0)
    kinds = np.array(["think", "tool_call", "answer"])[rng.integers(0, 3, table.height)]
    return table.with_columns(
        segment=pl.Series(kinds).cast(table.schema["segment"]),
        turn=pl.Series(rng.integers(0, 3, table.height), dtype=pl.Int32),
        signed=pl.Series(rng.normal(size=table.height)),
        partial=pl.when(pl.int_range(pl.len()) % 3 == 0).then("reverse_kl"),
    )


@pytest.mark.parametrize("grouping", ["segment", "turn"])
def test_means_and_shares_are_the_plain_ones(tokens, grouping):
    columns = ("student_entropy", "reverse_kl", "signed", "partial")
    found = group_means(tokens, grouping=grouping, columns=columns, num_resamples=20)
    assert found.height == 3 * len(columns)
    for row in found.iter_rows(named=True):
        group = row["group"] if grouping == "segment" else int(row["group"][-1]) - 1
        part = tokens.filter(pl.col(grouping) == group)[row["column"]].cast(pl.Float64).drop_nulls()
        whole = tokens[row["column"]].cast(pl.Float64).drop_nulls()
        assert row["num_tokens"] == len(part)
        assert row["mean"] == pytest.approx(np.mean(part.to_numpy()), rel=1e-9)
        assert row["share"] == pytest.approx(part.sum() / whole.sum(), rel=1e-9)
        assert row["mean_low"] <= row["mean_high"]


def test_shares_of_a_column_add_up(tokens):
    found = group_means(tokens, grouping="segment", num_resamples=2)
    sums = found.group_by("column").agg(pl.col("share").sum())["share"]
    assert sums.to_list() == pytest.approx([1.0, 1.0])


def test_infinite_divergences_are_left_out(tokens):
    spoilt = tokens.with_columns(
        reverse_kl=pl.when(pl.int_range(pl.len()) == 0)
        .then(float("inf"))
        .otherwise("reverse_kl")
        .cast(pl.Float32)
    )
    found = group_means(spoilt, grouping="segment", columns=("reverse_kl",), num_resamples=2)
    assert found["num_tokens"].sum() == tokens.height - 1
    assert np.isfinite(found["mean"].to_numpy()).all()


def test_a_column_that_is_not_there_is_named(tokens):
    with pytest.raises(SchemaError, match="grad_norm"):
        group_means(tokens, grouping="turn", columns=("grad_norm",))
