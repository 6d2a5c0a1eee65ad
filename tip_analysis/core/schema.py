"""The tables: every column's dtype, range, unit and equation, as contracts that each write and read
must keep.

Equation, section and table numbers are those of TIP (arXiv 2604.14084). Entropies and divergences
are in nats, of the temperature-1 distributions over the full shared vocabulary V. The README's
column table is generated from this file.

Rows whose `loss_mask` is false (tokens that the student did not write, such as tool output) are
kept, with null statistics. A Kullback-Leibler divergence may be +inf where one model masks a token
with a logit of -inf.
"""

import dataframely as dy
import polars as pl

from tip_analysis.core.instrument_tables import (
    InfluenceTable,
    InterventionTable,
    RankingTable,
    TrajectoryTable,
)
from tip_analysis.core.names import (
    Approximation,
    Artefact,
    CallPart,
    ConversationMatch,
    FinishReason,
    IdsOrigin,
    Loss,
    LossAggregation,
    LossNormalizer,
    Method,
    Mode,
    PlantedLabel,
    ScreenedPart,
    Segment,
    SelectionScope,
    TemplateOrigin,
    TrainingLoss,
)

SCHEMA_VERSION = 1
"""Raised by one whenever a column changes its meaning or leaves."""


class RolloutTable(dy.Schema):
    """One row per rollout: what the student was shown, what it wrote, and what it was worth."""

    rollout_id = dy.String(primary_key=True, min_length=1, description="`prompt_id/sample_index`")
    prompt_id = dy.String(min_length=1, description="Identifier of the prompt, unique in its file")
    sample_index = dy.Int32(min=0, description="Which of the rollouts of this prompt")
    batch_id = dy.Int32(
        min=0, description="The optimizer step that this rollout belongs or would belong to"
    )
    source = dy.String(
        description="What wrote it: `sampled`, or the format that it was imported from"
    )
    engine = dy.String(
        nullable=True,
        description="What sampled it: `hf`, `vllm` or `server`; null if it was imported",
    )
    environment = dy.String(
        nullable=True, description="The environment that it acted in; null for a single turn"
    )
    step = dy.Int32(
        nullable=True, min=0, description="Training step of the author, where the source says so"
    )
    messages = dy.String(
        nullable=True,
        description="Chat messages shown to the student, as JSON; null for a bare prompt",
    )
    tools = dy.String(
        nullable=True, description="Tool definitions shown with the messages, as JSON"
    )
    prompt_text = dy.String(description="The text shown to the student, chat markers included")
    prompt_token_ids = dy.List(dy.Int32(min=0), min_length=1, description="Token ids of the prompt")
    teacher_prompt_token_ids = dy.List(
        dy.Int32(min=0),
        nullable=True,
        min_length=1,
        description="The teacher's prompt where it differs from the student's",
    )
    response_text = dy.String(description="The response, special tokens included")
    response_token_ids = dy.List(
        dy.Int32(min=0), description="Exact token ids of the response, end-of-sequence included"
    )
    loss_mask = dy.List(dy.Bool(), description="True where the student wrote the token")
    turn_starts = dy.List(
        dy.Int32(min=0),
        nullable=True,
        description=(
            "Positions at which the student's turns begin; null where the mask alone tells them"
        ),
    )
    conversation_match = dy.Enum(
        ConversationMatch,
        nullable=True,
        description=(
            "Whether the ids are those of the conversation rendered at once; environments only"
        ),
    )
    sampled_logprobs = dy.List(
        dy.Float32(nullable=True),
        nullable=True,
        description="ln P of each sampled token at temperature 1, as its engine saw it",
    )
    finish_reason = dy.Enum(FinishReason, description="`stop`, `length` or `given`")
    temperature = dy.Float32(
        nullable=True, min=0, description="Sampling temperature; null if unknown"
    )
    top_p = dy.Float32(
        nullable=True, min=0, max=1, description="Nucleus of the sampling; null if unknown"
    )
    top_k = dy.Int32(
        nullable=True, min=0, description="Top-k of the sampling; 0 is none; null if unknown"
    )
    seed = dy.Int64(nullable=True, description="Seed of the sampling; null if unknown")
    reward = dy.Float32(
        nullable=True, description="The grader's verdict, or the source's; null if ungraded"
    )
    reward_parts = dy.String(
        nullable=True, description="What an environment's reward is made of, as JSON: name to value"
    )
    ground_truth = dy.String(nullable=True, description="Reference answer")
    solution = dy.String(
        nullable=True,
        description="Reference solution: the privileged context of `--teacher-context solution`",
    )
    tokenizer_fingerprint = dy.String(
        description="Hash of the token-to-id map that the ids belong to"
    )
    ids_origin = dy.Enum(IdsOrigin, description="Whether the ids are the author's own")
    template_origin = dy.Enum(
        TemplateOrigin, description="Whether the chat template is the author's own"
    )
    planted_labels = dy.List(
        dy.Enum(PlantedLabel),
        nullable=True,
        description="True label of each token; arithmetic pair only",
    )

    @dy.rule()
    def mask_has_response_length(cls) -> pl.Expr:
        return pl.col("loss_mask").list.len() == pl.col("response_token_ids").list.len()

    @dy.rule()
    def logprobs_have_response_length(cls) -> pl.Expr:
        return pl.col("sampled_logprobs").list.len() == pl.col("response_token_ids").list.len()

    @dy.rule()
    def labels_have_response_length(cls) -> pl.Expr:
        return pl.col("planted_labels").list.len() == pl.col("response_token_ids").list.len()


