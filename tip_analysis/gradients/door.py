"""`measure_gradients`: the gradients of a run's tokens in one call.

The command line and `import tip_analysis as tip` call it; the work is done in `stage`.
"""

from collections.abc import Sequence
from typing import Any

from tip_analysis.analysis.measurements import prefer_measurement
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.names import Loss, LossAggregation, Method, TeacherContext
from tip_analysis.core.record import model_name
from tip_analysis.core.run_folder import Run, RunLike, open_run
from tip_analysis.core.stage_summary import StageSummary
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.gradients.stage import measure_run, setting_of
from tip_analysis.models.named import ModelLike, as_pair, name_of


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
    scored = _scoring_of(folder)
    models = _scored_model("student", student, scored), _scored_model("teacher", teacher, scored)
    loaded = as_pair(*models, dtype=dtype, device=device)
    pair = {"student": loaded[0], "teacher": loaded[1]}
    context = scored.get("teacher_context", TeacherContext.NONE)
    how: dict[str, Any] = {"teacher_context": context, "limit": limit, "overwrite": overwrite}
    found = measure_run(folder, settings=settings, **pair, **how)
    if prefer:
        prefer_measurement(folder, setting_of(settings))
    return StageSummary(folder, f"gradients over {params}", found)


def _scoring_of(folder: Run) -> dict[str, Any]:
    """How a run was scored."""
    scored = folder.stages().get("score", {}).get("config")
    if scored is None:
        raise RunError(
            f"{folder.path} is not scored yet; `tip-analysis score {folder.path} --teacher MODEL`"
            " comes first"
        )
    return scored


def _scored_model(role: str, given: ModelLike | None, scored: dict) -> ModelLike:
    """The model of a role that the tokens were scored with; any other is refused."""
    name = model_name(scored.get(role))
    if name is None:
        raise OptionError(f"the run does not say which {role} it was scored with: score it again")
    if given is not None and name_of(given) != name:
        raise OptionError(
            f"{role}: the tokens were scored with {name}, found {name_of(given)}; score a run"
            " with it first"
        )
    return name if given is None else given
