import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from reference import extended_statistics
from small_tokenizers import make_tokenizer
from tiny_models import tiny_language_model
from token_columns import EXACT, FLOATS

from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import (
    ConfigurationMismatchError,
    ContextLengthError,
    LogitsError,
    OptionError,
    RunError,
    UnknownNameError,
    VocabularyMismatchError,
)
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.core.schema import RolloutTable, TokenTable
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.logits.row_statistics import token_statistics
from tip_analysis.models.batching import TokenBudget
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.stage import Scorer, score_rollouts


@pytest.fixture(scope="module")
def student():
    return tiny_language_model(name="student")


@pytest.fixture(scope="module")
def teacher():
    return tiny_language_model("llama", seed=5, padding_rows=3, name="teacher")


@pytest.fixture(scope="module")
def run(student, tmp_path_factory):
    run = create_run(tmp_path_factory.mktemp("runs") / "run")
    prompts = [
        Prompt(id=row["id"], problem=row["problem"], solution="so 102")
        for row in problems(10, seed=1)
    ]
    sample_rollouts(
        run, student=student, prompts=prompts, sampling=Sampling(max_new_tokens=20), num_rollouts=3
    )
    return run


@pytest.fixture(scope="module")
def tokens(run, student, teacher):
    score_rollouts(run, Scorer(student, teacher), shard_size=8)
    return run.tokens().collect()


def assert_same_table(left, right, *, rtol=2e-4, atol=2e-6):
    assert left.select(EXACT).equals(right.select(EXACT))
    for name in FLOATS:
        np.testing.assert_allclose(
            left[name].to_numpy(), right[name].to_numpy(), rtol=rtol, atol=atol, err_msg=name
        )


def test_one_row_per_response_token_in_the_order_of_the_rollouts(run, tokens):
    validate(tokens, TokenTable)
    rollouts = run.rollouts().collect()
    expected = [
        (row["rollout_id"], position, token)
        for row in rollouts.iter_rows(named=True)
        for position, token in enumerate(row["response_token_ids"])
    ]
    assert tokens.select("rollout_id", "position", "token_id").rows() == expected
    assert tokens["planted_label"].to_list() == [
        label for labels in rollouts["planted_labels"] for label in labels
    ]
    assert (
        "".join(tokens.filter(rollout_id=rollouts["rollout_id"][0])["token"])
        == rollouts["response_text"][0]
    )


def test_every_column_is_what_the_equations_give_on_the_models_own_logits(
    run, tokens, student, teacher
):
    for row in run.rollouts().head(4).collect().iter_rows(named=True):
        sequence = torch.tensor([row["prompt_token_ids"] + row["response_token_ids"]])
        logits = [model.model(sequence).logits[0].numpy() for model in (student, teacher)]
        found = tokens.filter(rollout_id=row["rollout_id"]).to_dicts()
        for position, token_id in enumerate(row["response_token_ids"]):
            predicts = len(row["prompt_token_ids"]) + position - 1
            expected = extended_statistics(logits[0][predicts], logits[1][predicts, :47], token_id)
            for name, value in expected.items():
                if name.endswith("topk_ids") or name == "top1_agree":
                    assert found[position][name] == value, name
                else:
                    np.testing.assert_allclose(
                        found[position][name], value, rtol=1e-3, atol=1e-5, err_msg=name
                    )


def test_logprobs_are_those_that_generation_saw(run, tokens):
    generated = run.rollouts().collect()["sampled_logprobs"].explode()
    np.testing.assert_allclose(
        tokens["student_logprob"].to_numpy(), generated.to_numpy(), atol=2e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {"budget": TokenBudget(40)},
        {"budget": TokenBudget(100_000)},
        {"share_prompts": True},
        {"share_prompts": False},
        {"compile": False},
    ],
    ids=["small batches", "one batch", "shared prompts", "prompts apart", "eager"],
)
def test_how_the_work_is_cut_changes_nothing(run, tokens, student, teacher, options):
    again = Scorer(student, teacher, **options).token_table(run.rollouts().collect())
    assert_same_table(again, tokens)


def test_row_order_changes_nothing(run, tokens, student, teacher):
    shuffled = run.rollouts().collect().sample(fraction=1.0, shuffle=True, seed=0)
    order = tokens.select(EXACT[:3])
    again = order.join(
        Scorer(student, teacher).token_table(shuffled),
        on=["rollout_id", "position"],
        maintain_order="left",
    )
    assert_same_table(again.select(tokens.columns), tokens)


