"""Tiny random models of the kinds of architecture that the field has, built in code: dense, mixture
of experts, hybrid, recurrent, windows, soft caps, sinks, latent attention, ALiBi, learned
positions, and positions that depend on length."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer
from tip_analysis.models.loading import LanguageModel, avoid_grouped_kernels
from tip_analysis.models.output_head import OutputHead

TOKENIZER = build_tokenizer()
VOCAB_SIZE = len(TOKENIZER)
SWITCH = 12
"""Length beyond which the models whose positions depend on length take other frequencies."""

_DENSE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_HEAD: dict[str, Any] = {"head_dim": 8}
_MIXTURE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_GATED_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_STATE_SPACE: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": SWITCH,
}
_DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": SWITCH,
}

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    # dense
    "qwen3": ("Qwen3", _DENSE | _HEAD),
    "llama": ("Llama", _DENSE | _HEAD),
    "qwen2": ("Qwen2", _DENSE),
    "mistral": ("Mistral", _DENSE | _HEAD | {"sliding_window": 6}),
    "phi": ("Phi", _DENSE),
    "gpt_neox": ("GPTNeoX", _DENSE),
    "olmo2": ("Olmo2", _DENSE),
    "smollm3": ("SmolLM3", _DENSE | {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "granite": ("Granite", _DENSE | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "cohere": ("Cohere", _DENSE | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", _DENSE | {"logit_scale": 0.25, "sliding_window": 6}),
    "gemma2": (
        "Gemma2",
        _DENSE
        | _HEAD
        | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 6},
    ),
    "gemma3": ("Gemma3Text", _DENSE | _HEAD | {"sliding_window": 6}),
    # positions
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon_alibi": (
        "Falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
    "falcon": (
        "Falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    ),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "phi3_longrope": ("Phi3", _DENSE | {"pad_token_id": 0, "rope_parameters": _LONG_ROPE}),
    "llama_dynamic": (
        "Llama",
        _DENSE | _HEAD | {"rope_parameters": _DYNAMIC_ROPE, "max_position_embeddings": SWITCH},
    ),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 128,
        },
    ),
    "llama_yarn": ("Llama", _DENSE | _HEAD | {"rope_parameters": _YARN}),
    "llama_longrope": (
        "Llama",
        _DENSE | _HEAD | {"rope_parameters": _LONG_ROPE | {"attention_factor": 1.3}},
    ),
    # mixtures of experts
    "qwen3_moe": ("Qwen3Moe", _DENSE | _HEAD | _MIXTURE),
    "mixtral": ("Mixtral", _DENSE | _HEAD | _MIXTURE),
    "gpt_oss": ("GptOss", _DENSE | _HEAD | _MIXTURE | {"sliding_window": 6}),
    "deepseek_v3": (
        "DeepseekV3",
        _DENSE | _MIXTURE | _LATENT | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "llama4": (
        "Llama4Text",
        _DENSE
        | _HEAD
        | _MIXTURE
        | {
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 2,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        _DENSE | _MIXTURE | _LATENT | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "mimo": ("MiMoV2Flash", _DENSE | _HEAD | _MIXTURE | {"sliding_window": 6}),
    # recurrent and hybrid
    "mamba": (
        "Mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "conv_kernel": 4},
    ),
    "mamba2": (
        "Mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "falcon_mamba": (
        "FalconMamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "conv_kernel": 4},
    ),
    "rwkv": ("Rwkv", {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "attention_window_size": 16,
            "lru_width": 32,
        },
    ),
    "qwen3_next": ("Qwen3Next", _DENSE | _HEAD | _MIXTURE | _GATED_DELTA),
    "qwen3_5": ("Qwen3_5Text", _DENSE | _HEAD | _GATED_DELTA),
    "jamba": (
        "Jamba",
        _DENSE
        | _STATE_SPACE
        | {
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
    ),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        _DENSE
        | _STATE_SPACE
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
    ),
    "falcon_h1": ("FalconH1", _DENSE | _STATE_SPACE | {"mamba_d_ssm": 64}),
    "lfm2": (
        "Lfm2",
        _DENSE | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        _DENSE | _MIXTURE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "bamba": ("Bamba", _DENSE | _STATE_SPACE | {"attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        _DENSE
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_key_value_heads": 4,
            "num_mem_blocks": 1,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        _DENSE
        | _HEAD
        | {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "use_mamba_kernels": False,
        },
    ),
    "minimax": (
        "MiniMax",
        _DENSE
        | _HEAD
        | _MIXTURE
        | {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    ),
    "kimi_linear": (
        "KimiLinear",
        _DENSE
        | _MIXTURE
        | _LATENT
        | {
            "head_dim": 16,
            "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "num_experts_per_token": 2,
        },
    ),
    "olmo_hybrid": ("OlmoHybrid", _DENSE | _GATED_DELTA),
    "xlstm": (
        "xLSTM",
        {
            "hidden_size": 32,
            "num_heads": 4,
            "num_blocks": 2,
            "num_hidden_layers": 2,
            "chunk_size": 8,
            "mode": "inference",
        },
    ),
}
"""Name of the config class (without `Config`) and its arguments, by the name of a case."""


SHORT = (
    "llama",
    "gemma2",
    "bloom",
    "phi3_longrope",
    "llama_dynamic",
    "qwen3_moe",
    "gpt_oss",
    "llama4",
    "mamba",
    "rwkv",
    "xlstm",
    "qwen3_5",
    "falcon_h1",
)
"""Cases for the gate: one of each kind."""


def zoo_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of this kind, in evaluation mode, with weights so large that context matters
    and logits vary (a standard deviation of 1.5)."""
    kind, arguments = ZOO[name]
    own = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**own | arguments)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    avoid_grouped_kernels(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in key and "A_log" not in key:
                parameter.mul_(3.0)
        logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
        model.get_output_embeddings().weight.mul_(float(1.5 / logits.std()))
    return model


def zoo_language_model(name: str, **options: Any) -> LanguageModel:
    """Such a model with a tokenizer."""
    model = zoo_model(name, **options)
    head = OutputHead(model)
    head.verify()
    return LanguageModel(name, model.requires_grad_(False), TOKENIZER, head)
