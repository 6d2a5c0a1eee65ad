import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import tiny_language_model

from tip_analysis.analysis.ablation_tables import final_arms
from tip_analysis.analysis.arms import Arm, arm_results, parse_arms
from tip_analysis.analysis.claims import claims_table
from tip_analysis.analysis.masks import write_masks
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.weightings import weigh_tokens
from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import (
    ContextLengthError,
    ModelError,
    OptionError,
    PromptFileError,
    RunError,
    UnknownNameError,
)
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.core.schema import AblationTable, DynamicsTable
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.models.batching import TokenBudget
from tip_analysis.rollouts.bad_rows import BadRows
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.stage import Scorer, score_rollouts
from tip_analysis.training.ablation.arm_training import StudyOptions
from tip_analysis.training.ablation.problem_sets import load_evaluation_sets, load_prompts
from tip_analysis.training.ablation.study import run_ablation
from tip_analysis.training.data import fixed_rollouts
from tip_analysis.training.drift import effective_sample_size
from tip_analysis.training.options import TrainingOptions
from tip_analysis.training.peak_memory import memory_bytes, peak_memory_bytes, reset_peak_memory
from tip_analysis.training.trainer import Trainer

TIMES = ["step_time_s", "peak_memory_bytes"]
ARMS = [Arm("all"), Arm("soft_or", 0.5)]


def even_length(response, answer):
    """A grader that a random model passes now and then."""
    return len(response) % 2 == 0


def prompts(count, split):
    return [
        Prompt(row["id"], problem=row["problem"], answer=row["answer"])
        for row in problems(count, split=split)
    ]


def study(**changes):
    options = {
        "student": tiny_language_model(sharpness=8.0, name="tiny-student"),
        "teacher": tiny_language_model(seed=1, sharpness=8.0, name="tiny-teacher"),
        "prompts": prompts(6, "train"),
        "evaluation_prompts": prompts(4, "held_out"),
        "training": TrainingOptions(
            num_steps=3, prompts_per_step=2, rollouts_per_prompt=2, learning_rate=1e-2
        ),
        "sampling": Sampling(max_new_tokens=8),
        "evaluation_sampling": Sampling(max_new_tokens=8),
        "num_samples": 4,
        "evaluate_every": 2,
        "checkpoint_every": 1,
        "grader": f"{__name__}:even_length",
    }
    return StudyOptions(**(options | changes))


def comparable(table):
    return table.drop(TIMES).sort("rule", "retention_ratio", "seed", "step")


def interrupt_at(monkeypatch, step):
    """Make the training process stop for good at a step, as a kill would."""
    original = Trainer.train_step

    def train_step(self):
        if self.step == step:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = create_run(tmp_path_factory.mktemp("study") / "run")
    return run, run_ablation(run, study(), arms=ARMS, seeds=[0, 1])


def test_every_arm_and_seed_has_its_rows(finished):
    run, table = finished
    validate(run.ablations().collect(), AblationTable)
    keys = table.select("rule", "retention_ratio", "seed", "step").rows()
    expected = [("all", 1.0, seed, step) for seed in (0, 1) for step in (2, 3)]
    expected += [("soft_or", 0.5, seed, step) for seed in (0, 1) for step in (2, 3)]
    assert sorted(keys) == sorted([*expected, ("untrained", 1.0, 0, 0), ("untrained", 1.0, 1, 0)])
    files = [path for path in (run.path / "ablations").iterdir() if path.suffix == ".parquet"]
    assert len(files) == 6
    assert not run.altered_shards()


