"""What each command does: options in, stages called, a few lines for the reader out.

Every function loads only the modules that its command needs.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tip_analysis.cli import options
from tip_analysis.cli.console import console, show_claims, show_note, show_summary, show_table
from tip_analysis.cli.option_values import parse_part, parse_switches
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.terminal import stderr_console
from tip_analysis.core.text import one_line

if TYPE_CHECKING:
    from tip_analysis.analysis.taxonomy import Taxonomy
    from tip_analysis.core.run_folder import Run
    from tip_analysis.models.loading import LanguageModel
    from tip_analysis.training.ablation.presets import Preset


def run(command: Any) -> None:
    """Carry out one parsed command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if command.common.lock_timeout is not None:
        from tip_analysis.core.locks import TIMEOUT_VARIABLE

        os.environ[TIMEOUT_VARIABLE] = str(command.common.lock_timeout)
    if command.common.verify and not isinstance(command, options.Status):
        _verify(command)
    _COMMANDS[type(command)](command)


def _verify(command: Any) -> None:
    """Check the runs that a command reads, whole."""
    from tip_analysis.core.run_folder import open_run

    named = [getattr(command, name, None) for name in ("run", "run_a", "run_b")]
    for path in [*named, *getattr(command, "runs", ())]:
        if path is not None and (path / "run.json").is_file():
            open_run(path).verify()


def demo(command: options.Demo) -> None:
    """Everything, on the embedded pair."""
    from tip_analysis.demo.demo_run import DIVERGENCE_CUT, ENTROPY_CUT, run_demo

    report_path = command.report or Path("reports") / f"{command.out.resolve().name}.html"
    result = run_demo(
        command.out,
        report_path,
        num_prompts=command.num_prompts,
        num_rollouts=command.num_rollouts,
        seed=command.seed,
        token_budget=command.models.tokens_a_batch(),
        overwrite=command.overwrite,
        say=console.print,
    )
    show_table(
        f"quadrants (cuts: entropy {ENTROPY_CUT} nats, reverse KL {DIVERGENCE_CUT} nats)",
        result.shares,
    )
    show_summary(
        "planted errors (confident: student top-1 probability ≥ 0.9)",
        result.detection.row(0, named=True),
    )
    columns = [
        "rule",
        "retention_ratio",
        "accuracy",
        "best_at_k",
        "heldout_reverse_kl",
        "tokens_trained",
    ]
    show_table(
        "ablation (one seed, few steps: the full one is `tip-analysis ablate`)",
        result.arms.select(columns),
    )
    console.print(f"run folder: {command.out}\nreport:     {result.report}", soft_wrap=True)


def rollout(command: options.Rollout) -> None:
    """Sample rollouts."""
    from tip_analysis.core.run_folder import create_run
    from tip_analysis.rollouts.prompts import read_prompts, resolve_template
    from tip_analysis.rollouts.sampling import Sampling
    from tip_analysis.rollouts.stage import sample_rollouts

    sampling = Sampling(
        command.max_new_tokens, command.temperature, command.top_p, command.top_k, command.seed
    )
    resolve_template(command.template)
    switches = parse_switches(command.chat_template_kwargs)
    prompts = read_prompts(command.prompts, limit=command.limit)
    student = _load(command.student, command.models)
    summary = sample_rollouts(
        create_run(command.run),
        student=student,
        prompts=prompts,
        sampling=sampling,
        num_rollouts=command.num_rollouts,
        template=command.template,
        chat_template_kwargs=switches,
        grader=command.grader,
        prompts_per_batch=command.prompts_per_batch,
        token_budget=command.models.tokens_a_batch(),
        overwrite=command.overwrite,
    )
    show_summary(f"{command.run}: rollouts", summary)


