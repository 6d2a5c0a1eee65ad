"""Peak memory of a stretch of work: of the device on a GPU, of the process's resident set
elsewhere.

The resident set's peak is that of the operating system, which Linux can reset
(`/proc/self/clear_refs`), so that one process can measure one arm after another. Where it cannot,
the peak is that of the process's whole life.
"""

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Begin a stretch of work."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5", "ascii")
    except OSError:
        return


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory since `reset_peak_memory`: allocated on the device, or resident in the
    process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if (found := _from_status("VmHWM")) is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes(device: torch.device) -> int:
    """Memory in use now: allocated on the device, or resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if (found := _from_status("VmRSS")) is not None:
        return found
    return peak_memory_bytes(device)


def _from_status(field: str) -> int | None:
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text("ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
