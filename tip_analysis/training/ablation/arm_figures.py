"""What a tracker is told of an arm: of each step, and of each evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from tip_analysis.core.names import TrackerName
from tip_analysis.core.run_folder import Run
from tip_analysis.training.trackers import Tracker, open_tracker
from tip_analysis.training.trainer import StepRecord

_EVALUATED = ("accuracy", "accuracy_se", "best_at_k", "heldout_reverse_kl", "drift_reverse_kl")


def open_arm_tracker(
    tracker: TrackerName | str, run: Run, series: str, config: Mapping[str, Any]
) -> Tracker:
    """Begin the series of an arm; the project has the run folder's name.

    Args:
        tracker: which one, or none.
        run: where the arm belongs; files go to its `trackers/`.
        series: the arm's name.
        config: what decides its numbers.
    """
    return open_tracker(
        tracker,
        run.path / "trackers",
        project=run.path.resolve().name,
        series=quote(series.replace(" ", "-"), safe="~"),
        config=config,
    )


def step_figures(record: StepRecord) -> dict[str, float]:
    """What a tracker is told of a step: loss and optimizer, and what its tokens are like where
    that was recorded (`TrainingOptions.dynamics_every`)."""
    observed = {name: v for name, v in (record.observed or {}).items() if v is not None}
    return {
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "train/tokens_seen": float(record.tokens_seen),
        "train/tokens_trained": float(record.tokens_trained),
        "train/step_time_s": record.time_s,
        **{f"tip/{name}": value for name, value in observed.items()},
    }


def evaluation_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a tracker is told of an evaluation, by benchmark."""
    return {
        f"evaluation/{row['benchmark']}/{name}": row[name]
        for row in rows
        for name in _EVALUATED
        if row[name] is not None
    }