def test_tokens_that_the_student_did_not_write_are_kept_without_statistics(
    run, tokens, student, teacher
):
    rollouts = run.rollouts().head(3).collect()
    masks = [
        [index % 3 != 1 for index in range(len(ids))] for ids in rollouts["response_token_ids"]
    ]
    masks[1] = [False] * len(masks[1])
    masked = rollouts.with_columns(loss_mask=pl.Series(masks, dtype=pl.List(pl.Boolean)))
    table = Scorer(student, teacher).token_table(masked)
    validate(table, TokenTable)
    full = tokens.filter(pl.col("rollout_id").is_in(rollouts["rollout_id"].to_list()))
    assert table["loss_mask"].to_list() == [value for mask in masks for value in mask]
    assert table.filter(~pl.col("loss_mask")).select(FLOATS).null_count().row(0) == (
        table["loss_mask"].not_().sum(),
    ) * len(FLOATS)
    counted = pl.Series([value for mask in masks for value in mask])
    assert table["turn"].n_unique() > 1  # each gap begins another
    whole = table.with_columns(loss_mask=True, turn=pl.lit(0, pl.Int32))
    assert_same_table(whole.filter(counted), full.filter(counted))


def test_a_rollout_without_tokens_is_kept_and_has_no_rows(run, student, teacher, tmp_path):
    empty = (
        run.rollouts()
        .head(2)
        .collect()
        .with_columns(
            response_token_ids=pl.lit([], pl.List(pl.Int32)),
            loss_mask=pl.lit([], pl.List(pl.Boolean)),
            sampled_logprobs=pl.lit([], pl.List(pl.Float32)),
            planted_labels=pl.lit(None, RolloutTable.planted_labels.dtype),
        )
    )
    both = pl.concat([empty, run.rollouts().slice(2, 2).collect()])
    other = create_run(tmp_path / "run")
    other.begin("rollout", config={"student": {"name": "x"}}).write(0, both)
    summary = score_rollouts(other, Scorer(student, teacher))
    assert other.rollouts().collect().height == 4
    assert (
        other.tokens().collect()["rollout_id"].unique(maintain_order=True).to_list()
        == both["rollout_id"][2:].to_list()
    )
    assert summary["num_empty_rollouts"] == 2
    only_empty = Scorer(student, teacher).token_table(empty)
    assert only_empty.is_empty()
    validate(only_empty, TokenTable)


def test_a_model_scored_against_itself_agrees_with_itself(run, student):
    table = Scorer(student, student).token_table(run.rollouts().head(2).collect())
    for name in ("reverse_kl", "forward_kl", "jsd", "hellinger"):
        assert table[name].max() == 0.0
    assert table["top1_agree"].all()
    assert table["w_local"].is_null().all()


def test_privileged_context_shows_the_teacher_the_solution(run, student, teacher, tmp_path):
    other = create_run(tmp_path / "run")
    other.begin("rollout", config={}).write(0, run.rollouts().head(4).collect())
    score_rollouts(other, Scorer(student, teacher), teacher_context="solution")
    table = other.tokens().collect()
    row = run.rollouts().head(1).collect().row(0, named=True)
    shown = (
        json.loads(row["messages"])[0]["content"]
        + "\n\nReference solution:\nso 102\n\nNow solve the problem step by step in your own words."
    )
    prompt = teacher.tokenizer(shown)["input_ids"]
    logits = teacher.model(torch.tensor([prompt + row["response_token_ids"]])).logits[0, :, :47]
    expected = [
        logits[len(prompt) + i - 1].log_softmax(-1)[token].item()
        for i, token in enumerate(row["response_token_ids"])
    ]
    np.testing.assert_allclose(
        table.filter(rollout_id=row["rollout_id"])["teacher_logprob"].to_numpy(),
        expected,
        atol=1e-4,
    )
    plain = Scorer(student, teacher).token_table(run.rollouts().head(1).collect())
    np.testing.assert_allclose(
        table.filter(rollout_id=row["rollout_id"])["student_logprob"].to_numpy(),
        plain["student_logprob"].to_numpy(),
        atol=1e-4,
    )


