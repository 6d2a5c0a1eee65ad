"""The shipped agent pair: planted errors are found in Q3, and the teacher solves what the student
does not."""

import polars as pl
import pytest

from tip_analysis.analysis.planted import planted_detection
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.core.run_folder import create_run
from tip_analysis.models.loading import load_model
from tip_analysis.rollouts.environments.episodes import Limits
from tip_analysis.rollouts.environments.registry import resolve_environment
from tip_analysis.rollouts.environments.stage import sample_trajectories
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.scoring.stage import Scorer, score_rollouts
from tip_analysis.training.ablation.presets import resolve_preset
from tip_analysis.training.ablation.study import study_from_preset


@pytest.fixture(scope="module")
def pair():
    return [load_model(f"arithmetic-agent-{role}", device="cpu") for role in ("student", "teacher")]


def sampled(path, model):
    source = resolve_environment("arithmetic-agent")
    run = create_run(path)
    how = {"sampling": Sampling(120), "limits": Limits(6), "num_rollouts": 2}
    summary = sample_trajectories(
        run, student=model, source=source, prompts=source.tasks(48), **how
    )
    return run, summary


def test_planted_errors_are_found_in_q3(pair, tmp_path):
    run, summary = sampled(tmp_path / "run", pair[0])
    assert summary["refused_rollouts"] == []
    score_rollouts(run, Scorer(*pair))
    placed = assign_quadrants(add_scores(run.tokens()), entropy_cut="0.3", divergence_cut="0.5")
    found = planted_detection(placed).row(0, named=True)
    assert found["num_planted"] > 50
    assert found["q3_recall"] >= 0.8
    assert found["q3_precision"] >= 0.5
    assert found["auc"] >= 0.95
    rollouts = run.rollouts().collect()
    assert set(rollouts["conversation_match"]) == {"ids"}
    tokens = run.tokens().collect()
    assert set(tokens["segment"].drop_nulls()) == {"think", "tool_call", "answer", "other"}
    assert tokens.filter(~pl.col("loss_mask"))["segment"].null_count() > 0


def test_the_teacher_is_worth_more(pair, tmp_path):
    rewards = [
        sampled(tmp_path / str(place), model)[1]["mean_reward"] for place, model in enumerate(pair)
    ]
    assert rewards[0] < 0.5 < 0.75 < rewards[1]


def test_a_study_of_the_preset_acts_in_its_environment():
    preset = resolve_preset("arithmetic-agent")
    study = study_from_preset(preset, prompts=(), evaluation_prompts=())
    assert (study.environment, study.limits.max_turns) == ("arithmetic-agent", 6)
    assert study.identity()["environment"] == "arithmetic-agent"