_NATS = {"nullable": True, "min": 0.0}
_NATS_OR_INF = {"nullable": True, "min": 0.0, "allow_inf": True}
_UNIT_INTERVAL = {"nullable": True, "min": 0.0, "max": 1.0 + 1e-5}


class TokenTable(dy.Schema):
    """One row per response token: the two axes of the taxonomy and everything else that the scorer
    reads off two logit rows."""

    rollout_id = dy.String(primary_key=True, min_length=1, description="The rollout")
    prompt_id = dy.String(min_length=1, description="The prompt")
    position = dy.Int32(primary_key=True, min=0, description="Position in the response, from 0")
    batch_id = dy.Int32(
        min=0, description="The optimizer step that the rollout belongs or would belong to"
    )
    token_id = dy.Int32(min=0, description="The sampled token y_t")
    token = dy.String(description="Its text; bytes that are no text on their own appear as U+FFFD")
    loss_mask = dy.Bool(
        description="True where the student wrote the token; elsewhere statistics are null"
    )
    turn = dy.Int32(
        nullable=True,
        min=0,
        description="The student's turn, from 0; what its environment answers belongs to it",
    )
    segment = dy.Enum(
        Segment,
        nullable=True,
        description=(
            "Part of the turn: `think`, `answer`, `tool_call` or `other`; null where the student "
            "did not write"
        ),
    )
    call_part = dy.Enum(
        CallPart,
        nullable=True,
        description="Part of a tool call: `name`, `argument` or `syntax`; null elsewhere",
    )
    student_entropy = dy.Float32(**_NATS, description="H(P_S), nats")
    student_entropy_norm = dy.Float32(
        **_UNIT_INTERVAL, description="h_t = H(P_S) / ln V, in [0, 1] (Eq. 2)"
    )
    teacher_entropy = dy.Float32(**_NATS, description="H(P_T), nats")
    reverse_kl = dy.Float32(
        **_NATS_OR_INF, description="δ_t = KL(P_S ‖ P_T), nats: the per-token training loss (Eq. 3)"
    )
    forward_kl = dy.Float32(
        **_NATS_OR_INF, description="KL(P_T ‖ P_S), nats: the Q3 ranking signal (Section 7.3)"
    )
    jsd = dy.Float32(**_NATS, description="Jensen-Shannon divergence (β = 1/2), nats, at most ln 2")
    hellinger = dy.Float32(**_UNIT_INTERVAL, description="√(½ Σ(√p − √q)²), in [0, 1]")
    student_logprob = dy.Float32(nullable=True, max=0.0, allow_inf=True, description="ln P_S(y_t)")
    teacher_logprob = dy.Float32(nullable=True, max=0.0, allow_inf=True, description="ln P_T(y_t)")
    student_top1_prob = dy.Float32(**_UNIT_INTERVAL, description="max P_S")
    teacher_top1_prob = dy.Float32(**_UNIT_INTERVAL, description="max P_T")
    top1_agree = dy.Bool(nullable=True, description="Whether both models rank the same token first")
    teacher_mass_on_student_topk = dy.Float32(
        **_UNIT_INTERVAL,
        description=(
            "Σ P_T over the student's min(16, V) most likely tokens (after arXiv 2605.26844)"
        ),
    )
    reverse_kl_logit_grad_norm = dy.Float32(
        **_NATS_OR_INF, description="‖∂KL(P_S ‖ P_T)/∂z‖₂ over the student's logits z"
    )
    forward_kl_logit_grad_norm = dy.Float32(**_NATS, description="‖P_S − P_T‖₂ (Eq. 12)")
    logit_curvature = dy.Float32(
        **_NATS, description="gᵀHg, g = P_S − P_T, H = diag(P_S) − P_S P_Sᵀ (Eq. 13)"
    )
    w_local = dy.Float32(
        **_NATS, description="‖g‖² / gᵀHg (Eq. 6 at η = 1); null where either underflows"
    )
    k1_variance = dy.Float32(
        **_NATS_OR_INF,
        description=(
            "Variance (trace) of (ρ_y − b)(e_y − P_S), y ~ P_S, ρ = ln P_S/P_T, at b = 0: the "
            "one-sample estimate of ∂δ/∂z"
        ),
    )
    k1_variance_centred = dy.Float32(**_NATS_OR_INF, description="The same at b = δ")
    k1_snr = dy.Float32(
        **_NATS_OR_INF,
        description=(
            "‖∂δ/∂z‖² over that variance at the best scalar b; null where the variance is not told "
            "from rounding"
        ),
    )
    ier = dy.Float32(
        **_NATS_OR_INF,
        description=(
            "Information-geometric ratio over the student's min(16, V) most likely tokens, "
            "renormalised (arXiv 2609.24432); null for fewer than three"
        ),
    )
    topk_bias = dy.Float32(
        **_NATS_OR_INF,
        description=(
            "δ less the reverse KL of the student's min(16, V) most likely tokens and one bucket "
            "for the rest, nats"
        ),
    )
    topk_bias_no_tail = dy.Float32(
        nullable=True,
        allow_inf=True,
        description="δ less Σ P_S ln P_S/P_T over these tokens alone, nats; of either sign",
    )
    student_stop_mass = dy.Float32(
        **_UNIT_INTERVAL, description="Σ P_S over the tokens with which either model stops"
    )
    teacher_stop_mass = dy.Float32(**_UNIT_INTERVAL, description="Σ P_T over these")
    stop_mismatch = dy.Float32(
        **_NATS_OR_INF,
        description=(
            "The part of δ that is which of these tokens to stop with, nats (arXiv 2609.20511)"
        ),
    )
    student_topk_ids = dy.List(
        dy.Int32(min=0), nullable=True, description="The student's most likely tokens"
    )
    student_topk_logprobs = dy.List(
        dy.Float32(max=0.0, allow_inf=True), nullable=True, description="Their ln P_S"
    )
    teacher_topk_ids = dy.List(
        dy.Int32(min=0), nullable=True, description="The teacher's most likely tokens"
    )
    teacher_topk_logprobs = dy.List(
        dy.Float32(max=0.0, allow_inf=True), nullable=True, description="Their ln P_T"
    )
    artefact = dy.Enum(
        Artefact,
        nullable=True,
        description="Why the token only looks important; null where nothing speaks against it",
    )
    approximation = dy.Enum(
        Approximation,
        nullable=True,
        description="`top-k`: divergences are lower bounds, from the teacher's top tokens",
    )
    planted_label = dy.Enum(
        PlantedLabel, nullable=True, description="True label of the token; arithmetic pair only"
    )

    @dy.rule()
    def statistics_where_the_student_wrote(cls) -> pl.Expr:
        return pl.col("student_entropy").is_not_null() == pl.col("loss_mask")

    @dy.rule()
    def top_tokens_have_probabilities(cls) -> pl.Expr:
        lengths = {
            model: [pl.col(f"{model}_topk_{kind}").list.len() for kind in ("ids", "logprobs")]
            for model in ("student", "teacher")
        }
        return pl.all_horizontal(ids.eq_missing(logprobs) for ids, logprobs in lengths.values())


