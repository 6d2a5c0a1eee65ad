"""The taxonomy's options in one place: where the cuts lie, and how scores are normalised.

Reads the token table; writes nothing. A `Taxonomy` says what is asked for; `Taxonomy.measure` gives
the cuts in nats, which are handed on instead of being measured again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, TypedDict, Unpack

import polars as pl

from tip_analysis.analysis.cut_measuring import CutPair, measure_cuts
from tip_analysis.analysis.cuts import DEFAULT_CUTS, Cuts, joint_specs
from tip_analysis.analysis.grids import ColumnGrid
from tip_analysis.analysis.scores import Normalization, check_clip, resolve_normalization
from tip_analysis.core.names import Axis, Scope, set_names


class CutOptions(TypedDict, total=False):
    """The options of the cuts as keywords; what is left out keeps its default."""

    entropy_cut: str | float
    divergence_cut: str | float
    cut_scope: Scope | str


@dataclass(frozen=True)
class Taxonomy:
    """How tokens are scored and put into quadrants.

    Raises:
        OptionError: a cut has no valid form, `paper` meets another cut, or the clip is no quantile.
        UnknownNameError: there is no such scope.
    """

    entropy_cut: str | float = DEFAULT_CUTS[Axis.ENTROPY]
    """On `student_entropy`: `median`, `mean`, `q0.8`, `otsu`, `paper` or nats."""
    divergence_cut: str | float = DEFAULT_CUTS[Axis.DIVERGENCE]
    """On `reverse_kl`, likewise. `paper` is a joint preset: named for one axis it holds for both,
    and the other axis may name nothing but `paper` or its default."""
    cut_scope: Scope | str = Scope.RUN
    """Whose tokens a cut is measured on."""
    normalization_scope: Scope | str = Scope.RUN
    """Whose tokens share one min-max."""
    divergence_clip: float | None = None
    """Quantile in (0, 1] at which δ is clipped before its min-max; None for no clipping."""

    def __post_init__(self) -> None:
        joint_specs(self.entropy_cut, self.divergence_cut)
        check_clip(self.divergence_clip)
        set_names(self, cut_scope=Scope, normalization_scope=Scope)

    @property
    def specs(self) -> CutPair:
        """Both cuts as they are asked for."""
        return joint_specs(self.entropy_cut, self.divergence_cut)

    def changed(self, **cuts: Unpack[CutOptions]) -> Self:
        """The same with other cuts: how keywords of public functions are taken."""
        return replace(self, **cuts) if cuts else self

    def measure(
        self, tokens: pl.LazyFrame | pl.DataFrame, *, grids: Mapping[str, ColumnGrid] | None = None
    ) -> Cuts:
        """Measure both cuts on the tokens that the student wrote.

        Both columns are collected; above `grids.LARGE_TABLE_ROWS` rows, medians, means and
        quantiles of scope `run` are measured by passes over the table instead, with the same
        result.

        Args:
            tokens: Rows of the token table.
            grids: Of both columns, where they have been measured already; used under scope `run`.

        Raises:
            SchemaError: a column is missing.
        """
        return measure_cuts(tokens.lazy(), self.specs, Scope(self.cut_scope), grids)

    def normalization(self, tokens: pl.LazyFrame | pl.DataFrame) -> Normalization:
        """Measure the bounds of ĥ and δ̂ on the tokens that the student wrote.

        Raises:
            SchemaError: a column is missing.
        """
        return resolve_normalization(
            tokens,
            normalization_scope=self.normalization_scope,
            divergence_clip=self.divergence_clip,
        )

    def arguments(self) -> str:
        """The options as they are typed on a command line."""
        clip = self.divergence_clip
        return (
            f"--entropy-cut {self.entropy_cut} --divergence-cut {self.divergence_cut} "
            f"--normalization-scope {self.normalization_scope}"
            f"{'' if clip is None else f' --divergence-clip {clip:g}'} --cut-scope {self.cut_scope}"
        )


DEFAULT_TAXONOMY = Taxonomy()
"""Median entropy, mean divergence, both over the run."""


def resolve_cuts(tokens: pl.LazyFrame | pl.DataFrame, **cuts: Unpack[CutOptions]) -> Cuts:
    """Measure both cuts on the tokens that the student wrote: `Taxonomy(**cuts).measure(tokens)`.

    Args:
        tokens: Rows of the token table.
        cuts: `entropy_cut`, `divergence_cut` and `cut_scope`, as in `Taxonomy`.

    Raises:
        OptionError: a cut is none of the valid forms, or `paper` meets another cut.
        UnknownNameError: there is no such scope.
        SchemaError: a column is missing.
    """
    return DEFAULT_TAXONOMY.changed(**cuts).measure(tokens)