def test_privileged_context_needs_solutions(run, student, teacher, tmp_path):
    other = create_run(tmp_path / "run")
    other.begin("rollout", config={}).write(
        0, run.rollouts().head(2).collect().with_columns(solution=pl.lit(None, pl.String))
    )
    with pytest.raises(RunError, match="has no solution"):
        score_rollouts(other, Scorer(student, teacher), teacher_context="solution")
    with pytest.raises(UnknownNameError, match="none, solution"):
        score_rollouts(other, Scorer(student, teacher), teacher_context="answer")


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), r"\+inf")])
def test_logits_that_are_no_numbers_are_refused_by_rollout_and_position(run, student, value, what):
    broken = tiny_language_model(seed=5, name="broken")
    rollouts = run.rollouts().head(6).collect()
    target = rollouts.row(4, named=True)
    plain, spoilt_context = (
        broken.head.linear.forward,
        target["prompt_token_ids"] + target["response_token_ids"][:3],
    )
    hidden = broken.model.base_model(torch.tensor([spoilt_context])).last_hidden_state[0, -1]

    def forward(states):
        logits = plain(states).clone()
        logits[(states - hidden).abs().amax(-1) < 1e-4, 7] = value
        return logits

    broken.head.linear.forward = forward
    with pytest.raises(
        LogitsError, match=rf"rollout '{target['rollout_id']}', position 3: teacher.*{what}"
    ):
        Scorer(student, broken).token_table(rollouts)


def test_what_cannot_be_scored_is_refused_before_a_model_runs(run, student, teacher, tmp_path):
    with pytest.raises(RunError, match="no rollouts yet"):
        score_rollouts(create_run(tmp_path / "empty"), Scorer(student, teacher))
    with pytest.raises(OptionError, match="--shard-size"):
        score_rollouts(run, Scorer(student, teacher), shard_size=0)
    with pytest.raises(OptionError, match="i < n"):
        score_rollouts(run, Scorer(student, teacher), part=(2, 2))
    with pytest.raises(OptionError, match="--top-k"):
        Scorer(student, teacher, top_k=0)
    chat = tiny_language_model(tokenizer=make_tokenizer(), name="chat")
    with pytest.raises(VocabularyMismatchError, match="do not share a vocabulary"):
        Scorer(student, chat)
    with pytest.raises(VocabularyMismatchError, match="another tokenizer"):
        score_rollouts(run, Scorer(chat, chat))
    long = (
        run.rollouts()
        .head(1)
        .collect()
        .with_columns(teacher_prompt_token_ids=pl.lit([1] * 127, pl.List(pl.Int32)))
    )
    other = create_run(tmp_path / "long")
    other.begin("rollout", config={}).write(0, long)
    with pytest.raises(ContextLengthError, match="context of teacher ends at 128"):
        score_rollouts(other, Scorer(student, teacher))


def test_array_jobs_together_give_the_table_of_one_process(run, tokens, student, teacher, tmp_path):
    other = create_run(tmp_path / "run")
    other.begin("rollout", config={}).write(0, run.rollouts().collect())
    first = score_rollouts(other, Scorer(student, teacher), shard_size=8, part=(1, 3))
    assert first["num_shards_missing"] == 3
    assert other.stages()["score"]["finished"] is None
    score_rollouts(other, Scorer(student, teacher), shard_size=8, part=(0, 3))
    last = score_rollouts(other, Scorer(student, teacher), shard_size=8, part=(2, 3))
    assert last["num_scored_tokens"] == tokens.height
    assert other.tokens().collect().equals(tokens)


@pytest.mark.parametrize(("spare", "compiled"), [(0, True), (1, False)])
def test_whether_to_compile_is_decided_by_the_whole_run(
    run, tokens, student, teacher, tmp_path, monkeypatch, spare, compiled
):
    scorer, seen = Scorer(student, teacher), []
    needed = tokens.height * scorer.vocab_size + spare
    monkeypatch.setattr(
        "tip_analysis.scoring.scorer.worth_compiling",
        lambda num_logits, device: num_logits >= needed,
    )
    monkeypatch.setattr(
        "tip_analysis.scoring.scorer.token_statistics",
        lambda *, compile, **rest: seen.append(compile) or token_statistics(compile=False, **rest),
    )
    other = create_run(tmp_path / "run")
    other.begin("rollout", config={}).write(0, run.rollouts().collect())
    score_rollouts(
        other, scorer, shard_size=1, part=(0, 3)
    )  # a part of the run is made as the whole is
    assert seen
    assert set(seen) == {compiled}


def test_an_altered_shard_is_named_and_made_again(run, tokens, student, teacher, caplog):
    shard = sorted((run.path / "tokens").glob("*.parquet"))[1]
    others = {
        path: path.stat().st_mtime_ns for path in shard.parent.glob("*.parquet") if path != shard
    }
    shard.write_bytes(shard.read_bytes()[:1000])
    score_rollouts(run, Scorer(student, teacher), shard_size=8)
    assert shard.name in caplog.text
    assert run.tokens().collect().equals(tokens)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert run.altered_shards() == []