ALWAYS_THERE = (
    "student_entropy_norm",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "jsd",
    "hellinger",
    "student_logprob",
    "teacher_logprob",
    "student_top1_prob",
    "teacher_top1_prob",
    "top1_agree",
    "teacher_mass_on_student_topk",
    "forward_kl_logit_grad_norm",
)
"""Columns of `TokenTable` that every written token has, unless the table's record names them as
not available: its teacher is approximate."""


class VocabularyTable(dy.Schema):
    """One row per token that both models share: names for tokens that were likely but not
    sampled."""

    token_id = dy.Int32(primary_key=True, min=0, description="The token")
    token = dy.String(description="Its text; bytes that are no text on their own appear as U+FFFD")


class GradientTable(dy.Schema):
    """One row per response token, loss and parameter scope: the size of its own gradient and where
    it points."""

    rollout_id = dy.String(primary_key=True, min_length=1, description="The rollout")
    position = dy.Int32(primary_key=True, min=0, description="Position in the response, from 0")
    loss = dy.Enum(Loss, primary_key=True, description="The per-token loss ℓ_t")
    param_scope = dy.String(
        primary_key=True, description="Parameters that θ stands for: all, body, head, last:N, lora"
    )
    method = dy.Enum(
        Method, primary_key=True, description="Random probes, or one backward pass a token"
    )
    num_probes = dy.Int32(
        primary_key=True, min=0, description="K, the number of probes; 0 for exact"
    )
    seed = dy.Int64(primary_key=True, description="Seed of the probes")
    grad_norm_sq = dy.Float64(min=0.0, description="M_t = ‖∇_θ ℓ_t‖², or its unbiased estimate")
    grad_norm_sq_se = dy.Float64(
        min=0.0, description="Its standard error, √(2/K) of what was probed; 0 for exact"
    )
    grad_dot_loss = dy.Float64(
        nullable=True, description="φ_t = ⟨∇L, ∇ℓ_t⟩, ∇L from the other fold of prompts"
    )
    grad_dot_loss_plugin = dy.Float64(
        description="φ_t with ∇L from all tokens, this one included: positive by construction"
    )
    reward_alignment = dy.Float64(
        nullable=True,
        description=(
            "−⟨∇J, ∇ℓ_t⟩, J the expected reward over other prompts: positive raises the reward"
        ),
    )


