"""The rules that come with the package, in the order in which lists show them.

Deviations from the paper: `random` is a control that it lacks; `all` ignores ρ; the quadrants as
rules, and the rules of other sources, are not the paper's.
"""

import polars as pl

from tip_analysis.analysis import score_functions
from tip_analysis.analysis.rule_kind import Rule
from tip_analysis.analysis.score_functions import TokenColumns
from tip_analysis.core.names import Quadrant


def _uniform(columns: TokenColumns) -> pl.Expr:
    return pl.lit(1.0) + 0.0 * columns["position"]


def _soft_or_bottom(columns: TokenColumns) -> pl.Expr:
    return -score_functions.soft_or(columns)


def _not_soft_or(columns: TokenColumns) -> pl.Expr:
    return 1.0 - score_functions.soft_or(columns)


def _floored_alignment(columns: TokenColumns) -> pl.Expr:
    return score_functions.descent_alignment(columns).clip(lower_bound=0.0)


def _share_left(columns: TokenColumns) -> pl.Expr:
    """From 1 at the first written token of a rollout down to 1/m at its last."""
    return 1.0 - (_place(columns) - 1.0) / _length(columns)


def _share_done(columns: TokenColumns) -> pl.Expr:
    """From 1/m at the first written token of a rollout up to 1 at its last."""
    return _place(columns) / _length(columns)


def _place(columns: TokenColumns) -> pl.Expr:
    """Which of its rollout's written tokens a token is, from 1."""
    position, written = columns["position"], columns["loss_mask"]
    return position.rank("ordinal").over(columns["rollout_id"], written).cast(pl.Float64)


def _length(columns: TokenColumns) -> pl.Expr:
    return columns["loss_mask"].sum().over(columns["rollout_id"]).cast(pl.Float64)


def _is_accepted(columns: TokenColumns) -> pl.Expr:
    """1 where the teacher's most likely tokens contain the token, else 0."""
    return _in_top_k(columns).cast(pl.Float64)


def _accepted(columns: TokenColumns) -> pl.Expr:
    return pl.when(_in_top_k(columns)).then(columns["teacher_logprob"])


def _in_top_k(columns: TokenColumns) -> pl.Expr:
    return columns["teacher_topk_ids"].list.contains(columns["token_id"])


def _of_quadrant(quadrant: Quadrant) -> Rule:
    return _member_rule(f"quadrant:{quadrant}", [quadrant], f"the tokens of {quadrant}")


def _outside(quadrant: Quadrant) -> Rule:
    others = [other for other in Quadrant if other != quadrant]
    return _member_rule(f"not:{quadrant}", others, f"all tokens but those of {quadrant}")


def _member_rule(name: str, quadrants: list[Quadrant], words: str) -> Rule:
    """The tokens of some quadrants: all at ρ = 1, else the k with the largest divergence."""

    def inside(columns: TokenColumns) -> pl.Expr:
        return columns["quadrant"].cast(pl.String).is_in([str(name) for name in quadrants])

    def score(columns: TokenColumns) -> pl.Expr:
        return pl.when(inside(columns)).then(columns["reverse_kl"])

    def weight(columns: TokenColumns) -> pl.Expr:
        return inside(columns).cast(pl.Float64)

    return Rule(
        name,
        score,
        partial=True,
        complete=False,
        weight=weight,
        description=f"{words}, at most k: those with the largest divergence",
    )


BUILT_IN: tuple[Rule, ...] = (
    Rule("all", _uniform, keeps_all=True, description="every token, whatever ρ"),
    Rule(
        "random",
        _uniform,
        sampled=True,
        reference="lower reference",
        description="uniform without replacement: the control",
    ),
    Rule("entropy", score_functions.entropy, description="top-k of student entropy"),
    Rule(
        "entropy_sampling",
        score_functions.entropy,
        sampled=True,
        description="sampled in proportion to student entropy",
    ),
    Rule(
        "soft_or",
        score_functions.soft_or,
        description="top-k of Soft-OR of entropy and divergence (Eq. 8)",
    ),
    Rule(
        "soft_or_bottom",
        _soft_or_bottom,
        weight=_not_soft_or,
        description="the lowest-scoring k of Soft-OR: the paper's control",
    ),
    Rule(
        "q3",
        score_functions.q3,
        description="top-k of forward KL × (1 − normalised entropy): overconfident and wrong",
    ),
    Rule("divergence", score_functions.divergence, description="top-k of reverse KL alone"),
    Rule("forward_kl", score_functions.forward_kl, description="top-k of forward KL alone"),
    Rule("jsd", score_functions.jsd, description="top-k of Jensen-Shannon divergence alone"),
    Rule("hellinger", score_functions.hellinger, description="top-k of Hellinger distance alone"),
    Rule(
        "entropy_jsd_sampling",
        score_functions.entropy_jsd,
        sampled=True,
        description="sampled in proportion to student entropy × Jensen-Shannon divergence",
    ),
    Rule(
        "teachability",
        score_functions.teachability,
        description="top-k of reverse KL × teacher's mass on the student's likeliest tokens",
        complete=False,
    ),
    Rule(
        "position",
        score_functions.earliness,
        weight=_share_left,
        description="the first k tokens of the response",
    ),
    Rule(
        "last",
        score_functions.lateness,
        weight=_share_done,
        description="the last k tokens of the response",
    ),
    Rule(
        "random_window",
        _uniform,
        window=True,
        description="k neighbouring tokens at a random place of each rollout",
    ),
    Rule(
        "soft_or_product",
        score_functions.soft_or_product,
        description="top-k of normalised entropy × normalised divergence",
    ),
    Rule(
        "soft_or_max",
        score_functions.soft_or_max,
        description="top-k of the larger of normalised entropy and divergence",
    ),
    Rule(
        "soft_or_sum",
        score_functions.soft_or_sum,
        description="top-k of normalised entropy + normalised divergence",
    ),
    Rule(
        "soft_or_forward",
        score_functions.soft_or_forward,
        description="top-k of Soft-OR of entropy and forward KL",
    ),
    Rule(
        "ier",
        score_functions.information_ratio,
        complete=False,
        description="top-k of the information-geometric ratio (arXiv 2609.24432)",
    ),
    Rule(
        "ta_opd",
        score_functions.teachability_scaled,
        of_batch=True,
        complete=False,
        description="top-k of divergence × compatibility, scaled by the batch (arXiv 2605.26844)",
    ),
    Rule(
        "selectkd",
        _accepted,
        partial=True,
        complete=False,
        weight=_is_accepted,
        description="tokens among the teacher's top-k, likeliest first (propose and verify)",
    ),
    *(_of_quadrant(quadrant) for quadrant in Quadrant),
    *(_outside(quadrant) for quadrant in Quadrant),
    Rule(
        "teacher_entropy",
        score_functions.teacher_entropy,
        description="top-k of teacher entropy",
        complete=False,
    ),
    Rule(
        "gradient_oracle",
        score_functions.descent_alignment,
        weight=_floored_alignment,
        needs_gradients=True,
        reference="upper reference",
        reference_of="grad_dot_loss",
        description="top-k of φ = ⟨∇L, g⟩, where gradients were measured: an upper reference",
        complete=False,
    ),
)
"""Every rule of the package."""
