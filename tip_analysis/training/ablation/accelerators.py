"""Accelerators that a plan counts hours of, by name, and the machine at hand.

Rates are the makers' own, for dense bfloat16 products with float32 sums; docs/reference/plans.md
names the sources. What a run attains of them is an assumption (`UTILIZATION`), said in every plan.
No torch here: what a GPU at hand is called is asked of its driver's tool.
"""

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tip_analysis.core.errors import UnknownNameError

UTILIZATION = 0.35
"""Share of either rate that a run is assumed to attain."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or a whole machine without one."""

    name: str = "H100 80 GB"
    memory_bytes: float = 80e9
    peak_flops: float = 989e12
    """Dense bfloat16 operations a second."""
    bandwidth: float = 3.35e12
    """Bytes a second of its memory."""
    utilization: float = UTILIZATION
    """Share of either that a run attains."""


GPU_KINDS: dict[str, Device] = {
    "h100": Device("H100 SXM 80 GB", 80e9, 989e12, 3.35e12),
    "h200": Device("H200 SXM 141 GB", 141e9, 989e12, 4.8e12),
    "b200": Device("B200 180 GB", 180e9, 2250e12, 7.7e12),
    "a100-80": Device("A100 SXM 80 GB", 80e9, 312e12, 2.039e12),
    "a100-40": Device("A100 SXM 40 GB", 40e9, 312e12, 1.555e12),
    "l40s": Device("L40S 48 GB", 48e9, 362e12, 0.864e12),
    "a10": Device("A10 24 GB", 24e9, 125e12, 0.6e12),
    "l4": Device("L4 24 GB", 24e9, 121e12, 0.3e12),
    "rtx-4090": Device("RTX 4090 24 GB", 24e9, 165e12, 1.008e12),
    "mi300x": Device("MI300X 192 GB", 192e9, 1307e12, 5.3e12),
}
"""Every kind by the name that is typed."""

DEFAULT_GPU_KIND = "h100"
_NAMES_OF_DRIVERS = {
    "h200": "h200",
    "b200": "b200",
    "h100": "h100",
    "a100-sxm4-40": "a100-40",
    "a100-pcie-40": "a100-40",
    "a100": "a100-80",
    "l40s": "l40s",
    "a10": "a10",
    "l4": "l4",
    "rtx 4090": "rtx-4090",
    "mi300x": "mi300x",
}


@dataclass(frozen=True)
class Machine:
    """A machine that a study may run on."""

    device: Device
    num_devices: int
    disk_bytes: float
    """Free where the run folder is."""
    how: str
    """Where the rates come from."""


def gpu_kind(name: str) -> Device:
    """The accelerator of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in GPU_KINDS:
        raise UnknownNameError("kind of GPU", name, GPU_KINDS)
    return GPU_KINDS[name]


def this_machine(folder: str | Path = ".") -> Machine:
    """The machine at hand: its GPUs if the driver's tool names a known kind, else its CPU, whose
    rates are measured in a fraction of a second."""
    free = float(shutil.disk_usage(_existing(Path(folder))).free)
    names = _gpu_names()
    for part, kind in _NAMES_OF_DRIVERS.items():
        same = [name for name in names if part in name.lower()]
        if same:
            return Machine(GPU_KINDS[kind], len(same), free, "the maker's rates")
    cores = psutil.cpu_count(logical=True) or 1
    memory = float(psutil.virtual_memory().total)
    device = Device(f"CPU of {cores} cores", memory, _product_rate(), _copy_rate())
    return Machine(device, 1, free, "rates measured now, in float32")


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _gpu_names() -> list[str]:
    """What the driver's tool lists; nothing where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _product_rate(size: int = 512) -> float:
    """Operations a second of a float32 matrix product, the best of a few."""
    a = np.ones((size, size), dtype=np.float32)
    return 2.0 * size**3 / _shortest(lambda: a @ a)


def _copy_rate(num_bytes: int = 2**25) -> float:
    """Bytes a second that memory is read at, the best of a few copies."""
    source = np.ones(num_bytes // 8)
    target = np.empty_like(source)
    return 2.0 * num_bytes / _shortest(lambda: np.copyto(target, source))


def _shortest(work: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)
