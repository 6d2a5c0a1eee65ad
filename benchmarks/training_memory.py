"""Peak memory of one training step against the retention ratio: `python
benchmarks/training_memory.py --out FILE.json`.

Each arm is a process of its own. It builds a random student and teacher (2 layers, D = 256, V =
151,936 by default), takes a first step on a few tokens so that gradients and optimizer moments are
there, and then one step on a rollout of T tokens. What is reported is the peak above that baseline
of weights, gradients and moments: device memory on a GPU, resident set on a CPU.

The full-logits step is the plain one: logits of both models at all T positions, log-softmaxes,
reverse KL, backward. The other arms are steps of ``training.trainer``: score every token, select by
Soft-OR, train on what is selected; nothing is sampled.

The paper's peaks (Table 3, Qwen3-8B to Qwen3-4B, with weights) are printed beside: another size and
another machine, to be compared in their order only.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import fresh_process, write_results
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel, resolve_device
from tip_analysis.models.output_head import OutputHead
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.training.data import OnPolicyRollouts
from tip_analysis.training.options import TrainingOptions
from tip_analysis.training.peak_memory import memory_bytes, peak_memory_bytes, reset_peak_memory
from tip_analysis.training.students import prepare_student
from tip_analysis.training.trainer import Trainer

PAPER_GB = {1.0: 72.0, 0.5: 38.1, 0.2: 35.5, 0.1: 35.3}
"""Table 3: peak memory by retention ratio, Qwen3-8B (GRPO) to Qwen3-4B; entropy sampling below
1."""
FULL = "full_logits"


@dataclass(frozen=True)
class Setting:
    """One arm: what is built and what is done."""

    arm: str
    num_tokens: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    chunk_size: int
    device: str
    precision: str
    gradient_checkpointing: bool


def build(setting: Setting, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    heads = max(1, setting.hidden_size // 64)
    config = Qwen3Config(
        vocab_size=setting.vocab_size,
        hidden_size=setting.hidden_size,
        intermediate_size=3 * setting.hidden_size,
        num_hidden_layers=setting.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=setting.hidden_size // heads,
        max_position_embeddings=setting.num_tokens + 64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(setting.device)
    return LanguageModel(
        f"random-{seed}", model.eval().requires_grad_(False), build_tokenizer(), OutputHead(model)
    )


def rollout(setting: Setting, num_tokens: int, name: str) -> Rollout:
    tokens = np.random.default_rng(0).integers(0, setting.vocab_size, size=num_tokens + 8).tolist()
    return Rollout(name, name, tokens[:8], tokens[8:])


def make_trainer(setting: Setting, student: LanguageModel, teacher: LanguageModel) -> Trainer:
    ratio = 1.0 if setting.arm == FULL else float(setting.arm)
    options = TrainingOptions(
        rule="all" if ratio == 1.0 else "soft_or",
        retention_ratio=ratio,
        learning_rate=1e-6,
        chunk_size=setting.chunk_size,
        precision=setting.precision,
        gradient_checkpointing=setting.gradient_checkpointing,
    )
    prepared = prepare_student(student, options, copy_weights=False)
    source = OnPolicyRollouts(
        [], Sampling(), 1, 1, TokenBudget(1)
    )  # rollouts are handed to `update_on`, none is sampled
    return Trainer(student=prepared, teacher=teacher, source=source, options=options)


def full_logits_step(trainer: Trainer, given: Rollout) -> None:
    tokens = torch.tensor([[*given.prompt, *given.response[:-1]]], device=trainer.student.device)
    predicting = slice(len(given.prompt) - 1, None)

    def log_probs(model: LanguageModel) -> Tensor:
        return (
            model.model(input_ids=tokens, use_cache=False)
            .logits[0, predicting]
            .float()
            .log_softmax(-1)
        )

    with trainer.precision():
        ours = log_probs(trainer.student)
        with torch.no_grad():
            theirs = log_probs(trainer.teacher)
        loss = (ours.exp() * (ours - theirs)).sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), 1.0)
    trainer.optimizer.step()


def measure(setting: Setting) -> dict[str, float]:
    """Peak and baseline of one step, bytes; runs in a process of its own."""
    torch.set_num_threads(1)
    device = resolve_device(setting.device)
    trainer = make_trainer(setting, build(setting, 0), build(setting, 1))
    trainer.update_on([rollout(setting, 32, "first")])
    given = rollout(setting, setting.num_tokens, "measured")
    baseline = memory_bytes(device)
    reset_peak_memory(device)
    if setting.arm == FULL:
        trainer.optimizer.zero_grad(set_to_none=True)
        full_logits_step(trainer, given)
    else:
        trainer.update_on([given])
    return {"baseline_bytes": baseline, "peak_bytes": peak_memory_bytes(device)}


def run_arm(setting: Setting) -> dict[str, float]:
    """Measure one arm in a fresh process."""
    try:
        return fresh_process(__file__, "--worker", json.dumps(asdict(setting)))
    except SystemExit as failure:
        return {"error": str(failure)}  # pyright: ignore[reportReturnType]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 4096], help="T, response tokens"
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1], help="retention ratios"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--chunk-size", type=int, default=64, help="rows of logits at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(Setting(**json.loads(arguments.worker)))))
        return
    rows = []
    for num_tokens in arguments.lengths:
        full = None
        for arm in (FULL, *(str(ratio) for ratio in arguments.ratios)):
            setting = Setting(
                arm,
                num_tokens,
                arguments.layers,
                arguments.hidden_size,
                arguments.vocab_size,
                arguments.chunk_size,
                arguments.device,
                arguments.precision,
                arguments.gradient_checkpointing,
            )
            row = asdict(setting) | run_arm(setting)
            if "peak_bytes" in row:
                row["above_bytes"] = row["peak_bytes"] - row["baseline_bytes"]
                full = row["above_bytes"] if arm == FULL else full
                row["share_of_full"] = row["above_bytes"] / full if full else None
            row["paper_gb"] = None if arm == FULL else PAPER_GB.get(float(arm))
            rows.append(row)
            print(describe(row), flush=True)
    write_results(arguments.out, arguments, rows=rows)


def describe(row: dict) -> str:
    name = "full logits" if row["arm"] == FULL else f"ρ = {row['arm']}"
    if "error" in row:
        return f"T = {row['num_tokens']:5}  {name:12}  {row['error']}"
    share = (
        ""
        if row["share_of_full"] is None
        else f"  {100 * row['share_of_full']:5.1f} % of full logits"
    )
    paper = "" if row["paper_gb"] is None else f"  (paper: {row['paper_gb']} GB in all)"
    return (
        f"T = {row['num_tokens']:5}  {name:12}  {row['above_bytes'] / 1e9:6.2f} GB above"
        f" baseline{share}{paper}"
    )


if __name__ == "__main__":
    main()
