"""Train the agent pair from nothing: `python -m tip_analysis.demo.agent.train --out DIR --seed 0`.

Writes `DIR/teacher` and `DIR/student`, as `AutoModelForCausalLM` loads them; with the default
options and seed 0 the weights in `data/arithmetic-agent`, up to rounding that differs between CPUs.

As for the arithmetic pair, both learn the grammar's exact distribution of the next token after the
text as it stands, at the student's tokens only. The teacher's targets are right everywhere; part of
its texts are written with the flaws and with random slips, so that it judges a student's text at
the point of an error. The student's targets have the flaws, and its training stops early.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from tip_analysis.core.progress import track
from tip_analysis.demo.agent.language import (
    DIGITS,
    END,
    PAD,
    TOKEN_ID,
    VOCABULARY,
    AgentText,
    Options,
    Slot,
    draw_terms,
    is_held_out,
    prompt_tokens,
    tool_answer,
    tool_turn,
)
from tip_analysis.demo.agent.tokenizer import MAX_LENGTH, build_tokenizer
from tip_analysis.demo.arithmetic.train import ModelOptions, Solutions, batches, one_cycle

NOT_WRITTEN = -1
"""Row of the target of a token that the student does not write."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training command."""

    out: Path
    """Folder for `teacher` and `student`."""
    seed: int = 0
    """Seed of data, initial weights and order."""
    teacher: ModelOptions = field(
        default_factory=lambda: ModelOptions(
            num_layers=3,
            hidden_size=80,
            num_heads=4,
            num_steps=1200,
            num_solutions=20_000,
            learning_rate=4e-3,
            final_learning_rate=0.0,
            slip_share=0.5,
            batch_size=48,
        )
    )
    """The teacher."""
    student: ModelOptions = field(
        default_factory=lambda: ModelOptions(
            num_layers=3,
            hidden_size=64,
            num_heads=4,
            num_steps=800,
            num_solutions=20_000,
            learning_rate=4e-3,
            final_learning_rate=0.0,
            slip_share=0.25,
            batch_size=48,
        )
    )
    """The student."""
    only: tuple[Literal["teacher", "student"], ...] = ("teacher", "student")
    """Which of the two to train."""
    num_threads: int = 1
    """CPU threads; more threads sum in another order."""


def write_text(
    problem: str,
    terms: tuple[str, ...],
    rng: np.random.Generator,
    *,
    flawed: bool,
    slip_rate: float = 0.0,
    careless: bool = False,
) -> tuple[list[str], list[Options | None]]:
    """Tokens of one trajectory, and the target of each; None where the student does not write."""
    text = AgentText(terms, flawed=flawed)
    tokens: list[str] = []
    targets: list[Options | None] = []
    room = MAX_LENGTH - len(prompt_tokens(problem))
    while len(tokens) < room and text.slot not in (Slot.DONE, Slot.LOST):
        if text.slot is Slot.TOOL:
            said = tool_turn(tool_answer(problem, text.call, text.argument))
            tokens += said
            targets += [None] * len(said)
            for token in said:
                text.feed(token)
            continue
        targets.append(text.options())
        choice, slip = rng.random(2).tolist()
        token = text.draw(choice)
        if careless and text.is_planted and rng.random() < 0.7:
            token = text.flawed_token()
        if slip < slip_rate and text.slot in (Slot.AMOUNTS, Slot.TOTAL) and token in DIGITS:
            token = DIGITS[rng.integers(10)]
        tokens.append(token)
        text.feed(token)
    return tokens[:room], targets[:room]


def write_texts(
    options: ModelOptions, num_texts: int, rng: np.random.Generator, *, flawed: bool
) -> Solutions:
    """Texts and targets for one model; a target's row is `NOT_WRITTEN` where there is none."""
    row_of: dict[Options, int] = {}
    texts, rows = [], []
    while len(texts) < num_texts:
        terms = draw_terms(rng)
        if is_held_out(terms):
            continue
        problem = "+".join(terms) + "="
        slips = rng.random() < options.slip_share
        tokens, targets = write_text(
            problem,
            terms,
            rng,
            flawed=flawed,
            slip_rate=options.slip_rate * slips,
            careless=bool(slips),
        )
        shown = prompt_tokens(problem)
        texts.append([TOKEN_ID[token] for token in (*shown, *tokens)])
        of_tokens = [
            NOT_WRITTEN if target is None else row_of.setdefault(target, len(row_of))
            for target in targets
        ]
        rows.append([NOT_WRITTEN] * len(shown) + of_tokens)
    lengths = np.array([len(text) for text in texts])
    token_ids = np.full((num_texts, lengths.max()), TOKEN_ID[PAD], dtype=np.int64)
    target_rows = np.full_like(token_ids, NOT_WRITTEN)
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        token_ids[index, : len(text)], target_rows[index, : len(row)] = text, row
    no_prompts = np.zeros((num_texts, 0), dtype=np.int64)
    return Solutions(no_prompts, token_ids, target_rows, lengths, _dense(row_of))


def _dense(row_of: dict[Options, int]) -> Tensor:
    distributions = torch.zeros(len(row_of), len(VOCABULARY))
    for options, row in row_of.items():
        for token, probability in options:
            distributions[row, TOKEN_ID[token]] = probability
    return distributions


def build_model(options: ModelOptions, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised model of the given size."""
    torch.manual_seed(seed)
    ends: dict[str, Any] = {"eos_token_id": TOKEN_ID[END], "pad_token_id": TOKEN_ID[PAD]}
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


def batch_loss(model: Qwen3ForCausalLM, texts: Solutions, batch: np.ndarray) -> Tensor:
    """Mean cross-entropy to the target distributions over what the student writes, nats."""
    length = int(texts.lengths[batch].max())
    token_ids = torch.from_numpy(texts.token_ids[batch, :length])
    rows = torch.from_numpy(texts.target_rows[batch, 1:length])
    logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits[rows >= 0]
    return torch.nn.functional.cross_entropy(logits, texts.distributions[rows[rows >= 0]])


def train_model(
    name: str, options: ModelOptions, *, seed: int, say: Callable[[str], None] = lambda text: None
) -> Qwen3ForCausalLM:
    """Train one of the two models; `student` has the flaws."""
    rng = np.random.default_rng([seed, len(name), name == "student"])
    model = build_model(options, seed)
    texts = write_texts(options, options.num_solutions, rng, flawed=name == "student")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, options))
    with track(name, total=options.num_steps, unit="steps") as advance:
        for step, batch in enumerate(batches(texts, options.batch_size, options.num_steps, rng)):
            loss = batch_loss(model, texts, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1, tokens=int(texts.lengths[batch].sum()))
            if step % 50 == 0:
                say(json.dumps({"model": name, "step": step, "loss": round(loss.item(), 4)}))
    return model.eval()


def train(options: TrainOptions) -> None:
    """Train the models named in the options and save them."""
    console = Console(stderr=True)
    torch.set_num_threads(options.num_threads)
    for name in options.only:
        model = train_model(name, getattr(options, name), seed=options.seed, say=console.print)
        folder = options.out / name
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        console.print(f"{name}: saved in {folder}")


if __name__ == "__main__":
    train(tyro.cli(TrainOptions, description=__doc__))
