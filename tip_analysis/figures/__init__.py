"""Part two, analyse: result tables in, `matplotlib.figure.Figure` out. No statistics here.

In: a result table of `analysis`; a figure's docstring names the columns that it reads. Out: figures
that lay themselves out for `COLUMN_WIDTH` or `PAGE_WIDTH` (inches), and vector files. Colours and
what they stand for are in `style`. Read first: `taxonomy`, then `style`.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
