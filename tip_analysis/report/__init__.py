"""Part two, analyse: one self-contained HTML page from run folders. Never torch.

In: run folders, read through `analysis.run_view`. Out: a page that opens offline, and displays for
notebooks. Statistics come from `analysis`, drawings from `figures`; here findings are worded and
laid out. Read first: `build`, then `page` and one of `sections`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
