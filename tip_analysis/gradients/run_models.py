"""The models and rollouts that gradients of a run are made of: those that were scored."""

from collections.abc import Sequence

import polars as pl

from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.names import TeacherContext
from tip_analysis.core.record import Record, model_name
from tip_analysis.core.run_folder import Run
from tip_analysis.gradients.loss_gradients import Pair
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.named import ModelLike, as_pair, name_of
from tip_analysis.rollouts.encoded import Rollout, rollouts_in_memory
from tip_analysis.rollouts.teacher_prompts import prepare_rollouts


def scored_config(run: Run) -> Record:
    """What the token table was made with.

    Raises:
        RunError: the run is not scored.
    """
    scored = run.stages().get("score", {}).get("config")
    if scored is None:
        raise RunError(
            f"{run.path} is not scored yet; `tip-analysis score {run.path} --teacher MODEL`"
            " comes first"
        )
    return scored


def scored_pair(
    run: Run, student: ModelLike | None, teacher: ModelLike | None, *, dtype: str, device: str
) -> tuple[LanguageModel, LanguageModel]:
    """Student and teacher as the tokens were scored with them, loaded unless they are given.

    Raises:
        RunError: the run is not scored.
        OptionError: a model that is given is another one.
    """
    scored = scored_config(run)
    named = scored_model("student", student, scored), scored_model("teacher", teacher, scored)
    return as_pair(*named, dtype=dtype, device=device)


def scored_model(role: str, given: ModelLike | None, scored: Record) -> ModelLike:
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


def teacher_context(run: Run) -> str:
    """What the teacher saw besides the prompt when the tokens were scored."""
    return scored_config(run).get("teacher_context", TeacherContext.NONE)


def measured_rollouts(run: Run, pair: Pair, rollout_ids: Sequence[str]) -> list[Rollout]:
    """Those of a run's rollouts, with the teacher's prompts, in the order of the run.

    Raises:
        VocabularyMismatchError, ContextLengthError: as `prepare_rollouts`.
    """
    assert pair.teacher is not None  # a scored pair has both
    table = prepare_rollouts(run, pair.student, pair.teacher, teacher_context(run))
    kept = table.filter(pl.col("rollout_id").is_in(list(rollout_ids)))
    return [rollout for rollout in rollouts_in_memory(kept) if rollout.num_tokens]
