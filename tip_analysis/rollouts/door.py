"""`rollout` and `import_run`: a run folder's rollouts in one call, from the names of things.

The command line and `import tip_analysis as tip` call these; the work is done in `stage`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import OnBadRow, OnRewrite, SamplingEngine
from tip_analysis.core.run_folder import RunLike, create_run
from tip_analysis.core.stage_summary import StageSummary
from tip_analysis.models.loading import load_tokenizer, tokenizer_fingerprint
from tip_analysis.models.named import ModelLike
from tip_analysis.rollouts.bad_rows import BadRows
from tip_analysis.rollouts.engines.opening import EngineLike, Loading, opened
from tip_analysis.rollouts.environments.episodes import Limits
from tip_analysis.rollouts.environments.registry import EnvironmentSource, resolve_environment
from tip_analysis.rollouts.environments.stage import sample_trajectories
from tip_analysis.rollouts.importers.formats import import_rollouts
from tip_analysis.rollouts.prompts import Prompt, read_prompts, usable_prompts
from tip_analysis.rollouts.rendering import resolve_template
from tip_analysis.rollouts.row_files import Row
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts, store_imported

PromptsLike: TypeAlias = str | Path | Sequence[Prompt | Mapping[str, Any]]
"""A file or hub dataset, or the prompts themselves: `Prompt`s, or rows as such a file has them."""


def rollout(
    run: RunLike,
    *,
    student: ModelLike,
    prompts: PromptsLike | None = None,
    environment: str | EnvironmentSource | None = None,
    max_turns: int = 16,
    step_timeout_s: float = 60.0,
    on_rewrite: OnRewrite | str = OnRewrite.REFUSE,
    num_rollouts: int = 4,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    limit: int | None = None,
    on_bad_row: OnBadRow | str = OnBadRow.FAIL,
    template: str = "plain",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    grader: str | None = None,
    prompts_per_batch: int = 8,
    engine: EngineLike = SamplingEngine.HF,
    server_url: str | None = None,
    token_budget: int = 16384,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> StageSummary:
    """Sample rollouts of the student for every prompt; what is there already is kept.

    Args:
        run: a run folder, made if it does not exist.
        student: the model that writes, loaded or named.
        prompts: a file, a hub dataset, or the prompts themselves; an environment may have its own.
        environment: what answers the student turn by turn: a registered name, `FILE.py:CLASS`,
            or `deepplanning:DIR`; it grades too.
        max_turns: turns of the student in an environment.
        step_timeout_s: how long the environment may take to answer one turn.
        on_rewrite: where the chat template shows earlier turns otherwise than they were written:
            `refuse` the rollout, or `record` it.
        num_rollouts: rollouts of each prompt.
        max_new_tokens: longest response, in tokens.
        temperature: 0 is greedy.
        top_p: nucleus; 1 is off.
        top_k: 0 is off.
        seed: of the sampling.
        limit: the first so many prompts only.
        on_bad_row: `fail`, or `skip`: a row that cannot be used, or whose prompt the template
            refuses or is too long, is left out and counted.
        template: the text that surrounds a problem.
        chat_template_kwargs: switches for the chat template.
        grader: a grader's name; by default one that suits the prompts.
        prompts_per_batch: prompts whose rollouts make one optimizer step.
        engine: what writes: `hf` (this package's own sampler), `vllm`, `server`, `EngineSettings`,
            or an engine that is open.
        server_url: of the engine `server`: `http://HOST:PORT`, with `#MODEL` where it has several.
        token_budget: tokens a batch; halves itself when memory runs out.
        dtype: of a student that is named.
        device: likewise.
        overwrite: start afresh.

    Example:
        tip.rollout("runs/mine", student="arithmetic-student", prompts="problems.jsonl")

    Raises:
        ConfigurationMismatchError: the folder holds rollouts of another configuration.
        PromptFileError: the prompts cannot be used.
        ModelError: there is no such model.
        EngineError: the engine fails; whole shards are kept, and the call may be made again.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    resolve_template(template)
    bad_rows = BadRows(on_bad_row)
    source = None if environment is None else resolve_environment(environment)
    asked = tasks_or_prompts(prompts, source, limit=limit, on_bad_row=bad_rows)
    with opened(engine, student, Loading(dtype, device, token_budget), server_url) as writer:
        folder = create_run(run)
        shared: dict[str, Any] = {
            "student": writer.author,
            "prompts": asked,
            "sampling": sampling,
            "engine": writer,
            "num_rollouts": num_rollouts,
            "chat_template_kwargs": chat_template_kwargs,
            "prompts_per_batch": prompts_per_batch,
            "on_bad_row": bad_rows,
            "overwrite": overwrite,
        }
        if source is None:
            found = sample_rollouts(folder, template=template, grader=grader, **shared)
        else:
            limits = Limits(max_turns, step_timeout_s, OnRewrite(on_rewrite))
            found = sample_trajectories(folder, source=source, limits=limits, **shared)
    return StageSummary(folder, "rollouts", found)


def import_run(
    run: RunLike,
    files: Sequence[str | Path],
    *,
    format: str,
    student: str,
    prompts: PromptsLike = (),
    overwrite: bool = False,
    **how: Any,
) -> StageSummary:
    """Bring rollouts that another tool wrote into a run folder.

    Args:
        run: a run folder, made if it does not exist.
        files: files, or folders of them.
        format: who wrote them (`importers.formats.FORMATS`).
        student: the model that wrote them; its tokenizer gives the token ids.
        prompts: the prompts that they answer.
        overwrite: start afresh.
        how: further options of `import_rollouts`.

    Returns:
        The stage's summary, `import_report` (what could not be recovered) among it.
    """
    tokenizer = load_tokenizer(student)
    rows, report = import_rollouts(
        format,
        [Path(file) for file in files],
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        prompts=as_prompts(prompts) if prompts else (),
        **how,
    )
    folder = create_run(run)
    found = store_imported(folder, rows, report, student=student, options=how, overwrite=overwrite)
    return StageSummary(folder, "rollouts", found)


def tasks_or_prompts(
    prompts: PromptsLike | None, source: EnvironmentSource | None, **how: Any
) -> list[Prompt]:
    """The prompts that were given, else the environment's own tasks.

    Raises:
        OptionError: there are neither.
    """
    if prompts is not None:
        return as_prompts(prompts, **how)
    if source is None:
        raise OptionError("--prompts is needed, unless an environment has tasks of its own")
    return source.tasks(how.get("limit"))


def as_prompts(
    prompts: PromptsLike,
    *,
    limit: int | None = None,
    needs_answer: bool = False,
    on_bad_row: BadRows | OnBadRow | str = OnBadRow.FAIL,
) -> list[Prompt]:
    """The prompts that a file, a hub dataset or a list of rows holds.

    Args:
        prompts: where they are, or the prompts themselves.
        limit: the first so many that can be used.
        needs_answer: one without an answer cannot be used.
        on_bad_row: what is done with those that cannot be used, or who counts them.

    Raises:
        PromptFileError: they cannot be used, or an id occurs twice.
        OptionError: `limit` is below 1.
    """
    how: dict[str, Any] = {"limit": limit, "needs_answer": needs_answer, "on_bad_row": on_bad_row}
    if isinstance(prompts, str | Path):
        return read_prompts(prompts, **how)
    rows = (_given(row, f"prompts, row {index}") for index, row in enumerate(prompts))
    return usable_prompts(rows, "prompts", stem="prompt", **how)


def _given(row: Prompt | Mapping[str, Any], where: str) -> Prompt | Row:
    return row if isinstance(row, Prompt) else Row(where, dict(row))
