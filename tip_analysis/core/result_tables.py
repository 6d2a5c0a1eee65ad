"""The result tables that figures take: columns, ranges and meaning, each as one contract.

The analysis makes them, the figures check them (`checked`), and either names the contract in place
of a list of columns. A table may hold more columns than its contract: what is not named here is
passed on. Shares are in [0, 1] unless their sign is open, as that of a share of Σφ is; ends of
intervals (95 %) are null where there is none, and are not held to the range of their value, since
an interval may reach beyond it.
"""

import dataframely as dy
import polars as pl

from tip_analysis.core.contract_checks import first_fault, polars_schema, require_columns
from tip_analysis.core.errors import SchemaError
from tip_analysis.core.names import ForcedToken, Quadrant, RankFigure, TokenUse
from tip_analysis.core.text import one_line

VERDICTS = ("supported", "contradicted", "not resolved", "not run")
"""What can be said of a claim."""
QUANTITIES = ("tokens", "grad_norm_sq", "grad_dot_loss")
"""What a quadrant has a share of: the number of tokens, Σ‖g‖², Σφ."""

_SHARE = {"nullable": True, "min": 0.0, "max": 1.0 + 1e-9}


class QuadrantShareTable(dy.Schema):
    """Share of the tokens in each quadrant, run by run: `RunView.share_table`."""

    run = dy.String(primary_key=True, description="Name of the run")
    quadrant = dy.Enum(Quadrant, primary_key=True, description="Quadrant")
    share = dy.Float64(**_SHARE, description="Of the tokens that the student wrote")
    share_low = dy.Float64(nullable=True, description="Low end of its interval")
    share_high = dy.Float64(nullable=True, description="High end")


class QuadrantFlowTable(dy.Schema):
    """Where the tokens of one run are in another run of the same rollouts, 16 rows:
    `analysis.quadrant_flow`."""

    quadrant_a = dy.Enum(Quadrant, primary_key=True, description="Quadrant in the one run")
    quadrant_b = dy.Enum(Quadrant, primary_key=True, description="Quadrant in the other")
    num_tokens = dy.Int64(min=0, description="Tokens")
    share = dy.Float64(**_SHARE, description="Of all tokens that both runs hold")
    low = dy.Float64(nullable=True, description="Low end of its interval")
    high = dy.Float64(nullable=True, description="High end")


class DensityTable(dy.Schema):
    """Tokens per cell of the plane of both axes, one row per cell that holds tokens; no cell
    crosses a cut, and values below the first edge lie in the first cell: `analysis.density`."""

    entropy_left = dy.Float64(description="Left edge of the cell, student entropy, nats")
    entropy_right = dy.Float64(description="Right edge")
    divergence_left = dy.Float64(description="Lower edge of the cell, reverse KL, nats")
    divergence_right = dy.Float64(description="Upper edge")
    num_tokens = dy.Int64(min=1, description="Tokens in the cell")
    quadrant = dy.Enum(Quadrant, description="Quadrant of most of them")


class CutSensitivityTable(dy.Schema):
    """Shares of the quadrants under every pair of cuts of a grid, a full product:
    `analysis.cut_sensitivity`."""

    entropy_cut = dy.Float64(allow_inf=True, description="Cut on the student's entropy, nats")
    divergence_cut = dy.Float64(allow_inf=True, description="Cut on the reverse KL, nats")
    Q1 = dy.Float64(min=0.0, max=1.0 + 1e-9, description="Share of Q1")
    Q2 = dy.Float64(min=0.0, max=1.0 + 1e-9, description="Share of Q2")
    Q3 = dy.Float64(min=0.0, max=1.0 + 1e-9, description="Share of Q3")
    Q4 = dy.Float64(min=0.0, max=1.0 + 1e-9, description="Share of Q4")
    in_paper_ranges = dy.Bool(description="Whether all shares lie in the paper's ranges")


class QuadrantProfileTable(dy.Schema):
    """Means by quadrant under each loss: `analysis.gradient_profile`, `analysis.logit_profile`."""

    loss = dy.String(primary_key=True, description="The per-token loss")
    measure = dy.String(primary_key=True, description="What is averaged, in words")
    quadrant = dy.Enum(Quadrant, primary_key=True, description="Quadrant")
    value = dy.Float64(nullable=True, description="Its mean over the quadrant's tokens")
    low = dy.Float64(nullable=True, description="Low end of its interval")
    high = dy.Float64(nullable=True, description="High end")