def test_rows_say_what_was_trained_on(finished):
    _, table = finished
    everything = table.filter(pl.col("rule") == "all")
    assert (everything["tokens_trained"] == everything["tokens_seen"]).all()
    half = table.filter(pl.col("rule") == "soft_or")
    assert ((half["tokens_trained"] / half["tokens_seen"] - 0.45).abs() < 0.15).all()
    assert everything.filter(seed=0)["losses"].list.len().to_list() == [2, 1]
    for row in table.iter_rows(named=True):
        assert row["accuracy"] == pytest.approx(np.mean(row["problem_accuracy"]))
        assert row["best_at_k"] == pytest.approx(np.mean(row["problem_best"]))
        assert row["problem_ids"] == [prompt.id for prompt in prompts(4, "held_out")]
        if row["step"]:
            assert row["train_loss"] == pytest.approx(np.mean(row["losses"]))
        assert row["peak_memory_bytes"] > 1e7
        assert row["heldout_reverse_kl"] > 0
    first = table.filter(pl.col("step") == 2).filter(seed=0)
    assert first["learning_rate"].n_unique() == 1


def test_a_finished_study_trains_nothing_and_new_arms_add_to_it(finished, monkeypatch):
    run, table = finished
    before = {
        path.name: path.stat().st_mtime_ns for path in (run.path / "ablations").glob("*.parquet")
    }
    interrupt_at(monkeypatch, 0)
    again = run_ablation(run, study(), arms=ARMS, seeds=[0, 1])
    assert again.equals(table)
    assert {
        path.name: path.stat().st_mtime_ns for path in (run.path / "ablations").glob("*.parquet")
    } == before
    monkeypatch.undo()
    more = run_ablation(run, study(), arms=[Arm("random", 0.5)], seeds=[0])
    assert set(more["rule"]) == {"untrained", "random"}
    assert run.ablations().select("arm_key").unique().collect().height == 7


def test_an_interrupted_study_ends_as_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    _, table = finished
    run = create_run(tmp_path / "run")
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(run, study(), arms=ARMS, seeds=[0, 1])
    monkeypatch.undo()
    assert run.ablations().collect()["rule"].to_list() == ["untrained"], (
        "only what was whole is there"
    )
    steps = []
    original = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self: steps.append(self.step) or original(self)
    )
    resumed = run_ablation(run, study(), arms=ARMS, seeds=[0, 1])
    assert steps[0] == 2, "the interrupted arm goes on from its checkpoint"
    assert comparable(resumed).equals(comparable(table))
    assert not [path for path in (run.path / "ablations" / ".work").iterdir() if path.is_dir()]


def test_results_and_claims_can_be_made_of_it(finished):
    _, table = finished
    results = arm_results(table)
    assert results["num_seeds"].to_list() == [2, 2, 2]
    assert results["rule"][0] == "untrained"
    assert set(claims_table(table)["verdict"].cast(pl.String)) <= {
        "not run",
        "supported",
        "contradicted",
        "not resolved",
    }


def test_a_live_table_shows_every_arm(finished):
    from rich.console import Console

    from tip_analysis.training.ablation.study import _Board

    board = _Board([(arm, seed) for seed in (0, 1) for arm in ARMS], None)
    board.begin(ARMS[0], 0)
    board(
        {"rule": "all", "retention_ratio": 1.0, "seed": 0, "step": 2, "num_steps": 3, "loss": 0.25}
    )
    accuracies = {"one": 0.625, "two": 0.25}
    board({"rule": "soft_or", "retention_ratio": 0.5, "seed": 1, "accuracies": accuracies})
    board.end(ARMS[1], 1, "done")
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(board.table())
    text = console.export_text()
    console.file.close()
    assert "1 of 4 done" in text
    assert "2/3 0.250" in text
    assert "62.5 / 25.0 %" in text


