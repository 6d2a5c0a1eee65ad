"""A teacher behind a server: the stand-in answers with the log-probabilities of a real tiny model,
so that every number has an exact one beside it."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_server import failing, stand_in, top_logprobs
from tiny_models import tiny_language_model

from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.analysis.status import stage_table
from tip_analysis.core.errors import (
    ConfigurationMismatchError,
    EngineError,
    ModelError,
    OptionError,
    SchemaError,
    VocabularyMismatchError,
)
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.logits.row_statistics import token_statistics
from tip_analysis.models.loading import load_model
from tip_analysis.report.build import write_report
from tip_analysis.rollouts.engines.completions import CompletionsClient
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.door import score
from tip_analysis.scoring.served_teacher import TAIL_FLOOR, ServedTeacher
from tip_analysis.scoring.stage import Scorer, score_rollouts
from tip_analysis.scoring.top_k_side import LOWER_BOUNDS, TopKSide, not_available

OWN = ("teacher_topk_ids", "teacher_topk_logprobs", "teacher_top1_prob", "teacher_logprob")


@pytest.fixture(scope="module")
def student():
    return tiny_language_model(name="student")


@pytest.fixture(scope="module")
def teacher():
    return tiny_language_model("llama", seed=5, name="teacher")


@pytest.fixture(scope="module")
def rollouts(student, tmp_path_factory):
    run = create_run(tmp_path_factory.mktemp("runs") / "run")
    prompts = [Prompt(id=row["id"], problem=row["problem"]) for row in problems(6, seed=1)]
    sample_rollouts(
        run, student=student, prompts=prompts, sampling=Sampling(max_new_tokens=12), num_rollouts=3
    )
    return run.rollouts().collect()


@pytest.fixture
def run(rollouts, tmp_path):
    run = create_run(tmp_path / "run")
    stage = run.begin("rollout", config={"student": {"name": "student"}})
    stage.write(0, rollouts)
    stage.finish()
    return run


@pytest.fixture
def server(teacher):
    with stand_in() as state:
        state.answer = lambda payload: teacher_answer(teacher, payload)
        yield state


@torch.no_grad()
def teacher_answer(teacher, payload, most=20):
    """What `vllm serve` says of a prompt, by a model of transformers' own."""
    ids = payload["prompt"]
    logits = teacher.model(torch.tensor([ids])).logits[0].double().tolist()
    told = [None]
    for place in range(1, len(ids)):
        entry = top_logprobs(logits[place - 1], min(payload["prompt_logprobs"], most), ids[place])
        for token, one in entry.items():
            one["decoded_token"] = teacher.tokenizer.decode([int(token)])
        told.append(entry)
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": "length",
        "prompt_logprobs": told,
        "prompt_token_ids": ids,
        "token_ids": [4],
    }
    return {"choices": [choice]}


def served(server, student, k=20, **options):
    options = {"attempts": 2, "first_pause_s": 0.01, "timeout_s": 20.0} | options
    client = CompletionsClient(server.url, **options)
    client.connect()
    return ServedTeacher(client, student, k)


def scored(run, student, source, **options):
    return score_rollouts(
        run, Scorer(student, source.model, top_k=3), stored=source, **{"shard_size": 4} | options
    )


@pytest.fixture(scope="module")
def exact(rollouts, student, teacher, tmp_path_factory):
    run = create_run(tmp_path_factory.mktemp("runs") / "exact")
    stage = run.begin("rollout", config={"student": {"name": "student"}})
    stage.write(0, rollouts)
    stage.finish()
    score_rollouts(run, Scorer(student, teacher, top_k=3))
    return run.tokens().collect()


def coarse(student_row, teacher_row, known):
    """The two distributions with everything outside `known` as one token, in float64."""
    p, q = (np.exp(row - np.logaddexp.reduce(row)) for row in (student_row, teacher_row))
    rest = np.ones(len(p), dtype=bool)
    rest[list(known)] = False
    return tuple(np.append(row[list(known)], row[rest].sum()) for row in (p, q))


