"""Token scores: from columns of the token table to one float64 number a token.

Reads the token table (`tip_analysis.core.schema.TokenTable`); writes nothing. `SCORES` is a flat
registry of small functions from named columns to a polars expression, so that a table larger than
memory streams. Equation and section numbers are the paper's (arXiv 2604.14084).

The bounds of the min-max normalisations are measured once, when `add_scores` is called; what it
returns is lazy, and a filter put on it later does not move the bounds.

Deviations from the paper:
1. Soft-OR is computed as 1 − (1 − ĥ)(1 − δ̂), which equals ĥ + δ̂ − ĥδ̂ (Eq. 7) and keeps ties at ĥ
  = 1 exact.
2. δ may be clipped at a quantile of its own before its min-max. Off by default, as in the paper.
3. A divergence of +inf takes no part in the bounds and gets δ̂ = 1. A product of +inf with a factor
  of 0 is 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from tip_analysis.analysis.grids import exact_quantiles, is_large, measure_grids
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import OptionError, SchemaError, UnknownNameError
from tip_analysis.core.names import Scope

ENTROPY_CLIP = 0.98
"""Quantile of h at which it is clipped before its min-max (Section 5)."""

SCORE_COLUMNS = ("entropy_hat", "divergence_hat", "soft_or", "q3_score")
"""What `add_scores` adds."""

_ORIGIN = {
    **dict.fromkeys(SCORE_COLUMNS, "add_scores"),
    "quadrant": "assign_quadrants",
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
    return _product(columns["reverse_kl"], columns["teacher_mass_on_student_topk"])


def teacher_entropy(columns: TokenColumns) -> pl.Expr:
    """H(P_T), nats (Appendix B.1)."""
    return columns["teacher_entropy"]


def earliness(columns: TokenColumns) -> pl.Expr:
    """−position: the first tokens of a response come first (arXiv 2606.22600)."""
    return -columns["position"].cast(pl.Float64)


def descent_alignment(columns: TokenColumns) -> pl.Expr:
    """φ_t = ⟨∇L, g_t⟩, where gradients were measured (Section 5.1)."""
    return columns["grad_dot_loss"]


SCORES: dict[str, ScoreFunction] = {
    "entropy": entropy,
    "entropy_hat": entropy_hat,
    "divergence_hat": divergence_hat,
    "soft_or": soft_or,
    "q3": q3,
    "divergence": divergence,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "hellinger": hellinger,
    "entropy_jsd": entropy_jsd,
    "teachability": teachability,
    "teacher_entropy": teacher_entropy,
    "earliness": earliness,
    "descent_alignment": descent_alignment,
}
"""Every score by name."""


def register_score(name: str, score: ScoreFunction, *, overwrite: bool = False) -> None:
    """Add a score that `score_expression` knows by name.

    Args:
        name: What users call it.
        score: From the columns of the scored table, as polars expressions, to an expression:
            `lambda columns: columns["jsd"] * columns["position"]`.
        overwrite: Replace a score of that name.

    Raises:
        OptionError: the name is empty or taken.
    """
    if not name or name != name.strip():
        raise OptionError(f"a score needs a name without spaces around it; found {name!r}")
    if name in SCORES and not overwrite:
        raise OptionError(
            f"there is a score {name!r} already; choose another name, or pass overwrite=True"
        )
    SCORES[name] = score


def score_expression(tokens: pl.LazyFrame, name: str) -> pl.Expr:
    """The named score over the columns of `tokens`, Float64.

    Raises:
        UnknownNameError: there is no such score.
        SchemaError: a column that it needs is missing.
    """
    if name not in SCORES:
        raise UnknownNameError("score", name, SCORES)
    return SCORES[name](TokenColumns(tokens.collect_schema(), f"score {name!r}")).cast(pl.Float64)


@dataclass(frozen=True)
class Normalization:
    """The bounds of both min-maxes: what turns h and δ into ĥ and δ̂."""

    scope: Scope
    divergence_clip: float | None
    bounds: pl.DataFrame
    """One row per batch (or one in all): batch_id, entropy_low, entropy_high (of h),
    divergence_low, divergence_high (nats)."""

    def entropy_hat(self) -> pl.Expr:
        """ĥ in [0, 1]."""
        return self._min_max(pl.col("student_entropy_norm"), "entropy").alias("entropy_hat")

    def divergence_hat(self) -> pl.Expr:
        """δ̂ in [0, 1]; 1 where δ is +inf."""
        scaled = self._min_max(pl.col("reverse_kl"), "divergence")
        return (
            pl.when(pl.col("reverse_kl").is_infinite())
            .then(1.0)
            .otherwise(scaled)
            .alias("divergence_hat")
        )

    def _min_max(self, column: pl.Expr, axis: str) -> pl.Expr:
        low, high = self._bound(f"{axis}_low"), self._bound(f"{axis}_high")
        value = column.cast(pl.Float64)
        scaled = (pl.min_horizontal(value, high) - low) / (high - low)
        return pl.when(value.is_not_null()).then(pl.when(high > low).then(scaled).otherwise(0.0))

    def _bound(self, name: str) -> pl.Expr:
        if self.scope is Scope.RUN:
            return pl.lit(self.bounds[name][0], dtype=pl.Float64)
        batch, bound = self.bounds["batch_id"], self.bounds[name]
        return pl.col("batch_id").replace_strict(
            batch, bound, default=None, return_dtype=pl.Float64
        )


def resolve_normalization(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    normalization_scope: Scope | str = Scope.RUN,
    divergence_clip: float | None = None,
) -> Normalization:
    """Measure the bounds of ĥ and δ̂: in one pass, or in two over a table above
    `grids.LARGE_TABLE_ROWS` rows (scope `run`).

    Low is the minimum; high is the 98th percentile of h (linear interpolation), and of δ its
    largest finite value or the quantile `divergence_clip`. Rows that the student did not write and
    divergences of +inf are left out.

    Raises:
        UnknownNameError: there is no such scope.
        OptionError: `divergence_clip` is no quantile.
        SchemaError: a column is missing.
    """
    scope = Scope(normalization_scope)
    check_clip(divergence_clip)
    tokens = tokens.lazy()
    require_columns(
        tokens, ["batch_id", "loss_mask", "student_entropy_norm", "reverse_kl"], "add_scores"
    )
    if scope is Scope.RUN and is_large(tokens):
        return Normalization(scope, divergence_clip, _streamed_bounds(tokens, divergence_clip))
    bounds = _bounds(divergence_clip)
    written = tokens.filter("loss_mask")
    if scope is Scope.RUN:
        table = written.select(pl.lit(None, pl.Int32).alias("batch_id"), *bounds)
    else:
        table = written.group_by("batch_id").agg(bounds).sort("batch_id")
    return Normalization(scope, divergence_clip, table.collect(engine="streaming"))


def _bounds(divergence_clip: float | None) -> list[pl.Expr]:
    h = pl.col("student_entropy_norm").cast(pl.Float64)
    delta = pl.col("reverse_kl").cast(pl.Float64)
    finite = delta.filter(delta.is_finite())
    clipped = divergence_clip is not None
    high = finite.quantile(divergence_clip, "linear") if clipped else finite.max()
    return [
        h.min().alias("entropy_low"),
        h.quantile(ENTROPY_CLIP, "linear").alias("entropy_high"),
        finite.min().alias("divergence_low"),
        high.alias("divergence_high"),
    ]


def check_clip(divergence_clip: float | None) -> None:
    """Refuse a clip that is no quantile.

    Raises:
        OptionError: it lies outside (0, 1].
    """
    if divergence_clip is not None and not 0.0 < divergence_clip <= 1.0:
        raise OptionError(
            "divergence_clip must be a quantile in (0, 1], or None for no clipping; found"
            f" {divergence_clip}"
        )


def _streamed_bounds(tokens: pl.LazyFrame, divergence_clip: float | None) -> pl.DataFrame:
    grids = measure_grids(tokens, ["student_entropy_norm", "reverse_kl"])
    wanted = {
        "student_entropy_norm": [ENTROPY_CLIP],
        "reverse_kl": [] if divergence_clip is None else [divergence_clip],
    }
    found = exact_quantiles(tokens, grids, wanted)
    entropy, divergence = grids["student_entropy_norm"], grids["reverse_kl"]
    known = divergence.num_finite > 0
    row = {
        "batch_id": None,
        "entropy_low": entropy.low if entropy.num_finite else None,
        "entropy_high": found["student_entropy_norm"][0],
        "divergence_low": divergence.low if known else None,
        "divergence_high": (found["reverse_kl"] or [divergence.high])[0] if known else None,
    }
    return pl.DataFrame(
        [row], schema={"batch_id": pl.Int32, **dict.fromkeys(list(row)[1:], pl.Float64)}
    )


def add_scores(
    tokens: pl.LazyFrame | pl.DataFrame,
    *,
    normalization_scope: Scope | str = Scope.RUN,
    divergence_clip: float | None = None,
    normalization: Normalization | None = None,
) -> pl.LazyFrame:
    """Add ĥ, δ̂, Soft-OR and the Q3 score, Float64; null where `loss_mask` is false.

    Args:
        tokens: Rows of the token table.
        normalization_scope: `run` (all tokens share one min-max) or `batch` (those with one
            `batch_id`).
        divergence_clip: Quantile in (0, 1] at which δ is clipped before its min-max; None for no
            clipping.
        normalization: Bounds measured before (`resolve_normalization`), in place of the two
            options.

    Returns:
        The rows in their order, with `entropy_hat`, `divergence_hat`, `soft_or` in [0, 1] and
        `q3_score` in nats.

    Raises:
        UnknownNameError: there is no such scope.
        OptionError: `divergence_clip` is no quantile.
        SchemaError: a column is missing.
    """
    tokens = tokens.lazy()
    require_columns(
        tokens,
        ["batch_id", "loss_mask", "student_entropy_norm", "reverse_kl", "forward_kl"],
        "add_scores",
    )
    if normalization is None:
        normalization = resolve_normalization(
            tokens, normalization_scope=normalization_scope, divergence_clip=divergence_clip
        )
    entropy_hat, divergence_hat = pl.col("entropy_hat"), pl.col("divergence_hat")
    return tokens.with_columns(
        pl.when("loss_mask").then(normalization.entropy_hat()).alias("entropy_hat"),
        pl.when("loss_mask").then(normalization.divergence_hat()).alias("divergence_hat"),
    ).with_columns(
        (1.0 - (1.0 - entropy_hat) * (1.0 - divergence_hat)).alias("soft_or"),
        _product(pl.col("forward_kl").cast(pl.Float64), 1.0 - entropy_hat).alias("q3_score"),
    )


def _product(divergence: pl.Expr, factor: pl.Expr) -> pl.Expr:
    """divergence·factor, with +inf·0 = 0: a factor of 0 says that the token does not count."""
    return pl.when(factor == 0.0).then(factor).otherwise(divergence * factor)
