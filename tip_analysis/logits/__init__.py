"""Two rows of logits in, numbers out: statistics, losses and their gradients. No input or output.

In: student's and teacher's logits [N, V]. Out: the columns of a token, [N] each; losses with
written-out gradients. `cpu_kernel` and `torch_kernel` are two ways through the same pass
(`totals.RowTotals`). Read first: `row_statistics`, then `probabilities` (why float32 is enough).
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
