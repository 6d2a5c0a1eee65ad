"""What scoring costs on top of the two bare bodies, against the ways in which it is done elsewhere.

    python benchmarks/scorer.py --out benchmarks/results/scorer.json
    python benchmarks/scorer.py --response-tokens 128 --rounds 1 --blocks 32          (a quick look)
    python benchmarks/scorer.py --student qwen3-1.7b --teacher qwen3-8b --device cuda --skip naive
    trl

SmolLM2 in bfloat16 and a slightly changed copy as its teacher, 2,048 response tokens (`make
smollm2` brings the weights), or random weights of a shape of `pairs.SHAPES`. Every contender gets
the same rollouts in the same process, in interleaved rounds after a warm-up; all contain the two
bodies.

- `bodies`: both bodies' last hidden states at response positions;
- `heads`: and all logits, a block of rows at a time, thrown away;
- `ours`: `Scorer.token_table`, heads and all columns and the table itself; `ours_uncompiled`:
  without Numba;
- `per_metric_N`: one function per metric, each from logits in blocks of N rows, as libraries do
  (fewer columns than ours);
- `naive`: both models' whole [B, T, V] logits, then one function per metric over all of them at
  once;
- `trl`: the way of TRL's GKD and GOLD trainers, in plain torch: whole logits, the generalized
  Jensen-Shannon divergence from log-softmaxes and a mixture; *one* divergence is all that it
  computes.

On a CUDA device, `matmul_share` is the rate of the bodies' and heads' multiplications in `ours`
over that of one large matmul.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch
from logit_statistics import per_metric
from measuring import interleaved, medians, show, write_results
from pairs import SHAPES, make_rollouts, random_model, smollm2_pair
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from tip_analysis.logits.row_statistics import rows_per_block
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.hidden_states import response_hidden_states
from tip_analysis.models.loading import LanguageModel
from tip_analysis.scoring.scorer import Scorer


class Pair:
    """Student, teacher and rollouts, and every contender over them."""

    def __init__(
        self, student: LanguageModel, teacher: LanguageModel, rollouts: pl.DataFrame, budget: int
    ) -> None:
        self.student, self.teacher, self.rollouts, self.budget = student, teacher, rollouts, budget
        self.prompts = rollouts["prompt_token_ids"].to_list()
        self.responses = rollouts["response_token_ids"].to_list()
        self.token_ids = torch.tensor(
            rollouts["response_token_ids"].explode().to_list(), device=student.device
        )
        self.vocab_size = min(student.vocab_size, teacher.vocab_size)

    def bodies(self) -> list[Tensor]:
        """Hidden states [N, D] of both models, batched as the scorer batches them."""
        size = len(self.prompts[0]) + len(self.responses[0])
        step = max(1, self.budget // size)
        states = []
        for model in (self.student, self.teacher):
            pieces = []
            for start in range(0, len(self.prompts), step):
                part = slice(start, start + step)
                pieces += response_hidden_states(
                    model.model, self.prompts[part], self.responses[part]
                )
            states.append(torch.cat(pieces))
        return states

    def blocks(self, states: list[Tensor], rows: int):
        """Both models' logits and the tokens, `rows` rows at a time."""
        for start in range(0, len(self.token_ids), rows):
            part = slice(start, start + rows)
            logits = [
                model.head(hidden[part])[:, : self.vocab_size]
                for model, hidden in zip((self.student, self.teacher), states, strict=True)
            ]
            yield *logits, self.token_ids[part]

    def heads(self) -> None:
        for _ in self.blocks(
            self.bodies(), rows_per_block(self.vocab_size, device=self.student.device)
        ):
            pass

    def ours(self, compiled: bool) -> Callable[[], object]:
        scorer = Scorer(
            self.student,
            self.teacher,
            TokenBudget(self.budget),
            share_prompts=False,
            compile=compiled,
        )
        return lambda: scorer.token_table(self.rollouts)

    def one_function_per_metric(self, rows: int) -> None:
        for student, teacher, token_ids in self.blocks(self.bodies(), rows):
            per_metric(student, teacher, token_ids, rows)

    def whole_logits(self) -> list[Tensor]:
        """Logits [N, V] of both models out of [B, T, V]."""
        ids = torch.tensor(
            [
                prompt + response
                for prompt, response in zip(self.prompts, self.responses, strict=True)
            ],
            device=self.student.device,
        )
        first = len(self.prompts[0]) - 1
        found = []
        for model in (self.student, self.teacher):
            logits = model.model(input_ids=ids, use_cache=False).logits[
                :, first:-1, : self.vocab_size
            ]
            found.append(logits.flatten(0, 1))
        return found

    def naive(self) -> None:
        student, teacher = self.whole_logits()
        per_metric(student, teacher, self.token_ids, len(self.token_ids))

    def trl(self, beta: float = 0.5) -> Tensor:
        """JSD_β = β KL(P_T ‖ M) + (1 − β) KL(P_S ‖ M), M = (1 − β) P_S + β P_T, over all tokens at
        once."""
        student, teacher = (log_softmax(logits.float(), -1) for logits in self.whole_logits())
        mixture = torch.logsumexp(
            torch.stack([student + math.log(1 - beta), teacher + math.log(beta)]), dim=0
        )
        of_teacher = kl_div(mixture, teacher, reduction="none", log_target=True)
        of_student = kl_div(mixture, student, reduction="none", log_target=True)
        return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


