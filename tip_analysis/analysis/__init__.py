"""Part two, analyse: tables in, tables out, never torch.

In: a run folder's tables. Out: scores, quadrants, masks, and result tables with prompt-bootstrap
intervals. `run_view` is a run with scores and quadrants under given options: report, notebooks and
figures ask it. Read first: `scores`, `taxonomy` and `quadrants`, then `quadrant_tables`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
