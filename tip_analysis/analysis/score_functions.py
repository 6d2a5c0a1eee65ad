"""What a score is made of: columns of the token table as expressions, and the score functions.

Reads and writes nothing. Each function takes columns (`TokenColumns`) and gives a polars
expression, so that a table larger than memory streams; `scores` has them by name. Equation and
section numbers are the paper's (arXiv 2604.14084).
"""

import math
from collections.abc import Callable

import polars as pl

from tip_analysis.core.errors import SchemaError

SCORE_COLUMNS = ("entropy_hat", "divergence_hat", "forward_hat", "soft_or", "q3_score")
"""What `scores.add_scores` adds."""

_ORIGIN = {
    **dict.fromkeys(SCORE_COLUMNS, "add_scores"),
    "quadrant": "assign_quadrants",
    "teacher_topk_ids": "score",
    "grad_dot_loss": "the gradients stage and join_gradients",
    "grad_norm_sq": "the gradients stage and join_gradients",
}


class TokenColumns:
    """The columns of a token table as expressions: `columns["jsd"]` is that column, floats in
    float64."""

    def __init__(self, schema: pl.Schema, purpose: str = "a score") -> None:
        self._schema = schema
        self._purpose = purpose

    def __getitem__(self, name: str) -> pl.Expr:
        """The column as an expression.

        Raises:
            SchemaError: the table has no such column; the message says which step adds it.
        """
        if name not in self._schema:
            origin = f"; {_ORIGIN[name]} adds it" if name in _ORIGIN else ""
            raise SchemaError(
                f"{self._purpose} needs the column {name!r}{origin}; the table has"
                f" {', '.join(self._schema)}"
            )
        column = pl.col(name)
        return column.cast(pl.Float64) if self._schema[name].is_float() else column


class RecordedColumns(TokenColumns):
    """Columns of any table, which remember those that were asked for."""

    def __init__(self) -> None:
        super().__init__(pl.Schema(), "a rule")
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> pl.Expr:
        """The column as an expression, whatever its name."""
        self.seen.add(name)
        return pl.col(name)


ScoreFunction = Callable[[TokenColumns], pl.Expr]


def entropy(columns: TokenColumns) -> pl.Expr:
    """h_t = H(P_S) / ln V, in [0, 1] (Eq. 2)."""
    return columns["student_entropy_norm"]


def entropy_hat(columns: TokenColumns) -> pl.Expr:
    """ĥ: h clipped at its 98th percentile, then min-max, in [0, 1]."""
    return columns["entropy_hat"]


def divergence_hat(columns: TokenColumns) -> pl.Expr:
    """δ̂: min-max of δ, in [0, 1]."""
    return columns["divergence_hat"]


def soft_or(columns: TokenColumns) -> pl.Expr:
    """s = 1 − (1 − ĥ)(1 − δ̂), in [0, 1] (Eq. 7)."""
    return columns["soft_or"]


def soft_or_product(columns: TokenColumns) -> pl.Expr:
    """ĥ·δ̂, in [0, 1]: the part of Soft-OR that both axes share."""
    return columns["entropy_hat"] * columns["divergence_hat"]


def soft_or_max(columns: TokenColumns) -> pl.Expr:
    """max(ĥ, δ̂), in [0, 1]: the hard or."""
    return pl.max_horizontal(columns["entropy_hat"], columns["divergence_hat"])


def soft_or_sum(columns: TokenColumns) -> pl.Expr:
    """ĥ + δ̂, in [0, 2]."""
    return columns["entropy_hat"] + columns["divergence_hat"]


def soft_or_forward(columns: TokenColumns) -> pl.Expr:
    """1 − (1 − ĥ)(1 − δ̂^fwd), in [0, 1]: Soft-OR with the forward KL as its second axis."""
    return 1.0 - (1.0 - columns["entropy_hat"]) * (1.0 - columns["forward_hat"])


