"""Part one, dump: prompts to rollouts, sampled here or imported from other tools.

In: prompt files, a student, or files that verl, TRL, lighteval, lm-eval or vLLM wrote.
Out: `rollouts/*.parquet`, one row per rollout (`core.schema.RolloutTable`), graded where there is
an answer. Read first: `stage`, then `prompts` and `sampling`; formats of other tools are in
`importers`.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