def kl(p, q):
    inside = p > 0
    return float((p[inside] * np.log(p[inside] / q[inside])).sum())


def divergences(p, q):
    m = (p + q) / 2
    return {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "jsd": (kl(p, m) + kl(q, m)) / 2,
        "hellinger": math.sqrt(0.5 * ((np.sqrt(p) - np.sqrt(q)) ** 2).sum()),
    }


@torch.no_grad()
def rows_of(model, rollouts):
    """float64 logits of the place before each response token, in the order of the tokens."""
    found = []
    for row in rollouts.iter_rows(named=True):
        ids = [*row["prompt_token_ids"], *row["response_token_ids"]]
        logits = model.model(torch.tensor([ids])).logits[0].double().numpy()
        found += list(logits[len(row["prompt_token_ids"]) - 1 : -1])
    return found


@pytest.mark.parametrize("k", [3, 8, 20])
def test_divergences_are_those_of_one_tail_token(run, rollouts, student, teacher, server, exact, k):
    scored(run, student, served(server, student, k))
    table = run.tokens().collect()
    pairs = zip(rows_of(student, rollouts), rows_of(teacher, rollouts), strict=True)
    for index, (student_row, teacher_row) in enumerate(pairs):
        row = table.row(index, named=True)
        top = np.argsort(-teacher_row, kind="stable")[:k]
        known = dict.fromkeys([*top.tolist(), row["token_id"]])  # the sampled token is always known
        for name, expected in divergences(*coarse(student_row, teacher_row, known)).items():
            assert row[name] == pytest.approx(expected, rel=2e-3, abs=2e-5), (index, name)
            assert row[name] <= exact[name][index] * (1 + 1e-4) + 2e-5
    assert table["approximation"].unique().to_list() == ["top-k"]