class MaskTable(dy.Schema):
    """One row per selected token of a selection."""

    rule = dy.String(primary_key=True, min_length=1, description="Selection rule")
    retention_ratio = dy.Float64(
        primary_key=True, min_exclusive=0.0, max=1.0, description="ρ in (0, 1]"
    )
    selection_scope = dy.Enum(
        SelectionScope, primary_key=True, description="Within what tokens compete"
    )
    seed = dy.Int64(primary_key=True, description="Seed of a sampling rule")
    rollout_id = dy.String(primary_key=True, min_length=1, description="The rollout")
    position = dy.Int32(primary_key=True, min=0, description="Position in the response, from 0")


class ScreenTable(dy.Schema):
    """One row per class of artefact and part of a run: how much of the part is artefact."""

    artefact = dy.String(
        primary_key=True, min_length=1, description="Class of artefact; `any` for all together"
    )
    part = dy.Enum(ScreenedPart, primary_key=True, description="`quadrant`, `sum` or `mask`")
    name = dy.String(
        primary_key=True,
        min_length=1,
        description="The quadrant, the column that is summed, or the mask as `rule:ratio`",
    )
    num_tokens = dy.Int64(min=0, description="Tokens of the part")
    num_artefacts = dy.Int64(min=0, description="Tokens of the part that are such artefacts")
    share = dy.Float64(nullable=True, description="Their share of the part: of tokens, or of a sum")
    share_low = dy.Float64(nullable=True, description="Its 95% interval, by resampling prompts")
    share_high = dy.Float64(nullable=True, description="Upper end of the interval")
    jaccard = dy.Float64(
        nullable=True,
        min=0.0,
        max=1.0,
        description=(
            "Masks: agreement, on all other tokens, with the mask made without any artefact"
        ),
    )
    entropy_cut = dy.String(primary_key=True, description="The entropy cut as it was asked for")
    divergence_cut = dy.String(primary_key=True, description="The divergence cut likewise")


class EvaluationTable(dy.Schema):
    """One row per graded sample."""

    model = dy.String(primary_key=True, description="The model, as it was named")
    benchmark = dy.String(
        primary_key=True, min_length=1, description="The set that the problem belongs to"
    )
    problem_id = dy.String(primary_key=True, description="The problem")
    sample_index = dy.Int32(
        primary_key=True, min=0, description="Which of the samples of this problem"
    )
    reward = dy.Float32(description="The grader's verdict")
    answer = dy.String(
        nullable=True, description="The answer that the grader read; null where it reads none"
    )
    reward_parts = dy.String(
        nullable=True, description="What an environment's reward is made of, as JSON: name to value"
    )
    num_turns = dy.Int32(
        nullable=True, min=1, description="Turns of the model in an environment; null without one"
    )
    num_tokens = dy.Int32(min=0, description="Tokens of the response")
    finish_reason = dy.Enum(FinishReason, description="`stop` or `length`")
    response_text = dy.String(description="The response")
    seed = dy.Int64(primary_key=True, description="Seed of the sampling")


