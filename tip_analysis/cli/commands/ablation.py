"""Students trained on selected tokens, and the claims judged on them: `ablate`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tip_analysis.cli.option_groups import (
    Common,
    CommonOptions,
    Flag,
    ModelOptions,
    Models,
    Names,
    Pairs,
    RunFolder,
    Texts,
    TrainingEngineOptions,
    TrainingEngines,
)
from tip_analysis.cli.option_values import parse_switches
from tip_analysis.cli.ranges import (
    Count,
    CountOrNone,
    Part,
    Processes,
    Ratios,
    Seeds,
    SomeCount,
    SomeCountOrNone,
    SomeCut,
    SomeFew,
    SomeFraction,
    SomeInner,
    SomeNats,
    SomePositive,
    SomeRank,
    SomeRate,
    SomeShare,
)
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import (
    LossAggregation,
    LossNormalizer,
    Mode,
    OnBadRow,
    OptimizerName,
    Precision,
    Schedule,
    Scope,
    SelectionScope,
    TeacherContext,
    TopKSource,
    TopKTail,
    TrackerName,
    TrainingLoss,
)

if TYPE_CHECKING:
    import polars as pl

    from tip_analysis.training.ablation.presets import Preset

_PRESET_OPTIONS = (
    "student",
    "teacher",
    "prompts",
    "mode",
    "prompts_per_step",
    "rollouts_per_prompt",
    "max_new_tokens",
    "learning_rate",
    "optimizer",
    "adam_epsilon",
    "momentum",
    "match_update_norm",
    "schedule",
    "warmup_steps",
    "max_grad_norm",
    "loss",
    "weighting",
    "jsd_beta",
    "skew_alpha",
    "loss_top_k",
    "loss_top_k_of",
    "loss_tail",
    "entropy_gate",
    "loss_normalizer",
    "loss_aggregation",
    "selection_scope",
    "normalization_scope",
    "divergence_clip",
    "entropy_cut",
    "divergence_cut",
    "rescore_every",
    "dynamics_every",
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


@dataclass(frozen=True)
class Ablate:
    """Train a student on the tokens that each rule selects, under several seeds, and judge the
    paper's claims on the outcome.

    An arm is a rule at a retention ratio. What is done already is kept; an arm that was interrupted
    goes on from its last checkpoint. Options that are left out come from the preset.
    """

    run: RunFolder
    """Run folder that results go to; made if it does not exist. Offline, the one that holds
    rollouts and masks."""
    rules: Names = ()
    """Rules, each at every ratio, or with ratios of its own as in q3:0.1:0.2, and with a loss or
    weighting of its own as in all,loss=k1; by default the preset's arms."""
    ratios: Ratios = ()
    """Retention ratios in (0, 1]."""
    seeds: Seeds = ()
    """Seeds of every arm: prompts, sampling and selection; by default the preset's."""
    preset: str | None = None
    """arithmetic, arithmetic-field, qwen3-8b-4b, llama-70b-8b, qwen2.5-14b-1.5b,
    qwen3-14b-1.7b-agentic or qwen3-32b-1.7b-agentic."""
    mode: Mode | None = None
    """Fresh rollouts at every step, or the run's own rollouts and masks."""
    student: str | None = None
    """The student; by default the run's or the preset's."""
    teacher: str | None = None
    """The teacher; likewise."""
    prompts: str | None = None
    """What is trained on: a file or hub dataset as for `rollout`, or arithmetic:train:1024."""
    evaluation_prompts: Texts = ()
    """Held-out problems with answers."""
    steps: SomeCountOrNone = None
    """Optimizer steps."""
    epochs: SomeCount = None
    """Passes over the prompts, in place of --steps."""
    prompts_per_step: SomeCount = None
    """Prompts per step."""
    rollouts_per_prompt: SomeFew = None
    """Rollouts of each."""
    max_new_tokens: SomeCount = None
    """Longest response, in tokens."""
    learning_rate: SomeRate = None
    """Peak learning rate."""
    optimizer: OptimizerName | None = None
    """What turns a gradient into a step."""
    adam_epsilon: SomePositive = None
    """AdamW's ε."""
    momentum: SomeFraction = None
    """SGD's momentum."""
    match_update_norm: SomePositive = None
    """Give every step this L2 norm at the peak learning rate, whatever the optimizer makes."""
    schedule: Schedule | None = None
    """Learning rate after the warm-up."""
    warmup_steps: SomeCountOrNone = None
    """Steps of linear warm-up."""
    max_grad_norm: SomePositive = None
    """Gradients are clipped to this norm."""
    loss: TrainingLoss | None = None
    """Per-token loss; an arm may name its own, as in all,loss=k1."""
    weighting: str | None = None
    """How much each selected token counts: none, iw_opd, horvitz_thompson,
    horvitz_thompson_normalised, oracle, or a rule's name; an arm may name its own, as in
    all,weighting=soft_or."""
    jsd_beta: SomeInner = None
    """Weight of the teacher in the mixture of the loss jsd."""
    skew_alpha: SomeFraction = None
    """Mixture of the losses skew_kl and skew_reverse_kl."""
    loss_top_k: SomeCount = None
    """Tokens of the loss topk_reverse_kl."""
    loss_top_k_of: TopKSource | None = None
    """Whose likeliest tokens topk_reverse_kl takes."""
    loss_tail: TopKTail | None = None
    """What topk_reverse_kl makes of all other tokens: one bucket, or nothing."""
    entropy_gate: SomeNats = None
    """Teacher entropy, nats, above which the loss entropy_gated adds the forward KL."""
    loss_normalizer: LossNormalizer | None = None
    """Tokens that the loss is divided by: this changes the effective learning rate between arms."""
    loss_aggregation: LossAggregation | None = None
    """The mean of rollout means, or the mean over tokens."""
    selection_scope: SelectionScope | None = None
    """Within what tokens compete."""
    normalization_scope: Scope | None = None
    """On-policy: whose tokens share one min-max normalization; those of a step by default."""
    divergence_clip: SomeShare = None
    """Quantile at which the divergence is clipped before its min-max; not clipped by default."""
    entropy_cut: SomeCut = None
    """Cut on the student's entropy, for rules that read quadrants: median, mean, otsu, paper, a
    quantile such as q0.8, or nats; measured on each step's tokens, or on the run's offline."""
    divergence_cut: SomeCut = None
    """Cut on the reverse KL: likewise."""
    rescore_every: SomeCountOrNone = None
    """Offline: make the masks again with the student as it is by then, every so many steps."""
    lora_rank: SomeRank = None
    """Train LoRA adapters of this rank; 0 trains all weights."""
    precision: Literal[Precision.FLOAT32, Precision.BFLOAT16] | None = None
    """Precision of the forward and backward pass; trainable weights stay in float32."""
    micro_batch_size: SomeCount = None
    """Rollouts a backward pass: fewer take less memory and give the same numbers."""
    chunk_size: SomeCount = None
    """Rows of logits that exist at a time."""
    gradient_checkpointing: bool | None = None
    """Compute activations again in the backward pass instead of keeping them."""
    num_samples: SomeFew = None
    """k, evaluation samples of each problem."""
    evaluate_every: CountOrNone = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    dynamics_every: SomeCountOrNone = None
    """Steps between those at which entropies, divergences and quadrant shares of what the student
    writes are recorded; 0 records none."""
    checkpoint_every: Count = 20
    """Steps between checkpoints."""
    keep_every: CountOrNone = 0
    """Steps between weights that stay in the run folder, for `track`; 0 keeps none."""
    limit: SomeCount = None
    """Use the first N prompts and the first N problems of each evaluation set only."""
    on_bad_row: OnBadRow = OnBadRow.FAIL
    """A prompt or problem that cannot be used: fail, or skip it and count it."""
    template: str | None = None
    """The text around a problem: plain, boxed, or a text of your own that contains {problem}."""
    grader: str | None = None
    """math, exact, module:function or file.py:function."""
    chat_template_kwargs: Pairs = ()
    """Switches for the chat template, such as enable_thinking=false; by default the preset's."""
    teacher_context: TeacherContext = TeacherContext.NONE
    """What the teacher sees besides the prompt."""
    jobs: Processes = 1
    """Arms trained at once, each in a process of its own."""
    threads: Processes = 1
    """Threads of each such process."""
    tracker: TrackerName = TrackerName.NONE
    """What is told of each arm, step by step; offline by default, with files in the run folder."""
    margin: Part = 0.02
    """How far apart two arms may be and still count as equal (claims with ≈): a share."""
    gpu_kind: str = "h100"
    """With --dry-run, the GPU whose hours are counted: h100, h200, b200, a100-80, a100-40, l40s,
    a10, l4, rtx-4090 or mi300x."""
    dry_run: Flag = False
    """Show the plan with estimated memory, tokens and device hours, and stop; loads no model."""
    engines: TrainingEngines = field(default_factory=TrainingEngineOptions)
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Train and evaluate every arm, and judge the paper's claims on the outcome."""
        from tip_analysis.analysis.arms import parse_arms
        from tip_analysis.analysis.claims import claims_table
        from tip_analysis.cli.console import show_claims

        preset = self.experiment()
        parse_arms(preset.arms, self.ratios)
        if self.dry_run:
            self._show_plan(preset)
            return
        rows = self._train(preset)
        from tip_analysis.training.processes import launched_processes

        if launched_processes().is_first:
            self._show_results(rows, preset)
            show_claims(claims_table(rows, margin=self.margin))

    def _train(self, preset: "Preset") -> "pl.DataFrame":
        from tip_analysis.training.door import ablate

        return ablate(
            self.run,
            preset=preset,
            ratios=self.ratios,
            limit=self.limit,
            on_bad_row=self.on_bad_row,
            evaluate_every=self.evaluate_every,
            checkpoint_every=self.checkpoint_every,
            keep_every=self.keep_every,
            tracker=self.tracker,
            teacher_context=self.teacher_context,
            jobs=self.jobs,
            threads=self.threads,
            engine=self.engines.settings(),
            **self.models.loading(65_536),
        )

    def _show_plan(self, preset: "Preset") -> None:
        from tip_analysis.cli.console import show_table
        from tip_analysis.training.ablation.accelerators import gpu_kind, this_machine
        from tip_analysis.training.ablation.plans import plan_ablation
        from tip_analysis.training.ablation.problem_sets import num_prompts_of

        num_prompts = preset.num_prompts or num_prompts_of(self.run)
        planned = preset.with_steps(num_prompts) if num_prompts else preset
        plan = plan_ablation(planned, device=gpu_kind(self.gpu_kind), here=this_machine(self.run))
        show_table(f"plan of {preset.name}", plan.table())

    def _show_results(self, rows: "pl.DataFrame", preset: "Preset") -> None:
        from tip_analysis.analysis.arms import arm_results
        from tip_analysis.cli.console import show_table

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
            shown = results.filter(benchmark=benchmark).select(
                *columns, "token_share", "step_time_s"
            )
            show_table(f"{self.run}: arms on {benchmark} ({means})", shown)

    def experiment(self) -> "Preset":
        """The preset that is named, or else the run's own pair, with the user's options in place of
        its own."""
        from tip_analysis.training.ablation.presets import PRESETS, experiment

        renamed = {
            "evaluation_sets": self.evaluation_prompts,
            "arms": self.rules,
            "seeds": self.seeds,
        }
        changes = {name: value or None for name, value in renamed.items()} | {
            "num_steps": self.steps
        }
        changes |= {name: getattr(self, name) for name in _PRESET_OPTIONS}
        if self.steps is not None and self.epochs is not None:
            raise OptionError("--steps and --epochs both say how long to train: give one of them")
        if self.chat_template_kwargs:
            changes["chat_template_kwargs"] = parse_switches(self.chat_template_kwargs)
        if self.dry_run and self.preset in PRESETS:
            planned_as = PRESETS[self.preset].planned_as
            changes |= {name: changes.get(name) or value for name, value in planned_as.items()}
        return experiment(self.run, self.preset, **changes)