def q3(columns: TokenColumns) -> pl.Expr:
    """δ^fwd·(1 − ĥ), nats (Section 7.3): overconfident and wrong."""
    return columns["q3_score"]


def divergence(columns: TokenColumns) -> pl.Expr:
    """δ_t = KL(P_S ‖ P_T), nats (Eq. 3)."""
    return columns["reverse_kl"]


def forward_kl(columns: TokenColumns) -> pl.Expr:
    """KL(P_T ‖ P_S), nats."""
    return columns["forward_kl"]


def jsd(columns: TokenColumns) -> pl.Expr:
    """Jensen-Shannon divergence, nats, at most ln 2."""
    return columns["jsd"]


def hellinger(columns: TokenColumns) -> pl.Expr:
    """Hellinger distance, in [0, 1]."""
    return columns["hellinger"]


def entropy_jsd(columns: TokenColumns, *, alpha: float = 1.0, gamma: float = 1.0) -> pl.Expr:
    """h^α·(JSD / ln 2)^γ, in [0, 1]; an exponent of 1 is no power at all, so that the product is
    the same everywhere."""

    def power(base: pl.Expr, exponent: float) -> pl.Expr:
        return base if exponent == 1.0 else base.pow(exponent)

    return power(columns["student_entropy_norm"], alpha) * power(
        columns["jsd"] / math.log(2.0), gamma
    )


def teachability(columns: TokenColumns) -> pl.Expr:
    """δ times the teacher's mass on the student's most likely tokens, nats (after arXiv
    2605.26844)."""
    return product_with_infinity(columns["reverse_kl"], columns["teacher_mass_on_student_topk"])


def teachability_scaled(columns: TokenColumns) -> pl.Expr:
    """D̃·C̃ in [0, 1]: δ, and the teacher's mass on the student's most likely tokens, each from its
    5th (0) to its 95th percentile (1) over the written tokens of its batch, and clipped there
    (arXiv 2605.26844). A divergence of +inf takes no part in the percentiles and gets D̃ = 1."""
    return _between_percentiles(columns, "reverse_kl") * _between_percentiles(
        columns, "teacher_mass_on_student_topk"
    )


def _between_percentiles(columns: TokenColumns, name: str) -> pl.Expr:
    value = columns[name]
    known = value.filter(columns["loss_mask"] & value.is_finite())
    low, high = (known.quantile(q, "linear").over(columns["batch_id"]) for q in (0.05, 0.95))
    scaled = ((value - low) / (high - low)).clip(0.0, 1.0)
    return (
        pl.when(value.is_infinite())
        .then(1.0)
        .when(value.is_not_null())
        .then(pl.when(high > low).then(scaled).otherwise(0.0))
    )


def information_ratio(columns: TokenColumns) -> pl.Expr:
    """IER (arXiv 2609.24432): signal over noise of the one-sample estimator among the student's
    likeliest tokens; 0 where it is not known (fewer than three, or nothing told from rounding)."""
    ratio = columns["ier"]
    return ratio.fill_nan(None).fill_null(0.0)


def lateness(columns: TokenColumns) -> pl.Expr:
    """The position: the last tokens of a response come first."""
    return columns["position"].cast(pl.Float64)


def teacher_entropy(columns: TokenColumns) -> pl.Expr:
    """H(P_T), nats (Appendix B.1)."""
    return columns["teacher_entropy"]


def earliness(columns: TokenColumns) -> pl.Expr:
    """−position: the first tokens of a response come first (arXiv 2606.22600)."""
    return -columns["position"].cast(pl.Float64)


def descent_alignment(columns: TokenColumns) -> pl.Expr:
    """φ_t = ⟨∇L, g_t⟩, where gradients were measured (Section 5.1)."""
    return columns["grad_dot_loss"]


def product_with_infinity(divergence: pl.Expr, factor: pl.Expr) -> pl.Expr:
    """divergence·factor, with +inf·0 = 0: a factor of 0 says that the token does not count."""
    return pl.when(factor == 0.0).then(factor).otherwise(divergence * factor)