def test_another_teacher_is_refused_and_nothing_is_lost(run, tokens, student):
    with pytest.raises(ConfigurationMismatchError, match="teacher"):
        score_rollouts(run, Scorer(student, student), shard_size=8)
    assert run.tokens().collect().equals(tokens)


SCRIPT = """
    import os, sys, time
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from tiny_models import tiny_language_model
    from tip_analysis.core.run_folder import open_run
    from tip_analysis.scoring import scorer as scorer_module
    from tip_analysis.scoring.stage import Scorer, score_rollouts
    statistics = scorer_module.token_statistics
    # long enough to be killed in
    scorer_module.token_statistics = lambda **logits: time.sleep(0.02) or statistics(**logits)
    student = tiny_language_model(name="student")
    scorer = Scorer(student, tiny_language_model("llama", seed=5, padding_rows=3, name="teacher"))
    score_rollouts(open_run(sys.argv[1]), scorer, shard_size=1)
"""


def test_a_run_killed_three_times_ends_as_an_uninterrupted_one(run, student, teacher, tmp_path):
    whole, killed = create_run(tmp_path / "whole"), create_run(tmp_path / "killed")
    for target in (whole, killed):
        target.begin("rollout", config={}).write(0, run.rollouts().collect())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        score_rollouts(whole, Scorer(student, teacher), shard_size=1)
    finally:
        torch.set_num_threads(threads)
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parents[1])),
        str(killed.path),
    ]
    finished: dict[Path, int] = {}
    for delay in (0.0, 0.02, 0.05):
        process = subprocess.Popen(command)
        while len(list(killed.path.glob("tokens/*.parquet"))) <= len(finished):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {path: path.stat().st_mtime_ns for path in killed.path.glob("tokens/*.parquet")}
        assert finished.items() <= now.items()  # what was whole was not touched
        finished = now
    assert len(finished) < len(
        list(whole.path.glob("tokens/*.parquet"))
    )  # the last kill left something to do
    subprocess.run(command, check=True)
    assert open_run(killed.path).tokens().collect().equals(whole.tokens().collect())
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list(killed.path.rglob("*.part"))


def test_the_vocabulary_is_a_table_like_the_others(run, tokens, student, teacher) -> None:
    table = run.vocabulary().collect()
    assert table["token_id"].to_list() == list(range(student.model.config.vocab_size))
    named = table.join(tokens.unique("token_id"), on="token_id", how="right")
    assert (named["token"] == named["token_right"]).all()
    record = run.stages()["vocabulary"]
    assert list(record["shards"]) == ["part-00000.parquet"]
    assert record["finished"]
    run.stage("vocabulary").path(0).write_bytes(b"altered")
    assert "vocabulary/part-00000.parquet" in run.altered_shards()
    score_rollouts(run, Scorer(student, teacher), shard_size=8)
    assert run.altered_shards() == []
    assert run.vocabulary().collect().equals(table)


def test_a_vocabulary_of_scoring_that_left_nothing_makes_way(run, student, teacher, tmp_path):
    other = create_run(tmp_path / "other")
    work = other.begin("rollout", config={})
    work.write(0, run.rollouts().collect())
    stale = other.begin("vocabulary", config={"tokenizer_fingerprint": "?", "shared_vocabulary": 1})
    stale.write(0, run.vocabulary().collect().head(1))
    score_rollouts(other, Scorer(student, teacher), shard_size=64)
    assert other.vocabulary().collect().equals(run.vocabulary().collect())


@pytest.mark.parametrize("column", ["prompt_token_ids", "response_token_ids"])
def test_ids_that_a_model_has_no_row_for_are_named(run, student, teacher, tmp_path, column):
    last = pl.col(column).list.slice(0, pl.col(column).list.len() - 1)
    beyond = pl.concat_list(last, pl.lit(student.vocab_size, pl.Int32))
    changed = pl.when(pl.int_range(pl.len()) == 4).then(beyond).otherwise(column)
    rollouts = run.rollouts().collect().with_columns(changed.alias(column))
    other = create_run(tmp_path / "run")
    other.begin("rollout", config={}).write(0, rollouts)
    name = rollouts["rollout_id"][4]
    with pytest.raises(VocabularyMismatchError, match=rf"'{name}', position .* is no token of"):
        score_rollouts(other, Scorer(student, teacher))
