"""What a teacher behind a server costs in accuracy: `python benchmarks/approximate_teacher.py
--prompts gsm8k_train_1k.jsonl --out FILE.json`.

SmolLM2-135M-Instruct answers the first prompts of GSM8K and is scored twice with one teacher:
SmolLM2 with 5 % of noise on every weight. Once exactly, once as `score --teacher URL#MODEL` does
it, from the k most likely tokens of the teacher and the sampled one. Both read the very same logits
(in place of the server stands a client that answers from the loaded teacher), so that the
difference is the approximation's alone.

For each k and column: median and 99th percentile of |approximate − exact|, in nats but for
Hellinger, and of the same as a part of the exact value.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from measuring import write_results

from tip_analysis.core.run_folder import Run, create_run
from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.models.output_head import OutputHead
from tip_analysis.rollouts.prompts import read_prompts
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.served_teacher import ServedTeacher
from tip_analysis.scoring.stage import Scorer, score_rollouts
from tip_analysis.scoring.top_k_side import LOWER_BOUNDS

MODEL = "smollm2-135m-instruct"


class LoadedClient:
    """Answers as a server does, from a teacher that is loaded."""

    address, model, max_model_len, concurrency = "loaded", "teacher", None, 1

    def __init__(self, teacher: LanguageModel) -> None:
        self.teacher = teacher

    def begin(self) -> None:
        pass

    give_up = begin

    @torch.inference_mode()
    def complete(self, payload: Any, read: Any) -> Any:
        ids, k = payload["prompt"], payload["prompt_logprobs"]
        logprobs = self.teacher.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        top = logprobs.topk(k)
        told: list[Any] = [None]
        for place in range(1, len(ids)):
            row = dict(
                zip(top.indices[place - 1].tolist(), top.values[place - 1].tolist(), strict=True)
            )
            row[ids[place]] = float(logprobs[place - 1, ids[place]])
            told.append({str(token): {"logprob": value} for token, value in row.items()})
        return read({"prompt_logprobs": told, "prompt_token_ids": ids})


def noisy(model: LanguageModel, part: float) -> LanguageModel:
    """The model with noise on every weight, a part of its size."""
    network = copy.deepcopy(model.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + part * noise.to(parameter.dtype))
    return LanguageModel("noisy", network, model.tokenizer, OutputHead(network))


def errors(exact: pl.DataFrame, found: pl.DataFrame) -> dict[str, Any]:
    """Of every column: how far it is off, absolutely and as a part of the exact value."""
    columns = {}
    for name in (*LOWER_BOUNDS, "teacher_logprob", "teacher_top1_prob"):
        truth, value = (frame[name].to_numpy().astype(np.float64) for frame in (exact, found))
        off = np.abs(value - truth)
        share = off / np.maximum(np.abs(truth), 1e-6)
        columns[name] = {
            "median": float(np.median(off)),
            "p99": float(np.quantile(off, 0.99)),
            "median_part": float(np.median(share)),
            "p99_part": float(np.quantile(share, 0.99)),
            "above": float((value > truth * (1 + 1e-4) + 1e-5).mean()),
            "exact_mean": float(truth.mean()),
        }
    return columns


def measure(options: argparse.Namespace, run: Run, student: LanguageModel) -> dict[str, Any]:
    teacher = noisy(student, options.noise)
    score_rollouts(run, Scorer(student, teacher))
    exact = run.tokens().collect()
    found = {}
    for k in options.ks:
        source = ServedTeacher(LoadedClient(teacher), student, k)  # pyright: ignore
        scorer = Scorer(student, source.model, top_k=min(5, k))
        score_rollouts(run, scorer, stored=source, overwrite=True)
        found[str(k)] = errors(exact, run.tokens().collect())
        print(k, {name: round(one["median_part"], 4) for name, one in found[str(k)].items()})
    return {"num_tokens": exact.height, "k": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", default=MODEL, help="by default the GGUF file's weights")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 5, 20, 64])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    student = load_model(options.model, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = create_run(Path(folder) / "run")
        sample_rollouts(
            run,
            student=student,
            prompts=read_prompts(options.prompts, limit=options.limit),
            sampling=Sampling(max_new_tokens=options.max_new_tokens),
            num_rollouts=1,
            template="boxed",
            grader="none",
        )
        found = measure(options, run, student)
    options.prompts, options.model = options.prompts.name, Path(options.model).name
    write_results(options.out, options, **found)


if __name__ == "__main__":
    main()
