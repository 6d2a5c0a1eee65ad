"""Agents: evaluation by the environment's reward, and training on what the student wrote only."""

import json

import numpy as np
import pytest
from scripted_engine import CHATML_TOOLS, LLAMA_3, ScriptedEngine, chat_tokenizer, token_model
from trajectories import CALL, Doubler

from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import InputError
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.core.schema import EvaluationTable
from tip_analysis.models.batching import TokenBudget
from tip_analysis.rollouts.environments.episodes import Limits, ask
from tip_analysis.rollouts.environments.registry import EnvironmentSource
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.training.agents import Playground, evaluate_agent, mean_parts, sample_tasks
from tip_analysis.training.data import OnPolicyRollouts
from tip_analysis.training.evaluation import Samples

SOURCE = EnvironmentSource("doubler", Doubler)
PROMPTS = [Prompt(f"p{i}", problem=f"Task {i}") for i in range(3)]


def scripted(names):
    texts = {name: [*[CALL] * (place % 3), f"It is {place}."] for place, name in enumerate(names)}
    return ScriptedEngine(token_model(chat_tokenizer(CHATML_TOOLS)), texts)


@pytest.fixture
def engine():
    return scripted([f"evaluation/p{i}/{j}" for i in range(3) for j in (0, 1)])


def evaluate(path, engine, **how):
    return evaluate_agent(
        create_run(path),
        model=engine.author,
        engine=engine,
        source=SOURCE,
        prompts=PROMPTS,
        benchmark="doubler",
        num_samples=2,
        sampling=Sampling(500, seed=5),
        **how,
    )


def test_the_environment_grades(engine, tmp_path):
    summary = evaluate(tmp_path / "run", engine)
    rows = validate(open_run(tmp_path / "run").evaluations().collect(), EvaluationTable)
    assert rows["reward"].to_list() == [0.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert rows["num_turns"].to_list() == [1, 2, 3, 1, 2, 3]
    parts = [json.loads(text)["calls"] for text in rows["reward_parts"]]
    assert parts == [2 * turns for turns in rows["num_turns"]]
    assert summary["reward_parts"] == {"calls": pytest.approx(np.mean(parts))}
    assert summary["mean_turns"] == 2.0
    tokenizer = engine.author.tokenizer
    written = [len(tokenizer(CALL)["input_ids"]) + 1, len(tokenizer("It is 1.")["input_ids"]) + 1]
    assert rows["num_tokens"][1] == sum(written)  # not what the environment said


def test_what_is_there_already_is_not_sampled_again(engine, tmp_path):
    evaluate(tmp_path / "run", engine)
    again = scripted(engine.texts)
    evaluate(tmp_path / "run", again)
    assert again.asked == []


def test_means_of_parts_are_over_the_samples_that_have_them():
    assert mean_parts(['{"a": 1.0}', '{"a": 0.0, "b": 0.5}', None]) == {"a": 0.5, "b": 0.5}


def playground(author, limits=None):
    tasks = {p.id: ask(p, SOURCE, student=author, seed=0) for p in PROMPTS}
    return Playground(SOURCE, tasks, limits or Limits())


def test_training_rollouts_are_masked_where_the_environment_spoke():
    names = [f"0/p{i}/{j}" for i in range(3) for j in (0, 1)]
    engine = scripted(names)
    ground = playground(engine.author)
    source = OnPolicyRollouts(
        [task.shown for task in ground.tasks.values()],
        Sampling(500),
        3,
        2,
        TokenBudget(4096),
        engine,
        ground,
    )
    rollouts = source.rollouts(0, engine.author)
    assert sorted(rollout.rollout_id for rollout in rollouts) == names
    for rollout in rollouts:
        eos = engine.author.tokenizer.eos_token_id
        turns = engine.prefixes[rollout.rollout_id]
        written = np.asarray(rollout.response)[rollout.written]
        assert (written == eos).sum() == len(turns)
        assert rollout.written.all() == (len(turns) == 1)
        assert rollout.reward == (0.0 if rollout.prompt_id == "p0" else 0.5)


def test_samples_keep_their_rollouts_by_benchmark(engine):
    ground = playground(engine.author)
    tasks = list(ground.tasks.values())
    how = {"num_samples": 2, "sampling": Sampling(500), "benchmarks": ["a", "b", "a"]}
    samples = sample_tasks(engine, ground, tasks, **how)
    assert isinstance(samples, Samples)
    of_a, of_b = samples.by_benchmark()
    assert [r.prompt_id for r in of_a.first_rollouts()] == ["p0", "p2"]
    assert [r.rollout_id for r in of_b.rollouts] == ["evaluation/p1/0", "evaluation/p1/1"]
    assert of_b.num_turns == [3, 1]


def test_a_rewritten_conversation_ends_training():
    author = token_model(chat_tokenizer(LLAMA_3))
    engine = ScriptedEngine(author, {"*": [CALL + "  ", "It is."]})
    ground = playground(author)
    with pytest.raises(InputError, match="turn 1 of the student"):
        ground.rollouts(engine, [("0/p1/0", "p1")], Sampling(500))
