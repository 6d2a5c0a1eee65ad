"""Cost of per-token gradient norms: K forward-mode probes against one backward pass a token.

    python benchmarks/gradients.py --out benchmarks/results/gradients.json
    python benchmarks/gradients.py --lengths 512 --dtype bfloat16 --timed-probes 4
    python benchmarks/gradients.py --memory --lengths 512

The baseline is one forward pass of the body, then the head and `torch.autograd.grad` for each
token's loss, with `retain_graph`, timed on a few tokens evenly spaced and scaled to all. Both sides
run in the same process, interleaved, with the same dtype, threads and model; each figure is the
median over rounds, each ratio the median of the rounds' ratios. Both sides measure all response
tokens of one rollout, which is all but the first few of the sequence. The teacher is the student
itself under another prompt. Needs SmolLM2's weights (`make smollm2`).
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measuring import fresh_process, write_results
from torch import Tensor

from tip_analysis.gradients.forward_mode import attention
from tip_analysis.gradients.loss_gradients import LossDirections, Pair, loss_directions
from tip_analysis.gradients.measuring import GradientSettings, norm_interval
from tip_analysis.gradients.rollout_gradients import RolloutMeter
from tip_analysis.gradients.scopes import parameter_scope
from tip_analysis.gradients.token_losses import token_loss
from tip_analysis.models.hidden_states import last_hidden_states, read_tokens
from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.training.peak_memory import memory_bytes, peak_memory_bytes, reset_peak_memory

LICENCE = Path(__file__).parent.parent / "LICENSE"
PROMPT = "Recite the Apache License."
TEACHER_PROMPT = (
    "The Apache License, version 2.0, begins with definitions. Recite the Apache License."
)


CLOCK = time.perf_counter


def make_rollout(model: LanguageModel, length: int) -> Rollout:
    """A rollout whose sequence, as the student reads it, has `length` tokens: this project's
    licence as the response."""
    prompt = model.tokenizer(PROMPT)["input_ids"]
    response = model.tokenizer(LICENCE.read_text("utf-8"))["input_ids"][: length + 1 - len(prompt)]
    if len(prompt) + len(response) < length + 1:
        raise SystemExit(f"--lengths: at most {len(prompt) + len(response) - 1}")
    return Rollout(
        "benchmark/0", "benchmark", prompt, response, model.tokenizer(TEACHER_PROMPT)["input_ids"]
    )


def probe_norms(
    pair: Pair,
    rollout: Rollout,
    num_probes: int,
    together: int | None,
    directions: LossDirections | None = None,
) -> tuple[float, Tensor, Tensor]:
    """Seconds, estimates and standard errors of all tokens; with directions, φ as well."""
    settings = GradientSettings(
        losses=("reverse_kl",), num_probes=num_probes, probes_together=together
    )
    scope = parameter_scope(pair.student.model, pair.student.head, "all")
    nothing = LossDirections({rollout.prompt_id: 0}, {}, (1.0, 0.0), {})
    meter = RolloutMeter(pair, scope, settings, directions or nothing)
    meter._verified = True  # a check made once a run, not once a rollout
    with meter:
        meter._forward._check_attention(
            read_tokens(rollout.prompt, rollout.response, [0], pair.student.device)[0]
        )
        began = CLOCK()
        found = meter.measure(rollout)["reverse_kl"]
        return CLOCK() - began, found.grad_norm_sq, found.grad_norm_sq_se


def baseline_norms(pair: Pair, rollout: Rollout, tokens: list[int]) -> tuple[float, list[float]]:
    """Seconds for all tokens, extrapolated, and exact norms of a few."""
    model, head = pair.student.model, pair.student.head
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    began = CLOCK()
    read, at = read_tokens(rollout.prompt, rollout.response, rollout.positions, pair.student.device)
    teacher = pair.teacher_logits(rollout, rollout.positions)
    hidden = last_hidden_states(model, read[None])[0, at]
    targets = torch.tensor(rollout.response)
    shared, norms = CLOCK() - began, []
    began = CLOCK()
    for token in tokens:
        row = slice(
            token, token + 1
        )  # a loss of all rows would drag [T, V] through every backward pass
        loss = token_loss("reverse_kl", head(hidden[row]), teacher(row), targets[row])
        gradients = torch.autograd.grad(loss.sum(), parameters, retain_graph=True)
        norms.append(sum(float(gradient.float().square().sum()) for gradient in gradients))
    each = (CLOCK() - began) / len(tokens)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return shared + each * len(at), norms


def compare(pair: Pair, length: int, options: argparse.Namespace) -> dict[str, float]:
    """One row of the table."""
    rollout = make_rollout(pair.student, length)
    count = len(rollout.response)
    tokens = [
        (2 * index + 1) * count // (2 * options.baseline_tokens)
        for index in range(options.baseline_tokens)
    ]
    ours, theirs, norms = [], [], []
    for _ in range(options.rounds):
        seconds, found, error = probe_norms(
            pair, rollout, options.timed_probes, options.probes_together
        )
        if options.timed_probes < options.num_probes:
            one, _, _ = probe_norms(pair, rollout, 1, 1)
            slope = (seconds - one) / (options.timed_probes - 1)
            seconds += slope * (options.num_probes - options.timed_probes)
        ours.append(seconds)
        with attention(pair.student.model, options.baseline_attention):
            seconds, norms = baseline_norms(pair, rollout, tokens)
        theirs.append(seconds)
    low, high = norm_interval(found[tokens], error[tokens], options.timed_probes)
    inside = [bool(lo <= norm <= hi) for lo, norm, hi in zip(low, norms, high, strict=True)]
    return {
        "length": length,
        "num_tokens": count,
        "baseline_s": statistics.median(theirs),
        "probes_s": statistics.median(ours),
        "speed_up": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "speed_up_min": min(b / a for a, b in zip(ours, theirs, strict=True)),
        "share_of_exact_norms_in_95_interval": sum(inside) / len(inside),
    }


def peak_memory(length: int, options: argparse.Namespace) -> dict[str, float]:
    """Peak resident memory of each phase in multiples of the parameters' size, beside one forward
    pass's activations.

    Of ∇L of two rollouts in two folds, kept on disk, and of the probes with φ after it.
    """
    pair = load_pair(options.dtype)
    scope = parameter_scope(pair.student.model, pair.student.head, "all")
    rollout = make_rollout(pair.student, length)
    other = replace(rollout, rollout_id="other/0", prompt_id="other")
    read, _ = read_tokens(rollout.prompt, rollout.response, [0], pair.student.device)
    device = pair.student.device
    outside = memory_bytes(device) - scope.num_bytes

    def peak() -> float:
        return (peak_memory_bytes(device) - outside) / scope.num_bytes

    reset_peak_memory(device)  # loading takes more
    with TemporaryDirectory() as folder:
        directions = loss_directions(
            pair, scope, [rollout, other], losses=["reverse_kl"], folder=Path(folder)
        )
        peak_of_loss = peak()
        reset_peak_memory(device)
        probe_norms(
            pair, rollout, max(2, options.probes_together or 1), options.probes_together, directions
        )
        peak_of_probes = peak()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {
        parameter.untyped_storage().data_ptr() for parameter in pair.student.model.parameters()
    }
    pair.student.model.requires_grad_(True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        attention(pair.student.model, "eager"),
    ):
        last_hidden_states(pair.student.model, read[None])
    activations = sum(size for pointer, size in saved.items() if pointer not in weights)
    return {
        "length": length,
        "probes_together": options.probes_together or 1,
        "parameters_bytes": scope.num_bytes,
        "activations_bytes": activations,
        "peak_of_loss_gradients_over_parameters": peak_of_loss,
        "peak_of_probes_over_parameters": peak_of_probes,
        "activations_over_parameters": activations / scope.num_bytes,
    }


def load_pair(dtype: str) -> Pair:
    """SmolLM2 as its own teacher."""
    model = load_model("smollm2-135m-instruct", dtype=dtype, device="cpu")
    return Pair(model, model, model.vocab_size)


def main() -> None:
    global CLOCK
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[128, 256, 512, 1024, 2048],
        help="tokens of the sequence",
    )
    parser.add_argument("--num-probes", type=int, default=32)
    parser.add_argument(
        "--timed-probes", type=int, help="time so many probes and extrapolate to all"
    )
    parser.add_argument(
        "--probes-together", type=int, help="probes in a batch; automatic by default"
    )
    parser.add_argument(
        "--baseline-tokens", type=int, default=16, help="backward passes that are timed"
    )
    parser.add_argument(
        "--baseline-attention", default="sdpa", help="attention implementation of the baseline"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time: steadier on a busy machine"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory instead, each length in its own process",
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write a JSON file")
    options = parser.parse_args()
    options.timed_probes = options.timed_probes or options.num_probes
    torch.set_num_threads(options.threads)
    CLOCK = time.process_time if options.cpu_time else time.perf_counter
    if options.child:
        print(json.dumps(peak_memory(options.lengths[0], options)))
        return
    rows = []
    pair = None if options.memory else load_pair(options.dtype)
    for length in options.lengths:
        if pair is None:
            arguments = ["--child", "--lengths", length, "--dtype", options.dtype]
            arguments += (
                ["--probes-together", options.probes_together] if options.probes_together else []
            )
            rows.append(fresh_process(__file__, *arguments))
        else:
            rows.append(compare(pair, length, options))
        print(
            "  ".join(
                f"{key} {value:,.2f}" if isinstance(value, float) else f"{key} {value:,}"
                for key, value in rows[-1].items()
            )
        )
    write_results(options.out, options, rows=rows)


if __name__ == "__main__":
    main()
