"""Part three, train: masked on-policy distillation, evaluation, ablations.

In: a student, a teacher, prompts (or a run's rollouts), a rule and a retention ratio.
Out: `ablations/*.parquet` and `evaluations/*.parquet`; checkpoints from which an arm goes on
exactly. Read first: `trainer`, then `masked_loss` (Eq. 9) and `ablation.study`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
