"""Checkpoints of a training, from which it goes on exactly: trainable weights, optimizer state,
masks, history.

A checkpoint is a folder, whole or absent: it is written beside its place, then renamed. Nothing in
it is unpickled but tensors.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tip_analysis.core.errors import ConfigurationMismatchError, RunError
from tip_analysis.training.data import FixedRollouts
from tip_analysis.training.trainer import StepRecord, Trainer


def write_checkpoint(trainer: Trainer, folder: Path, extra: Any = None) -> None:
    """Write a checkpoint: trainable weights, optimizer, history, fixed masks, and `extra` (anything
    that JSON holds).

    The folder is whole or absent.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {name: value.detach().contiguous() for name, value in trainer.parameters.items()}
    save_file(weights, part / "weights.safetensors")
    torch.save(trainer.optimizer.state_dict(), part / "optimizer.pt")
    if isinstance(trainer.source, FixedRollouts):
        masks = {
            name: torch.from_numpy(np.packbits(mask)) for name, mask in trainer.source.masks.items()
        }
        torch.save(masks, part / "masks.pt")
    state = {
        "step": trainer.step,
        "options": trainer.options.identity(),
        "history": [asdict(record) for record in trainer.history],
        "extra": extra,
    }
    (part / "state.json").write_text(json.dumps(state), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load_checkpoint(trainer: Trainer, folder: Path) -> Any:
    """Go on from a checkpoint; returns the `extra` that it was saved with.

    Raises:
        RunError: there is none, or it is of another model.
        ConfigurationMismatchError: it was written under other options.
    """
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        weights = load_file(folder / "weights.safetensors")
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        fixed = isinstance(trainer.source, FixedRollouts)
        masks = torch.load(folder / "masks.pt", weights_only=True) if fixed else {}
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{folder} is no whole checkpoint: {error}") from error
    mine = json.loads(json.dumps(trainer.options.identity()))
    if different := sorted(name for name in mine if mine[name] != state["options"].get(name)):
        raise ConfigurationMismatchError(
            f"{folder} was written under other options: {', '.join(different)} differ"
        )
    if weights.keys() != trainer.parameters.keys():
        raise RunError(f"{folder} holds other parameters than the student trains")
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(weights[name])
    trainer.optimizer.load_state_dict(optimizer)
    trainer.step = state["step"]
    trainer.history = [StepRecord(**record) for record in state["history"]]
    if isinstance(trainer.source, FixedRollouts):
        lengths = {
            rollout.rollout_id: len(rollout.response) for rollout in trainer.source.all_rollouts()
        }
        unpacked = {
            name: np.unpackbits(bits.numpy(), count=lengths[name]).astype(bool)
            for name, bits in masks.items()
        }
        trainer.source = replace(trainer.source, masks=unpacked)
    return state["extra"]


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step under `folder`, of those named `step-NNNNNN`."""
    return max(folder.glob("step-[0-9]*[0-9]"), default=None)


def save_checkpoint(trainer: Trainer, folder: Path, extra: Any = None) -> Path:
    """Write `folder/step-NNNNNN`, then remove those of earlier steps."""
    path = folder / f"step-{trainer.step:06d}"
    write_checkpoint(trainer, path, extra)
    for older in folder.glob("step-[0-9]*"):
        if older != path:
            shutil.rmtree(older, ignore_errors=True)
    return path
