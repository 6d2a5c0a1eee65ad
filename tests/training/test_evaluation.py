import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from tiny_models import tiny_language_model

from tip_analysis.analysis.accuracy import compare_models
from tip_analysis.analysis.benchmarks import MEAN_OVER_BENCHMARKS
from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import ContextLengthError, InputError, OptionError, PromptFileError
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.core.schema import EvaluationTable
from tip_analysis.demo.arithmetic.language import extract_answer, problems
from tip_analysis.models.batching import TokenBudget
from tip_analysis.rollouts.encoded import encode_prompts
from tip_analysis.rollouts.engines.hf import HFEngine
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.training.door import evaluate
from tip_analysis.training.evaluation import evaluate_model, evaluation_rows, sample_problems

PROMPTS = [Prompt(row["id"], problem=row["problem"], answer=row["answer"]) for row in problems(5)]
SAMPLING = Sampling(max_new_tokens=12, seed=3)


def model(seed=0):
    return tiny_language_model(seed=seed, sharpness=8.0, name=f"tiny-{seed}")


def length_parity(response, answer):
    """A grader of one's own: whether the response has an even number of characters."""
    return len(response) % 2 == 0


def samples_of(budget=10_000, count=3, grader=f"{__name__}:length_parity"):
    student = model()
    return sample_problems(
        HFEngine(student, TokenBudget(budget)),
        encode_prompts(PROMPTS, student=student),
        num_samples=count,
        sampling=SAMPLING,
        grader=grader,
    )


def test_samples_do_not_depend_on_batches_or_on_how_many_there_are():
    one, other, more = samples_of(), samples_of(budget=1), samples_of(count=5)
    assert [g.token_ids for g in one.generations] == [g.token_ids for g in other.generations]
    assert [g.token_ids for g in one.generations[:3]] == [g.token_ids for g in more.generations[:3]]
    np.testing.assert_array_equal(one.rewards, more.rewards[:, :3])
    assert one.rewards.shape == (5, 3)
    assert len({tuple(g.token_ids) for g in one.generations}) > 5


def test_rewards_are_the_graders(tmp_path):
    samples = samples_of(grader="exact")
    rows = validate(evaluation_rows(samples, model="m", seed=3), EvaluationTable)
    answers = {prompt.id: prompt.answer for prompt in PROMPTS}
    expected = [
        float(extract_answer(row["response_text"]) == answers[row["problem_id"]])
        for row in rows.iter_rows(named=True)
    ]
    assert rows["reward"].to_list() == expected
    assert rows["num_tokens"].to_list() == [len(g.token_ids) for g in samples.generations]


def test_the_stage_adds_models_and_goes_on_where_it_was_left(tmp_path, monkeypatch):
    from tip_analysis.training import evaluation

    monkeypatch.setattr(evaluation, "PROBLEMS_PER_SHARD", 2)
    run = create_run(tmp_path / "run")
    options = {
        "prompts": PROMPTS,
        "num_samples": 4,
        "sampling": SAMPLING,
        "grader": f"{__name__}:length_parity",
    }
    summary = evaluate_model(run, model=model(0), **options)
    table = run.evaluations().collect()
    assert table.height == 20
    assert summary["accuracy"] == pytest.approx(table["reward"].mean())
    assert summary["num_problems"] == 5
    whole = {path.name: path.read_bytes() for path in (tmp_path / "run" / "evaluations").iterdir()}
    lost = sorted(whole)[1]
    (tmp_path / "run" / "evaluations" / lost).unlink()
    evaluate_model(run, model=model(0), **options)
    again = {path.name: path.read_bytes() for path in (tmp_path / "run" / "evaluations").iterdir()}
    assert again == whole
    evaluate_model(run, model=model(1), **options)
    both = run.evaluations().collect()
    assert both.height == 40
    assert compare_models(both, model="tiny-0", baseline="tiny-1").num_problems == 5


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    student = model()
    with pytest.raises(PromptFileError, match="no answer"):
        evaluate_model(
            create_run(tmp_path / "none"),
            model=student,
            prompts=[Prompt("a", problem="12+34+56=")],
            sampling=SAMPLING,
        )
    with pytest.raises(PromptFileError, match="no verdict"):
        samples_of(grader="none")
    with pytest.raises(OptionError, match="num-samples"):
        samples_of(count=0)
    with pytest.raises(ContextLengthError):
        evaluate_model(create_run(tmp_path / "run"), model=student, prompts=PROMPTS, grader="exact")


def test_a_hand_made_table_is_read_like_the_stages_own():
    rows = evaluation_rows(samples_of(), model="m", seed=3)
    assert rows.group_by("problem_id").agg(pl.len())["len"].to_list() == [3] * 5


