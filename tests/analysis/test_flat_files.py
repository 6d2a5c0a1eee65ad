"""Flat files of a run: nothing lost, labels as trainers read them."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from synthetic import make_tables, write_run

from tip_analysis.analysis.flat_files import IGNORED, export_run
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.run_folder import open_run

TAXONOMY = Taxonomy("q0.6", 0.4, normalization_scope="batch", divergence_clip=0.98)


@pytest.fixture(scope="module")
def tables():
    return make_tables(num_prompts=4, rollouts_per_prompt=2, mean_length=12)


@pytest.fixture(scope="module")
def exported(tables, tmp_path_factory) -> tuple[Path, dict[Path, int]]:
    folder = tmp_path_factory.mktemp("export")
    run = open_run(write_run(folder / "run", tables))
    return folder / "flat", export_run(run, folder / "flat", TAXONOMY)


def test_every_table_is_there_whole(tables, exported) -> None:
    folder, written = exported
    assert written == {path: pl.read_parquet(path).height for path in folder.rglob("*.parquet")}
    for name in ("rollouts", "gradients", "masks"):
        assert pl.read_parquet(folder / f"{name}.parquet").equals(getattr(tables, name))
    scored = add_scores(tables.tokens, normalization_scope="batch", divergence_clip=0.98)
    expected = assign_quadrants(scored, entropy_cut="q0.6", divergence_cut=0.4).collect()
    assert pl.read_parquet(folder / "tokens.parquet").equals(expected)


def test_labels_are_the_selected_tokens_behind_an_ignored_prompt(tables, exported) -> None:
    folder, _ = exported
    keys = ["rule", "retention_ratio", "selection_scope", "seed"]
    masks = tables.masks.partition_by(keys, as_dict=True)
    assert len(list((folder / "labels").iterdir())) == len(masks) > 1
    for (rule, ratio, scope, seed), mask in masks.items():
        chosen = set(mask.select("rollout_id", "position").iter_rows())
        rows = pl.read_parquet(folder / "labels" / f"{rule}-{ratio:g}-{scope}-{seed}.parquet")
        assert rows["rollout_id"].to_list() == tables.rollouts["rollout_id"].to_list()
        for found, rollout in zip(
            rows.iter_rows(named=True), tables.rollouts.iter_rows(named=True), strict=True
        ):
            response = rollout["response_token_ids"]
            picked = [
                (rollout["rollout_id"], position) in chosen for position in range(len(response))
            ]
            ignored = [IGNORED] * len(rollout["prompt_token_ids"])
            assert found["input_ids"] == rollout["prompt_token_ids"] + response
            assert found["selected"] == picked
            assert found["labels"] == ignored + [
                token if keep else IGNORED for token, keep in zip(response, picked, strict=True)
            ]


def test_a_rollout_without_tokens_has_a_row_of_its_prompt(tables, tmp_path) -> None:
    per_token = ["response_token_ids", "loss_mask", "planted_labels", "sampled_logprobs"]
    is_first = pl.int_range(pl.len()) == 0
    empty = tables.rollouts.with_columns(
        pl.when(~is_first).then(name).otherwise(pl.col(name).list.head(0)) for name in per_token
    )
    first = empty["rollout_id"][0]
    parts = {
        name: getattr(tables, name).filter(pl.col("rollout_id") != first)
        for name in ("tokens", "masks", "gradients")
    }
    run = open_run(
        write_run(tmp_path / "run", type(tables)(empty, vocabulary=tables.vocabulary, **parts))
    )
    export_run(run, tmp_path / "flat", TAXONOMY)
    labels = list((tmp_path / "flat" / "labels").iterdir())
    assert labels
    for path in labels:
        row = pl.read_parquet(path).row(0, named=True)
        assert row["labels"] == [IGNORED] * len(row["input_ids"])
        assert row["selected"] == []


def test_a_folder_with_other_files_is_left_alone(exported, tmp_path) -> None:
    folder, written = exported
    run = open_run(folder.parent / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert export_run(run, folder, TAXONOMY) == written  # the same again: nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before
    other = Taxonomy(entropy_cut=0.123)
    with pytest.raises(OptionError, match="is not empty"):
        export_run(run, folder, other)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("two years of work")
    with pytest.raises(OptionError, match="is not empty"):
        export_run(run, foreign, TAXONOMY)
    assert export_run(run, folder, TAXONOMY, overwrite=True) == written


def test_load_dataset_reads_the_folder_as_it_stands(tables, exported, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder, written = exported

    def load(*name):
        return datasets.load_dataset(str(folder), *name, split="train", cache_dir=str(tmp_path))

    assert load().num_rows == tables.tokens.height
    rollouts = load("rollouts")
    assert rollouts["rollout_id"] == tables.rollouts["rollout_id"].to_list()
    names = datasets.get_dataset_config_names(str(folder))
    assert len(names) == len(set(names)) == len(written)
    labels = next(name for name in names if name.startswith("labels-"))
    first = load(labels)[0]
    assert len(first["input_ids"]) == len(first["labels"])
    assert set(first["labels"]) - {IGNORED} <= set(first["input_ids"])


def test_a_readme_of_ones_own_is_left_alone(tables, tmp_path):
    run = open_run(write_run(tmp_path / "run", tables))
    export_run(run, tmp_path / "flat", TAXONOMY)
    (tmp_path / "flat" / "README.md").write_text("mine")
    export_run(run, tmp_path / "flat", TAXONOMY)
    assert (tmp_path / "flat" / "README.md").read_text() == "mine"


def test_masks_for_verl_are_zeros_and_ones_by_uid(tables, exported, tmp_path) -> None:
    run = open_run(write_run(tmp_path / "run", tables))
    plain = export_run(run, tmp_path / "flat")
    assert not (tmp_path / "flat" / "verl").exists()
    written = export_run(run, tmp_path / "flat", layout="verl", overwrite=True)
    assert written.keys() - plain.keys() == set((tmp_path / "flat" / "verl").iterdir())
    for path in (tmp_path / "flat" / "labels").iterdir():
        labels, masks = pl.read_parquet(path), pl.read_parquet(path.parents[1] / "verl" / path.name)
        assert masks.schema == {"uid": pl.String, "response_mask": pl.List(pl.Int64)}
        assert masks["uid"].to_list() == labels["rollout_id"].to_list()
        assert masks["response_mask"].to_list() == [
            [int(one) for one in row] for row in labels["selected"].to_list()
        ]
        lengths = tables.rollouts["response_token_ids"].list.len()
        assert masks["response_mask"].list.len().to_list() == lengths.to_list()


def test_a_run_without_masks_has_none_for_verl(tables, tmp_path) -> None:
    run = open_run(write_run(tmp_path / "run", replace(tables, masks=tables.masks.clear())))
    with pytest.raises(RunError, match=r"no masks to hand to verl: `tip-analysis select"):
        export_run(run, tmp_path / "flat", layout="verl")
    assert not (tmp_path / "flat").exists()
