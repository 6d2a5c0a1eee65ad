"""Students that can be trained: weights in their training precision, gradients on, LoRA adapters
where asked for."""

import copy
from typing import Any

import torch
from torch import nn

from tip_analysis.core.names import Precision
from tip_analysis.core.optional import require
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.output_head import OutputHead
from tip_analysis.training.options import TrainingOptions


def prepare_student(
    model: LanguageModel, options: TrainingOptions, *, copy_weights: bool = True
) -> LanguageModel:
    """A student that can be trained: weights in their training precision, gradients on, LoRA
    adapters where asked for.

    Args:
        model: as `load_model` gives it.
        options: precision, LoRA, gradient checkpointing.
        copy_weights: leave `model` as it is; without, its own weights are trained.
    """
    network = copy.deepcopy(model.model) if copy_weights else model.model
    network.eval().requires_grad_(False)
    dtype = torch.float64 if options.precision == Precision.FLOAT64 else torch.float32
    if options.lora_rank:
        kept = torch.bfloat16 if options.precision == Precision.BFLOAT16 else dtype
        network = network.to(kept)  # pyright: ignore[reportArgumentType]
        network = _with_adapters(network, options, model.name)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    else:
        network = network.to(dtype).requires_grad_(True)  # pyright: ignore[reportArgumentType]
    if options.gradient_checkpointing:
        _keep_no_activations(network)
    _remove_dropout(network)
    return LanguageModel(model.name, network.eval(), model.tokenizer, OutputHead(network))


def _with_adapters(network: Any, options: TrainingOptions, name: str) -> Any:
    """LoRA adapters whose first weights belong to the seed; a network that has adapters already
    keeps and trains those."""
    require("peft", "training LoRA adapters (--lora-rank)")
    from peft import LoraConfig, PeftModel, get_peft_model  # slow to import, seldom needed

    if isinstance(network, PeftModel):
        for key, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in key)
        return network
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        adapted = get_peft_model(network, config, autocast_adapter_dtype=False)
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted


def _keep_no_activations(network: Any) -> None:
    if hasattr(network, "activation_checkpointing_enable"):
        network.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its name in older releases
        network.gradient_checkpointing_enable({"use_reentrant": False})


def _remove_dropout(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # pyright: ignore
