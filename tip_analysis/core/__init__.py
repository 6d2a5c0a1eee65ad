"""What every room needs and that needs no room: errors, table contracts, run folders.

In: paths, and rows of tables. Out: validated Parquet shards and `run.json`, each complete or
absent. Nothing here knows a model, a statistic or a page. Read first: `schema` (what a row means),
then `run_folder` (how rows get to disk).
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
