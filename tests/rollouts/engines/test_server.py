"""The engine `server` against a stand-in on loopback that answers, fails, hangs, cuts off and
lies."""

import json
import time

import polars as pl
import pytest
from stand_in_server import completion, cut_off, dropping, failing, hanging, stand_in, written
from tiny_models import tiny_language_model

from tip_analysis.core.errors import (
    ConfigurationMismatchError,
    ContextLengthError,
    EngineError,
    OptionError,
)
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.rollouts.engines import completions
from tip_analysis.rollouts.engines.completions import CompletionsClient, in_parallel
from tip_analysis.rollouts.engines.engine import Request, request_seed
from tip_analysis.rollouts.engines.opening import opened
from tip_analysis.rollouts.engines.server import ServerEngine
from tip_analysis.rollouts.engines.settings import KEY_VARIABLE, EngineSettings, split_url
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts

SAMPLING = Sampling(max_new_tokens=6, temperature=0.7, top_p=0.9, top_k=5, seed=3)
PROMPTS = [Prompt(id=f"p{i}", problem=f"{10 + i}+22+33=", answer="65") for i in range(9)]


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


@pytest.fixture
def server():
    with stand_in() as state:
        yield state


def engine(model, server, **options):
    options = {"attempts": 3, "first_pause_s": 0.01, "timeout_s": 5.0, "concurrency": 4} | options
    client = CompletionsClient(server.url, **options)
    client.connect()
    return ServerEngine(model, client)


def requests(count=8):
    return [Request(f"r/{row}", [1, 4 + row, 6]) for row in range(count)]


def test_ids_go_out_and_come_back_as_they_are(model, server):
    found = engine(model, server).generate(requests(), SAMPLING)
    by_prompt = {tuple(payload["prompt"]): payload for payload in server.asked}
    for request, generation in zip(requests(), found, strict=True):
        payload = by_prompt[tuple(request.token_ids)]
        ids, logprobs = written(payload)
        assert generation.token_ids == ids
        assert generation.logprobs == logprobs
        assert payload["seed"] == request_seed(3, request.name)
        assert (generation.finish_reason == "stop") == (ids[-1] == 2)
    assert server.most_at_once <= 4


def test_what_the_server_defaults_to_is_overridden(model, server):
    engine(model, server).generate(requests(1), SAMPLING)
    (payload,) = server.asked
    assert payload["model"] == "stand-in"
    named = {"max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "n": 1, "min_p": 0.0}
    assert payload.items() >= named.items()
    assert payload["repetition_penalty"] == 1.0
    assert payload["presence_penalty"] == payload["frequency_penalty"] == 0.0
    assert payload["stop_token_ids"] == sorted(model.stop_token_ids)
    assert payload["return_token_ids"] is True
    engine(model, server).generate(requests(1), Sampling(max_new_tokens=6))
    assert server.asked[-1]["top_k"] == -1  # off


@pytest.mark.parametrize(
    "misbehave",
    [
        failing(500, "boom", times=2),
        failing(503, times=1, Retry_After="0"),
        failing(429, "slow down", times=2),
        cut_off(times=2),
        dropping(times=2),
    ],
)
def test_what_may_pass_is_asked_again(model, server, misbehave):
    server.misbehave = misbehave
    found = engine(model, server, concurrency=1).generate(requests(3), SAMPLING)
    assert [g.token_ids for g in found] == [
        written(p)[0] for p in {str(p["prompt"]): p for p in server.asked}.values()
    ]


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        (failing(500, "boom"), r"status 500: boom \(3 attempts\); what is whole is kept"),
        (cut_off(), r"an answer that is no whole JSON \(3 attempts\)"),
        (dropping(), r"no connection \(RemoteProtocolError\) \(3 attempts\)"),
        (failing(400, "prompt too\nlong"), "status 400: prompt too long"),
        (failing(401, "who are you"), "status 401: who are you"),
        (failing(404, "no such route"), "status 404: no such route"),
        (failing(302, "elsewhere", location="http://127.0.0.1:1/"), "status 302"),
    ],
)
def test_what_does_not_pass_is_one_line(model, server, misbehave, message):
    server.misbehave = misbehave
    with pytest.raises(EngineError, match=message) as raised:
        engine(model, server).generate(requests(2), SAMPLING)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{server.url}/v1/completions: ")


