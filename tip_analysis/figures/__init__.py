"""Figures: each takes a result table and returns a `matplotlib.figure.Figure`. No statistics are
computed here.

Tables come from `quadrants`, `statistics` and `claims`, or from `report.summaries`; the docstring
of a figure names the columns that it reads. `width` is in inches: `COLUMN_WIDTH` fits one column of
a two-column paper (and a phone), `PAGE_WIDTH` the text block; figures lay themselves out for
either. `save_figure` writes vector PDF or SVG.

Colours are the Okabe-Ito set, told apart with any common colour-vision deficiency: the blues are
the uncertain half of the taxonomy (Q1, Q2), vermilion the overconfident tokens (Q3), grey the
solved ones (Q4). The paper's own values are always drawn as hollow marks or hatched bands, never in
a colour of ours.
"""

from tip_analysis.figures.ablations import (
    accuracy_by_ratio,
    claims,
    difference_from_all,
    memory_by_ratio,
)
from tip_analysis.figures.gradients import energy_shares, quadrant_profile
from tip_analysis.figures.groups import group_shares
from tip_analysis.figures.selection import composition, coverage_curve, overlap
from tip_analysis.figures.style import (
    COLUMN_WIDTH,
    INK,
    PAGE_WIDTH,
    QUADRANT_COLORS,
    QUADRANT_NAMES,
    figure_style,
    save_figure,
)
from tip_analysis.figures.taxonomy import cut_sensitivity, quadrant_map, quadrant_shares

__all__ = [
    "COLUMN_WIDTH",
    "INK",
    "PAGE_WIDTH",
    "QUADRANT_COLORS",
    "QUADRANT_NAMES",
    "accuracy_by_ratio",
    "claims",
    "composition",
    "coverage_curve",
    "cut_sensitivity",
    "difference_from_all",
    "energy_shares",
    "figure_style",
    "group_shares",
    "memory_by_ratio",
    "overlap",
    "quadrant_map",
    "quadrant_profile",
    "quadrant_shares",
    "save_figure",
]
