"""The select stage: which masks are made, kept and refused."""

import polars as pl
import pytest
from synthetic import Tables, make_tables, write_run

from tip_analysis.analysis.masks import recorded_measurements, write_masks
from tip_analysis.analysis.measurements import join_gradients, run_measurement
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import to_masks
from tip_analysis.core.errors import ConfigurationMismatchError, OptionError, RunError
from tip_analysis.core.run_folder import Run, open_run

KEY = ["rule", "retention_ratio", "seed"]


def fresh_run(path, **options: object) -> Run:
    tables = make_tables(num_prompts=3, rollouts_per_prompt=2, mean_length=10, **options)
    return open_run(
        write_run(
            path,
            Tables(
                tables.rollouts,
                tables.tokens,
                tables.gradients,
                tables.masks.clear(),
                tables.vocabulary,
            ),
        )
    )


def test_one_mask_for_every_rule_ratio_and_seed_that_differs(tmp_path) -> None:
    run = fresh_run(tmp_path / "run")
    masks = write_masks(
        run, rules=["all", "soft_or", "random"], retention_ratios=[0.5, 0.1], seeds=[0, 1]
    )
    expected = {("all", 1.0, 0), ("soft_or", 0.5, 0), ("soft_or", 0.1, 0)}
    expected |= {("random", ratio, seed) for ratio in (0.5, 0.1) for seed in (0, 1)}
    assert set(masks.select(KEY).unique().iter_rows()) == expected
    assert masks.sort(masks.columns).equals(run.masks().collect().sort(masks.columns))
    straight = to_masks(add_scores(run.tokens()), rules=["soft_or"], retention_ratios=[0.1])
    mine = masks.filter(pl.col("rule") == "soft_or", pl.col("retention_ratio") == 0.1)
    assert mine.select("rollout_id", "position").equals(straight.select("rollout_id", "position"))


def test_a_mask_that_is_there_is_kept(tmp_path) -> None:
    run = fresh_run(tmp_path / "run")
    write_masks(run, rules=["q3"], retention_ratios=[0.5])
    before = {path: path.stat().st_mtime_ns for path in (run.path / "masks").glob("*.parquet")}
    again = write_masks(run, rules=["q3"], retention_ratios=[0.5, 0.2])
    assert again["retention_ratio"].unique().sort().to_list() == [0.2, 0.5]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(ConfigurationMismatchError, match="divergence_clip"):
        write_masks(run, rules=["q3"], retention_ratios=[0.5], divergence_clip=0.9)


def test_the_oracle_selects_among_measured_tokens(tmp_path) -> None:
    run = fresh_run(tmp_path / "run")
    masks = write_masks(run, rules=["gradient_oracle"], retention_ratios=[0.2])
    measured = join_gradients(run.tokens(), run).collect()
    assert recorded_measurements(run) == [run_measurement(run)]
    chosen = masks.join(
        measured.drop("seed", strict=False), on=["rollout_id", "position"], how="left"
    )
    assert chosen.height
    assert chosen["grad_dot_loss"].null_count() == 0
    best = measured.group_by("rollout_id").agg(pl.col("grad_dot_loss").max())
    top = chosen.group_by("rollout_id").agg(pl.col("grad_dot_loss").max())
    assert best.sort("rollout_id").equals(top.sort("rollout_id"))


def test_what_cannot_be_selected_is_refused(tmp_path) -> None:
    run = fresh_run(tmp_path / "run", gradients=False)
    with pytest.raises(RunError, match="tip-analysis gradients"):
        write_masks(run, rules=["gradient_oracle"], retention_ratios=[0.5])
    with pytest.raises(OptionError, match="at least one rule"):
        write_masks(run, rules=[], retention_ratios=[0.5])
    assert not run.has("masks")
