import json

import polars as pl
import pytest
from small_tokenizers import make_tokenizer
from tiny_models import tiny_language_model

from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import ConfigurationMismatchError, ContextLengthError, OptionError
from tip_analysis.core.run_folder import create_run
from tip_analysis.core.schema import RolloutTable
from tip_analysis.demo.arithmetic.language import label_tokens, problems
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts

SAMPLING = Sampling(max_new_tokens=20)


@pytest.fixture(scope="module")
def student():
    return tiny_language_model()


@pytest.fixture(scope="module")
def prompts():
    return [
        Prompt(id=row["id"], problem=row["problem"], answer=row["answer"], solution="see")
        for row in problems(20, seed=1)
    ]


@pytest.fixture(scope="module")
def run(student, prompts, tmp_path_factory):
    run = create_run(tmp_path_factory.mktemp("runs") / "run")
    sample_rollouts(run, student=student, prompts=prompts, sampling=SAMPLING, num_rollouts=5)
    return run


def test_one_row_per_rollout_in_the_order_of_the_prompts(run, prompts):
    rollouts = run.rollouts().collect()
    validate(rollouts, RolloutTable)
    assert rollouts["rollout_id"].to_list() == [
        f"{prompt.id}/{index}" for prompt in prompts for index in range(5)
    ]
    assert rollouts["batch_id"].to_list() == [index // 8 for index in range(20) for _ in range(5)]
    assert rollouts["ground_truth"].to_list() == [
        prompt.answer for prompt in prompts for _ in range(5)
    ]
    assert (
        len(list((run.path / "rollouts").glob("*.parquet"))) == 2
    )  # 12 prompts of 5 rollouts a shard


def test_text_and_ids_say_the_same(run, student):
    for row in run.rollouts().collect().iter_rows(named=True):
        assert student.tokenizer.decode(row["response_token_ids"]) == row["response_text"]
        assert student.tokenizer.decode(row["prompt_token_ids"]) == row["prompt_text"]
        assert row["prompt_text"] == "<bos>" + json.loads(row["messages"])[0]["content"]
        assert (row["response_token_ids"][-1] == 2) == (row["finish_reason"] == "stop")


def test_true_labels_and_rewards_are_those_of_the_language(run):
    for row in run.rollouts().collect().iter_rows(named=True):
        problem = json.loads(row["messages"])[0]["content"]
        tokens = _tokens(row)
        assert row["planted_labels"] == label_tokens(problem, tokens)
        assert row["reward"] == 0.0  # a random model does not add


def _tokens(row):
    from tip_analysis.demo.arithmetic.language import VOCABULARY

    return [VOCABULARY[token] for token in row["response_token_ids"]]


def test_the_summary_counts_what_is_there(run):
    summary, rollouts = run.stages()["rollout"]["summary"], run.rollouts().collect()
    assert summary["num_rollouts"] == 100
    assert summary["num_prompts"] == 20
    assert summary["num_tokens"] == sum(map(len, rollouts["response_token_ids"]))
    assert sum(summary["finish_reasons"].values()) == 100
    assert summary["mean_reward"] == 0.0


def test_a_lost_shard_is_made_again_as_it_was(run, student, prompts):
    before = run.rollouts().collect()
    first, second = sorted((run.path / "rollouts").glob("*.parquet"))
    first.unlink()
    untouched = second.stat().st_mtime_ns
    sample_rollouts(run, student=student, prompts=prompts, sampling=SAMPLING, num_rollouts=5)
    assert run.rollouts().collect().equals(before)
    assert second.stat().st_mtime_ns == untouched


def test_batch_size_changes_no_token(run, student, prompts, tmp_path):
    small = create_run(tmp_path / "small")
    sample_rollouts(
        small, student=student, prompts=prompts, sampling=SAMPLING, num_rollouts=5, token_budget=64
    )
    columns = ["rollout_id", "response_token_ids", "finish_reason"]
    assert (
        small.rollouts().select(columns).collect().equals(run.rollouts().select(columns).collect())
    )


def test_another_configuration_is_refused_and_nothing_is_lost(run, student, prompts):
    before = run.rollouts().collect()
    with pytest.raises(ConfigurationMismatchError, match=r"temperature: 1\.0 → 0\.5"):
        sample_rollouts(
            run,
            student=student,
            prompts=prompts,
            sampling=Sampling(max_new_tokens=20, temperature=0.5),
            num_rollouts=5,
        )
    with pytest.raises(ConfigurationMismatchError, match="prompts"):
        sample_rollouts(
            run, student=student, prompts=prompts[:3], sampling=SAMPLING, num_rollouts=5
        )
    assert run.rollouts().collect().equals(before)


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_written(
    student, prompts, tmp_path
):
    run = create_run(tmp_path / "run")
    with pytest.raises(ContextLengthError, match="128"):
        sample_rollouts(
            run, student=student, prompts=prompts, sampling=Sampling(max_new_tokens=120)
        )
    assert run.stages() == {}


def test_options_out_of_range_are_refused(student, prompts, tmp_path):
    with pytest.raises(OptionError, match="--num-rollouts"):
        sample_rollouts(
            create_run(tmp_path / "run"),
            student=student,
            prompts=prompts,
            sampling=SAMPLING,
            num_rollouts=0,
        )


def test_chat_models_get_their_template_and_its_switches(tmp_path, caplog):
    student = tiny_language_model(tokenizer=make_tokenizer())
    run = create_run(tmp_path / "run")
    sample_rollouts(
        run,
        student=student,
        prompts=[Prompt(id="a", problem="What is 12 + 34?", answer="46")],
        sampling=Sampling(max_new_tokens=8),
        template="boxed",
        chat_template_kwargs={"enable_thinking": False, "unknown": 1},
    )
    row = run.rollouts().collect().row(0, named=True)
    assert row["prompt_text"].startswith(
        "<|im_start|>user\nWhat is 12 + 34?\n\nPlease reason step by step"
    )
    assert row["prompt_text"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert row["template_origin"] == "exact"
    assert row["planted_labels"] is None
    assert run.stages()["rollout"]["config"]["grader"] == "math"
    assert "does not use unknown" in caplog.text


def test_prompts_without_answers_are_not_graded(student, tmp_path):
    run = create_run(tmp_path / "run")
    sample_rollouts(
        run, student=student, prompts=[Prompt(id="a", problem="12+34+56=")], sampling=SAMPLING
    )
    assert run.rollouts().collect()["reward"].is_null().all()
    assert isinstance(run.rollouts(), pl.LazyFrame)
