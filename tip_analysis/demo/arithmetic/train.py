"""Train the arithmetic pair from nothing: `python -m tip_analysis.arithmetic.train --out DIR --seed
0`.

Writes `DIR/teacher` and `DIR/student`: config, safetensors weights and tokenizer, as
`AutoModelForCausalLM` loads them. With the default options and seed 0 it makes the weights in
`data/arithmetic`, up to rounding that differs between CPUs.

Both models learn from solutions of problems outside the held-out split. The target at a position is
the grammar's exact distribution of the next token after the text as it stands, not the token that
happens to follow:

- The teacher's targets are right everywhere. Part of its texts are written with the flaw and with
  random slips, and its targets go on from what was written, so that it judges a student's text at
  the point of an error and not after it.
- The student's targets have the flaw, and its training stops early.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from tip_analysis.core.names import PlantedLabel
from tip_analysis.core.progress import track
from tip_analysis.demo.arithmetic.language import (
    BOS,
    DIGITS,
    EOS,
    PAD,
    PHRASES,
    TOKEN_ID,
    VOCABULARY,
    Options,
    Slot,
    WorkedSolution,
    draw_numbers,
    encode,
    extract_answer,
    format_problem,
    is_held_out,
    label_tokens,
    problems,
)
from tip_analysis.demo.arithmetic.tokenizer import MAX_LENGTH, build_tokenizer

NUM_PROMPT_TOKENS = 10
"""`<bos>` and the nine characters of a problem."""

_SLIP_WORDS = tuple(
    word
    for kind in ("again", "carry", "then", "carried", "write", "tens", "answer")
    for word in PHRASES[kind]
)
_DIGIT_SLOTS = {
    Slot.LEFT,
    Slot.RIGHT,
    Slot.RESULT,
    Slot.RECOUNT,
    Slot.CARRIED,
    Slot.WRITTEN,
    Slot.ANSWER,
}


@dataclass(frozen=True)
class ModelOptions:
    """Size and training of one of the two models."""

    num_layers: int
    """Transformer blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_heads: int
    """Attention heads; as many key-value heads."""
    num_steps: int
    """Optimizer steps."""
    num_solutions: int
    """Different training texts."""
    learning_rate: float
    """Peak of the one-cycle schedule."""
    final_learning_rate: float
    """Where the schedule ends, as a fraction of the peak: the larger, the less settled the
    model."""
    slip_share: float
    """Share of texts with random slips."""
    batch_size: int = 96
    """Texts per step."""
    slip_rate: float = 0.03
    """Probability of a slip at each token of a text with slips."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training command."""

    out: Path
    """Folder for `teacher` and `student`."""
    seed: int = 0
    """Seed of data, initial weights and order."""
    teacher: ModelOptions = field(
        default_factory=lambda: ModelOptions(
            num_layers=4,
            hidden_size=96,
            num_heads=4,
            num_steps=1400,
            num_solutions=40_000,
            learning_rate=3e-3,
            final_learning_rate=0.0,
            slip_share=0.5,
            batch_size=64,
        )
    )
    """The teacher."""
    student: ModelOptions = field(
        default_factory=lambda: ModelOptions(
            num_layers=2,
            hidden_size=64,
            num_heads=4,
            num_steps=540,
            num_solutions=48_000,
            learning_rate=3e-3,
            final_learning_rate=0.0,
            slip_share=0.25,
        )
    )
    """The student."""
    only: tuple[Literal["teacher", "student"], ...] = ("teacher", "student")
    """Which of the two to train."""
    num_threads: int = 1
    """CPU threads; more threads sum in another order."""
    num_eval_problems: int = 200
    """Held-out problems for the closing measurement."""


@dataclass(frozen=True)
class Solutions:
    """Training texts: [num_texts, max_length] token ids (padded) and, for each token, the row of
    its target distribution."""

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    target_rows: np.ndarray
    lengths: np.ndarray
    distributions: Tensor


def write_solutions(
    options: ModelOptions, num_texts: int, rng: np.random.Generator, *, flawed: bool
) -> Solutions:
    """Texts and targets for one model.

    Args:
        options: Shares of slips.
        num_texts: How many texts.
        rng: Source of problems, choices and slips.
        flawed: Whether the targets have the flaw. Texts with slips are written with the flaw in
            either case.
    """
    numbers = draw_numbers(int(num_texts * 1.5) + 100, rng)
    numbers = [tuple(row) for row in numbers.tolist() if not is_held_out(row)][:num_texts]
    careless = rng.random(num_texts) < options.slip_share
    row_of: dict[Options, int] = {}
    texts, rows = [], []
    for triple, has_slips in zip(numbers, careless, strict=True):
        tokens, targets = _write_text(
            triple, rng, flawed=flawed, slip_rate=options.slip_rate * has_slips, careless=has_slips
        )
        texts.append(encode(tokens))
        rows.append([row_of.setdefault(target, len(row_of)) for target in targets])
    lengths = np.array([len(text) for text in texts])
    token_ids = np.full((num_texts, lengths.max()), TOKEN_ID[PAD], dtype=np.int64)
    target_rows = np.zeros_like(token_ids)
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        token_ids[index, : len(text)], target_rows[index, : len(row)] = text, row
    prompt_ids = np.array([encode([BOS, *format_problem(triple)]) for triple in numbers])
    return Solutions(prompt_ids, token_ids, target_rows, lengths, _dense(row_of))


def _dense(row_of: dict[Options, int]) -> Tensor:
    distributions = torch.zeros(len(row_of), len(VOCABULARY))
    for options, row in row_of.items():
        for token, probability in options:
            distributions[row, TOKEN_ID[token]] = probability
    return distributions


