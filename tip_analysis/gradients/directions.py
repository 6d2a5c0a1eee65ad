"""Directions in parameter space, made one tensor at a time: Gaussian ones from a key, and measured
gradients.

A direction is never needed whole: a forward-mode pass asks for the part of each layer when it
reaches that layer. A Gaussian direction is therefore drawn on the way (nothing is stored), and a
gradient may lie on disk.

A Gaussian direction is a pure function of (seed, rollout_id, probe): each tensor is cut into
blocks, each block drawn by a generator of its own whose seed is a hash of that key, the parameter's
name and the block's number. So it depends neither on the batch, nor on the other parameters, nor on
the number of threads; and it is drawn in float32, so that models of different dtypes see the same
direction up to rounding. Devices have different generators, so draws do differ between a CPU and a
GPU.
"""

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 19
"""Elements drawn by one generator: large enough that seeding costs nothing, small enough to share
among threads."""


class Direction(Protocol):
    """A vector in the space of the scope's parameters, as `scale` times what `tensor` returns for
    each parameter."""

    @property
    def scale(self) -> float:
        """By which a derivative along the tensors is multiplied."""
        ...

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """The part that belongs to parameter `name`, with the shape, dtype and device of `like`."""
        ...

    def rows(self, name: str, like: Tensor, ids: Tensor) -> Tensor:
        """Rows `ids` [U] of the part of an embedding [V, D], as [U, D]: those that a sequence looks
        up."""
        ...


@dataclass(frozen=True)
class GaussianDirection:
    """Independent standard normal entries, a pure function of (seed, rollout_id, probe)."""

    seed: int
    rollout_id: str
    probe: int
    scale: float = 1.0

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """Standard normals for parameter `name`."""
        return self._draw(name, like.shape, like)

    def rows(self, name: str, like: Tensor, ids: Tensor) -> Tensor:
        """Standard normals for the rows `ids`, which must be the same set whenever one rollout asks
        for this parameter."""
        return self._draw(name, torch.Size([len(ids), *like.shape[1:]]), like)

    def _draw(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        flat = torch.empty(shape.numel(), dtype=torch.float32, device=like.device)
        key = f"{self.seed}|{self.rollout_id}|{self.probe}|{name}"
        blocks = flat.split(BLOCK) if len(flat) > BLOCK else [flat]
        workers = torch.get_num_threads() if flat.device.type == "cpu" else 1
        if workers == 1 or len(blocks) == 1:
            _fill(key, list(enumerate(blocks)))
        else:
            shares = [
                list(enumerate(blocks))[worker::workers]
                for worker in range(min(workers, len(blocks)))
            ]
            list(_pool().map(lambda share: _fill(key, share), shares))
        return flat.view(shape).to(like.dtype)


class StoredDirection:
    """A measured gradient: tensors of unit total norm, and the norm as `scale`, so that low
    precision holds them."""

    def __init__(self, tensors: Mapping[str, Tensor | Path], scale: float) -> None:
        self._tensors = tensors
        self.scale = scale

    @classmethod
    def normalised(cls, gradient: dict[str, Tensor]) -> "StoredDirection":
        """The direction of a gradient, whose tensors are divided in place."""
        parts = (part for tensor in gradient.values() for part in tensor.flatten().split(BLOCK))
        norm = math.sqrt(
            sum(float(part.double().square().sum()) for part in parts)
        )  # in blocks: no second copy in float64
        for tensor in gradient.values():
            tensor.div_(norm or 1.0)
        return cls(gradient, norm)

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """The gradient of parameter `name`, divided by `scale`."""
        stored = self._tensors[name]
        if isinstance(stored, Path):
            stored = torch.from_numpy(np.load(stored))
        return stored.to(like)

    def rows(self, name: str, like: Tensor, ids: Tensor) -> Tensor:
        """Rows `ids` of the gradient of an embedding, divided by `scale`."""
        stored = self._tensors[name]
        if isinstance(stored, Path):
            return torch.from_numpy(np.load(stored, mmap_mode="r")[ids.cpu().numpy()]).to(like)
        return stored[ids].to(like)

    def save(self, folder: Path) -> "StoredDirection":
        """Write to `folder`, whole or not at all; returns the direction that reads from there, one
        tensor at a time."""
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        part.mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(self._tensors):
            np.save(part / f"{index:05d}.npy", self._numpy(name))
        (part / "index.json").write_text(
            json.dumps({"scale": self.scale, "names": list(self._tensors)}), "utf-8"
        )
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
        return self.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "StoredDirection":
        """A direction that `save` wrote."""
        index = json.loads((folder / "index.json").read_text("utf-8"))
        return cls(
            {name: folder / f"{number:05d}.npy" for number, name in enumerate(index["names"])},
            index["scale"],
        )

    def _numpy(self, name: str) -> np.ndarray:
        stored = self._tensors[name]
        return np.load(stored) if isinstance(stored, Path) else stored.cpu().numpy()


def gaussian_directions(seed: int, rollout_id: str, num_probes: int) -> list[GaussianDirection]:
    """The probes of one rollout."""
    return [GaussianDirection(seed, rollout_id, probe) for probe in range(num_probes)]


def in_groups(
    directions: Sequence[Direction], size: int
) -> Iterator[tuple[int, Sequence[Direction]]]:
    """Directions `size` at a time, each group with the index of its first."""
    for start in range(0, len(directions), size):
        yield start, directions[start : start + size]


def stable_hash(*parts: object) -> int:
    """63 bits that depend on nothing but the parts' text."""
    text = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _fill(key: str, blocks: Sequence[tuple[int, Tensor]]) -> None:
    for number, block in blocks:
        block.normal_(generator=_generator(block.device).manual_seed(stable_hash(key, number)))


_generators = threading.local()


def _generator(device: torch.device) -> torch.Generator:
    """This thread's generator on a device, to be seeded before each use."""
    known = _generators.__dict__.setdefault("known", {})
    return (
        known.setdefault(device, torch.Generator(device=device))
        if device not in known
        else known[device]
    )


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="directions")
