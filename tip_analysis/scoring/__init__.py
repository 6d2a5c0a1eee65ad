"""Part one, dump: student and teacher over every token that was written.

In: `rollouts/*.parquet` and two models (or the teacher's stored states).
Out: `tokens/*.parquet`, one row per response token (`core.schema.TokenTable`).
Read first: `scorer` (in memory), then `stage` (shard by shard) and `teacher_states` (two phases).
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