def import_(command: options.Import) -> None:
    """Bring in rollouts of another tool."""
    from tip_analysis.core.run_folder import create_run
    from tip_analysis.models.loading import load_tokenizer, tokenizer_fingerprint
    from tip_analysis.rollouts.importers.formats import import_rollouts
    from tip_analysis.rollouts.prompts import read_prompts
    from tip_analysis.rollouts.stage import store_imported

    how: dict[str, Any] = {
        "template": command.template,
        "chat_template_kwargs": parse_switches(command.chat_template_kwargs),
        "reward_key": command.reward_key,
        "filter_name": command.filter_name,
        "all_turns": command.all_turns,
        "prompts_per_batch": command.prompts_per_batch,
        "limit": command.limit,
    }
    tokenizer = load_tokenizer(command.student)
    rollouts, report = import_rollouts(
        command.from_,
        command.files,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        prompts=read_prompts(command.prompts) if command.prompts else (),
        **how,
    )
    run = create_run(command.run)
    summary = store_imported(
        run, rollouts, report, student=command.student, options=how, overwrite=command.overwrite
    )
    for warning in summary.pop("import_report")["warnings"]:
        show_note("note:", warning)
    show_summary(f"{command.run}: rollouts", summary)


def score(command: options.Score) -> None:
    """Score rollouts with both models, at once or one after the other."""
    from tip_analysis.core.run_folder import open_run

    run = open_run(command.run)
    run.rollouts()
    part = parse_part(command.shard)
    name = command.student or recorded_student(run)
    if command.engine == "ray":
        if part != (0, 1):
            raise OptionError(
                "--shard is for array jobs of one process each; --engine ray shares the shards out"
                " itself"
            )
        if command.phase != "both":
            raise OptionError(
                "--phase goes with --engine local; --shard i/n spreads a phase over array jobs"
            )
        summary = _score_with_ray(command, name)
    elif command.phase == "teacher":
        show_summary(f"{command.run}: teacher's states", _store_teacher(command, run, name, part))
        return
    else:
        summary = _score_here(command, run, name, part)
    show_summary(f"{command.run}: tokens", summary)


def _score_here(
    command: options.Score, run: "Run", student_name: str, part: tuple[int, int]
) -> dict[str, Any]:
    """In this process, with the teacher's body or with its stored states."""
    from tip_analysis.models.batching import TokenBudget
    from tip_analysis.models.head_alone import load_head
    from tip_analysis.scoring.stage import Scorer, score_rollouts
    from tip_analysis.scoring.teacher_states import TeacherStore

    stored = None
    if command.phase == "student":
        stored = TeacherStore(run)
        stored.require(
            teacher=command.teacher,
            teacher_context=command.teacher_context,
            shard_size=command.shard_size,
        )
        teacher = load_head(
            command.teacher, dtype=stored.teacher["dtype"], device=command.models.device
        )
        student = _load(student_name, command.models)
    else:
        student = _load(student_name, command.models)
        teacher = (
            student if command.teacher == student_name else _load(command.teacher, command.models)
        )
    summary = score_rollouts(
        run,
        Scorer(
            student,
            teacher,
            TokenBudget(command.models.tokens_a_batch()),
            command.top_k,
            stop_tokens=command.stop_tokens,
        ),
        teacher_context=command.teacher_context,
        shard_size=command.shard_size,
        part=part,
        overwrite=command.overwrite,
        stored=stored,
    )
    if (
        stored is not None
        and command.discard_teacher_states
        and "num_shards_missing" not in summary
    ):
        stored.discard()
    return summary


def _store_teacher(
    command: options.Score, run: "Run", student_name: str, part: tuple[int, int]
) -> dict[str, Any]:
    from tip_analysis.models.batching import TokenBudget
    from tip_analysis.models.head_alone import head_rows
    from tip_analysis.scoring.teacher_states import store_teacher_states

    return store_teacher_states(
        run,
        _load(command.teacher, command.models),
        form=command.teacher_store,
        store_k=command.store_k,
        vocab_size=head_rows(student_name),
        teacher_context=command.teacher_context,
        shard_size=command.shard_size,
        budget=TokenBudget(command.models.tokens_a_batch()),
        part=part,
        overwrite=command.overwrite,
    )


