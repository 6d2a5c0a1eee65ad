"""ρ, the share of tokens that is kept, as the exact fraction that was meant."""

from fractions import Fraction

import polars as pl

from tip_analysis.core.errors import OptionError


def exact_ratio(retention_ratio: float) -> Fraction:
    """ρ as the fraction that was meant, so that ⌊ρ·m⌋ is exact: 0.1 is 1/10 and 0.1·30 is 3.

    The fraction with a denominator up to 10⁶ within 10⁻¹² of ρ, else up to 10⁹ the nearest one.

    Raises:
        OptionError: ρ is outside (0, 1].
    """
    if not 0.0 < retention_ratio <= 1.0:
        raise OptionError(f"retention_ratio must lie in (0, 1]; found {retention_ratio}")
    written = Fraction(retention_ratio)
    simple = written.limit_denominator(10**6)
    return (
        simple
        if simple > 0 and abs(simple - written) < Fraction(1, 10**12)
        else written.limit_denominator(10**9)
    )


def num_selected(num_tokens: int, retention_ratio: float) -> int:
    """k = max(1, ⌊ρ·m⌋); 0 where there is no token."""
    return min(num_tokens, max(1, int(exact_ratio(retention_ratio) * num_tokens)))


def within(ratio: Fraction) -> pl.Expr:
    """Whether `selection_rank` < max(1, ⌊ρ·m⌋) with m = `num_competing`, in integers."""
    k = pl.max_horizontal(
        pl.col("num_competing") * ratio.numerator // ratio.denominator, pl.lit(1, pl.Int64)
    )
    return (pl.col("selection_rank") < k).fill_null(False)