class EnergyShareTable(dy.Schema):
    """What each quadrant has of the tokens, of Σ‖g‖² and of Σφ: `analysis.energy_shares`."""

    loss = dy.String(primary_key=True, description="The per-token loss")
    quantity = dy.Enum(QUANTITIES, primary_key=True, description="What is shared out")
    quadrant = dy.Enum(Quadrant, primary_key=True, description="Quadrant")
    share = dy.Float64(nullable=True, description="A share of Σφ may be negative or above 1")
    low = dy.Float64(nullable=True, description="Low end of its interval")
    high = dy.Float64(nullable=True, description="High end")


class CompositionTable(dy.Schema):
    """What each selection is made of: `analysis.composition`."""

    rule = dy.String(description="Selection rule")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    quadrant = dy.Enum(Quadrant, description="Quadrant")
    share = dy.Float64(**_SHARE, description="Of the selection, in this quadrant")
    token_share = dy.Float64(**_SHARE, description="Of all tokens, in this quadrant")


class OverlapTable(dy.Schema):
    """How far two selections agree, one row per unordered pair: `analysis.overlap`."""

    rule_a = dy.String(description="Rule of the one")
    rule_b = dy.String(description="Rule of the other")
    jaccard = dy.Float64(**_SHARE, description="Tokens in both over tokens in either")


class CoverageTable(dy.Schema):
    """How much of a quantity each rule keeps: `analysis.coverage_curve`, one quantity at a time."""

    rule = dy.String(description="Selection rule")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    share = dy.Float64(nullable=True, description="Kept over total; of either sign where φ is")
    share_low = dy.Float64(nullable=True, description="Low end of its interval")
    share_high = dy.Float64(nullable=True, description="High end")


class GroupTable(dy.Schema):
    """Quadrants within groups of tokens: `analysis.group_effects` of one or more groupings."""

    grouping = dy.String(primary_key=True, description="Name of the grouping")
    group = dy.String(primary_key=True, description="Group of tokens, in words")
    quadrant = dy.Enum(Quadrant, primary_key=True, description="Quadrant")
    share = dy.Float64(**_SHARE, description="Of the group, in this quadrant")
    num_tokens = dy.Int64(min=0, description="Tokens of this group in this quadrant")


class ArmAccuracyTable(dy.Schema):
    """Accuracy of each arm of an ablation and of the student before it:
    `analysis.arm_accuracies`."""

    rule = dy.String(description="Selection rule; `untrained` for the student before training")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    accuracy = dy.Float64(description="Mean over seeds, in [0, 1] where rewards are")
    low = dy.Float64(nullable=True, description="Low end of its interval over seeds")
    high = dy.Float64(nullable=True, description="High end")


class PaperDifferenceTable(dy.Schema):
    """The paper's own differences, one row for each of its pairs and benchmarks with both arms:
    `analysis.paper_differences_from_all`."""

    rule = dy.String(description="Selection rule")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    difference = dy.Float64(description="Accuracy minus that of training on all tokens")


class ArmDifferenceTable(PaperDifferenceTable):
    """Accuracy of each arm minus that of `all`, paired by seed: `analysis.differences_from_all`."""

    low = dy.Float64(nullable=True, description="Low end of its interval over seeds")
    high = dy.Float64(nullable=True, description="High end")


class ClaimEffectTable(dy.Schema):
    """The effect behind each claim: `analysis.claim_effects`."""

    claim = dy.String(description="The claim and its arms, in words")
    effect = dy.Float64(nullable=True, description="Accuracy of arm A minus that of arm B")
    low = dy.Float64(nullable=True, description="Low end of its interval over seeds")
    high = dy.Float64(nullable=True, description="High end")
    margin = dy.Float64(
        nullable=True, min=0.0, description="How far apart counts as equal; null for claims of >"
    )
    verdict = dy.Enum(VERDICTS, description="What the interval says")