class AblationTable(dy.Schema):
    """One row per evaluation of one arm (rule and retention ratio) under one seed on one benchmark;
    step 0 is the student before training."""

    arm_key = dy.String(
        primary_key=True, description="Hash of everything that decides the arm's numbers"
    )
    rule = dy.String(
        min_length=1,
        description=(
            "Selection rule, with a loss or weighting of the arm's own as in `all,loss=k1`;"
            " `untrained` for the student as it was"
        ),
    )
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    selection_scope = dy.Enum(SelectionScope, description="Within what tokens compete")
    seed = dy.Int64(
        description="Seed of prompt order, sampling, selection and evaluation: equal across arms"
    )
    mode = dy.Enum(Mode, description="Fresh rollouts each step, or a fixed table of them")
    loss = dy.Enum(TrainingLoss, description="The per-token loss that was minimised")
    weighting = dy.String(
        min_length=1, description="How much each selected token counted; `none` for all the same"
    )
    loss_normalizer = dy.Enum(LossNormalizer, description="Tokens that the loss is divided by")
    loss_aggregation = dy.Enum(
        LossAggregation, description="Mean of rollout means, or mean over tokens"
    )
    step = dy.Int32(
        primary_key=True, min=0, description="Optimizer steps done when the student was evaluated"
    )
    num_steps = dy.Int32(min=0, description="Steps of the whole training")
    benchmark = dy.String(
        primary_key=True, min_length=1, description="The set of problems of this evaluation"
    )
    accuracy = dy.Float64(description="mean@k: mean reward over samples and problems")
    accuracy_se = dy.Float64(
        nullable=True, min=0.0, description="Its standard error, over problems and samples"
    )
    best_at_k = dy.Float64(description="Best@k: mean over problems of the best of k samples")
    num_problems = dy.Int32(min=1, description="Problems of the evaluation")
    num_samples = dy.Int32(min=1, description="k, samples a problem")
    majority_at_k = dy.Float64(
        nullable=True,
        description=(
            "majority@k: mean over problems of the reward of the commonest answer among k samples;"
            " null where the grader reads no answer"
        ),
    )
    response_tokens = dy.Float64(
        nullable=True, min=0.0, description="Mean length of an evaluation response, tokens"
    )
    truncated_share = dy.Float64(
        **_UNIT_INTERVAL, description="Evaluation responses that the length limit cut off"
    )
    heldout_reverse_kl = dy.Float64(
        nullable=True,
        min=0.0,
        allow_inf=True,
        description="Mean KL(P_S ‖ P_T) on the student's own held-out samples, nats a token",
    )
    tokens_trained = dy.Int64(min=0, description="Tokens that carried loss up to this step")
    tokens_seen = dy.Int64(
        min=0, description="Tokens that the student wrote in the rollouts up to this step"
    )
    train_loss = dy.Float64(
        nullable=True,
        allow_inf=True,
        description="Mean loss of the steps since the evaluation before",
    )
    losses = dy.List(dy.Float64(allow_inf=True), description="Loss of each of these steps")
    learning_rate = dy.Float64(min=0.0, description="Learning rate of the last step")
    step_time_s = dy.Float64(
        nullable=True,
        min=0.0,
        description="Median wall time of these steps, evaluation left out, s",
    )
    peak_memory_bytes = dy.Int64(
        min=0, description="Peak of device memory, or of the resident set on a CPU"
    )
    drift_reverse_kl = dy.Float64(
        nullable=True,
        min=0.0,
        allow_inf=True,
        description="Offline: mean KL(student ‖ rollouts' author), nats a token",
    )
    effective_sample_size = dy.Float64(
        nullable=True,
        min=0.0,
        max=1.0 + 1e-6,
        description="Offline: share of rollouts that importance weights leave, in (0, 1]",
    )
    problem_ids = dy.List(dy.String(), description="The problems")
    problem_accuracy = dy.List(
        dy.Float64(), description="Mean reward over the k samples of each problem"
    )
    problem_best = dy.List(dy.Float64(), description="Best reward of the k samples of each problem")
    problem_correct = dy.List(
        dy.Int32(min=0), description="Samples of each problem whose reward is at least 1"
    )

    @dy.rule()
    def problems_have_results(cls) -> pl.Expr:
        count = pl.col("problem_ids").list.len()
        lists = ("problem_accuracy", "problem_best", "problem_correct")
        return pl.all_horizontal(pl.col(name).list.len() == count for name in lists)


