"""`measure_gradients`: the gradients of a run's tokens in one call.

The command line and `import tip_analysis as tip` call it; the work is done in `stage`.
"""

from collections.abc import Sequence

from tip_analysis.analysis.measurements import prefer_measurement
from tip_analysis.core.names import Loss, LossAggregation, Method
from tip_analysis.core.run_folder import RunLike, open_run
from tip_analysis.core.stage_summary import StageSummary
from tip_analysis.gradients.run_models import scored_pair, teacher_context
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.gradients.stage import measure_run, setting_of
from tip_analysis.models.named import ModelLike


def measure_gradients(
    run: RunLike,
    *,
    losses: Sequence[Loss | str] = (Loss.REVERSE_KL, Loss.FORWARD_KL),
    method: Method | str = Method.PROBE,
    num_probes: int = 32,
    params: str = "all",
    loss_aggregation: LossAggregation | str = LossAggregation.ROLLOUT,
    seed: int = 0,
    limit: int | None = None,
    student: ModelLike | None = None,
    teacher: ModelLike | None = None,
    dtype: str = "auto",
    device: str = "auto",
    prefer: bool = False,
    overwrite: bool = False,
) -> StageSummary:
    """Measure the gradient norm of every token's own loss, and where it points (Proposition 1).

    Args:
        run: a run folder with scored tokens.
        losses: `reverse_kl`, `forward_kl`, `jsd`, `negative_logprob`.
        method: `probe` (random probes) or `exact` (one backward pass a token).
        num_probes: K, probes a rollout; the relative standard error of a squared norm is √(2/K).
        params: parameters that count: `all`, `body`, `head`, `last:N`, `lora`.
        loss_aggregation: of L: `rollout` (the mean of rollout means) or `token`.
        seed: of the probes and of the two folds of prompts.
        limit: the first so many rollouts only.
        student: the model that was scored, where it is loaded already; else it is loaded.
        teacher: likewise.
        dtype: of models that are loaded.
        device: likewise.
        prefer: record that the numbers of the run come from this measurement, where there are
            several.
        overwrite: measure again what this configuration has measured.

    Returns:
        For each loss the counts and means of what was measured.

    Raises:
        RunError: the run is not scored.
        OptionError: a model is not the one that was scored, or an option is out of its range.
        UnknownNameError: no such loss, method or aggregation.
    """
    folder = open_run(run)
    settings = GradientSettings(
        losses=tuple(losses),
        param_scope=params,
        method=method,
        num_probes=num_probes,
        seed=seed,
        loss_aggregation=loss_aggregation,
    )
    loaded = scored_pair(folder, student, teacher, dtype=dtype, device=device)
    found = measure_run(
        folder,
        student=loaded[0],
        teacher=loaded[1],
        settings=settings,
        teacher_context=teacher_context(folder),
        limit=limit,
        overwrite=overwrite,
    )
    if prefer:
        prefer_measurement(folder, setting_of(settings))
    return StageSummary(folder, f"gradients over {params}", found)
