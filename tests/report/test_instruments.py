"""The instruments' sections: what they say of a run that has them, and of one that lacks them."""

import polars as pl
import pytest
from synthetic import make_ablations, make_tables, write_ablations, write_run

from tip_analysis.analysis.rank_stage import rank_rules
from tip_analysis.analysis.run_view import RunView
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.instrument_tables import InfluenceTable, InterventionTable, TrajectoryTable
from tip_analysis.core.run_folder import create_run
from tip_analysis.report.build import ReportOptions
from tip_analysis.report.page import Missing, render
from tip_analysis.report.sections import influences, interventions, ranking, trajectories

TABLES = make_tables(num_prompts=12, rollouts_per_prompt=2, mean_length=25)
MAKERS = {
    "ranking": ranking.ranking,
    "influence": influences.influences,
    "interventions": interventions.interventions,
    "trajectories": trajectories.trajectories,
}


def influence_rows() -> pl.DataFrame:
    """Two groups that work against each other."""
    tokens = TABLES.tokens.filter("loss_mask").with_columns(
        group=pl.when(pl.col("position") % 2 == 0).then(pl.lit("even")).otherwise(pl.lit("odd")),
        fold=(pl.col("prompt_id").str.slice(1).cast(pl.Int32) % 2).cast(pl.Int8),
    )
    parts = [
        tokens.select(
            pl.lit("kind").alias("grouping"),
            pl.lit("none").alias("preconditioner"),
            pl.lit("all").alias("param_scope"),
            pl.lit("reverse_kl").alias("loss"),
            pl.lit(0).alias("seed"),
            pl.lit(source).alias("source"),
            "rollout_id",
            "position",
            "prompt_id",
            "fold",
            "group",
            pl.lit(0.01).alias("weight"),
            pl.when(pl.col("group") == source).then(1.0).otherwise(-0.5).alias("grad_dot_source"),
        )
        for source in ("even", "odd")
    ]
    return pl.concat(parts).cast(polars_schema(InfluenceTable))


def intervention_rows() -> pl.DataFrame:
    chosen = TABLES.tokens.filter(pl.col("position").is_in([1, 2, 3, 4]))
    parts = [
        chosen.select(
            pl.lit("k").alias("test_key"),
            "rollout_id",
            "position",
            pl.lit(choice).alias("choice"),
            pl.lit(index).alias("continuation"),
            "prompt_id",
            pl.when(pl.col("position") % 2 == 0).then(pl.lit("Q3")).otherwise(pl.lit("Q4"))
            .alias("stratum"),
            pl.lit(1 if choice == "student" else 2).alias("forced_token_id"),
            pl.when((pl.col("position") % 2 == 0) & (choice == "teacher")).then(1.0).otherwise(0.0)
            .alias("reward"),
            pl.lit(9).alias("num_tokens"),
            pl.lit("stop").alias("finish_reason"),
        )
        for choice in ("student", "teacher", "fresh")
        for index in (0, 1)
    ]  # fmt: skip
    return pl.concat(parts).cast(polars_schema(InterventionTable))


def trajectory_rows() -> pl.DataFrame:
    """δ falls by half at each step."""
    tokens = TABLES.tokens.filter("loss_mask")
    parts = [
        tokens.select(
            pl.lit("ablate-1").alias("arm_key"),
            pl.lit(step).alias("step"),
            "rollout_id",
            "position",
            "prompt_id",
            pl.lit("q3").alias("rule"),
            pl.lit(0.1).alias("retention_ratio"),
            pl.lit(0).alias("seed"),
            "student_entropy",
            "student_entropy_norm",
            (pl.col("reverse_kl") / 2**place).alias("reverse_kl"),
            "forward_kl",
        )
        for place, step in enumerate((0, 10, 20))
    ]
    return pl.concat(parts).cast(polars_schema(TrajectoryTable))


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> RunView:
    folder = write_run(tmp_path_factory.mktemp("run") / "run", TABLES)
    write_ablations(folder, make_ablations())
    run = create_run(folder)
    rank_rules(run, rules=["soft_or", "q3", "divergence", "random"], num_resamples=30)
    for stage, rows in (
        ("influence", influence_rows()),
        ("intervene", intervention_rows()),
        ("track", trajectory_rows()),
    ):
        work = run.begin(stage, config={"seed": 0}, additive=True)
        work.write(0, rows)
        work.finish()
    return RunView(folder, ReportOptions(num_resamples=20))


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_without_the_instrument_is_told_the_command(name, tmp_path) -> None:
    view = RunView(write_run(tmp_path / "run", TABLES), ReportOptions())
    section = MAKERS[name]([view])
    assert section.absent
    (block,) = section.parts[0].blocks
    assert isinstance(block, Missing)
    assert f"tip-analysis {block.command.split()[1]}" in block.command


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_with_the_instrument_has_its_section(name, view) -> None:
    section = MAKERS[name]([view])
    assert not section.absent
    page = render([section], title="t", subtitle="s", sources="r", citation="c", version="v")
    assert section.title in page
    assert section.parts[0].finding


def test_findings_are_true(view) -> None:
    found = {name: make([view]).parts[0].finding for name, make in MAKERS.items()}
    assert "A step on" in found["influence"]
    assert "raises the loss of" in found["influence"]
    assert "In Q3 the teacher's token raises success by +100.0 points" in found["interventions"]
    assert "Arm q3:0.1" in found["trajectories"]
    assert "At ρ = 0.1 the first by share of Σφ⁺ is" in found["ranking"]
    assert "trained accuracy" in found["ranking"] or "Trained accuracy" in found["ranking"]
