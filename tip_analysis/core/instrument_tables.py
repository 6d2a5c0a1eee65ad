"""The tables of the instruments: selectors ranked, influences, interventions, trajectories.

Contracts as those of `schema`, which lists all tables by name.
"""

from typing import Any

import dataframely as dy

from tip_analysis.core.names import (
    FinishReason,
    ForcedToken,
    Loss,
    Method,
    Preconditioner,
    Quadrant,
    RankFigure,
    SelectionScope,
    TokenUse,
)

_NUMBER: dict[str, Any] = {"nullable": True, "allow_inf": True}


class RankingTable(dy.Schema):
    """One row per rule, retention ratio and figure: what a selection keeps, without training."""

    rule = dy.String(primary_key=True, min_length=1, description="Selection rule or weighting")
    form = dy.Enum(TokenUse, primary_key=True, description="`selection` or `weighting`")
    retention_ratio = dy.Float64(
        primary_key=True, min_exclusive=0.0, max=1.0, description="ρ in (0, 1]; 1 for a weighting"
    )
    selection_scope = dy.Enum(
        SelectionScope, primary_key=True, description="Within what tokens compete"
    )
    figure = dy.Enum(RankFigure, primary_key=True, description="What is measured")
    param_scope = dy.String(primary_key=True, description="Of the measurement of gradients")
    method = dy.Enum(Method, primary_key=True, description="Of the measurement")
    num_probes = dy.Int32(primary_key=True, min=0, description="Of the measurement")
    seed = dy.Int64(primary_key=True, description="Of the measurement: probes and folds")
    value = dy.Float64(**_NUMBER, description="The figure; larger is more")
    replicates = dy.List(
        dy.Float64(nullable=True, allow_inf=True),
        description="The figure in each resample of prompts, one set of resamples for all rules",
    )
    num_selected = dy.Float64(min=0.0, description="Tokens selected, mean over mask seeds")
    num_tokens = dy.Int64(min=0, description="Tokens whose gradients were measured")
    num_prompts = dy.Int64(min=0, description="Their prompts")


class InfluenceTable(dy.Schema):
    """One row per token and source group a: what a step on the group does to the token's loss."""

    grouping = dy.String(primary_key=True, min_length=1, description="What tokens are grouped by")
    preconditioner = dy.Enum(
        Preconditioner, primary_key=True, description="What a step multiplies gradients by"
    )
    param_scope = dy.String(
        primary_key=True, description="Parameters that θ stands for: all, body, head, last:N, lora"
    )
    loss = dy.Enum(Loss, primary_key=True, description="The per-token loss ℓ_t")
    seed = dy.Int64(primary_key=True, description="Of the two folds of prompts")
    source = dy.String(
        primary_key=True, min_length=1, description="The group a whose step is meant"
    )
    rollout_id = dy.String(primary_key=True, min_length=1, description="The rollout")
    position = dy.Int32(primary_key=True, min=0, description="Position in the response, from 0")
    prompt_id = dy.String(min_length=1, description="The prompt")
    fold = dy.Int8(min=0, max=1, description="The prompt's fold; ∇L_a comes from the other one")
    group = dy.String(min_length=1, description="The token's own group")
    weight = dy.Float64(
        min=0.0, description="The token's weight in L within its fold; they sum to 1 in each"
    )
    grad_dot_source = dy.Float64(
        nullable=True,
        description="⟨P ∇L_a, ∇ℓ_t⟩: a small step on the group lowers ℓ_t by this times its size",
    )


class InterventionTable(dy.Schema):
    """One row per continuation: a token of a rollout, what was put in its place, and what became of
    the response."""

    test_key = dy.String(primary_key=True, min_length=1, description="Hash of the configuration")
    rollout_id = dy.String(primary_key=True, min_length=1, description="The rollout")
    position = dy.Int32(primary_key=True, min=0, description="The token that is tested")
    choice = dy.Enum(ForcedToken, primary_key=True, description="`student`, `teacher` or `fresh`")
    continuation = dy.Int32(primary_key=True, min=0, description="Which of the continuations")
    prompt_id = dy.String(min_length=1, description="The prompt")
    stratum = dy.Enum(Quadrant, description="The quadrant that it was drawn from")
    forced_token_id = dy.Int32(
        nullable=True, min=0, description="What was put in its place; null for a fresh sample"
    )
    reward = dy.Float32(description="The grader's verdict on the whole response")
    num_tokens = dy.Int32(min=0, description="Tokens of the whole response")
    finish_reason = dy.Enum(FinishReason, description="`stop` or `length`")


class TrajectoryTable(dy.Schema):
    """One row per token of fixed contexts and checkpoint of an arm: the token's statistics under
    the student of that step."""

    arm_key = dy.String(primary_key=True, min_length=1, description="The arm's key in `ablations`")
    step = dy.Int32(primary_key=True, min=0, description="Optimizer steps done")
    rollout_id = dy.String(primary_key=True, min_length=1, description="The rollout")
    position = dy.Int32(primary_key=True, min=0, description="Position in the response, from 0")
    prompt_id = dy.String(min_length=1, description="The prompt")
    rule = dy.String(min_length=1, description="The arm's selection rule")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="The arm's ρ")
    seed = dy.Int64(description="The arm's seed")
    student_entropy = dy.Float32(min=0.0, description="H(P_S) by then, nats")
    student_entropy_norm = dy.Float32(min=0.0, max=1.0 + 1e-5, description="H(P_S) / ln V by then")
    reverse_kl = dy.Float32(min=0.0, allow_inf=True, description="δ_t by then, nats")
    forward_kl = dy.Float32(min=0.0, allow_inf=True, description="KL(P_T ‖ P_S) by then, nats")
