"""The `gradients` stage: rollouts in, `gradients/*.parquet` (`schema.GradientTable`) out, shard by
shard and loss by loss.

Each loss of a measurement has its own record, so that a later run with another loss adds to what is
there. ∇L and ∇J are computed again when a stage goes on after an interruption; a rollout's numbers
depend on neither shard nor batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from tip_analysis.analysis.measurements import Preference, settle_preference
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.names import Loss, Method, StopTokens, TeacherContext
from tip_analysis.core.progress import track
from tip_analysis.core.run_folder import Run, Stage
from tip_analysis.core.table_files import scan
from tip_analysis.gradients.measuring import model_pair, stream_gradients
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.models.loading import LanguageModel
from tip_analysis.rollouts.encoded import Rollout, rollouts_in_memory
from tip_analysis.rollouts.teacher_prompts import prepare_rollouts

ROLLOUTS_PER_SHARD = 16


def measure_run(
    run: Run,
    *,
    student: LanguageModel,
    teacher: LanguageModel,
    settings: GradientSettings,
    teacher_context: TeacherContext | str = TeacherContext.NONE,
    limit: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the gradient of every counted token of a run's rollouts; what is measured already is
    kept.

    Args:
        run: a run folder with rollouts.
        student: P_S, whose parameters are meant.
        teacher: P_T.
        settings: losses, parameters, method, probes, seed.
        teacher_context: what the teacher sees besides the prompt, as for scoring.
        limit: the first rollouts only; they are also the token set of L.
        overwrite: measure again.

    Returns:
        Counts of the rows, by loss.

    Raises:
        ConfigurationMismatchError: the same measurement was made on other rollouts or another
            number of them.
        OptionError: `limit` is below 1, an option is not valid, or the run was scored with merged
            stop tokens, whose loss is another than the one that is measured here.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"--limit must be at least 1, found {limit}")
    _check_stop_tokens(run)
    rollouts = prepare_rollouts(run, student, teacher, teacher_context)
    inputs = _counted(run, rollouts if limit is None else rollouts.head(limit))
    shown = {
        "student": student.describe(),
        "teacher": teacher.describe(),
        "teacher_context": teacher_context,
        "limit": limit,
    }
    settle_preference(run, setting_of(settings))
    stages = {
        loss: _begin(run, loss, settings, shown, overwrite=overwrite) for loss in settings.losses
    }
    shards = [
        inputs[start : start + ROLLOUTS_PER_SHARD]
        for start in range(0, len(inputs), ROLLOUTS_PER_SHARD)
    ]
    missing = {loss: stage.missing(len(shards)) for loss, stage in stages.items()}
    losses = tuple(loss for loss in settings.losses if missing[loss])
    if losses:
        pair, chosen = model_pair(student, teacher), replace(settings, losses=losses)
        _measure(shards, inputs, stages, missing, pair, chosen)
    return {loss: stage.finish(**_summary(stage, len(shards))) for loss, stage in stages.items()}


def _counted(run: Run, rollouts: pl.DataFrame) -> list[Rollout]:
    """The rollouts with a token that counts."""
    inputs = [rollout for rollout in rollouts_in_memory(rollouts) if rollout.num_tokens]
    if not inputs:
        raise RunError(f"{run.path}: no rollout has a token that counts")
    return inputs


def _check_stop_tokens(run: Run) -> None:
    scored = run.stages().get("score", {}).get("config", {}).get("stop_tokens")
    if scored == StopTokens.MERGED:
        raise OptionError(
            f"{run.path} was scored with --stop-tokens merged, but gradients are those of the loss"
            " with declared stop tokens; score the rollouts with --stop-tokens declared to measure"
            " them"
        )


def _measure(
    shards: Sequence[Sequence[Rollout]],
    inputs: Sequence[Rollout],
    stages: dict[str, Stage],
    missing: dict[str, list[int]],
    pair: Any,
    settings: GradientSettings,
) -> None:
    """Measure the rollouts of every shard that some loss lacks."""
    wanted = sorted({index for loss in settings.losses for index in missing[loss]})
    size = ROLLOUTS_PER_SHARD
    only = [index * size + place for index in wanted for place in range(len(shards[index]))]
    bar = track("gradients", len(inputs), done=len(inputs) - len(only))
    with TemporaryDirectory(prefix="tip-analysis-") as folder, bar as advance:
        frames = stream_gradients(pair, inputs, settings, folder=Path(folder), only=only)
        for index in wanted:
            parts = []
            for rollout in shards[index]:
                parts.append(next(frames))
                advance(1, tokens=rollout.num_tokens)
            rows = pl.concat(parts)
            for loss in settings.losses:
                if index in missing[loss]:
                    stages[loss].write(index, rows.filter(pl.col("loss") == str(loss)))


def _begin(
    run: Run,
    loss: Loss | str,
    settings: GradientSettings,
    shown: dict[str, Any],
    *,
    overwrite: bool,
) -> Stage:
    """The record of one loss of a measurement; `shown` says which models saw what."""
    key = {"loss": str(loss), **setting_of(settings).given}
    token_set = {
        "loss_aggregation": settings.loss_aggregation,
        "tokens_per_rollout": settings.tokens_per_rollout,
    }
    inputs = {"rollouts": run.table_hash("rollouts")}
    return run.begin(
        "gradients", key=key, config=key | shown | token_set, inputs=inputs, overwrite=overwrite
    )


def setting_of(settings: GradientSettings) -> Preference:
    """What tells a measurement from others of the same loss."""
    num_probes = settings.num_probes if settings.method is Method.PROBE else 0
    return Preference(settings.param_scope, str(settings.method), num_probes, settings.seed)


def _summary(stage: Stage, num_shards: int) -> dict[str, Any]:
    rows = scan([stage.path(index) for index in range(num_shards)]).collect()
    return {
        "num_tokens": rows.height,
        "num_rollouts": rows["rollout_id"].n_unique(),
        "mean_grad_norm_sq": rows["grad_norm_sq"].mean(),
    }
