"""The commands' options: a frozen dataclass for each command, whose field docstrings are its
`--help`.

Nothing is imported but tyro's markers, so that help is quick. Groups of options that several
commands share are dataclasses of their own; their fields carry no prefix on the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg, subcommand

from tip_analysis.cli.ranges import (
    Count,
    CountOrNone,
    Cut,
    Few,
    Part,
    Processes,
    Ratios,
    Seed,
    Seeds,
    Share,
    SomeCount,
    SomeCountOrNone,
    SomeFew,
    SomePositive,
    SomeProcesses,
    SomeRank,
    SomeRate,
    SomeSeconds,
    SomeShare,
    Temperature,
    TopK,
    ToyPrompts,
)
from tip_analysis.core.names import (
    Loss,
    LossAggregation,
    LossNormalizer,
    Method,
    Mode,
    OnBadRow,
    Precision,
    Schedule,
    Scope,
    ScoringEngine,
    ScoringPhase,
    SelectionScope,
    StopTokens,
    TeacherContext,
    TeacherStoreForm,
    TrainingLoss,
)

Flag = FlagCreatePairsOff[bool]
RunFolder = Annotated[Positional[Path], arg(metavar="RUN")]
Names = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")]


@dataclass(frozen=True)
class ModelOptions:
    """Wherever a model is loaded."""

    dtype: str = "auto"
    """Dtype of the weights: auto (bfloat16 where the device computes in it natively, else float32)
    or its name."""
    device: str = "auto"
    """Where models run: auto (a GPU if there is one; over several, a model is spread), cpu, cuda,
    cuda:1, mps."""
    token_budget: SomeCount = None
    """Tokens a batch, padding included; halves itself when memory runs out. By default 16,384, and
    65,536 in `ablate`."""

    def loading(self, token_budget: int = 16384) -> dict[str, Any]:
        """How models are loaded and batched, as the door's functions take it."""
        return {
            "token_budget": self.tokens_a_batch(token_budget),
            "dtype": self.dtype,
            "device": self.device,
        }

    def tokens_a_batch(self, default: int = 16384) -> int:
        """The budget that was named, or the default."""
        return default if self.token_budget is None else self.token_budget


@dataclass(frozen=True)
class TaxonomyOptions:
    """Wherever scores and quadrants are computed."""

    entropy_cut: Cut = "median"
    """Cut on the student's entropy: median, mean, otsu, paper, a quantile such as q0.8, or a number
    in nats."""
    divergence_cut: Cut = "mean"
    """Cut on the reverse KL: likewise."""
    cut_scope: Scope = Scope.RUN
    """Whose tokens a cut is measured on: all of the run's, or those of one optimizer step."""
    normalization_scope: Scope = Scope.RUN
    """Whose tokens share one min-max normalization."""
    divergence_clip: SomeShare = None
    """Quantile at which the divergence is clipped before its min-max, such as 0.98; not clipped by
    default, as in the paper."""


@dataclass(frozen=True)
class CommonOptions:
    """Every command has these."""

    debug: Flag = False
    """Show the traceback of an error."""
    verify: Flag = False
    """Check every file of the run folder against the hashes on record, and every row of its tables,
    before anything is made of them; small tables are always checked."""
    lock_timeout: SomeSeconds = None
    """Seconds to wait for another process that is at work on the same thing; 60 by default."""


Pairs = Annotated[tuple[str, ...], arg(metavar="KEY=VALUE [KEY=VALUE ...]")]
Models = OmitArgPrefixes[ModelOptions]
Taxonomy = OmitArgPrefixes[TaxonomyOptions]
Common = OmitArgPrefixes[CommonOptions]