def test_arms_may_have_a_loss_and_a_weighting_of_their_own(tmp_path):
    arms = parse_arms(
        ["all", "all,loss=k1", "soft_or:0.5,weighting=q3", "all,weighting=iw_opd,loss=k1"], []
    )
    run = create_run(tmp_path / "run")
    table = run_ablation(run, study(), arms=arms, seeds=[0])
    found = dict(
        table.filter(pl.col("step") == 3)
        .select("rule", pl.struct("loss", "weighting", "retention_ratio"))
        .iter_rows()
    )
    assert {name: tuple(facts.values()) for name, facts in found.items()} == {
        "all": ("reverse_kl", "none", 1.0),
        "all,loss=k1": ("k1", "none", 1.0),
        "soft_or,weighting=q3": ("reverse_kl", "q3", 0.5),
        "all,weighting=iw_opd,loss=k1": ("k1", "iw_opd", 1.0),
    }
    compared = final_arms(table)
    assert set(compared["rule"]) == set(found)
    assert set(arm_results(table)["rule"]) == {"untrained", *found}
    again = run_ablation(run, study(), arms=arms, seeds=[0])
    assert again.equals(table)


def test_an_arm_whose_weights_cannot_be_made_is_refused_before_training(tmp_path):
    run = create_run(tmp_path / "run")
    for name, words in (("horvitz_thompson", "rule that samples"), ("oracle", "mode offline")):
        arms = parse_arms(["all", f"soft_or:0.5,weighting={name}"], [])
        with pytest.raises(OptionError, match=words):
            run_ablation(run, study(), arms=arms)
    assert not run.has("ablations")


def test_observed_steps_are_a_table_of_the_run(finished):
    run, table = finished
    dynamics = validate(run.dynamics().collect(), DynamicsTable)
    dynamics = dynamics.filter(pl.col("rule").is_in(["all", "soft_or"]))  # others were added later
    keys = dynamics.select("rule", "seed", "step").sort("rule", "seed", "step").rows()
    assert keys == [(r, s, t) for r in ("all", "soft_or") for s in (0, 1) for t in (0, 1, 2)]
    assert set(dynamics["arm_key"]) == set(table.filter(pl.col("step") > 0)["arm_key"])
    everything = dynamics.filter(rule="all")
    assert everything["soft_or_overlap"].to_list() == [1.0] * 6
    assert everything["selected_share_q1"].drop_nulls().unique().to_list() == [1.0]
    assert dynamics["truncated_share"].null_count() == 0
    losses = table.filter(rule="all", seed=0).sort("step")["losses"].explode().to_list()
    assert everything.filter(seed=0).sort("step")["loss"].to_list() == pytest.approx(losses)


# ------------------------------------------------------------------------------------------ offline


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory):
    options = study()
    run = create_run(tmp_path_factory.mktemp("offline") / "run")
    sampling = Sampling(max_new_tokens=8)
    sample_rollouts(
        run, student=options.student, prompts=prompts(6, "train"), sampling=sampling, num_rollouts=3
    )
    score_rollouts(run, Scorer(options.student, options.teacher, TokenBudget(10_000)))
    return run


def test_offline_masks_and_weights_are_those_of_the_token_table(scored_run):
    source = fixed_rollouts(
        scored_run,
        study().student,
        rule="quadrant:Q1",
        retention_ratio=1.0,
        selection_scope="rollout",
        mask_seed=0,
        prompts_per_step=2,
        seed=0,
        weighting="soft_or",
    )
    tokens = scored_run.tokens().collect()
    scored = assign_quadrants(add_scores(tokens)).collect()
    weights = weigh_tokens(scored, weighting="soft_or").collect()["weight"]
    for row, weight in zip(scored.iter_rows(named=True), weights, strict=True):
        name, position = row["rollout_id"], row["position"]
        assert source.weights[name][position] == weight
        chosen = name in source.masks and source.masks[name][position]
        assert chosen == (row["quadrant"] == "Q1")
    arms = parse_arms(["quadrant:Q1:1", "all,weighting=iw_opd,loss=k2"], [])
    table = run_ablation(scored_run, study(mode="offline", prompts=()), arms=arms, seeds=[0])
    trained = table.filter(rule="quadrant:Q1")["tokens_trained"].max()
    assert trained == (scored["quadrant"] == "Q1").sum()  # one epoch
    with pytest.raises(RunError, match="no gradients"):
        fixed_rollouts(
            scored_run,
            study().student,
            rule="all",
            retention_ratio=1.0,
            selection_scope="rollout",
            mask_seed=0,
            prompts_per_step=2,
            seed=0,
            weighting="oracle",
        )