@pytest.mark.parametrize("trickle", [False, True])
def test_a_server_that_hangs_is_given_up(model, server, trickle):
    server.misbehave = hanging(30.0, trickle=trickle)
    with pytest.raises(EngineError, match=r"no answer within 0.3 s \(2 attempts\)"):
        engine(model, server, timeout_s=0.3, attempts=2).generate(requests(1), SAMPLING)


def lying(**changes):
    def answer(payload):
        found = completion(payload)
        found["choices"][0] |= changes
        return found

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lying(token_ids=None), "returns no token ids.*return_token_ids"),
        (lying(logprobs=None), "returns no log-probabilities"),
        (lying(token_ids=[4] * 7), "7 tokens where 1 to 6"),
        (lying(token_ids=[]), "0 tokens"),
        (lying(token_ids=[4, 4, 2], logprobs={"token_logprobs": [-1.0]}), "3 tokens, but 1 log"),
        (lying(prompt_token_ids=[9, 9]), "read another prompt than it was given for 'r/0'"),
        (lying(finish_reason="abort"), "for the reason 'abort'"),
        (lying(token_ids=["a", "b"]), "does not have the form of OpenAI's API"),
        (lying(token_ids=5), "does not have the form of OpenAI's API"),
        (lambda payload: {"choices": []}, "0 choices where 1"),
        (lambda payload: {"error": "no"}, "does not have the form"),
        (lambda payload: [1], "does not have the form"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_at_once(model, server, answer, message):
    server.answer = answer
    with pytest.raises(EngineError, match=message):
        engine(model, server).generate(requests(1), SAMPLING)
    assert len(server.asked) == 1


def test_the_model_is_found_or_named(model, server):
    server.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(EngineError, match="several models; it serves a, b: name one as URL#MODEL"):
        CompletionsClient(server.url).connect()
    with pytest.raises(EngineError, match="has no model 'c'; it serves a, b"):
        CompletionsClient(server.url, "c").connect()
    client = CompletionsClient(server.url, "b")
    client.connect()
    assert client.model == "b"


def test_nobody_there_is_one_line():
    client = CompletionsClient("http://127.0.0.1:9", attempts=2, first_pause_s=0.01)
    with pytest.raises(EngineError, match=r"127.0.0.1:9/v1/models: no connection \(ConnectError\)"):
        client.connect()


def test_a_sequence_longer_than_the_server_takes_is_refused_before_it_is_asked(model, server):
    one = engine(model, server)
    one.expect(128)
    with pytest.raises(ContextLengthError, match=r"up to 129 tokens.*serves up to 128"):
        one.expect(129)


def test_a_server_cannot_be_trained(model, server):
    with pytest.raises(OptionError, match="--engine hf or vllm"):
        engine(model, server).update(model)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    model, server, monkeypatch, tmp_path
):
    monkeypatch.setenv(KEY_VARIABLE, "sesame-1234")
    one = engine(model, server)
    run = create_run(tmp_path / "run")
    sample_rollouts(
        run, student=model, prompts=PROMPTS[:2], sampling=SAMPLING, engine=one, num_rollouts=1
    )
    sent = {name.lower(): value for name, value in server.headers[-1].items()}
    assert sent["authorization"] == "Bearer sesame-1234"
    assert "sesame" not in run.record_path.read_text()
    assert "sesame" not in repr(one.client)
    server.misbehave = failing(500)
    with pytest.raises(EngineError) as raised:
        one.generate(requests(1), SAMPLING)
    assert "sesame" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "expected http://HOST:PORT"),
        ("file:///etc/passwd", "expected http://HOST:PORT"),
        ("localhost:8000", "expected http://HOST:PORT"),
        ("http://", "expected http://HOST:PORT"),
        ("http://host:port", "found an address that is none"),
        ("http://me:secret@host:1", "an address without user, password and query"),
        ("http://host:1?key=secret", "an address without user, password and query"),
    ],
)
def test_what_is_no_address_is_refused(url, message):
    with pytest.raises(OptionError, match=message) as raised:
        EngineSettings("server", url)
    assert "secret" not in str(raised.value)


