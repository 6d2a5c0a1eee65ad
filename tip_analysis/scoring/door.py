"""`score`: every token of a run's rollouts under student and teacher, in one call.

The command line and `import tip_analysis as tip` call it. Both models at once (`stage`), first the
teacher and then the student (`teacher_states`), or shared out among Ray actors (`ray_engine`): the
token table is the same.
"""

from dataclasses import dataclass
from typing import Any

from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.names import (
    ScoringEngine,
    ScoringPhase,
    StopTokens,
    TeacherContext,
    TeacherStoreForm,
)
from tip_analysis.core.record import model_name
from tip_analysis.core.run_folder import Run, RunLike, open_run
from tip_analysis.core.stage_summary import StageSummary
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.head_alone import head_rows, load_head
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.named import ModelLike, as_model, as_pair, name_of
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.engines.completions import CompletionsClient
from tip_analysis.rollouts.engines.settings import EngineSettings, is_address
from tip_analysis.scoring.served_teacher import ServedTeacher
from tip_analysis.scoring.stage import Scorer, TeacherSource, score_rollouts
from tip_analysis.scoring.teacher_states import TeacherStore, store_teacher_states


def score(
    run: RunLike,
    *,
    teacher: ModelLike,
    student: ModelLike | None = None,
    teacher_context: TeacherContext | str = TeacherContext.NONE,
    top_k: int = 5,
    stop_tokens: StopTokens | str = StopTokens.DECLARED,
    shard_size: int = 64,
    part: tuple[int, int] = (0, 1),
    phase: ScoringPhase | str = ScoringPhase.BOTH,
    teacher_store: TeacherStoreForm | str = TeacherStoreForm.HIDDEN,
    store_k: int = 64,
    server_concurrency: int = 16,
    server_timeout: float = 600.0,
    discard_teacher_states: bool = False,
    engine: ScoringEngine | str = ScoringEngine.LOCAL,
    ray_workers: int | None = None,
    token_budget: int = 16384,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> StageSummary:
    """Score every response token with student and teacher; shards that are whole are kept.

    Args:
        run: a run folder with rollouts.
        teacher: loaded, or named as a student is; or `http://HOST:PORT#MODEL`, a model behind a
            server: divergences become lower bounds, from its top tokens.
        student: by default the model that wrote the rollouts.
        teacher_context: what the teacher sees besides the prompt: `none` or `solution`.
        top_k: how many of each model's most likely tokens are kept.
        stop_tokens: `declared`, or `merged`: those of both models count as one token.
        shard_size: rollouts a shard.
        part: (i, n): every n-th shard, from the i-th on, as one of n jobs.
        phase: `both` models at once; or first `teacher`, whose states are stored, then `student`.
        teacher_store: what phase `teacher` stores: `hidden` states, or `topk` tokens.
        store_k: tokens that `topk` keeps, or that a server is asked for.
        server_concurrency: requests that a server is given at once.
        server_timeout: seconds that one answer may take.
        discard_teacher_states: in phase `student`, delete them once every token is scored.
        engine: `local`, or `ray` actors that share the work.
        ray_workers: actors; by default one for each GPU.
        token_budget: tokens a batch; halves itself when memory runs out.
        dtype: of models that are named.
        device: likewise.
        overwrite: start afresh.

    Example:
        tip.score("runs/mine", teacher="arithmetic-teacher")

    Raises:
        RunError: there are no rollouts, or they do not say which student wrote them.
        ConfigurationMismatchError: the folder was scored with another configuration.
        OptionError: options that exclude each other.
        UnknownNameError: no such teacher context, phase, store or engine.
    """
    engine, phase = ScoringEngine(engine), ScoringPhase(phase)
    form = TeacherStoreForm(teacher_store)
    folder = open_run(run)
    folder.rollouts()
    served = _is_address(teacher)
    _check(engine, phase, part, served=served)
    job = _Job(
        folder,
        recorded_student(folder) if student is None else student,
        teacher,
        TeacherContext(teacher_context),
        top_k,
        StopTokens(stop_tokens),
        shard_size,
        part,
        token_budget,
        dtype,
        device,
        overwrite,
    )
    if served:
        settings = EngineSettings(concurrency=server_concurrency, timeout_s=server_timeout)
        return StageSummary(folder, "tokens", _with_server(job, settings, store_k))
    if engine is ScoringEngine.RAY:
        return StageSummary(folder, "tokens", _with_ray(job, ray_workers))
    if phase is ScoringPhase.TEACHER:
        found = _teacher_phase(job, form, store_k)
        return StageSummary(folder, "teacher's states", found)
    if phase is ScoringPhase.STUDENT:
        return StageSummary(folder, "tokens", _student_phase(job, discard_teacher_states))
    pair = as_pair(job.student, job.teacher, dtype=dtype, device=device)
    return StageSummary(folder, "tokens", _score(job, *pair))


def recorded_student(run: Run) -> str:
    """The model that a run's rollouts name as their author.

    Raises:
        RunError: they name none.
    """
    config = run.stages().get("rollout", {}).get("config", {})
    if "student" not in config:
        raise RunError(
            f"{run.path} does not say which student wrote its rollouts; name it with --student"
        )
    return str(model_name(config["student"]))


@dataclass(frozen=True)
class _Job:
    """What all ways of scoring share."""

    run: Run
    student: ModelLike
    teacher: ModelLike
    teacher_context: TeacherContext
    top_k: int
    stop_tokens: StopTokens
    shard_size: int
    part: tuple[int, int]
    token_budget: int
    dtype: str
    device: str
    overwrite: bool


def _is_address(teacher: ModelLike) -> bool:
    return not isinstance(teacher, LanguageModel) and is_address(str(teacher))


def _check(
    engine: ScoringEngine, phase: ScoringPhase, part: tuple[int, int], *, served: bool
) -> None:
    if served and (engine is ScoringEngine.RAY or phase is not ScoringPhase.BOTH):
        raise OptionError(
            "a teacher behind a server goes with --engine local and --phase both: the server does"
            " the teacher's part; --shard i/n spreads the rest over array jobs"
        )
    if engine is not ScoringEngine.RAY:
        return
    if part != (0, 1):
        raise OptionError(
            "--shard is for array jobs of one process each; --engine ray shares the shards out"
            " itself"
        )
    if phase is not ScoringPhase.BOTH:
        raise OptionError(
            "--phase goes with --engine local; --shard i/n spreads a phase over array jobs"
        )


def _score(
    job: _Job, student: LanguageModel, teacher: TokenModel, stored: TeacherSource | None = None
) -> dict[str, Any]:
    """In this process, with the teacher's body or with its stored states."""
    return score_rollouts(
        job.run,
        Scorer(
            student, teacher, TokenBudget(job.token_budget), job.top_k, stop_tokens=job.stop_tokens
        ),
        teacher_context=job.teacher_context,
        shard_size=job.shard_size,
        part=job.part,
        overwrite=job.overwrite,
        stored=stored,
    )


def _with_server(job: _Job, settings: EngineSettings, k: int) -> dict[str, Any]:
    """The student here, the teacher behind a server."""
    client = CompletionsClient.at(str(job.teacher), settings, "--teacher")
    try:
        student = as_model(job.student, dtype=job.dtype, device=job.device)
        teacher = ServedTeacher(client, student, k)
        return _score(job, student, teacher.model, teacher)
    finally:
        client.close()


def _student_phase(job: _Job, discard: bool) -> dict[str, Any]:
    """The second of two phases: of the teacher, its head and its stored states."""
    stored, name = TeacherStore(job.run), name_of(job.teacher)
    stored.require(teacher=name, teacher_context=job.teacher_context, shard_size=job.shard_size)
    head = load_head(name, dtype=stored.teacher["dtype"], device=job.device)
    student = as_model(job.student, dtype=job.dtype, device=job.device)
    found = _score(job, student, head, stored)
    if discard and "num_shards_missing" not in found:
        stored.discard()
    return found


def _teacher_phase(job: _Job, form: TeacherStoreForm, store_k: int) -> dict[str, Any]:
    """The first of two phases: the teacher alone, whose states are stored."""
    return store_teacher_states(
        job.run,
        as_model(job.teacher, dtype=job.dtype, device=job.device),
        form=form,
        store_k=store_k,
        vocab_size=head_rows(name_of(job.student)),
        teacher_context=job.teacher_context,
        shard_size=job.shard_size,
        budget=TokenBudget(job.token_budget),
        part=job.part,
        overwrite=job.overwrite,
    )


def _with_ray(job: _Job, num_workers: int | None) -> dict[str, Any]:
    """Shared out among actors, each of which loads the models by name."""
    from tip_analysis.scoring.ray_engine import ScoringJob, score_with_ray

    if isinstance(job.student, LanguageModel) or isinstance(job.teacher, LanguageModel):
        raise OptionError("engine ray: name the models; every actor loads its own")
    ray_job = ScoringJob(
        run=str(job.run.path.resolve()),
        student=str(job.student),
        teacher=str(job.teacher),
        teacher_context=job.teacher_context,
        shard_size=job.shard_size,
        top_k=job.top_k,
        stop_tokens=job.stop_tokens,
        token_budget=job.token_budget,
        dtype=job.dtype,
        device=job.device,
        overwrite=job.overwrite,
    )
    return score_with_ray(ray_job, num_workers=num_workers)
