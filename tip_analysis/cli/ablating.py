"""The command `ablate`: its options as changes of a preset, its arms and verdicts as tables."""

from typing import TYPE_CHECKING

from tip_analysis.cli import options
from tip_analysis.cli.console import show_claims, show_table
from tip_analysis.cli.option_values import parse_switches
from tip_analysis.core.errors import OptionError

if TYPE_CHECKING:
    from tip_analysis.training.ablation.presets import Preset


def ablate(command: options.Ablate) -> None:
    """Train and evaluate every arm, and judge the paper's claims on the outcome."""
    from tip_analysis.analysis.arms import arm_results, parse_arms
    from tip_analysis.analysis.claims import claims_table

    preset = _experiment(command)
    parse_arms(preset.arms, command.ratios)
    if command.dry_run:
        from tip_analysis.training.ablation.plans import plan_ablation
        from tip_analysis.training.ablation.problem_sets import num_prompts_of

        num_prompts = preset.num_prompts or num_prompts_of(command.run)
        planned = preset.with_steps(num_prompts) if num_prompts else preset
        show_table(f"plan of {preset.name}", plan_ablation(planned).table())
        return
    from tip_analysis.training.door import ablate

    rows = ablate(
        command.run,
        preset=preset,
        ratios=command.ratios,
        limit=command.limit,
        on_bad_row=command.on_bad_row,
        evaluate_every=command.evaluate_every,
        checkpoint_every=command.checkpoint_every,
        teacher_context=command.teacher_context,
        jobs=command.jobs,
        threads=command.threads,
        **command.models.loading(65_536),
    )
    columns = [
        "rule",
        "retention_ratio",
        "accuracy",
        "accuracy_std",
        "best_at_k",
        "heldout_reverse_kl",
    ]
    results = arm_results(rows)
    means = f"mean over {len(preset.seeds)} seeds; accuracy is mean@{preset.num_samples}"
    for benchmark in results["benchmark"].unique(maintain_order=True):
        shown = results.filter(benchmark=benchmark).select(*columns, "token_share", "step_time_s")
        show_table(f"{command.run}: arms on {benchmark} ({means})", shown)
    show_claims(claims_table(rows, margin=command.margin))


def _experiment(command: options.Ablate) -> "Preset":
    """The preset that is named, or else the run's own pair, with the user's options in place of its
    own."""
    from tip_analysis.training.ablation.presets import PRESETS, experiment

    renamed = {
        "evaluation_sets": command.evaluation_prompts,
        "arms": command.rules,
        "seeds": command.seeds,
    }
    changes = {name: value or None for name, value in renamed.items()} | {
        "num_steps": command.steps
    }
    changes |= {name: getattr(command, name) for name in _PRESET_OPTIONS}
    if command.steps is not None and command.epochs is not None:
        raise OptionError("--steps and --epochs both say how long to train: give one of them")
    if command.chat_template_kwargs:
        changes["chat_template_kwargs"] = parse_switches(command.chat_template_kwargs)
    if command.dry_run and command.preset in PRESETS:
        planned_as = PRESETS[command.preset].planned_as
        changes |= {name: changes.get(name) or value for name, value in planned_as.items()}
    return experiment(command.run, command.preset, **changes)


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
    "epochs",
)
"""Options of `ablate` that are fields of a preset, or of its training, under the same name."""
