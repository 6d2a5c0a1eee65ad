"""Part two, analyse: one self-contained HTML page from run folders. Never torch.

In: run folders, read through `analysis.run_view`. Out: a page that opens offline, and displays for
notebooks. Statistics come from `analysis`, drawings from `figures`; here findings are worded and
laid out. Read first: `build`, then `page` and one of `sections`.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
