"""Peak memory of scoring above that of the two bare bodies, by vocabulary, response length and
number of rollouts.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Random student and teacher of a small shape, so that logits are what could cost; each measurement in
a process of its own, both bodies under the same token budget. The full [B, T, V] float32 logits of
one model are printed beside. Resident set on a CPU, allocated memory on a GPU.
"""

import argparse
import json
from pathlib import Path

import torch
from measuring import fresh_process, write_results
from pairs import SHAPES, make_rollouts, random_model

from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import resolve_device
from tip_analysis.scoring.scorer import Scorer, counted_states, in_batches
from tip_analysis.training.peak_memory import memory_bytes, peak_memory_bytes, reset_peak_memory


def measure(
    arm: str, vocab_size: int, response_tokens: int, num_rollouts: int, options: argparse.Namespace
) -> dict[str, int]:
    """Bytes before and at the peak of one pass."""
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    student, teacher = (
        random_model(
            options.shape,
            vocab_size=vocab_size,
            dtype=options.dtype,
            device=options.device,
            seed=seed,
        )
        for seed in range(2)
    )
    rollouts = make_rollouts(
        student,
        num_prompts=num_rollouts,
        rollouts_per_prompt=1,
        prompt_tokens=16,
        response_tokens=response_tokens,
    )
    budget = TokenBudget(options.token_budget)
    before = memory_bytes(device)
    reset_peak_memory(device)
    with torch.inference_mode():
        if arm == "bare":
            for model in (student, teacher):
                in_batches(
                    rollouts, budget, lambda rows, model=model: {"x": counted_states(model, rows)}
                )
        else:
            Scorer(student, teacher, budget, compile=arm == "compiled").token_table(rollouts)
    return {"before": before, "peak": peak_memory_bytes(device)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32_768, 151_936], help="V")
    parser.add_argument("--response-tokens", type=int, nargs="+", default=[256, 1024], help="T")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[2, 8], help="B")
    parser.add_argument(
        "--arms", nargs="+", default=["uncompiled", "compiled"], choices=["uncompiled", "compiled"]
    )
    parser.add_argument("--token-budget", type=int, default=16384, help="tokens a batch")
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*json.loads(options.worker), options)))
        return
    passed = [
        f"--{name}={getattr(options, name.replace('-', '_'))}"
        for name in ("token-budget", "shape", "dtype", "device", "threads")
    ]
    rows = []
    for vocab_size in options.vocab_sizes:
        for length in options.response_tokens:
            for count in options.rollouts:
                peaks = {
                    arm: fresh_process(
                        __file__, "--worker", json.dumps([arm, vocab_size, length, count]), *passed
                    )["peak"]
                    for arm in ("bare", *options.arms)
                }
                row = {
                    "vocab_size": vocab_size,
                    "response_tokens": length,
                    "rollouts": count,
                    "peak_bytes": peaks,
                }
                row["extra_mb"] = {arm: (peaks[arm] - peaks["bare"]) / 1e6 for arm in options.arms}
                row["full_logits_mb"] = 4 * vocab_size * length * count / 1e6
                rows.append(row)
                extra = "  ".join(
                    f"{arm} {value:+7.0f} MB" for arm, value in row["extra_mb"].items()
                )
                print(
                    f"V = {vocab_size:7,}  T = {length:5,}  B = {count:3}  {extra}   "
                    f"(full logits of one model: {row['full_logits_mb']:,.0f} MB)",
                    flush=True,
                )
    write_results(options.out, options, rows=rows)


if __name__ == "__main__":
    main()
