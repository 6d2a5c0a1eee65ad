"""`ablate` and `evaluate`: arms trained and judged, and a model graded, in one call each.

The command line and `import tip_analysis as tip` call these; the work is done in `ablation.study`
and `evaluation`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from tip_analysis.analysis.arms import parse_arms
from tip_analysis.analysis.benchmarks import MEAN_OVER_BENCHMARKS
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import OnBadRow, OnRewrite, SamplingEngine, TeacherContext, TrackerName
from tip_analysis.core.run_folder import RunLike, create_run
from tip_analysis.core.stage_summary import StageSummary
from tip_analysis.models.named import ModelLike
from tip_analysis.rollouts.bad_rows import BadRows
from tip_analysis.rollouts.door import PromptsLike, as_prompts, tasks_or_prompts
from tip_analysis.rollouts.engines.opening import EngineLike, Loading, opened, settings_of
from tip_analysis.rollouts.engines.settings import EngineSettings
from tip_analysis.rollouts.environments.episodes import Limits
from tip_analysis.rollouts.environments.registry import EnvironmentSource, resolve_environment
from tip_analysis.rollouts.grading import default_grader
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import toy_pair_of
from tip_analysis.training.ablation.presets import Preset, experiment
from tip_analysis.training.ablation.problem_sets import (
    benchmark_names,
    load_evaluation_sets,
    load_prompts,
    num_prompts_of,
)
from tip_analysis.training.ablation.study import run_ablation, study_from_preset
from tip_analysis.training.agents import evaluate_agent
from tip_analysis.training.evaluation import evaluate_model


def evaluate(
    run: RunLike,
    *,
    model: ModelLike,
    prompts: PromptsLike | Sequence[str | Path] | None = None,
    environment: str | EnvironmentSource | None = None,
    max_turns: int = 16,
    step_timeout_s: float = 60.0,
    on_rewrite: OnRewrite | str = OnRewrite.REFUSE,
    num_samples: int = 16,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    on_bad_row: OnBadRow | str = OnBadRow.FAIL,
    template: str = "plain",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    grader: str | None = None,
    engine: EngineLike = SamplingEngine.HF,
    server_url: str | None = None,
    token_budget: int = 16384,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> StageSummary:
    """Sample answers to the problems of one or more benchmarks, grade them, and give mean@k and
    Best@k with standard errors for each.

    Args:
        run: the run folder that the rows go to, made if it does not exist.
        model: loaded, or named as a student is.
        prompts: problems with answers: a file or hub dataset, several of them (a benchmark each),
            or the prompts themselves; an environment may have its own tasks.
        environment: what answers the model turn by turn, and grades: as for `rollout`.
        max_turns: turns of the model in an environment.
        step_timeout_s: how long the environment may take to answer one turn.
        on_rewrite: as for `rollout`; refused samples end the evaluation.
        num_samples: k, samples of each problem.
        max_new_tokens: longest response, in tokens.
        temperature: 0 is greedy.
        top_p: nucleus; 1 is off.
        seed: of the sampling.
        limit: the first so many problems of each benchmark only.
        on_bad_row: `fail`, or `skip`: a problem that cannot be used, for want of an answer for one,
            is left out and counted.
        template: the text that surrounds a problem.
        chat_template_kwargs: switches for the chat template.
        grader: a grader's name; by default `math`, or `exact` for the arithmetic pair.
        engine: what writes, as for `rollout`.
        server_url: of the engine `server`.
        token_budget: tokens a batch; halves itself when memory runs out.
        dtype: of a model that is named.
        device: likewise.
        overwrite: make the rows of this configuration again.

    Returns:
        The summary of the benchmark; of several, for each figure its value per benchmark, and of
        mean@k and Best@k also their unweighted mean. Problems are never pooled.

    Example:
        tip.evaluate("runs/mine", model="arithmetic-student", prompts="problems.jsonl")
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed=seed)
    if environment is not None:
        source = resolve_environment(environment)
        tasks = tasks_or_prompts(_only_source(prompts), source, limit=limit)
        with opened(engine, model, Loading(dtype, device, token_budget), server_url) as writer:
            folder = create_run(run)
            summary = evaluate_agent(
                folder,
                model=writer.author,
                engine=writer,
                source=source,
                prompts=tasks,
                benchmark=source.name,
                num_samples=num_samples,
                sampling=sampling,
                limits=Limits(max_turns, step_timeout_s, OnRewrite(on_rewrite)),
                chat_template_kwargs=chat_template_kwargs,
                on_bad_row=on_bad_row,
                overwrite=overwrite,
            )
        title = f"evaluation of {writer.author.name}"
        return StageSummary(folder, title, {"benchmark": source.name, **summary})
    if prompts is None:
        raise OptionError("an evaluation needs --prompts, or an environment with tasks of its own")
    benchmarks = _benchmarks(prompts, limit, OnBadRow(on_bad_row))
    with opened(engine, model, Loading(dtype, device, token_budget), server_url) as writer:
        is_toy = toy_pair_of(writer.author) is not None
        folder = create_run(run)
        found = {
            name: evaluate_model(
                folder,
                model=writer.author,
                prompts=benchmark.problems,
                engine=writer,
                num_samples=num_samples,
                sampling=sampling,
                template=template,
                chat_template_kwargs=chat_template_kwargs,
                grader=grader or default_grader(has_answer=True, is_toy=is_toy),
                on_bad_row=benchmark.bad_rows,
                overwrite=overwrite,
            )
            for name, benchmark in benchmarks.items()
        }
    return StageSummary(folder, f"evaluation of {writer.author.name}", _side_by_side(found))