def test_what_the_server_tells_is_exact_and_what_it_cannot_is_null(run, student, server, exact):
    scored(run, student, served(server, student))
    table = run.tokens().collect()
    for name in ("teacher_logprob", "teacher_top1_prob", "student_entropy", "student_logprob"):
        np.testing.assert_allclose(table[name], exact[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for name in ("teacher_topk_ids", "top1_agree", "student_topk_ids", "token"):
        assert table[name].equals(exact[name]), name
    for name in not_available(OWN):
        assert table[name].null_count() == table.height, name
    assert "teacher_entropy" in not_available(OWN)
    assert exact["approximation"].null_count() == exact.height


def test_record_status_and_report_say_approximate(run, student, server, tmp_path):
    scored(run, student, served(server, student))
    record = json.loads(run.record_path.read_text())["stages"]["score"]
    assert record["config"]["approximate"] == "top-k"
    assert record["config"]["teacher"] == {"name": "served:stand-in", "teacher_k": 20}
    assert record["config"]["lower_bounds"] == list(LOWER_BOUNDS)
    assert record["settings"]["teacher_server"] == server.url
    assert stage_table(run).filter(stage="score")["note"].item() == "approximate: top-k"
    page = write_report([run.path], tmp_path / "page.html").read_text()
    assert "Approximate: top-k" in page


def test_rules_that_need_what_is_missing_refuse_by_name(run, student, server):
    scored(run, student, served(server, student))
    table = add_scores(run.tokens())
    for rule, column in (
        ("teacher_entropy", "teacher_entropy"),
        ("teachability", "teacher_mass_on_student_topk"),
    ):
        with pytest.raises(SchemaError, match=rf"approximate \(top-k\), which gives no {column}"):
            select_tokens(table, rule=rule, retention_ratio=0.5)
    for rule in ("soft_or", "q3", "divergence", "jsd", "entropy"):
        assert select_tokens(table, rule=rule, retention_ratio=0.5).collect()["selected"].any()


def test_a_null_that_the_record_does_not_announce_is_refused(run, student, teacher):
    score_rollouts(run, Scorer(student, teacher, top_k=3))
    table = run.tokens().collect()
    stage = run.stage("score")
    stage.write(0, table.with_columns(teacher_entropy=pl.lit(None, pl.Float32)))
    with pytest.raises(SchemaError, match="row 0: teacher_entropy must not be null, unless"):
        open_run(run.path).tokens()


def test_fewer_tokens_are_asked_for_where_the_server_allows_fewer(run, student, server, teacher):
    def strict(count, handler):
        asked = server.asked[-1]["prompt_logprobs"]
        message = f"Requested prompt logprobs of {asked}, which is greater than max allowed: 7"
        return asked > 7 and failing(400, message)(count, handler)

    server.misbehave = strict
    source = served(server, student, 64)
    assert source.k == 7
    scored(run, student, source)
    assert run.stages()["score"]["config"]["teacher"]["teacher_k"] == 7
    with pytest.raises(OptionError, match="--top-k 9 is more than the 7 tokens"):
        score_rollouts(run, Scorer(student, source.model, top_k=9), stored=source, overwrite=True)


def test_a_server_that_goes_away_leaves_whole_shards(run, student, server, tmp_path, exact):
    source = served(server, student, concurrency=1)
    server.misbehave = lambda count, handler: count > 8 and failing(500)(count, handler)
    with pytest.raises(EngineError, match="status 500"):
        scored(run, student, source)
    server.misbehave = lambda count, handler: False
    before = len(server.asked)
    scored(run, student, served(server, student))
    asked = len(server.asked) - before
    assert 0 < asked < 18  # what was whole was not asked again
    again = create_run(tmp_path / "again")
    stage = again.begin("rollout", config={"student": {"name": "student"}})
    stage.write(0, run.rollouts().collect())
    stage.finish()
    scored(again, student, served(server, student))
    assert again.tokens().collect().equals(run.tokens().collect())
    with pytest.raises(ConfigurationMismatchError, match="teacher_k"):
        scored(run, student, served(server, student, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(prompt_logprobs=None), "gives no log-probabilities of a prompt"),
        (lambda c: c.update(prompt_logprobs=c["prompt_logprobs"][:-1]), "read another sequence"),
        (lambda c: c.update(prompt_token_ids=[9]), "read another sequence"),
        (lambda c: c["prompt_logprobs"].__setitem__(-1, None), "leaves out places"),
        (lambda c: c["prompt_logprobs"].__setitem__(-1, {"5": {}}), "the sampled token's log-prob"),
        (lambda c: c.update(prompt_logprobs=7), "does not have the form"),
    ],
)
def test_an_answer_that_does_not_fit_is_one_line(run, student, server, teacher, change, message):
    source = served(server, student)

    def answer(payload):
        found = teacher_answer(teacher, payload)
        change(found["choices"][0])
        return found

    server.answer = answer
    with pytest.raises(EngineError, match=message) as raised:
        scored(run, student, source)
    assert "\n" not in str(raised.value)


def test_a_teacher_of_another_vocabulary_is_refused(run, student, server, teacher):
    def answer(payload):
        found = teacher_answer(teacher, payload)
        for entry in found["choices"][0]["prompt_logprobs"][1:]:
            for one in entry.values():
                one["decoded_token"] = "other" if one["decoded_token"].isalnum() else ""
        return found

    source = served(server, student)
    server.answer = answer
    with pytest.raises(VocabularyMismatchError, match="student and 'other' for the teacher"):
        scored(run, student, source)


def test_a_server_need_not_tell_texts(run, student, server, teacher):
    def answer(payload):
        found = teacher_answer(teacher, payload)
        for entry in found["choices"][0]["prompt_logprobs"][1:]:
            for one in entry.values():
                del one["decoded_token"]
        return found

    server.answer = answer
    scored(run, student, served(server, student))
    assert run.tokens().collect().height


def test_the_door_takes_an_address_and_refuses_what_does_not_go_with_it(run, server):
    name = f"{server.url}#stand-in"
    for options in ({"phase": "teacher"}, {"engine": "ray"}):
        with pytest.raises(OptionError, match="a teacher behind a server goes with"):
            score(run, teacher=name, student="arithmetic-student", **options)
    with pytest.raises(ModelError, match="served:m is a model behind a server"):
        load_model("served:m")


def test_the_door_scores_with_an_address(tmp_path):
    student = load_model("arithmetic-student")
    prompts = [Prompt(id=row["id"], problem=row["problem"]) for row in problems(2, seed=1)]
    run = create_run(tmp_path / "run")
    sample_rollouts(run, student=student, prompts=prompts, sampling=Sampling(8), num_rollouts=1)
    teacher = load_model("arithmetic-teacher")
    with stand_in() as server:
        server.models = [{"id": "big/teacher", "max_model_len": 512}]
        server.answer = lambda payload: teacher_answer(teacher, payload)
        found = score(run, teacher=f"{server.url}/v1#big/teacher", store_k=4, top_k=2)
    assert found["num_scored_tokens"] == run.tokens().collect().height
    assert run.stages()["score"]["config"]["teacher"]["name"] == "served:big/teacher"


ROWS = st.lists(st.floats(-12, 12), min_size=12, max_size=12)


@settings(max_examples=150, deadline=None)
@given(student=ROWS, teacher=ROWS, data=st.data())
def test_coarse_graining_never_raises_a_divergence(student, teacher, data):
    """In float64 by the oracle, and for what the side hands to the scorer."""
    sizes = sorted(data.draw(st.lists(st.integers(1, 11), min_size=2, max_size=2)))
    p_row, q_row = np.array(student), np.array(teacher)
    order = np.argsort(-q_row, kind="stable")
    exact = divergences(*coarse(p_row, q_row, range(12)))
    less, more = (divergences(*coarse(p_row, q_row, order[:size])) for size in sizes)
    for name in LOWER_BOUNDS:
        assert less[name] <= more[name] + 1e-12
        assert more[name] <= exact[name] + 1e-12
    found = token_statistics(
        student=torch.tensor(p_row[None]), teacher=rebuilt(p_row, q_row, order[: sizes[0]])
    )
    for name in LOWER_BOUNDS:
        assert float(found[name]) == pytest.approx(less[name], rel=1e-4, abs=5e-6)


@settings(max_examples=100, deadline=None)
@given(student=ROWS, teacher=ROWS, size=st.integers(1, 11))
def test_the_floor_of_the_tail_raises_no_bound_by_more_than_itself(student, teacher, size):
    p_row, q_row = np.array(student), np.array(teacher)
    known = np.argsort(-q_row, kind="stable")[:size]
    exact = divergences(*coarse(p_row, q_row, range(12)))
    side = rebuilt(p_row, q_row, known, math.log(TAIL_FLOOR))
    found = token_statistics(student=torch.tensor(p_row[None]), teacher=side)
    for name in LOWER_BOUNDS:
        rounding = 1e-4 * exact[name] + (2e-3 if name == "hellinger" else 4e-5)
        assert float(found[name]) <= exact[name] + rounding, name


def rebuilt(p_row, q_row, known, floor=-math.inf):
    log_q = q_row - np.logaddexp.reduce(q_row)
    ids = torch.tensor(known.tolist())[None]
    rest = np.delete(log_q, known)
    side = TopKSide(
        {
            "teacher_topk_ids": ids,
            "teacher_topk_logprobs": torch.tensor(log_q[known])[None],
            "log_tail_mass": torch.tensor([max(floor, np.logaddexp.reduce(rest))]),
        }
    )
    return side.logits(slice(0, 1), torch.tensor(p_row[None]))
