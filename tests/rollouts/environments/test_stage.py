"""Trajectories in a run folder: rows, resumption after kill -9, and environments by name."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trajectories import CALL, Doubler, engine, sample

from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import ConfigurationMismatchError, OptionError, UnknownNameError
from tip_analysis.core.run_folder import open_run
from tip_analysis.core.schema import RolloutTable
from tip_analysis.rollouts.environments.protocol import Task
from tip_analysis.rollouts.environments.registry import register_environment, resolve_environment
from tip_analysis.rollouts.environments.turns import parse_turn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("trajectories") / "run"
    summary = sample(path)
    assert summary["num_rollouts"] == 12
    assert summary["refused_rollouts"] == []
    return open_run(path)


def test_rows_of_trajectories(run):
    rollouts = run.rollouts().collect()
    validate(rollouts, RolloutTable)
    assert rollouts["rollout_id"].to_list() == [f"p{i}/{j}" for i in range(6) for j in (0, 1)]
    assert rollouts["batch_id"].to_list() == [0] * 8 + [1] * 4
    assert set(rollouts["environment"]) == {"doubler"}
    for row in rollouts.iter_rows(named=True):
        i, j = int(row["prompt_id"][1:]), row["sample_index"]
        assert len(row["turn_starts"]) == (i + j) % 3 + 1
        assert row["reward"] == (0.5 if i else 0.0)
        assert json.loads(row["reward_parts"]) == {"calls": 1 + 2 * ((i + j) % 3) + 1}
        assert row["conversation_match"] == "ids"
        assert row["response_text"].endswith(f"It is {i}{j}.<|im_end|>")
        assert json.loads(row["tools"])[0]["function"]["name"] == "double"
    assert rollouts["loss_mask"].list.all().sum() == rollouts["turn_starts"].list.len().eq(1).sum()


def test_a_batch_that_was_killed_ends_equal(run, tmp_path):
    path = tmp_path / "killed"
    script = Path(__file__).parents[2] / "trajectories.py"
    died = subprocess.run([sys.executable, script, path, "4"], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-500:]
    written = list((path / "rollouts").glob("*.parquet"))
    assert 0 < len(written) < 3  # the first shard is whole, the next was under way
    sample(path)
    assert open_run(path).rollouts().collect().equals(run.rollouts().collect())


def test_another_environment_or_limit_is_refused(run):
    from tip_analysis.rollouts.environments.episodes import Limits

    with pytest.raises(ConfigurationMismatchError, match="max_turns"):
        sample(run.path, limits=Limits(max_turns=3))


FILE = """
class Mine:
    def reset(self, task):
        return [{"role": "user", "content": task.row["problem"]}], None
    def step(self, message):
        return [], True
    def reward(self, trajectory):
        return 1.0
    @staticmethod
    def tasks():
        return [{"id": "a", "problem": "x"}, {"problem": "y"}]
class Half:
    def reset(self, task): ...
"""


def test_environments_by_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    source = resolve_environment(f"{file}:Mine")
    assert source.name == "mine.py:Mine"  # no path of this machine in a run folder
    assert [prompt.id for prompt in source.tasks()] == ["a", "mine.py:Mine-1"]
    assert source.make().reward(None) == 1.0
    before = source.identity()
    file.write_text(FILE + "\n")
    assert resolve_environment(f"{file}:Mine").identity() != before
    for name, reason in (("Half", "'step'"), ("Gone", "no such name")):
        with pytest.raises(OptionError, match=reason):
            resolve_environment(f"{file}:{name}")
    file.write_text("1 / 0")
    with pytest.raises(OptionError, match="ZeroDivisionError"):
        resolve_environment(f"{file}:Mine")
    with pytest.raises(OptionError, match="does not exist"):
        resolve_environment(f"{tmp_path / 'no.py'}:Mine")


def test_environments_by_name():
    register_environment("test-doubler", Doubler, overwrite=True)
    source = resolve_environment("test-doubler")
    assert isinstance(source.make(), Doubler)
    with pytest.raises(OptionError, match="no tasks"):
        source.tasks()
    with pytest.raises(OptionError, match="already"):
        register_environment("test-doubler", Doubler)
    with pytest.raises(OptionError, match="':'"):
        register_environment("a:b", Doubler)
    with pytest.raises(UnknownNameError, match="arithmetic-agent"):
        resolve_environment("nobody")


def test_the_embedded_environment_answers_its_own_language():
    source = resolve_environment("arithmetic-agent")
    (prompt,) = source.tasks(limit=1)
    environment = source.make()
    row = {"problem": "12+fig+30="}
    messages, tools = environment.reset(Task("t", row, 0))
    assert messages == [{"role": "user", "content": "12+fig+30="}]
    assert [tool["function"]["name"] for tool in tools] == ["lookup", "add"]
    assert prompt.answer.isdecimal()
    text = (
        '<think>so</think><tool_call>{"name": "lookup", "arguments": {"item": "fig"}}</tool_call>'
    )
    (answer,), done = environment.step(parse_turn(text))
    assert answer["content"].startswith("fig")
    assert not done


def test_names_in_calls_of_several_manners():
    for text in (
        CALL,
        '{"name": "double", "parameters": {"x": 3}}',
        '[TOOL_CALLS][{"name": "double", "arguments": {"x": 3}}]',
        "<tool_call>\n<function=double>\n<parameter=x>\n3\n</parameter>\n</function>\n</tool_call>",
    ):
        message = parse_turn("<think>so</think>\n\n" + text)
        assert message["reasoning_content"] == "so"
        (found,) = message["tool_calls"]
        assert found["function"] == {"name": "double", "arguments": {"x": 3}}
        assert message["content"] == ""
    assert parse_turn("plain") == {"role": "assistant", "content": "plain"}
    assert engine().author.name == "scripted"