def _only_source(prompts: PromptsLike | Sequence[str | Path] | None) -> PromptsLike | None:
    """The one file of tasks, or the tasks themselves; None where there are none.

    Raises:
        OptionError: there are several files.
    """
    if prompts is None or isinstance(prompts, str | Path) or not prompts:
        return prompts or None  # pyright: ignore[reportReturnType]
    if not isinstance(prompts[0], str | Path):
        return prompts  # pyright: ignore[reportReturnType]
    if len(prompts) > 1:
        raise OptionError("one evaluation in an environment takes the tasks of one file")
    return prompts[0]


@dataclass(frozen=True)
class _Benchmark:
    """The problems of one evaluation set, and what was left out of it."""

    problems: list[Prompt]
    bad_rows: BadRows


def _benchmarks(
    prompts: PromptsLike | Sequence[str | Path], limit: int | None, on_bad_row: OnBadRow
) -> dict[str, _Benchmark]:
    """The problems of each benchmark by its name.

    Raises:
        PromptFileError: a problem cannot be used.
        OptionError: a set is named twice, or there is none.
    """
    if isinstance(prompts, str | Path):
        prompts = [prompts]
    sources = [str(source) for source in prompts if isinstance(source, str | Path)]
    if sources and len(sources) == len(prompts):
        named = zip(sources, benchmark_names(sources), strict=True)
        return {name: _from_source(source, name, limit, on_bad_row) for source, name in named}
    if not prompts:
        raise OptionError("an evaluation needs problems with answers")
    return _given(prompts, limit, on_bad_row)  # pyright: ignore[reportArgumentType]


def _from_source(source: str, name: str, limit: int | None, on_bad_row: OnBadRow) -> _Benchmark:
    bad_rows = BadRows(on_bad_row)
    found = load_prompts(source, limit=limit, needs_answer=True, on_bad_row=bad_rows)
    return _Benchmark([replace(prompt, benchmark=name) for prompt in found], bad_rows)


def _given(prompts: PromptsLike, limit: int | None, on_bad_row: OnBadRow) -> dict[str, _Benchmark]:
    """Problems that are given by themselves, by the benchmark that each names; what is left out
    counts for the first, since a row that cannot be read names none."""
    bad_rows = BadRows(on_bad_row)
    found: dict[str, _Benchmark] = {}
    for prompt in as_prompts(prompts, needs_answer=True, on_bad_row=bad_rows):
        counted = BadRows(on_bad_row) if found else bad_rows
        found.setdefault(prompt.benchmark, _Benchmark([], counted)).problems.append(prompt)
    return {name: replace(one, problems=one.problems[:limit]) for name, one in found.items()}