def test_offline_arms_train_on_stored_masks_and_log_drift(scored_run):
    write_masks(scored_run, rules=["entropy"], retention_ratios=[0.5])
    table = run_ablation(
        scored_run,
        study(mode="offline", prompts=()),
        arms=[Arm("all"), Arm("entropy", 0.5), Arm("q3", 0.5)],
        seeds=[0],
    )
    untrained = table.filter(rule="untrained").row(0, named=True)
    assert untrained["drift_reverse_kl"] == pytest.approx(0.0, abs=1e-9)
    assert untrained["effective_sample_size"] == pytest.approx(1.0, abs=1e-6)
    trained = table.filter(pl.col("step") == 3)
    assert (trained["drift_reverse_kl"] > 1e-6).all()
    assert (trained["effective_sample_size"] < 1.0).all()
    # One epoch of 6 prompts at 2 a step is 3 steps: every selected token once.
    selected = scored_run.masks().filter(rule="entropy").collect().height
    assert trained.filter(rule="entropy")["tokens_trained"].to_list() == [selected]
    assert (
        trained.filter(rule="all")["tokens_trained"].item() == scored_run.tokens().collect().height
    )


def test_stored_masks_and_masks_made_from_tokens_are_the_same(scored_run, tmp_path):
    shutil.copytree(scored_run.path, tmp_path / "copy")
    bare = open_run(tmp_path / "copy")
    for key in [key for key in bare.stages() if key.startswith(("select-", "ablate-"))]:
        bare.discard(key)  # as other tests left them, on record
    options = study(mode="offline", prompts=())
    write_masks(scored_run, rules=["soft_or"], retention_ratios=[0.3])
    stored = run_ablation(scored_run, options, arms=[Arm("soft_or", 0.3)], seeds=[0])
    made = run_ablation(bare, options, arms=[Arm("soft_or", 0.3)], seeds=[0])
    assert comparable(stored).drop("arm_key").equals(comparable(made).drop("arm_key"))
    shutil.rmtree(bare.path / "tokens")
    with pytest.raises(RunError, match="on record but missing"):
        run_ablation(bare, options, arms=[Arm("soft_or", 0.4)], seeds=[0])
    bare.discard("score")
    with pytest.raises(RunError, match="tip-analysis score"):
        run_ablation(bare, options, arms=[Arm("soft_or", 0.4)], seeds=[0])


def test_fixed_rollouts_carry_loss_where_the_mask_table_says(scored_run):
    write_masks(scored_run, rules=["divergence"], retention_ratios=[0.25])
    options = {
        "rule": "divergence",
        "retention_ratio": 0.25,
        "selection_scope": "rollout",
        "mask_seed": 7,
    }
    source = fixed_rollouts(scored_run, study().student, prompts_per_step=2, seed=0, **options)
    table = scored_run.masks().filter(rule="divergence").collect()
    found = {
        (rollout.rollout_id, int(position))
        for rollout in source.all_rollouts()
        for position in np.flatnonzero(source.mask(rollout))
    }
    assert found == set(table.select("rollout_id", "position").rows())
    divergences = scored_run.tokens().collect().partition_by("rollout_id", as_dict=True)
    for rollout in source.all_rollouts():  # and that is where the divergence is largest
        values = divergences[rollout.rollout_id,].sort("position")["reverse_kl"].to_numpy()
        assert values[source.mask(rollout)].min() >= values[~source.mask(rollout)].max()