def test_an_address_may_name_the_api_and_the_model():
    assert split_url("http://h:1/v1/", "o") == ("http://h:1", None)
    assert split_url("https://h/sub#org/m", "o") == ("https://h/sub", "org/m")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "server"}, "--engine server needs --server-url"),
        ({"server_url": "http://h:1"}, "--server-url goes with --engine server"),
        ({"options": {"a": 1}}, "--engine-options goes with --engine vllm"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(OptionError, match=message):
        EngineSettings(**settings)


def stage(path, model, server, **options):
    return sample_rollouts(
        create_run(path),
        student=model,
        prompts=PROMPTS,
        sampling=SAMPLING,
        engine=engine(model, server, attempts=2, **options),
        num_rollouts=2,
    )


def test_a_run_that_the_server_left_goes_on_and_ends_equal(model, server, tmp_path, monkeypatch):
    monkeypatch.setattr(ServerEngine, "rollouts_per_shard", 4)
    summary = stage(tmp_path / "whole", model, server)
    assert summary["num_rollouts"] == 18
    asked = len(server.asked)
    count_of = {"asked": 0}

    def dies(count, handler):
        count_of["asked"] += 1
        return count_of["asked"] > 9 and failing(500)(count, handler)

    server.misbehave = dies
    with pytest.raises(EngineError, match="status 500"):
        stage(tmp_path / "broken", model, server, concurrency=1)
    whole_shards = open_run(tmp_path / "broken").rollouts().collect()
    assert whole_shards.height == 8  # two shards of four; the third was under way
    server.misbehave = lambda count, handler: False
    before = len(server.asked)
    stage(tmp_path / "broken", model, server)
    assert len(server.asked) - before == asked - 8  # what was whole was not asked again
    equal = [open_run(tmp_path / name).rollouts().collect() for name in ("whole", "broken")]
    assert equal[0].equals(equal[1])


def test_rows_say_what_wrote_them(model, server, tmp_path):
    stage(tmp_path / "run", model, server)
    run = open_run(tmp_path / "run")
    rows = run.rollouts().collect()
    assert rows["engine"].unique().to_list() == ["server"]
    assert rows["sampled_logprobs"].list.len().equals(rows["response_token_ids"].list.len())
    record = json.loads(run.record_path.read_text())["stages"]["rollout"]
    assert record["config"]["engine"] == "server"
    assert record["config"]["served_model"] == "stand-in"
    assert record["settings"]["server"] == server.url
    assert "seed of its own" in record["settings"]["reproducible"]
    assert rows.select(pl.col("temperature").unique()).item() == pytest.approx(0.7)
    with pytest.raises(ConfigurationMismatchError, match="engine"):
        sample_rollouts(run, student=model, prompts=PROMPTS, sampling=SAMPLING, num_rollouts=2)


def test_an_engine_that_is_opened_is_closed(model, server):
    with opened("server", model, server_url=server.url) as one:
        assert one.author is model
    with pytest.raises(EngineError):
        one.generate(requests(1), SAMPLING)


def test_work_in_parallel_ends_with_the_first_error():
    begun = []

    def work(item):
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    client = CompletionsClient("http://127.0.0.1:9", concurrency=2)
    assert sorted(in_parallel(range(3), work, client)) == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(ValueError, match="three"):
        list(in_parallel(range(100), work, client))
    assert max(begun) < 10


def test_what_waits_for_another_try_is_given_up_with_the_first_error(model, server):
    """One request is refused for good while others wait a minute to ask again."""

    def misbehave(count, handler):
        refusal = failing(400, "no") if count == 4 else failing(503, Retry_After="20")
        return refusal(count, handler)

    server.misbehave = misbehave
    began = time.monotonic()
    with pytest.raises(EngineError, match="status 400: no"):
        engine(model, server).generate(requests(4), SAMPLING)
    assert time.monotonic() - began < 10


def test_an_answer_without_end_is_not_read(model, server, monkeypatch):
    monkeypatch.setattr(completions, "MAX_ANSWER_BYTES", 50)
    with pytest.raises(EngineError, match="an answer of more than 50 bytes"):
        engine(model, server).generate(requests(1), SAMPLING)
