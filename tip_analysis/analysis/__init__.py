"""Part two, analyse: tables in, tables out, never torch.

In: a run folder's tables. Out: scores, quadrants, masks, and result tables with prompt-bootstrap
intervals. `run_view` is a run with scores and quadrants under given options: report, notebooks and
figures ask it. Read first: `scores`, `taxonomy` and `quadrants`, then `quadrant_tables`.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