class PairAccuracyTable(dy.Schema):
    """Accuracy of each arm of several pairs of models and of their mean: `analysis.arms_of_pairs`,
    `analysis.paper_arms_of_pairs`."""

    rule = dy.String(description="Selection rule")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    pair = dy.String(description="The pair, or `mean over pairs`")
    accuracy = dy.Float64(description="Mean over seeds and benchmarks")
    best_at_k = dy.Float64(nullable=True, description="Best@k likewise")


class DynamicsCurveTable(dy.Schema):
    """One quantity of training over steps, arm by arm: `analysis.dynamics_curves`, one metric at a
    time."""

    arm = dy.String(description="The arm, as it is spelled")
    metric = dy.String(description="A column of the dynamics table")
    step = dy.Float64(min=0.0, description="Mean step of the bin")
    value = dy.Float64(nullable=True, description="Mean over the bin's steps, then over seeds")
    low = dy.Float64(nullable=True, description="Smallest of the seeds")
    high = dy.Float64(nullable=True, description="Largest of the seeds")


class MemoryTable(dy.Schema):
    """Peak memory of training by arm: `analysis.relative_memory`, `analysis.paper_memory`."""

    rule = dy.String(description="Selection rule")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    relative_memory = dy.Float64(min=0.0, description="Over that of training on all tokens")


class LeagueTable(dy.Schema):
    """Rules in the order of offline figures, with the ranks that they may have:
    `analysis.league_table`."""

    rule = dy.String(description="Selection rule or weighting")
    form = dy.Enum(TokenUse, description="Which of the two")
    retention_ratio = dy.Float64(min_exclusive=0.0, max=1.0, description="ρ in (0, 1]")
    figure = dy.Enum(RankFigure, description="What rules are ordered by")
    value = dy.Float64(nullable=True, allow_inf=True, description="The figure; larger is more")
    low = dy.Float64(nullable=True, description="Low end of its interval")
    high = dy.Float64(nullable=True, description="High end")
    rank = dy.Int64(nullable=True, min=1, description="1 is the largest")
    rank_low = dy.Int64(nullable=True, min=1, description="The best rank that is not ruled out")
    rank_high = dy.Int64(nullable=True, min=1, description="The worst")


class ValidityTable(dy.Schema):
    """Rank correlation of offline figures with trained accuracy: `analysis.ranking_validity`."""

    benchmark = dy.String(description="The benchmark of the accuracy")
    figure = dy.Enum(RankFigure, description="The offline figure")
    retention_ratio = dy.Float64(nullable=True, description="Arms of this ρ; null for all arms")
    spearman = dy.Float64(min=-1.0 - 1e-9, max=1.0 + 1e-9, description="Over arms")
    low = dy.Float64(nullable=True, description="Low end of its interval over arms")
    high = dy.Float64(nullable=True, description="High end")
    num_arms = dy.Int64(min=1, description="Arms that were ranked and trained")
    verdict = dy.String(description="Whether the figure predicts, in words")


class InfluenceMatrix(dy.Schema):
    """What a step on one group does to the loss of another: `analysis.influence_matrix`."""

    source = dy.String(description="The group a that the step is for")
    target = dy.String(description="The group b whose loss changes")
    influence = dy.Float64(nullable=True, description="⟨P ∇L_a, ∇L_b⟩, cross-fitted")
    influence_low = dy.Float64(nullable=True, description="Low end of its interval")
    influence_high = dy.Float64(nullable=True, description="High end")
    cosine = dy.Float64(nullable=True, description="The same over both norms; null where noise")
    cosine_low = dy.Float64(nullable=True, description="Low end of its interval")
    cosine_high = dy.Float64(nullable=True, description="High end")
    per_token = dy.Float64(nullable=True, description="The same over the weights of both groups")


class DroppedTable(dy.Schema):
    """What Assumption 2 drops: `analysis.assumption_2`."""

    group = dy.String(description="Group of tokens; `all` for the whole loss")
    norm_sq = dy.Float64(description="‖Σ w_t g_t‖²")
    kept = dy.Float64(nullable=True, description="Σ w_t² ‖g_t‖²; null where norms are missing")
    kept_share = dy.Float64(nullable=True, description="The second over the first")


