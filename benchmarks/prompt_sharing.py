"""What it saves to run a prompt once for all its rollouts, by the ratio of prompt to response
length.

    python benchmarks/prompt_sharing.py --out benchmarks/results/prompt_sharing.json

SmolLM2 in bfloat16 and a slightly changed copy (`make smollm2` brings the weights), 2 prompts with
8 rollouts each. `bodies` are both bodies' hidden states at response positions, `scoring` is
`Scorer.token_table` whole; each with the prompts shared and apart, in interleaved rounds after a
warm-up.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import interleaved, medians, show, write_results
from pairs import make_rollouts, smollm2_pair

from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.hidden_states import response_hidden_states
from tip_analysis.scoring.scorer import Scorer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=[64, 128, 256], help="tokens of a prompt"
    )
    parser.add_argument("--response-tokens", type=int, default=128, help="tokens of a response")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of each prompt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the statistics",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="elapsed or CPU time of all threads",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    student, teacher = smollm2_pair(options.dtype, options.device)
    work: dict[str, Callable[[], object]] = {}
    for length in options.prompt_tokens:
        rollouts = make_rollouts(
            student,
            num_prompts=options.prompts,
            rollouts_per_prompt=options.rollouts,
            prompt_tokens=length,
            response_tokens=options.response_tokens,
        )
        prompts, responses = (
            rollouts[name].to_list() for name in ("prompt_token_ids", "response_token_ids")
        )
        for shared in (True, False):
            scorer = Scorer(
                student, teacher, TokenBudget(2**30), share_prompts=shared, compile=options.compile
            )
            name = f"{'shared' if shared else 'apart'}, prompts of {length}"
            work[f"bodies, {name}"] = lambda prompts=prompts, responses=responses, shared=shared: [
                response_hidden_states(model.model, prompts, responses, share_prompts=shared)
                for model in (student, teacher)
            ]
            work[f"scoring, {name}"] = lambda scorer=scorer, rollouts=rollouts: scorer.token_table(
                rollouts
            )
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with torch.inference_mode():
        seconds = interleaved(work, options.rounds, clock)
    found = medians(seconds)
    ratios = {
        f"{what}: times faster with shared prompts of {length} tokens": (
            found[f"{what}, apart, prompts of {length}"]
            / found[f"{what}, shared, prompts of {length}"]
        )
        for length in options.prompt_tokens
        for what in ("bodies", "scoring")
    }
    show(seconds, ratios)
    write_results(options.out, options, seconds=seconds, ratios=ratios)


if __name__ == "__main__":
    main()
