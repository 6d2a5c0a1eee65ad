"""Part three, train: masked on-policy distillation, evaluation, ablations.

In: a student, a teacher, prompts (or a run's rollouts), a rule and a retention ratio.
Out: `ablations/*.parquet` and `evaluations/*.parquet`; checkpoints from which an arm goes on
exactly. Read first: `trainer`, then `masked_loss` (Eq. 9) and `ablation.study`.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
