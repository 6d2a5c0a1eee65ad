"""Tiny random models of real architectures, built in code, and language models that join them to a
tokenizer."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.output_head import OutputHead

ARCHITECTURES = ("qwen3", "llama", "qwen2", "gpt2", "gemma2")


def tiny_model(
    architecture: str = "qwen3",
    *,
    vocab_size: int = 61,
    seed: int = 0,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 6.0,
) -> PreTrainedModel:
    """A random causal language model with 2 layers of width 32; `sharpness` scales the head's
    weights, so that logits vary."""
    torch.manual_seed(seed)
    size = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**size, **grouped))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**size, **grouped))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**size, num_key_value_heads=2))
    elif architecture == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**size, **grouped, final_logit_softcapping=5.0))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                tie_word_embeddings=tied,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpness)
    return model.to(dtype).eval()


def tiny_language_model(
    architecture: str = "qwen3",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    padding_rows: int = 0,
    name: str = "tiny",
    **options: object,
) -> LanguageModel:
    """A tiny model with a tokenizer (the arithmetic pair's by default); its head may have rows that
    no token uses."""
    tokenizer = tokenizer or build_tokenizer()
    vocab_size = len(tokenizer) + padding_rows  # pyright: ignore[reportArgumentType]
    model = tiny_model(architecture, vocab_size=vocab_size, **options)
    head = OutputHead(model)
    head.verify()
    return LanguageModel(name, model.requires_grad_(False), tokenizer, head)
