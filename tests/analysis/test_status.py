"""What a run holds, and what may come next, at every step of its life."""

from synthetic import make_ablations, make_tables, write_ablations, write_run

from tip_analysis.analysis.status import next_steps, stage_table
from tip_analysis.core.run_folder import create_run


def test_a_run_is_told_what_comes_next_at_every_step(tmp_path) -> None:
    tables = make_tables(num_prompts=2, rollouts_per_prompt=1)
    run = create_run(tmp_path / "run")
    assert stage_table(run).is_empty()
    assert [step.split()[1] for step in next_steps(run)] == ["rollout", "import"]

    rollout = run.begin("rollout", config={})
    rollout.write(0, tables.rollouts)
    assert next_steps(run) == [
        "run `rollout` again with the same options: it goes on where it stopped"
    ]
    rollout.finish()
    assert [step.split()[1] for step in next_steps(run)] == ["score"]

    teacher = run.begin("teacher", config={})
    assert "score --phase teacher" in next_steps(run)[0]
    teacher.finish()
    assert next_steps(run)[0].endswith("--phase student")

    score = run.begin("score", config={})
    score.write(0, tables.tokens)
    score.finish()
    assert [step.split()[1] for step in next_steps(run)] == [
        "report",
        "gradients",
        "select",
        "ablate",
    ]


def test_a_finished_run_has_its_report_left(tmp_path) -> None:
    write_run(tmp_path / "run", make_tables(num_prompts=2, rollouts_per_prompt=1))
    write_ablations(tmp_path / "run", make_ablations(seeds=1, problems=5))
    run = create_run(tmp_path / "run")
    assert [step.split()[1] for step in next_steps(run)] == ["report"]
    table = stage_table(run)
    assert table["stage"].to_list() == [
        "rollout",
        "vocabulary",
        "score",
        "gradients",
        "select",
        "ablate",
    ]
    assert table["state"].unique().to_list() == ["done"]
    rows = dict(table.select("stage", "rows").iter_rows())
    assert rows["score"] == run.tokens().collect().height
    assert rows["select"] == run.masks().collect().height


def test_one_unfinished_configuration_makes_a_stage_unfinished(tmp_path) -> None:
    write_run(tmp_path / "run", make_tables(num_prompts=2, rollouts_per_prompt=1))
    run = create_run(tmp_path / "run")
    run.begin("select", config={"rule": "another"}, additive=True)
    states = {
        row["stage"]: (row["state"], row["configurations"])
        for row in stage_table(run).iter_rows(named=True)
    }
    assert states["select"] == ("unfinished", 2)
    assert states["score"] == ("done", 1)
