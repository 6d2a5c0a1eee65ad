"""Regular expressions in an adapter's config, which may come from anybody: one that does not end is
refused before peft tries it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import ModelError

SECONDS = 10.0
"""Most time that all patterns of a config take on all names of a model."""
_WORKER = Path(__file__).with_name("pattern_worker.py")
_REPEATS = re.compile(r"[*+?{]")


def check_patterns(file: str, config: Any, names: Iterable[str]) -> None:
    """Refuse an adapter's config with a pattern that takes too long on a model's names.

    Args:
        file: the config's name, for the message.
        config: what it holds.
        names: of the base model's modules and weights.

    Raises:
        ModelError: names the pattern.
    """
    patterns = sorted({text for text in _texts(config) if _REPEATS.search(text)})
    if not patterns:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_WORKER)],
            input=json.dumps([patterns, sorted(names)]).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        said, fault = done.stdout, "takes too much memory" if done.returncode else None
    except subprocess.TimeoutExpired as late:
        said, fault = late.stdout, f"does not end within {SECONDS:g} s"
    if fault is not None:
        tried = patterns[int((said or b"0").split()[-1])]
        raise ModelError(
            f"{file}: the pattern {tried!r:.80} {fault} on the names of its base model"
        )


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *_texts(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