class FlowTable(dy.Schema):
    """Tokens by quadrant at a kept step and at the next: `analysis.trajectory_flow`."""

    step_from = dy.Int64(min=0, description="A kept step")
    step_to = dy.Int64(min=0, description="The next one")
    quadrant_from = dy.Enum(Quadrant, description="Quadrant at the one")
    quadrant_to = dy.Enum(Quadrant, description="Quadrant at the other")
    num_tokens = dy.Int64(min=0, description="Tokens that were in the one and are in the other")
    share = dy.Float64(min=0.0, max=1.0 + 1e-9, description="Of all tokens")


class SurvivalTable(dy.Schema):
    """Of the tokens that are Q3 at the first step, those that still are: `analysis.q3_survival`."""

    tokens = dy.String(description="All, selected, not selected, planted errors")
    step = dy.Int64(min=0, description="Kept step")
    share = dy.Float64(min=0.0, max=1.0 + 1e-9, description="Share that is Q3 at this step")
    low = dy.Float64(nullable=True, description="Low end of its interval")
    high = dy.Float64(nullable=True, description="High end")
    half_life = dy.Float64(nullable=True, description="Step at which half are left; null if never")


class FallTable(dy.Schema):
    """Scores before training against the realised fall of δ: `analysis.realised_falls`."""

    tokens = dy.String(description="All, selected, not selected, planted errors")
    score = dy.String(description="The score before training")
    spearman = dy.Float64(nullable=True, description="Rank correlation with the fall of δ")
    low = dy.Float64(nullable=True, description="Low end of its interval")
    high = dy.Float64(nullable=True, description="High end")


class EffectTable(dy.Schema):
    """Paired Δ success of replacing tokens: `analysis.intervention_effects`."""

    group = dy.String(description="Group of tested tokens; `all` for all of them")
    choice = dy.Enum(ForcedToken, description="What was put in place of the student's token")
    success_student = dy.Float64(nullable=True, description="Mean reward with the student's token")
    difference = dy.Float64(nullable=True, description="Mean reward with the other, minus that")
    low = dy.Float64(nullable=True, description="Low end of its interval")
    high = dy.Float64(nullable=True, description="High end")
    num_tokens = dy.Int64(min=1, description="Tested tokens")


class AucTable(dy.Schema):
    """How well scores find tokens whose replacement raises success:
    `analysis.intervention_aucs`."""

    score = dy.String(description="The score")
    auc = dy.Float64(**_SHARE, description="Area under the ROC curve")
    low = dy.Float64(nullable=True, description="Low end of its interval")
    high = dy.Float64(nullable=True, description="High end")


class HypothesisTable(dy.Schema):
    """Verdicts on hypotheses that were registered before: `analysis.judge_hypotheses`."""

    claim = dy.String(description="Its name")
    statement = dy.String(description="What it says")
    difference = dy.Float64(nullable=True, description="A minus B")
    low = dy.Float64(nullable=True, description="Low end of its corrected interval")
    high = dy.Float64(nullable=True, description="High end")
    confidence = dy.Float64(min=0.0, max=1.0, description="Of that interval")
    verdict = dy.Enum(VERDICTS, description="What the interval says")
    size = dy.Int64(min=0, description="Seeds or prompts that it stands on")


def checked(table: pl.DataFrame, schema: type[dy.Schema]) -> pl.DataFrame:
    """The table, its columns as its contract has them; columns of its own are left as they are.

    Numbers of another width, and text in place of an enumeration, are taken as the contract's.

    Raises:
        SchemaError: a column is missing, holds values of another kind, or breaks a rule; the
            message names the contract, the column and the first such row.
    """
    columns = polars_schema(schema)
    require_columns(table.lazy(), list(columns), schema.__name__)
    typed = pl.DataFrame([_cast(table[name], kind, schema) for name, kind in columns.items()])
    if (fault := first_fault(typed, schema)) is not None:
        raise SchemaError(f"{schema.__name__}: {fault}")
    return table.with_columns(typed)


def _cast(values: pl.Series, kind: pl.DataType, schema: type[dy.Schema]) -> pl.Series:
    try:
        return values.cast(kind)
    except pl.exceptions.PolarsError as error:
        raise SchemaError(
            f"{schema.__name__}: the column {values.name} must be {kind}, found {values.dtype}"
            f" ({one_line(str(error), 120)})"
        ) from error
