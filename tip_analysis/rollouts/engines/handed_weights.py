"""Weights of a model as files that another engine reads again and again while the model is trained.

An adapter is merged into its base (in a copy). A head that is tied to the embedding is written as a
weight of its own, and the config says so: an engine that reads tied weights in place may renew the
one and keep the other as it was.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tip_analysis.models.loading import LanguageModel

HEAD_FILE, BODY_FILE = "model-head.safetensors", "model-body.safetensors"
CHANGE = 0.2
"""How far `changed` moves each weight, as a part of it."""


def write_weights(student: LanguageModel, folder: Path) -> None:
    """Write a model's weights and config into a folder, its head untied."""
    network: Any = student.model
    if hasattr(network, "merge_and_unload"):
        network = copy.deepcopy(network).merge_and_unload()
    network.save_pretrained(folder)
    if head := _tied_head(network):
        _untie(folder, *head)


def _tied_head(network: Any) -> tuple[str, torch.Tensor] | None:
    """Name and weight of a head that is the embedding; None where it is one of its own."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    name = next(name for name, module in network.named_modules() if module is head)
    return f"{name}.weight", head.weight


def _untie(folder: Path, name: str, weight: torch.Tensor) -> None:
    save_file({name: weight.detach().cpu().clone()}, folder / HEAD_FILE, metadata={"format": "pt"})
    _change(folder / "config.json", _say_untied)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        _write_index(folder, index)
    _change(index, lambda content: content["weight_map"].update({name: HEAD_FILE}))


def _write_index(folder: Path, index: Path) -> None:
    """Make the only file one of several: under the name of the only one nothing else is read."""
    body = (folder / "model.safetensors").rename(folder / BODY_FILE)
    with safe_open(body, framework="pt") as file:
        names = list(file.keys())
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, BODY_FILE)}
    index.write_text(json.dumps(content), "utf-8")


def _say_untied(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False


def _change(path: Path, change: Any) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2), "utf-8")


@contextmanager
def changed(network: nn.Module) -> Iterator[None]:
    """Inside, every weight is another one, by a fifth of its size; afterwards all are what they
    were, to the last bit."""
    kept = [(parameter, parameter.detach().cpu().clone()) for parameter in network.parameters()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter, before in kept:
                noise = torch.randn(before.shape, generator=generator)
                parameter.copy_((before.float() * (1.0 + CHANGE * noise)).to(before.dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)


@torch.no_grad()
def own_logprobs(student: LanguageModel, sequence: list[int]) -> torch.Tensor:
    """ln P of each token of a sequence but the first, by the model as it is."""
    ids = torch.tensor([sequence], device=student.device)
    rows = student.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return rows.gather(1, ids[0, 1:, None])[:, 0].cpu()