def _score_with_ray(command: options.Score, student: str) -> dict[str, Any]:
    from tip_analysis.scoring.ray_engine import ScoringJob, score_with_ray

    job = ScoringJob(
        run=str(command.run.resolve()),
        student=student,
        teacher=command.teacher,
        teacher_context=command.teacher_context,
        shard_size=command.shard_size,
        top_k=command.top_k,
        stop_tokens=command.stop_tokens,
        token_budget=command.models.tokens_a_batch(),
        dtype=command.models.dtype,
        device=command.models.device,
        overwrite=command.overwrite,
    )
    return score_with_ray(job, num_workers=command.ray_workers)


def select(command: options.Select) -> None:
    """Write masks, or list the rules."""
    from tip_analysis.analysis.selection import rule, rule_names

    if command.list:
        table = Table("rule", "samples", "what it selects", box=None, header_style="bold")
        for name in rule_names():
            table.add_row(name, "yes" if rule(name).sampled else "", rule(name).description)
        console.print(table)
        return
    if command.run is None:
        raise OptionError("select needs a run folder, or --list")
    if not command.rules:
        raise OptionError(f"select needs --rules, among {', '.join(rule_names())}")
    import polars as pl

    from tip_analysis.analysis.mask_tables import composition
    from tip_analysis.analysis.masks import write_masks
    from tip_analysis.analysis.measurements import Preference
    from tip_analysis.analysis.quadrants import assign_quadrants
    from tip_analysis.core.run_folder import open_run

    run, taxonomy = open_run(command.run), taxonomy_of(command)
    masks = write_masks(
        run,
        rules=command.rules,
        retention_ratios=command.ratios,
        selection_scope=command.selection_scope,
        seeds=command.seeds,
        normalization_scope=taxonomy.normalization_scope,
        divergence_clip=taxonomy.divergence_clip,
        measurement=Preference.parse(command.measurement),
        overwrite=command.overwrite,
    )
    cuts = taxonomy.measure(run.tokens())
    made_of = composition(masks, assign_quadrants(run.tokens(), cuts=cuts))
    shares = made_of.pivot(
        on="quadrant",
        index=["rule", "retention_ratio", "seed"],
        values="share",
        maintain_order=True,
    ).rename({"retention_ratio": "ratio"})
    totals = made_of.group_by("rule", "retention_ratio", "seed", maintain_order=True).agg(
        tokens=pl.col("num_tokens").sum()
    )
    show_table(
        f"{command.run}: shares of the quadrants in each selection",
        shares.hstack(totals.select("tokens")),
    )


def gradients(command: options.Gradients) -> None:
    """Measure gradient norms and alignment."""
    from tip_analysis.analysis.measurements import prefer_measurement
    from tip_analysis.core.record import model_name
    from tip_analysis.core.run_folder import open_run
    from tip_analysis.gradients.rollout_gradients import GradientSettings
    from tip_analysis.gradients.stage import measure_run, setting_of

    run = open_run(command.run)
    settings = GradientSettings(
        losses=command.loss,
        param_scope=command.params,
        method=command.method,
        num_probes=command.num_probes,
        seed=command.seed,
        loss_aggregation=command.loss_aggregation,
    )
    scored = run.stages().get("score", {}).get("config")
    if scored is None:
        raise RunError(
            f"{run.path} is not scored yet; `tip-analysis score {run.path} --teacher MODEL` comes"
            " first"
        )
    names = [model_name(scored.get(role)) for role in ("student", "teacher")]
    if names[0] is None or names[1] is None:
        raise RunError(f"{run.path} does not say which models it was scored with: score it again")
    student = _load(names[0], command.models)
    teacher = student if names[0] == names[1] else _load(names[1], command.models)
    found = measure_run(
        run,
        student=student,
        teacher=teacher,
        settings=settings,
        teacher_context=scored.get("teacher_context", "none"),
        limit=command.limit,
        overwrite=command.overwrite,
    )
    if command.prefer:
        prefer_measurement(run, setting_of(settings))
    for loss, summary in found.items():
        show_summary(f"{command.run}: gradients of {loss} over {command.params}", summary)