def _side_by_side(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of one benchmark, or each figure of several by benchmark."""
    if len(found) == 1:
        return {"benchmark": next(iter(found)), **next(iter(found.values()))}
    names = next(iter(found.values()))
    table = {name: {which: summary[name] for which, summary in found.items()} for name in names}
    for name in ("accuracy", "best_at_k"):
        table[name][MEAN_OVER_BENCHMARKS] = fmean(table[name].values())
    return table


def ablate(
    run: RunLike,
    *,
    preset: str | Preset | None = None,
    ratios: Sequence[float] = (),
    limit: int | None = None,
    on_bad_row: OnBadRow | str = OnBadRow.FAIL,
    evaluate_every: int = 0,
    checkpoint_every: int = 20,
    keep_every: int = 0,
    teacher_context: TeacherContext | str = TeacherContext.NONE,
    jobs: int = 1,
    threads: int = 1,
    engine: EngineSettings | SamplingEngine | str = SamplingEngine.HF,
    tracker: TrackerName | str = TrackerName.NONE,
    token_budget: int = 65_536,
    dtype: str = "auto",
    device: str = "auto",
    **changes: Any,
) -> pl.DataFrame:
    """Train a student on the tokens that each rule selects, under several seeds; what is done
    already is kept.

    Args:
        run: the run folder that results go to, made if it does not exist.
        preset: a preset's name, or a preset; by default the run's own pair.
        ratios: ρ of arms that name none.
        limit: the first so many prompts, and problems of each evaluation set, only.
        on_bad_row: `fail`, or `skip`: a prompt or problem that cannot be used is left out and
            counted.
        evaluate_every: steps between evaluations; 0 evaluates at the end only.
        checkpoint_every: steps between checkpoints.
        keep_every: steps between weights that stay in the run folder, for `track`; 0 keeps none.
        teacher_context: what the teacher sees besides the prompt.
        jobs: arms trained at once, each in a process of its own.
        threads: of each such process.
        engine: what the student writes with on policy and in evaluations: `hf`, or `vllm`, which is
            given its weights before each step.
        tracker: what is told of each arm, step by step: `trackio`, `wandb` or `tensorboard`,
            offline by default; it changes no number.
        token_budget: tokens a batch of the sampler.
        dtype: of the models.
        device: likewise.
        changes: fields of `Preset` (`arms`, `seeds`, `prompts`, `evaluation_sets`, `num_samples`
            …) or of `TrainingOptions` (`num_steps`, `learning_rate`, `loss` …) in place of the
            preset's; None changes nothing.

    Returns:
        The rows of the ablation table; `arm_results` and `claims_table` say what they mean.

    Example:
        rows = tip.ablate("runs/mine", arms=["all", "soft_or:0.5"], seeds=[0, 1, 2])
        tip.claims_table(rows)
    """
    planned = experiment(run, preset, **changes)
    bad_rows = BadRows(on_bad_row)
    prompts = _training_prompts(planned, limit, bad_rows)
    planned = planned.with_steps(len(prompts) or num_prompts_of(run))
    study = study_from_preset(
        planned,
        prompts=prompts,
        evaluation_prompts=load_evaluation_sets(
            planned.evaluation_sets, limit=limit, on_bad_row=bad_rows
        ),
        bad_rows=bad_rows,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        keep_every=keep_every,
        teacher_context=teacher_context,
        tracker=tracker,
        engine=settings_of(engine) or EngineSettings(),
        dtype=dtype,
        device=device,
        token_budget=token_budget,
    )
    arms = parse_arms(planned.arms, ratios)
    return run_ablation(
        create_run(run), study, arms=arms, seeds=planned.seeds, jobs=jobs, threads=threads
    )


def _training_prompts(planned: Preset, limit: int | None, bad_rows: BadRows) -> list[Prompt]:
    """What is trained on: the preset's number of prompts at most."""
    if not planned.prompts:
        return []
    counts = [count for count in (limit, planned.num_prompts) if count is not None]
    return load_prompts(planned.prompts, limit=min(counts, default=None), on_bad_row=bad_rows)
