"""Trackers: a training's figures, step by step, for trackio, Weights & Biases or TensorBoard.

Nothing leaves the machine unless its user has told the tracker so: wandb is `offline` where
WANDB_MODE does not say otherwise, trackio keeps its local database where no Space is set, and
TensorBoard knows nothing but files. Files go to `trackers/` of the run folder (trackio's to
`TRACKIO_DIR`, where `trackio show` looks). They are logs that grow: no stage reads them, and what a
tracker holds of an arm that was killed is told again from its last checkpoint on.

A tracker that fails never ends a training: it is left out from then on, with a warning.
"""

import io
import logging
import math
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from tip_analysis.core.names import TrackerName
from tip_analysis.core.optional import require

logger = logging.getLogger(__name__)

Values = Mapping[str, float]


class Tracker(Protocol):
    """One series of figures, such as an arm under one seed."""

    def log(self, values: Values, step: int) -> None:
        """Take in the figures of a step."""
        ...

    def close(self) -> None:
        """End the series; everything is on the disk then."""
        ...


class _TensorBoard:
    def __init__(self, folder: Path, project: str, series: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / series))
        self._writer.add_text("config", "\n\n".join(f"{k}: {v}" for k, v in config.items()))

    def log(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, project: str, series: str, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=series,
            dir=str(folder),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )

    def log(self, values: Values, step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, project: str, series: str, config: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore

        with redirect_stdout(io.StringIO()):  # it says a good deal
            self._run = trackio.init(
                project=project, name=series, config=dict(config), resume="allow", embed=False
            )

    def log(self, values: Values, step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


_KINDS: dict[TrackerName, Any] = {
    TrackerName.TENSORBOARD: _TensorBoard,
    TrackerName.WANDB: _Wandb,
    TrackerName.TRACKIO: _Trackio,
}


class _Guarded:
    """A tracker whose failure is a warning; infinite values and NaN are left out."""

    def __init__(self, name: TrackerName, begin: Any) -> None:
        self._name = name
        self._inner: Tracker | None = None
        self._inner = self._tried(begin)

    def log(self, values: Values, step: int) -> None:
        inner = self._inner
        known = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if inner is not None:
            self._tried(lambda: inner.log(known, step))

    def close(self) -> None:
        inner = self._inner
        if inner is not None:
            self._tried(inner.close)
        self._inner = None

    def _tried(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            logger.warning(
                "%s fails (%s: %s); training goes on without it",
                self._name,
                type(error).__name__,
                error,
            )
            self._inner = None
            return None


class _Nothing:
    def log(self, values: Values, step: int) -> None:
        pass

    def close(self) -> None:
        pass


NOTHING: Tracker = _Nothing()
"""What is told nothing."""


def require_tracker(name: TrackerName | str) -> TrackerName:
    """The tracker of this name, whose package is there.

    Raises:
        UnknownNameError: there is no such tracker.
        MissingExtraError: its package is not installed.
    """
    tracker = TrackerName(name)
    if tracker is not TrackerName.NONE:
        require(tracker.value, f"--tracker {tracker}")
    return tracker


def open_tracker(
    name: TrackerName | str,
    folder: str | os.PathLike[str],
    *,
    project: str,
    series: str,
    config: Mapping[str, Any],
) -> Tracker:
    """Begin a series.

    Args:
        name: `trackio`, `wandb`, `tensorboard`, or `none`.
        folder: where files go.
        project: what the series is part of.
        series: its name; of TensorBoard also that of its folder.
        config: what the series stands for.

    Raises:
        UnknownNameError: there is no such tracker.
        MissingExtraError: its package is not installed.
    """
    tracker = require_tracker(name)
    if tracker is TrackerName.NONE:
        return NOTHING
    kind = _KINDS[tracker]
    return _Guarded(tracker, lambda: kind(Path(folder), project, series, config))