def evaluate(command: options.Evaluate) -> None:
    """Grade samples of a model."""
    from tip_analysis.core.run_folder import create_run
    from tip_analysis.rollouts.grading import default_grader
    from tip_analysis.rollouts.prompts import read_prompts
    from tip_analysis.rollouts.sampling import Sampling
    from tip_analysis.rollouts.stage import toy_pair_of
    from tip_analysis.training.evaluation import evaluate_model

    sampling = Sampling(
        command.max_new_tokens, command.temperature, command.top_p, seed=command.seed
    )
    prompts = read_prompts(command.prompts, limit=command.limit)
    model = _load(command.model, command.models)
    summary = evaluate_model(
        create_run(command.run),
        model=model,
        prompts=prompts,
        num_samples=command.num_samples,
        sampling=sampling,
        template=command.template,
        chat_template_kwargs=parse_switches(command.chat_template_kwargs),
        grader=command.grader
        or default_grader(has_answer=True, is_toy=toy_pair_of(model) is not None),
        token_budget=command.models.tokens_a_batch(),
        overwrite=command.overwrite,
    )
    show_summary(f"{command.model} on {command.prompts}", summary)


def ablate(command: options.Ablate) -> None:
    """Train and evaluate every arm, and judge the paper's claims on the outcome."""
    from tip_analysis.analysis.arms import arm_results, parse_arms
    from tip_analysis.analysis.claims import claims_table
    from tip_analysis.core.run_folder import create_run
    from tip_analysis.training.ablation.plans import plan_ablation
    from tip_analysis.training.ablation.presets import load_evaluation_sets, load_prompts
    from tip_analysis.training.ablation.study import run_ablation, study_from_preset

    preset = _experiment(command)
    arms = parse_arms(preset.arms, command.ratios)
    if command.dry_run:
        show_table(f"plan of {preset.name}", plan_ablation(preset).table())
        return
    prompts = load_prompts(preset.prompts, limit=command.limit) if preset.prompts else []
    study = study_from_preset(
        preset,
        prompts=prompts,
        evaluation_prompts=load_evaluation_sets(preset.evaluation_sets, limit=command.limit),
        evaluate_every=command.evaluate_every,
        checkpoint_every=command.checkpoint_every,
        teacher_context=command.teacher_context,
        dtype=command.models.dtype,
        device=command.models.device,
        token_budget=command.models.tokens_a_batch(65_536),
    )
    run = create_run(command.run)
    rows = run_ablation(
        run, study, arms=arms, seeds=preset.seeds, jobs=command.jobs, threads=command.threads
    )
    columns = [
        "rule",
        "retention_ratio",
        "accuracy",
        "accuracy_std",
        "best_at_k",
        "heldout_reverse_kl",
    ]
    results = arm_results(rows).select(*columns, "token_share", "step_time_s")
    means = f"mean over {len(preset.seeds)} seeds; accuracy is mean@{preset.num_samples}"
    show_table(f"{command.run}: arms ({means})", results)
    show_claims(claims_table(rows, margin=command.margin))


def _experiment(command: options.Ablate) -> "Preset":
    """The preset that is named, or else the run's own pair, with the user's options in place of its
    own."""
    from tip_analysis.core.record import model_name
    from tip_analysis.core.run_folder import open_run
    from tip_analysis.models.locating import ARITHMETIC_PAIR
    from tip_analysis.training.ablation.presets import change_preset, pair_preset, resolve_preset

    renamed = {
        "evaluation_sets": command.evaluation_prompts,
        "arms": command.rules,
        "seeds": command.seeds,
    }
    changes = {name: value or None for name, value in renamed.items()} | {
        "num_steps": command.steps
    }
    changes |= {name: getattr(command, name) for name in _PRESET_OPTIONS}
    if command.preset is not None:
        return resolve_preset(command.preset, **changes)
    stages = open_run(command.run).stages() if (command.run / "run.json").is_file() else {}
    scored = stages.get("score", {}).get("config", {})
    names: list[Any] = [
        getattr(command, role) or model_name(scored.get(role)) for role in ("student", "teacher")
    ]
    if tuple(names) == ARITHMETIC_PAIR and command.prompts is None:
        return resolve_preset("arithmetic", **changes)
    return change_preset(pair_preset(*names), **changes)


