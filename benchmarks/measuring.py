"""What the benchmarks share: interleaved rounds, medians, fresh processes, and the JSON that they
leave behind."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

Work = Mapping[str, Callable[[], object]]


def interleaved(
    work: Work, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after a warm-up of each; one after another in every
    round.

    Work on a CUDA device is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for name, run in work.items():
        start = time.perf_counter()
        _finished(run)
        print(f"warm-up {name}: {time.perf_counter() - start:.2f} s", flush=True)
    for _ in range(rounds):
        for name, run in work.items():
            start = clock()
            _finished(run)
            seconds[name].append(clock() - start)
    return seconds


def _finished(run: Callable[[], object]) -> None:
    run()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in seconds.items()}


def show(seconds: Mapping[str, list[float]], ratios: Mapping[str, float]) -> None:
    width = max(map(len, seconds))
    for name, values in seconds.items():
        print(f"{name:{width}} {median(values):9.3f} s   (fastest {min(values):.3f} s)")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")


def fresh_process(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON on the last line that a script prints, run in a process of its own."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (
            done.stderr.strip().splitlines()
            or [f"status {done.returncode}: killed, memory ran out?"]
        )[-1]
        raise SystemExit(f"{' '.join(command)}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """What timings depend on besides their settings."""
    found: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "libraries": {
            name: version(name) for name in ("torch", "transformers", "polars", "pandas")
        },
    }
    if torch := sys.modules.get(
        "torch"
    ):  # what is measured may be the work of a process that never needs it
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["device"] = torch.cuda.get_device_name()
    return found


def write_results(path: Path | None, options: argparse.Namespace, **results: Any) -> None:
    """Write a benchmark's outcome, with its settings and the machine's, where a path was given."""
    if path is None:
        return
    settings = {
        name: value if isinstance(value, int | float | list) else str(value)
        for name, value in vars(options).items()
    }
    settings.pop("out", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "machine": machine(), **results}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