def test_several_benchmarks_are_evaluated_each_by_itself(tmp_path):
    from tip_analysis.cli.main import main

    for name, count in (("easy", 1), ("hard", 3)):
        rows = problems(count, split="held_out")
        lines = [json.dumps({key: row[key] for key in ("id", "problem", "answer")}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("easy", "hard")]
    student = model()
    how = {"num_samples": 2, "max_new_tokens": 12, "grader": f"{__name__}:length_parity"}
    both = evaluate(tmp_path / "both", model=student, prompts=files, **how)
    table = open_run(tmp_path / "both").evaluations().collect()
    assert dict(table.group_by("benchmark").len().iter_rows()) == {"easy": 2, "hard": 6}
    means = dict(table.group_by("benchmark").agg(pl.col("reward").mean()).iter_rows())
    expected = means | {MEAN_OVER_BENCHMARKS: (means["easy"] + means["hard"]) / 2}
    assert both["accuracy"] == pytest.approx(expected)
    alone = evaluate(tmp_path / "alone", model=student, prompts=files[1], **how)
    assert (alone["benchmark"], alone["accuracy"]) == ("hard", both["accuracy"]["hard"])
    with pytest.raises(OptionError, match="named twice"):
        evaluate(tmp_path / "twice", model=student, prompts=[files[0], files[0]], **how)
    with pytest.raises(OptionError, match="problems of one benchmark"):
        evaluate_model(
            create_run(tmp_path / "mixed"),
            model=student,
            prompts=[PROMPTS[0], replace(PROMPTS[1], benchmark="other")],
            sampling=SAMPLING,
        )
    missing = str(tmp_path / "missing.jsonl")
    arguments = ["evaluate", str(tmp_path / "cli"), "--model", "arithmetic-student"]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--prompts", files[0], missing])


GOOD = [json.dumps({key: row[key] for key in ("id", "problem", "answer")}) for row in problems(3)]
BAD = {
    "line 2: broken JSON": "{broken",
    "line 3: the problem 'open' has no answer": '{"id": "open", "problem": "1+2=", "answer": null}',
    "line 5: the id .* occurs twice": GOOD[0],
}
UNUSABLE = {
    "prompt 'long' has .* tokens": {"id": "long", "problem": "1+" * 60 + "1=", "answer": "61"},
    "prompt 'chat': .*no chat template": {
        "id": "chat",
        "messages": [{"role": "system", "content": "1"}, {"role": "user", "content": "1+2="}],
        "answer": "3",
    },
}


def test_a_bad_problem_is_named_or_left_out_and_counted(tmp_path, caplog):
    bad = [*BAD.values(), *map(json.dumps, UNUSABLE.values())]
    lines = [GOOD[0], bad[0], bad[1], GOOD[1], bad[2], bad[3], GOOD[2], bad[4]]
    mixed, clean = tmp_path / "mixed.jsonl", tmp_path / "clean.jsonl"
    mixed.write_text("\n".join(lines), "utf-8")
    clean.write_text("\n".join(GOOD), "utf-8")
    student = model()
    how = {"num_samples": 2, "max_new_tokens": 12, "grader": f"{__name__}:length_parity"}
    found = evaluate(tmp_path / "run", model=student, prompts=mixed, on_bad_row="skip", **how)
    alone = evaluate(tmp_path / "alone", model=student, prompts=clean, **how)
    assert found["num_skipped_rows"] == len(bad)
    assert "num_skipped_rows" not in alone
    rows = [
        open_run(tmp_path / name).evaluations().drop("benchmark").collect()
        for name in ("run", "alone")
    ]
    assert rows[0].equals(rows[1])
    (stage,) = open_run(tmp_path / "run").stages().values()
    assert stage["settings"]["skipped_rows"] == len(bad)
    for place, message in enumerate([*BAD, *reversed(UNUSABLE)]):  # rendered, then measured
        assert re.search(message, stage["settings"]["skipped"][place])
    assert "3 row(s) of" in caplog.text
    assert "2 row(s) of the prompts were left out" in caplog.text


@pytest.mark.parametrize(("message", "line"), [*BAD.items(), *UNUSABLE.items()])
def test_a_bad_problem_ends_an_evaluation_unless_it_is_to_be_skipped(tmp_path, message, line):
    line = line if isinstance(line, str) else json.dumps(line)
    place = int(message[5]) if message.startswith("line") else 2
    lines = [*GOOD[: place - 1], line]
    lines = lines if len(lines) == place else [*GOOD, "", line]  # blank lines count
    (tmp_path / "p.jsonl").write_text("\n".join(lines), "utf-8")
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path / "run", model=model(), prompts=tmp_path / "p.jsonl", max_new_tokens=12)


def test_problems_that_are_all_bad_are_no_evaluation(tmp_path):
    with pytest.raises(PromptFileError, match="row 0: the problem 'a' has no answer"):
        evaluate(
            tmp_path / "run",
            model=model(),
            prompts=[{"id": "a", "problem": "1+2="}],
            on_bad_row="skip",
        )
    with pytest.raises(ContextLengthError, match="'long'"):
        evaluate(
            tmp_path / "run",
            model=model(),
            prompts=[next(iter(UNUSABLE.values()))],
            on_bad_row="skip",
        )
