"""What a run holds, and what may come next, at every step of its life."""

import json
import shlex
import shutil

import pytest
from synthetic import make_ablations, make_tables, write_ablations, write_run

from tip_analysis.analysis.status import advice, next_steps, stage_table
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


def unfinished(folder, command):
    """A run whose `score` was begun by `command` and is not finished."""
    write_run(folder, make_tables(num_prompts=2, rollouts_per_prompt=1))
    record = json.loads((folder / "run.json").read_text())
    record["stages"]["score"]["finished"] = None
    record["stages"]["score"]["environment"]["command"] = command
    (folder / "run.json").write_text(json.dumps(record))
    return create_run(folder)


def test_an_unfinished_stage_is_finished_by_the_command_that_began_it(tmp_path) -> None:
    folder = tmp_path / "my run"
    typed = shlex.join(
        ["python", "-m", "tip_analysis", "score", str(folder), "--teacher", "a b", "--overwrite"]
    )
    expected = shlex.join(["tip-analysis", "score", str(folder), "--teacher", "a b"])
    assert next_steps(unfinished(folder, typed)) == [expected]


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf {run}",
        "tip-analysis score /somewhere/else --teacher x",
        "tip-analysis score '{run}",
        "sh -c 'tip-analysis score {run}'",
        None,
    ],
)
def test_a_recorded_command_that_is_not_ours_is_never_suggested(tmp_path, command) -> None:
    typed = command and command.format(run=tmp_path / "run")
    assert next_steps(unfinished(tmp_path / "run", typed)) == [
        "run `score` again with the same options: it goes on where it stopped"
    ]


def test_a_recorded_command_cannot_smuggle_a_second_one(tmp_path) -> None:
    step = next_steps(unfinished(tmp_path / "run", f"tip-analysis score {tmp_path}/run ; echo no"))
    assert shlex.split(step[0])[-3:] == [";", "echo", "no"]
    assert "';'" in step[0]


def with_summary(folder, rollout, *, score_seconds):
    write_run(folder, make_tables(num_prompts=2, rollouts_per_prompt=1))
    record = json.loads((folder / "run.json").read_text())
    record["stages"]["rollout"]["summary"] = rollout
    record["stages"]["rollout"]["config"]["max_new_tokens"] = 160
    record["stages"]["score"]["wall_time_s"] = score_seconds
    for key in [key for key in record["stages"] if key.startswith("gradients")]:
        del record["stages"][key]
    shutil.rmtree(folder / "gradients", ignore_errors=True)
    (folder / "run.json").write_text(json.dumps(record))
    return create_run(folder)


@pytest.mark.parametrize(("cut", "is_told"), [(36, True), (4, False), (0, False)])
def test_rollouts_that_were_cut_off_are_acted_on(tmp_path, cut, is_told) -> None:
    reasons = {"stop": 48 - cut, "length": cut}
    run = with_summary(tmp_path / "run", {"finish_reasons": reasons}, score_seconds=1.0)
    words = advice(run)
    assert bool(words) == is_told
    if is_told:
        assert "36 of 48 rollouts hit --max-new-tokens 160" in words[0]
        assert "--max-new-tokens 320" in words[0]


@pytest.mark.parametrize(
    ("seconds", "limit"), [(1.0, ""), (480.0, " --limit 15"), (100_000.0, " --limit 8")]
)
def test_the_suggested_number_of_measured_rollouts_takes_ten_minutes(
    tmp_path, seconds, limit
) -> None:
    run = with_summary(tmp_path / "run", {"num_rollouts": 480}, score_seconds=seconds)
    assert f"tip-analysis gradients {run.path}{limit}" in next_steps(run)