def _write_text(
    numbers: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    flawed: bool,
    slip_rate: float,
    careless: bool,
) -> tuple[list[str], list[Options]]:
    solution = WorkedSolution(numbers, flawed=flawed)
    tokens: list[str] = []
    targets: list[Options] = []
    uniforms = rng.random((MAX_LENGTH - NUM_PROMPT_TOKENS, 2)).tolist()
    for choice, slip in uniforms:
        options = solution.options()
        token = solution.draw(choice)
        if careless and solution.is_flawed_sum:
            token = solution.flawed_digit()
        if slip < slip_rate:
            token = _slip(solution.slot, token, rng)
        solution.feed(token)
        if solution.slot is Slot.LOST:
            break
        tokens.append(token)
        targets.append(options)
        if solution.slot is Slot.DONE:
            break
    return tokens, targets


def _slip(slot: Slot, token: str, rng: np.random.Generator) -> str:
    """Another token of the kind that could stand here: a wrong digit, or a step too many, too few
    or too early."""
    if slot in _DIGIT_SLOTS and token != EOS:
        return DIGITS[rng.integers(10)]
    return _SLIP_WORDS[rng.integers(len(_SLIP_WORDS))] if slot is Slot.AFTER else token


def build_model(options: ModelOptions, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised model of the given size."""
    torch.manual_seed(seed)
    names = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    ends: dict[str, Any] = {name: TOKEN_ID[token] for name, token in names.items()}
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_heads,
        head_dim=options.hidden_size // options.num_heads,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        dtype="float32",
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, **ends)
    return model


def batches(
    solutions: Solutions, batch_size: int, num_steps: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Indices of the texts of each step, of like length: shuffled, sorted within groups of 16
    batches, shuffled again."""
    ready: list[np.ndarray] = []
    for _ in range(num_steps):
        if not ready:
            group = rng.choice(
                len(solutions.lengths),
                size=16 * batch_size,
                replace=len(solutions.lengths) < 16 * batch_size,
            )
            by_length = group[np.argsort(solutions.lengths[group], kind="stable")]
            ready = list(rng.permutation(by_length.reshape(16, batch_size)))
        yield ready.pop()


def batch_loss(model: Qwen3ForCausalLM, solutions: Solutions, batch: np.ndarray) -> Tensor:
    """Mean cross-entropy to the target distributions over the response tokens of a batch, nats."""
    length = int(solutions.lengths[batch].max())
    token_ids = solutions.token_ids[batch, :length]
    input_ids = torch.from_numpy(
        np.concatenate([solutions.prompt_ids[batch], token_ids[:, :-1]], axis=1)
    )
    written = torch.from_numpy(np.arange(length) < solutions.lengths[batch, None])
    logits = model(input_ids=input_ids, use_cache=False).logits[:, NUM_PROMPT_TOKENS - 1 :][written]
    targets = solutions.distributions[
        torch.from_numpy(solutions.target_rows[batch, :length])[written]
    ]
    return torch.nn.functional.cross_entropy(logits, targets)


def train_model(name: str, options: ModelOptions, *, seed: int) -> Qwen3ForCausalLM:
    """Train one of the two models; `student` has the flaw."""
    rng = np.random.default_rng([seed, len(name), name == "student"])
    model = build_model(options, seed)
    solutions = write_solutions(options, options.num_solutions, rng, flawed=name == "student")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, options))
    with track(name, total=options.num_steps, unit="steps") as advance:
        for batch in batches(solutions, options.batch_size, options.num_steps, rng):
            loss = batch_loss(model, solutions, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1, tokens=int(solutions.lengths[batch].sum()))
    return model.eval()


def one_cycle(step: int, options: ModelOptions) -> float:
    """Learning rate of a step as a part of the peak: a linear warm-up, then half a cosine."""
    warm_up = max(1, options.num_steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    angle = np.pi * (step - warm_up) / max(1, options.num_steps - warm_up)
    return options.final_learning_rate + (1 - options.final_learning_rate) * 0.5 * (
        1 + float(np.cos(angle))
    )


def measure(
    model: Qwen3ForCausalLM, num_problems: int, *, seed: int = 0, split: str = "held_out"
) -> dict[str, float]:
    """Sampled accuracy, length and share of planted errors of a model's own solutions (temperature
    1, one a problem)."""
    rows = problems(num_problems, seed, split=split)
    prompts = torch.tensor([encode([BOS, *row["problem"]]) for row in rows])
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = cast(Any, model).generate(
            prompts, max_new_tokens=MAX_LENGTH - NUM_PROMPT_TOKENS, do_sample=True, top_k=0
        )
    num_right = num_tokens = num_planted = 0
    for row, token_ids in zip(rows, output[:, NUM_PROMPT_TOKENS:].tolist(), strict=True):
        tokens = [VOCABULARY[token_id] for token_id in token_ids if token_id != TOKEN_ID[PAD]]
        num_right += extract_answer("".join(tokens)) == row["answer"]
        num_tokens += len(tokens)
        num_planted += label_tokens(row["problem"], tokens).count(PlantedLabel.PLANTED_ERROR)
    return {
        "accuracy": num_right / num_problems,
        "tokens_per_rollout": num_tokens / num_problems,
        "planted_share": num_planted / num_tokens,
    }


def train(options: TrainOptions) -> None:
    """Train the models named in the options and save them."""
    console = Console(stderr=True)
    torch.set_num_threads(options.num_threads)
    for name in options.only:
        model = train_model(name, getattr(options, name), seed=options.seed)
        folder = options.out / name
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        console.print(
            f"{name}: saved in {folder}; {json.dumps(measure(model, options.num_eval_problems))}"
        )


if __name__ == "__main__":
    train(tyro.cli(TrainOptions, description=__doc__))