def test_scoring_again_moves_the_masks_and_survives_a_resume(scored_run, tmp_path, monkeypatch):
    training = replace(study().training, rescore_every=2, num_steps=5, learning_rate=3e-2)
    options = study(mode="offline", prompts=(), training=training, evaluate_every=0)
    again = run_ablation(scored_run, options, arms=[Arm("entropy", 0.3)], seeds=[0])
    fixed = run_ablation(
        scored_run,
        replace(options, training=replace(training, rescore_every=0)),
        arms=[Arm("entropy", 0.3)],
        seeds=[0],
    )
    losses = [t.filter(rule="entropy")["losses"].item().to_list() for t in (again, fixed)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2:] != losses[1][2:]
    copy = tmp_path / "copy"
    shutil.copytree(scored_run.path, copy)
    shutil.rmtree(copy / "ablations")
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(open_run(copy), options, arms=[Arm("entropy", 0.3)], seeds=[0])
    monkeypatch.undo()
    resumed = run_ablation(open_run(copy), options, arms=[Arm("entropy", 0.3)], seeds=[0])
    assert comparable(resumed).equals(comparable(again))


def test_effective_sample_size_by_hand():
    assert effective_sample_size(np.zeros(4)) == pytest.approx(1.0)
    assert effective_sample_size(np.log([1.0, 3.0]) + 700) == pytest.approx(16 / (2 * 10))
    assert effective_sample_size(np.array([0.0, -1e4])) == pytest.approx(0.5)


# ------------------------------------------------------------ errors and memory


def test_what_cannot_be_run_is_refused(tmp_path):
    run = create_run(tmp_path / "run")
    with pytest.raises(OptionError, match="by name"):
        run_ablation(run, study(), arms=ARMS, jobs=2)
    with pytest.raises(OptionError, match="at least one arm"):
        run_ablation(run, study(), arms=[])
    with pytest.raises(UnknownNameError, match="mode 'replay'; valid names: on_policy, offline"):
        run_ablation(run, study(mode="replay"), arms=ARMS)
    with pytest.raises(OptionError, match="prompts to train on"):
        run_ablation(run, study(prompts=()), arms=ARMS)
    with pytest.raises(OptionError, match="held-out"):
        run_ablation(run, study(evaluation_prompts=()), arms=ARMS)
    with pytest.raises(PromptFileError, match="no answer"):
        run_ablation(run, study(evaluation_prompts=[Prompt("a", problem="12+34+56=")]), arms=ARMS)
    with pytest.raises(ContextLengthError, match="max-new-tokens"):
        run_ablation(run, study(sampling=Sampling(max_new_tokens=500)), arms=ARMS)
    with pytest.raises(OptionError, match="gradients"):
        run_ablation(run, study(), arms=[Arm("gradient_oracle", 0.5)])


def test_a_bad_prompt_ends_an_ablation_or_is_left_out_and_counted(tmp_path):
    """Skipping gives what the good prompts alone give, and run.json says how many were bad."""

    def written(name, rows, *bad):
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"id": p.id, "problem": p.problem, "answer": p.answer}) for p in rows]
        path.write_text("\n".join([lines[0], *bad, *lines[1:]]), "utf-8")
        return str(path)

    long = json.dumps({"id": "long", "problem": "1+" * 60 + "1=", "answer": "61"})
    good = {"prompts": prompts(2, "train"), "evaluation_prompts": prompts(2, "held_out")}
    sources = (
        written("train", good["prompts"], "{broken", long),
        written("held_out", good["evaluation_prompts"], '{"problem": "1+2="}'),
    )
    bad_rows = BadRows("skip")
    files = {
        "prompts": load_prompts(sources[0], on_bad_row=bad_rows),
        "evaluation_prompts": load_evaluation_sets([sources[1]], on_bad_row=bad_rows),
        "bad_rows": bad_rows,
    }
    one_step = TrainingOptions(num_steps=1, prompts_per_step=2, rollouts_per_prompt=2)
    found, alone = (
        run_ablation(
            create_run(tmp_path / name), study(training=one_step, **chosen), arms=ARMS[:1]
        ).drop("benchmark", "arm_key", *TIMES)
        for name, chosen in (("mixed", files), ("clean", good))
    )
    assert found.equals(alone)
    for stage in open_run(tmp_path / "mixed").stages().values():
        assert stage["settings"]["skipped_rows"] == 3
        reasons = stage["settings"]["skipped"]
        for reason, part in zip(
            reasons, ["line 2: broken JSON", "has no answer", "prompt 'long'"], strict=True
        ):
            assert part in reason
    with pytest.raises(PromptFileError, match="line 2: broken JSON"):
        load_prompts(sources[0])
    with pytest.raises(PromptFileError, match="line 2: the problem 'held_out-1' has no answer"):
        load_evaluation_sets([sources[1]])