def contenders(pair: Pair, blocks: list[int], skip: list[str]) -> dict[str, Callable[[], object]]:
    work: dict[str, Callable[[], object]] = {
        "bodies": pair.bodies,
        "heads": pair.heads,
        "ours": pair.ours(True),
    }
    work["ours_uncompiled"] = pair.ours(False)
    work |= {
        f"per_metric_{rows}": lambda rows=rows: pair.one_function_per_metric(rows)
        for rows in blocks
    }
    work |= {"naive": pair.naive, "trl": pair.trl}
    return {name: run for name, run in work.items() if name not in skip}


def summary(seconds: dict[str, list[float]], num_tokens: int) -> dict[str, float]:
    """The ratios that matter, of medians."""
    found = medians(seconds)
    ratios = {
        f"{name}: extra over the bodies": found[name] / found["bodies"] - 1
        for name in found
        if name != "bodies"
    }
    metrics = [name for name in found if name.startswith("per_metric")]
    for ours in {"ours", "ours_uncompiled"} & found.keys():
        ratios[f"{ours}: response tokens a second"] = num_tokens / found[ours]
        if metrics and "heads" in found:
            best = min(metrics, key=found.__getitem__)
            times = (found[best] - found["heads"]) / (found[ours] - found["heads"])
            ratios[f"statistics: best one function per metric ({best}) over {ours}"] = times
    return ratios


def matmul_share(pair: Pair, seconds: float) -> float:
    """Multiplications of bodies and heads per second, over the rate of one large matmul of the same
    dtype."""
    positions = len(pair.prompts) * (len(pair.prompts[0]) + len(pair.responses[0]) - 1)
    operations = 0
    for model in (pair.student, pair.teacher):
        head = model.head.linear.weight.numel()
        embedding = model.model.get_input_embeddings().weight.numel()
        total = sum(parameter.numel() for parameter in model.model.parameters())
        tied = model.head.linear.weight is model.model.get_input_embeddings().weight
        body = total - embedding - (0 if tied else head)
        operations += 2 * body * positions + 2 * head * len(pair.token_ids)
    a, b = (
        torch.randn(8192, 8192, device=pair.student.device, dtype=pair.student.dtype)
        for _ in range(2)
    )
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    rate = 20 * 2 * 8192**3 / (time.perf_counter() - start)
    return operations / seconds / rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--student",
        default="smollm2",
        choices=["smollm2", *SHAPES],
        help="smollm2 or a random shape",
    )
    parser.add_argument(
        "--teacher", default="qwen3-8b", choices=SHAPES, help="with a random student"
    )
    parser.add_argument("--response-tokens", type=int, default=512, help="tokens of each response")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--rollouts", type=int, default=4, help="number of rollouts")
    parser.add_argument("--token-budget", type=int, default=16384, help="tokens a batch")
    parser.add_argument(
        "--blocks",
        type=int,
        nargs="*",
        default=[8, 32, 128, 512],
        help="rows a block of per_metric",
    )
    parser.add_argument("--skip", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="elapsed or CPU time of all threads",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.student == "smollm2":
        models = smollm2_pair(options.dtype, options.device)
    else:
        models = tuple(
            random_model(shape, dtype=options.dtype, device=options.device, seed=seed)
            for seed, shape in enumerate((options.student, options.teacher))
        )
    rollouts = make_rollouts(
        models[0],
        num_prompts=options.rollouts,
        rollouts_per_prompt=1,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
    )
    pair = Pair(*models, rollouts, options.token_budget)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with torch.inference_mode():
        seconds = interleaved(contenders(pair, options.blocks, options.skip), options.rounds, clock)
        ratios = summary(seconds, len(pair.token_ids))
        if options.device.startswith("cuda"):
            ratios["matmul_share"] = matmul_share(pair, medians(seconds)["ours"])
    show(seconds, ratios)
    write_results(options.out, options, seconds=seconds, ratios=ratios)


if __name__ == "__main__":
    main()
