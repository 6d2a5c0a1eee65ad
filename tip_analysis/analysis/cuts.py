"""Cut-offs on student entropy and divergence: what they may be, and what they are once measured.

Reads and writes nothing; `taxonomy` measures them. The paper gives no cut-offs, so a cut is a named
choice per axis that is measured once and recorded (`Cut`): `median`, `mean`, a quantile (`q0.8`), a
number in nats, `otsu` (the split with the largest between-class variance), or the joint preset
`paper` (`paper_preset`). High means strictly above the cut.

A divergence of +inf is high whatever the cut, and takes no part in measuring one; it is counted
(`Cuts.num_infinite`).
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from tip_analysis.analysis.quadrant_rule import is_high_expression, quadrant_expression
from tip_analysis.core.errors import OptionError
from tip_analysis.core.lazy_display import notebook_html
from tip_analysis.core.names import Axis, CutKind, Scope

AXIS_COLUMNS: dict[Axis, str] = {Axis.ENTROPY: "student_entropy", Axis.DIVERGENCE: "reverse_kl"}
"""The column of each axis, both in nats."""

DEFAULT_CUTS: dict[Axis, str] = {Axis.ENTROPY: "median", Axis.DIVERGENCE: "mean"}

CUT_FORMS = "median, mean, otsu, paper, a quantile such as q0.8, or a number in nats"


@dataclass(frozen=True)
class CutSpec:
    """A cut as it is asked for: its kind, and the quantile or the nats where the kind has one."""

    kind: CutKind
    number: float | None = None

    @property
    def quantile(self) -> float:
        """In [0, 1]; ½ for the median."""
        return 0.5 if self.number is None else self.number

    def __str__(self) -> str:
        if self.kind is CutKind.QUANTILE:
            return f"q{self.number:g}"
        return f"{self.number:g}" if self.kind is CutKind.NATS else self.kind.value


@dataclass(frozen=True)
class Cut:
    """A cut as it was measured: high is strictly above `value`."""

    axis: Axis
    spec: str
    scope: Scope
    value: float | None
    """Nats; None under scope `batch`, or where no token can be measured."""
    batch_values: tuple[tuple[int, float], ...] = ()
    """(batch_id, nats) under scope `batch`."""

    def threshold(self) -> float:
        """The value under scope `run`, such that +inf is above it and, where nothing was measured,
        nothing finite is."""
        return np.finfo(np.float32).max.item() if self.value is None else self.value

    def is_high(self) -> pl.Expr:
        """Whether a token is strictly above the cut; +inf always is."""
        if self.scope is Scope.RUN:
            threshold = pl.lit(self.value, dtype=pl.Float64)
        else:
            threshold = self._of_batch()
        return is_high_expression(pl.col(AXIS_COLUMNS[self.axis]), threshold)

    def _of_batch(self) -> pl.Expr:
        return pl.col("batch_id").replace_strict(
            pl.Series([batch for batch, _ in self.batch_values], dtype=pl.Int32),
            pl.Series([value for _, value in self.batch_values], dtype=pl.Float64),
            default=None,
            return_dtype=pl.Float64,
        )


@dataclass(frozen=True)
class Cuts:
    """Both cuts, with what is needed to judge them."""

    entropy: Cut
    divergence: Cut
    num_infinite: int
    """Tokens whose divergence is +inf: high, and left out of the cut."""
    paper_ranges_met: bool | None = None
    """Under the preset `paper`: whether all shares lie in the paper's ranges (in every batch). None
    under other cuts."""

    def quadrant(self) -> pl.Expr:
        """The quadrant of each token; null where a statistic is null."""
        known = [pl.col(name).is_not_null() for name in AXIS_COLUMNS.values()]
        named = quadrant_expression(self.entropy.is_high(), self.divergence.is_high())
        return pl.when(*known).then(named).alias("quadrant")

    def _repr_html_(self) -> str:
        return notebook_html(self)


def shares_by_construction(cuts: Cuts) -> list[str]:
    """Which of the shares Q1+Q2, Q3 and Q4 the form of the cuts fixes whatever the data: a quantile
    of the entropy fixes the uncertain share, the preset `paper` aims at all three."""
    kind = parse_cut(cuts.entropy.spec, Axis.ENTROPY).kind
    if kind is CutKind.PAPER:
        return ["Q1+Q2", "Q3", "Q4"]
    return ["Q1+Q2"] if kind in (CutKind.MEDIAN, CutKind.QUANTILE) else []


def parse_cut(cut: str | float, axis: Axis = Axis.ENTROPY) -> CutSpec:
    """Read a cut: a name, `q` and a quantile, or a number in nats (as a number or as text).

    Raises:
        OptionError: it is none of these, or out of its range.
    """
    text = str(cut).strip()
    if text in (CutKind.MEDIAN, CutKind.MEAN, CutKind.OTSU, CutKind.PAPER):
        return CutSpec(CutKind(text))
    is_quantile = text.startswith("q")
    try:
        number = float(text.removeprefix("q"))
    except ValueError:
        raise OptionError(f"{axis} cut must be {CUT_FORMS}; found {text!r}") from None
    if is_quantile:
        if not 0.0 <= number <= 1.0:
            raise OptionError(f"{axis} cut: a quantile lies in [0, 1]; found {text!r}")
        return CutSpec(CutKind.QUANTILE, number)
    if not (math.isfinite(number) and number >= 0.0):
        raise OptionError(f"{axis} cut: nats are finite and not negative; found {text!r}")
    return CutSpec(CutKind.NATS, number)


def joint_specs(entropy_cut: str | float, divergence_cut: str | float) -> tuple[CutSpec, CutSpec]:
    """Both cuts read; `paper` on one axis means `paper` on both.

    Raises:
        OptionError: a cut has no valid form, or `paper` meets another cut than the default.
    """
    entropy, divergence = (
        parse_cut(entropy_cut, Axis.ENTROPY),
        parse_cut(divergence_cut, Axis.DIVERGENCE),
    )
    if CutKind.PAPER not in (entropy.kind, divergence.kind):
        return entropy, divergence
    if str(entropy) not in ("paper", DEFAULT_CUTS[Axis.ENTROPY]) or str(divergence) not in (
        "paper",
        DEFAULT_CUTS[Axis.DIVERGENCE],
    ):
        raise OptionError(
            f"`paper` chooses both cuts together; found entropy cut {str(entropy)!r} and divergence"
            f" cut {str(divergence)!r}: name it for both, or for neither"
        )
    return CutSpec(CutKind.PAPER), CutSpec(CutKind.PAPER)