class DynamicsTable(dy.Schema):
    """One row per arm, seed and observed step of its training: what the student wrote at that step,
    and what was made of it. Means and shares are over the tokens that it wrote."""

    arm_key = dy.String(primary_key=True, description="The arm's rows in `ablations` have it too")
    rule = dy.String(min_length=1, description="As in `ablations`")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    seed = dy.Int64(description="Seed of the arm")
    step = dy.Int32(primary_key=True, min=0, description="Which step, from 0")
    loss = dy.Float64(allow_inf=True, description="Loss of the step, as normalised")
    learning_rate = dy.Float64(min=0.0, description="Learning rate of the step")
    grad_norm = dy.Float64(min=0.0, description="Norm of the gradient before clipping")
    tokens_seen = dy.Int64(min=0, description="Tokens that the student wrote")
    tokens_trained = dy.Int64(min=0, description="Tokens that carried loss")
    response_tokens = dy.Float64(min=0.0, description="Mean length of a response, tokens")
    truncated_share = dy.Float64(
        **_UNIT_INTERVAL, description="Responses that the length limit cut off; null if unknown"
    )
    student_entropy = dy.Float64(**_NATS, description="Mean H(P_S), nats")
    reverse_kl = dy.Float64(**_NATS, description="Mean δ, nats, infinite values left out")
    share_q1 = dy.Float64(**_UNIT_INTERVAL, description="Share of Q1, by the step's own cuts")
    share_q2 = dy.Float64(**_UNIT_INTERVAL, description="Share of Q2")
    share_q3 = dy.Float64(**_UNIT_INTERVAL, description="Share of Q3")
    share_q4 = dy.Float64(**_UNIT_INTERVAL, description="Share of Q4")
    divergence_q1 = dy.Float64(**_NATS, description="Mean δ in Q1, nats; null where it is empty")
    divergence_q2 = dy.Float64(**_NATS, description="Mean δ in Q2, nats")
    divergence_q3 = dy.Float64(**_NATS, description="Mean δ in Q3, nats")
    divergence_q4 = dy.Float64(**_NATS, description="Mean δ in Q4, nats")
    selected_share_q1 = dy.Float64(**_UNIT_INTERVAL, description="Of Q1, what carried loss")
    selected_share_q2 = dy.Float64(**_UNIT_INTERVAL, description="Of Q2, what carried loss")
    selected_share_q3 = dy.Float64(**_UNIT_INTERVAL, description="Of Q3, what carried loss")
    selected_share_q4 = dy.Float64(**_UNIT_INTERVAL, description="Of Q4, what carried loss")
    soft_or_overlap = dy.Float64(
        **_UNIT_INTERVAL, description="Jaccard overlap with Soft-OR's selection at the same ρ"
    )
    topk_overlap = dy.Float64(
        **_UNIT_INTERVAL,
        description="Mean share of the student's min(16, V) likeliest tokens among the teacher's",
    )


TABLES: dict[str, type[dy.Schema]] = {
    "rollouts": RolloutTable,
    "vocabulary": VocabularyTable,
    "tokens": TokenTable,
    "gradients": GradientTable,
    "masks": MaskTable,
    "screens": ScreenTable,
    "rankings": RankingTable,
    "influences": InfluenceTable,
    "interventions": InterventionTable,
    "trajectories": TrajectoryTable,
    "ablations": AblationTable,
    "dynamics": DynamicsTable,
    "evaluations": EvaluationTable,
}
"""Name of the folder in a run, and the contract of the rows in it."""

LATER_COLUMNS: dict[str, frozenset[str]] = {
    "rollouts": frozenset({"environment", "turn_starts", "conversation_match", "reward_parts"}),
    "tokens": frozenset({"turn", "segment", "call_part"}),
    "evaluations": frozenset({"answer", "reward_parts", "num_turns"}),
}
"""Columns that tables of this schema version may lack, since they came later: they are null there.
"""
