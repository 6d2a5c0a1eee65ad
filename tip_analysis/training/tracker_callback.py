"""A tracker for trainers of transformers and TRL that is offline by default, like `ablate`'s."""

from typing import Any

from transformers import TrainerCallback

from tip_analysis.core.names import TrackerName
from tip_analysis.training.trackers import NOTHING, Tracker, open_tracker, require_tracker


class TrackerCallback(TrainerCallback):
    """Tells a tracker of all that a trainer logs, from its first process.

    Example:
        TIPDistillationTrainer(..., callbacks=[TrackerCallback("trackio", project="mine")])
    """

    def __init__(
        self, tracker: TrackerName | str, *, project: str = "tip", series: str = ""
    ) -> None:
        """Begin a series when training begins.

        Args:
            tracker: `trackio`, `wandb` or `tensorboard`; files go to `trackers/` of the trainer's
                output folder.
            project: what the series is part of.
            series: its name; by default the trainer's run name or that of its output folder.

        Raises:
            UnknownNameError: there is no such tracker.
            MissingExtraError: its package is not installed.
        """
        self._name = require_tracker(tracker)
        self._project, self._series = project, series
        self._tracker: Tracker = NOTHING

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the series."""
        if not state.is_world_process_zero:
            return
        folder = args.output_dir
        series = self._series or args.run_name or str(folder).rstrip("/").rpartition("/")[2]
        self._tracker = open_tracker(
            self._name,
            f"{folder}/trackers",
            project=self._project,
            series=series.replace("/", "-") or "training",
            config=args.to_sanitized_dict(),
        )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Hand on the numbers of a log entry."""
        numbers = {
            name: value for name, value in (logs or {}).items() if isinstance(value, int | float)
        }
        self._tracker.log(numbers, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the series."""
        self._tracker.close()
