"""Pairs of models and rollouts for the benchmarks: SmolLM2 with a slightly changed copy, or random
weights of a given shape."""

import os
from pathlib import Path

import polars as pl
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.schema import RolloutTable
from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer
from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.models.output_head import OutputHead

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

LICENCE = Path(__file__).parent.parent / "LICENSE"

SHAPES = {
    "tiny": (2, 64, 192, 2, 2, 32, True),
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 128, True),
    "qwen3-1.7b": (28, 2048, 6144, 16, 8, 128, True),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 128, True),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 128, False),
}
"""Layers, hidden size, intermediate size, heads, key-value heads, head size, whether the head is
tied: of public configs."""


def smollm2_pair(dtype: str, device: str) -> tuple[LanguageModel, LanguageModel]:
    """SmolLM2-135M and the same with noise of a tenth of each weight's spread. Needs the weights
    that `make smollm2` brings."""
    student, teacher = (
        load_model("smollm2-135m-instruct", dtype=dtype, device=device) for _ in range(2)
    )
    generator = torch.Generator(device=device if device != "auto" else "cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            parameter.add_(0.1 * parameter.std() * noise)
    return student, teacher


def random_model(
    shape: str,
    *,
    vocab_size: int = 151_936,
    dtype: str = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
) -> LanguageModel:
    """A Qwen3 model of a shape of `SHAPES` with random weights, which cost what trained ones do."""
    layers, hidden, intermediate, heads, kv_heads, head_dim, tied = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960,
    )
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)
    return LanguageModel(f"{shape}-{seed}", model, build_tokenizer(), OutputHead(model))


def make_rollouts(
    model: LanguageModel,
    *,
    num_prompts: int,
    rollouts_per_prompt: int,
    prompt_tokens: int,
    response_tokens: int,
) -> pl.DataFrame:
    """Rollouts of equal length: pieces of this project's licence, each prompt with several
    responses."""
    text = list(model.tokenizer(LICENCE.read_text("utf-8"))["input_ids"])
    if len(set(text)) < 20:  # a tokenizer that does not know the text
        text = torch.randint(
            len(model.tokenizer), (4096,), generator=torch.Generator().manual_seed(0)
        ).tolist()

    def piece(start: int, length: int) -> list[int]:
        return [text[(start + index) % len(text)] for index in range(length)]

    rows = []
    for prompt in range(num_prompts):
        for sample in range(rollouts_per_prompt):
            row = dict.fromkeys(polars_schema(RolloutTable))
            response = piece(31 + 97 * prompt + 389 * sample, response_tokens)
            rows.append(
                row
                | {
                    "rollout_id": f"{prompt}/{sample}",
                    "prompt_id": str(prompt),
                    "batch_id": 0,
                    "prompt_text": "",
                    "prompt_token_ids": piece(1013 * prompt, prompt_tokens),
                    "response_token_ids": response,
                    "loss_mask": [True] * response_tokens,
                }
            )
    return pl.DataFrame(rows, schema=polars_schema(RolloutTable))
