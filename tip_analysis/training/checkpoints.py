"""Checkpoints of a training, from which it goes on exactly: trainable weights, optimizer state,
masks, history.

A checkpoint is a folder, whole or absent: it is written beside its place, then renamed. Tensors are
safetensors, everything else is JSON, nothing is ever unpickled. `state.json` holds the hash of each
other file: a checkpoint that was damaged since is refused, and the one before it takes its place.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tip_analysis.core.atomic_files import file_hash, first_line, make_folder, sync
from tip_analysis.core.errors import ConfigurationMismatchError, RunError
from tip_analysis.training.data import FixedRollouts
from tip_analysis.training.trainer import StepRecord, Trainer

KEPT = 2
"""Checkpoints of a training that are kept: the last one, and one to fall back on."""


def write_checkpoint(trainer: Trainer, folder: Path, extra: Any = None) -> None:
    """Write a checkpoint: trainable weights, optimizer, history, fixed masks, and `extra` (anything
    that JSON holds).

    The folder is whole or absent.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    optimizer, settings = _split(trainer.optimizer.state_dict())
    tables = {"weights": dict(trainer.parameters), "optimizer": optimizer}
    if isinstance(trainer.source, FixedRollouts):
        tables["masks"] = {
            name: torch.from_numpy(np.packbits(mask)) for name, mask in trainer.source.masks.items()
        }
        if trainer.source.weights:
            tables["token_weights"] = {
                name: torch.from_numpy(weights) for name, weights in trainer.source.weights.items()
            }
    for name, tensors in tables.items():
        path = part / f"{name}.safetensors"
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
        sync(path)
    state = {
        "step": trainer.step,
        "options": trainer.options.identity(),
        "history": [asdict(record) for record in trainer.history],
        "optimizer": settings,
        "extra": extra,
        "files": {path.name: file_hash(path) for path in sorted(part.iterdir())},
    }
    (part / "state.json").write_text(json.dumps(state), "utf-8")
    sync(part / "state.json")
    sync(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    sync(folder.parent)


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors, by `PARAMETER.NAME`, and all else as JSON holds it."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"groups": state["param_groups"], "numbers": numbers}


def _joined(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's state that `_split` took apart; pairs such as betas come back as such."""
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in settings["numbers"].items()
    }
    for key, tensor in tensors.items():
        index, name = key.split(".", maxsplit=1)
        state.setdefault(int(index), {})[name] = tensor
    groups = [
        {
            name: tuple(value) if isinstance(value, list) and name != "params" else value
            for name, value in group.items()
        }
        for group in settings["groups"]
    ]
    return {"state": state, "param_groups": groups}


def load_checkpoint(trainer: Trainer, folder: Path) -> Any:
    """Go on from a checkpoint; returns the `extra` that it was saved with. The trainer is not
    touched where it raises.

    Raises:
        RunError: there is none, it was damaged, or it is of another model.
        ConfigurationMismatchError: it was written under other options.
    """
    source = trainer.source if isinstance(trainer.source, FixedRollouts) else None
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = ["weights", "optimizer", *(["masks"] if source else [])]
        names += ["token_weights"] if source and source.weights else []
        tables = {name: _tensors(folder / f"{name}.safetensors", state) for name in names}
        options, step = state["options"], int(state["step"])
        history = [StepRecord(**record) for record in state["history"]]
        optimizer = _joined(tables["optimizer"], state["optimizer"])
        extra = state["extra"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise RunError(f"{folder} is no whole checkpoint: {first_line(error)}") from error
    _check_options(trainer, options, folder)
    weights = tables["weights"]
    mine = {name: value.shape for name, value in trainer.parameters.items()}
    if {name: value.shape for name, value in weights.items()} != mine:
        raise RunError(f"{folder} holds other parameters than the student trains")
    if source is not None:
        weighed = {name: values.numpy() for name, values in tables.get("token_weights", {}).items()}
        masks = _unpacked(source, tables["masks"], folder)
        trainer.source = replace(source, masks=masks, weights=weighed)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(weights[name])
    trainer.optimizer.load_state_dict(optimizer)
    trainer.step, trainer.history = step, history
    return extra


def _tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    if file_hash(path) != state["files"][path.name]:
        raise ValueError(f"{path.name} was altered since it was written")
    return load_file(path)


def _check_options(trainer: Trainer, options: Mapping[str, Any], folder: Path) -> None:
    mine = json.loads(json.dumps(trainer.options.identity()))
    if different := sorted(name for name in mine if mine[name] != options.get(name)):
        raise ConfigurationMismatchError(
            f"{folder} was written under other options: {', '.join(different)} differ"
        )


def _unpacked(
    source: FixedRollouts, masks: Mapping[str, Tensor], folder: Path
) -> dict[str, np.ndarray]:
    lengths = {rollout.rollout_id: len(rollout.response) for rollout in source.all_rollouts()}
    if not masks.keys() <= lengths.keys():
        raise RunError(f"{folder} holds masks of other rollouts than the run's")
    return {
        name: np.unpackbits(bits.numpy(), count=lengths[name]).astype(bool)
        for name, bits in masks.items()
    }


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, of those named `step-NNNNNN`, the last one first."""
    return sorted(folder.glob("step-[0-9]*[0-9]"), reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step under `folder`."""
    return next(iter(checkpoints(folder)), None)


def save_checkpoint(trainer: Trainer, folder: Path, extra: Any = None) -> Path:
    """Write `folder/step-NNNNNN`, then remove all but the last `KEPT`."""
    path = folder / f"step-{trainer.step:06d}"
    write_checkpoint(trainer, path, extra)
    for older in checkpoints(folder)[KEPT:]:
        shutil.rmtree(older, ignore_errors=True)
    return path
