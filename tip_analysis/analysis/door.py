"""`select` and `export`: a run's masks, and a run as flat files, in one call each.

The command line and `import tip_analysis as tip` call these; the work is done in `masks` and
`flat_files`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import polars as pl

from tip_analysis.analysis.flat_files import export_run
from tip_analysis.analysis.masks import write_masks
from tip_analysis.analysis.measurements import Preference
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, CutOptions, Taxonomy
from tip_analysis.core.names import ExportLayout, Scope, SelectionScope
from tip_analysis.core.run_folder import RunLike, open_run


def select(
    run: RunLike,
    *,
    rules: Sequence[str],
    ratios: Sequence[float] = (0.1, 0.2, 0.5),
    seeds: Sequence[int] = (0,),
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT,
    normalization_scope: Scope | str = Scope.RUN,
    divergence_clip: float | None = None,
    measurement: Preference | None = None,
    overwrite: bool = False,
    **cuts: Unpack[CutOptions],
) -> pl.DataFrame:
    """Select tokens by one or more rules, and add the masks to the run folder.

    Args:
        run: a run folder with scored tokens.
        rules: names of rules.
        ratios: ρ in (0, 1], each for every rule.
        seeds: of rules that sample.
        selection_scope: within what tokens compete: `rollout`, `batch` or `run`.
        normalization_scope: whose tokens share one min-max.
        divergence_clip: quantile at which the divergence is clipped before it.
        measurement: which gradients a rule that needs them reads, where several were measured.
        overwrite: make masks again that are there already.
        cuts: `entropy_cut`, `divergence_cut` and `cut_scope`, for rules that read quadrants.

    Returns:
        The masks that were asked for (`schema.MaskTable`), one row per selected token.

    Example:
        tip.select("runs/mine", rules=["soft_or", "q3"], ratios=[0.1])
    """
    return write_masks(
        open_run(run),
        rules=rules,
        retention_ratios=ratios,
        seeds=seeds,
        selection_scope=selection_scope,
        normalization_scope=normalization_scope,
        divergence_clip=divergence_clip,
        cuts=cuts,
        measurement=measurement,
        overwrite=overwrite,
    )


def export(
    run: RunLike,
    to: str | Path,
    *,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    layout: ExportLayout | str = ExportLayout.PLAIN,
    overwrite: bool = False,
    **cuts: Unpack[CutOptions],
) -> dict[Path, int]:
    """Write tokens with their scores, quadrants and masks as flat Parquet files.

    Args:
        run: a run folder with scored tokens.
        to: the folder to write.
        taxonomy: cuts and normalization.
        layout: `plain`, or `verl`: masks also as verl's `response_mask`, by uid.
        overwrite: replace what the folder holds.
        cuts: `entropy_cut`, `divergence_cut`, `cut_scope` in place of the taxonomy's.

    Returns:
        Each file with its number of rows.

    Example:
        tip.export("runs/mine", "flat", entropy_cut=0.3)
    """
    return export_run(
        open_run(run), Path(to), taxonomy.changed(**cuts), layout=layout, overwrite=overwrite
    )
