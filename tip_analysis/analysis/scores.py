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

from dataclasses import dataclass

import polars as pl

from tip_analysis.analysis import score_functions
from tip_analysis.analysis.grids import exact_quantiles, is_large, measure_grids
from tip_analysis.analysis.score_functions import ScoreFunction, TokenColumns, product_with_infinity
from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.names import Scope

ENTROPY_CLIP = 0.98
"""Quantile of h at which it is clipped before its min-max (Section 5)."""

SCORES: dict[str, ScoreFunction] = {
    "entropy": score_functions.entropy,
    "entropy_hat": score_functions.entropy_hat,
    "divergence_hat": score_functions.divergence_hat,
    "soft_or": score_functions.soft_or,
    "soft_or_product": score_functions.soft_or_product,
    "soft_or_max": score_functions.soft_or_max,
    "soft_or_sum": score_functions.soft_or_sum,
    "soft_or_forward": score_functions.soft_or_forward,
    "q3": score_functions.q3,
    "divergence": score_functions.divergence,
    "forward_kl": score_functions.forward_kl,
    "jsd": score_functions.jsd,
    "hellinger": score_functions.hellinger,
    "entropy_jsd": score_functions.entropy_jsd,
    "teachability": score_functions.teachability,
    "teachability_scaled": score_functions.teachability_scaled,
    "ier": score_functions.information_ratio,
    "teacher_entropy": score_functions.teacher_entropy,
    "earliness": score_functions.earliness,
    "lateness": score_functions.lateness,
    "descent_alignment": score_functions.descent_alignment,
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
    divergence_low, divergence_high, forward_low, forward_high (nats)."""

    def entropy_hat(self) -> pl.Expr:
        """ĥ in [0, 1]."""
        return self._min_max(pl.col("student_entropy_norm"), "entropy").alias("entropy_hat")

    def divergence_hat(self) -> pl.Expr:
        """δ̂ in [0, 1]; 1 where δ is +inf."""
        return self._divergence("reverse_kl", "divergence").alias("divergence_hat")

    def forward_hat(self) -> pl.Expr:
        """The forward KL likewise."""
        return self._divergence("forward_kl", "forward").alias("forward_hat")

    def _divergence(self, column: str, axis: str) -> pl.Expr:
        scaled = self._min_max(pl.col(column), axis)
        return pl.when(pl.col(column).is_infinite()).then(1.0).otherwise(scaled)

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
        tokens,
        ["batch_id", "loss_mask", "student_entropy_norm", "reverse_kl", "forward_kl"],
        "add_scores",
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


_DIVERGENCES = {"divergence": "reverse_kl", "forward": "forward_kl"}
"""The column of each divergence whose bounds are measured."""


def _bounds(divergence_clip: float | None) -> list[pl.Expr]:
    h = pl.col("student_entropy_norm").cast(pl.Float64)
    bounds = [
        h.min().alias("entropy_low"),
        h.quantile(ENTROPY_CLIP, "linear").alias("entropy_high"),
    ]
    for axis, column in _DIVERGENCES.items():
        value = pl.col(column).cast(pl.Float64)
        finite = value.filter(value.is_finite())
        clipped = divergence_clip is not None
        high = finite.quantile(divergence_clip, "linear") if clipped else finite.max()
        bounds += [finite.min().alias(f"{axis}_low"), high.alias(f"{axis}_high")]
    return bounds


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
    columns = ["student_entropy_norm", *_DIVERGENCES.values()]
    grids = measure_grids(tokens, columns)
    clips = [] if divergence_clip is None else [divergence_clip]
    wanted = {"student_entropy_norm": [ENTROPY_CLIP]}
    wanted |= dict.fromkeys(_DIVERGENCES.values(), clips)
    found = exact_quantiles(tokens, grids, wanted)
    entropy = grids["student_entropy_norm"]
    row = {
        "batch_id": None,
        "entropy_low": entropy.low if entropy.num_finite else None,
        "entropy_high": found["student_entropy_norm"][0],
    }
    for axis, column in _DIVERGENCES.items():
        grid = grids[column]
        known = grid.num_finite > 0
        row[f"{axis}_low"] = grid.low if known else None
        row[f"{axis}_high"] = (found[column] or [grid.high])[0] if known else None
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
    """Add ĥ, δ̂, δ̂^fwd, Soft-OR and the Q3 score, Float64; null where `loss_mask` is false.

    Args:
        tokens: Rows of the token table.
        normalization_scope: `run` (all tokens share one min-max) or `batch` (those with one
            `batch_id`).
        divergence_clip: Quantile in (0, 1] at which δ is clipped before its min-max; None for no
            clipping.
        normalization: Bounds measured before (`resolve_normalization`), in place of the two
            options.

    Returns:
        The rows in their order, with `entropy_hat`, `divergence_hat`, `forward_hat`, `soft_or` in
        [0, 1] and `q3_score` in nats.

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
        pl.when("loss_mask").then(normalization.forward_hat()).alias("forward_hat"),
    ).with_columns(
        (1.0 - (1.0 - entropy_hat) * (1.0 - divergence_hat)).alias("soft_or"),
        product_with_infinity(pl.col("forward_kl").cast(pl.Float64), 1.0 - entropy_hat).alias(
            "q3_score"
        ),
    )
