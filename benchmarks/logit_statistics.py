"""How long the statistics of two arrays of logits take, against reading them and against one
function per metric.

    python benchmarks/logit_statistics.py [--rows 2048] [--vocab-size 49152] [--dtype bfloat16]
    [--rounds 7] [--out FILE.json]

Every contender works on the same logits in the same process, in interleaved rounds after a warm-up;
the medians over the rounds and their ratios are printed. On a machine that does other work too,
`--clock cpu --threads 1` is steadier. Ways of reading both arrays once are timed beside:
`read_in_blocks` makes float32 of 32 rows at a time and adds them up, which stays in the cache;
`convert_to_float32` makes float32 arrays of both; `read_as_float32` adds each up by one call for
float32; `read_float32` adds up float32 arrays that are there already, the floor for anything that
looks at every logit. `normalizers` is one log-sum-exp of each row: a single exponential a logit.
`statistics` is the compiled pass, `statistics_on_tensors` the pass as tensor operations,
which runs without Numba. `per_metric_N` computes the divergences and entropies as libraries
commonly do, each function with its own softmaxes, in blocks of N rows; it has fewer columns than
`token_statistics`, and its float32 numbers are wrong on peaked and near-equal rows.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import interleaved, show, write_results
from measuring import medians as medians_of
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from tip_analysis.logits.row_statistics import token_statistics

BLOCKS = (8, 16, 32, 64, 128, 512)


def entropy(logits: Tensor) -> Tensor:
    log_p = log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    log_p, log_q = log_softmax(first.float(), -1), log_softmax(second.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = softmax(student.float(), -1), softmax(teacher.float(), -1)
    log_m = (0.5 * (p + q)).log()
    return 0.5 * ((p * (p.log() - log_m)).sum(-1) + (q * (q.log() - log_m)).sum(-1))


def hellinger(student: Tensor, teacher: Tensor) -> Tensor:
    return (
        0.5
        * (softmax(student.float(), -1).sqrt() - softmax(teacher.float(), -1).sqrt())
        .square()
        .sum(-1)
    ).sqrt()


def sampled_logprob(logits: Tensor, token_ids: Tensor) -> Tensor:
    return log_softmax(logits.float(), -1).gather(1, token_ids[:, None]).squeeze(1)


def top_k(logits: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    values, ids = log_softmax(logits.float(), -1).topk(k, -1)
    return values, ids


def teacher_mass(student: Tensor, teacher: Tensor, k: int = 16) -> Tensor:
    return softmax(teacher.float(), -1).gather(1, student.topk(k, -1).indices).sum(-1)


def reverse_gradient_norm(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = log_softmax(student.float(), -1), log_softmax(teacher.float(), -1)
    d = log_p - log_q
    return (log_p.exp() * (d - (log_p.exp() * d).sum(-1, keepdim=True))).norm(dim=-1)


def forward_gradient_norm(student: Tensor, teacher: Tensor) -> Tensor:
    return (softmax(student.float(), -1) - softmax(teacher.float(), -1)).norm(dim=-1)


def curvature(student: Tensor, teacher: Tensor) -> Tensor:
    p = softmax(student.float(), -1)
    g = p - softmax(teacher.float(), -1)
    return (p * g.square()).sum(-1) - (p * g).sum(-1).square()


def per_metric(student: Tensor, teacher: Tensor, token_ids: Tensor, block: int) -> None:
    """One function per metric, each from logits."""
    for start in range(0, len(student), block):
        s, t, ids = (array[start : start + block] for array in (student, teacher, token_ids))
        entropy(s), entropy(t), kl(s, t), kl(t, s), jsd(s, t), hellinger(s, t)
        sampled_logprob(s, ids), sampled_logprob(t, ids), top_k(s), top_k(t), teacher_mass(s, t)
        reverse_gradient_norm(s, t), forward_gradient_norm(s, t), curvature(s, t)


def contenders(
    student: Tensor, teacher: Tensor, token_ids: Tensor
) -> dict[str, Callable[[], object]]:
    wide = student.float(), teacher.float()

    def statistics(compiled: bool) -> Callable[[], object]:
        return lambda: token_statistics(
            student=student, teacher=teacher, token_ids=token_ids, compile=compiled
        )

    work: dict[str, Callable[[], object]] = {
        "read_in_blocks": lambda: [
            rows.float().sum(-1) for array in (student, teacher) for rows in array.split(32)
        ],
        "read_float32": lambda: [array.sum(-1) for array in wide],
        "read_as_float32": lambda: [
            array.sum(-1, dtype=torch.float32) for array in (student, teacher)
        ],
        "convert_to_float32": lambda: [array.float() for array in (student, teacher)],
        "normalizers": lambda: [
            rows.float().logsumexp(-1) for array in (student, teacher) for rows in array.split(32)
        ],
        "statistics": statistics(True),
        "statistics_on_tensors": statistics(False),
    }
    for block in BLOCKS:
        work[f"per_metric_{block}"] = lambda block=block: per_metric(
            student, teacher, token_ids, block
        )
    return work


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The ratios that matter, of medians."""
    medians = medians_of(seconds)
    best = min((name for name in medians if name.startswith("per_metric")), key=medians.__getitem__)
    ours = medians["statistics"]
    return {
        "statistics over reading the arrays as float32 in blocks": ours / medians["read_in_blocks"],
        "statistics over adding each array up in float32": ours / medians["read_as_float32"],
        "statistics over making float32 arrays": ours / medians["convert_to_float32"],
        "statistics over reading float32 arrays": ours / medians["read_float32"],
        "statistics over one log-sum-exp of each row": ours / medians["normalizers"],
        f"one function per metric, best ({best}), over statistics": medians[best] / ours,
        "one function per metric, blocks of 512, over statistics": medians["per_metric_512"] / ours,
        "best one function per metric over statistics on tensors": (
            medians[best] / medians["statistics_on_tensors"]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="rows N")
    parser.add_argument("--vocab-size", type=int, default=49152, help="tokens V")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the logits")
    parser.add_argument("--threads", type=int, default=2, help="threads; a CUDA device is not used")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="elapsed or CPU time"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the timings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.vocab_size)
    student, teacher = (
        torch.empty(shape).normal_(0, 3, generator=generator).to(getattr(torch, options.dtype))
        for _ in range(2)
    )
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    token_ids = torch.randint(options.vocab_size, shape[:1], generator=generator)
    with torch.inference_mode():
        seconds = interleaved(contenders(student, teacher, token_ids), options.rounds, clock)
    ratios = summary(seconds)
    show(seconds, ratios)
    write_results(options.out, options, seconds=seconds, ratios=ratios)


if __name__ == "__main__":
    main()
