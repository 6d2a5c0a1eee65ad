"""What each command does: options in, stages called, a few lines for the reader out.

Every function loads only the modules that its command needs.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tip_analysis.cli import options
from tip_analysis.cli.ablating import ablate
from tip_analysis.cli.console import console, show_note, show_summary, show_table
from tip_analysis.cli.option_values import parse_part, parse_switches
from tip_analysis.core.errors import OptionError

if TYPE_CHECKING:
    from tip_analysis.analysis.taxonomy import Taxonomy


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
    from tip_analysis.rollouts.door import rollout

    summary = rollout(
        command.run,
        student=command.student,
        prompts=command.prompts,
        num_rollouts=command.num_rollouts,
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_p=command.top_p,
        top_k=command.top_k,
        seed=command.seed,
        limit=command.limit,
        on_bad_row=command.on_bad_row,
        template=command.template,
        chat_template_kwargs=parse_switches(command.chat_template_kwargs),
        grader=command.grader,
        prompts_per_batch=command.prompts_per_batch,
        overwrite=command.overwrite,
        **command.models.loading(),
    )
    show_summary(f"{command.run}: {summary.title}", summary)


def import_(command: options.Import) -> None:
    """Bring in rollouts of another tool."""
    from tip_analysis.rollouts.door import import_run

    summary = import_run(
        command.run,
        command.files,
        format=command.from_,
        student=command.student,
        prompts=command.prompts or (),
        overwrite=command.overwrite,
        template=command.template,
        chat_template_kwargs=parse_switches(command.chat_template_kwargs),
        reward_key=command.reward_key,
        filter_name=command.filter_name,
        all_turns=command.all_turns,
        prompts_per_batch=command.prompts_per_batch,
        limit=command.limit,
        on_bad_row=command.on_bad_row,
    )
    for warning in summary.pop("import_report")["warnings"]:
        show_note("note:", warning)
    show_summary(f"{command.run}: {summary.title}", summary)


def score(command: options.Score) -> None:
    """Score rollouts with both models, at once or one after the other."""
    from tip_analysis.scoring.door import score

    summary = score(
        command.run,
        teacher=command.teacher,
        student=command.student,
        teacher_context=command.teacher_context,
        top_k=command.top_k,
        stop_tokens=command.stop_tokens,
        shard_size=command.shard_size,
        part=parse_part(command.shard),
        phase=command.phase,
        teacher_store=command.teacher_store,
        store_k=command.store_k,
        discard_teacher_states=command.discard_teacher_states,
        engine=command.engine,
        ray_workers=command.ray_workers,
        overwrite=command.overwrite,
        **command.models.loading(),
    )
    show_summary(f"{command.run}: {summary.title}", summary)


def select(command: options.Select) -> None:
    """Write masks, or list the rules."""
    from tip_analysis.analysis.rules import rule, rule_names

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

    from tip_analysis.analysis.door import select
    from tip_analysis.analysis.mask_tables import composition
    from tip_analysis.analysis.measurements import Preference
    from tip_analysis.analysis.quadrants import assign_quadrants
    from tip_analysis.core.run_folder import open_run

    run, taxonomy = open_run(command.run), taxonomy_of(command)
    masks = select(
        run,
        rules=command.rules,
        ratios=command.ratios,
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
    from tip_analysis.gradients.door import measure_gradients

    found = measure_gradients(
        command.run,
        losses=command.loss,
        method=command.method,
        num_probes=command.num_probes,
        params=command.params,
        loss_aggregation=command.loss_aggregation,
        seed=command.seed,
        limit=command.limit,
        dtype=command.models.dtype,
        device=command.models.device,
        prefer=command.prefer,
        overwrite=command.overwrite,
    )
    for loss, summary in found.items():
        show_summary(f"{command.run}: gradients of {loss} over {command.params}", summary)


def evaluate(command: options.Evaluate) -> None:
    """Grade samples of a model."""
    from tip_analysis.training.door import evaluate

    summary = evaluate(
        command.run,
        model=command.model,
        prompts=command.prompts,
        num_samples=command.num_samples,
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_p=command.top_p,
        seed=command.seed,
        limit=command.limit,
        on_bad_row=command.on_bad_row,
        template=command.template,
        chat_template_kwargs=parse_switches(command.chat_template_kwargs),
        grader=command.grader,
        overwrite=command.overwrite,
        **command.models.loading(),
    )
    show_summary(f"{command.model} on {', '.join(command.prompts)}", summary)


def report(command: options.Report) -> None:
    """Write the HTML page."""
    from tip_analysis.analysis.measurements import Preference
    from tip_analysis.report.build import ReportOptions, write_report

    report_options = ReportOptions(
        taxonomy_of(command), measurement=Preference.parse(command.measurement)
    )
    written = write_report(command.runs, command.output, report_options)
    console.print(f"report: {written}", soft_wrap=True)


def taxonomy_of(
    command: options.Select | options.Screen | options.Report | options.Export | options.Compare,
) -> "Taxonomy":
    """The taxonomy that a command's options ask for."""
    from tip_analysis.analysis.taxonomy import Taxonomy

    return Taxonomy(**asdict(command.taxonomy))


def export(command: options.Export) -> None:
    """Write flat Parquet files."""
    from tip_analysis.analysis.door import export

    written = export(
        command.run, command.to, taxonomy=taxonomy_of(command), overwrite=command.overwrite
    )
    for path, num_rows in written.items():
        console.print(f"{path}: {num_rows:,} rows", soft_wrap=True)


def screen(command: options.Screen) -> None:
    """Say how much of each part of a run is artefact."""
    from tip_analysis.analysis.screening import ANY, num_artefacts, screen, warnings_of

    table = screen(
        command.run,
        taxonomy=taxonomy_of(command),
        rules=command.rules,
        ratios=command.ratios,
        seed=command.seed,
        overwrite=command.overwrite,
    )
    hidden = ["entropy_cut", "divergence_cut"]
    show_table(f"{command.run}: artefacts", table.filter(artefact=ANY).drop(*hidden, "artefact"))
    console.print(f"{num_artefacts(table):,} tokens are artefacts", soft_wrap=True)
    for warning in warnings_of(table):
        console.print(f"[yellow]note:[/] {warning}", soft_wrap=True)


def compare(command: options.Compare) -> None:
    """Show two runs side by side."""
    from tip_analysis.analysis.comparison import compare_runs

    tables = compare_runs(command.run_a, command.run_b, taxonomy_of(command))
    for title, table in tables.items():
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


_COMMANDS: dict[type, Callable[[Any], None]] = {
    options.Demo: demo,
    options.Rollout: rollout,
    options.Import: import_,
    options.Score: score,
    options.Select: select,
    options.Screen: screen,
    options.Gradients: gradients,
    options.Evaluate: evaluate,
    options.Ablate: ablate,
    options.Report: report,
    options.Export: export,
    options.Compare: compare,
    options.Status: status,
}