_PRESET_OPTIONS = (
    "student",
    "teacher",
    "prompts",
    "mode",
    "prompts_per_step",
    "rollouts_per_prompt",
    "max_new_tokens",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "max_grad_norm",
    "loss",
    "loss_normalizer",
    "loss_aggregation",
    "selection_scope",
    "rescore_every",
    "lora_rank",
    "precision",
    "micro_batch_size",
    "chunk_size",
    "gradient_checkpointing",
    "num_samples",
    "template",
    "grader",
)
"""Options of `ablate` that are fields of a preset, or of its training, under the same name."""


def report(command: options.Report) -> None:
    """Write the HTML page."""
    from tip_analysis.analysis.measurements import Preference
    from tip_analysis.report.build import ReportOptions, write_report

    output = command.output or Path("reports") / f"{command.runs[0].resolve().name}.html"
    report_options = ReportOptions(
        taxonomy_of(command), measurement=Preference.parse(command.measurement)
    )
    written = write_report(command.runs, output, report_options)
    console.print(f"report: {written}", soft_wrap=True)


def taxonomy_of(
    command: options.Select | options.Report | options.Export | options.Compare,
) -> "Taxonomy":
    """The taxonomy that a command's options ask for."""
    from tip_analysis.analysis.taxonomy import Taxonomy

    return Taxonomy(**asdict(command.taxonomy))


def export(command: options.Export) -> None:
    """Write flat Parquet files."""
    from tip_analysis.analysis.export import export_run
    from tip_analysis.core.run_folder import open_run

    for path, num_rows in export_run(
        open_run(command.run), command.to, taxonomy_of(command), overwrite=command.overwrite
    ).items():
        console.print(f"{path}: {num_rows:,} rows", soft_wrap=True)


def compare(command: options.Compare) -> None:
    """Show two runs side by side."""
    from tip_analysis.analysis.comparison import compare_runs
    from tip_analysis.core.run_folder import open_run

    for title, table in compare_runs(
        open_run(command.run_a), open_run(command.run_b), taxonomy_of(command)
    ).items():
        show_table(title, table)


def status(command: options.Status) -> None:
    """Say what is done and what can come next."""
    from tip_analysis.analysis.status import next_steps, stage_table
    from tip_analysis.core.run_folder import open_run

    run = open_run(command.run)
    show_table(str(command.run), stage_table(run))
    altered = run.altered_shards() if command.common.verify else []
    for shard in altered:
        show_note("altered or missing:", shard)
    if command.common.verify and not altered:
        console.print("every shard is as it was written")
    console.print("next: " + "\n      ".join(next_steps(run)), soft_wrap=True)


def recorded_student(run: "Run") -> str:
    """The model that a run's rollouts name as their author.

    Raises:
        RunError: they name none.
    """
    from tip_analysis.core.record import model_name

    config = run.stages().get("rollout", {}).get("config", {})
    if "student" not in config:
        raise RunError(
            f"{run.path} does not say which student wrote its rollouts; name it with --student"
        )
    return str(model_name(config["student"]))


def _load(name: str, models: options.ModelOptions) -> "LanguageModel":
    """Load a model, saying so where somebody is looking."""
    from tip_analysis.models.loading import load_model

    with stderr_console().status(Text(one_line(f"loading {name}", 80))):
        return load_model(name, dtype=models.dtype, device=models.device)


_COMMANDS: dict[type, Callable[[Any], None]] = {
    options.Demo: demo,
    options.Rollout: rollout,
    options.Import: import_,
    options.Score: score,
    options.Select: select,
    options.Gradients: gradients,
    options.Evaluate: evaluate,
    options.Ablate: ablate,
    options.Report: report,
    options.Export: export,
    options.Compare: compare,
    options.Status: status,
}