@dataclass(frozen=True)
class Demo:
    """Run everything on the embedded arithmetic pair, and write a report: a few minutes on a
    laptop."""

    out: Path = Path("runs/demo")
    """Run folder to write."""
    report: Path | None = None
    """Report to write; by default reports/NAME.html, NAME being the run folder's."""
    num_prompts: ToyPrompts = 192
    """Problems to solve."""
    num_rollouts: Few = 4
    """Rollouts of each problem."""
    seed: Seed = 0
    """Seed of the sampling."""
    overwrite: Flag = False
    """Start afresh, whatever the folder holds."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Rollout:
    """Sample rollouts of the student for every prompt."""

    run: RunFolder
    """Run folder; made if it does not exist."""
    student: str
    """The student: hub id (id@revision), local folder (a LoRA adapter's too), .gguf file, or a
    built-in name."""
    prompts: str
    """JSONL or Parquet file with problem, prompt or messages (and id, answer, solution), or a hub
    dataset (name:split)."""
    num_rollouts: Few = 4
    """Rollouts of each prompt."""
    max_new_tokens: Count = 512
    """Longest response, in tokens."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Share = 1.0
    """Nucleus: sample from the most likely tokens that hold this much probability."""
    top_k: CountOrNone = 0
    """Sample from the k most likely tokens only; 0 is off."""
    seed: Seed = 0
    """Seed of the sampling: a rollout depends on it, on its prompt's id and on its index, not on
    its batch."""
    limit: SomeCount = None
    """Use the first N prompts only."""
    on_bad_row: OnBadRow = OnBadRow.FAIL
    """A row of the prompts that cannot be used: fail, or skip it and count it."""
    template: str = "plain"
    """The text around a problem: plain, boxed, or a text of your own that contains {problem}."""
    chat_template_kwargs: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE [KEY=VALUE ...]")] = ()
    """Switches for the chat template, such as enable_thinking=false."""
    grader: str | None = None
    """math, exact, none, module:function or file.py:function; by default math where prompts have
    answers."""
    prompts_per_batch: Count = 8
    """Prompts whose rollouts make one optimizer step (column batch_id)."""
    overwrite: Flag = False
    """Start afresh: removes the run's rollouts and what was built on them."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Import:
    """Bring in rollouts that another tool wrote, or text that is given."""

    run: RunFolder
    """Run folder; made if it does not exist."""
    from_: Annotated[str, arg(name="from", metavar="FORMAT")]
    """Who wrote them: native, text, chat, verl, trl, lighteval, lm-eval, openai, vllm."""
    files: Annotated[tuple[Path, ...], arg(metavar="FILE [FILE ...]")]
    """Files to read, or folders of them."""
    student: str
    """The model that wrote them, or is to be analysed on them: its tokenizer gives the token
    ids."""
    prompts: str | None = None
    """The prompts that they answer, as for `rollout`: chat markers and answers that the files lost
    come back from them."""
    template: str = "plain"
    """The text around a problem in the prompts: plain, boxed, or a text of your own that
    contains {problem}."""
    chat_template_kwargs: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE [KEY=VALUE ...]")] = ()
    """Switches for the chat template, such as enable_thinking=false."""
    reward_key: str | None = None
    """Field that holds the reward, where a format has several."""
    filter_name: str | None = None
    """Filter of lm-evaluation-harness whose rows to read."""
    all_turns: Flag = False
    """Analyse every turn of the assistant, not only the last."""
    prompts_per_batch: Count = 8
    """Prompts whose rollouts make one optimizer step (column batch_id), where the files name no
    step."""
    limit: SomeCount = None
    """Use the first N rollouts only."""
    on_bad_row: OnBadRow = OnBadRow.FAIL
    """What a row does that cannot be used: fail (nothing is imported; the message names file and
    line) or skip (it is left out, counted and reported)."""
    overwrite: Flag = False
    """Start afresh: removes the run's rollouts and what was built on them."""
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Score:
    """Score every response token with student and teacher: entropies, divergences, top-k, logit
    gradients."""

    run: RunFolder
    """Run folder with rollouts."""
    teacher: str
    """The teacher: named as the student is."""
    student: str | None = None
    """The student; by default the one that wrote the rollouts."""
    teacher_context: TeacherContext = TeacherContext.NONE
    """What the teacher sees besides the prompt: nothing, or the reference solution in the user's
    turn."""
    top_k: TopK = 5
    """How many of each model's most likely tokens are kept."""
    stop_tokens: StopTokens = StopTokens.DECLARED
    """Tokens with which student or teacher stop: as they are declared, or merged into one, so that
    which of them a model prefers is no disagreement."""
    shard_size: Count = 64
    """Rollouts a shard: what is done again after an interruption."""
    shard: str = "0/1"
    """i/n: make only every n-th shard, from the i-th on, as one of n array jobs."""
    phase: ScoringPhase = ScoringPhase.BOTH
    """Both models at once; or, where they do not fit together, first the teacher, whose states are
    stored, then the student."""
    teacher_store: TeacherStoreForm = TeacherStoreForm.HIDDEN
    """What --phase teacher stores: hidden states (exact), or the top tokens (smaller; divergences
    become lower bounds)."""
    store_k: Count = 64
    """Tokens that --teacher-store topk keeps."""
    discard_teacher_states: Flag = False
    """With --phase student: delete the teacher's states once every token is scored."""
    engine: ScoringEngine = ScoringEngine.LOCAL
    """One process, or Ray actors that share the work."""
    ray_workers: SomeProcesses = None
    """Ray actors; by default one for each GPU, or one for each machine without GPUs."""
    overwrite: Flag = False
    """Start afresh: removes the run's token table and what was built on it."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Select:
    """Select tokens by one or more rules, and write the masks."""

    run: Annotated[Positional[Path | None], arg(metavar="RUN")] = None
    """Run folder with scored tokens."""
    rules: Names = ()
    """Rules to select by; --list shows them."""
    ratios: Ratios = (0.1, 0.2, 0.5)
    """Retention ratios in (0, 1]."""
    seeds: Seeds = (0,)
    """Seeds of the sampling rules."""
    selection_scope: SelectionScope = SelectionScope.ROLLOUT
    """Within what tokens compete."""
    measurement: Pairs = ()
    """Whose gradients gradient_oracle selects by, where several were measured: param_scope=…,
    method=…, num_probes=…, seed=…; by default what the run prefers (its first)."""
    list: Flag = False
    """Show every rule with what it does, and stop."""
    overwrite: Flag = False
    """Make masks again that are there already."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Screen:
    """Find tokens that only look important: stop tokens, special tokens, outliers and other
    artefacts, and how much of each quadrant, sum and mask they are."""

    run: RunFolder
    """Run folder with scored tokens."""
    rules: Names = ("entropy", "divergence", "soft_or", "q3")
    """Rules whose masks are screened."""
    ratios: Ratios = (0.1, 0.2, 0.5)
    """Retention ratios in (0, 1]."""
    seed: Seed = 0
    """Seed of the intervals, and of rules that sample."""
    overwrite: Flag = False
    """Screen again what was screened already."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Status:
    """Show which stages of a run are done, what they hold, and what can come next."""

    run: RunFolder
    """Run folder."""
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Compare:
    """Set two runs side by side: quadrant shares, divergences, and tokens that change their
    quadrant."""

    run_a: Annotated[Positional[Path], arg(metavar="RUN_A")]
    """First run folder."""
    run_b: Annotated[Positional[Path], arg(metavar="RUN_B")]
    """Second run folder."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Export:
    """Write tokens with their scores, quadrants and masks as flat Parquet files."""

    run: RunFolder
    """Run folder with scored tokens."""
    to: Path
    """Folder to write."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    overwrite: Flag = False
    """Replace what the folder holds."""
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Report:
    """Make one self-contained HTML page from one or more runs."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders with scored tokens; several are compared side by side."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE")] = None
    """Where the page is written; by default reports/NAME.html, NAME being the first run's."""
    measurement: Pairs = ()
    """Which gradients, where several were measured: param_scope=…, method=…, num_probes=…, seed=…;
    by default what the run prefers (its first)."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Gradients:
    """Measure the gradient norm of every token's own loss, and where it points (Proposition 1)."""

    run: RunFolder
    """Run folder with scored tokens; student, teacher and teacher context are those of `score`."""
    loss: tuple[Loss, ...] = (Loss.REVERSE_KL, Loss.FORWARD_KL)
    """Per-token losses."""
    method: Method = Method.PROBE
    """Random probes (a cost that does not grow with the number of tokens), or one backward pass a
    token."""
    num_probes: Count = 32
    """Probes a rollout: the relative standard error of a squared norm is √(2/K)."""
    params: str = "all"
    """Parameters that count: all, body, head, last:N, lora."""
    loss_aggregation: LossAggregation = LossAggregation.ROLLOUT
    """The loss L whose descent is meant: the mean of rollout means, or the mean over tokens."""
    seed: Seed = 0
    """Seed of the probes and of the two folds of prompts."""
    limit: SomeCount = None
    """Use the first N rollouts only."""
    overwrite: Flag = False
    """Measure again what this configuration has measured."""
    prefer: Flag = False
    """Take the numbers of this run from this measurement from now on; else from its first."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)


@dataclass(frozen=True)
class Evaluate:
    """Sample answers to problems, grade them, and report mean@k and Best@k with standard errors."""

    run: RunFolder
    """Run folder that the rows go to; made if it does not exist."""
    model: str
    """The model: named as a student is."""
    prompts: Annotated[tuple[str, ...], arg(metavar="FILE [FILE ...]")]
    """Problems with answers, as for `rollout`; each file or hub dataset is a benchmark of its
    own."""
    num_samples: Few = 16
    """k, samples of each problem."""
    max_new_tokens: Count = 512
    """Longest response, in tokens."""
    temperature: Temperature = 1.0
    """Sampling temperature."""
    top_p: Share = 1.0
    """Nucleus."""
    seed: Seed = 0
    """Seed of the sampling."""
    limit: SomeCount = None
    """Use the first N problems of each benchmark only."""
    on_bad_row: OnBadRow = OnBadRow.FAIL
    """A row that cannot be used, one without an answer included: fail, or skip it and count it."""
    template: str = "plain"
    """The text around a problem."""
    chat_template_kwargs: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE [KEY=VALUE ...]")] = ()
    """Switches for the chat template."""
    grader: str | None = None
    """math, exact, module:function or file.py:function; by default math, or exact for the
    arithmetic pair."""
    overwrite: Flag = False
    """Make the rows of this configuration again."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)


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
    """Rules, each at every ratio, or with ratios of its own as in q3:0.1:0.2; by default the
    preset's arms."""
    ratios: Ratios = ()
    """Retention ratios in (0, 1]."""
    seeds: Seeds = ()
    """Seeds of every arm: prompts, sampling and selection; by default the preset's."""
    preset: str | None = None
    """arithmetic, qwen3-8b-4b, llama-70b-8b, qwen2.5-14b-1.5b, qwen3-14b-1.7b-agentic or
    qwen3-32b-1.7b-agentic."""
    mode: Mode | None = None
    """Fresh rollouts at every step, or the run's own rollouts and masks."""
    student: str | None = None
    """The student; by default the run's or the preset's."""
    teacher: str | None = None
    """The teacher; likewise."""
    prompts: str | None = None
    """What is trained on: a file or hub dataset as for `rollout`, or arithmetic:train:1024."""
    evaluation_prompts: Annotated[tuple[str, ...], arg(metavar="FILE [FILE ...]")] = ()
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
    """Peak learning rate of AdamW."""
    schedule: Schedule | None = None
    """Learning rate after the warm-up."""
    warmup_steps: SomeCountOrNone = None
    """Steps of linear warm-up."""
    max_grad_norm: SomePositive = None
    """Gradients are clipped to this norm."""
    loss: TrainingLoss | None = None
    """Per-token loss."""
    loss_normalizer: LossNormalizer | None = None
    """Tokens that the loss is divided by: this changes the effective learning rate between arms."""
    loss_aggregation: LossAggregation | None = None
    """The mean of rollout means, or the mean over tokens."""
    selection_scope: SelectionScope | None = None
    """Within what tokens compete."""
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
    checkpoint_every: Count = 20
    """Steps between checkpoints."""
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
    margin: Part = 0.02
    """How far apart two arms may be and still count as equal (claims with ≈): a share."""
    dry_run: Flag = False
    """Show the plan with estimated memory, tokens and device hours, and stop; loads no model."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Rollout, subcommand("rollout")]
    | Annotated[Import, subcommand("import")]
    | Annotated[Score, subcommand("score")]
    | Annotated[Gradients, subcommand("gradients")]
    | Annotated[Select, subcommand("select")]
    | Annotated[Screen, subcommand("screen")]
    | Annotated[Ablate, subcommand("ablate")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Report, subcommand("report")]
)
"""What one command line can be."""