def test_peak_memory_forgets_what_was_before():
    cpu = torch.device("cpu")
    big = np.ones(30_000_000)
    peak = peak_memory_bytes(cpu)
    assert peak >= big.nbytes
    del big
    reset_peak_memory(cpu)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system cannot reset its peaks")
    assert peak_memory_bytes(cpu) < peak - 1e8
    assert abs(memory_bytes(cpu) - peak_memory_bytes(cpu)) < 1e8


SCRIPT = """
    from tip_analysis.demo.arithmetic.language import problems
    from tip_analysis.training.ablation.arm_training import StudyOptions
    from tip_analysis.analysis.arms import Arm
    from tip_analysis.core.run_folder import create_run
    from tip_analysis.rollouts.sampling import Sampling
    from tip_analysis.rollouts.prompts import Prompt
    from tip_analysis.training.ablation.study import run_ablation
    from tip_analysis.training.options import TrainingOptions

    def prompts(count, split):
        rows = problems(count, split=split)
        return [Prompt(row["id"], problem=row["problem"], answer=row["answer"]) for row in rows]

    if __name__ == "__main__":
        study = StudyOptions(
            "arithmetic-student", "arithmetic-teacher",
            prompts(16, "train"), prompts(8, "held_out"),
            training=TrainingOptions(
                num_steps={steps}, prompts_per_step=2, rollouts_per_prompt=4, learning_rate=1e-3
            ),
            sampling=Sampling(max_new_tokens=100), evaluation_sampling=Sampling(max_new_tokens=100),
            num_samples=4, checkpoint_every=2, grader="exact",
        )
        arms = [Arm("all"), Arm("q3", 0.1)]
        run_ablation(create_run({out!r}), study, arms=arms, seeds=[0], jobs={jobs})
"""


def start(tmp_path, *, out, jobs, steps):
    script = tmp_path / f"study{jobs}.py"
    script.write_text(
        textwrap.dedent(SCRIPT.format(out=str(tmp_path / out), jobs=jobs, steps=steps)), "utf-8"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_processes_give_what_one_process_gives_and_survive_a_kill(tmp_path):
    whole = start(tmp_path, out="whole", jobs=1, steps=12)
    assert whole.wait(timeout=500) == 0, whole.stderr.read()
    killed = start(tmp_path, out="killed", jobs=2, steps=12)
    work = tmp_path / "killed" / "ablations" / ".work"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/step-*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(work.glob("*/step-*/state.json")), "no checkpoint was written in time"
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=20)
    resumed = start(tmp_path, out="killed", jobs=2, steps=12)
    assert resumed.wait(timeout=500) == 0, resumed.stderr.read()
    one, other = (open_run(tmp_path / name).ablations().collect() for name in ("whole", "killed"))
    assert one.height == 3
    assert comparable(one).equals(comparable(other))
    for process in (whole, killed, resumed):
        process.stderr.close()


@pytest.mark.slow
def test_a_worker_that_cannot_start_says_why(tmp_path, caplog):
    options = study(student="no/such/model/here", teacher="arithmetic-teacher")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ModelError, match="no model at no/such/model/here"),
    ):
        run_ablation(create_run(tmp_path / "run"), options, arms=parse_arms(["all"], []), jobs=2)
