"""`track`: the run's own contexts scored again with the student at each kept step of an arm.

Reads the rollouts and the weights that `ablate --keep-every` left in `checkpoints/`; writes
`trajectories/*.parquet` (`instrument_tables.TrajectoryTable`), one shard a step. Contexts are
fixed: what changes from step to step is the student alone. `analysis.trajectories` says what became
of each token.
"""

from typing import Any

import polars as pl

from tip_analysis.analysis.arms import Arm
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.instrument_tables import TrajectoryTable
from tip_analysis.core.names import TeacherContext
from tip_analysis.core.progress import track as progress
from tip_analysis.core.record import Record, model_name
from tip_analysis.core.run_folder import Run, RunLike, Stage, open_run
from tip_analysis.core.table_files import read
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.named import ModelLike, as_pair
from tip_analysis.rollouts.teacher_prompts import prepare_rollouts
from tip_analysis.scoring.scorer import Scorer
from tip_analysis.training.kept_weights import arm_options, kept_arm, steps_on_record, student_at

STATISTICS = ("student_entropy", "student_entropy_norm", "reverse_kl", "forward_kl")


def track(
    run: RunLike,
    *,
    arm: str | Arm,
    seed: int = 0,
    limit: int | None = None,
    student: ModelLike | None = None,
    teacher: ModelLike | None = None,
    token_budget: int = 16384,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> pl.DataFrame:
    """Score the run's rollouts with the student at every kept step of an arm.

    Args:
        run: a run folder with rollouts, and with an arm that `ablate --keep-every` trained.
        arm: as it is spelled: `q3:0.1`, `all`.
        seed: of the arm.
        limit: the first so many rollouts only.
        student: the arm's student as it was before training, where it is loaded already.
        teacher: the arm's teacher, likewise.
        token_budget: tokens a batch; halves itself when memory runs out.
        dtype: of models that are loaded.
        device: likewise.
        overwrite: score again what was scored already.

    Returns:
        Rows of `TrajectoryTable`; `trajectory_flow`, `q3_survival` and `realised_falls` read them.

    Raises:
        RunError: no weights of the arm were kept, or a file was altered.
        OptionError: the arm is not spelled as one, or `limit` is below 1.

    Example:
        tip.track("runs/mine", arm="q3:0.1")
    """
    if limit is not None and limit < 1:
        raise OptionError(f"--limit must be at least 1, found {limit}")
    folder, named = open_run(run), Arm.parse(arm) if isinstance(arm, str) else arm
    kept, config = kept_arm(folder, named, seed)
    arm_key = str(kept.config["arm_key"])
    steps = steps_on_record(kept)
    stage = folder.begin(
        "track",
        key={"arm_key": arm_key},
        config={
            "arm_key": arm_key,
            "rule": named.rule,
            "retention_ratio": named.retention_ratio,
            "seed": seed,
            "limit": limit,
            "teacher_context": _context(folder),
        },
        inputs={"rollouts": folder.table_hash("rollouts")},
        overwrite=overwrite,
    )
    missing = [step for step in steps if not stage.is_whole(step)]
    if missing:
        roles = _role("student", student, config), _role("teacher", teacher, config)
        pair = as_pair(*roles, dtype=dtype, device=device)
        facts = {
            "arm_key": arm_key,
            "rule": named.rule,
            "retention_ratio": named.retention_ratio,
            "seed": seed,
        }
        with progress("tracking", len(steps), done=len(steps) - len(missing), unit="steps") as on:
            for step in missing:
                rows = _score(folder, pair, kept, step, config, limit, token_budget)
                stage.write(step, _table(rows, facts | {"step": step}))
                on(1)
    every = pl.concat([read(stage.path(step)) for step in steps])
    stage.finish(steps=steps, num_tokens=every.height // max(1, len(steps)))
    return every


def _context(run: Run) -> str:
    scored = run.stages().get("score", {}).get("config", {})
    return str(scored.get("teacher_context", TeacherContext.NONE))


def _role(role: str, given: ModelLike | None, config: Record) -> ModelLike:
    name = model_name(config.get(role))
    if given is None and name is None:
        raise RunError(f"the arm's record does not name its {role}: give the model")
    return given if given is not None else str(name)


def _score(
    run: Run,
    pair: tuple[LanguageModel, LanguageModel],
    kept: Stage,
    step: int,
    config: Record,
    limit: int | None,
    token_budget: int,
) -> pl.DataFrame:
    """The token table of the fixed contexts under the student of a step."""
    rollouts = prepare_rollouts(run, *pair, _context(run))
    rollouts = rollouts if limit is None else rollouts.head(limit)
    student = student_at(pair[0], kept, step, arm_options(config))
    return Scorer(student, pair[1], TokenBudget(token_budget)).token_table(rollouts)


def _table(tokens: pl.DataFrame, facts: dict[str, Any]) -> pl.DataFrame:
    columns = [pl.lit(value).alias(name) for name, value in facts.items()]
    schema = polars_schema(TrajectoryTable)
    kept = tokens.filter("loss_mask").with_columns(columns)
    return kept.select(pl.col(name).cast(dtype) for name, dtype in schema.items())
